#include "tokenizer/jinja_operations.h"

#include <algorithm>
#include <cmath>

#include "tokenizer/jinja_text.h"

namespace latente::jinja {

namespace {

[[noreturn]] void bad_operands(Runtime& runtime, std::string_view op, const Value& a, const Value& b) {
  if (a.is_undefined()) runtime.fail("{}", a.undefined_reason());
  if (b.is_undefined()) runtime.fail("{}", b.undefined_reason());
  runtime.fail("unsupported operand type(s) for {}: '{}' and '{}'", op, type_name(a), type_name(b));
}

[[noreturn]] void too_large(Runtime& runtime) {
  runtime.fail("expected an integer below 2^127, found a larger one");
}

constexpr Int kHalf = Int{1} << 62;

Int multiply(Runtime& runtime, Int a, Int b) {
  if (a == 0 || b == 0) return 0;
  bool small = a < kHalf && a > -kHalf && b < kHalf && b > -kHalf;
  if (!small) {
    constexpr Int kMax = (Int{1} << 126) - 1 + (Int{1} << 126);
    Int x = a < 0 ? -a : a, y = b < 0 ? -b : b;
    if (x < 0 || y < 0 || x > kMax / y) too_large(runtime);
  }
  return a * b;
}

Int floor_divide(Int a, Int b) {
  Int quotient = a / b;
  return quotient * b != a && (a < 0) != (b < 0) ? quotient - 1 : quotient;
}

// Python's float modulo: the sign of the divisor.
double floor_modulo(double a, double b) {
  double mod = std::fmod(a, b);
  if (mod == 0) return std::copysign(0.0, b);
  return (mod < 0) != (b < 0) ? mod + b : mod;
}

double floor_quotient(double a, double b) {
  double mod = std::fmod(a, b);
  double quotient = (a - mod) / b;
  if (mod != 0 && (mod < 0) != (b < 0)) quotient -= 1;
  if (quotient == 0) return std::copysign(0.0, a / b);
  double floor = std::floor(quotient);
  return quotient - floor > 0.5 ? floor + 1 : floor;
}

Value integer_power(Runtime& runtime, Int base, Int exponent) {
  if (exponent < 0) {
    if (base == 0) runtime.fail("0.0 cannot be raised to a negative power");
    return Value::real(std::pow(static_cast<double>(base), static_cast<double>(exponent)));
  }
  Int result = 1;
  while (exponent > 0) {
    if (base == 0 || base == 1) return Value::integer(multiply(runtime, result, base));
    if (exponent & 1) result = multiply(runtime, result, base);
    exponent >>= 1;
    if (exponent) base = multiply(runtime, base, base);
  }
  return Value::integer(result);
}

Value integer_op(Runtime& runtime, std::string_view op, Int a, Int b) {
  Int out = 0;
  if (op == "+") {
    if (__builtin_add_overflow(a, b, &out)) too_large(runtime);
    return Value::integer(out);
  }
  if (op == "-") {
    if (__builtin_sub_overflow(a, b, &out)) too_large(runtime);
    return Value::integer(out);
  }
  if (op == "*") return Value::integer(multiply(runtime, a, b));
  if (op == "**") return integer_power(runtime, a, b);
  if (b == 0) {
    runtime.fail("{}", op == "/"   ? "division by zero"
                       : op == "%" ? "integer modulo by zero"
                                   : "integer division or modulo by zero");
  }
  if (op == "/") return Value::real(static_cast<double>(a) / static_cast<double>(b));
  if (b == -1) return op == "//" ? integer_op(runtime, "-", 0, a) : Value::integer(0);
  if (op == "//") return Value::integer(floor_divide(a, b));
  return Value::integer(a - floor_divide(a, b) * b);
}

Value real_op(Runtime& runtime, std::string_view op, double a, double b) {
  if (op == "+") return Value::real(a + b);
  if (op == "-") return Value::real(a - b);
  if (op == "*") return Value::real(a * b);
  if (op == "**") {
    if (a == 0 && b < 0) runtime.fail("0.0 cannot be raised to a negative power");
    double power = std::pow(a, b);
    if (std::isnan(power) && !std::isnan(a) && !std::isnan(b))
      runtime.fail("complex numbers are not supported");
    if (std::isinf(power) && !std::isinf(a) && !std::isinf(b)) runtime.fail("Numerical result out of range");
    return Value::real(power);
  }
  if (b == 0) runtime.fail("float division by zero");
  if (op == "/") return Value::real(a / b);
  return Value::real(op == "//" ? floor_quotient(a, b) : floor_modulo(a, b));
}

Value repeat(Runtime& runtime, const Value& value, Int times) {
  size_t count = times <= 0 ? 0 : times > INT32_MAX ? INT32_MAX : static_cast<size_t>(times);
  if (value.is(Type::string)) {
    const std::string& unit = value.string();
    if (unit.empty() || count == 0) return runtime.text("", value.is_markup());
    runtime.reserve_text(unit.size() * count);
    std::string out;
    out.reserve(unit.size() * count);
    for (size_t i = 0; i < count; ++i) out += unit;
    return runtime.text(std::move(out), value.is_markup());
  }
  const Sequence& sequence = value.sequence();
  if (sequence.items.empty()) count = 0;
  runtime.reserve_text(sequence.items.size() * count * sizeof(Value));
  runtime.step(sequence.items.size() * count);
  std::vector<Value> items;
  items.reserve(sequence.items.size() * count);
  for (size_t i = 0; i < count; ++i) items.insert(items.end(), sequence.items.begin(), sequence.items.end());
  return runtime.sequence(sequence.kind, std::move(items));
}

bool is_array(const Value& value) {
  if (!value.is(Type::sequence)) return false;
  auto kind = value.sequence().kind;
  return kind == Sequence::Kind::list || kind == Sequence::Kind::tuple;
}

Value add_texts(Runtime& runtime, const Value& a, const Value& b) {
  bool markup = a.is_markup() || b.is_markup();
  runtime.reserve_text(a.string().size() + b.string().size());
  auto side = [&](const Value& v) { return markup && !v.is_markup() ? escape_html(v.string()) : v.string(); };
  return runtime.text(side(a) + side(b), markup);
}

}  // namespace

Value arithmetic(Runtime& runtime, std::string_view op, const Value& a, const Value& b) {
  if (op == "%" && a.is(Type::string)) runtime.fail("formatting with % is not supported");
  if (a.is_integral() && b.is_integral()) return integer_op(runtime, op, a.as_integer(), b.as_integer());
  if (a.is_number() && b.is_number()) return real_op(runtime, op, a.as_real(), b.as_real());
  if (op == "+") {
    if (a.is(Type::string) && b.is(Type::string)) return add_texts(runtime, a, b);
    if (is_array(a) && is_array(b) && a.sequence().kind == b.sequence().kind) {
      const auto &x = a.sequence().items, &y = b.sequence().items;
      runtime.step(x.size() + y.size());
      runtime.reserve_text((x.size() + y.size()) * sizeof(Value));
      std::vector<Value> items = x;
      items.insert(items.end(), y.begin(), y.end());
      return runtime.sequence(a.sequence().kind, std::move(items));
    }
  }
  if (op == "*") {
    bool left = a.is(Type::string) || is_array(a), right = b.is(Type::string) || is_array(b);
    if (left && b.is_integral()) return repeat(runtime, a, b.as_integer());
    if (right && a.is_integral()) return repeat(runtime, b, a.as_integer());
  }
  bad_operands(runtime, op, a, b);
}

Value negate(Runtime& runtime, const Value& value) {
  if (value.is(Type::real)) return Value::real(-value.as_real());
  if (value.is_integral()) return integer_op(runtime, "-", 0, value.as_integer());
  if (value.is_undefined()) runtime.fail("{}", value.undefined_reason());
  runtime.fail("bad operand type for unary -: '{}'", type_name(value));
}

Value positive(Runtime& runtime, const Value& value) {
  if (value.is(Type::real)) return value;
  if (value.is_integral()) return Value::integer(value.as_integer());
  if (value.is_undefined()) runtime.fail("{}", value.undefined_reason());
  runtime.fail("bad operand type for unary +: '{}'", type_name(value));
}

bool contains(Runtime& runtime, const Value& container, const Value& item) {
  switch (container.type()) {
    case Type::undefined:
      return false;
    case Type::string:
      if (!item.is(Type::string)) {
        runtime.fail("'in <string>' requires string as left operand, not {}", type_name(item));
      }
      runtime.work(container.string().size() + item.string().size());
      return find_bytes(container.string(), item.string()) != std::string::npos;
    case Type::dict:
      return container.dict().find(runtime, item) != nullptr;
    default: {
      if (!is_iterable(container))
        runtime.fail("argument of type '{}' is not iterable", type_name(container));
      auto next = iterate(runtime, container);
      for (Value have; next(have);) {
        if (equal(runtime, have, item)) return true;
      }
      return false;
    }
  }
}

bool compare_op(Runtime& runtime, std::string_view op, const Value& a, const Value& b) {
  if (op == "==") return equal(runtime, a, b);
  if (op == "!=") return !equal(runtime, a, b);
  if (op == "in") return contains(runtime, b, a);
  if (op == "not in") return !contains(runtime, b, a);
  Order order = compare(runtime, a, b, op);
  if (op == "<") return order == Order::less;
  if (op == ">") return order == Order::greater;
  if (order == Order::unordered) return false;
  return op == "<=" ? order != Order::greater : order != Order::less;
}

Value call(Runtime& runtime, const Value& callee, const Args& args) {
  if (callee.is_undefined()) runtime.fail("{}", callee.undefined_reason());
  if (!callee.is(Type::function)) runtime.fail("'{}' object is not callable", type_name(callee));
  Nested nested(runtime);
  return callee.function().call(args);
}

Bound::Bound(Runtime& runtime, std::string_view function, const Args& args,
             std::initializer_list<std::string_view> names, size_t required)
    : runtime_(runtime), function_(function), values_(names.size(), nullptr) {
  if (args.positional.size() > names.size()) {
    runtime.fail("{}() takes at most {} arguments ({} given)", function, names.size(),
                 args.positional.size());
  }
  for (size_t i = 0; i < args.positional.size(); ++i) values_[i] = &args.positional[i];
  for (const auto& [name, value] : args.named) {
    auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end()) runtime.fail("{}() got an unexpected keyword argument '{}'", function, name);
    auto index = static_cast<size_t>(found - names.begin());
    if (values_[index]) runtime.fail("{}() got multiple values for argument '{}'", function, name);
    values_[index] = &value;
  }
  for (size_t i = 0; i < required; ++i) {
    if (!values_[i]) runtime.fail("{}() missing required argument '{}'", function, std::data(names)[i]);
  }
}

bool Bound::flag(size_t index, bool otherwise) const {
  return values_[index] ? truth(runtime_, *values_[index]) : otherwise;
}

std::string Bound::text(size_t index, std::string_view otherwise) const {
  if (!values_[index]) return std::string(otherwise);
  if (!values_[index]->is(Type::string)) {
    runtime_.fail("{}(): expected a string, found '{}'", function_, type_name(*values_[index]));
  }
  return values_[index]->string();
}

int64_t Bound::integer(size_t index, int64_t otherwise) const {
  return values_[index] ? to_index(runtime_, *values_[index], function_ + "()") : otherwise;
}

void no_arguments(Runtime& runtime, std::string_view function, const Args& args) {
  const Bound none(runtime, function, args, {});
}

}  // namespace latente::jinja
