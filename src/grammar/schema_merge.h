// Schemas without $ref, allOf, anyOf, oneOf, not, if and dependencies: what such a schema means.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "grammar/work.h"

namespace latente::grammar {

using Json = nlohmann::ordered_json;

class SchemaMerge {
 public:
  static constexpr size_t most_alternatives = 1000;

  // name: of the schema, for messages. The root must outlive this, and so must what may be spent on it.
  SchemaMerge(const Json& root, std::string name, Work& work)
      : root_(root), name_(std::move(name)), work_(work) {}

  const Json& root() const { return root_; }

  // The schemas, free of references and combinators at the top, of which a document satisfies one if and only
  // if it satisfies `schema`. Annotations are left out. Merging makes lists of pattern, format and
  // multipleOf, and two keywords of its own: "not enum" (strings) and "not pattern" (patterns).
  std::vector<Json> alternatives(const Json& schema, const std::string& path) const;

  // The part of the root that a $ref names.
  const Json& target(const Json& reference, const std::string& path) const;

  [[noreturn]] void broken(const std::string& path, const std::string& what) const;

  // Error, which names the path, when the whole schema needs too much.
  void spend(uint64_t steps, const std::string& path) const;

 private:
  void check(const std::string& key, const Json& value, const std::string& path) const;
  std::vector<Json> expand(const Json& schema, const std::string& path, int depth) const;
  // Of what satisfies `schema` not.
  std::vector<Json> negate(const Json& schema, const std::string& path, int depth) const;
  std::vector<Json> other_values(std::vector<Json> values, const std::string& path) const;
  std::vector<Json> conditional(const Json& schema, const std::string& path, int depth) const;
  std::vector<Json> dependencies(const Json& needs, const std::string& path, int depth) const;
  std::vector<Json> combine(const std::vector<Json>& a, const std::vector<Json>& b,
                            const std::string& path) const;
  Json merge(const Json& a, const Json& b, const std::string& path) const;
  static void merge_first_items(const Json& a, const Json& b, Json& out);
  Json merged_values(const std::string& key, const Json& a, const Json& b, const std::string& path) const;

  const Json& root_;
  std::string name_;
  Work& work_;
};

// A schema for what satisfies both.
Json both(const Json& a, const Json& b);
// A value, or the values of a list.
std::vector<Json> values_of(const Json& value);
// Its members and elements, and what is in them; long texts count as several.
uint64_t weight_of(const Json& json);
// "#/a/b", of "#/a" and "b".
std::string path_to(const std::string& path, const std::string& key);
// The types that a schema without combinators admits: those of `type`, else those that its keywords speak of,
// else all.
std::vector<std::string> types_of(const Json& schema);
bool has_type(const Json& value, const std::string& type);

}  // namespace latente::grammar
