// Evaluates the expressions of a Program.
#pragma once

#include <vector>

#include "tokenizer/jinja_ast.h"

namespace latente::jinja {

// The variables of one call of a function.
struct Frame : Object {
  Frame* outer = nullptr;
  std::vector<Value> slots;
};

class Evaluator {
 protected:
  Evaluator(const Program& program, Runtime& runtime) : program_(program), runtime_(runtime) {}

  static Value& at(Frame& frame, Place place) {
    Frame* found = &frame;
    for (int i = 0; i < place.hops; ++i) found = found->outer;
    return found->slots[static_cast<size_t>(place.slot)];
  }

  static Value& slot(Frame& frame, int index) { return frame.slots[static_cast<size_t>(index)]; }

  Value eval(const Expr& node, Frame& frame);
  // `caller`: the macro that a call block hands over; otherwise missing.
  Value call_expr(const Expr& node, Frame& frame, Value caller);

  const Program& program_;
  Runtime& runtime_;
  Value filter_input_;  // of the filters without a subject, at the start of a filter block's chain

 private:
  Value variable(const Expr& node, Frame& frame);
  std::vector<Value> eval_all(const std::vector<Expr*>& nodes, Frame& frame);
  Value dict(const Expr& node, Frame& frame);
  Value conditional(const Expr& node, Frame& frame);
  Value logical(const Expr& node, Frame& frame);
  Value compare_chain(const Expr& node, Frame& frame);
  Value arithmetic_chain(const Expr& node, Frame& frame);
  Value concat(const Expr& node, Frame& frame);
  Value subscript(const Expr& node, Frame& frame);
  Args arguments(const CallArgs& given, Frame& frame);
  Value filter(const Expr& node, Frame& frame);
  Value test(const Expr& node, Frame& frame);
};

}  // namespace latente::jinja
