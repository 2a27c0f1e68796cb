// The values of a template: Python's None, bool, int, float, str, list, tuple, range, dict and views, with
// Jinja's Undefined, namespace, generators and callables. Text is shared; every other object belongs to one
// Runtime, which frees them together at its end, so cycles and deep nesting cost no recursion.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/error.h"
#include "tokenizer/chat_template.h"

namespace latente::jinja {

// Python's integers are unbounded; these hold 128 bits, and beyond them rendering fails.
using Int = __int128;

class Runtime;
struct Object;
struct Sequence;
struct Dict;
struct Namespace;
struct Iterator;
struct Function;

struct Text {
  std::string bytes;
  size_t length = 0;    // code points
  bool markup = false;  // Markup, made by the filters safe and escape
  Runtime* owner = nullptr;
  Text(std::string text, bool is_markup, Runtime* runtime);
  Text(const Text&) = delete;
  Text& operator=(const Text&) = delete;
  ~Text();
};

enum class Type : uint8_t {
  undefined,
  none,
  boolean,
  integer,
  real,
  string,
  sequence,
  dict,
  ns,
  iterator,
  function
};

class Value {
 public:
  Value() = default;  // Undefined
  static Value none() { return Value(Type::none); }
  static Value boolean(bool value);
  static Value integer(Int value);
  static Value real(double value);
  static Value text(std::shared_ptr<const Text> text);
  static Value constant(std::string bytes);  // text that belongs to the program, not to a runtime
  Value(Sequence* object);
  Value(Dict* object);
  Value(Namespace* object);
  Value(Iterator* object);
  Value(Function* object);

  Type type() const { return type_; }
  bool is(Type type) const { return type_ == type; }
  bool is_undefined() const { return type_ == Type::undefined; }
  // Of a variable: never assigned.
  bool is_missing() const { return type_ == Type::undefined && !text_; }
  bool is_number() const { return type_ == Type::boolean || type_ == Type::integer || type_ == Type::real; }
  bool is_integral() const { return type_ == Type::boolean || type_ == Type::integer; }
  // Preconditions of the readers: the matching type (as_integer takes booleans, as_real any number).
  Int as_integer() const { return type_ == Type::boolean ? Int{boolean_} : integer_; }
  double as_real() const { return type_ == Type::real ? real_ : static_cast<double>(as_integer()); }
  bool as_boolean() const { return boolean_; }
  const std::string& string() const { return text_->bytes; }
  size_t length() const { return text_->length; }
  bool is_markup() const { return type_ == Type::string && text_->markup; }
  const std::shared_ptr<const Text>& shared_text() const { return text_; }
  Object* object() const { return object_; }
  Sequence& sequence() const;
  Dict& dict() const;
  Namespace& ns() const;
  Iterator& iterator() const;
  Function& function() const;
  // Undefined keeps the message that using it gives.
  std::string undefined_reason() const { return text_ ? text_->bytes : "value is undefined"; }

 private:
  explicit Value(Type type) : type_(type) {}
  friend class Runtime;

  Type type_ = Type::undefined;
  union {
    bool boolean_;
    Int integer_ = 0;
    double real_;
    Object* object_;
  };
  std::shared_ptr<const Text> text_;
};

struct Object {
  virtual ~Object() = default;
};

// Anything Python would give len() and an order. Never changes once made, so `depth` of nesting is known.
struct Sequence : Object {
  enum class Kind : uint8_t { list, tuple, range, keys, values, items };
  Kind kind = Kind::list;
  std::vector<Value> items;
  Int start = 0, stop = 0, step = 1;  // of a range
};

struct Dict : Object {
  std::vector<std::pair<Value, Value>> entries;
  std::unordered_map<std::string_view, size_t> text_index;  // entries with text keys; views into them

