// str.format: Python's replacement fields and format specifications (library reference, "Format String
// Syntax"), with attributes and items read as Jinja's sandbox reads them.
#include <cmath>
#include <limits>
#include <optional>

#include "tokenizer/jinja_operations.h"
#include "tokenizer/jinja_text.h"

namespace latente::jinja {

namespace {

// [[fill]align][sign][#][0][width][grouping][.precision][type]
struct Spec {
  std::string fill = " ";
  char align = 0, sign = '-', grouping = 0, type = 0;
  bool signs = false, alternate = false, zeros = false;
  int64_t width = 0;
  std::optional<int64_t> precision;
};

constexpr bool is_align(char c) { return c == '<' || c == '>' || c == '=' || c == '^'; }

std::optional<int64_t> read_count(Runtime& runtime, std::string_view text, size_t& at) {
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  if (at >= text.size() || text[at] < '0' || text[at] > '9') return {};
  int64_t count = 0;
  for (; at < text.size() && text[at] >= '0' && text[at] <= '9'; ++at) {
    count = count * 10 + (text[at] - '0');
    if (count > most) runtime.fail("Too many decimal digits in format string");
  }
  return count;
}

Spec parse_spec(Runtime& runtime, std::string_view text) {
  Spec spec;
  size_t at = 0;
  bool filled = false;
  const auto next_is = [&](char c) { return at < text.size() && text[at] == c; };
  if (!text.empty()) {
    size_t behind = 0;
    decode_point(text, behind);
    if (behind < text.size() && is_align(text[behind])) {
      spec.fill = text.substr(0, behind);
      filled = true;
      spec.align = text[behind];
      at = behind + 1;
    } else if (is_align(text[0])) {
      spec.align = text[at++];
    }
  }
  if (at < text.size() && (text[at] == '+' || text[at] == '-' || text[at] == ' ')) {
    spec.signs = true;
    spec.sign = text[at++];
  }
  if (next_is('#')) spec.alternate = true, ++at;
  if (!filled && next_is('0')) {
    spec.zeros = true;
    spec.fill = "0";
    ++at;
  }
  spec.width = read_count(runtime, text, at).value_or(0);
  if (next_is(',') || next_is('_')) spec.grouping = text[at++];
  if (next_is('.')) {
    spec.precision = read_count(runtime, text, ++at);
    if (!spec.precision) runtime.fail("Format specifier missing precision");
  }
  if (at < text.size()) spec.type = text[at++];
  if (at < text.size()) runtime.fail("Invalid format specifier '{}'", text);
  return spec;
}

std::string padded(Runtime& runtime, const Spec& spec, std::string_view prefix, std::string_view body,
                   char usual) {
  const char align = spec.align == 0 ? usual : spec.align;
  const size_t length = count_points(prefix) + count_points(body);
  if (spec.width <= static_cast<int64_t>(length)) return fmt::format("{}{}", prefix, body);
  const size_t missing = static_cast<size_t>(spec.width) - length;
  runtime.reserve_text(missing * spec.fill.size() + prefix.size() + body.size());
  const size_t before = align == '<' ? 0 : align == '^' ? missing / 2 : missing;
  std::string out;
  const auto fill = [&](size_t count) {
    for (size_t i = 0; i < count; ++i) out += spec.fill;
  };
  if (align == '=') out += prefix;
  fill(before);
  if (align != '=') out += prefix;
  out += body;
  fill(missing - before);
  return out;
}

std::string format_string(Runtime& runtime, const Value& value, const Spec& spec) {
  if (spec.type != 0 && spec.type != 's')
    runtime.fail("Unknown format code '{}' for object of type 'str'", spec.type);
  if (spec.signs) runtime.fail("Sign not allowed in string format specifier");
  if (spec.alternate) runtime.fail("Alternate form (#) not allowed in string format specifier");
  if (spec.align == '=') runtime.fail("'=' alignment not allowed in string format specifier");
  if (spec.grouping != 0) runtime.fail("Cannot specify '{}' with 's'.", spec.grouping);
  std::string_view text = value.string();
  if (spec.precision && *spec.precision < static_cast<int64_t>(value.length()))
    text = text.substr(0, byte_offset(text, static_cast<size_t>(*spec.precision)));
  return padded(runtime, spec, "", text, '<');
}

// Digits in groups; zeros in front of them up to the width belong to the groups, too.
std::string grouped(const Spec& spec, std::string digits, std::string_view rest, size_t prefix) {
  const size_t group = spec.type == 'b' || spec.type == 'o' || spec.type == 'x' || spec.type == 'X' ? 4 : 3;
  const bool fills = spec.fill == "0" && (spec.align == '=' || (spec.align == 0 && spec.zeros));
  const auto size_with = [&](size_t count) {
    return count + (spec.grouping != 0 ? (count - 1) / group : 0) + rest.size() + prefix;
  };
  size_t count = digits.size();
  while (fills && static_cast<int64_t>(size_with(count)) < spec.width) ++count;
  digits.insert(0, count - digits.size(), '0');
  std::string out;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (spec.grouping != 0 && i > 0 && (digits.size() - i) % group == 0) out += spec.grouping;
    out += digits[i];
  }
  return out.append(rest);
}

std::string format_number(Runtime& runtime, const Spec& spec, bool negative, std::string_view base,
                          std::string_view digits, std::string_view rest) {
  std::string prefix = negative ? "-" : spec.sign == '-' ? "" : std::string(1, spec.sign);
  prefix += base;
  if (spec.width > static_cast<int64_t>(digits.size()))
    runtime.reserve_text(static_cast<size_t>(spec.width) + digits.size());
  const std::string body = grouped(spec, std::string(digits), rest, prefix.size());
  return padded(runtime, spec, prefix, body, spec.zeros ? '=' : '>');
}

std::string format_integer(Runtime& runtime, Int value, const Spec& spec) {
  if (spec.precision) runtime.fail("Precision not allowed in integer format specifier");
  const bool decimal = spec.type == 0 || spec.type == 'd';
  if (spec.grouping == ',' && !decimal) runtime.fail("Cannot specify ',' with '{}'.", spec.type);
  const bool negative = value < 0;
  const unsigned __int128 size =
      negative ? -static_cast<unsigned __int128>(value) : static_cast<unsigned __int128>(value);
  const auto with = [&](std::string_view base, const std::string& digits) {
    return format_number(runtime, spec, negative, spec.alternate ? base : "", digits, "");
  };
  switch (spec.type) {
    case 0:
    case 'd':
      return with("", fmt::format("{}", size));
    case 'b':
      return with("0b", fmt::format("{:b}", size));
    case 'o':
      return with("0o", fmt::format("{:o}", size));
    case 'x':
      return with("0x", fmt::format("{:x}", size));
    case 'X':
      return with("0X", fmt::format("{:X}", size));
    default:
      runtime.fail("the format code '{}' of 'int' objects is not supported", spec.type);
  }
}

// Without a type: as repr(), or with a precision as 'g' but with a digit behind the point.
std::string plain_real(double size, const Spec& spec) {
  if (!spec.precision || !std::isfinite(size)) return format_real(size);
  const int precision = static_cast<int>(std::max<int64_t>(*spec.precision, 1));
  const std::string scientific = fmt::format("{:.{}e}", size, precision - 1);
  const int exponent = std::stoi(scientific.substr(scientific.find('e') + 1));
  const bool fixed = exponent >= -4 && exponent < precision - 1;
  std::string digits = fixed ? fmt::format("{:.{}f}", size, precision - 1 - exponent)
                             : scientific.substr(0, scientific.find('e'));
  if (digits.find('.') != digits.npos) digits.erase(digits.find_last_not_of('0') + 1);
  if (digits.ends_with('.')) digits.pop_back();
  if (!fixed) return digits + scientific.substr(scientific.find('e'));
  return digits.find('.') == digits.npos ? digits + ".0" : digits;
}

std::string format_float(Runtime& runtime, double value, const Spec& spec) {
  constexpr int64_t most = 400;  // digits: more say nothing of a double
  const int64_t precision = spec.precision.value_or(6);
  if (spec.alternate) runtime.fail("the alternate form of 'float' objects is not supported");
  if (precision > most) runtime.fail("expected a precision of at most {}, found {}", most, precision);
  const bool negative = std::signbit(value) && !std::isnan(value);
  const double size = std::isnan(value) ? value : std::abs(value);
  std::string text;
  switch (spec.type) {
    case 0:
      text = plain_real(size, spec);
      break;
    case 'e':
    case 'E':
    case 'f':
    case 'F':
    case 'g':
    case 'G':
      text = fmt::format(fmt::runtime(fmt::format("{{:.{}{}}}", precision, spec.type)), size);
      break;
    case '%':
      text = fmt::format("{:.{}f}%", size * 100, precision);
      break;
    default:
      runtime.fail("Unknown format code '{}' for object of type 'float'", spec.type);
  }
  const size_t whole = std::min(text.find_first_not_of("0123456789"), text.size());
  if (whole == 0) return format_number(runtime, spec, negative, "", text, "");  // inf and nan
  return format_number(runtime, spec, negative, "", text.substr(0, whole), text.substr(whole));
}

std::string format_value(Runtime& runtime, const Value& value, std::string_view text) {
  if (text.empty()) return to_text(runtime, value);
  if (!value.is(Type::string) && !value.is_number())
    runtime.fail("unsupported format string passed to {}.__format__", type_name(value));
  const Spec spec = parse_spec(runtime, text);
  if (value.is(Type::string)) return format_string(runtime, value, spec);
  if (value.is(Type::real) || std::string_view("eEfFgG%").find(spec.type) != std::string_view::npos)
    return format_float(runtime, value.as_real(), spec);
  return format_integer(runtime, value.as_integer(), spec);
}

// One call: its text, its arguments, and which of them comes next.
class Formatter {
 public:
  Formatter(Runtime& runtime, const Args& args, bool markup)
      : runtime_(runtime), args_(args), markup_(markup) {}

