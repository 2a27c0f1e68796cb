// Attributes, items and slices.
#include <algorithm>

#include "tokenizer/jinja_operations.h"
#include "tokenizer/jinja_text.h"

namespace latente::jinja {

namespace {

Value no_attribute(Runtime& runtime, const Value& object, std::string_view name) {
  std::string type = std::string(type_name(object));
  return runtime.undefined(object.is(Type::none)
                               ? fmt::format("'None' has no attribute '{}'", name)
                               : fmt::format("'{} object' has no attribute '{}'", type, name));
}

// Python's own attribute, if there is one: a method, or a property of namespaces, loops and macros.
std::optional<Value> python_attribute(Runtime& runtime, const Value& object, std::string_view name) {
  if (name.starts_with("__")) {
    // Every object has these; the sandbox hides them.
    static constexpr std::string_view kEvery[] = {
        "__class__",         "__doc__",          "__dir__", "__eq__",     "__ne__",        "__hash__",
        "__init__",          "__repr__",         "__str__", "__reduce__", "__reduce_ex__", "__sizeof__",
        "__subclasshook__",  "__getattribute__", "__new__", "__format__", "__delattr__",   "__setattr__",
        "__init_subclass__", "__lt__",           "__le__",  "__gt__",     "__ge__"};
    if (std::find(std::begin(kEvery), std::end(kEvery), name) == std::end(kEvery)) return {};
    return runtime.undefined(
        fmt::format("access to attribute '{}' of '{}' object is unsafe.", name, type_name(object)));
  }
  if (object.is(Type::ns)) {
    const Value* value = object.ns().attributes.find(name);
    return value ? std::optional<Value>(*value) : std::nullopt;
  }
  if (object.is(Type::function)) {
    return object.function().attribute ? object.function().attribute(name) : std::nullopt;
  }
  Method method = find_method(runtime, object, name);
  switch (method.status) {
    case Method::Status::absent:
      return {};
    case Method::Status::found:
      return method.bound;
    case Method::Status::unsupported:
      runtime.fail("the attribute '{}' of '{}' objects is not supported", name, type_name(object));
    case Method::Status::unsafe:
      break;
  }
  return runtime.undefined(
      fmt::format("access to attribute '{}' of '{}' object is unsafe.", name, type_name(object)));
}

bool is_indexable(const Value& object) {
  if (object.is(Type::string)) return true;
  if (!object.is(Type::sequence)) return false;
  auto kind = object.sequence().kind;
  return kind == Sequence::Kind::list || kind == Sequence::Kind::tuple || kind == Sequence::Kind::range;
}

// object[key] where Python finds one.
std::optional<Value> python_item(Runtime& runtime, const Value& object, const Value& key) {
  if (object.is(Type::dict)) {
    // An unhashable key is a TypeError, which Jinja takes for a missing item.
    if (key.is(Type::dict) || (key.is(Type::sequence) && key.sequence().kind != Sequence::Kind::tuple))
      return {};
    const Value* value = object.dict().find(runtime, key);
    return value ? std::optional<Value>(*value) : std::nullopt;
  }
  if (!is_indexable(object) || !key.is_integral()) return {};
  int64_t length = static_cast<int64_t>(*length_of(runtime, object));
  int64_t index = to_index(runtime, key, "index");
  if (index < 0) index += length;
  if (index < 0 || index >= length) return {};
  auto at = static_cast<size_t>(index);
  if (object.is(Type::sequence)) return object.sequence().items[at];
  const std::string& text = object.string();
  bool ascii = object.length() == text.size();
  if (!ascii) runtime.work(text.size());
  size_t begin = ascii ? at : byte_offset(text, at), end = begin;
  decode_point(text, end);
  return text_like(runtime, object, std::string_view(text).substr(begin, end - begin));
}

}  // namespace

Value text_like(Runtime& runtime, const Value& like, std::string_view bytes) {
  return runtime.text(std::string(bytes), like.is_markup());
}

Value get_attribute(Runtime& runtime, const Value& object, std::string_view name) {
  if (object.is_undefined()) {
    if (name.starts_with("__")) return no_attribute(runtime, object, name);
    runtime.fail("{}", object.undefined_reason());
  }
  if (auto value = python_attribute(runtime, object, name)) return *value;
  if (object.is(Type::dict)) {
    if (const Value* value = object.dict().find(name)) return *value;
  }
  return no_attribute(runtime, object, name);
}

Value get_item(Runtime& runtime, const Value& object, const Value& key) {
  if (object.is_undefined()) runtime.fail("{}", object.undefined_reason());
  if (auto value = python_item(runtime, object, key)) return *value;
  if (key.is(Type::string)) {
    if (auto value = python_attribute(runtime, object, key.string())) return *value;
    return no_attribute(runtime, object, key.string());
  }
  if (object.is(Type::none))
    return runtime.undefined(fmt::format("'None' has no attribute {}", to_repr(runtime, key)));
  return runtime.undefined(
      fmt::format("'{} object' has no element {}", type_name(object), to_repr(runtime, key)));
}

Value get_slice(Runtime& runtime, const Value& object, const Value& start, const Value& stop,
                const Value& step) {
  if (object.is_undefined()) runtime.fail("{}", object.undefined_reason());
  if (object.is(Type::dict)) runtime.fail("unhashable type: 'slice'");
  if (!is_indexable(object)) runtime.fail("'{}' object is not subscriptable", type_name(object));
  for (const Value* bound : {&start, &stop, &step}) {
    if (!bound->is(Type::none) && !bound->is_integral()) {
      runtime.fail("slice indices must be integers or None, found '{}'", type_name(*bound));
    }
  }
  int64_t length = static_cast<int64_t>(*length_of(runtime, object));
  int64_t by = step.is(Type::none) ? 1 : to_index(runtime, step, "slice");
  if (by == 0) runtime.fail("slice step cannot be zero");
  int64_t lowest = by < 0 ? -1 : 0, highest = by < 0 ? length - 1 : length;
  auto bound = [&](const Value& value, int64_t otherwise) {
    if (value.is(Type::none)) return otherwise;
    int64_t index = to_index(runtime, value, "slice");
    if (index < 0) index = std::max(index, -length - 1) + length;
    return std::clamp(index, lowest, highest);
  };
  int64_t first = bound(start, by < 0 ? highest : lowest), last = bound(stop, by < 0 ? lowest : highest);
  std::vector<size_t> picked;
  if (object.is(Type::string)) {
    const std::string& text = object.string();
    runtime.work(text.size());
    if (by == 1) {
      if (first >= last) return text_like(runtime, object, "");
      size_t begin = byte_offset(text, static_cast<size_t>(first));
      std::string_view rest = std::string_view(text).substr(begin);
      return text_like(runtime, object, rest.substr(0, byte_offset(rest, static_cast<size_t>(last - first))));
    }
    std::vector<char32_t> points;
    runtime.reserve_text(object.length() * sizeof(char32_t));
    for (size_t at = 0; at < text.size();) points.push_back(decode_point(text, at));
    std::string out;
    for (int64_t i = first; by > 0 ? i < last : i > last;) {
      append_point(out, points[static_cast<size_t>(i)]);
      if (__builtin_add_overflow(i, by, &i)) break;
    }
    return text_like(runtime, object, out);
  }
  const Sequence& sequence = object.sequence();
  std::vector<Value> items;
  for (int64_t i = first; by > 0 ? i < last : i > last;) {
    items.push_back(sequence.items[static_cast<size_t>(i)]);
    if (__builtin_add_overflow(i, by, &i)) break;
  }
  runtime.step(items.size());
  if (sequence.kind == Sequence::Kind::range) {
    return runtime.range(sequence.start + sequence.step * first, sequence.start + sequence.step * last,
                         sequence.step * by);
  }
  return runtime.sequence(sequence.kind, std::move(items));
}

Value reversed(Runtime& runtime, const Value& value) {
  return get_slice(runtime, value, Value::none(), Value::none(), Value::integer(-1));
}

}  // namespace latente::jinja
