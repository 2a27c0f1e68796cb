// The tests of `value is test`.
#include <map>

#include "tokenizer/jinja_ast.h"
#include "tokenizer/jinja_operations.h"
#include "tokenizer/jinja_text.h"

namespace latente::jinja {

namespace {

template <bool (*Holds)(const Value&)>
bool plain(Runtime& runtime, const Value& value, const Args& args) {
  no_arguments(runtime, "test", args);
  return Holds(value);
}

bool is_sequence(const Value& value) {
  if (!value.is(Type::sequence))
    return value.is_undefined() || value.is(Type::string) || value.is(Type::dict);
  auto kind = value.sequence().kind;
  return kind == Sequence::Kind::list || kind == Sequence::Kind::tuple || kind == Sequence::Kind::range;
}

constexpr char kEqual[] = "==", kNotEqual[] = "!=", kLess[] = "<", kLessEqual[] = "<=", kGreater[] = ">",
               kGreaterEqual[] = ">=", kIn[] = "in";

template <const char* Op>
bool compared(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, Op, args, {"other"}, 1);
  return compare_op(runtime, Op, value, *bound[0]);
}

bool remainder_is(Runtime& runtime, const Value& value, const Value& divisor, Int wanted) {
  return equal(runtime, arithmetic(runtime, "%", value, divisor), Value::integer(wanted));
}

bool divisible(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "divisibleby", args, {"num"}, 1);
  return remainder_is(runtime, value, *bound[0], 0);
}

template <Int Wanted>
bool parity(Runtime& runtime, const Value& value, const Args& args) {
  no_arguments(runtime, "test", args);
  return remainder_is(runtime, value, Value::integer(2), Wanted);
}

template <CharClass Wanted>
bool cased(Runtime& runtime, const Value& value, const Args& args) {
  no_arguments(runtime, "test", args);
  return all_in(Wanted, to_text(runtime, value));
}

// Identity: Python keeps one object for each of None, the booleans and small integers.
bool same_as(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "sameas", args, {"other"}, 1);
  const Value& other = *bound[0];
  if (value.type() != other.type()) return false;
  switch (value.type()) {
    case Type::none:
      return true;
    case Type::boolean:
      return value.as_boolean() == other.as_boolean();
    case Type::integer:
      return value.as_integer() == other.as_integer();
    case Type::string:
      return value.string() == other.string();
    case Type::undefined:
    case Type::real:
      return false;
    default:
      return value.object() == other.object();
  }
}

bool is_defined(const Value& v) { return !v.is_undefined(); }
bool is_undefined(const Value& v) { return v.is_undefined(); }
bool is_none(const Value& v) { return v.is(Type::none); }
bool is_boolean(const Value& v) { return v.is(Type::boolean); }
bool is_true(const Value& v) { return v.is(Type::boolean) && v.as_boolean(); }
bool is_false(const Value& v) { return v.is(Type::boolean) && !v.as_boolean(); }
bool is_integer(const Value& v) { return v.is(Type::integer); }
bool is_real(const Value& v) { return v.is(Type::real); }
bool is_number(const Value& v) { return v.is_number(); }
bool is_string(const Value& v) { return v.is(Type::string); }
bool is_mapping(const Value& v) { return v.is(Type::dict); }
bool is_callable(const Value& v) { return v.is_undefined() || (v.is(Type::function) && v.function().call); }

}  // namespace

TestFunction find_test(std::string_view name) {
  static const std::map<std::string_view, TestFunction> table = {
      {"!=", compared<kNotEqual>},
      {"<", compared<kLess>},
      {"<=", compared<kLessEqual>},
      {"==", compared<kEqual>},
      {">", compared<kGreater>},
      {">=", compared<kGreaterEqual>},
      {"boolean", plain<is_boolean>},
      {"callable", plain<is_callable>},
      {"defined", plain<is_defined>},
      {"divisibleby", divisible},
      {"eq", compared<kEqual>},
      {"equalto", compared<kEqual>},
      {"even", parity<0>},
      {"false", plain<is_false>},
      {"float", plain<is_real>},
      {"ge", compared<kGreaterEqual>},
      {"greaterthan", compared<kGreater>},
      {"gt", compared<kGreater>},
      {"in", compared<kIn>},
      {"integer", plain<is_integer>},
      {"iterable", plain<is_iterable>},
      {"le", compared<kLessEqual>},
      {"lessthan", compared<kLess>},
      {"lower", cased<CharClass::lower>},
      {"lt", compared<kLess>},
      {"mapping", plain<is_mapping>},
      {"ne", compared<kNotEqual>},
      {"none", plain<is_none>},
      {"number", plain<is_number>},
      {"odd", parity<1>},
      {"sameas", same_as},
      {"sequence", plain<is_sequence>},
      {"string", plain<is_string>},
      {"true", plain<is_true>},
      {"undefined", plain<is_undefined>},
      {"upper", cased<CharClass::upper>},
  };
  auto found = table.find(name);
  return found == table.end() ? nullptr : found->second;
}

}  // namespace latente::jinja
