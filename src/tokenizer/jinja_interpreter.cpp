#include "tokenizer/jinja_interpreter.h"

#include <algorithm>

#include "tokenizer/jinja_loop.h"
#include "tokenizer/jinja_operations.h"

namespace latente::jinja {

namespace {

// The variables of one call of a function.
struct Frame : Object {
  Frame* outer = nullptr;
  std::vector<Value> slots;
};

// Text being written, counted as memory while it grows.
class Output {
 public:
  explicit Output(Runtime& runtime) : runtime_(runtime) {}
  ~Output() { runtime_.release(text_.size()); }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;

  void append(std::string_view piece) {
    runtime_.charge(piece.size());
    runtime_.work(piece.size());
    text_ += piece;
    runtime_.check_output(text_.size());
  }
  const std::string& text() const { return text_; }

 private:
  Runtime& runtime_;
  std::string text_;
};

class Interpreter {
 public:
  Interpreter(const Program& program, Runtime& runtime) : program_(program), runtime_(runtime) {}

  std::string run(const std::vector<std::pair<std::string, Value>>& variables) {
    context_.resize(program_.names.size());
    for (const auto& [name, value] : variables) {
      if (int id = program_.known_id(name); id >= 0) context_[static_cast<size_t>(id)] = value;
    }
    Output output(runtime_);
    out_ = &output;
    Frame frame;
    frame.slots.resize(program_.frame_size);
    enter(frame, program_.scope);
    block(program_.root, frame);
    return output.text();
  }

 private:
  enum class Flow { next, break_loop, continue_loop };

  static Value& at(Frame& frame, Place place) {
    Frame* found = &frame;
    for (int i = 0; i < place.hops; ++i) found = found->outer;
    return found->slots[static_cast<size_t>(place.slot)];
  }

  static Value& slot(Frame& frame, int index) { return frame.slots[static_cast<size_t>(index)]; }

  void enter(Frame& frame, const Scope& scope) {
    runtime_.step(scope.variables.size());
    for (const auto& variable : scope.variables) {
      if (variable.load == Scope::Load::missing) slot(frame, variable.slot) = {};
      if (variable.load == Scope::Load::context)
        slot(frame, variable.slot) = context_[static_cast<size_t>(variable.id)];
      if (variable.load == Scope::Load::outer) slot(frame, variable.slot) = at(frame, variable.outer);
    }
  }

  // A macro that outlives the scope finds its variables undefined.
  static void leave(Frame& frame, const Scope& scope) {
    for (const auto& variable : scope.variables) slot(frame, variable.slot) = {};
  }

  // Statements.

  Flow block(const Block& block, Frame& frame) {
    Nested nested(runtime_);
    for (const Stmt* node : block) {
      runtime_.line = node->line;
      runtime_.step();
      if (Flow flow = statement(*node, frame); flow != Flow::next) return flow;
    }
    return Flow::next;
  }

  Flow statement(const Stmt& node, Frame& frame) {
    using Kind = Stmt::Kind;
    switch (node.kind) {
      case Kind::data:
        out_->append(node.text.string());
        break;
      case Kind::print:
        for (const Expr* expr : node.exprs) print(eval(*expr, frame));
        break;
      case Kind::assign:
        assign(*node.target, eval(*node.exprs[0], frame), frame);
        break;
      case Kind::assign_body:
        assign(*node.target, captured(node, frame), frame);
        break;
      case Kind::filter:
        print(captured(node, frame));
        break;
      case Kind::loop:
        return loop(node, frame);
      case Kind::branch:
        return branch(node, frame);
      case Kind::macro:
        at(frame, node.place) = make_macro(node, frame, "Macro '" + node.signature.name + "'");
        break;
      case Kind::call:
        print(call_expr(*node.exprs[0], frame, make_macro(node, frame, "Macro anonymous")));
        break;
      case Kind::with:
        return with(node, frame);
      case Kind::scope:
        return scoped(node.scopes[0], node.bodies[0], frame);
      case Kind::break_loop:
        return Flow::break_loop;
      case Kind::continue_loop:
        return Flow::continue_loop;
    }
    return Flow::next;
  }

