#include "infer/grammar_constraint.h"

namespace latente {

GrammarConstraint::GrammarConstraint(const std::shared_ptr<const grammar::TokenGrammar>& grammar)
    : matcher_(grammar), mask_(grammar->vocabulary().words()) {}

std::unique_ptr<TokenConstraint> GrammarConstraint::fork() const {
  return std::make_unique<GrammarConstraint>(*this);
}

std::span<const uint64_t> GrammarConstraint::admitted() {
  matcher_.admitted(mask_);
  return mask_;
}

}  // namespace latente
