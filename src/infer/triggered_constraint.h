// A grammar that holds from a mark in the text on: in texts without the mark anything may come. Calls of
// tools that a model may make or not have this form.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "grammar/matcher.h"
#include "infer/token_constraint.h"

namespace latente {

class TriggeredConstraint : public TokenConstraint {
 public:
  struct Mark {
    std::string text;
    std::shared_ptr<const grammar::TokenGrammar> grammar;  // of what begins with the mark
  };
  // Where marks count.
  struct Scope {
    // Not between these: in a text that begins with `opening`, or, if it is `opened`, inside of it.
    std::string opening{}, closing{};
    bool opened = false;
    bool at_beginning = false;  // only where nothing but white space stands before
  };
  // At least one mark, none empty. Where a mark comes in one token with what its grammar does not go on with,
  // the grammar does not hold.
  TriggeredConstraint(std::vector<Mark> marks, Scope scope);

  std::unique_ptr<TokenConstraint> fork() const override;
  std::span<const uint64_t> admitted() override;
  bool accept(int32_t token) override;
  bool finished() const override { return matcher_ && matcher_->finished(); }

 private:
  enum class State : uint8_t { beginning, between, looking, held, free };
  bool advance();
  bool look();
  void keep(size_t bytes);

  struct Shared {
    std::vector<Mark> marks;
    Scope scope;
    size_t longest;  // mark, in bytes
  };
  std::shared_ptr<const Shared> shared_;
  State state_;
  std::string text_;  // that a mark may be in
  std::optional<grammar::Matcher> matcher_;
  std::vector<uint64_t> mask_;
};

}  // namespace latente
