#include "grammar/json_schema.h"

#include <algorithm>
#include <deque>
#include <map>

#include "base/error.h"
#include "grammar/json_format.h"
#include "grammar/json_number.h"
#include "grammar/json_text.h"
#include "grammar/matcher.h"
#include "grammar/pattern.h"
#include "grammar/schema_merge.h"

namespace latente::grammar {
namespace {

// Enumerations beside keywords that choose among their values: a grammar is made of each.
constexpr int most_filtered = 1000;
constexpr size_t most_bytes = size_t{4} << 20, most_rules = 50'000;
constexpr int most_nesting = 128;

// nlohmann's parser and its values are fine with any depth; what walks them here is not.
void check_nesting(std::string_view text, const std::string& name) {
  int depth = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
      continue;
    }
    if (c == '"') in_string = true;
    if (c == '{' || c == '[') ++depth;
    if (c == '}' || c == ']') --depth;
    if (depth > most_nesting) fail("{}: nests deeper than {}", name, most_nesting);
  }
}

class Builder {
 public:
  Builder(const Json& schema, const std::string& name) : merge_(schema, name), name_(name) {
    // Rules that all share.
    any_character_ = rule("character", any_json_character());
    any_characters_ = repeat(any_json_character(), 0, Expression::unlimited);
    rest_of_string_ = call(rule("rest of a string", sequence({any_characters_, literal("\"")})));
    space_ = call(rule("space", json_space()));
    string_ = call(rule("string", sequence({literal("\""), any_characters_, literal("\"")})));
    integer_ = call(rule("integer", integers({})));
    number_ = call(rule("number", numbers({})));
    const uint32_t any = rule("value", {});
    value_ = call(any);
    const Expression colon = sequence({literal(":"), json_space_after_colon()});
    any_object_ = call(
        rule("object", braces(listed(sequence({string_, colon, value_}), 0, Expression::unlimited), true)));
    const Expression array = braces(listed(value_, 0, Expression::unlimited), false);
    grammar_.rules[any].body = choice({any_object_, call(rule("array", array)), string_, number_,
                                       literal("true"), literal("false"), literal("null")});
    colon_ = colon;
  }

  Grammar whole(const Json& schema) {
    grammar_.root = schema_rule(schema, "#");
    return finish();
  }
  Grammar any_object() {
    grammar_.root = any_object_.rule;
    return std::move(grammar_);
  }

 private:
  struct Job {
    uint32_t rule;
    Json schema;
    std::string path;
  };

  uint32_t rule(std::string name, Expression body) {
    if (grammar_.rules.size() >= most_rules) fail("{}: needs more than {} rules", name_, most_rules);
    grammar_.rules.push_back({std::move(name), std::move(body)});
    return static_cast<uint32_t>(grammar_.rules.size() - 1);
  }

  // The rule of a schema; equal ones share it, which also ends recursion.
  uint32_t schema_rule(const Json& schema, const std::string& path) {
    auto [known, is_new] = known_.try_emplace(schema.dump(), 0);
    if (is_new) {
      known->second = rule(path, {});
      jobs_.push_back({known->second, schema, path});
    }
    return known->second;
  }
  Expression schema_call(const Json& schema, const std::string& path) {
    return call(schema_rule(schema, path));
  }

  Grammar finish() {
    while (!jobs_.empty()) {
      const Job job = std::move(jobs_.front());
      jobs_.pop_front();
      Expression body = expression(job.schema, job.path);
      grammar_.rules[job.rule].body = std::move(body);
    }
    return std::move(grammar_);
  }

  Expression expression(const Json& schema, const std::string& path) {
    if (schema.is_object() && schema.size() == 1) {
      // Alone, references and alternatives are rules of their own.
      const std::string& key = schema.begin().key();
      const Json& value = schema.begin().value();
      const std::string at = path_to(path, key);
      if (key == "$ref") return schema_call(merge_.target(value, at), value.get<std::string>());
      if ((key == "anyOf" || key == "oneOf") && value.is_array()) {
        std::vector<Expression> all;
        for (size_t i = 0; i < value.size(); ++i)
          all.push_back(schema_call(value[i], path_to(at, std::to_string(i))));
        return choice(std::move(all));
      }
    }
    std::vector<Expression> all;
    for (const Json& one : merge_.alternatives(schema, path)) all.push_back(alternative(one, path));
    return all.size() == 1 ? std::move(all[0]) : choice(std::move(all));
  }

