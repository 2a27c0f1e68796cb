#include "tokenizer/jinja_interpreter.h"

#include <algorithm>

#include "tokenizer/jinja_evaluator.h"
#include "tokenizer/jinja_loop.h"
#include "tokenizer/jinja_operations.h"

namespace latente::jinja {

namespace {

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

class Interpreter : Evaluator {
 public:
  Interpreter(const Program& program, Runtime& runtime) : Evaluator(program, runtime) {}

  std::string run(const std::vector<std::pair<std::string, Value>>& variables) {
    context_.resize(program_.names.size());
    for (const auto& [name, value] : variables) {
      if (int id = program_.known_id(name); id >= 0) context_[static_cast<size_t>(id)] = value;
    }
    Output output(runtime_);
    Frame frame;
    frame.slots.resize(program_.frame_size);
    enter(frame, program_.scope);
    write_to(output, [&] { block(program_.root, frame); });
    return output.text();
  }

 private:
  enum class Flow { next, break_loop, continue_loop };

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

  template <class Body>
  void write_to(Output& output, Body body) {
    Output* before = std::exchange(out_, &output);
    body();
    out_ = before;
  }

  // Runs `body` with its output going to a text of its own.
  template <class Body>
  Value capture(Body body) {
    Output output(runtime_);
    write_to(output, body);
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

  std::vector<Value> context_;  // by the ids of names
  Output* out_ = nullptr;
};

}  // namespace

std::string run(const Program& program, Runtime& runtime,
                const std::vector<std::pair<std::string, Value>>& variables) {
  return Interpreter(program, runtime).run(variables);
}

}  // namespace latente::jinja
