// Filters on sequences and mappings.
#include <algorithm>

#include "tokenizer/jinja_ast.h"
#include "tokenizer/jinja_filters.h"
#include "tokenizer/jinja_operations.h"
#include "tokenizer/jinja_text.h"

namespace latente::jinja::filters {

namespace {

using Path = std::vector<Value>;

// "a.b.0" as the keys a, b and 0; any other value as one key; none for no path.
Path attribute_path(Runtime& runtime, const Value& attribute) {
  if (attribute.is(Type::none)) return {};
  if (!attribute.is(Type::string)) return {attribute};
  Path path;
  std::string_view rest = attribute.string();
  while (true) {
    size_t dot = std::min(rest.find('.'), rest.size());
    std::string_view part = rest.substr(0, dot);
    bool digits = !part.empty() && part.size() < 19 && part.find_first_not_of("0123456789") == part.npos;
    path.push_back(digits ? Value::integer(std::stoll(std::string(part))) : runtime.text(part));
    if (dot == rest.size()) return path;
    rest.remove_prefix(dot + 1);
  }
}

Value follow(Runtime& runtime, Value item, const Path& path, const Value* otherwise = nullptr) {
  for (const Value& key : path) {
    item = get_item(runtime, item, key);
    if (otherwise && !otherwise->is(Type::none) && item.is_undefined()) item = *otherwise;
  }
  return item;
}

Value ignore_case(Runtime& runtime, const Value& value) {
  return value.is(Type::string) ? text_like(runtime, value, to_lower(value.string())) : value;
}

Path optional_path(Runtime& runtime, const Value* attribute) {
  return attribute ? attribute_path(runtime, *attribute) : Path{};
}

// A generator over the elements of `value`, made when the first is asked for; `step` says whether to keep
// one.
template <class Step>
Value generate(Runtime& runtime, const Value& value, Step step) {
  size_t depth = value.is(Type::iterator) ? value.iterator().depth + 1 : 1;
  std::function<bool(Value&)> source;
  return runtime.iterator(
      [&runtime, value, step, source](Value& out) mutable {
        if (!source) source = iterate(runtime, value);
        while (source(out)) {
          if (step(out)) return true;
        }
        return false;
      },
      depth);
}

Args rest_of(const Args& args, size_t skip) {
  return {{args.positional.begin() + static_cast<ptrdiff_t>(skip), args.positional.end()}, args.named};
}

Value pick(Runtime& runtime, const Value& value, const Args& args, bool wanted, bool by_attribute) {
  if (!truth(runtime, value)) return generate(runtime, runtime.list({}), [](Value&) { return true; });
  Path path;
  size_t used = 0;
  if (by_attribute) {
    if (args.positional.empty()) runtime.fail("Missing parameter for attribute name");
    path = attribute_path(runtime, args.positional[0]);
    used = 1;
  }
  TestFunction test = nullptr;
  Args rest;
  if (args.positional.size() > used) {
    std::string name = to_text(runtime, args.positional[used]);
    test = find_test(name);
    if (!test) runtime.fail("No test named '{}'.", name);
    rest = rest_of(args, used + 1);
  }
  return generate(runtime, value, [&runtime, path, test, rest, wanted](Value& item) {
    Value subject = follow(runtime, item, path);
    return (test ? test(runtime, subject, rest) : truth(runtime, subject)) == wanted;
  });
}

using Keyed = std::pair<std::vector<Value>, Value>;

bool keys_less(Runtime& runtime, const Keyed& a, const Keyed& b) {
  for (size_t i = 0; i < a.first.size(); ++i) {
    if (equal(runtime, a.first[i], b.first[i])) continue;
    return compare(runtime, a.first[i], b.first[i], "<") == Order::less;
  }
  return false;
}

std::vector<Value> sort_keyed(Runtime& runtime, std::vector<Keyed>& keyed, bool descending) {
  // Sorting backwards keeps the order of equal elements, as Python's reverse=True does.
  if (descending) std::reverse(keyed.begin(), keyed.end());
  // A merge sort: it stays in bounds even where NaN makes the order inconsistent.
  std::stable_sort(keyed.begin(), keyed.end(),
                   [&](const Keyed& a, const Keyed& b) { return keys_less(runtime, a, b); });
  if (descending) std::reverse(keyed.begin(), keyed.end());
  std::vector<Value> items;
  items.reserve(keyed.size());
  for (Keyed& entry : keyed) items.push_back(std::move(entry.second));
  return items;
}

Value extreme(Runtime& runtime, const Value& value, const Args& args, Order wanted) {
  Bound bound(runtime, "min/max", args, {"case_sensitive", "attribute"});
  Path path = optional_path(runtime, bound[1]);
  bool exact = bound.flag(0, false);
  auto next = iterate(runtime, value);
  Value best, best_key, item;
  bool any = false;
  while (next(item)) {
    Value key = follow(runtime, item, path);
    if (!exact) key = ignore_case(runtime, key);
    if (!any || compare(runtime, key, best_key, wanted == Order::less ? "<" : ">") == wanted) {
      best = item;
      best_key = key;
    }
    any = true;
  }
  return any ? best : runtime.undefined("No aggregated item, sequence was empty.");
}

}  // namespace

Value length(Runtime& runtime, const Value& value, const Args& args) {
  no_arguments(runtime, "length", args);
  auto count = length_of(runtime, value);
  if (!count) runtime.fail("object of type '{}' has no len()", type_name(value));
  return Value::integer(static_cast<Int>(*count));
}

Value default_value(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "default", args, {"default_value", "boolean"});
  bool replaced = value.is_undefined() || (bound.flag(1, false) && !truth(runtime, value));
  return !replaced ? value : bound[0] ? *bound[0] : runtime.text("");
}

