// What parsers of grammars and patterns share: a place in a text.
#pragma once

#include <string_view>

namespace latente::grammar {

class Scanner {
 protected:
  explicit Scanner(std::string_view text) : text_(text) {}

  bool done() const { return at_ == text_.size(); }
  char peek() const { return done() ? '\0' : text_[at_]; }
  // Skips `what` if it comes here.
  bool take(std::string_view what) {
    if (!text_.substr(at_).starts_with(what)) return false;
    at_ += what.size();
    return true;
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace latente::grammar