  // Of a schema without combinators.
  Expression alternative(const Json& schema, const std::string& path) {
    if (schema.contains("enum")) return enumeration(schema, path);
    if (schema.empty()) return value_;
    std::vector<Expression> all;
    const std::vector<std::string> types = types_of(schema);
    const bool numbers = std::find(types.begin(), types.end(), "number") != types.end();
    for (const std::string& type : types) {
      if (type == "object") all.push_back(object(schema, path));
      if (type == "array") all.push_back(array(schema, path));
      if (type == "string") all.push_back(string(schema, path));
      if (type == "number" || (type == "integer" && !numbers))
        all.push_back(number(schema, path, type == "integer"));
      if (type == "boolean") all.insert(all.end(), {literal("true"), literal("false")});
      if (type == "null") all.push_back(literal("null"));
    }
    return choice(std::move(all));
  }

  // The values that the other keywords admit.
  Expression enumeration(const Json& schema, const std::string& path) {
    Json rest = schema;
    rest.erase("enum");
    std::vector<Expression> all;
    std::shared_ptr<const Automaton> others;
    if (!rest.empty() && !(rest.size() == 1 && rest.contains("type"))) {
      if (filtering_ || ++filtered_ > most_filtered)
        merge_.broken(path, "too many enumerations beside other keywords, or one in another");
      try {
        others = std::make_shared<const Automaton>(Builder(merge_.root(), name_).whole_at(rest, path));
      } catch (const Error& error) {
        merge_.broken(path, fmt::format("enum or const beside what cannot be honoured ({})", error.what()));
      }
    }
    const std::vector<std::string> types = types_of(schema);
    for (const Json& value : schema["enum"]) {
      const bool typed =
          !schema.contains("type") ||
          std::any_of(types.begin(), types.end(), [&](const auto& type) { return has_type(value, type); });
      if (typed && (others == nullptr || matches(others, value.dump()))) all.push_back(json_constant(value));
    }
    return choice(std::move(all));
  }
  Grammar whole_at(const Json& schema, const std::string& path) {
    filtering_ = true;
    grammar_.root = rule(path, {});
    Expression body = alternative(schema, path);
    grammar_.rules[grammar_.root].body = std::move(body);
    return finish();
  }

  Expression braces(Expression content, bool object) const {
    return sequence({literal(object ? "{" : "["), space_, optional(sequence({std::move(content), space_})),
                     literal(object ? "}" : "]")});
  }
  Expression comma() const { return sequence({literal(","), space_}); }
  // min to max of them, between commas; of none only as far as braces() leave the content out.
  Expression listed(const Expression& one, uint32_t min, uint32_t max) const {
    const uint32_t more = max == Expression::unlimited ? max : max - 1;
    return sequence({one, repeat(sequence({comma(), one}), min == 0 ? 0 : min - 1, more)});
  }

  static std::optional<uint32_t> count(const Json& schema, const char* key) {
    if (!schema.contains(key)) return std::nullopt;
    return schema[key].get<uint32_t>();
  }

