#include "grammar/schema_merge.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>
#include <set>

#include "base/error.h"

namespace latente::grammar {
namespace {

constexpr int most_depth = 64;  // of references and combinators in each other
constexpr uint64_t most_count = 1'000'000'000;

const std::set<std::string, std::less<>> annotations{
    "$schema",  "$id",         "id",      "$comment",    "$anchor",         "$vocabulary",
    "title",    "description", "default", "examples",    "example",         "deprecated",
    "readOnly", "writeOnly",   "$defs",   "definitions", "contentEncoding", "contentMediaType"};

bool is_annotation(const std::string& key) { return annotations.count(key) > 0 || key.starts_with("x-"); }

// Drafts 4 to 2019-09 in the words of 2020-12.
void modernise(Json& schema) {
  for (const auto& [bound, exclusive] :
       {std::pair("minimum", "exclusiveMinimum"), {"maximum", "exclusiveMaximum"}}) {
    if (!schema.contains(exclusive) || !schema[exclusive].is_boolean()) continue;
    const bool excludes = schema[exclusive].get<bool>() && schema.contains(bound);
    if (excludes) {
      schema[exclusive] = schema[bound];
      schema.erase(bound);
    } else {
      schema.erase(exclusive);
    }
  }
  if (schema.contains("items") && schema["items"].is_array()) {
    schema["prefixItems"] = schema["items"];
    schema.erase("items");
    if (schema.contains("additionalItems")) schema["items"] = schema["additionalItems"];
  }
  schema.erase("additionalItems");
  // Said, so that merging does not take another's 0 for it.
  if (schema.contains("contains") && !schema.contains("minContains")) schema["minContains"] = 1;
}

const Json* find(const Json& schema, const std::string& key) {
  const auto at = schema.find(key);
  return at == schema.end() ? nullptr : &*at;
}

std::string_view kind_of_key(std::string_view key) {
  static const std::vector<std::pair<std::string_view, std::vector<std::string_view>>> kinds{
      {"object",
       {"properties", "patternProperties", "required", "additionalProperties", "minProperties",
        "maxProperties"}},
      {"array",
       {"items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains",
        "minContains", "maxContains"}},
      {"string", {"minLength", "maxLength", "pattern", "format"}},
      {"number", {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}}};
  for (const auto& [kind, keys] : kinds) {
    if (std::find(keys.begin(), keys.end(), key) != keys.end()) return kind;
  }
  return {};
}

}  // namespace

Json both(const Json& a, const Json& b) {
  Json list = Json::array();
  for (const Json* schema : {&a, &b}) {
    if (schema->is_boolean()) {
      if (!schema->get<bool>()) return false;
      continue;
    }
    const bool is_list = schema->is_object() && schema->size() == 1 && schema->contains("allOf") &&
                         (*schema)["allOf"].is_array();
    const auto add = [&](const Json& part) {
      if (std::find(list.begin(), list.end(), part) == list.end()) list.push_back(part);
    };
    if (is_list) {
      for (const Json& part : (*schema)["allOf"]) add(part);
    } else {
      add(*schema);
    }
  }
  if (list.empty()) return true;
  if (list.size() == 1) return list[0];
  return Json{{"allOf", std::move(list)}};
}

std::vector<Json> values_of(const Json& value) {
  return value.is_array() ? std::vector<Json>(value.begin(), value.end()) : std::vector<Json>{value};
}

uint64_t weight_of(const Json& json) {
  constexpr size_t text_step = 16;
  if (json.is_string()) return 1 + json.get_ref<const std::string&>().size() / text_step;
  uint64_t weight = 1;
  if (json.is_object()) {
    for (const auto& [key, value] : json.items()) weight += key.size() / text_step + weight_of(value);
  } else if (json.is_array()) {
    for (const Json& element : json) weight += weight_of(element);
  }
  return weight;
}

std::string path_to(const std::string& path, const std::string& key) {
  std::string out = path + "/";
  for (const char c : key) {
    if (c == '~' || c == '/') {
      out += c == '~' ? "~0" : "~1";
    } else {
      out += c;
    }
  }
  return out;
}

bool has_type(const Json& value, const std::string& type) {
  if (type == "object") return value.is_object();
  if (type == "array") return value.is_array();
  if (type == "string") return value.is_string();
  if (type == "boolean") return value.is_boolean();
  if (type == "null") return value.is_null();
  if (type == "integer")
    return value.is_number_integer() ||
           (value.is_number_float() && value.get<double>() == std::floor(value.get<double>()));
  return type == "number" && value.is_number();
}

std::vector<std::string> types_of(const Json& schema) {
  std::vector<std::string> types;
  if (const Json* type = find(schema, "type")) {
    for (const Json& one : type->is_array() ? *type : Json::array({*type}))
      types.push_back(one.get<std::string>());
    return types;
  }
  for (const auto& [key, value] : schema.items()) {
    const std::string kind(kind_of_key(key));
    if (!kind.empty() && std::find(types.begin(), types.end(), kind) == types.end()) types.push_back(kind);
  }
  if (types.empty()) types = {"object", "array", "string", "number", "boolean", "null"};
  return types;
}

void SchemaMerge::broken(const std::string& path, const std::string& what) const {
  fail("{}{}: {}", name_, path, what);
}

void SchemaMerge::spend(uint64_t steps, const std::string& path) const {
  try {
    work_.spend(steps);
  } catch (const Error& error) {
    broken(path, error.what());
  }
}

const Json& SchemaMerge::target(const Json& reference, const std::string& path) const {
  if (!reference.is_string()) broken(path, "expected a string");
  const std::string& text = reference.get_ref<const std::string&>();
  if (text.empty() || text[0] != '#' || (text.size() > 1 && text[1] != '/'))
    broken(path,
           fmt::format("only references into the schema itself (#/...) are understood, found {}", text));
  const Json* at = &root_;
  for (size_t begin = 1; begin < text.size();) {
    const size_t end = std::min(text.find('/', begin + 1), text.size());
    std::string key;
    for (size_t i = begin + 1; i < end; ++i) {
      unsigned value = 0;
      if (text[i] == '%' && i + 2 < end &&
          std::from_chars(&text[i + 1], &text[i + 3], value, 16).ptr == &text[i + 3]) {
        key += static_cast<char>(value);
        i += 2;
      } else if (text[i] == '~' && i + 1 < end) {
        key += text[++i] == '0' ? '~' : '/';
      } else {
        key += text[i];
      }
    }
    size_t index = 0;
    if (at->is_object() && at->contains(key)) {
      at = &(*at)[key];
    } else if (at->is_array() && !key.empty() &&
               std::from_chars(key.data(), key.data() + key.size(), index).ptr == key.data() + key.size() &&
               index < at->size()) {
      at = &(*at)[index];
    } else {
      broken(path, fmt::format("the schema has no {}", text));
    }
    begin = end;
  }
  return *at;
}

std::vector<Json> SchemaMerge::alternatives(const Json& schema, const std::string& path) const {
  return expand(schema, path, 0);
}

void SchemaMerge::check(const std::string& key, const Json& value, const std::string& path) const {
  static const std::set<std::string, std::less<>> types{"object",  "array",   "string", "number",
                                                        "integer", "boolean", "null"};
  static const std::set<std::string, std::less<>> counts{"minLength",   "maxLength",     "minItems",
                                                         "maxItems",    "minProperties", "maxProperties",
                                                         "minContains", "maxContains"};
  const auto all = [&](auto holds) {
    return value.is_array() && std::all_of(value.begin(), value.end(), holds);
  };
  const auto is_type = [&](const Json& one) {
    return one.is_string() && types.count(one.get_ref<const std::string&>()) > 0;
  };
  const auto is_string = [](const Json& one) { return one.is_string(); };
  const char* expected = nullptr;
  if (key == "type") {
    if (!is_type(value) && !(all(is_type) && !value.empty()))
      expected = "the name of a type or a list of such";
  } else if (key == "required") {
    if (!all(is_string)) expected = "a list of strings";
  } else if (counts.count(key) > 0) {
    if (!value.is_number_unsigned() || value.get<uint64_t>() > most_count)
      expected = "a whole number, not too large";
  } else if (key == "properties" || key == "patternProperties") {
    if (!value.is_object()) expected = "an object";
  } else if (key == "prefixItems") {
    if (!value.is_array()) expected = "a list";
  } else if (key == "pattern" || key == "format") {
    if (!value.is_string()) expected = "a string";
  } else if (key == "minimum" || key == "maximum") {
    if (!value.is_number()) expected = "a number";
  } else if (key == "multipleOf") {
    if (!value.is_number() || value <= 0) expected = "a number above 0";
  } else if (key == "exclusiveMinimum" || key == "exclusiveMaximum") {
    if (!value.is_number() && !value.is_boolean()) expected = "a number";
  } else if (key == "uniqueItems") {
    if (!value.is_boolean()) expected = "true or false";
  } else if (key != "items" && key != "contains" && key != "additionalProperties" &&
             key != "additionalItems") {
    broken(path, "this keyword cannot be honoured");
  }
  if (expected != nullptr)
    broken(path, fmt::format("expected {}, found {}", expected, value.dump().substr(0, 60)));
}

std::vector<Json> SchemaMerge::expand(const Json& schema, const std::string& path, int depth) const {
  if (depth > most_depth) broken(path, "references and combinators go in circles, or nest too deep");
  if (schema.is_boolean())
    return schema.get<bool>() ? std::vector{Json(Json::object())} : std::vector<Json>{};
  if (!schema.is_object()) broken(path, "expected a schema: an object, true or false");
  spend(schema.size() + path.size() / 16, path);
  Json own = Json::object();
  std::vector<Json> all{Json::object()};
  for (const auto& [key, value] : schema.items()) {
    const std::string at = path_to(path, key);
    if (is_annotation(key)) continue;
    if (key == "$ref") {
      all = combine(all, expand(target(value, at), at, depth + 1), path);
    } else if (key == "allOf" || key == "anyOf" || key == "oneOf") {
      if (!value.is_array() || value.empty()) broken(at, "expected a list of schemas");
      std::vector<Json> any;
      for (size_t i = 0; i < value.size(); ++i) {
        std::vector<Json> part = expand(value[i], path_to(at, std::to_string(i)), depth + 1);
        if (key == "allOf") {
          all = combine(all, part, path);
        } else {
          any.insert(any.end(), part.begin(), part.end());
          if (any.size() > most_alternatives) broken(at, "too many alternatives");
        }
      }
      if (key != "allOf") all = combine(all, any, path);
    } else if (key == "not") {
      all = combine(all, negate(value, at, depth + 1), path);
    } else if (key == "if") {
      all = combine(all, conditional(schema, path, depth + 1), path);
    } else if (key == "then" || key == "else") {
      continue;  // beside an if, or of no meaning
    } else if (key == "dependentRequired" || key == "dependentSchemas" || key == "dependencies") {
      all = combine(all, dependencies(value, at, depth + 1), path);
    } else if (key == "const" || key == "enum") {
      const Json values = key == "const" ? Json::array({value}) : value;
      if (!values.is_array()) broken(at, "expected a list of values");
      spend(weight_of(values), at);
      own["enum"] = own.contains("enum") ? merged_values("enum", own["enum"], values, at) : values;
    } else {
      spend(weight_of(value), at);
      check(key, value, at);
      own[key] = value;
    }
  }
  modernise(own);
  return combine({own}, all, path);
}

std::vector<Json> SchemaMerge::conditional(const Json& schema, const std::string& path, int depth) const {
  const auto branch = [&](const char* key) {
    const Json* found = find(schema, key);
    return found == nullptr ? std::vector{Json(Json::object())} : expand(*found, path_to(path, key), depth);
  };
  const Json& condition = schema["if"];
  const std::string at = path_to(path, "if");
  std::vector<Json> all = combine(expand(condition, at, depth), branch("then"), path);
  const std::vector<Json> otherwise = combine(negate(condition, at, depth), branch("else"), path);
  all.insert(all.end(), otherwise.begin(), otherwise.end());
  return all;
}

// Properties that ask for other properties, or for a schema.
std::vector<Json> SchemaMerge::dependencies(const Json& needs, const std::string& path, int depth) const {
  if (!needs.is_object()) broken(path, "expected an object");
  std::vector<Json> all{Json::object()};
  for (const auto& [key, need] : needs.items()) {
    const std::string at = path_to(path, key);
    if (need.is_array()) check("required", need, at);
    std::vector<Json> either{Json{{"properties", {{key, false}}}}};
    const std::vector<Json> with{Json{{"required", Json::array({key})}}};
    for (Json& one : combine(with, expand(need.is_array() ? Json{{"required", need}} : need, at, depth), at))
      either.push_back(std::move(one));
    all = combine(all, either, path);
  }
  return all;
}

// One of the keywords does not hold: what that means, for each of them.
std::vector<Json> SchemaMerge::negate(const Json& schema, const std::string& path, int depth) const {
  if (depth > most_depth) broken(path, "references and combinators go in circles, or nest too deep");
  if (schema.is_boolean())
    return schema.get<bool>() ? std::vector<Json>{} : std::vector{Json(Json::object())};
  if (!schema.is_object()) broken(path, "expected a schema: an object, true or false");
  spend(weight_of(schema) + path.size() / 16, path);
  Json own = schema;
  modernise(own);
  std::vector<Json> any;
  const auto add = [&](Json one) { any.push_back(std::move(one)); };
  const auto add_all = [&](std::vector<Json> more) { any.insert(any.end(), more.begin(), more.end()); };
  const auto typed = [&](const char* type, const char* key, Json value) {
    add(Json{{"type", type}, {key, std::move(value)}});
  };
  static const std::map<std::string, std::pair<const char*, const char*>, std::less<>> opposite_bounds{
      {"minimum", {"number", "exclusiveMaximum"}},
      {"exclusiveMinimum", {"number", "maximum"}},
      {"maximum", {"number", "exclusiveMinimum"}},
      {"exclusiveMaximum", {"number", "minimum"}},
      {"minLength", {"string", "maxLength"}},
      {"maxLength", {"string", "minLength"}},
      {"minItems", {"array", "maxItems"}},
      {"maxItems", {"array", "minItems"}},
      {"minProperties", {"object", "maxProperties"}},
      {"maxProperties", {"object", "minProperties"}}};
  for (const auto& [key, value] : own.items()) {
    const std::string at = path_to(path, key);
    if (is_annotation(key)) continue;
    if (key == "$ref") {
      add_all(negate(target(value, at), at, depth + 1));
    } else if (key == "not") {
      add_all(expand(value, at, depth + 1));
    } else if (key == "allOf" || key == "anyOf") {
      if (!value.is_array() || value.empty()) broken(at, "expected a list of schemas");
      std::vector<Json> none{Json::object()};
      for (size_t i = 0; i < value.size(); ++i) {
        std::vector<Json> part = negate(value[i], path_to(at, std::to_string(i)), depth + 1);
        if (key == "allOf") {
          add_all(std::move(part));
        } else {
          none = combine(none, part, path);
        }
      }
      if (key == "anyOf") add_all(std::move(none));
    } else if (key == "const" || key == "enum") {
      if (key == "enum" && !value.is_array()) broken(at, "expected a list of values");
      add_all(other_values(key == "const" ? std::vector<Json>{value} : values_of(value), at));
    } else {
      check(key, value, at);
      if (key == "type") {
        const std::vector<std::string> named = types_of(Json{{"type", value}});
        const auto is_named = [&](const char* type) {
          return std::find(named.begin(), named.end(), type) != named.end();
        };
        if (is_named("integer") && !is_named("number")) broken(at, "integer cannot be honoured inside not");
        Json others = Json::array();
        for (const char* type : {"object", "array", "string", "number", "boolean", "null"}) {
          if (!is_named(type)) others.push_back(type);
        }
        if (!others.empty()) add(Json{{"type", std::move(others)}});
      } else if (key == "required") {
        for (const Json& one : value) typed("object", "properties", Json{{one.get<std::string>(), false}});
      } else if (key == "properties") {
        for (const auto& [name, what] : value.items()) {
          add(Json{{"type", "object"},
                   {"required", Json::array({name})},
                   {"properties", {{name, Json{{"not", what}}}}}});
        }
      } else if (key == "pattern") {
        typed("string", "not pattern", value);
      } else if (const auto bound = opposite_bounds.find(key); bound != opposite_bounds.end()) {
        const auto [type, opposite] = bound->second;
        if (std::string_view(type) == "number") {
          typed(type, opposite, value);
        } else if (key.starts_with("max")) {
          typed(type, opposite, value.get<uint64_t>() + 1);
        } else if (value.get<uint64_t>() > 0) {
          typed(type, opposite, value.get<uint64_t>() - 1);
        }
      } else {
        broken(at, "this keyword cannot be honoured inside not, or in a condition");
      }
    }
    if (any.size() > most_alternatives) broken(path, "too many alternatives");
  }
  return any;
}

// The schemas of everything but some values.
std::vector<Json> SchemaMerge::other_values(std::vector<Json> values, const std::string& path) const {
  Json texts = Json::array(), rest = Json::array({false, true, nullptr});
  std::vector<Json> numbers, all;
  for (Json& value : values) {
    if (value.is_structured())
      broken(path, "a list or an object cannot be honoured inside not, or in a condition");
    if (value.is_string()) texts.push_back(value);
    if (value.is_number()) numbers.push_back(value);
    if (const auto at = std::find(rest.begin(), rest.end(), value); at != rest.end()) rest.erase(at);
  }
  all.push_back(Json{{"type", "object"}});
  all.push_back(Json{{"type", "array"}});
  all.push_back(Json{{"type", "string"}});
  if (!texts.empty()) all.back()["not enum"] = texts;
  if (!rest.empty()) all.push_back(Json{{"enum", rest}});
  // The numbers below, between and above them.
  std::sort(numbers.begin(), numbers.end());
  for (size_t i = 0; i <= numbers.size(); ++i) {
    all.push_back(Json{{"type", "number"}});
    if (i > 0) all.back()["exclusiveMinimum"] = numbers[i - 1];
    if (i < numbers.size()) all.back()["exclusiveMaximum"] = numbers[i];
  }
  return all;
}

std::vector<Json> SchemaMerge::combine(const std::vector<Json>& a, const std::vector<Json>& b,
                                       const std::string& path) const {
  if (a.size() * b.size() > most_alternatives) broken(path, "the combinators have too many alternatives");
  std::vector<Json> all;
  for (const Json& one : a) {
    for (const Json& other : b) {
      spend(weight_of(one) + weight_of(other) + all.size(), path);
      Json merged = merge(one, other, path);
      if (std::find(all.begin(), all.end(), merged) == all.end()) all.push_back(std::move(merged));
    }
  }
  return all;
}

Json SchemaMerge::merge(const Json& a, const Json& b, const std::string& path) const {
  if (a.empty()) return b;
  if (b.empty()) return a;
  for (const auto& [one, other] : {std::pair(&a, &b), {&b, &a}}) {
    if (one->contains("patternProperties") &&
        (other->contains("properties") || other->contains("additionalProperties") ||
         other->contains("patternProperties")))
      broken(path_to(path, "patternProperties"), "cannot be combined with the properties of another schema");
  }
  Json out = a;
  for (const auto& [key, value] : b.items()) {
    if (key == "properties" || key == "prefixItems") continue;
    out[key] = out.contains(key) ? merged_values(key, out[key], value, path_to(path, key)) : value;
  }
  merge_first_items(a, b, out);
  const Json *mine = find(a, "properties"), *theirs = find(b, "properties");
  if (mine == nullptr && theirs == nullptr) return out;
  // What only one declares, the other's additionalProperties speak of.
  Json properties = Json::object();
  const auto add = [&](const Json* from, const Json* others, const Json* others_rest) {
    if (from == nullptr) return;
    for (const auto& [key, value] : from->items()) {
      const Json* declared = others != nullptr ? find(*others, key) : nullptr;
      if (properties.contains(key)) continue;
      const Json* other = declared != nullptr ? declared : others_rest;
      properties[key] = other == nullptr ? value : both(value, *other);
    }
  };
  add(mine, theirs, find(b, "additionalProperties"));
  add(theirs, mine, find(a, "additionalProperties"));
  out["properties"] = std::move(properties);
  return out;
}

// Where only one names an item by its place, the other's items speak of it.
void SchemaMerge::merge_first_items(const Json& a, const Json& b, Json& out) {
  const Json *mine = find(a, "prefixItems"), *theirs = find(b, "prefixItems");
  if (mine == nullptr && theirs == nullptr) return;
  const auto item = [](const Json& schema, const Json* first, size_t i) {
    if (first != nullptr && i < first->size()) return (*first)[i];
    const Json* rest = find(schema, "items");
    return rest == nullptr ? Json(true) : *rest;
  };
  Json items = Json::array();
  const size_t count = std::max(mine != nullptr ? mine->size() : 0, theirs != nullptr ? theirs->size() : 0);
  for (size_t i = 0; i < count; ++i) items.push_back(both(item(a, mine, i), item(b, theirs, i)));
  out["prefixItems"] = std::move(items);
}

Json SchemaMerge::merged_values(const std::string& key, const Json& a, const Json& b,
                                const std::string& path) const {
  if (a == b) return a;
  if (a.is_array() && b.is_array()) spend(a.size() * b.size(), path);
  if (key == "type") {
    Json out = Json::array();
    for (const Json& one : values_of(a)) {
      for (const Json& other : values_of(b)) {
        if (one == other || (one == "integer" && other == "number")) out.push_back(one);
        if (one == "number" && other == "integer") out.push_back(other);
      }
    }
    return out;
  }
  if (key == "enum") {
    Json out = Json::array();
    for (const Json& one : a) {
      if (std::find(b.begin(), b.end(), one) != b.end()) out.push_back(one);
    }
    return out;
  }
  if (key == "uniqueItems") return true;
  if (key == "required" || key == "pattern" || key == "format" || key == "multipleOf" ||
      key.starts_with("not ")) {
    Json out = values_of(a);
    for (const Json& one : values_of(b)) {
      if (std::find(out.begin(), out.end(), one) == out.end()) out.push_back(one);
    }
    return out;
  }
  if (a.is_number() && b.is_number()) {
    if (key == "minimum" || key == "exclusiveMinimum" || key.starts_with("min")) return a < b ? b : a;
    if (key == "maximum" || key == "exclusiveMaximum" || key.starts_with("max")) return a < b ? a : b;
  }
  if (key == "additionalProperties" || key == "items") return both(a, b);
  broken(path, "two values that cannot be combined");
}

}  // namespace latente::grammar