  std::string format(std::string_view text, int depth) {
    if (depth < 0) runtime_.fail("Max string recursion exceeded");
    runtime_.work(text.size());
    std::string out;
    for (size_t at = 0; at < text.size();) {
      const char c = text[at];
      const bool twice = at + 1 < text.size() && text[at + 1] == c;
      if (c != '{' && c != '}') {
        const size_t end = std::min(text.find_first_of("{}", at), text.size());
        out += text.substr(at, end - at);
        at = end;
      } else if (twice) {
        out += c;
        at += 2;
      } else if (c == '}') {
        runtime_.fail("Single '}}' encountered in format string");
      } else {
        const size_t end = end_of_field(text, at + 1);
        out += field(text.substr(at + 1, end - at - 1), depth);
        at = end + 1;
      }
      runtime_.check_text(out.size());
    }
    return out;
  }

 private:
  size_t end_of_field(std::string_view text, size_t at) const {
    int open = 1;
    bool in_brackets = false;
    for (; at < text.size(); ++at) {
      const char c = text[at];
      if (in_brackets) {
        in_brackets = c != ']';
      } else if (c == '[' && open == 1) {
        in_brackets = true;
      } else if (c == '{') {
        ++open;
      } else if (c == '}' && --open == 0) {
        return at;
      }
    }
    runtime_.fail("expected '}}' before end of string");
  }

