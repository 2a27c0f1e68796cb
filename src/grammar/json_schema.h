// JSON Schema as a grammar of the documents that are valid against it.
//
// Whatever is written is valid; not everything valid can be written. Properties come in the schema's order,
// those of `required` without a schema behind them; whitespace is bounded (json_text.h), numbers in length
// (json_number.h). Understood, of drafts 4 to 2020-12:
//   boolean schemas, type (also a list; where it is missing, the types that other keywords speak of), enum,
//   const; properties, required, additionalProperties (where it is missing beside `properties`, there are no
//   others; other keys are not those of `properties`, but may repeat each other), patternProperties (not
//   merged with another schema's properties), minProperties and maxProperties where they follow from the rest
//   or nothing is declared; items, prefixItems (items as a list, additionalItems), minItems, maxItems,
//   uniqueItems of at most 10 enumerated values, contains with minContains and maxContains up to 64
//   (beside minItems or maxItems, the items counted come last); minLength, maxLength, pattern (pattern.h) and
//   format (date, time, date-time, duration, uuid, ipv4, ipv6, hostname, email, uri; of the last three only
//   common forms), also together; minimum, maximum, exclusive ones; multipleOf; anyOf, oneOf (as anyOf: that
//   only one holds is not looked after), allOf (merged); not, if with then and else, dependentRequired,
//   dependentSchemas and dependencies, where what is not to hold speaks of type, enum and const (of single
//   values), required, properties, pattern and bounds, and of allOf, anyOf, not and $ref; $ref to places in
//   the schema itself
//   (#, #/$defs/..., any JSON pointer), also recursive.
// Titles, descriptions, defaults, examples and the like are ignored. Any other keyword, and one that
// cannot be honoured beside others, is an Error that names its path, and so is what needs too much work or
// memory to compile: some tenths of a second at most.
#pragma once

#include <string>
#include <string_view>

#include "grammar/grammar.h"

namespace latente::grammar {

// Errors begin with `name` and the path in the schema: "schema#/properties/a/minLength: expected ...".
Grammar parse_json_schema(std::string_view schema, const std::string& name = "schema");

// Any JSON object.
Grammar json_object_grammar();

}  // namespace latente::grammar
