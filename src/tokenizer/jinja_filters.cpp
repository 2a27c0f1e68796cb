// Filters on text and numbers, and the table of all filters.
#include <algorithm>
#include <cmath>
#include <map>

#include "tokenizer/jinja_ast.h"
#include "tokenizer/jinja_filters.h"
#include "tokenizer/jinja_lexer.h"
#include "tokenizer/jinja_operations.h"
#include "tokenizer/jinja_text.h"

namespace latente::jinja {

namespace {

using namespace filters;

// soft_str: text as it is, anything else as str() gives it.
Value soft_text(Runtime& runtime, const Value& value) {
  return value.is(Type::string) ? value : runtime.text(to_text(runtime, value));
}

template <std::string (*Change)(std::string_view)>
Value changed(Runtime& runtime, const Value& value, const Args& args) {
  no_arguments(runtime, "filter", args);
  Value text = soft_text(runtime, value);
  runtime.reserve_text(text.string().size());
  return text_like(runtime, text, Change(text.string()));
}

// Words start after white space and opening brackets.
std::string title_words(std::string_view text) {
  std::string out;
  auto is_break = [](char32_t point) {
    return is_space(point) || point == '-' || point == '(' || point == '{' || point == '[' || point == '<';
  };
  bool inside = false;
  size_t start = 0;
  auto finish = [&](size_t end) {
    std::string_view word = text.substr(start, end - start);
    size_t first = 0;
    if (!word.empty()) decode_point(word, first);
    out += to_upper(word.substr(0, first)) + to_lower(word.substr(first));
    start = end;
  };
  for (size_t at = 0; at < text.size();) {
    size_t before = at;
    bool in_word = !is_break(decode_point(text, at));
    if (in_word != inside) finish(before);
    inside = in_word;
  }
  finish(text.size());
  return out;
}

Value trim(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "trim", args, {"chars"});
  Value text = soft_text(runtime, value);
  runtime.work(text.string().size());
  if (!bound[0] || bound[0]->is(Type::none))
    return text_like(runtime, text, strip(text.string(), {}, true, true));
  std::string chars = bound.text(0, "");
  return text_like(runtime, text, strip(text.string(), chars, true, true));
}

Value replace(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "replace", args, {"old", "new", "count"}, 2);
  int64_t count = bound[2] && !bound[2]->is(Type::none) ? bound.integer(2, -1) : -1;
  std::string text = to_text(runtime, value), from = to_text(runtime, *bound[0]),
              to = to_text(runtime, *bound[1]);
  return runtime.text(replace_text(runtime, text, from, to, count));
}

Value escape(Runtime& runtime, const Value& value, const Args& args) {
  no_arguments(runtime, "escape", args);
  if (value.is_markup()) return value;
  std::string text = to_text(runtime, value);
  runtime.reserve_text(text.size() * 5);
  return runtime.text(escape_html(text), true);
}

Value safe(Runtime& runtime, const Value& value, const Args& args) {
  no_arguments(runtime, "safe", args);
  return runtime.text(to_text(runtime, value), true);
}

Value string(Runtime& runtime, const Value& value, const Args& args) {
  no_arguments(runtime, "string", args);
  return soft_text(runtime, value);
}

Value indent(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "indent", args, {"width", "first", "blank"});
  if (!value.is(Type::string)) {
    if (value.is_undefined()) runtime.fail("{}", value.undefined_reason());
    runtime.fail("indent: expected a string, found '{}'", type_name(value));
  }
  std::string margin;
  if (bound[0] && bound[0]->is(Type::string)) {
    margin = bound[0]->string();
  } else {
    margin = pad(runtime, "", 0, bound.integer(0, 4), " ", '<');
  }
  bool blank = bound.flag(2, false);
  std::string source = value.string() + "\n", out;
  auto lines = split_lines(source, false);
  runtime.reserve_text(source.size() + lines.size() * (margin.size() + 1));
  for (size_t i = 0; i < lines.size(); ++i) {
    if (i > 0) out += "\n";
    if (i > 0 && (blank || !lines[i].empty())) out += margin;
    out += lines[i];
  }
  if (bound.flag(1, false)) out = margin + out;
  return text_like(runtime, value, out);
}

Value to_json_filter(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "tojson", args, {"ensure_ascii", "indent", "separators", "sort_keys"});
  JsonStyle style;
  style.ensure_ascii = bound.flag(0, false);
  style.sort_keys = bound.flag(3, false);
  if (bound[1] && !bound[1]->is(Type::none)) {
    style.indent =
        bound[1]->is(Type::string) ? bound[1]->string() : pad(runtime, "", 0, bound.integer(1, 0), " ", '<');
    style.item_separator = ",";
  }
  if (bound[2] && !bound[2]->is(Type::none)) {
    auto pair = to_vector(runtime, *bound[2]);
    if (pair.size() != 2 || !pair[0].is(Type::string) || !pair[1].is(Type::string)) {
      runtime.fail("tojson: expected two separators");
    }
    style.item_separator = pair[0].string();
    style.key_separator = pair[1].string();
  }
  return runtime.text(to_json(runtime, value, style));
}

