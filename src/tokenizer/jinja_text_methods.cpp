// The methods of Python's str.
#include <algorithm>
#include <map>

#include "tokenizer/jinja_operations.h"
#include "tokenizer/jinja_text.h"

namespace latente::jinja {

std::string replace_text(Runtime& runtime, std::string_view text, std::string_view from, std::string_view to,
                         int64_t count) {
  runtime.work(text.size());
  std::string out;
  size_t at = 0;
  auto grow = [&] {
    if (out.size() > size_t{1} << 20) runtime.reserve_text(out.size() / 4096);
  };
  if (from.empty()) {
    for (; count != 0; --count) {
      out += to;
      if (at >= text.size()) return out;
      size_t start = at;
      decode_point(text, at);
      out += text.substr(start, at - start);
      grow();
    }
    return out += text.substr(at);
  }
  for (; count != 0; --count) {
    size_t found = find_bytes(text, from, at);
    if (found == std::string_view::npos) break;
    out.append(text.substr(at, found - at)).append(to);
    at = found + from.size();
    grow();
  }
  return out += text.substr(at);
}

std::string pad(Runtime& runtime, std::string_view text, size_t length, int64_t width, std::string_view fill,
                char align) {
  if (width <= static_cast<int64_t>(length)) return std::string(text);
  size_t missing = static_cast<size_t>(width) - length;
  if (missing > INT32_MAX) missing = INT32_MAX;
  runtime.reserve_text(missing * fill.size() + text.size());
  size_t left = align == '>' ? missing : 0;
  std::string out;
  for (size_t i = 0; i < left; ++i) out += fill;
  out += text;
  for (size_t i = left; i < missing; ++i) out += fill;
  return out;
}

namespace {

struct Call {
  Runtime& runtime;
  Value self;
  const Args& args;
  std::string_view name;

