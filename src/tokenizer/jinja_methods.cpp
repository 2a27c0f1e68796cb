// The methods and attributes of lists, tuples and dicts. Those that would change a list or dict are
// unsafe, as in Jinja's immutable sandbox.
#include <algorithm>

#include "tokenizer/jinja_operations.h"

namespace latente::jinja {

namespace {

using Status = Method::Status;

template <size_t N>
bool among(const std::string_view (&names)[N], std::string_view name) {
  return std::find(std::begin(names), std::end(names), name) != std::end(names);
}

template <class Body>
Method bound(Runtime& runtime, const Value& object, std::string_view name, Body body) {
  return {Status::found,
          runtime.function(fmt::format("built-in method {} of {} object", name, type_name(object)),
                           std::move(body))};
}

Method sequence_method(Runtime& runtime, const Value& object, std::string_view name) {
  using Kind = Sequence::Kind;
  Kind kind = object.sequence().kind;
  static constexpr std::string_view kChanging[] = {"append", "clear", "pop",    "reverse",
                                                   "insert", "sort",  "extend", "remove"};
  if (kind == Kind::list && among(kChanging, name)) return {Status::unsafe, {}};
  if (kind == Kind::keys || kind == Kind::values || kind == Kind::items) {
    bool exists = name == "mapping" || (kind != Kind::values && name == "isdisjoint");
    return {exists ? Status::unsupported : Status::absent, {}};
  }
  if (kind == Kind::range && (name == "start" || name == "stop" || name == "step")) {
    const Sequence& range = object.sequence();
    return {Status::found, Value::integer(name == "start"  ? range.start
                                          : name == "stop" ? range.stop
                                                           : range.step)};
  }
  if (name == "copy" && kind == Kind::list) {
    return bound(runtime, object, name, [&runtime, object](const Args& args) {
      no_arguments(runtime, "copy", args);
      return runtime.list(object.sequence().items);
    });
  }
  if (name == "count") {
    return bound(runtime, object, name, [&runtime, object](const Args& args) {
      Bound values(runtime, "count", args, {"value"}, 1);
      const auto& items = object.sequence().items;
      auto same = [&](const Value& item) { return equal(runtime, item, *values[0]); };
      return Value::integer(std::count_if(items.begin(), items.end(), same));
    });
  }
  if (name == "index") {
    return bound(runtime, object, name, [&runtime, object](const Args& args) {
      Bound values(runtime, "index", args, {"value"}, 1);
      const auto& items = object.sequence().items;
      auto same = [&](const Value& item) { return equal(runtime, item, *values[0]); };
      auto found = std::find_if(items.begin(), items.end(), same);
      if (found == items.end())
        runtime.fail("{} is not in {}", to_repr(runtime, *values[0]), type_name(object));
      return Value::integer(found - items.begin());
    });
  }
  return {};
}

Method dict_method(Runtime& runtime, const Value& object, std::string_view name) {
  static constexpr std::string_view kChanging[] = {"clear", "pop", "popitem", "setdefault", "update"};
  if (among(kChanging, name)) return {Status::unsafe, {}};
  if (name == "fromkeys") return {Status::unsupported, {}};
  if (name == "get") {
    return bound(runtime, object, name, [&runtime, object](const Args& args) {
      if (!args.named.empty()) runtime.fail("dict.get() takes no keyword arguments");
      Bound values(runtime, "get", args, {"key", "default"}, 1);
      const Value* found = object.dict().find(runtime, *values[0]);
      return found ? *found : values[1] ? *values[1] : Value::none();
    });
  }
  if (name == "copy") {
    return bound(runtime, object, name, [&runtime, object](const Args& args) -> Value {
      no_arguments(runtime, "copy", args);
      Dict* copy = runtime.dict();
      for (const auto& [key, value] : object.dict().entries) copy->set(runtime, key, value);
      return copy;
    });
  }
  using Kind = Sequence::Kind;
  if (name != "keys" && name != "values" && name != "items") return {};
  Kind kind = name == "keys" ? Kind::keys : name == "values" ? Kind::values : Kind::items;
  return bound(runtime, object, name, [&runtime, object, kind](const Args& args) {
    no_arguments(runtime, "dict method", args);
    std::vector<Value> items;
    for (const auto& [key, value] : object.dict().entries) {
      runtime.step();
      items.push_back(kind == Kind::keys ? key : kind == Kind::values ? value : runtime.tuple({key, value}));
    }
    return runtime.sequence(kind, std::move(items));
  });
}

}  // namespace

Method find_method(Runtime& runtime, const Value& object, std::string_view name) {
  switch (object.type()) {
    case Type::string:
      return find_text_method(runtime, object, name);
    case Type::sequence:
      return sequence_method(runtime, object, name);
    case Type::dict:
      return dict_method(runtime, object, name);
    default:
      return {};
  }
}

}  // namespace latente::jinja
