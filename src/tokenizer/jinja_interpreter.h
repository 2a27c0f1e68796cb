// Runs a Program in a context of variables.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "tokenizer/jinja_ast.h"

namespace latente::jinja {

// Throws Error with the line for whatever raises in Jinja and for every exceeded limit. The variables' values
// must belong to `runtime`.
std::string run(const Program& program, Runtime& runtime,
                const std::vector<std::pair<std::string, Value>>& variables);

// The functions that every template sees: range, dict, namespace, raise_exception, strftime_now.
std::vector<std::pair<std::string, Value>> make_globals(Runtime& runtime);

}  // namespace latente::jinja
