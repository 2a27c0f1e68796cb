// What a reply must look like, token by token: a grammar, for one (grammar_constraint.h).
#pragma once

#include <cstdint>
#include <memory>
#include <span>

namespace latente {

class TokenConstraint {
 public:
  virtual ~TokenConstraint() = default;

  // A constraint of its own in the same place: drafting runs ahead on one. Cheap.
  virtual std::unique_ptr<TokenConstraint> fork() const = 0;

  // The tokens that may come next, a bit a token as in distribution_of; valid until the next call of any
  // member. It covers the model's whole vocabulary; empty = all may.
  virtual std::span<const uint64_t> admitted() = 0;
  // `token` comes. False, and nothing changes, if it may not.
  virtual bool accept(int32_t token) = 0;
  // Nothing may follow but a stop token.
  virtual bool finished() const = 0;
};

// Of a constraint that may be null: then all may come.
inline std::span<const uint64_t> admitted_by(TokenConstraint* constraint) {
  return constraint != nullptr ? constraint->admitted() : std::span<const uint64_t>();
}

}  // namespace latente
