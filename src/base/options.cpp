#include "base/options.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "base/file.h"

// The parser is compiled into this file alone: no shared library at run time.
#undef TOML_SHARED_LIB
#undef TOML_HEADER_ONLY
#define TOML_HEADER_ONLY 1
#define TOML_ENABLE_FORMATTERS 0
#include <toml++/toml.h>

namespace latente::options_detail {

namespace {

using Kind = OptionNode::Kind;
using Nodes = std::vector<OptionNode>;

constexpr int64_t max_file_bytes = 64 << 20;

std::string quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\r':
        out += "\\r";
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
          out += fmt::format("\\u{:04X}", static_cast<unsigned>(static_cast<unsigned char>(c)));
        } else {
          out += c;
        }
    }
  }
  return out + '"';
}

// Text of the user's in a message: one line, of bounded length, cut between characters.
std::string shown(std::string_view text) {
  constexpr size_t most = 60;
  if (text.size() <= most) return quoted(text);
  size_t end = most;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  std::string cut = quoted(text.substr(0, end));
  cut.insert(cut.size() - 1, "...");
  return cut;
}

bool is_bare(std::string_view key) {
  return !key.empty() && std::all_of(key.begin(), key.end(),
                                     [](unsigned char c) { return std::isalnum(c) || c == '_' || c == '-'; });
}

// "train.data" + "seed" -> "train.data.seed", quoting what TOML would.
std::string joined(std::string_view prefix, std::string_view key) {
  const std::string name = is_bare(key) && key.size() <= 60 ? std::string(key) : shown(key);
  return prefix.empty() ? name : fmt::format("{}.{}", prefix, name);
}

std::string describe_found(const toml::node& node) {
  switch (node.type()) {
    case toml::node_type::boolean:
      return node.as_boolean()->get() ? "true" : "false";
    case toml::node_type::integer:
      return fmt::format("the integer {}", node.as_integer()->get());
    case toml::node_type::floating_point:
      return fmt::format("the number {}", node.as_floating_point()->get());
    case toml::node_type::string:
      return fmt::format("the text {}", shown(node.as_string()->get()));
    case toml::node_type::array:
      return node.as_array()->empty() ? "an empty list" : "a list";
    case toml::node_type::table:
      return "a table";
    default:
      return "a date or time";
  }
}

std::string describe_expected(const OptionNode& option) {
  switch (option.kind) {
    case Kind::boolean:
      return "true or false";
    case Kind::integer:
      return "an integer";
    case Kind::number:
      return "a number";
    case Kind::text: {
      if (option.choices.empty()) return "text";
      std::string list = "one of";
      for (size_t i = 0; i < option.choices.size(); ++i) {
        list += fmt::format("{} \"{}\"", i ? "," : "", option.choices[i]);
      }
      return list;
    }
    case Kind::texts:
      return "a list of texts";
    case Kind::integers:
      return "a list of integers";
    case Kind::numbers:
      return "a list of numbers";
    case Kind::table:
      return "a table";
  }
  return {};
}

// Insertions, deletions, replacements and swaps of neighbours that lead from a to b, blind to case and to -
// for _.
size_t edit_distance(std::string_view a, std::string_view b) {
  const auto fold = [](char c) {
    return c == '-' ? '_' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  };
  std::array<std::vector<size_t>, 3> rows;  // i − 2, i − 1, i
  rows.fill(std::vector<size_t>(b.size() + 1));
  for (size_t j = 0; j <= b.size(); ++j) rows[1][j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    rows[2][0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const char p = fold(a[i - 1]), q = fold(b[j - 1]);
      size_t best = std::min({rows[1][j] + 1, rows[2][j - 1] + 1, rows[1][j - 1] + (p != q)});
      if (i > 1 && j > 1 && p == fold(b[j - 2]) && fold(a[i - 2]) == q)
        best = std::min(best, rows[0][j - 2] + 1);
      rows[2][j] = best;
    }
    std::rotate(rows.begin(), rows.begin() + 1, rows.end());
  }
  return rows[1][b.size()];
}

void paths_named(const Nodes& nodes, std::string_view prefix, std::string_view name,
                 std::vector<std::string>& found) {
  for (const OptionNode& node : nodes) {
    const std::string path = joined(prefix, node.name);
    if (node.name == name) found.push_back(path);
    if (node.table) paths_named(node.table(false), path, name, found);
  }
}

// "; did you mean ...?", or the known keys when there are few, or nothing.
std::string suggestion(const Nodes& root, const Nodes& siblings, std::string_view prefix,
                       std::string_view key) {
  if (key.size() > 100) return {};
  const OptionNode* nearest = nullptr;
  size_t least = std::max<size_t>(2, key.size() / 3) + 1;
  for (const OptionNode& node : siblings) {
    const size_t distance = edit_distance(key, node.name);
    if (distance < least && distance < std::max(node.name.size(), key.size())) {
      least = distance;
      nearest = &node;
    }
  }
  std::vector<std::string> elsewhere;
  if (!nearest || least > 1) paths_named(root, "", key, elsewhere);
  if (!elsewhere.empty()) return fmt::format("; did you mean {}?", elsewhere.front());
  if (nearest) return fmt::format("; did you mean {}?", joined(prefix, nearest->name));
  if (siblings.size() > 12) return {};
  std::string list = "; known:";
  for (size_t i = 0; i < siblings.size(); ++i) list += (i ? ", " : " ") + siblings[i].name;
  return list;
}

