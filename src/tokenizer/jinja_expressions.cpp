// Operators, from the loosest to the tightest.
#include <algorithm>

#include "tokenizer/jinja_parser_core.h"

namespace latente::jinja {

namespace {
constexpr int kMaxLevel = 100;
}

ExpressionParser::Level::Level(ExpressionParser& parser) : parser_(parser) {
  if (++parser.level_ > kMaxLevel) {
    --parser.level_;
    syntax_error(parser.current().line,
                 fmt::format("expected at most {} nested levels, found more", kMaxLevel));
  }
}

std::string ExpressionParser::describe(const Token& token) {
  switch (token.kind) {
    case TokenKind::data:
      return "template data / text";
    case TokenKind::print_begin:
      return "begin of print statement";
    case TokenKind::print_end:
      return "end of print statement";
    case TokenKind::block_begin:
      return "begin of statement block";
    case TokenKind::block_end:
      return "end of statement block";
    case TokenKind::string:
      return "string";
    case TokenKind::end:
      return "end of template";
    default:
      return token.text;
  }
}

void ExpressionParser::unexpected(std::string_view wanted) const {
  syntax_error(current().line, fmt::format("expected {}, found '{}'", wanted, describe(current())));
}

bool ExpressionParser::skip_op(std::string_view op) {
  if (!current().is_op(op)) return false;
  next();
  return true;
}

bool ExpressionParser::skip_name(std::string_view name) {
  if (!current().is_name(name)) return false;
  next();
  return true;
}

void ExpressionParser::expect_op(std::string_view op) {
  if (!skip_op(op)) unexpected(fmt::format("'{}'", op));
}

void ExpressionParser::expect_name(std::string_view name) {
  if (!skip_name(name)) unexpected(fmt::format("'{}'", name));
}

const Token& ExpressionParser::expect(TokenKind kind) {
  if (current().kind != kind) {
    unexpected(kind == TokenKind::name ? "a name" : "'" + describe({kind, 0, "", {}}) + "'");
  }
  return next();
}

Expr* ExpressionParser::conditional() {
  Level level(*this);
  int line = current().line;
  size_t unknown = unknown_.size();
  Expr* node = logical_or();
  while (skip_name("if")) {
    Expr* condition = logical_or();
    Expr* otherwise = skip_name("else") ? conditional() : nullptr;
    Expr* whole = program_.expr(Kind::conditional, line);
    whole->items = {condition, node, otherwise};
    node = whole;
    unknown_.resize(unknown);
  }
  return node;
}

Expr* ExpressionParser::logical_or() {
  int line = current().line;
  Expr* node = logical_and();
  if (!current().is_name("or")) return node;
  Expr* whole = program_.expr(Kind::logical_or, line);
  whole->items = {node};
  while (skip_name("or")) whole->items.push_back(logical_and());
  return whole;
}

Expr* ExpressionParser::logical_and() {
  int line = current().line;
  Expr* node = logical_not();
  if (!current().is_name("and")) return node;
  Expr* whole = program_.expr(Kind::logical_and, line);
  whole->items = {node};
  while (skip_name("and")) whole->items.push_back(logical_not());
  return whole;
}

Expr* ExpressionParser::logical_not() {
  if (!current().is_name("not")) return comparison();
  Level level(*this);
  Expr* node = program_.expr(Kind::logical_not, next().line);
  node->items = {logical_not()};
  return node;
}

Expr* ExpressionParser::comparison() {
  static constexpr std::string_view kOps[] = {"==", "!=", "<", "<=", ">", ">="};
  Expr* node = sum();
  Expr* whole = nullptr;
  while (true) {
    std::string op;
    if (current().kind == TokenKind::op &&
        std::find(std::begin(kOps), std::end(kOps), current().text) != std::end(kOps)) {
      op = current().text;
    } else if (current().is_name("in")) {
      op = "in";
    } else if (current().is_name("not") && look().is_name("in")) {
      next();
      op = "not in";
    } else {
      return whole ? whole : node;
    }
    if (!whole) {
      whole = program_.expr(Kind::compare, current().line);
      whole->items = {node};
    }
    next();
    whole->ops.push_back(op);
    whole->items.push_back(sum());
  }
}

Expr* ExpressionParser::chain(Expr* (ExpressionParser::*operand)(),
                              std::initializer_list<std::string_view> ops) {
  int line = current().line;
  Expr* node = (this->*operand)();
  Expr* whole = nullptr;
  while (current().kind == TokenKind::op && std::find(ops.begin(), ops.end(), current().text) != ops.end()) {
    if (!whole) {
      whole = program_.expr(Kind::arithmetic, line);
      whole->items = {node};
    }
    whole->ops.push_back(next().text);
    whole->items.push_back((this->*operand)());
  }
  return whole ? whole : node;
}

Expr* ExpressionParser::sum() { return chain(&ExpressionParser::concat, {"+", "-"}); }
Expr* ExpressionParser::product() { return chain(&ExpressionParser::power, {"*", "/", "//", "%"}); }

Expr* ExpressionParser::power() { return chain(&ExpressionParser::filtered, {"**"}); }

Expr* ExpressionParser::concat() {
  int line = current().line;
  Expr* node = product();
  if (!current().is_op("~")) return node;
  Expr* whole = program_.expr(Kind::concat, line);
  whole->items = {node};
  while (skip_op("~")) whole->items.push_back(product());
  return whole;
}

}  // namespace latente::jinja
