#include "grammar/json_text.h"

#include <fmt/format.h>

#include <map>

#include "base/utf8.h"

namespace latente::grammar {
namespace {

const CharSet& plain() {
  static const CharSet set = CharSet::all().minus({{0, 0x1F}, {'"', '"'}, {'\\', '\\'}});
  return set;
}

// Of a quote, a backslash or a control character.
std::string escape(char32_t c) {
  switch (c) {
    case '"':
      return "\\\"";
    case '\\':
      return "\\\\";
    case '\b':
      return "\\b";
    case '\f':
      return "\\f";
    case '\n':
      return "\\n";
    case '\r':
      return "\\r";
    case '\t':
      return "\\t";
    default:
      return fmt::format("\\u{:04x}", static_cast<uint32_t>(c));
  }
}

Expression set_of(std::string_view characters) {
  CharSet set;
  for (const char c : characters) set.add(static_cast<char32_t>(c), static_cast<char32_t>(c));
  return one_of(std::move(set));
}

// Keys by their next character.
struct KeyTree {
  std::map<char32_t, size_t> next;
  bool ends = false;
};

}  // namespace

Expression json_character(const CharSet& set) {
  std::vector<Expression> all;
  if (CharSet direct = set.intersection(plain()); !direct.empty()) all.push_back(one_of(std::move(direct)));
  const CharSet escaped = set.minus(plain());
  for (const CharRange& range : escaped.ranges()) {
    for (char32_t c = range.low; c <= range.high; ++c) all.push_back(literal(escape(c)));
  }
  return all.size() == 1 ? std::move(all[0]) : choice(std::move(all));
}

Expression any_json_character() {
  const Expression hex = set_of("0123456789abcdefABCDEF"), d = set_of("dD");
  const Expression unit = choice(
      {sequence({set_of("0123456789abcABCefEF"), hex, hex, hex}), sequence({d, set_of("01234567"), hex, hex}),
       sequence({d, set_of("89abAB"), hex, hex, literal("\\u"), d, set_of("cdefCDEF"), hex, hex})});
  return choice(
      {one_of(plain()), sequence({literal("\\"), set_of("\"\\/bfnrt")}), sequence({literal("\\u"), unit})});
}

Expression json_space() {
  return choice({literal(""), literal(" "), sequence({literal("\n"), repeat(set_of(" \t"), 0, 20)})});
}

Expression json_space_after_colon() { return optional(literal(" ")); }

Expression json_constant(const nlohmann::ordered_json& value) {
  if (!value.is_structured()) return literal(value.dump());
  const bool object = value.is_object();
  if (value.empty())
    return sequence({literal(object ? "{" : "["), json_space(), literal(object ? "}" : "]")});
  std::vector<Expression> parts{literal(object ? "{" : "["), json_space()};
  bool first = true;
  for (const auto& [key, element] : value.items()) {
    if (!first) {
      parts.push_back(literal(","));
      parts.push_back(json_space());
    }
    first = false;
    if (object) {
      parts.push_back(literal(nlohmann::ordered_json(key).dump() + ":"));
      parts.push_back(json_space_after_colon());
    }
    parts.push_back(json_constant(element));
  }
  parts.push_back(json_space());
  parts.push_back(literal(object ? "}" : "]"));
  return sequence(std::move(parts));
}

Expression other_key(Grammar& grammar, const std::vector<std::string>& keys,
                     const Expression& rest_of_string) {
  std::vector<KeyTree> tree(1);
  for (const std::string& key : keys) {
    size_t at = 0;
    for (size_t i = 0; i < key.size();) {
      const char32_t c = unicode::decode(key, i);
      auto [next, is_new] = tree[at].next.try_emplace(c, tree.size());
      const size_t to = next->second;
      if (is_new) tree.emplace_back();
      at = to;
    }
    tree[at].ends = true;
  }
  const auto first = static_cast<uint32_t>(grammar.rules.size());
  for (size_t i = 0; i < tree.size(); ++i) grammar.rules.push_back({"other key"});
  for (size_t i = 0; i < tree.size(); ++i) {
    std::vector<Expression> all;
    CharSet others = CharSet::all();
    for (const auto& [c, next] : tree[i].next) {
      others = others.minus({{c, c}});
      all.push_back(sequence({json_character({{c, c}}), call(first + static_cast<uint32_t>(next))}));
    }
    all.push_back(sequence({json_character(others), rest_of_string}));
    if (!tree[i].ends) all.push_back(literal("\""));
    grammar.rules[first + i].body = choice(std::move(all));
  }
  return sequence({literal("\""), call(first)});
}

}  // namespace latente::grammar