const OptionNode* find(const Nodes& nodes, std::string_view name) {
  const auto it =
      std::find_if(nodes.begin(), nodes.end(), [&](const OptionNode& node) { return node.name == name; });
  return it == nodes.end() ? nullptr : &*it;
}

struct Reader {
  const Nodes& root;
  std::string source;
  bool with_positions = true;

  [[noreturn]] void fail_at(const toml::source_region& region, const std::string& message) const {
    if (with_positions && region.begin) {
      fail("{}:{}:{}: {}", source, region.begin.line, region.begin.column, message);
    }
    fail("{}: {}", source, message);
  }

  [[noreturn]] void fail_type(const OptionNode& option, const std::string& path,
                              const toml::node& node) const {
    fail_at(node.source(),
            fmt::format("{}: expected {}, found {}", path, describe_expected(option), describe_found(node)));
  }

  int64_t integer(const OptionNode& option, const std::string& path, const toml::node& node) const {
    int64_t value = 0;
    if (const auto* exact = node.as_integer()) {
      value = exact->get();
    } else if (const auto* number = node.as_floating_point()) {
      const double given = number->get();
      if (!(std::abs(given) <= 0x1p53) || given != std::trunc(given)) fail_type(option, path, node);
      value = static_cast<int64_t>(given);
    } else {
      fail_type(option, path, node);
    }
    if (value < option.low || value > option.high) {
      fail_at(node.source(), fmt::format("{}: expected an integer in [{}, {}], found {}", path, option.low,
                                         option.high, value));
    }
    return value;
  }

  double number(const OptionNode& option, const std::string& path, const toml::node& node) const {
    if (const auto* exact = node.as_integer()) return static_cast<double>(exact->get());
    const auto* given = node.as_floating_point();
    if (!given) fail_type(option, path, node);
    if (!std::isfinite(given->get())) {
      fail_at(node.source(), fmt::format("{}: expected a finite number, found {}", path, given->get()));
    }
    return given->get();
  }

  std::string text(const OptionNode& option, const std::string& path, const toml::node& node) const {
    const auto* given = node.as_string();
    if (!given) fail_type(option, path, node);
    if (!option.choices.empty() &&
        std::find(option.choices.begin(), option.choices.end(), given->get()) == option.choices.end()) {
      fail_type(option, path, node);
    }
    return given->get();
  }

  template <class Element>
  auto list(const OptionNode& option, const std::string& path, const toml::node& node,
            Element element) const {
    const toml::array* items = node.as_array();
    if (!items) fail_type(option, path, node);
    std::vector<decltype(element(option, path, node))> out;
    for (size_t i = 0; i < items->size(); ++i) {
      OptionNode item = option;
      item.kind = option.kind == Kind::texts      ? Kind::text
                  : option.kind == Kind::integers ? Kind::integer
                                                  : Kind::number;
      out.push_back(element(item, fmt::format("{}[{}]", path, i), (*items)[i]));
    }
    return out;
  }

  OptionValue value(const OptionNode& option, const std::string& path, const toml::node& node) const {
    switch (option.kind) {
      case Kind::boolean:
        if (const auto* flag = node.as_boolean()) return flag->get();
        fail_type(option, path, node);
      case Kind::integer:
        return integer(option, path, node);
      case Kind::number:
        return number(option, path, node);
      case Kind::text:
        return text(option, path, node);
      case Kind::texts:
        return list(option, path, node, [this](auto&&... a) { return text(a...); });
      case Kind::integers:
        return list(option, path, node, [this](auto&&... a) { return integer(a...); });
      case Kind::numbers:
        return list(option, path, node, [this](auto&&... a) { return number(a...); });
      case Kind::table:
        break;
    }
    LATENTE_ASSERT(!"a table has no value");
    return false;
  }

  void table(const Nodes& nodes, const std::string& prefix, const toml::table& given) const {
    for (const auto& [key, node] : given) {
      const OptionNode* option = find(nodes, key.str());
      const std::string path = joined(prefix, key.str());
      if (!option) {
        fail_at(key.source(),
                fmt::format("unknown option {}{}", path, suggestion(root, nodes, prefix, key.str())));
      }
      if (option->kind != Kind::table) {
        option->assign(value(*option, path, node));
      } else if (const toml::table* inner = node.as_table()) {
        table(option->table(true), path, *inner);
      } else {
        fail_type(*option, path, node);
      }
    }
  }
};

std::string one_line(std::string_view text) {
  std::string out;
  for (const char c : text.substr(0, 300)) out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  return out;
}

