#include "tokenizer/jinja_evaluator.h"

#include "tokenizer/jinja_operations.h"

namespace latente::jinja {

Value Evaluator::eval(const Expr& node, Frame& frame) {
  Nested nested(runtime_);
  runtime_.step();
  runtime_.line = node.line;
  using Kind = Expr::Kind;
  switch (node.kind) {
    case Kind::constant:
      return node.value;
    case Kind::name:
    case Kind::member:
      return variable(node, frame);
    case Kind::list:
      return runtime_.list(eval_all(node.items, frame));
    case Kind::tuple:
      return runtime_.tuple(eval_all(node.items, frame));
    case Kind::dict:
      return dict(node, frame);
    case Kind::conditional:
      return conditional(node, frame);
    case Kind::logical_or:
    case Kind::logical_and:
      return logical(node, frame);
    case Kind::logical_not:
      return Value::boolean(!truth(runtime_, eval(*node.items[0], frame)));
    case Kind::compare:
      return compare_chain(node, frame);
    case Kind::arithmetic:
      return arithmetic_chain(node, frame);
    case Kind::concat:
      return concat(node, frame);
    case Kind::negative:
      return negate(runtime_, eval(*node.items[0], frame));
    case Kind::positive:
      return positive(runtime_, eval(*node.items[0], frame));
    case Kind::attribute: {
      Value object = eval(*node.items[0], frame);
      runtime_.line = node.line;
      return get_attribute(runtime_, object, node.text);
    }
    case Kind::subscript:
      return subscript(node, frame);
    case Kind::slice:
      runtime_.fail("a slice cannot be part of a tuple");
    case Kind::call:
      return call_expr(node, frame, {});
    case Kind::filter:
      return filter(node, frame);
    case Kind::test:
      return test(node, frame);
  }
  return {};
}

Value Evaluator::variable(const Expr& node, Frame& frame) {
  const Value& value = at(frame, node.place);
  if (!value.is_missing()) return value;
  return runtime_.undefined(fmt::format("'{}' is undefined", program_.names[static_cast<size_t>(node.id)]));
}

std::vector<Value> Evaluator::eval_all(const std::vector<Expr*>& nodes, Frame& frame) {
  std::vector<Value> values;
  values.reserve(nodes.size());
  for (const Expr* node : nodes) values.push_back(eval(*node, frame));
  return values;
}

Value Evaluator::dict(const Expr& node, Frame& frame) {
  Dict* out = runtime_.dict();
  for (size_t i = 0; i < node.items.size(); i += 2) {
    Value key = eval(*node.items[i], frame);
    out->set(runtime_, std::move(key), eval(*node.items[i + 1], frame));
  }
  return out;
}

Value Evaluator::conditional(const Expr& node, Frame& frame) {
  if (truth(runtime_, eval(*node.items[0], frame))) return eval(*node.items[1], frame);
  if (node.items[2]) return eval(*node.items[2], frame);
  return runtime_.undefined(fmt::format(
      "the inline if-expression on line {} evaluated to false and no else section was defined.", node.line));
}

Value Evaluator::logical(const Expr& node, Frame& frame) {
  bool stops_at = node.kind == Expr::Kind::logical_or;
  Value value;
  for (const Expr* item : node.items) {
    value = eval(*item, frame);
    if (truth(runtime_, value) == stops_at) break;
  }
  return value;
}

Value Evaluator::compare_chain(const Expr& node, Frame& frame) {
  Value left = eval(*node.items[0], frame);
  for (size_t i = 0; i < node.ops.size(); ++i) {
    Value right = eval(*node.items[i + 1], frame);
    runtime_.line = node.line;
    if (!compare_op(runtime_, node.ops[i], left, right)) return Value::boolean(false);
    left = std::move(right);
  }
  return Value::boolean(true);
}

Value Evaluator::arithmetic_chain(const Expr& node, Frame& frame) {
  Value left = eval(*node.items[0], frame);
  for (size_t i = 0; i < node.ops.size(); ++i) {
    Value right = eval(*node.items[i + 1], frame);
    runtime_.line = node.line;
    left = arithmetic(runtime_, node.ops[i], left, right);
  }
  return left;
}

Value Evaluator::concat(const Expr& node, Frame& frame) {
  std::string out;
  for (const Value& value : eval_all(node.items, frame)) {
    out += to_text(runtime_, value);
    runtime_.check_text(out.size());
  }
  return runtime_.text(std::move(out));
}

Value Evaluator::subscript(const Expr& node, Frame& frame) {
  Value object = eval(*node.items[0], frame);
  const Expr& key = *node.items[1];
  if (key.kind != Expr::Kind::slice) {
    Value index = eval(key, frame);
    runtime_.line = node.line;
    return get_item(runtime_, object, index);
  }
  auto bound = [&](size_t i) { return key.items[i] ? eval(*key.items[i], frame) : Value::none(); };
  Value start = bound(0), stop = bound(1), step = bound(2);
  runtime_.line = node.line;
  return get_slice(runtime_, object, start, stop, step);
}

Args Evaluator::arguments(const CallArgs& given, Frame& frame) {
  Args args;
  args.positional = eval_all(given.positional, frame);
  for (const auto& [name, value] : given.named) args.named.emplace_back(name, eval(*value, frame));
  if (given.star) {
    for (Value& value : to_vector(runtime_, eval(*given.star, frame)))
      args.positional.push_back(std::move(value));
  }
  if (given.double_star) {
    Value mapping = eval(*given.double_star, frame);
    if (!mapping.is(Type::dict))
      runtime_.fail("argument after ** must be a mapping, not {}", type_name(mapping));
    for (const auto& [key, value] : mapping.dict().entries) {
      if (!key.is(Type::string)) runtime_.fail("keywords must be strings");
      for (const auto& [name, other] : args.named) {
        if (name == key.string()) runtime_.fail("got multiple values for keyword argument '{}'", name);
      }
      args.named.emplace_back(key.string(), value);
    }
    runtime_.step(args.named.size() * args.named.size());
  }
  return args;
}

// `caller`: the macro that a call block hands over; otherwise missing.
Value Evaluator::call_expr(const Expr& node, Frame& frame, Value caller) {
  Value callee = eval(*node.items[0], frame);
  Args args = arguments(node.args, frame);
  runtime_.line = node.line;
  if (!caller.is_missing()) {
    for (const auto& [name, value] : args.named) {
      if (name == "caller") runtime_.fail("got multiple values for keyword argument 'caller'");
    }
    args.named.emplace_back("caller", std::move(caller));
  }
  return call(runtime_, callee, args);
}

Value Evaluator::filter(const Expr& node, Frame& frame) {
  Value subject = node.items[0] ? eval(*node.items[0], frame) : std::move(filter_input_);
  Args args = arguments(node.args, frame);
  runtime_.line = node.line;
  if (!node.filter) runtime_.fail("No filter named '{}' found.", node.text);
  return node.filter(runtime_, subject, args);
}

Value Evaluator::test(const Expr& node, Frame& frame) {
  Value subject = eval(*node.items[0], frame);
  Args args = arguments(node.args, frame);
  runtime_.line = node.line;
  if (!node.test) runtime_.fail("No test named '{}' found.", node.text);
  return Value::boolean(node.test(runtime_, subject, args));
}

}  // namespace latente::jinja