  void print(const Value& value) {
    if (value.is(Type::string)) {
      out_->append(value.string());
    } else {
      out_->append(to_text(runtime_, value));
    }
  }

  Flow branch(const Stmt& node, Frame& frame) {
    for (size_t i = 0; i < node.exprs.size(); ++i) {
      if (truth(runtime_, eval(*node.exprs[i], frame))) return block(node.bodies[i], frame);
    }
    return node.bodies.size() > node.exprs.size() ? block(node.bodies.back(), frame) : Flow::next;
  }

  Flow scoped(const Scope& scope, const Block& body, Frame& frame) {
    enter(frame, scope);
    Flow flow = block(body, frame);
    leave(frame, scope);
    return flow;
  }

  Flow with(const Stmt& node, Frame& frame) {
    enter(frame, node.scopes[0]);
    for (size_t i = 0; i < node.exprs.size(); ++i) {
      assign(*node.targets[i], eval(*node.exprs[i], frame), frame);
    }
    Flow flow = block(node.bodies[0], frame);
    leave(frame, node.scopes[0]);
    return flow;
  }

  // Runs `body` with its output going to a text of its own.
  template <class Body>
  Value capture(Body body) {
    Output output(runtime_);
    Output* before = std::exchange(out_, &output);
    body();
    out_ = before;
    return runtime_.text(output.text());
  }

  // The body's text through the node's filters.
  Value captured(const Stmt& node, Frame& frame) {
    enter(frame, node.scopes[0]);
    Value text = capture([&] { block(node.bodies[0], frame); });
    if (!node.exprs.empty()) {
      filter_input_ = std::move(text);
      text = eval(*node.exprs[0], frame);
    }
    leave(frame, node.scopes[0]);
    return text;
  }

  void assign(const Expr& target, Value value, Frame& frame) {
    if (target.kind == Expr::Kind::name) {
      at(frame, target.place) = std::move(value);
    } else if (target.kind == Expr::Kind::member) {
      Value& object = at(frame, target.place);
      if (!object.is(Type::ns)) runtime_.fail("cannot assign attribute on non-namespace object");
      if (target.text[0] == '_')
        runtime_.fail("cannot store the underscore-prefixed attribute '{}'", target.text);
      object.ns().attributes.set(runtime_, runtime_.text(target.text), std::move(value));
    } else {
      unpack(target, value, frame);
    }
  }

  void unpack(const Expr& target, const Value& value, Frame& frame) {
    auto next = iterate(runtime_, value);
    size_t wanted = target.items.size();
    std::vector<Value> parts;
    for (Value part; parts.size() <= wanted && next(part);) parts.push_back(part);
    if (parts.size() != wanted) {
      runtime_.fail("expected {} values to unpack, found {}", wanted,
                    parts.size() > wanted ? "more" : std::to_string(parts.size()));
    }
    for (size_t i = 0; i < wanted; ++i) assign(*target.items[i], std::move(parts[i]), frame);
  }

  Flow loop(const Stmt& node, Frame& frame) {
    Value iterable = eval(*node.exprs[0], frame);
    std::function<bool(Value&)> source = iterate(runtime_, iterable);
    std::optional<size_t> length = length_of(runtime_, iterable);
    if (node.exprs[1]) {
      enter(frame, node.scopes[2]);
      source = [this, &node, &frame, all = std::move(source)](Value& out) {
        while (all(out)) {
          if (passes(node, out, frame)) return true;
        }
        return false;
      };
      length = {};
    }
    auto elements = std::make_shared<Loop>(runtime_, std::move(source), length);
    Value loop_object = node.id >= 0 ? make_loop_object(runtime_, elements) : Value();
    bool completed = false;
    for (Value item; elements->next(item);) {
      runtime_.step();
      if (node.id >= 0) at(frame, node.place) = loop_object;
      assign(*node.target, item, frame);
      enter(frame, node.scopes[0]);
      Flow flow = block(node.bodies[0], frame);
      if (flow == Flow::break_loop) break;
      completed |= flow == Flow::next;
    }
    leave(frame, node.scopes[0]);
    // As in jinja2, `else` runs when no round got to the end of the body, even if there were some.
    if (completed || node.bodies[1].empty()) return Flow::next;
    return scoped(node.scopes[1], node.bodies[1], frame);
  }