Value absolute(Runtime& runtime, const Value& value, const Args& args) {
  no_arguments(runtime, "abs", args);
  if (value.is(Type::real)) return Value::real(std::fabs(value.as_real()));
  if (value.is_integral()) {
    return value.as_integer() < 0 ? negate(runtime, value) : Value::integer(value.as_integer());
  }
  if (value.is_undefined()) runtime.fail("{}", value.undefined_reason());
  runtime.fail("bad operand type for abs(): '{}'", type_name(value));
}

Value to_integer(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "int", args, {"default", "base"});
  if (value.is_undefined()) runtime.fail("{}", value.undefined_reason());
  if (value.is_integral()) return Value::integer(value.as_integer());
  int64_t base = bound.integer(1, 10);
  if (value.is(Type::string)) {
    if (base == 0 || (base >= 2 && base <= 36)) {
      if (auto integer = parse_integer(value.string(), static_cast<int>(base)))
        return Value::integer(*integer);
    }
  }
  if (value.is(Type::real) && std::isinf(value.as_real())) {
    runtime.fail("cannot convert float infinity to integer");
  }
  std::optional<double> real = to_real(runtime, value);
  if (real && std::isfinite(*real)) return Value::integer(truncate_real(runtime, *real));
  return bound[0] ? *bound[0] : Value::integer(0);
}

Value to_float(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "float", args, {"default"});
  if (value.is_undefined()) runtime.fail("{}", value.undefined_reason());
  std::optional<double> real = to_real(runtime, value);
  return real ? Value::real(*real) : bound[0] ? *bound[0] : Value::real(0);
}

Value round(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "round", args, {"precision", "method"});
  std::string method = bound.text(1, "common");
  if (method != "common" && method != "ceil" && method != "floor") {
    runtime.fail("method must be common, ceil or floor");
  }
  int64_t digits = bound.integer(0, 0);
  if (value.is_undefined()) runtime.fail("{}", value.undefined_reason());
  if (!value.is_number()) runtime.fail("type {} doesn't define __round__ method", type_name(value));
  if (method == "common") {
    if (value.is(Type::real)) return Value::real(round_real(value.as_real(), digits));
    if (digits >= 0) return Value::integer(value.as_integer());
    Int unit = 1;
    for (int64_t i = 0; i > digits && i > -38; --i) unit *= 10;
    if (digits < -37) return Value::integer(0);
    Int rest = ((value.as_integer() % unit) + unit) % unit, low = value.as_integer() - rest;
    bool up = rest * 2 > unit || (rest * 2 == unit && (low / unit) % 2 != 0);
    return Value::integer(up ? low + unit : low);
  }
  double scale = std::pow(10.0, static_cast<double>(digits));
  double scaled = value.as_real() * scale;
  if (!std::isfinite(scaled)) runtime.fail("cannot convert {} to integer", format_real(scaled));
  return Value::real((method == "ceil" ? std::ceil(scaled) : std::floor(scaled)) / scale);
}

}  // namespace

std::optional<double> to_real(Runtime&, const Value& value) {
  if (value.is_number()) return value.as_real();
  return value.is(Type::string) ? parse_real(value.string()) : std::nullopt;
}

Int truncate_real(Runtime& runtime, double value) {
  if (!(std::fabs(value) < 0x1p120)) {
    runtime.fail("expected a number below 2^120 to make an integer of, found {}", format_real(value));
  }
  return static_cast<Int>(value);
}

double round_real(double value, int64_t digits) {
  if (!std::isfinite(value) || digits > 323 || value == 0) return value;
  if (digits < -308) return std::copysign(0.0, value);
  if (digits < 0) {
    double unit = std::pow(10.0, static_cast<double>(-digits));
    return std::nearbyint(value / unit) * unit;
  }
  // printf rounds the exact binary value, halves to even, as Python does.
  return *parse_real(fmt::format("{:.{}f}", value, digits));
}

FilterFunction find_filter(std::string_view name) {
  static const std::map<std::string_view, FilterFunction> table = {
      {"abs", absolute},
      {"capitalize", changed<to_capitalized>},
      {"count", length},
      {"d", default_value},
      {"default", default_value},
      {"dictsort", dict_sort},
      {"e", escape},
      {"escape", escape},
      {"first", first},
      {"float", to_float},
      {"indent", indent},
      {"int", to_integer},
      {"items", items},
      {"join", join},
      {"last", last},
      {"length", length},
      {"list", list},
      {"lower", changed<to_lower>},
      {"map", map},
      {"max", max},
      {"min", min},
      {"reject", reject},
      {"rejectattr", reject_attr},
      {"replace", replace},
      {"reverse", reverse},
      {"round", round},
      {"safe", safe},
      {"select", select},
      {"selectattr", select_attr},
      {"sort", sort},
      {"string", string},
      {"sum", sum},
      {"title", changed<title_words>},
      {"tojson", to_json_filter},
      {"trim", trim},
      {"unique", unique},
      {"upper", changed<to_upper>},
  };
  auto found = table.find(name);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace latente::jinja
