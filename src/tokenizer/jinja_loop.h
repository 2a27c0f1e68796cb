// The elements of a for loop, and the variable `loop` that describes them.
#pragma once

#include <functional>
#include <memory>
#include <optional>

#include "tokenizer/jinja_value.h"

namespace latente::jinja {

// Looks one element ahead when asked whether more follow, and reads the rest when asked for a length that the
// iterable does not have.
class Loop {
 public:
  Loop(Runtime& runtime, std::function<bool(Value&)> source, std::optional<size_t> length)
      : runtime_(runtime), source_(std::move(source)), length_(length) {}

  bool next(Value& item);
  // An attribute that templates may read; empty when there is no such attribute.
  std::optional<Value> attribute(std::string_view name, const std::shared_ptr<Loop>& self);

 private:
  bool peek();
  size_t length();
  Value cycle(const Args& args) const;
  Value changed(const Args& args);

  Runtime& runtime_;
  std::function<bool(Value&)> source_;
  std::optional<size_t> length_;
  std::optional<Value> after_, current_, before_;
  std::optional<std::vector<Value>> seen_;  // the values of the last changed()
  size_t index_ = 0;                        // from 1, once the loop runs
};

Value make_loop_object(Runtime& runtime, const std::shared_ptr<Loop>& loop);

}  // namespace latente::jinja