Value first(Runtime& runtime, const Value& value, const Args& args) {
  no_arguments(runtime, "first", args);
  Value out;
  auto next = iterate(runtime, value);
  return next(out) ? out : runtime.undefined("No first item, sequence was empty.");
}

Value last(Runtime& runtime, const Value& value, const Args& args) {
  no_arguments(runtime, "last", args);
  if (!length_of(runtime, value)) runtime.fail("'{}' object is not reversible", type_name(value));
  if (value.is(Type::string)) {
    Value out = get_item(runtime, value, Value::integer(-1));
    if (!out.is_undefined()) return out;
  } else if (value.is(Type::sequence) && !value.sequence().items.empty()) {
    return value.sequence().items.back();
  } else if (value.is(Type::dict) && !value.dict().entries.empty()) {
    return value.dict().entries.back().first;
  }
  return runtime.undefined("No last item, sequence was empty.");
}

Value list(Runtime& runtime, const Value& value, const Args& args) {
  no_arguments(runtime, "list", args);
  return runtime.list(to_vector(runtime, value));
}

Value items(Runtime& runtime, const Value& value, const Args& args) {
  no_arguments(runtime, "items", args);
  if (value.is_undefined()) return generate(runtime, value, [](Value&) { return true; });
  return generate(runtime, value, [&runtime, value](Value& key) {
    if (!value.is(Type::dict)) runtime.fail("Can only get item pairs from a mapping.");
    Value key_value = key;
    key = runtime.tuple({key_value, *value.dict().find(runtime, key_value)});
    return true;
  });
}

Value reverse(Runtime& runtime, const Value& value, const Args& args) {
  no_arguments(runtime, "reverse", args);
  if (value.is(Type::string)) return reversed(runtime, value);
  if (!is_iterable(value)) runtime.fail("argument must be iterable");
  std::vector<Value> all = to_vector(runtime, value);
  std::reverse(all.begin(), all.end());
  Value out = runtime.list(std::move(all));
  // Python gives an iterator where reversed() works, and a list elsewhere.
  return length_of(runtime, value) ? generate(runtime, out, [](Value&) { return true; }) : out;
}

Value join(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "join", args, {"d", "attribute"});
  Path path = optional_path(runtime, bound[1]);
  std::string separator = bound[0] ? to_text(runtime, *bound[0]) : "", out;
  auto next = iterate(runtime, value);
  bool leading = true;
  for (Value item; next(item); leading = false) {
    if (!leading) out += separator;
    out += to_text(runtime, follow(runtime, item, path));
    runtime.check_text(out.size());
  }
  return runtime.text(std::move(out));
}