  const std::string& text() const { return self.string(); }
  Value same(std::string_view bytes) const { return text_like(runtime, self, bytes); }
  Bound bind(std::initializer_list<std::string_view> names, size_t required = 0) const {
    return Bound(runtime, name, args, names, required);
  }
  Bound positional(std::initializer_list<std::string_view> names, size_t required = 0) const {
    if (!args.named.empty()) runtime.fail("str.{}() takes no keyword arguments", name);
    return bind(names, required);
  }
};

Value strip_method(const Call& c, bool left, bool right) {
  Bound bound = c.positional({"chars"});
  if (!bound[0] || bound[0]->is(Type::none)) return c.same(strip(c.text(), {}, left, right));
  std::string chars = bound.text(0, "");
  return c.same(strip(c.text(), chars, left, right));
}

Value split_method(const Call& c, bool from_right) {
  Bound bound = c.bind({"sep", "maxsplit"});
  int64_t limit = bound.integer(1, -1);
  std::string_view text = c.text();
  c.runtime.work(text.size());
  std::vector<std::string_view> parts;
  if (!bound[0] || bound[0]->is(Type::none)) {
    parts = from_right ? split_space_right(text, limit) : split_space(text, limit);
  } else {
    std::string separator = bound.text(0, "");
    if (separator.empty()) c.runtime.fail("empty separator");
    if (!from_right) {
      size_t at = 0, found;
      while (limit-- != 0 && (found = find_bytes(text, separator, at)) != text.npos) {
        parts.push_back(text.substr(at, found - at));
        at = found + separator.size();
      }
      parts.push_back(text.substr(at));
    } else {
      c.runtime.step(text.size() * separator.size() / 256);
      size_t found;
      while (limit-- != 0 && (found = text.rfind(separator)) != text.npos) {
        parts.push_back(text.substr(found + separator.size()));
        text = text.substr(0, found);
      }
      parts.push_back(text);
      std::reverse(parts.begin(), parts.end());
    }
  }
  c.runtime.reserve_text(parts.size() * (sizeof(Value) + sizeof(Text)));
  std::vector<Value> items;
  items.reserve(parts.size());
  for (std::string_view part : parts) items.push_back(c.same(part));
  return c.runtime.list(std::move(items));
}

Value partition_method(const Call& c, bool from_right) {
  Bound bound = c.positional({"sep"}, 1);
  std::string separator = bound.text(0, "");
  if (separator.empty()) c.runtime.fail("empty separator");
  std::string_view text = c.text();
  c.runtime.work(text.size());
  if (from_right) c.runtime.step(text.size() * separator.size() / 256);
  size_t found = from_right ? text.rfind(separator) : find_bytes(text, separator);
  if (found == text.npos) {
    if (from_right) return c.runtime.tuple({c.same(""), c.same(""), c.same(text)});
    return c.runtime.tuple({c.same(text), c.same(""), c.same("")});
  }
  return c.runtime.tuple(
      {c.same(text.substr(0, found)), c.same(separator), c.same(text.substr(found + separator.size()))});
}

// The part [start, end) that find, count and startswith look at; empty when start lies beyond the end.
std::optional<std::string_view> window(const Call& c, const Bound& bound, size_t& first) {
  auto length = static_cast<int64_t>(c.self.length());
  auto position = [&](size_t index, int64_t otherwise) {
    if (!bound[index] || bound[index]->is(Type::none)) return otherwise;
    int64_t at = to_index(c.runtime, *bound[index], c.name);
    return at < 0 ? std::max<int64_t>(at + length, 0) : at;
  };
  int64_t start = position(1, 0), end = std::min(position(2, length), length);
  if (start > end) return {};
  first = static_cast<size_t>(start);
  std::string_view text = c.text();
  size_t begin = byte_offset(text, first);
  return text.substr(begin, byte_offset(text.substr(begin), static_cast<size_t>(end - start)));
}

Value find_method_text(const Call& c, bool last, bool must) {
  Bound bound = c.positional({"sub", "start", "end"}, 1);
  std::string needle = bound.text(0, "");
  size_t first = 0, found = std::string::npos;
  c.runtime.work(c.text().size());
  auto part = window(c, bound, first);
  if (part && last) c.runtime.step(part->size() * needle.size() / 256);
  if (part) found = last ? part->rfind(needle) : find_bytes(*part, needle);
  if (found == std::string::npos) {
    if (must) c.runtime.fail("substring not found");
    return Value::integer(-1);
  }
  return Value::integer(Int{first} + count_points(part->substr(0, found)));
}

Value count_method(const Call& c) {
  Bound bound = c.positional({"sub", "start", "end"}, 1);
  std::string needle = bound.text(0, "");
  size_t first = 0, count = 0;
  c.runtime.work(c.text().size());
  auto part = window(c, bound, first);
  if (!part) return Value::integer(0);
  if (needle.empty()) return Value::integer(Int{1} + count_points(*part));
  for (size_t at = 0; (at = find_bytes(*part, needle, at)) != std::string::npos; at += needle.size()) ++count;
  return Value::integer(static_cast<Int>(count));
}

Value affix_method(const Call& c, bool at_end) {
  Bound bound = c.positional({"affix", "start", "end"}, 1);
  size_t first = 0;
  auto part = window(c, bound, first);
  auto matches = [&](const Value& affix) {
    if (!affix.is(Type::string)) {
      c.runtime.fail("{} first arg must be str or a tuple of str, not {}", c.name, type_name(affix));
    }
    return part && (at_end ? part->ends_with(affix.string()) : part->starts_with(affix.string()));
  };
  if (!bound[0]->is(Type::sequence) || bound[0]->sequence().kind != Sequence::Kind::tuple) {
    return Value::boolean(matches(*bound[0]));
  }
  const auto& affixes = bound[0]->sequence().items;
  return Value::boolean(std::any_of(affixes.begin(), affixes.end(), matches));
}

Value join_method(const Call& c) {
  Bound bound = c.positional({"iterable"}, 1);
  std::string out;
  bool first = true;
  auto next = iterate(c.runtime, *bound[0]);
  for (Value item; next(item); first = false) {
    if (!item.is(Type::string))
      c.runtime.fail("sequence item: expected str instance, {} found", type_name(item));
    if (!first) out += c.text();
    out += c.self.is_markup() && !item.is_markup() ? escape_html(item.string()) : item.string();
    if (out.size() > 4096) c.runtime.check_text(out.size());
  }
  return c.same(out);
}

Value justify(const Call& c, char align) {
  Bound bound = c.positional({"width", "fillchar"}, 1);
  std::string fill = bound.text(1, " ");
  if (count_points(fill) != 1) c.runtime.fail("The fill character must be exactly one character long");
  return c.same(pad(c.runtime, c.text(), c.self.length(), bound.integer(0, 0), fill, align));
}

Value zfill(const Call& c) {
  Bound bound = c.positional({"width"}, 1);
  bool sign = c.text().starts_with('-') || c.text().starts_with('+');
  std::string_view digits = std::string_view(c.text()).substr(sign ? 1 : 0);
  int64_t width = bound.integer(0, 0) - (sign ? 1 : 0);
  return c.same(c.text().substr(0, sign ? 1 : 0) +
                pad(c.runtime, digits, c.self.length() - (sign ? 1 : 0), width, "0", '>'));
}

Value replace_method(const Call& c) {
  Bound bound = c.positional({"old", "new", "count"}, 2);
  std::string to = bound.text(1, "");
  if (c.self.is_markup() && !bound[1]->is_markup()) to = escape_html(to);
  return c.same(replace_text(c.runtime, c.text(), bound.text(0, ""), to, bound.integer(2, -1)));
}

Value remove_affix(const Call& c, bool at_end) {
  std::string affix = c.positional({"affix"}, 1).text(0, "");
  std::string_view text = c.text();
  if (at_end) return c.same(text.ends_with(affix) ? text.substr(0, text.size() - affix.size()) : text);
  return c.same(text.starts_with(affix) ? text.substr(affix.size()) : text);
}

Value lines_method(const Call& c) {
  Bound bound = c.bind({"keepends"});
  c.runtime.work(c.text().size());
  std::vector<Value> items;
  for (std::string_view line : split_lines(c.text(), bound.flag(0, false))) items.push_back(c.same(line));
  return c.runtime.list(std::move(items));
}

template <std::string (*Change)(std::string_view)>
Value changed(const Call& c) {
  c.positional({});
  c.runtime.reserve_text(c.text().size());
  return c.same(Change(c.text()));
}

template <CharClass Wanted>
Value is_all(const Call& c) {
  c.positional({});
  c.runtime.work(c.text().size());
  return Value::boolean(all_in(Wanted, c.text()));
}

using Handler = Value (*)(const Call&);
const std::map<std::string_view, Handler>& handlers() {
  static const std::map<std::string_view, Handler> table = {
      {"capitalize", changed<to_capitalized>},
      {"count", count_method},
      {"endswith", [](const Call& c) { return affix_method(c, true); }},
      {"find", [](const Call& c) { return find_method_text(c, false, false); }},
      {"format", [](const Call& c) { return format_text(c.runtime, c.self, c.args); }},
      {"index", [](const Call& c) { return find_method_text(c, false, true); }},
      {"isalnum", is_all<CharClass::alnum>},
      {"isalpha", is_all<CharClass::alpha>},
      {"isdigit", is_all<CharClass::decimal>},
      {"islower", is_all<CharClass::lower>},
      {"isspace", is_all<CharClass::space>},
      {"isupper", is_all<CharClass::upper>},
      {"join", join_method},
      {"ljust", [](const Call& c) { return justify(c, '<'); }},
      {"lower", changed<to_lower>},
      {"lstrip", [](const Call& c) { return strip_method(c, true, false); }},
      {"partition", [](const Call& c) { return partition_method(c, false); }},
      {"removeprefix", [](const Call& c) { return remove_affix(c, false); }},
      {"removesuffix", [](const Call& c) { return remove_affix(c, true); }},
      {"replace", replace_method},
      {"rfind", [](const Call& c) { return find_method_text(c, true, false); }},
      {"rindex", [](const Call& c) { return find_method_text(c, true, true); }},
      {"rjust", [](const Call& c) { return justify(c, '>'); }},
      {"rpartition", [](const Call& c) { return partition_method(c, true); }},
      {"rsplit", [](const Call& c) { return split_method(c, true); }},
      {"rstrip", [](const Call& c) { return strip_method(c, false, true); }},
      {"split", [](const Call& c) { return split_method(c, false); }},
      {"splitlines", lines_method},
      {"startswith", [](const Call& c) { return affix_method(c, false); }},
      {"strip", [](const Call& c) { return strip_method(c, true, true); }},
      {"title", changed<to_title>},
      {"upper", changed<to_upper>},
      {"zfill", zfill},
  };
  return table;
}

}  // namespace

Method find_text_method(Runtime& runtime, const Value& object, std::string_view name) {
  auto found = handlers().find(name);
  if (found == handlers().end()) {
    static constexpr std::string_view kOthers[] = {
        "casefold",     "center",    "encode",      "expandtabs", "format_map", "isascii",  "isdecimal",
        "isidentifier", "isnumeric", "isprintable", "istitle",    "maketrans",  "swapcase", "translate"};
    bool exists = std::find(std::begin(kOthers), std::end(kOthers), name) != std::end(kOthers);
    return {exists ? Method::Status::unsupported : Method::Status::absent, {}};
  }
  auto [method_name, handler] = *found;
  return {Method::Status::found, runtime.function("built-in method " + std::string(name) + " of str object",
                                                  [&runtime, object, method_name = method_name,
                                                   handler = handler](const Args& args) {
                                                    return handler({runtime, object, args, method_name});
                                                  })};
}

}  // namespace latente::jinja
