// Operands: literals, names, attributes, calls, filters, tests and assignment targets.
#include <algorithm>

#include "tokenizer/jinja_parser_core.h"

namespace latente::jinja {

Expr* ExpressionParser::unary(bool with_filters) {
  Level level(*this);
  Expr* node;
  if (current().is_op("-") || current().is_op("+")) {
    const Token& sign = next();
    node = program_.expr(sign.text == "-" ? Kind::negative : Kind::positive, sign.line);
    node->items = {unary(false)};
  } else {
    node = primary(false);
  }
  node = postfix(node);
  return with_filters ? filter_chain(node) : node;
}

Expr* ExpressionParser::primary(bool members) {
  const Token& token = current();
  Expr* node = nullptr;
  if (token.kind == TokenKind::name) {
    next();
    const std::string& name = token.text;
    if (name == "true" || name == "false" || name == "True" || name == "False" || name == "none" ||
        name == "None") {
      node = program_.expr(Kind::constant, token.line);
      node->value =
          name[0] == 'n' || name[0] == 'N' ? Value::none() : Value::boolean(name[0] == 't' || name[0] == 'T');
      return node;
    }
    bool member = members && current().is_op(".");
    node = program_.expr(member ? Kind::member : Kind::name, token.line);
    node->id = program_.id(name);
    if (member) {
      next();
      node->text = expect(TokenKind::name).text;
    }
    loop_names_ += name == "loop";
    for (Signature* macro : macros_) {
      macro->uses_caller |= name == "caller";
      macro->uses_varargs |= name == "varargs";
      macro->uses_kwargs |= name == "kwargs";
    }
  } else if (token.kind == TokenKind::string) {
    node = program_.expr(Kind::constant, token.line);
    std::string text;
    while (current().kind == TokenKind::string) text += next().text;
    node->value = Value::constant(std::move(text));
  } else if (token.kind == TokenKind::number) {
    node = program_.expr(Kind::constant, token.line);
    node->value = next().number;
  } else if (token.is_op("(")) {
    next();
    node = tuple({.parenthesised = true});
    expect_op(")");
  } else if (token.is_op("[")) {
    node = list();
  } else if (token.is_op("{")) {
    node = dict();
  } else {
    syntax_error(token.line, fmt::format("unexpected '{}'", describe(token)));
  }
  return node;
}

Expr* ExpressionParser::tuple(const TupleRules& rules) {
  Level level(*this);
  int line = current().line;
  std::vector<Expr*> items;
  bool is_tuple = false;
  while (true) {
    if (!items.empty()) expect_op(",");
    const Token& token = current();
    if (token.kind == TokenKind::print_end || token.kind == TokenKind::block_end || token.is_op(")") ||
        (!rules.end.empty() && token.is_name(rules.end))) {
      break;
    }
    items.push_back(rules.targets ? primary(rules.members) : expression(rules.with_conditional));
    if (!current().is_op(",")) break;
    is_tuple = true;
  }
  if (!is_tuple) {
    if (!items.empty()) return items[0];
    if (!rules.parenthesised) unexpected("an expression");
  }
  Expr* node = program_.expr(Kind::tuple, line);
  node->items = std::move(items);
  return node;
}

void ExpressionParser::check_assignable(const Expr* node) const {
  if (node->kind == Kind::name || node->kind == Kind::member) return;
  if (node->kind != Kind::tuple) syntax_error(node->line, "can't assign to this; expected a name");
  for (const Expr* item : node->items) check_assignable(item);
}

Expr* ExpressionParser::target(std::string_view end, bool members) {
  Expr* node = tuple({.targets = true, .members = members, .end = end});
  check_assignable(node);
  return node;
}

Expr* ExpressionParser::name_target() {
  const Token& token = expect(TokenKind::name);
  static constexpr std::string_view kReserved[] = {"true", "false", "none", "True", "False", "None"};
  if (std::find(std::begin(kReserved), std::end(kReserved), token.text) != std::end(kReserved)) {
    syntax_error(token.line, "can't assign to '" + token.text + "'");
  }
  Expr* node = program_.expr(Kind::name, token.line);
  node->id = program_.id(token.text);
  node->text = token.text;
  return node;
}

Expr* ExpressionParser::list() {
  Expr* node = program_.expr(Kind::list, current().line);
  expect_op("[");
  while (!current().is_op("]")) {
    if (!node->items.empty()) expect_op(",");
    if (current().is_op("]")) break;
    node->items.push_back(expression());
  }
  expect_op("]");
  return node;
}

Expr* ExpressionParser::dict() {
  Expr* node = program_.expr(Kind::dict, current().line);
  expect_op("{");
  while (!current().is_op("}")) {
    if (!node->items.empty()) expect_op(",");
    if (current().is_op("}")) break;
    node->items.push_back(expression());
    expect_op(":");
    node->items.push_back(expression());
  }
  expect_op("}");
  return node;
}

Expr* ExpressionParser::postfix(Expr* node) {
  while (current().is_op(".") || current().is_op("[") || current().is_op("(")) {
    node = current().is_op("(") ? call(node) : subscript(node);
  }
  return node;
}

Expr* ExpressionParser::filter_chain(Expr* node) {
  while (true) {
    if (current().is_op("|")) {
      node = filters(node, false);
    } else if (current().is_name("is")) {
      node = test(node);
    } else if (current().is_op("(")) {
      node = call(node);
    } else {
      return node;
    }
  }
}

Expr* ExpressionParser::subscript(Expr* node) {
  const Token& token = next();
  Expr* whole = program_.expr(Kind::subscript, token.line);
  if (token.is_op(".")) {
    const Token& attribute = next();
    if (attribute.kind == TokenKind::name) {
      whole->kind = Kind::attribute;
      whole->text = attribute.text;
      whole->items = {node};
      return whole;
    }
    if (attribute.kind != TokenKind::number || !attribute.number.is(Type::integer)) {
      syntax_error(attribute.line, "expected name or number");
    }
    Expr* position = program_.expr(Kind::constant, attribute.line);
    position->value = attribute.number;
    whole->items = {node, position};
    return whole;
  }
  std::vector<Expr*> items;
  while (!current().is_op("]")) {
    if (!items.empty()) expect_op(",");
    items.push_back(subscribed());
  }
  expect_op("]");
  Expr* argument = items.size() == 1 ? items[0] : program_.expr(Kind::tuple, token.line);
  if (items.size() != 1) argument->items = std::move(items);
  whole->items = {node, argument};
  return whole;
}

Expr* ExpressionParser::subscribed() {
  int line = current().line;
  Expr* start = nullptr;
  if (!current().is_op(":")) {
    start = expression();
    if (!current().is_op(":")) return start;
  }
  next();
  auto ends = [&] { return current().is_op("]") || current().is_op(","); };
  Expr* stop = current().is_op(":") || ends() ? nullptr : expression();
  Expr* step = skip_op(":") && !ends() ? expression() : nullptr;
  Expr* node = program_.expr(Kind::slice, line);
  node->items = {start, stop, step};
  return node;
}

CallArgs ExpressionParser::call_args() {
  CallArgs args;
  int line = current().line;
  expect_op("(");
  auto ensure = [&](bool fine) {
    if (!fine) syntax_error(line, "invalid syntax for function call expression");
  };
  bool first = true;
  while (!current().is_op(")")) {
    if (!first) {
      expect_op(",");
      if (current().is_op(")")) break;
    }
    first = false;
    if (current().is_op("*")) {
      ensure(!args.star && !args.double_star);
      next();
      args.star = expression();
    } else if (current().is_op("**")) {
      ensure(!args.double_star);
      next();
      args.double_star = expression();
    } else if (current().kind == TokenKind::name && look().is_op("=")) {
      ensure(!args.double_star);
      std::string key = next().text;
      next();
      for (const auto& [have, value] : args.named) {
        if (have == key) syntax_error(line, "keyword argument repeated: " + key);
      }
      args.named.emplace_back(key, expression());
    } else {
      ensure(!args.star && !args.double_star && args.named.empty());
      args.positional.push_back(expression());
    }
  }
  expect_op(")");
  return args;
}

Expr* ExpressionParser::call(Expr* node) {
  Expr* whole = program_.expr(Kind::call, current().line);
  whole->items = {node};
  whole->args = call_args();
  return whole;
}

Expr* ExpressionParser::filters(Expr* subject, bool starts_inline) {
  while (starts_inline || current().is_op("|")) {
    if (!starts_inline) next();
    const Token& token = expect(TokenKind::name);
    Expr* whole = program_.expr(Kind::filter, token.line);
    whole->text = token.text;
    while (skip_op(".")) whole->text += "." + expect(TokenKind::name).text;
    whole->items = {subject};
    if (current().is_op("(")) whole->args = call_args();
    whole->filter = find_filter(whole->text);
    if (!whole->filter && !soft_) unknown_.emplace_back(token.line, "No filter named '" + whole->text + "'.");
    subject = whole;
    starts_inline = false;
  }
  return subject;
}

Expr* ExpressionParser::test(Expr* node) {
  int line = next().line;
  bool negated = skip_name("not");
  Expr* whole = program_.expr(Kind::test, line);
  whole->text = expect(TokenKind::name).text;
  while (skip_op(".")) whole->text += "." + expect(TokenKind::name).text;
  whole->items = {node};
  const Token& token = current();
  bool operand = token.kind == TokenKind::name || token.kind == TokenKind::string ||
                 token.kind == TokenKind::number || token.is_op("[") || token.is_op("{");
  if (token.is_op("(")) {
    whole->args = call_args();
  } else if (operand && !token.is_name("else") && !token.is_name("or") && !token.is_name("and")) {
    if (token.is_name("is")) syntax_error(token.line, "You cannot chain multiple tests with is");
    whole->args.positional = {postfix(primary(false))};
  }
  whole->test = find_test(whole->text);
  if (!whole->test && !soft_) unknown_.emplace_back(line, "No test named '" + whole->text + "'.");
  if (!negated) return whole;
  Expr* negation = program_.expr(Kind::logical_not, line);
  negation->items = {whole};
  return negation;
}

}  // namespace latente::jinja
