// Template source to tokens, with Jinja's white-space rules: trim_blocks, lstrip_blocks, `-` and `+` marks.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/jinja_value.h"

namespace latente::jinja {

enum class TokenKind : uint8_t {
  data,
  print_begin,
  print_end,
  block_begin,
  block_end,
  name,
  string,
  number,
  op,
  end
};

struct Token {
  TokenKind kind;
  int line;
  std::string text;  // data, name, string (unescaped), operator
  Value number;      // of a number token

  bool is_op(std::string_view op) const { return kind == TokenKind::op && text == op; }
  bool is_name(std::string_view name) const { return kind == TokenKind::name && text == name; }
};

[[noreturn]] void syntax_error(int line, const std::string& message);

// Throws Error on text that no token can start with, unbalanced brackets and unfinished comments or raw
// blocks. The last token is `end`.
std::vector<Token> tokenize(std::string_view source);

// Reads an integer of Python's syntax (base 2 to 36, or 0 for prefixes); empty where int() raises ValueError
// or the value needs more than 127 bits.
std::optional<Int> parse_integer(std::string_view text, int base);

}  // namespace latente::jinja
