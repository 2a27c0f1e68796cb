#include "tokenizer/jinja_value.h"

#include <algorithm>
#include <cmath>

#include "tokenizer/jinja_text.h"

namespace latente::jinja {

Text::Text(std::string text, bool is_markup, Runtime* runtime)
    : bytes(std::move(text)), length(count_points(bytes)), markup(is_markup), owner(runtime) {
  if (owner) owner->charge(bytes.size() + sizeof(Text));
}

Text::~Text() {
  if (owner) owner->release(bytes.size() + sizeof(Text));
}

Value Value::boolean(bool value) {
  Value out(Type::boolean);
  out.boolean_ = value;
  return out;
}

Value Value::integer(Int value) {
  Value out(Type::integer);
  out.integer_ = value;
  return out;
}

Value Value::real(double value) {
  Value out(Type::real);
  out.real_ = value;
  return out;
}

Value Value::text(std::shared_ptr<const Text> text) {
  Value out(Type::string);
  out.text_ = std::move(text);
  return out;
}

Value Value::constant(std::string bytes) {
  return text(std::make_shared<const Text>(std::move(bytes), false, nullptr));
}

Value::Value(Sequence* object) : type_(Type::sequence) { object_ = object; }
Value::Value(Dict* object) : type_(Type::dict) { object_ = object; }
Value::Value(Namespace* object) : type_(Type::ns) { object_ = object; }
Value::Value(Iterator* object) : type_(Type::iterator) { object_ = object; }
Value::Value(Function* object) : type_(Type::function) { object_ = object; }
Sequence& Value::sequence() const { return static_cast<Sequence&>(*object_); }
Dict& Value::dict() const { return static_cast<Dict&>(*object_); }
Namespace& Value::ns() const { return static_cast<Namespace&>(*object_); }
Iterator& Value::iterator() const { return static_cast<Iterator&>(*object_); }
Function& Value::function() const { return static_cast<Function&>(*object_); }

const Value* Dict::find(std::string_view key) const {
  auto found = text_index.find(key);
  return found == text_index.end() ? nullptr : &entries[found->second].second;
}

const Value* Dict::find(Runtime& runtime, const Value& key) const {
  require_hashable(runtime, key);
  if (key.is(Type::string)) return find(key.string());
  for (const auto& [have, value] : entries) {
    if (!have.is(Type::string) && equal(runtime, have, key)) return &value;
  }
  return nullptr;
}

void Dict::set(Runtime& runtime, Value key, Value value) {
  if (const Value* have = find(runtime, key)) {
    *const_cast<Value*>(have) = std::move(value);
    return;
  }
  runtime.charge(2 * sizeof(Value) + 64);
  entries.emplace_back(std::move(key), std::move(value));
  const Value& stored = entries.back().first;
  if (stored.is(Type::string)) text_index.emplace(stored.string(), entries.size() - 1);
}

Runtime::Runtime(const Limits& given) : limits(given), start_(std::chrono::steady_clock::now()) {}

// Objects are freed before memory_ goes out of scope, since their texts count themselves off.
Runtime::~Runtime() { objects_.clear(); }

Value Runtime::text(std::string bytes, bool markup) {
  work(bytes.size());
  return Value::text(std::make_shared<const Text>(std::move(bytes), markup, this));
}

Value Runtime::undefined(std::string reason) {
  Value out;
  out.text_ = std::make_shared<const Text>(std::move(reason), false, this);
  return out;
}

Value Runtime::sequence(Sequence::Kind kind, std::vector<Value> items) {
  charge(items.size() * sizeof(Value));
  auto* object = make<Sequence>();
  object->kind = kind;
  object->items = std::move(items);
  return object;
}

Value Runtime::range(Int start, Int stop, Int step_by) {
  if (step_by == 0) fail("range() arg 3 must not be zero");
  constexpr Int kFar = Int{1} << 100;
  if (start > kFar || start < -kFar || stop > kFar || stop < -kFar)
    fail("expected a range below 2^100, found more");
  Int span = step_by > 0 ? stop - start : start - stop;
  Int stride = step_by > 0 ? step_by : -step_by;
  Int count = span <= 0 ? 0 : (span - 1) / stride + 1;
  // The sandbox's own limit.
  if (count > 100000) {
    fail("Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000).");
  }
  step(static_cast<size_t>(count));
  charge(static_cast<size_t>(count) * sizeof(Value));
  auto* object = make<Sequence>();
  object->kind = Sequence::Kind::range;
  object->start = start;
  object->stop = stop;
  object->step = step_by;
  for (Int i = 0; i < count; ++i) object->items.push_back(Value::integer(start + i * step_by));
  return object;
}

Value Runtime::iterator(std::function<bool(Value&)> next, size_t chain) {
  if (chain > 100) fail("expected at most 100 generators drawing on one another, found more");
  auto* object = make<Iterator>();
  object->next = std::move(next);
  object->depth = chain;
  return object;
}

Value Runtime::function(std::string name, std::function<Value(const Args&)> call) {
  auto* object = make<Function>();
  object->name = std::move(name);
  object->call = std::move(call);
  return object;
}

void Runtime::charge(size_t bytes) {
  if (bytes > limits.memory_bytes || memory_ > limits.memory_bytes - bytes) {
    fail("expected at most {} bytes of memory, found more", limits.memory_bytes);
  }
  memory_ += bytes;
}

void Runtime::reserve_text(size_t bytes) {
  charge(bytes);
  release(bytes);
  work(bytes);
}

void Runtime::check_output(size_t bytes) {
  if (bytes > limits.output_bytes)
    fail("expected at most {} bytes of output, found more", limits.output_bytes);
}

void Runtime::check() {
  if (steps_ > limits.steps) fail("expected at most {} steps, found more", limits.steps);
  std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start_;
  if (spent.count() > limits.seconds)
    fail("expected at most {} seconds of rendering, found more", limits.seconds);
  next_check_ = steps_ + 4096;
}

const char* type_name(const Value& value) {
  switch (value.type()) {
    case Type::undefined:
      return "Undefined";
    case Type::none:
      return "NoneType";
    case Type::boolean:
      return "bool";
    case Type::integer:
      return "int";
    case Type::real:
      return "float";
    case Type::string:
      return "str";
    case Type::dict:
      return "dict";
    case Type::ns:
      return "Namespace";
    case Type::iterator:
      return "generator";
    case Type::function:
      return "function";
    case Type::sequence:
      break;
  }
  switch (value.sequence().kind) {
    case Sequence::Kind::list:
      return "list";
    case Sequence::Kind::tuple:
      return "tuple";
    case Sequence::Kind::range:
      return "range";
    case Sequence::Kind::keys:
      return "dict_keys";
    case Sequence::Kind::values:
      return "dict_values";
    case Sequence::Kind::items:
      return "dict_items";
  }
  return "object";
}

std::string integer_text(Int value) { return fmt::format("{}", value); }

bool truth(Runtime&, const Value& value) {
  switch (value.type()) {
    case Type::undefined:
    case Type::none:
      return false;
    case Type::boolean:
      return value.as_boolean();
    case Type::integer:
      return value.as_integer() != 0;
    case Type::real:
      return value.as_real() != 0;
    case Type::string:
      return !value.string().empty();
    case Type::sequence:
      return !value.sequence().items.empty();
    case Type::dict:
      return !value.dict().entries.empty();
    default:
      return true;
  }
}

std::string to_text(Runtime& runtime, const Value& value) {
  if (value.is_undefined()) return "";
  if (!value.is(Type::string)) return to_repr(runtime, value);
  runtime.work(value.string().size());
  return value.string();
}

namespace {

std::string repr_entries(Runtime& runtime, const Dict& dict) {
  std::string out = "{";
  for (const auto& [key, item] : dict.entries) {
    if (out.size() > 1) out += ", ";
    out += to_repr(runtime, key) + ": " + to_repr(runtime, item);
  }
  return out + "}";
}

std::string repr_sequence(Runtime& runtime, const Sequence& sequence) {
  using Kind = Sequence::Kind;
  if (sequence.kind == Kind::range) {
    std::string out = fmt::format("range({}, {}", sequence.start, sequence.stop);
    return out + (sequence.step == 1 ? ")" : fmt::format(", {})", sequence.step));
  }
  std::string out;
  for (const Value& item : sequence.items) {
    if (!out.empty()) out += ", ";
    out += to_repr(runtime, item);
    runtime.reserve_text(out.size() / 64);
  }
  switch (sequence.kind) {
    case Kind::tuple:
      return "(" + out + (sequence.items.size() == 1 ? ",)" : ")");
    case Kind::keys:
      return "dict_keys([" + out + "])";
    case Kind::values:
      return "dict_values([" + out + "])";
    case Kind::items:
      return "dict_items([" + out + "])";
    default:
      return "[" + out + "]";
  }
}

}  // namespace

std::string to_repr(Runtime& runtime, const Value& value) {
  Nested nested(runtime);
  runtime.step();
  switch (value.type()) {
    case Type::undefined:
      return "Undefined";
    case Type::none:
      return "None";
    case Type::boolean:
      return value.as_boolean() ? "True" : "False";
    case Type::integer:
      return integer_text(value.as_integer());
    case Type::real:
      return format_real(value.as_real());
    case Type::string: {
      runtime.reserve_text(value.string().size());
      std::string quoted = quote_python(value.string());
      return value.is_markup() ? "Markup(" + quoted + ")" : quoted;
    }
    case Type::sequence: {
      std::string out = repr_sequence(runtime, value.sequence());
      runtime.reserve_text(out.size());
      return out;
    }
    case Type::dict: {
      std::string out = repr_entries(runtime, value.dict());
      runtime.reserve_text(out.size());
      return out;
    }
    case Type::ns:
      return "<Namespace " + repr_entries(runtime, value.ns().attributes) + ">";
    case Type::iterator:
      return "<generator object>";
    case Type::function:
      break;
  }
  return "<" + value.function().name + ">";
}

}  // namespace latente::jinja
