// JSON Schema as a grammar of the documents that are valid against it.
//
// Whatever is written is valid; not everything valid can be written. Properties come in the schema's order,
// those of `required` without a schema behind them; whitespace is bounded (json_text.h), numbers in length
// (json_number.h). Understood, of drafts 4 to 2020-12:
//   boolean schemas, type (also a list; where it is missing, the types that other keywords speak of), enum,
//   const; properties, required, additionalProperties (where it is missing beside `properties`, there are no
//   others; other keys are not those of `properties`, but may repeat each other), minProperties and
//   maxProperties where they follow from the rest or nothing is declared; items, prefixItems (items as a
//   list, additionalItems), minItems, maxItems; minLength, maxLength, or pattern (pattern.h), or format
//   (date, time, date-time, uuid, ipv4, email); minimum, maximum, exclusive ones; multipleOf 1 of integers;
//   anyOf, oneOf (as anyOf: that only one holds is not looked after), allOf (merged); $ref to places in the
//   schema itself (#, #/$defs/..., any JSON pointer), also recursive.
// Titles, descriptions, defaults, examples and the like are ignored. Any other keyword, and one that
// cannot be honoured beside others, is an Error that names its path.
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
