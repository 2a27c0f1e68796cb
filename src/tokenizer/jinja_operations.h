// Python's operators, subscripts and methods on values, and the binding of arguments to
// parameters. All fail with the runtime's line where Python raises.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/jinja_value.h"

namespace latente::jinja {

Value arithmetic(Runtime& runtime, std::string_view op, const Value& a, const Value& b);
Value negate(Runtime& runtime, const Value& value);
Value positive(Runtime& runtime, const Value& value);
bool contains(Runtime& runtime, const Value& container, const Value& item);
bool compare_op(Runtime& runtime, std::string_view op, const Value& a, const Value& b);

// object.name: Python's attributes before the object's items; object[key]: the other way round. Undefined
// when there is neither.
Value get_attribute(Runtime& runtime, const Value& object, std::string_view name);
Value get_item(Runtime& runtime, const Value& object, const Value& key);
Value get_slice(Runtime& runtime, const Value& object, const Value& start, const Value& stop,
                const Value& step);
Value reversed(Runtime& runtime, const Value& value);  // value[::-1] of a string or sequence
Value call(Runtime& runtime, const Value& callee, const Args& args);

// Whether the type has a Python attribute of that name, and a callable bound to the value if we have it.
struct Method {
  enum class Status : uint8_t { absent, unsafe, unsupported, found } status = Status::absent;
  Value bound;
};
Method find_method(Runtime& runtime, const Value& object, std::string_view name);
Method find_text_method(Runtime& runtime, const Value& object, std::string_view name);

std::string replace_text(Runtime& runtime, std::string_view text, std::string_view from, std::string_view to,
                         int64_t count);
Value format_text(Runtime& runtime, const Value& text, const Args& args);  // str.format
// Markup stays Markup through text operations.
Value text_like(Runtime& runtime, const Value& like, std::string_view bytes);
std::string pad(Runtime& runtime, std::string_view text, size_t length, int64_t width, std::string_view fill,
                char align);

struct JsonStyle {
  bool ensure_ascii = false, sort_keys = false;
  std::optional<std::string> indent;  // one level of it
  std::string item_separator = ", ", key_separator = ": ";
};
std::string to_json(Runtime& runtime, const Value& value, const JsonStyle& style);
std::optional<double> to_real(Runtime& runtime,
                              const Value& value);  // float(); empty where Python raises ValueError
double round_real(double value, int64_t digits);
// Truncates towards zero; fails beyond 2^120, on infinity and NaN.
Int truncate_real(Runtime& runtime, double value);

// Arguments matched to parameter names; fails on too many, unknown, repeated or missing ones.
class Bound {
 public:
  Bound(Runtime& runtime, std::string_view function, const Args& args,
        std::initializer_list<std::string_view> names, size_t required = 0);
  const Value* operator[](size_t index) const { return values_[index]; }
  bool flag(size_t index, bool otherwise) const;
  std::string text(size_t index, std::string_view otherwise) const;  // of a string; others fail
  int64_t integer(size_t index, int64_t otherwise) const;

 private:
  Runtime& runtime_;
  std::string function_;
  std::vector<const Value*> values_;
};

void no_arguments(Runtime& runtime, std::string_view function, const Args& args);  // fails if there are any

}  // namespace latente::jinja
