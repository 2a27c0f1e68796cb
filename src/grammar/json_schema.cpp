#include "grammar/json_schema.h"

#include <algorithm>
#include <array>
#include <bit>
#include <deque>
#include <map>
#include <set>

#include "base/error.h"
#include "grammar/json_format.h"
#include "grammar/json_number.h"
#include "grammar/json_text.h"
#include "grammar/machine.h"
#include "grammar/matcher.h"
#include "grammar/pattern.h"
#include "grammar/schema_merge.h"

namespace latente::grammar {
namespace {

// Enumerations beside keywords that choose among their values: a grammar is made of each.
constexpr int most_filtered = 1000;
constexpr size_t most_bytes = size_t{4} << 20, most_rules = 50'000;
constexpr int most_schema_nesting = 128;
constexpr uint64_t most_comparisons = uint64_t{1} << 27;  // of names: 16'000 members of one object
constexpr uint64_t steps_a_character = 16;  // of a pattern or a key, each of which becomes states

// nlohmann's parser and its values are fine with any depth; what walks them here is not. And each member of
// an object is looked for among those before it.
void check_shape(std::string_view text, const std::string& name) {
  int depth = 0;
  bool in_string = false;
  std::array<uint64_t, most_schema_nesting + 1> members{};  // of the open objects, by depth
  uint64_t comparisons = 0;
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
    if (depth < 0) return;  // not JSON
    if (depth > most_schema_nesting) fail("{}: nests deeper than {}", name, most_schema_nesting);
    const auto level = static_cast<size_t>(depth);
    if (c == '{') members[level] = 0;
    if (c == ':') comparisons += members[level]++;
    if (comparisons > most_comparisons)
      fail("{}: objects of too many members, {} in one of them", name, members[level]);
  }
}

std::string format_names() {
  std::string names;
  for (const auto& [name, pattern] : string_formats()) names += (names.empty() ? "" : ", ") + name;
  return names;
}

class Builder {
 public:
  Builder(const Json& schema, const std::string& name, Work& work)
      : merge_(schema, name, work), work_(work), name_(name) {
    // Rules that all share.
    any_character_ = rule("character", any_json_character());
    any_characters_ = repeat(any_json_character(), 0, Expression::unlimited);
    plain_characters_ = repeat(json_character(CharSet::all()), 0, Expression::unlimited);
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
    merge_.spend(1 + weight_of(schema), path);
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
      const auto only = schema.begin();
      const std::string& key = only.key();
      const Json& value = only.value();
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

  Expression enumeration(const Json& schema, const std::string& path) {
    std::vector<Expression> all;
    for (const Json& value : enumerated(schema, path)) all.push_back(json_constant(value));
    return choice(std::move(all));
  }
  // The values that the other keywords admit.
  std::vector<Json> enumerated(const Json& schema, const std::string& path) {
    Json rest = schema;
    rest.erase("enum");
    const std::vector<std::string> types = types_of(schema);
    std::vector<Json> values = values_of(schema["enum"]);
    std::erase_if(values, [&](const Json& value) {
      return schema.contains("type") && std::none_of(types.begin(), types.end(),
                                                     [&](const auto& type) { return has_type(value, type); });
    });
    if (values.empty() || rest.empty() || (rest.size() == 1 && rest.contains("type"))) return values;
    constexpr uint64_t steps_to_filter = 4096, steps_to_match = 256;  // about
    merge_.spend(steps_to_filter + steps_to_match * (values.size() + weight_of(values)), path);
    if (filtering_ || ++filtered_ > most_filtered)
      merge_.broken(path, "too many enumerations beside other keywords, or one in another");
    std::shared_ptr<const Automaton> others;
    try {
      others = std::make_shared<const Automaton>(Builder(merge_.root(), name_, work_).whole_at(rest, path));
    } catch (const Error& error) {
      merge_.broken(path, fmt::format("enum or const beside what cannot be honoured ({})", error.what()));
    }
    std::erase_if(values, [&](const Json& value) { return !matches(others, value.dump()); });
    return values;
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
    static const Json none = Json::object();
    const Json& properties = schema.contains("properties") ? schema["properties"] : none;
    const Json& patterns = schema.contains("patternProperties") ? schema["patternProperties"] : none;
    const bool declares = !patterns.empty() || std::any_of(properties.begin(), properties.end(),
                                                           [](const Json& p) { return p != false; });
    Json additional = !declares;
    if (schema.contains("additionalProperties")) additional = schema["additionalProperties"];
    std::vector<std::string> required;
    if (schema.contains("required")) required = schema["required"].get<std::vector<std::string>>();
    const std::set<std::string> all_required(required.begin(), required.end());
    const auto is_required = [&](const std::string& key) { return all_required.contains(key); };

    std::vector<std::pair<Machine, Json>> by_pattern;
    for (const auto& [pattern, value] : patterns.items()) {
      const std::string where = name_ + path_to(path_to(path, "patternProperties"), pattern);
      by_pattern.emplace_back(machine(parse_pattern(pattern, where, plain_characters_), path), value);
    }
    const auto matching = [&](const std::string& key) {
      Json all = true;
      for (const auto& [pattern, value] : by_pattern) {
        merge_.spend(1 + key.size(), path);
        if (pattern.matches(content_of(key))) all = both(all, value);
      }
      return all;
    };

    std::vector<Part> parts;
    std::vector<std::string> keys;
    std::set<std::string> added;
    const auto add = [&](const std::string& key, const Json& value, const std::string& at) {
      merge_.spend(steps_a_character * (1 + key.size()), at);
      keys.push_back(key);
      added.insert(key);
      if (value == false && !is_required(key)) return;
      parts.push_back(
          {sequence({literal(Json(key).dump()), colon_, schema_call(value, at)}), is_required(key)});
    };
    for (const auto& [key, value] : properties.items())
      add(key, both(value, matching(key)), path_to(path_to(path, "properties"), key));
    for (const std::string& key : required) {
      if (added.contains(key)) continue;
      // Where others are not mentioned, it is one more property.
      const Json patterned = matching(key);
      const Json value = patterned != true                         ? patterned
                         : schema.contains("additionalProperties") ? additional
                                                                   : Json(true);
      if (value == false)
        merge_.broken(path_to(path, "required"),
                      fmt::format("additionalProperties forbids {}", Json(key).dump()));
      add(key, value, path_to(path, "required"));
    }
    std::vector<Expression> rests;
    if (!by_pattern.empty()) {
      rests = patterned(by_pattern, additional, keys, path);
    } else if (additional != false) {
      const Expression key = keys.empty() ? string_ : other_key(grammar_, keys, rest_of_string_);
      rests.push_back(
          sequence({key, colon_, schema_call(additional, path_to(path, "additionalProperties"))}));
    }
    const bool others = !rests.empty();
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
    const Expression rest = choice(std::move(rests));
    return chain(parts, &rest, min, max, path, true, true);
  }

  // Properties that are not declared, by which of the patterns their keys match.
  std::vector<Expression> patterned(const std::vector<std::pair<Machine, Json>>& patterns,
                                    const Json& additional, const std::vector<std::string>& declared,
                                    const std::string& path) {
    constexpr size_t most_sets = 64;
    const std::string at = path_to(path, "patternProperties");
    std::vector<Expression> taken;
    for (const std::string& key : declared) taken.push_back(literal(content_of(key)));
    struct Keys {
      Machine machine;
      Json schema;  // null: of no pattern
    };
    std::vector<Keys> sets{{limited(at,
                                    [&] {
                                      return first_only(machine_of(grammar_, plain_characters_, work_),
                                                        machine_of(grammar_, choice(std::move(taken)), work_),
                                                        work_);
                                    }),
                            {}}};
    for (const auto& [pattern, value] : patterns) {
      std::vector<Keys> next;
      for (Keys& keys : sets) {
        Keys matching{limited(at, [&, &pattern = pattern] { return both_of(keys.machine, pattern, work_); }),
                      keys.schema.is_null() ? value : both(keys.schema, value)};
        keys.machine =
            limited(at, [&, &pattern = pattern] { return first_only(keys.machine, pattern, work_); });
        if (!matching.machine.empty()) next.push_back(std::move(matching));
        if (!keys.machine.empty()) next.push_back(std::move(keys));
      }
      if (next.size() > most_sets) merge_.broken(at, "too many patterns that match the same keys");
      sets = std::move(next);
    }
    std::vector<Expression> all;
    for (Keys& keys : sets) {
      const Json& schema = keys.schema.is_null() ? additional : keys.schema;
      if (schema == false) continue;
      const char* from = keys.schema.is_null() ? "additionalProperties" : "patternProperties";
      all.push_back(sequence({literal("\""), expression_of(std::move(keys.machine)), literal("\""), colon_,
                              schema_call(schema, path_to(path, from))}));
    }
    return all;
  }

  // A string's text as it stands between quotes, spelled as json_character does.
  static std::string content_of(const std::string& text) {
    const std::string quoted = Json(text).dump();
    return quoted.substr(1, quoted.size() - 2);
  }
  // Names the place of what needs too many states.
  template <class Make>
  Machine limited(const std::string& path, Make make) const {
    try {
      return make();
    } catch (const Error& error) {
      merge_.broken(path, error.what());
    }
  }
  Machine machine(const Expression& expression, const std::string& path) const {
    return limited(path, [&] { return machine_of(grammar_, expression, work_); });
  }
  // What matches all of some expressions and none of others.
  Expression all_but(const std::vector<Expression>& all, const std::vector<Expression>& none,
                     const std::string& path) const {
    if (all.size() == 1 && none.empty()) return all[0];
    Machine out = machine(all[0], path);
    for (size_t i = 1; i < all.size(); ++i)
      out = limited(path, [&] { return both_of(out, machine_of(grammar_, all[i], work_), work_); });
    for (const Expression& one : none)
      out = limited(path, [&] { return first_only(out, machine_of(grammar_, one, work_), work_); });
    return out.empty() ? choice({}) : expression_of(std::move(out));
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
    if (schema.value("uniqueItems", false) && max > 1) return set_of(schema, min, max, path);
    if (schema.contains("contains")) return containing(schema, min, max, path);
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

  // A list of which some items match `contains`, at least minContains and at most maxContains. Where there
  // are bounds on its length, too, the matching ones that are counted come last.
  Expression containing(const Json& schema, uint32_t min, uint32_t max, const std::string& path) {
    constexpr uint32_t most = 64;  // that are counted
    const std::string at = path_to(path, "contains");
    for (const char* other : {"prefixItems", "uniqueItems"}) {
      if (schema.contains(other)) merge_.broken(at, fmt::format("cannot be honoured beside {}", other));
    }
    const Json items = schema.contains("items") ? schema["items"] : Json(true);
    const uint32_t least = count(schema, "minContains").value_or(1);
    const uint32_t bound = count(schema, "maxContains").value_or(Expression::unlimited);
    const bool bounded = bound != Expression::unlimited;
    if (least > bound || least > max) return choice({});
    if (least > most || (bounded && bound > most && bound < max))
      merge_.broken(at, fmt::format("can be honoured up to a count of {}", most));
    const auto of = [&](const Json& what, const char* key) {
      return what == false ? choice({}) : schema_call(what, path_to(path, key));
    };
    const Expression match = of(both(items, schema["contains"]), "contains");
    // Where matches are not bounded, what comes between may match, too.
    const Expression other =
        of(bounded ? both(items, Json{{"not", schema["contains"]}}) : items, bounded ? "contains" : "items");
    const auto before = [&](uint32_t from, uint32_t to) {
      return repeat(sequence({other, comma()}), from, to);
    };
    std::vector<Expression> all;
    if (min <= least && max == Expression::unlimited) {
      const Expression any = repeat(sequence({comma(), other}), 0, Expression::unlimited);
      const Expression unit = sequence({before(0, Expression::unlimited), match});
      if (bound > 0) {
        const uint32_t first = std::max<uint32_t>(least, 1);
        all.push_back(sequence(
            {unit, repeat(sequence({comma(), unit}), first - 1, bounded ? bound - 1 : first - 1), any}));
      }
      if (least == 0) all.push_back(optional(listed(other, 1, Expression::unlimited)));
    } else {
      const uint32_t last = bounded ? std::min(bound, max) : least;
      for (uint32_t matches = least; matches <= last; ++matches) {
        const uint32_t from = min > matches ? min - matches : 0,
                       to = max == Expression::unlimited ? max : max - matches;
        if (matches > 0) {
          all.push_back(sequence({before(from, to), listed(match, matches, matches)}));
        } else if (to > 0) {
          Expression none = listed(other, std::max<uint32_t>(from, 1), to);
          all.push_back(from == 0 ? optional(std::move(none)) : std::move(none));
        } else {
          all.push_back(literal(""));
        }
      }
    }
    return sequence({literal("["), space_, choice(std::move(all)), space_, literal("]")});
  }

  // A list of different values of an enumeration, in any order. A rule for each set of those written so far.
  Expression set_of(const Json& schema, uint32_t min, uint32_t max, const std::string& path) {
    constexpr size_t most_values = 10;
    const std::string at = path_to(path, "uniqueItems");
    std::vector<Json> values;
    if (schema.contains("prefixItems") || !schema.contains("items") || !finite(schema["items"], path, values))
      merge_.broken(at, "can be honoured of lists of enumerated values only");
    if (values.size() > most_values)
      merge_.broken(
          at, fmt::format("can be honoured of at most {} values, found {}", most_values, values.size()));
    std::map<uint32_t, uint32_t> rules;  // by the set
    std::vector<uint32_t> todo{0};
    rules[0] = rule(path, {});
    while (!todo.empty()) {
      const uint32_t written = todo.back();
      todo.pop_back();
      const auto count = static_cast<uint32_t>(std::popcount(written));
      std::vector<Expression> all;
      if (count >= min) all.push_back(literal(""));
      for (size_t i = 0; count < max && i < values.size(); ++i) {
        const uint32_t with = written | 1u << i;
        if (with == written) continue;
        auto [next, is_new] = rules.try_emplace(with, 0);
        if (is_new) {
          next->second = rule(path, {});
          todo.push_back(with);
        }
        Expression value = json_constant(values[i]);
        all.push_back(count == 0 ? sequence({std::move(value), call(next->second)})
                                 : sequence({comma(), std::move(value), call(next->second)}));
      }
      grammar_.rules[rules[written]].body = choice(std::move(all));
    }
    return sequence({literal("["), space_, call(rules[0]), space_, literal("]")});
  }

  // The values of a schema that admits only enumerated ones, each once; false if it admits others.
  bool finite(const Json& schema, const std::string& path, std::vector<Json>& values) {
    for (const Json& one : merge_.alternatives(schema, path_to(path, "items"))) {
      const bool booleans = one == Json{{"type", "boolean"}};
      if (!booleans && !one.contains("enum")) return false;
      for (const Json& value : booleans ? std::vector<Json>{false, true} : enumerated(one, path)) {
        if (std::find(values.begin(), values.end(), value) == values.end()) values.push_back(value);
      }
    }
    return true;
  }

  Expression string(const Json& schema, const std::string& path) {
    const auto min = count(schema, "minLength"), max = count(schema, "maxLength");
    const auto values = [&](const char* key) {
      return schema.contains(key) ? values_of(schema[key]) : std::vector<Json>{};
    };
    const std::vector<Json> patterns = values("pattern"), formats = values("format"),
                            not_patterns = values("not pattern"), not_values = values("not enum");
    const bool limited = min.value_or(0) > 0 || max;
    if (max && *max < min.value_or(0)) return choice({});
    if (patterns.empty() && formats.empty() && not_patterns.empty() && !limited) {
      if (not_values.empty()) return string_;
      std::vector<std::string> texts;
      for (const Json& value : not_values) texts.push_back(value.get<std::string>());
      return other_key(grammar_, texts, rest_of_string_);
    }
    // One thing alone may be spelled in any way.
    const bool alone = patterns.size() + formats.size() + (limited ? 1 : 0) == 1 && not_patterns.empty() &&
                       not_values.empty();
    const Expression& any = alone ? any_characters_ : plain_characters_;
    std::vector<Expression> all, none;
    const auto parsed = [&](const Json& pattern, const char* key) {
      merge_.spend(steps_a_character * pattern.get_ref<const std::string&>().size(), path);
      return parse_pattern(pattern.get_ref<const std::string&>(), name_ + path_to(path, key), any);
    };
    for (const Json& pattern : patterns) all.push_back(parsed(pattern, "pattern"));
    for (const Json& format : formats) {
      const auto known = string_formats().find(format.get_ref<const std::string&>());
      if (known == string_formats().end())
        merge_.broken(path_to(path, "format"),
                      fmt::format("expected one of {}, found {}", format_names(), format.dump()));
      merge_.spend(steps_a_character * known->second.size(), path);
      all.push_back(parse_pattern(known->second, known->first, any));
    }
    if (limited) {
      all.push_back(repeat(alone ? call(any_character_) : json_character(CharSet::all()), min.value_or(0),
                           max.value_or(Expression::unlimited)));
    }
    for (const Json& pattern : not_patterns) none.push_back(parsed(pattern, "not/pattern"));
    std::vector<Expression> texts;
    for (const Json& value : not_values) texts.push_back(literal(content_of(value.get<std::string>())));
    if (!texts.empty()) none.push_back(choice(std::move(texts)));
    if (!none.empty()) all.push_back(plain_characters_);
    return sequence({literal("\""), all_but(all, none, path), literal("\"")});
  }

  Expression number(const Json& schema, const std::string& path, bool integer) {
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
    std::vector<Expression> all;
    if (schema.contains("multipleOf")) {
      for (const Json& step : values_of(schema["multipleOf"])) {
        if (step == 1 && integer) continue;
        const std::optional<Decimal> value = read_decimal(step.dump());
        const std::optional<Machine> machine = value ? multiples_of(*value) : std::nullopt;
        if (!machine)
          merge_.broken(path_to(path, "multipleOf"),
                        fmt::format("expected a step of at most {} of its last decimal place, found {}",
                                    most_step, step.dump()));
        merge_.spend(steps_a_character * machine->states.size(), path);
        all.push_back(expression_of(*machine));
      }
    }
    if (!all.empty()) {
      all.push_back(integer ? integers(range) : numbers(range));
      return all_but(all, {}, path);
    }
    if (!range.low && !range.high) return integer ? integer_ : number_;
    return integer ? integers(range) : numbers(range);
  }

  SchemaMerge merge_;
  Work& work_;
  std::string name_;
  Grammar grammar_;
  std::map<std::string, uint32_t> known_;  // schema's text → rule
  std::deque<Job> jobs_;
  bool filtering_ = false;  // this is about a value of an enumeration
  int filtered_ = 0;        // enumerations so far
  uint32_t any_character_ = 0;
  Expression any_characters_, plain_characters_, rest_of_string_, space_, string_, integer_, number_, value_,
      any_object_, colon_;
};

}  // namespace

Grammar parse_json_schema(std::string_view schema, const std::string& name) {
  if (schema.size() > most_bytes) fail("{}: larger than {} bytes", name, most_bytes);
  check_shape(schema, name);
  Json json;
  try {
    json = Json::parse(schema);
  } catch (const Json::exception& error) {
    fail("{}: not JSON: {}", name, error.what());
  }
  Work work;
  return Builder(json, name, work).whole(json);
}

Grammar json_object_grammar() {
  Work work;
  return Builder(Json(true), "JSON", work).any_object();
}

}  // namespace latente::grammar
