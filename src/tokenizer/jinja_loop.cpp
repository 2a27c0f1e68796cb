#include "tokenizer/jinja_loop.h"

namespace latente::jinja {

bool Loop::next(Value& item) {
  if (!peek()) return false;
  before_ = std::move(current_);
  current_ = std::move(after_);
  after_.reset();
  ++index_;
  item = *current_;
  return true;
}

bool Loop::peek() {
  Value item;
  if (!after_ && source_(item)) after_ = item;
  return after_.has_value();
}

size_t Loop::length() {
  if (!length_) {
    std::vector<Value> rest;
    for (Value item; source_(item);) {
      if (rest.size() % 1024 == 1023) runtime_.reserve_text(rest.size() * sizeof(Value));
      rest.push_back(item);
    }
    length_ = rest.size() + index_ + (after_ ? 1 : 0);
    Value list = runtime_.list(std::move(rest));
    source_ = iterate(runtime_, list);
  }
  return *length_;
}

Value Loop::cycle(const Args& args) const {
  if (args.positional.empty()) runtime_.fail("no items for cycling given");
  return args.positional[(index_ - 1) % args.positional.size()];
}

Value Loop::changed(const Args& args) {
  bool same = seen_ && seen_->size() == args.positional.size();
  for (size_t i = 0; same && i < seen_->size(); ++i) same = equal(runtime_, (*seen_)[i], args.positional[i]);
  seen_ = args.positional;
  return Value::boolean(!same);
}

std::optional<Value> Loop::attribute(std::string_view name, const std::shared_ptr<Loop>& self) {
  auto count = [](size_t value) { return Value::integer(static_cast<Int>(value)); };
  auto from_end = [&](Int extra) {
    return Value::integer(static_cast<Int>(length()) - static_cast<Int>(index_) + extra);
  };
  if (name == "index") return count(index_);
  if (name == "index0") return Value::integer(static_cast<Int>(index_) - 1);
  if (name == "first") return Value::boolean(index_ == 1);
  if (name == "last") return Value::boolean(!peek());
  if (name == "length") return count(length());
  if (name == "revindex") return from_end(1);
  if (name == "revindex0") return from_end(0);
  if (name == "depth") return count(1);
  if (name == "depth0") return count(0);
  if (name == "previtem") return before_ ? *before_ : runtime_.undefined("there is no previous item");
  if (name == "nextitem") return peek() ? *after_ : runtime_.undefined("there is no next item");
  if (name == "cycle") {
    return runtime_.function("cycle", [self](const Args& args) { return self->cycle(args); });
  }
  if (name == "changed") {
    return runtime_.function("changed", [self](const Args& args) { return self->changed(args); });
  }
  return {};
}

Value make_loop_object(Runtime& runtime, const std::shared_ptr<Loop>& loop) {
  auto* object = runtime.make<Function>();
  object->name = "LoopContext";
  object->attribute = [loop](std::string_view name) { return loop->attribute(name, loop); };
  // As in jinja2, whoever iterates over `loop` gets each element with the loop.
  object->next = [&runtime, loop, object](Value& item) {
    if (!loop->next(item)) return false;
    item = runtime.tuple({item, object});
    return true;
  };
  object->call = [&runtime](const Args&) -> Value {
    runtime.fail("The loop must have the 'recursive' marker to be called recursively.");
  };
  return object;
}

}  // namespace latente::jinja
