// Which scope each name of a template belongs to.
#pragma once

#include "tokenizer/jinja_ast.h"

namespace latente::jinja {

// Fills the places and scopes of the tree. Throws Error on an assignment to `loop` inside a loop.
void resolve_names(Program& program);

}  // namespace latente::jinja