  // What stands between braces: parts in order, each of which may be left out or may not, then any number of
  // `rest` (min to max of them), commas in between. `rest` null: none.
  struct Part {
    Expression expression;
    bool required;
  };
  Expression chain(const std::vector<Part>& parts, const Expression* rest, uint32_t min, uint32_t max,
                   const std::string& path, bool object, bool gaps) {
    // behind[i]: what may follow when something was written and the parts from i on are left.
    const bool more = rest != nullptr && max > 0;
    Expression behind = more ? repeat(sequence({comma(), *rest}), min, max) : literal("");
    Expression first = more ? listed(*rest, min, max) : choice({});
    bool may_be_empty = min == 0;
    if (!more && min > 0) behind = choice({});
    for (size_t i = parts.size(); i-- > 0;) {
      const Expression tail = call(rule(path, std::move(behind)));
      Expression start = sequence({parts[i].expression, tail});
      Expression next = sequence({comma(), parts[i].expression, tail});
      if (parts[i].required) {
        first = std::move(start);
        behind = std::move(next);
        may_be_empty = false;
      } else if (gaps) {
        first = choice({std::move(start), call(rule(path, std::move(first)))});
        behind = sequence({optional(sequence({comma(), parts[i].expression})), tail});
      } else {
        first = std::move(start);
        behind = optional(std::move(next));
      }
    }
    Expression content = sequence({std::move(first), space_});
    return sequence({literal(object ? "{" : "["), space_,
                     may_be_empty ? optional(std::move(content)) : std::move(content),
                     literal(object ? "}" : "]")});
  }

  Expression object(const Json& schema, const std::string& path) {
    static const Json no_properties = Json::object();
    const Json& properties = schema.contains("properties") ? schema["properties"] : no_properties;
    const bool declares = !properties.empty();
    Json additional = !declares;
    if (schema.contains("additionalProperties")) additional = schema["additionalProperties"];
    std::vector<std::string> required;
    if (schema.contains("required")) required = schema["required"].get<std::vector<std::string>>();
    const auto is_required = [&](const std::string& key) {
      return std::find(required.begin(), required.end(), key) != required.end();
    };

    std::vector<Part> parts;
    std::vector<std::string> keys;
    const auto add = [&](const std::string& key, const Json& value, const std::string& at) {
      keys.push_back(key);
      if (value == false && !is_required(key)) return;
      parts.push_back(
          {sequence({literal(Json(key).dump()), colon_, schema_call(value, at)}), is_required(key)});
    };
    for (const auto& [key, value] : properties.items())
      add(key, value, path_to(path_to(path, "properties"), key));
    for (const std::string& key : required) {
      if (std::find(keys.begin(), keys.end(), key) != keys.end()) continue;
      // Where others are not mentioned, it is one more property.
      const Json& value = schema.contains("additionalProperties") ? additional : Json(true);
      if (value == false)
        merge_.broken(path_to(path, "required"),
                      fmt::format("additionalProperties forbids {}", Json(key).dump()));
      add(key, value, path_to(path, "required"));
    }
    const bool others = additional != false;
    uint32_t min = 0, max = Expression::unlimited;
    const size_t sure = static_cast<size_t>(
        std::count_if(parts.begin(), parts.end(), [](const Part& p) { return p.required; }));
    if (const auto least = count(schema, "minProperties"); least && *least > sure) {
      // Other keys may be the same one twice.
      if (!parts.empty() || *least > 1)
        merge_.broken(path_to(path, "minProperties"), "cannot be honoured here");
      min = others ? 1 : Expression::unlimited;
    }
    if (const auto most = count(schema, "maxProperties"); most && (others || *most < parts.size())) {
      if (!parts.empty() && sure != parts.size())
        merge_.broken(path_to(path, "maxProperties"), "cannot be honoured here");
      max = *most < sure ? 0 : *most - static_cast<uint32_t>(sure);
      if (*most < sure) return choice({});
    }
    if (min > max || min == Expression::unlimited) return choice({});
    if (!others) return chain(parts, nullptr, 0, 0, path, true, true);
    const Expression key = keys.empty() ? string_ : other_key(grammar_, keys, rest_of_string_);
    const Expression rest =
        sequence({key, colon_, schema_call(additional, path_to(path, "additionalProperties"))});
    return chain(parts, &rest, min, max, path, true, true);
  }

