// How JSON spells characters, strings and constants, as expressions. Whitespace is bounded everywhere.
#pragma once

#include <nlohmann/json.hpp>

#include "grammar/grammar.h"

namespace latente::grammar {

// One character of the set inside a JSON string: itself where JSON allows that, else its one escape (\", \\,
// \n and the like, \u00XX for other control characters).
Expression json_character(const CharSet& set);
// Any character in any spelling: also \/, and \uXXXX (surrogates in pairs only).
Expression any_json_character();

// Whitespace behind {, [ and commas, and before } and ]: nothing, a space, or a line break and up to 20
// spaces or tabs.
Expression json_space();
// Behind a key's colon: nothing or a space.
Expression json_space_after_colon();

// The text of a value, with whitespace as above between its parts.
Expression json_constant(const nlohmann::ordered_json& value);

// Adds rules for a string's characters and closing quote that spell none of `keys`. Where a key may still be
// meant, characters are spelled as in json_character. Returns the expression, opening quote included.
// any_characters: any number of any characters.
Expression other_key(Grammar& grammar, const std::vector<std::string>& keys,
                     const Expression& any_characters);

}  // namespace latente::grammar
