// Options: a plain struct with defaults and one FIELDS line (base/fields.h) is filled from TOML, overridden
// by "table.key=value" strings and written back as TOML.
//
//   struct TrainOptions { double lr = 3e-4; int64_t steps = 1000; DataOptions data; FIELDS(lr, steps, data)
//   }; auto options = load_options<TrainOptions>("train.toml"); override_option(options, "data.seed=7");
//
// A field is a bool, int, int64_t, double, std::string, std::vector of std::string, int64_t or double, an
// enum with an EnumNames, a struct with FIELDS (a sub-table), or a std::optional of these. A key that is
// absent keeps the default. Where an integer is expected, a number such as 1e9 that is one is taken; numbers
// must be finite.
//
// Errors name file:line:column, the key, what was expected and what was found; an unknown key names the
// nearest known one. After an Error the struct is as it was.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "base/error.h"
#include "base/fields.h"

namespace latente {

// The spellings of an enum's values:
//   template <> struct EnumNames<Mode> { static constexpr std::pair<std::string_view, Mode> values[] = {...};
//   };
template <class E>
struct EnumNames;

template <class E>
std::string_view enum_name(E value) {
  for (const auto& [name, known] : EnumNames<E>::values) {
    if (known == value) return name;
  }
  fail("expected a value of an enum, found {}", static_cast<int64_t>(value));
}

using OptionValue = std::variant<bool, int64_t, double, std::string, std::vector<std::string>,
                                 std::vector<int64_t>, std::vector<double>>;

// A field as the reader and the writer see it, whatever its C++ type.
struct OptionNode {
  enum class Kind {
    boolean,
    integer,
    number,
    text,
    texts,
    integers,
    numbers,
    table
  };  // in OptionValue's order

  std::string name;
  Kind kind = Kind::table;
  int64_t low = std::numeric_limits<int64_t>::min(), high = std::numeric_limits<int64_t>::max();  // integers
  std::vector<std::string_view> choices;  // of an enum, whose kind is text
  std::function<void(OptionValue)> assign;
  std::function<std::optional<OptionValue>()> value;          // none for an optional that is not set
  std::function<std::vector<OptionNode>(bool create)> table;  // the fields; none for an optional not created
  std::function<void()> clear;                                // optionals only
};

namespace options_detail {

template <class T>
inline constexpr bool is_optional = false;
template <class T>
inline constexpr bool is_optional<std::optional<T>> = true;

template <class T>
std::vector<OptionNode> describe(T& object);

// A node over get(create) -> T*, which may be null unless `create`: an optional's value is made on
// assignment.
template <class T, class Get>
OptionNode describe_field(std::string name, Get get) {
  using Kind = OptionNode::Kind;
  OptionNode node;
  node.name = std::move(name);
  const auto store = [&]<class Stored>(Kind kind, std::type_identity<Stored>) {
    node.kind = kind;
    node.assign = [get](OptionValue value) {
      *get(true) = static_cast<T>(std::get<Stored>(std::move(value)));
    };
    node.value = [get]() -> std::optional<OptionValue> {
      T* held = get(false);
      if (!held) return std::nullopt;
      return OptionValue(std::in_place_type<Stored>, *held);
    };
  };
  if constexpr (std::is_same_v<T, bool>) {
    store(Kind::boolean, std::type_identity<bool>{});
  } else if constexpr (std::is_same_v<T, int> || std::is_same_v<T, int64_t>) {
    store(Kind::integer, std::type_identity<int64_t>{});
    node.low = std::numeric_limits<T>::min();
    node.high = std::numeric_limits<T>::max();
  } else if constexpr (std::is_same_v<T, double>) {
    store(Kind::number, std::type_identity<double>{});
  } else if constexpr (std::is_same_v<T, std::string>) {
    store(Kind::text, std::type_identity<std::string>{});
  } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
    store(Kind::texts, std::type_identity<T>{});
  } else if constexpr (std::is_same_v<T, std::vector<int64_t>>) {
    store(Kind::integers, std::type_identity<T>{});
  } else if constexpr (std::is_same_v<T, std::vector<double>>) {
    store(Kind::numbers, std::type_identity<T>{});
  } else if constexpr (std::is_enum_v<T>) {
    node.kind = Kind::text;
    for (const auto& entry : EnumNames<T>::values) node.choices.push_back(entry.first);
    node.assign = [get](OptionValue value) {
      const std::string& chosen = std::get<std::string>(value);
      for (const auto& [known, constant] : EnumNames<T>::values) {
        if (known == chosen) *get(true) = constant;
      }
    };
    node.value = [get]() -> std::optional<OptionValue> {
      T* held = get(false);
      if (!held) return std::nullopt;
      return OptionValue(std::string(enum_name(*held)));
    };
  } else {
    static_assert(HasFields<T>, "an option of a type that options.h does not know");
    node.kind = Kind::table;
    node.table = [get](bool create) {
      T* held = get(create);
      return held ? describe(*held) : std::vector<OptionNode>{};
    };
  }
  return node;
}

template <class T>
std::vector<OptionNode> describe(T& object) {
  std::vector<OptionNode> nodes;
  visit_fields(object, [&]<class Field>(const char* name, Field& field) {
    Field* const at = &field;
    if constexpr (is_optional<Field>) {
      nodes.push_back(describe_field<typename Field::value_type>(name, [at](bool create) {
        if (!*at && create) at->emplace();
        return *at ? &**at : nullptr;
      }));
      nodes.back().clear = [at] { at->reset(); };
    } else {
      nodes.push_back(describe_field<Field>(name, [at](bool) { return at; }));
    }
  });
  return nodes;
}

void read_toml(const std::vector<OptionNode>& fields, std::string_view text, const std::string& source);
void assign(const std::vector<OptionNode>& fields, std::string_view assignment);
std::string to_toml(const std::vector<OptionNode>& fields);
std::string read_options_file(const std::string& path);

}  // namespace options_detail

// Sets the keys that the TOML text names. Messages call the text `source`.
template <HasFields T>
void parse_options(T& options, std::string_view text, const std::string& source) {
  T filled = options;
  options_detail::read_toml(options_detail::describe(filled), text, source);
  options = std::move(filled);
}

template <HasFields T>
T load_options(const std::string& path) {
  T options{};
  parse_options(options, options_detail::read_options_file(path), path);
  return options;
}

// Sets one key from "key=value" or "table.key=value". The value is written as in TOML, but text needs no
// quotes, a list may be written a,b,c, and nothing after '=' unsets an optional.
template <HasFields T>
void override_option(T& options, std::string_view assignment) {
  T filled = options;
  options_detail::assign(options_detail::describe(filled), assignment);
  options = std::move(filled);
}

// All values as TOML that parse_options reads back to an equal struct. Optionals that are not set are left
// out.
template <HasFields T>
std::string write_options(const T& options) {
  T copy = options;
  return options_detail::to_toml(options_detail::describe(copy));
}

}  // namespace latente