Value map(Runtime& runtime, const Value& value, const Args& args) {
  if (!truth(runtime, value)) return generate(runtime, runtime.list({}), [](Value&) { return true; });
  if (args.positional.empty()) {
    Bound bound(runtime, "map", args, {"attribute", "default"});
    if (!bound[0]) runtime.fail("map requires a filter argument");
    Path path = attribute_path(runtime, *bound[0]);
    Value otherwise = bound[1] ? *bound[1] : Value::none();
    return generate(runtime, value, [&runtime, path, otherwise](Value& item) {
      item = follow(runtime, item, path, &otherwise);
      return true;
    });
  }
  std::string name = to_text(runtime, args.positional[0]);
  FilterFunction filter = find_filter(name);
  if (!filter) runtime.fail("No filter named '{}'.", name);
  return generate(runtime, value, [&runtime, filter, rest = rest_of(args, 1)](Value& item) {
    Nested nested(runtime);
    item = filter(runtime, Value(item), rest);
    return true;
  });
}

Value select(Runtime& r, const Value& value, const Args& args) { return pick(r, value, args, true, false); }
Value reject(Runtime& r, const Value& value, const Args& args) { return pick(r, value, args, false, false); }
Value select_attr(Runtime& r, const Value& value, const Args& args) {
  return pick(r, value, args, true, true);
}
Value reject_attr(Runtime& r, const Value& value, const Args& args) {
  return pick(r, value, args, false, true);
}

Value sort(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "sort", args, {"reverse", "case_sensitive", "attribute"});
  std::vector<Path> paths;
  if (bound[2] && bound[2]->is(Type::string)) {
    std::string_view rest = bound[2]->string();
    while (true) {
      size_t comma = std::min(rest.find(','), rest.size());
      paths.push_back(attribute_path(runtime, runtime.text(rest.substr(0, comma))));
      if (comma == rest.size()) break;
      rest.remove_prefix(comma + 1);
    }
  } else {
    paths.push_back(optional_path(runtime, bound[2]));
  }
  bool exact = bound.flag(1, false);
  std::vector<Keyed> keyed;
  for (Value& item : to_vector(runtime, value)) {
    std::vector<Value> keys;
    for (const Path& path : paths) {
      Value key = follow(runtime, item, path);
      keys.push_back(exact ? key : ignore_case(runtime, key));
    }
    keyed.emplace_back(std::move(keys), std::move(item));
  }
  return runtime.list(sort_keyed(runtime, keyed, bound.flag(0, false)));
}

Value dict_sort(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "dictsort", args, {"case_sensitive", "by", "reverse"});
  std::string by = bound.text(1, "key");
  if (by != "key" && by != "value") runtime.fail("You can only sort by either \"key\" or \"value\"");
  if (!value.is(Type::dict)) {
    if (value.is_undefined()) runtime.fail("{}", value.undefined_reason());
    runtime.fail("'{}' object has no attribute 'items'", type_name(value));
  }
  bool exact = bound.flag(0, false);
  std::vector<Keyed> keyed;
  for (const auto& [key, item] : value.dict().entries) {
    const Value& sorted_by = by == "key" ? key : item;
    keyed.push_back({{exact ? sorted_by : ignore_case(runtime, sorted_by)}, runtime.tuple({key, item})});
  }
  return runtime.list(sort_keyed(runtime, keyed, bound.flag(2, false)));
}

Value unique(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "unique", args, {"case_sensitive", "attribute"});
  Path path = optional_path(runtime, bound[1]);
  bool exact = bound.flag(0, false);
  Dict* seen = runtime.dict();
  return generate(runtime, value, [&runtime, seen, path, exact](Value& item) {
    Value key = follow(runtime, item, path);
    if (!exact) key = ignore_case(runtime, key);
    if (seen->find(runtime, key)) return false;
    seen->set(runtime, key, Value::none());
    return true;
  });
}

Value min(Runtime& r, const Value& value, const Args& args) { return extreme(r, value, args, Order::less); }
Value max(Runtime& r, const Value& value, const Args& args) {
  return extreme(r, value, args, Order::greater);
}

Value sum(Runtime& runtime, const Value& value, const Args& args) {
  Bound bound(runtime, "sum", args, {"attribute", "start"});
  Path path = optional_path(runtime, bound[0]);
  Value total = bound[1] ? *bound[1] : Value::integer(0);
  if (total.is(Type::string)) runtime.fail("sum() can't sum strings [use ''.join(seq) instead]");
  auto next = iterate(runtime, value);
  for (Value item; next(item);) total = arithmetic(runtime, "+", total, follow(runtime, item, path));
  return total;
}

}  // namespace latente::jinja::filters
