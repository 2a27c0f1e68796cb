// Python's two ways to format: `format % values` and `format.format(values)`.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "tokenizer/jinja_operations.h"
#include "tokenizer/jinja_text.h"

namespace latente::jinja {

namespace {

struct Spec {
  std::string fill = " ";
  char align = 0;  // < > ^ =, or 0 for the type's own
  char sign = '-';
  bool alternate = false, grouped = false;
  int64_t width = 0, precision = -1;
  char type = 0;
};

int64_t read_count(Runtime& runtime, std::string_view text, size_t& at) {
  int64_t count = 0;
  while (at < text.size() && text[at] >= '0' && text[at] <= '9') {
    count = count * 10 + (text[at++] - '0');
    if (count > INT32_MAX) runtime.fail("Too many decimal digits in format string");
  }
  return count;
}

std::string group_digits(std::string digits) {
  size_t end = std::min(digits.find_first_not_of("0123456789"), digits.size());
  for (size_t at = end; at > 3; at -= 3) digits.insert(at - 3, ",");
  return digits;
}

std::string printf_real(Runtime& runtime, char type, int64_t precision, bool alternate, double value) {
  if (precision > 1000) runtime.fail("expected a precision of at most 1000, found {}", precision);
  if (std::isnan(value)) return type >= 'a' ? "nan" : "NAN";
  if (std::isinf(value)) return type >= 'a' ? "inf" : "INF";
  std::string format = std::string("%") + (alternate ? "#" : "") + ".*" + type;
  auto size = std::snprintf(nullptr, 0, format.c_str(), static_cast<int>(precision), value);
  std::string out(static_cast<size_t>(size) + 1, 0);
  std::snprintf(out.data(), out.size(), format.c_str(), static_cast<int>(precision), value);
  out.pop_back();
  return out;
}

std::string integer_digits(char type, Int magnitude) {
  switch (type) {
    case 'x':
      return fmt::format("{:x}", magnitude);
    case 'X':
      return fmt::format("{:X}", magnitude);
    case 'o':
      return fmt::format("{:o}", magnitude);
    case 'b':
      return fmt::format("{:b}", magnitude);
    default:
      return integer_text(magnitude);
  }
}

// Sign, prefix and digits, padded between prefix and digits for '=' alignment.
std::string lay_out(Runtime& runtime, const Spec& spec, bool negative, const std::string& prefix,
                    std::string digits) {
  std::string head = (negative ? "-" : spec.sign == '-' ? "" : std::string(1, spec.sign)) + prefix;
  if (spec.grouped) digits = group_digits(std::move(digits));
  char align = spec.align ? spec.align : '>';
  if (align == '=') {
    return head + pad(runtime, digits, digits.size(), spec.width - static_cast<int64_t>(head.size()),
                      spec.fill, '>');
  }
  head += digits;
  return pad(runtime, head, head.size(), spec.width, spec.fill, align);
}

std::string format_integer(Runtime& runtime, const Spec& spec, Int value) {
  bool negative = value < 0;
  if (negative) value = integer_text(value).size() > 39 ? 0 : -value;
  std::string prefix;
  if (spec.alternate && spec.type != 'd') prefix = std::string("0") + spec.type;
  return lay_out(runtime, spec, negative, prefix, integer_digits(spec.type, value));
}

std::string format_float(Runtime& runtime, const Spec& spec, double value) {
  bool negative = std::signbit(value) && !std::isnan(value);
  char type = spec.type == '%' ? 'f' : spec.type;
  double shown = std::fabs(spec.type == '%' ? value * 100 : value);
  std::string digits =
      printf_real(runtime, type, spec.precision < 0 ? 6 : spec.precision, spec.alternate, shown);
  return lay_out(runtime, spec, negative, "", digits + (spec.type == '%' ? "%" : ""));
}

std::string format_text(Runtime& runtime, const Spec& spec, std::string text) {
  if (spec.precision >= 0) text.resize(byte_offset(text, static_cast<size_t>(spec.precision)));
  char align = spec.align && spec.align != '=' ? spec.align : '<';
  return pad(runtime, text, count_points(text), spec.width, spec.fill, align);
}

// One % conversion; at stands after the '%'.
class Percent {
 public:
  Percent(Runtime& runtime, const std::string& format, const Value& argument)
      : runtime_(runtime), format_(format), argument_(argument) {
    tuple_ = argument.is(Type::sequence) && argument.sequence().kind == Sequence::Kind::tuple;
  }

  std::string run() {
    std::string out;
    while (at_ < format_.size()) {
      char c = format_[at_++];
      out += c == '%' ? conversion() : std::string(1, c);
      if (out.size() > 4096) runtime_.check_text(out.size());
    }
    bool unused = tuple_ ? used_ < argument_.sequence().items.size()
                         : used_ == 0 && !argument_.is(Type::dict) && !argument_.is(Type::sequence);
    if (unused) runtime_.fail("not all arguments converted during string formatting");
    return out;
  }

