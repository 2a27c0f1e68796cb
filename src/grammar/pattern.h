// Regular expressions of JSON Schema's `pattern`, as expressions over the characters of a JSON string.
//
// Understood, of ECMAScript's syntax with the flag u: characters and escapes, `.`, classes, \d \w \s and
// their complements, groups (named ones too, without back references), alternatives, greedy and lazy
// repetition. Anchors are understood where an alternative of the whole begins (^) or ends ($); without them
// anything may stand before or behind, as the standard says. Look-around, \b, \p and back references are an
// Error.
#pragma once

#include <string>
#include <string_view>

#include "grammar/grammar.h"

namespace latente::grammar {

// any_characters: any number of any characters, for ends without an anchor. Errors begin with `where`.
Expression parse_pattern(std::string_view pattern, const std::string& where,
                         const Expression& any_characters);

}  // namespace latente::grammar
