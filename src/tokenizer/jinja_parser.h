// Tokens to a syntax tree, with Jinja's grammar and precedences.
#pragma once

#include <memory>
#include <string_view>

#include "tokenizer/jinja_ast.h"

namespace latente::jinja {

// Throws Error with the line on bad syntax, unknown filters and tests (where Jinja reports them before
// rendering), unsupported statements, and nesting beyond 100 levels.
std::unique_ptr<const Program> parse(std::string_view source);

}  // namespace latente::jinja