 private:
  const Value& next_argument() {
    if (tuple_ ? used_ >= argument_.sequence().items.size() : used_ > 0) {
      runtime_.fail("not enough arguments for format string");
    }
    return tuple_ ? argument_.sequence().items[used_++] : (++used_, argument_);
  }

  std::string conversion() {
    const Value* keyed = nullptr;
    if (at_ < format_.size() && format_[at_] == '(') {
      if (!argument_.is(Type::dict)) runtime_.fail("format requires a mapping");
      size_t close = format_.find(')', at_);
      if (close == format_.npos) runtime_.fail("incomplete format key");
      std::string key = format_.substr(at_ + 1, close - at_ - 1);
      keyed = argument_.dict().find(key);
      if (!keyed) runtime_.fail("no key '{}' to format", key);
      at_ = close + 1;
    }
    Spec spec;
    bool left = false, zero = false;
    for (; at_ < format_.size(); ++at_) {
      char flag = format_[at_];
      if (flag == '-') {
        left = true;
      } else if (flag == '0') {
        zero = true;
      } else if (flag == '+' || (flag == ' ' && spec.sign != '+')) {
        spec.sign = flag;
      } else if (flag == '#') {
        spec.alternate = true;
      } else if (flag != ' ') {
        break;
      }
    }
    auto count = [&] {
      if (at_ >= format_.size() || format_[at_] != '*') return read_count(runtime_, format_, at_);
      ++at_;
      return to_index(runtime_, next_argument(), "* wants int");
    };
    spec.width = count();
    if (spec.width < 0) {
      left = true;
      spec.width = -spec.width;
    }
    if (at_ < format_.size() && format_[at_] == '.') {
      ++at_;
      spec.precision = std::max<int64_t>(count(), 0);
    }
    if (at_ < format_.size() && std::string_view("hlL").find(format_[at_]) != std::string_view::npos) ++at_;
    if (at_ >= format_.size()) runtime_.fail("incomplete format");
    spec.type = format_[at_++];
    if (spec.type == '%') return "%";
    spec.align = left ? '<' : '>';
    return convert(spec, zero && !left, keyed ? *keyed : next_argument());
  }

  std::string convert(Spec& spec, bool zero, const Value& value) {
    char type = spec.type;
    if (type == 's' || type == 'r' || type == 'a') {
      return format_text(runtime_, spec, type == 's' ? to_text(runtime_, value) : to_repr(runtime_, value));
    }
    if (zero) {
      spec.fill = "0";
      spec.align = '=';
    }
    if (value.is_undefined()) runtime_.fail("{}", value.undefined_reason());
    if (std::string_view("diuxXo").find(type) != std::string_view::npos) {
      bool decimal = type == 'd' || type == 'i' || type == 'u';
      if (!value.is_number() || (!decimal && value.is(Type::real))) {
        runtime_.fail("%{} format: a{} is required, not {}", type, decimal ? " real number" : "n integer",
                      type_name(value));
      }
      if (decimal) spec.type = 'd';
      Int integer = value.is(Type::real) ? truncate_real(runtime_, value.as_real()) : value.as_integer();
      if (spec.precision >= 0) {
        std::string digits = integer_digits(spec.type, integer < 0 ? -integer : integer);
        digits = pad(runtime_, digits, digits.size(), spec.precision, "0", '>');
        std::string prefix = spec.alternate && spec.type != 'd' ? std::string("0") + spec.type : "";
        return lay_out(runtime_, spec, integer < 0, prefix, digits);
      }
      return format_integer(runtime_, spec, integer);
    }
    if (std::string_view("eEfFgG").find(type) != std::string_view::npos) {
      if (!value.is_number()) runtime_.fail("must be real number, not {}", type_name(value));
      return format_float(runtime_, spec, value.as_real());
    }
    if (type == 'c') {
      if (value.is(Type::string) && value.length() == 1) return format_text(runtime_, spec, value.string());
      runtime_.fail("%c requires int or char");
    }
    runtime_.fail("unsupported format character '{}'", type);
  }

