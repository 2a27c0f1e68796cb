#include <ctime>

#include "tokenizer/jinja_interpreter.h"
#include "tokenizer/jinja_operations.h"

namespace latente::jinja {

namespace {

// dict(mapping or pairs, **named), into `out`.
void fill_dict(Runtime& runtime, Dict& out, std::string_view function, const Args& args) {
  if (args.positional.size() > 1) runtime.fail("{} expected at most 1 argument", function);
  if (!args.positional.empty()) {
    const Value& from = args.positional[0];
    if (from.is(Type::dict)) {
      for (const auto& [key, value] : from.dict().entries) out.set(runtime, key, value);
    } else {
      if (!is_iterable(from)) runtime.fail("'{}' object is not iterable", type_name(from));
      for (const Value& pair : to_vector(runtime, from)) {
        auto parts = to_vector(runtime, pair);
        if (parts.size() != 2)
          runtime.fail("dictionary update sequence: expected 2 elements, found {}", parts.size());
        out.set(runtime, parts[0], parts[1]);
      }
    }
  }
  for (const auto& [name, value] : args.named) out.set(runtime, runtime.text(name), value);
}

Value make_range(Runtime& runtime, const Args& args) {
  if (!args.named.empty()) runtime.fail("range() takes no keyword arguments");
  if (args.positional.empty() || args.positional.size() > 3) runtime.fail("range expected 1 to 3 arguments");
  for (const Value& bound : args.positional) {
    if (bound.is_undefined()) runtime.fail("{}", bound.undefined_reason());
    if (!bound.is_integral())
      runtime.fail("'{}' object cannot be interpreted as an integer", type_name(bound));
  }
  auto at = [&](size_t index) { return args.positional[index].as_integer(); };
  if (args.positional.size() == 1) return runtime.range(0, at(0), 1);
  return runtime.range(at(0), at(1), args.positional.size() == 3 ? at(2) : 1);
}

Value now(Runtime& runtime, const Args& args) {
  Bound bound(runtime, "strftime_now", args, {"format"}, 1);
  std::string format = bound.text(0, "");
  if (format.empty()) return runtime.text("");
  if (format.size() > 4096)
    runtime.fail("strftime_now: expected a format of at most 4096 bytes, found {}", format.size());
  std::time_t seconds = std::time(nullptr);
  std::tm local{};
  localtime_r(&seconds, &local);
  std::string out(format.size() * 32 + 256, 0);
  out.resize(std::strftime(out.data(), out.size(), format.c_str(), &local));
  return runtime.text(std::move(out));
}

}  // namespace

std::vector<std::pair<std::string, Value>> make_globals(Runtime& runtime) {
  auto made = [&](const char* name, auto body) {
    return std::pair<std::string, Value>(
        name,
        runtime.function(name, [&runtime, body](const Args& args) -> Value { return body(runtime, args); }));
  };
  return {
      made("range", make_range),
      made("strftime_now", now),
      made("dict",
           [](Runtime& r, const Args& args) -> Value {
             Dict* dict = r.dict();
             fill_dict(r, *dict, "dict", args);
             return dict;
           }),
      made("namespace",
           [](Runtime& r, const Args& args) -> Value {
             auto* made_namespace = r.make<Namespace>();
             fill_dict(r, made_namespace->attributes, "namespace", args);
             for (const auto& [key, value] : made_namespace->attributes.entries) {
               if (key.is(Type::string) && key.string().starts_with('_')) {
                 r.fail("cannot store the underscore-prefixed attribute '{}'", key.string());
               }
             }
             return made_namespace;
           }),
      made("raise_exception",
           [](Runtime& r, const Args& args) -> Value {
             Bound bound(r, "raise_exception", args, {"message"}, 1);
             r.fail("{}", to_text(r, *bound[0]));
           }),
  };
}

}  // namespace latente::jinja
