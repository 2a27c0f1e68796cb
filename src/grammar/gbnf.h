// Grammars in llama.cpp's notation, GBNF.
//
//   root ::= "yes" | "no" ws [0-9]{1,3}     # rules; the text is what `root` matches
//
// Understood: literals in double quotes, classes in brackets (ranges, ^ at the beginning), `.` for any
// character, names of rules, parentheses, alternatives, * + ? {m} {m,} {m,n}, comments from # to the end of
// the line; escapes \n \r \t \" \\ \[ \] \xHH \uHHHH \UHHHHHHHH, which name characters. A rule ends with its
// line, but for line breaks behind ::= and |, and in parentheses. Names have letters, digits, - and _.
// References to tokens (<think>, <[42]>) are not understood.
#pragma once

#include <string>
#include <string_view>

#include "grammar/grammar.h"

namespace latente::grammar {

// Errors begin with "name:line:column: ". They say what was expected; also for rules that are missing or
// defined twice, no `root`, repetitions beyond 1,000,000 and nesting beyond 100.
Grammar parse_gbnf(std::string_view text, const std::string& name = "grammar");

}  // namespace latente::grammar
