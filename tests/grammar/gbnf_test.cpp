#include "grammar/gbnf.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "grammar/support.h"

namespace latente::grammar {
namespace {

using namespace test;

struct Case {
  const char* grammar;
  std::vector<std::string> matching, others;
};

TEST(Gbnf, Notation) {
  const std::vector<Case> cases = {
      {"root ::= \"yes\" | \"no\"", {"yes", "no"}, {"", "y", "yesno", "Yes"}},
      {"root ::= (\"a\" |\n  \"b\" # either\n)+ end\nend ::= \"!\"?", {"a!", "abba", "b"}, {"", "!", "a!!"}},
      {"root ::= [a-c0-9_-]{2,3}", {"a-", "0_9", "ccc"}, {"a", "abcd", "d0", "a\n"}},
      {"root ::= [^a-c\\n]*", {"", "dé中"}, {"a", "d\n"}},
      {"root ::= .{2}", {"\n\n", "é😀"}, {"a", "abc", "\xC3\xA9", "a\x80"}},
      {"root ::= \"\\x41\\u00e9\\U0001F600\\t\\\"\\\\\\[\\]\\r\\n\"", {"Aé😀\t\"\\[]\r\n"}, {"A"}},
      {"root ::= [\\]\\[\\\\^\"]+", {"]", "[\\^\""}, {"a", ""}},
      {"root ::= x{3} | x{5,} \"!\"\nx ::= \"ab\"",
       {"ababab", "ababababab!", "ababababababab!"},
       {"abab", "abababab!"}},
      {"# only a comment before\n\n\r\nroot ::=\n  a-b_C9 |\n  \"z\"\r\na-b_C9 ::= \"q\"\n\n",
       {"q", "z"},
       {"", "qz"}},
      {"root ::= \"\" | \"a\" root", {"", "a", "aaaa"}, {"b"}},
      {"root ::= \"a\"* \"b\"+ \"c\"?", {"b", "aabbc"}, {"", "a", "cc"}},
      {"root ::= \"a\"*? \"b\"**", {"", "aab", "bb"}, {"ba"}},
      {"root ::= \"a\" |", {"a", ""}, {"aa"}},
      {"root ::= ( \"(\" root \")\" )*", {"", "()", "(()())()"}, {"(", "())"}},
  };
  for (const Case& one : cases) {
    const auto automaton = compiled(std::string_view(one.grammar));
    for (const std::string& text : one.matching)
      EXPECT_TRUE(matches(automaton, text)) << one.grammar << "\n" << text;
    for (const std::string& text : one.others)
      EXPECT_FALSE(matches(automaton, text)) << one.grammar << "\n" << text;
  }
}

TEST(Gbnf, ErrorsSayWhereAndWhat) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", "g:1:1: expected a rule named root"},
      {"a ::= \"b\"\n", "g:2:1: expected a rule named root"},
      {"root = \"a\"", "g:1:6: expected ::=, found '='"},
      {"root ::= \"a", "g:1:10: the literal has no closing \""},
      {"root ::= \"a\n\"", "g:1:10: the literal has no closing \""},
      {"root ::= [a", "g:1:10: the class has no closing ]"},
      {"root ::= [b-a]", "g:1:11: the range's first character lies behind its last"},
      {"root ::= \"\\q\"", "g:1:12: expected an escape: one of n r t \" \\ [ ] x u U, found 'q'"},
      {"root ::= \"\\xZ1\"", "g:1:13: expected 2 hexadecimal digits, found 'Z'"},
      {"root ::= \"\\ud800\"", "g:1:11: the escape names no character"},
      {"root ::= \"\\UFFFFFFFF\"", "g:1:11: the escape names no character"},
      {"root ::= (\"a\"", "g:1:14: expected a part of the rule, | or ), found the end"},
      {"root ::= \"a\")", "g:1:13: expected a part of the rule, | or the end of the line, found ')'"},
      {"root ::= *", "g:1:10: expected something to repeat, found '*'"},
      {"root ::= \"a\"{2,1}", "g:1:13: expected {m,n} with m at most n, found {2,1}"},
      {"root ::= \"a\"{x}", "g:1:14: expected a number, found 'x'"},
      {"root ::= \"a\"{2", "g:1:15: expected } of a repetition, found the end"},
      {"root ::= \"a\"{1000001}", "g:1:14: repetitions of more than 1000000 are too large"},
      {"root ::= \"a\"{99999999999999999999}", "g:1:14: repetitions of more than 1000000 are too large"},
      {"root ::= \"a\"\n  missing", "g:2:10: expected ::="},
      {"root ::= \"é\" missing\n", "g:1:15: no rule is named missing"},
      {"root ::= \"a\"\nroot ::= \"b\"", "g:2:1: rule root is defined twice"},
      {"root ::= <think>", "g:1:10: references to tokens are not understood"},
      {"root ::= \"a\xFF\"", "g:1:12: the text is not UTF-8"},
      {"root ::= " + std::string(200, '('), "g:1:111: parentheses nest deeper than 100"},
      {"root ::= \"a\"" + std::string(200, '*'), "g:1:114: repetitions nest deeper than 100"},
  };
  for (const auto& [text, message] : cases) {
    try {
      parse_gbnf(text, "g");
      ADD_FAILURE() << text << " is accepted";
    } catch (const Error& error) {
      EXPECT_EQ(std::string(error.what()).substr(0, message.size()), message) << text;
    }
  }
}

TEST(Gbnf, WhatCannotBeCompiled) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"root ::= root \"a\" | \"b\"", "the grammar's rule root is left-recursive: it calls itself"},
      {"root ::= a\na ::= \"x\"? b \"y\" | \"q\"\nb ::= a | \"z\"",
       "is left-recursive: it calls itself (through "},
      {"root ::= (\"x\"* root){0,100}", "is left-recursive"},
      {"root ::= \"a\" root", "the grammar's rule root matches no finite text"},
      {"root ::= \"a\" b\nb ::= []", "the grammar's rule root matches no finite text"},
      {"root ::= (\"a\" | []) | x{3}\nx ::= \"b\" x", ""},
  };
  for (const auto& [text, message] : cases) {
    try {
      compiled(std::string_view(text));
      EXPECT_EQ(message, "") << text;
    } catch (const Error& error) {
      EXPECT_NE(message, "") << error.what();
      EXPECT_NE(std::string(error.what()).find(message), std::string::npos) << error.what();
    }
  }
}

}  // namespace
}  // namespace latente::grammar