  // Whether the loop's condition holds for an element. It may look ahead of the body, whose targets stay.
  bool passes(const Stmt& node, const Value& item, Frame& frame) {
    std::vector<std::pair<Value*, Value>> kept;
    keep(*node.target, frame, kept);
    assign(*node.target, item, frame);
    bool passed = truth(runtime_, eval(*node.exprs[1], frame));
    for (auto& [place, value] : kept) *place = std::move(value);
    return passed;
  }

  static void keep(const Expr& target, Frame& frame, std::vector<std::pair<Value*, Value>>& kept) {
    if (target.kind == Expr::Kind::name) kept.emplace_back(&at(frame, target.place), at(frame, target.place));
    for (const Expr* item : target.items) keep(*item, frame, kept);
  }

  Value make_macro(const Stmt& node, Frame& frame, std::string name) {
    return runtime_.function(std::move(name),
                             [this, &node, &frame](const Args& args) { return invoke(node, frame, args); });
  }

  Value invoke(const Stmt& node, Frame& outer, const Args& args) {
    const Signature& made = node.signature;
    Frame local;
    Frame& frame = made.captured ? *runtime_.make<Frame>() : local;
    if (made.captured) runtime_.charge(made.frame_size * sizeof(Value));
    frame.outer = &outer;
    frame.slots.resize(made.frame_size);
    int line = runtime_.line;
    std::vector<bool> given(made.names.size(), false);
    bind(made, args, frame, given);
    enter(frame, node.scopes[0]);
    for (size_t i = 0; i < made.names.size(); ++i) {
      if (given[i]) continue;
      size_t required = made.names.size() - made.defaults.size();
      slot(frame, made.slots[i]) =
          i < required ? runtime_.undefined(fmt::format("parameter '{}' was not provided", made.names[i]))
                       : eval(*made.defaults[i - required], frame);
    }
    Value text = capture([&] { block(node.bodies[0], frame); });
    runtime_.line = line;
    return text;
  }

  void bind(const Signature& made, const Args& args, Frame& frame, std::vector<bool>& given) {
    size_t count = made.names.size();
    for (size_t i = 0; i < args.positional.size() && i < count; ++i) {
      slot(frame, made.slots[i]) = args.positional[i];
      given[i] = true;
    }
    if (args.positional.size() > count && made.varargs < 0) {
      runtime_.fail("macro '{}' takes not more than {} argument(s)", made.name, count);
    }
    if (made.varargs >= 0) {
      auto first = args.positional.begin() + static_cast<ptrdiff_t>(std::min(count, args.positional.size()));
      slot(frame, made.varargs) = runtime_.tuple({first, args.positional.end()});
    }
    if (made.caller >= 0) slot(frame, made.caller) = runtime_.undefined("No caller defined");
    Dict* rest = made.kwargs >= 0 ? runtime_.dict() : nullptr;
    if (rest) slot(frame, made.kwargs) = rest;
    for (const auto& [name, value] : args.named) {
      auto index =
          static_cast<size_t>(std::find(made.names.begin(), made.names.end(), name) - made.names.begin());
      if (index < count && !given[index]) {
        slot(frame, made.slots[index]) = value;
        given[index] = true;
      } else if (name == "caller" && made.caller >= 0) {
        if (!value.is(Type::none)) slot(frame, made.caller) = value;
      } else if (rest) {
        rest->set(runtime_, runtime_.text(name), value);
      } else {
        runtime_.fail("macro '{}' takes no keyword argument '{}'", made.name, name);
      }
    }
  }

