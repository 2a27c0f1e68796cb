// Equality, order, hashing, length and iteration, as Python defines them between types.
#include <algorithm>
#include <cmath>

#include "tokenizer/jinja_text.h"
#include "tokenizer/jinja_value.h"

namespace latente::jinja {

namespace {

Order order_of(bool less, bool same) { return less ? Order::less : same ? Order::equal : Order::greater; }

Order compare_numbers(const Value& a, const Value& b) {
  if (a.is_integral() && b.is_integral()) {
    return order_of(a.as_integer() < b.as_integer(), a.as_integer() == b.as_integer());
  }
  if (a.is(Type::real) && b.is(Type::real)) {
    if (std::isnan(a.as_real()) || std::isnan(b.as_real())) return Order::unordered;
    return order_of(a.as_real() < b.as_real(), a.as_real() == b.as_real());
  }
  if (a.is(Type::real)) {
    Order swapped = compare_numbers(b, a);
    return swapped == Order::less ? Order::greater : swapped == Order::greater ? Order::less : swapped;
  }
  // An integer against a double, exactly: by whole parts, then by the double's fraction.
  double real = b.as_real();
  if (std::isnan(real)) return Order::unordered;
  if (real >= 0x1p126) return Order::less;
  if (real <= -0x1p126) return Order::greater;
  double floor = std::floor(real);
  Int whole = static_cast<Int>(floor), value = a.as_integer();
  if (value != whole) return value < whole ? Order::less : Order::greater;
  return floor == real ? Order::equal : Order::less;
}

bool is_view_set(const Sequence& s) {
  return s.kind == Sequence::Kind::keys || s.kind == Sequence::Kind::items;
}

bool equal_sequences(Runtime& runtime, const Sequence& a, const Sequence& b) {
  if (&a == &b) return true;
  if (is_view_set(a) && is_view_set(b)) {
    if (a.items.size() != b.items.size()) return false;
    return std::all_of(a.items.begin(), a.items.end(), [&](const Value& item) {
      return std::any_of(b.items.begin(), b.items.end(),
                         [&](const Value& other) { return equal(runtime, item, other); });
    });
  }
  if (a.kind != b.kind || a.kind == Sequence::Kind::values || a.items.size() != b.items.size()) return false;
  for (size_t i = 0; i < a.items.size(); ++i) {
    if (!equal(runtime, a.items[i], b.items[i])) return false;
  }
  return true;
}

}  // namespace

bool equal(Runtime& runtime, const Value& a, const Value& b) {
  Nested nested(runtime);
  runtime.step();
  if (a.is_number() && b.is_number()) return compare_numbers(a, b) == Order::equal;
  if (a.type() != b.type()) return false;
  switch (a.type()) {
    case Type::undefined:
    case Type::none:
      return true;
    case Type::string:
      runtime.work(std::min(a.string().size(), b.string().size()));
      return a.string() == b.string();
    case Type::sequence:
      return equal_sequences(runtime, a.sequence(), b.sequence());
    case Type::dict: {
      const Dict &x = a.dict(), &y = b.dict();
      if (x.entries.size() != y.entries.size()) return false;
      for (const auto& [key, value] : x.entries) {
        const Value* other = y.find(runtime, key);
        if (!other || !equal(runtime, value, *other)) return false;
      }
      return true;
    }
    default:
      return a.object() == b.object();
  }
}

Order compare(Runtime& runtime, const Value& a, const Value& b, std::string_view op) {
  Nested nested(runtime);
  runtime.step();
  if (a.is_number() && b.is_number()) return compare_numbers(a, b);
  if (a.is_undefined() || b.is_undefined()) runtime.fail("{}", (a.is_undefined() ? a : b).undefined_reason());
  if (a.is(Type::string) && b.is(Type::string)) {
    runtime.work(std::min(a.string().size(), b.string().size()));
    int order = a.string().compare(b.string());
    return order_of(order < 0, order == 0);
  }
  if (a.is(Type::sequence) && b.is(Type::sequence)) {
    const Sequence &x = a.sequence(), &y = b.sequence();
    if (x.kind == y.kind && (x.kind == Sequence::Kind::list || x.kind == Sequence::Kind::tuple)) {
      for (size_t i = 0; i < x.items.size() && i < y.items.size(); ++i) {
        if (!equal(runtime, x.items[i], y.items[i])) return compare(runtime, x.items[i], y.items[i], op);
      }
      return order_of(x.items.size() < y.items.size(), x.items.size() == y.items.size());
    }
  }
  runtime.fail("'{}' not supported between instances of '{}' and '{}'", op, type_name(a), type_name(b));
}

void require_hashable(Runtime& runtime, const Value& value) {
  if (value.is(Type::dict)) runtime.fail("unhashable type: 'dict'");
  if (!value.is(Type::sequence)) return;
  const Sequence& sequence = value.sequence();
  using Kind = Sequence::Kind;
  if (sequence.kind == Kind::list || is_view_set(sequence))
    runtime.fail("unhashable type: '{}'", type_name(value));
  if (sequence.kind != Kind::tuple) return;
  Nested nested(runtime);
  for (const Value& item : sequence.items) {
    runtime.step();
    require_hashable(runtime, item);
  }
}

std::optional<size_t> length_of(Runtime&, const Value& value) {
  switch (value.type()) {
    case Type::undefined:
      return 0;
    case Type::string:
      return value.length();
    case Type::sequence:
      return value.sequence().items.size();
    case Type::dict:
      return value.dict().entries.size();
    default:
      return {};
  }
}

bool is_iterable(const Value& value) {
  switch (value.type()) {
    case Type::undefined:
    case Type::string:
    case Type::sequence:
    case Type::dict:
    case Type::iterator:
      return true;
    case Type::function:
      return static_cast<bool>(value.function().next);
    default:
      return false;
  }
}

std::function<bool(Value&)> iterate(Runtime& runtime, const Value& value) {
  switch (value.type()) {
    case Type::undefined:
      return [](Value&) { return false; };
    case Type::string:
      return [&runtime, value, at = size_t{0}](Value& out) mutable {
        if (at >= value.string().size()) return false;
        runtime.step();
        size_t start = at;
        decode_point(value.string(), at);
        out = runtime.text(value.string().substr(start, at - start));
        return true;
      };
    case Type::sequence:
      return [&runtime, &items = value.sequence().items, at = size_t{0}](Value& out) mutable {
        if (at >= items.size()) return false;
        runtime.step();
        out = items[at++];
        return true;
      };
    case Type::dict:
      return [&runtime, &entries = value.dict().entries, at = size_t{0}](Value& out) mutable {
        if (at >= entries.size()) return false;
        runtime.step();
        out = entries[at++].first;
        return true;
      };
    case Type::iterator:
      return [&runtime, source = &value.iterator()](Value& out) {
        runtime.step();
        return source->next(out);
      };
    case Type::function:
      if (value.function().next) return value.function().next;
      [[fallthrough]];
    default:
      runtime.fail("'{}' object is not iterable", type_name(value));
  }
}

std::vector<Value> to_vector(Runtime& runtime, const Value& value) {
  std::vector<Value> out;
  auto next = iterate(runtime, value);
  for (Value item; next(item);) {
    if (out.size() % 1024 == 1023) runtime.reserve_text(out.size() * sizeof(Value));
    out.push_back(item);
  }
  return out;
}

int64_t to_index(Runtime& runtime, const Value& value, std::string_view what) {
  if (!value.is_integral()) {
    if (value.is_undefined()) runtime.fail("{}", value.undefined_reason());
    runtime.fail("{}: expected an integer, found '{}'", what, type_name(value));
  }
  constexpr Int kFar = INT64_MAX;
  Int index = value.as_integer();
  return static_cast<int64_t>(index > kFar ? kFar : index < -kFar ? -kFar : index);
}

}  // namespace latente::jinja