std::string_view trimmed(std::string_view text) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == text.npos) return {};
  return text.substr(begin, text.find_last_not_of(" \t\r\n") - begin + 1);
}

// The value of an override in TOML's notation.
std::string as_toml(const OptionNode& option, std::string_view text) {
  const bool is_list =
      option.kind == Kind::texts || option.kind == Kind::integers || option.kind == Kind::numbers;
  if (is_list && !text.starts_with('[')) {
    std::string out = "[";
    while (!text.empty()) {
      const size_t comma = std::min(text.find(','), text.size());
      const std::string_view item = trimmed(text.substr(0, comma));
      out += (option.kind == Kind::texts ? quoted(item) : std::string(item)) + ", ";
      text.remove_prefix(std::min(comma + 1, text.size()));
    }
    return out + "]";
  }
  const bool has_quotes = text.starts_with('"') || text.starts_with('\'');
  return option.kind == Kind::text && !has_quotes ? quoted(text) : std::string(text);
}

void write_value(std::string& out, const OptionValue& value) {
  const auto put = [&out]<class T>(const T& item) {
    if constexpr (std::is_same_v<T, std::string>) {
      out += quoted(item);
    } else if constexpr (std::is_same_v<T, double>) {
      if (!std::isfinite(item)) fail("expected options to be finite numbers, found {}", item);
      std::string digits = fmt::format("{}", item);
      if (digits.find_first_of(".e") == digits.npos) digits += ".0";
      out += digits;
    } else {
      out += fmt::format("{}", item);
    }
  };
  std::visit(
      [&]<class T>(const T& held) {
        if constexpr (std::is_same_v<T, std::vector<std::string>> ||
                      std::is_same_v<T, std::vector<int64_t>> || std::is_same_v<T, std::vector<double>>) {
          out += '[';
          for (size_t i = 0; i < held.size(); ++i) {
            if (i) out += ", ";
            put(held[i]);
          }
          out += ']';
        } else {
          put(held);
        }
      },
      value);
}

void write_table(std::string& out, const Nodes& nodes, const std::string& path) {
  for (const OptionNode& node : nodes) {
    if (node.kind == Kind::table) continue;
    const std::optional<OptionValue> value = node.value();
    if (!value) continue;
    out += node.name + " = ";
    write_value(out, *value);
    out += '\n';
  }
  for (const OptionNode& node : nodes) {
    if (node.kind != Kind::table) continue;
    const Nodes fields = node.table(false);
    if (fields.empty()) continue;
    const std::string inner = joined(path, node.name);
    out += fmt::format("{}[{}]\n", out.empty() ? "" : "\n", inner);
    write_table(out, fields, inner);
  }
}

}  // namespace

void read_toml(const Nodes& fields, std::string_view text, const std::string& source) {
  const Reader reader{fields, source};
  try {
    const toml::table table = toml::parse(text, source);
    reader.table(fields, "", table);
  } catch (const toml::parse_error& error) {
    reader.fail_at(error.source(), one_line(error.description()));
  }
}

void assign(const Nodes& fields, std::string_view assignment) {
  const size_t equals = assignment.find('=');
  if (equals == assignment.npos) fail("{}: expected KEY=VALUE", shown(assignment));
  const std::string_view full = trimmed(assignment.substr(0, equals));
  const std::string_view text = trimmed(assignment.substr(equals + 1));

  Nodes nodes = fields;
  std::string prefix;
  std::string_view rest = full;
  for (;;) {
    const size_t dot = rest.find('.');
    const std::string_view key = trimmed(rest.substr(0, dot));
    const OptionNode* option = find(nodes, key);
    const std::string path = joined(prefix, key);
    if (!option) fail("unknown option {}{}", path, suggestion(fields, nodes, prefix, key));
    if (dot != rest.npos) {
      if (option->kind != Kind::table)
        fail("{}: expected {}, found a key inside it", path, describe_expected(*option));
      nodes = option->table(true);
      prefix = path;
      rest.remove_prefix(dot + 1);
      continue;
    }
    if (text.empty() && option->clear) return option->clear();
    if (option->kind == Kind::table) {
      const Nodes inner = option->table(true);
      fail("{}: expected one of its keys, such as {}.{}=VALUE", path, path,
           inner.empty() ? "KEY" : inner[0].name);
    }
    const Reader reader{fields, shown(assignment), false};
    try {
      const toml::table table = toml::parse("value = " + as_toml(*option, text) + "\n");
      const toml::node* value_node = table.get("value");
      if (table.size() != 1 || !value_node) fail("{}: expected {}", path, describe_expected(*option));
      option->assign(reader.value(*option, path, *value_node));
    } catch (const toml::parse_error&) {
      fail("{}: expected {}, found {}", path, describe_expected(*option), shown(text));
    }
    return;
  }
}

std::string to_toml(const Nodes& fields) {
  std::string out;
  write_table(out, fields, "");
  return out;
}

std::string read_options_file(const std::string& path) { return read_file(path, max_file_bytes); }

}  // namespace latente::options_detail