  const Value* find(std::string_view key) const;
  const Value* find(Runtime& runtime, const Value& key) const;  // fails on an unhashable key
  void set(Runtime& runtime, Value key, Value value);
};

struct Namespace : Object {
  Dict attributes;
};

// A generator: elements come once. `depth` counts generators drawing on one another.
struct Iterator : Object {
  std::function<bool(Value&)> next;
  size_t depth = 1;
};

struct Args {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
};

// `attributes` are those that templates may read (loop.index, macro.name, ...); empty optional: no such
// attribute.
struct Function : Object {
  std::string name;
  std::function<Value(const Args&)> call;
  std::function<std::optional<Value>(std::string_view)> attribute;
  std::function<bool(Value&)> next;  // set for objects that are iterable
};

// One rendering: its objects, what it has used of the limits, and the line it is at.
class Runtime {
 public:
  explicit Runtime(const Limits& limits);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  Runtime& operator=(const Runtime&) = delete;

  Value text(std::string bytes, bool markup = false);
  Value text(std::string_view bytes, bool markup = false) { return text(std::string(bytes), markup); }
  Value text(const char* bytes, bool markup = false) { return text(std::string(bytes), markup); }
  Value undefined(std::string reason);
  Value list(std::vector<Value> items) { return sequence(Sequence::Kind::list, std::move(items)); }
  Value tuple(std::vector<Value> items) { return sequence(Sequence::Kind::tuple, std::move(items)); }
  Value sequence(Sequence::Kind kind, std::vector<Value> items);
  Value range(Int start, Int stop, Int step);
  Dict* dict() { return make<Dict>(); }
  Value iterator(std::function<bool(Value&)> next, size_t depth);
  Value function(std::string name, std::function<Value(const Args&)> call);

  template <class T>
  T* make() {
    charge(sizeof(T) + 64);
    auto owned = std::make_unique<T>();
    T* object = owned.get();
    objects_.push_back(std::move(owned));
    return object;
  }

  void step(size_t count = 1) {
    steps_ += count;
    if (steps_ >= next_check_) check();
  }
  void work(size_t bytes) { step(bytes / 256); }
  void charge(size_t bytes);
  void release(size_t bytes) { memory_ -= bytes; }
  // Fails before a text of this size is built.
  void reserve_text(size_t bytes);
  // Fails when a text being built, of this size so far, no longer fits.
  void check_text(size_t bytes) {
    charge(bytes);
    release(bytes);
  }
  void check_output(size_t bytes);

  template <class... A>
  [[noreturn]] void fail(fmt::format_string<A...> format, A&&... args) const {
    throw Error(
        fmt::format("chat template, line {}: {}", line, fmt::format(format, std::forward<A>(args)...)));
  }

  int line = 1;
  size_t depth = 0;
  const Limits limits;

 private:
  void check();

  size_t steps_ = 0, next_check_ = 4096, memory_ = 0;
  std::chrono::steady_clock::time_point start_;
  std::vector<std::unique_ptr<Object>> objects_;
};

// Counts one level of nested evaluation for as long as it lives.
class Nested {
 public:
  explicit Nested(Runtime& runtime) : runtime_(runtime) {
    if (++runtime_.depth > runtime_.limits.depth) {
      --runtime_.depth;
      runtime_.fail("expected at most {} nested evaluations, found more", runtime_.limits.depth);
    }
  }
  ~Nested() { --runtime_.depth; }
  Nested(const Nested&) = delete;
  Nested& operator=(const Nested&) = delete;

 private:
  Runtime& runtime_;
};

// Python's protocols. All fail with the runtime's line where Python raises.
const char* type_name(const Value& value);
bool truth(Runtime& runtime, const Value& value);
std::string to_text(Runtime& runtime, const Value& value);  // str()
std::string to_repr(Runtime& runtime, const Value& value);  // repr()
bool equal(Runtime& runtime, const Value& a, const Value& b);
enum class Order { less, equal, greater, unordered };
Order compare(Runtime& runtime, const Value& a, const Value& b, std::string_view op);
void require_hashable(Runtime& runtime, const Value& value);
std::optional<size_t> length_of(Runtime& runtime, const Value& value);  // empty: len() is a TypeError
// A source of the value's elements; fails when it is not iterable. Keys for a dict, code points for a string.
std::function<bool(Value&)> iterate(Runtime& runtime, const Value& value);
bool is_iterable(const Value& value);
std::vector<Value> to_vector(Runtime& runtime, const Value& value);
std::string integer_text(Int value);
// A position or count as Python takes one: an integer, clamped to 64 bits.
int64_t to_index(Runtime& runtime, const Value& value, std::string_view what);

}  // namespace latente::jinja