  Expression array(const Json& schema, const std::string& path) {
    uint32_t min = count(schema, "minItems").value_or(0);
    const uint32_t max = count(schema, "maxItems").value_or(Expression::unlimited);
    std::vector<Part> parts;
    if (schema.contains("prefixItems")) {
      const std::string at = path_to(path, "prefixItems");
      for (const Json& one : schema["prefixItems"]) {
        if (parts.size() == max) break;
        const size_t i = parts.size();
        parts.push_back({schema_call(one, path_to(at, std::to_string(i))), i < min});
      }
    }
    if (min > max) return choice({});
    const auto written = static_cast<uint32_t>(parts.size());
    min = min > written ? min - written : 0;
    const uint32_t left = max == Expression::unlimited ? max : max - written;
    const Json others = schema.contains("items") ? schema["items"] : Json(true);
    if (others == false) {
      if (min > 0) return choice({});
      return chain(parts, nullptr, 0, 0, path, false, false);
    }
    const Expression rest = schema_call(others, path_to(path, "items"));
    return chain(parts, &rest, min, left, path, false, false);
  }

  Expression string(const Json& schema, const std::string& path) {
    const auto min = count(schema, "minLength"), max = count(schema, "maxLength");
    const bool limited = min.value_or(0) > 0 || max;
    const bool pattern = schema.contains("pattern"), format = schema.contains("format");
    if ((pattern && (limited || format)) || (format && limited)) {
      merge_.broken(path, "minLength and maxLength, pattern and format cannot be honoured beside each other");
    }
    Expression content = any_characters_;
    if (pattern) {
      const std::string where = name_ + path_to(path, "pattern");
      content = parse_pattern(schema["pattern"].get_ref<const std::string&>(), where, any_characters_);
    } else if (format) {
      const auto known = string_formats().find(schema["format"].get_ref<const std::string&>());
      if (known == string_formats().end()) {
        merge_.broken(path_to(path, "format"),
                      fmt::format("expected one of date, time, date-time, uuid, ipv4, email, found {}",
                                  schema["format"].dump()));
      }
      content = parse_pattern(known->second, known->first, any_characters_);
    } else if (limited) {
      if (max && *max < min.value_or(0)) return choice({});
      content = repeat(call(any_character_), min.value_or(0), max.value_or(Expression::unlimited));
    } else {
      return string_;
    }
    return sequence({literal("\""), std::move(content), literal("\"")});
  }

  Expression number(const Json& schema, const std::string& path, bool integer) {
    if (schema.contains("multipleOf") && (schema["multipleOf"] != 1 || !integer))
      merge_.broken(path_to(path, "multipleOf"), "only 1 can be honoured, of integers");
    NumberRange range;
    const auto read = [&](const char* key, bool exclusive, std::optional<Bound>& bound, bool low) {
      if (!schema.contains(key)) return;
      const std::optional<Decimal> value = read_decimal(schema[key].dump());
      if (!value) merge_.broken(path_to(path, key), "expected a number of at most 40 digits");
      // The narrower one counts; of equal ones the exclusive one, which is read later.
      if (bound && (low ? *value < bound->value : bound->value < *value)) return;
      bound = {*value, exclusive};
    };
    read("minimum", false, range.low, true);
    read("exclusiveMinimum", true, range.low, true);
    read("maximum", false, range.high, false);
    read("exclusiveMaximum", true, range.high, false);
    if (!range.low && !range.high) return integer ? integer_ : number_;
    return integer ? integers(range) : numbers(range);
  }

  SchemaMerge merge_;
  std::string name_;
  Grammar grammar_;
  std::map<std::string, uint32_t> known_;  // schema's text → rule
  std::deque<Job> jobs_;
  bool filtering_ = false;  // this is about a value of an enumeration
  int filtered_ = 0;        // enumerations so far
  uint32_t any_character_ = 0;
  Expression any_characters_, rest_of_string_, space_, string_, integer_, number_, value_, any_object_,
      colon_;
};

}  // namespace

Grammar parse_json_schema(std::string_view schema, const std::string& name) {
  if (schema.size() > most_bytes) fail("{}: larger than {} bytes", name, most_bytes);
  check_nesting(schema, name);
  Json json;
  try {
    json = Json::parse(schema);
  } catch (const Json::exception& error) {
    fail("{}: not JSON: {}", name, error.what());
  }
  return Builder(json, name).whole(json);
}

Grammar json_object_grammar() { return Builder(Json(true), "JSON").any_object(); }

}  // namespace latente::grammar
