// A grammar as a constraint on tokens. It lives here, not with the grammars, since those know no engine, and
// the command, a server and the tests all need it.
#pragma once

#include <string>
#include <vector>

#include "grammar/matcher.h"
#include "infer/token_constraint.h"

namespace latente {

class GrammarConstraint : public TokenConstraint {
 public:
  explicit GrammarConstraint(const std::shared_ptr<const grammar::TokenGrammar>& grammar);

  std::unique_ptr<TokenConstraint> fork() const override;
  std::span<const uint64_t> admitted() override;
  bool accept(int32_t token) override { return matcher_.accept(token); }
  bool finished() const override { return matcher_.finished(); }

 private:
  grammar::Matcher matcher_;
  std::vector<uint64_t> mask_;
};

}  // namespace latente