  Runtime& runtime_;
  const std::string& format_;
  const Value& argument_;
  bool tuple_;
  size_t at_ = 0, used_ = 0;
};

Spec parse_spec(Runtime& runtime, std::string_view text) {
  Spec spec;
  size_t at = 0, after = 0;
  auto is_align = [&](size_t i) {
    return i < text.size() && std::string_view("<>^=").find(text[i]) != text.npos;
  };
  if (!text.empty()) decode_point(text, after);
  if (is_align(after)) {
    spec.fill = std::string(text.substr(0, after));
    spec.align = text[after];
    at = after + 1;
  } else if (is_align(0)) {
    spec.align = text[at++];
  }
  auto take = [&](char c) { return at < text.size() && text[at] == c ? (++at, true) : false; };
  if (at < text.size() && (text[at] == '+' || text[at] == '-' || text[at] == ' ')) spec.sign = text[at++];
  spec.alternate = take('#');
  if (take('0') && !spec.align) {
    spec.fill = "0";
    spec.align = '=';
  }
  spec.width = read_count(runtime, text, at);
  spec.grouped = take(',');
  if (take('.')) {
    size_t before = at;
    spec.precision = read_count(runtime, text, at);
    if (at == before) runtime.fail("Format specifier missing precision");
  }
  if (at < text.size()) spec.type = text[at++];
  if (at < text.size()) runtime.fail("Invalid format specifier '{}'", text);
  return spec;
}

std::string format_value(Runtime& runtime, const Value& value, std::string_view text) {
  if (text.empty()) return to_text(runtime, value);
  Spec spec = parse_spec(runtime, text);
  bool real_type = spec.type && std::string_view("eEfFgG%").find(spec.type) != std::string_view::npos;
  bool integer_type = spec.type && std::string_view("dxXob").find(spec.type) != std::string_view::npos;
  if (value.is(Type::string) && (!spec.type || spec.type == 's') && spec.align != '=') {
    return format_text(runtime, spec, value.string());
  }
  if (value.is_integral() && spec.precision < 0 && (!spec.type || integer_type)) {
    if (!spec.type) spec.type = 'd';
    return format_integer(runtime, spec, value.as_integer());
  }
  if (value.is_number() && real_type) return format_float(runtime, spec, value.as_real());
  if (value.is(Type::real) && !spec.type && spec.precision < 0) {
    std::string shown = format_real(std::fabs(value.as_real()));
    return lay_out(runtime, spec, std::signbit(value.as_real()), "", shown);
  }
  runtime.fail("the format '{}' is not supported for '{}'", text, type_name(value));
}

}  // namespace

Value format_percent(Runtime& runtime, const Value& format, const Value& argument) {
  return text_like(runtime, format, Percent(runtime, format.string(), argument).run());
}

std::string format_braces(Runtime& runtime, const std::string& format, const Args& args) {
  std::string out;
  size_t automatic = 0;
  for (size_t at = 0; at < format.size();) {
    char c = format[at++];
    bool doubled = at < format.size() && format[at] == c;
    if ((c != '{' && c != '}') || doubled) {
      if (doubled && (c == '{' || c == '}')) ++at;
      out += c;
      continue;
    }
    if (c == '}') runtime.fail("Single '}}' encountered in format string");
    size_t close = format.find_first_of("{}", at);
    if (close == format.npos) runtime.fail("expected '}}' before end of string");
    if (format[close] == '{') runtime.fail("nested format fields are not supported");
    std::string_view field = std::string_view(format).substr(at, close - at);
    at = close + 1;
    std::string_view spec, conversion;
    if (size_t colon = field.find(':'); colon != field.npos) {
      spec = field.substr(colon + 1);
      field = field.substr(0, colon);
    }
    if (size_t mark = field.find('!'); mark != field.npos) {
      conversion = field.substr(mark + 1);
      field = field.substr(0, mark);
    }
    size_t end = std::min(field.find_first_of(".["), field.size());
    std::string_view first = field.substr(0, end);
    Value value;
    bool number = first.empty() || first.find_first_not_of("0123456789") == first.npos;
    if (number) {
      size_t unused = 0;
      size_t index = first.empty() ? automatic++ : static_cast<size_t>(read_count(runtime, first, unused));
      if (index >= args.positional.size()) {
        runtime.fail("Replacement index {} out of range for positional args tuple", index);
      }
      value = args.positional[index];
    } else {
      auto found =
          std::find_if(args.named.begin(), args.named.end(), [&](const auto& a) { return a.first == first; });
      if (found == args.named.end()) runtime.fail("no argument '{}' to format", first);
      value = found->second;
    }
    while (end < field.size()) {
      bool item = field[end] == '[';
      size_t stop = item ? field.find(']', end) : std::min(field.find_first_of(".[", end + 1), field.size());
      if (stop == field.npos) runtime.fail("Missing ']' in format string");
      std::string_view key = field.substr(end + 1, stop - end - 1);
      bool digits = !key.empty() && key.find_first_not_of("0123456789") == key.npos;
      size_t unused = 0;
      value = !item    ? get_attribute(runtime, value, key)
              : digits ? get_item(runtime, value, Value::integer(read_count(runtime, key, unused)))
                       : get_item(runtime, value, runtime.text(key));
      end = stop + (item ? 1 : 0);
    }
    if (conversion == "r") value = runtime.text(to_repr(runtime, value));
    if (conversion == "s") value = runtime.text(to_text(runtime, value));
    out += format_value(runtime, value, spec);
    runtime.check_text(out.size());
  }
  return out;
}

}  // namespace latente::jinja