  // Expressions.

  Value eval(const Expr& node, Frame& frame) {
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

  Value variable(const Expr& node, Frame& frame) {
    const Value& value = at(frame, node.place);
    if (!value.is_missing()) return value;
    return runtime_.undefined(fmt::format("'{}' is undefined", program_.names[static_cast<size_t>(node.id)]));
  }

  std::vector<Value> eval_all(const std::vector<Expr*>& nodes, Frame& frame) {
    std::vector<Value> values;
    values.reserve(nodes.size());
    for (const Expr* node : nodes) values.push_back(eval(*node, frame));
    return values;
  }

  Value dict(const Expr& node, Frame& frame) {
    Dict* out = runtime_.dict();
    for (size_t i = 0; i < node.items.size(); i += 2) {
      Value key = eval(*node.items[i], frame);
      out->set(runtime_, std::move(key), eval(*node.items[i + 1], frame));
    }
    return out;
  }

  Value conditional(const Expr& node, Frame& frame) {
    if (truth(runtime_, eval(*node.items[0], frame))) return eval(*node.items[1], frame);
    if (node.items[2]) return eval(*node.items[2], frame);
    return runtime_.undefined(
        fmt::format("the inline if-expression on line {} evaluated to false and no else section was defined.",
                    node.line));
  }

  Value logical(const Expr& node, Frame& frame) {
    bool stops_at = node.kind == Expr::Kind::logical_or;
    Value value;
    for (const Expr* item : node.items) {
      value = eval(*item, frame);
      if (truth(runtime_, value) == stops_at) break;
    }
    return value;
  }

  Value compare_chain(const Expr& node, Frame& frame) {
    Value left = eval(*node.items[0], frame);
    for (size_t i = 0; i < node.ops.size(); ++i) {
      Value right = eval(*node.items[i + 1], frame);
      runtime_.line = node.line;
      if (!compare_op(runtime_, node.ops[i], left, right)) return Value::boolean(false);
      left = std::move(right);
    }
    return Value::boolean(true);
  }

  Value arithmetic_chain(const Expr& node, Frame& frame) {
    Value left = eval(*node.items[0], frame);
    for (size_t i = 0; i < node.ops.size(); ++i) {
      Value right = eval(*node.items[i + 1], frame);
      runtime_.line = node.line;
      left = arithmetic(runtime_, node.ops[i], left, right);
    }
    return left;
  }

  Value concat(const Expr& node, Frame& frame) {
    std::string out;
    for (const Value& value : eval_all(node.items, frame)) {
      out += to_text(runtime_, value);
      runtime_.check_text(out.size());
    }
    return runtime_.text(std::move(out));
  }

  Value subscript(const Expr& node, Frame& frame) {
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

  Args arguments(const CallArgs& given, Frame& frame) {
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
  Value call_expr(const Expr& node, Frame& frame, Value caller) {
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

  Value filter(const Expr& node, Frame& frame) {
    Value subject = node.items[0] ? eval(*node.items[0], frame) : std::move(filter_input_);
    Args args = arguments(node.args, frame);
    runtime_.line = node.line;
    if (!node.filter) runtime_.fail("No filter named '{}' found.", node.text);
    return node.filter(runtime_, subject, args);
  }

  Value test(const Expr& node, Frame& frame) {
    Value subject = eval(*node.items[0], frame);
    Args args = arguments(node.args, frame);
    runtime_.line = node.line;
    if (!node.test) runtime_.fail("No test named '{}' found.", node.text);
    return Value::boolean(node.test(runtime_, subject, args));
  }

  const Program& program_;
  Runtime& runtime_;
  std::vector<Value> context_;  // by the ids of names
  Output* out_ = nullptr;
  Value filter_input_;  // of the filters without a subject, at the start of a filter block's chain
};

}  // namespace

std::string run(const Program& program, Runtime& runtime,
                std::vector<std::pair<std::string, Value>> variables) {
  return Interpreter(program, runtime).run(variables);
}

}  // namespace latente::jinja