  // name!conversion:spec
  std::string field(std::string_view text, int depth) {
    size_t end = 0;
    for (bool in_brackets = false; end < text.size(); ++end) {
      if (text[end] == '[') in_brackets = true;
      if (text[end] == ']') in_brackets = false;
      if (!in_brackets && (text[end] == '!' || text[end] == ':')) break;
      if (!in_brackets && text[end] == '{') runtime_.fail("unexpected '{{' in field name");
    }
    Value value = find(text.substr(0, end));
    text.remove_prefix(end);
    if (text.starts_with('!')) {
      if (text.size() < 2) runtime_.fail("end of string while looking for conversion specifier");
      const char conversion = text[1];
      if (text.size() > 2 && text[2] != ':') runtime_.fail("expected ':' after conversion specifier");
      if (conversion == 'r') {
        value = runtime_.text(to_repr(runtime_, value));
      } else if (conversion == 's') {
        value = runtime_.text(to_text(runtime_, value));
      } else {
        runtime_.fail("the conversion '{}' is not supported", conversion);
      }
      text.remove_prefix(2);
    }
    const std::string spec = text.empty() ? "" : format(text.substr(1), depth - 1);
    if (!markup_) return format_value(runtime_, value, spec);
    if (!value.is_markup()) return escape_html(format_value(runtime_, value, spec));
    if (!spec.empty()) runtime_.fail("Unsupported format specification for Markup.");
    return value.string();
  }

  // first.attribute[item]...
  Value find(std::string_view name) {
    const size_t end = std::min(name.find_first_of(".["), name.size());
    Value value = first(name.substr(0, end), end == name.size());
    for (size_t at = end; at < name.size();) {
      if (name[at] == '.') {
        const size_t stop = std::min(name.find_first_of(".[", at + 1), name.size());
        if (stop == at + 1) runtime_.fail("Empty attribute in format string");
        value = get_attribute(runtime_, value, name.substr(at + 1, stop - at - 1));
        at = stop;
      } else {
        const size_t stop = name[at] == '[' ? name.find(']', at) : name.npos;
        if (stop == name.npos) runtime_.fail("Only '.' or '[' may follow ']' in format field specifier");
        if (stop == at + 1) runtime_.fail("Empty attribute in format string");
        const std::string_view key = name.substr(at + 1, stop - at - 1);
        const std::optional<int64_t> index = number(key);
        value = get_item(runtime_, value, index ? Value::integer(*index) : runtime_.text(key));
        at = stop + 1;
      }
    }
    return value;
  }

  // `alone`: no attributes or items follow.
  Value first(std::string_view name, bool alone) {
    std::optional<int64_t> index = number(name);
    if (alone && (name.empty() || index)) {
      if (counts_ && *counts_ != name.empty())
        runtime_.fail("cannot switch between manual field specification and automatic field numbering");
      counts_ = name.empty();
      if (name.empty()) index = next_++;
    }
    if (index) {
      if (*index >= std::ssize(args_.positional))
        runtime_.fail("Replacement index {} out of range for positional args tuple", *index);
      return args_.positional[static_cast<size_t>(*index)];
    }
    for (const auto& [key, value] : args_.named) {
      if (key == name) return value;
    }
    runtime_.fail("format(): no argument named '{}'", name);
  }

  std::optional<int64_t> number(std::string_view text) const {
    size_t at = 0;
    const std::optional<int64_t> value = read_count(runtime_, text, at);
    return at == text.size() ? value : std::nullopt;
  }

  Runtime& runtime_;
  const Args& args_;
  bool markup_;
  std::optional<bool> counts_;  // {} rather than {0}
  int64_t next_ = 0;
};

}  // namespace

Value format_text(Runtime& runtime, const Value& text, const Args& args) {
  constexpr int depth = 2;  // of fields within specifications
  const bool markup = text.is_markup();
  return text_like(runtime, text, Formatter(runtime, args, markup).format(text.string(), depth));
}

}  // namespace latente::jinja
