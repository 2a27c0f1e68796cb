// The parser's state and its two halves: expressions and statements.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "tokenizer/jinja_ast.h"
#include "tokenizer/jinja_lexer.h"

namespace latente::jinja {

class ExpressionParser {
 public:
  ExpressionParser(std::vector<Token> tokens, Program& program)
      : program_(program), tokens_(std::move(tokens)) {}

 protected:
  using Kind = Expr::Kind;

  const Token& current() const { return tokens_[at_]; }
  const Token& look() const { return tokens_[at_ + 1 < tokens_.size() ? at_ + 1 : at_]; }
  const Token& next() { return tokens_[at_ + 1 < tokens_.size() ? at_++ : at_]; }
  bool skip_op(std::string_view op);
  bool skip_name(std::string_view name);
  void expect_op(std::string_view op);
  void expect_name(std::string_view name);
  const Token& expect(TokenKind kind);
  [[noreturn]] void unexpected(std::string_view wanted) const;
  static std::string describe(const Token& token);

  Expr* expression(bool with_conditional = true) { return with_conditional ? conditional() : logical_or(); }
  // An expression, or a tuple when commas follow. `end` ends it too (`in`, `recursive`); `targets` allows
  // names only.
  struct TupleRules {
    bool with_conditional = true, parenthesised = false, targets = false, members = false;
    std::string_view end = {};
  };
  Expr* tuple(const TupleRules& rules);
  Expr* target(std::string_view end, bool members);
  Expr* name_target();
  Expr* filters(Expr* subject, bool starts_inline);
  CallArgs call_args();

  // Filters and tests that do not exist are errors before rendering, but inside Jinja's `if` (soft_) only
  // when reached.
  bool soft_ = false;
  std::vector<std::pair<int, std::string>> unknown_;  // line and message of the former
  // Macros being read, told of their uses of caller, varargs and kwargs.
  std::vector<Signature*> macros_;
  int loop_names_ = 0;  // uses of the name `loop` so far
  Program& program_;

  class Level {
   public:
    explicit Level(ExpressionParser& parser);
    ~Level() { --parser_.level_; }
    Level(const Level&) = delete;
    Level& operator=(const Level&) = delete;

   private:
    ExpressionParser& parser_;
  };

 private:
  Expr* conditional();
  Expr* logical_or();
  Expr* logical_and();
  Expr* logical_not();
  Expr* comparison();
  Expr* sum();
  Expr* concat();
  Expr* product();
  Expr* power();
  Expr* unary(bool with_filters);
  Expr* filtered() { return unary(true); }
  Expr* primary(bool members);
  Expr* postfix(Expr* node);
  Expr* filter_chain(Expr* node);
  Expr* subscript(Expr* node);
  Expr* subscribed();
  Expr* test(Expr* node);
  Expr* call(Expr* node);
  Expr* list();
  Expr* dict();
  Expr* chain(Expr* (ExpressionParser::*operand)(), std::initializer_list<std::string_view> ops);
  void check_assignable(const Expr* node) const;

  std::vector<Token> tokens_;
  size_t at_ = 0;
  int level_ = 0;
};

}  // namespace latente::jinja
