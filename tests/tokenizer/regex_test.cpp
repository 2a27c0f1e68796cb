#include "tokenizer/regex.h"

#include <gtest/gtest.h>

#include "base/error.h"

namespace latente {
namespace {

std::vector<std::string> found(const std::string& pattern, std::string_view text) {
  const Regex regex(pattern);
  Regex::Matches matches(regex, text);
  std::vector<std::string> out;
  std::size_t begin, end;
  while (matches.next(begin, end)) out.emplace_back(text.substr(begin, end - begin));
  return out;
}

std::string error_of(const std::string& pattern, std::string_view text = {}) {
  try {
    found(pattern, text);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

using Strings = std::vector<std::string>;

TEST(Regex, Repetitions) {
  EXPECT_EQ(found("a*?b", "aab b"), (Strings{"aab", "b"}));
  EXPECT_EQ(found("a+?", "aaa"), (Strings{"a", "a", "a"}));
  EXPECT_EQ(found("a?+ab", "aab ab"), (Strings{"aab"}));
  EXPECT_EQ(found("a{2,3}", "aaaaaaa"), (Strings{"aaa", "aaa"}));
  EXPECT_EQ(found("a{,2}b", "aaab"), (Strings{"aab"}));
  EXPECT_EQ(found("a{2}+", "aaaaa"), (Strings{"aaaa"}));  // Ruby: repeated, not possessive
  EXPECT_EQ(found("(?:ab|a)+?b?", "abab"), (Strings{"ab", "ab"}));
  EXPECT_EQ(found("a{x}", "a{x}"), (Strings{"a{x}"}));
}

TEST(Regex, EmptyMatchesBehindAMatchDoNotCount) {
  EXPECT_EQ(found("x*", "xxa"), (Strings{"xx", ""}));
  EXPECT_EQ(found("(?=[A-Z])", "aBcD"), (Strings{"", ""}));
}

TEST(Regex, Assertions) {
  EXPECT_EQ(found("\\s+(?!\\S)|\\s+", "a   b  "), (Strings{"  ", " ", "  "}));
  EXPECT_EQ(found("(?<=\\p{L})\\p{N}", "a1 2"), (Strings{"1"}));
  EXPECT_EQ(found("(?<!a)b", "ab b"), (Strings{"b"}));
  EXPECT_EQ(found("^.", "ab\ncd\n"), (Strings{"a", "c"}));
  EXPECT_EQ(found(".$", "ab\ncd\n"), (Strings{"b", "d"}));
  EXPECT_EQ(found(".\\Z", "ab\n"), (Strings{"b"}));
  EXPECT_EQ(found("\\Aa", "aa"), (Strings{"a"}));
  EXPECT_EQ(found("\\bé", "é éé"), (Strings{"é", "é"}));
}

TEST(Regex, AtomicGroupsKeepTheirFirstMatch) {
  EXPECT_EQ(found("(?>a+|b)ac?", "aaac"), (Strings{}));
  EXPECT_EQ(found("(?:a+|b)ac?", "aaac"), (Strings{"aaac"}));
}

TEST(Regex, Classes) {
  EXPECT_EQ(found("[^a-z]{2}", "aB1-cD"), (Strings{"B1"}));
  EXPECT_EQ(found("[a-c[x-z]]+", "abyzm"), (Strings{"abyz"}));
  EXPECT_EQ(found("\\p{Han}+|\\p{Hangul}", "ab中文한국"), (Strings{"中文", "한", "국"}));
  EXPECT_EQ(found("\\p{^L}", "a1"), (Strings{"1"}));
  EXPECT_EQ(found("\\P{L}", "a1"), (Strings{"1"}));
  EXPECT_EQ(found("\\x{4e2d}|\\u6587", "中文字"), (Strings{"中", "文"}));
  EXPECT_EQ(found("[[:^space:]]", " a"), (Strings{"a"}));
  const char* const letters = "abcde fghi^b e&xyzu";  // intersections as Oniguruma takes them
  EXPECT_EQ(found("[a-z&&[^aeiou]]+", letters), (Strings{"bcd", "fgh", "b", "xyz"}));
  EXPECT_EQ(found("[^a-z&&aeiou]+", letters), (Strings{"bcd", " fgh", "^b ", "&xyz"}));
  EXPECT_EQ(found("[a-d&&b-z&&c-e]+", letters), (Strings{"cd"}));
  EXPECT_EQ(found("[a-z&&^b]", letters), (Strings{"b", "b"}));
  EXPECT_EQ(found("[a&&b]", letters), (Strings{}));
  // Only outside of brackets is ½ of \w.
  EXPECT_EQ(found("\\w", "½"), (Strings{"½"}));
  EXPECT_EQ(found("[\\w]", "½"), (Strings{}));
}

TEST(Regex, CaseOfLetters) {
  EXPECT_EQ(found("(?i:'s|'re)", "'S 'Re 'ſ"), (Strings{"'S", "'Re", "'ſ"}));
  EXPECT_EQ(found("(?i)k", "kK\u212A"), (Strings{"k", "K", "\u212A"}));
  EXPECT_EQ(found("(?i:a)b", "AbAB"), (Strings{"Ab"}));
}

TEST(Regex, ErrorsNameThePattern) {
  for (const char* pattern : {"(",
                              ")",
                              "a)",
                              "[",
                              "[]",
                              "[a",
                              "*",
                              "a**",
                              "(?",
                              "(?<x>a)",
                              "\\1",
                              "(a)\\1",
                              "a{3,2}",
                              "\\p{",
                              "\\p{Xx}",
                              "\\p{}",
                              "[b-a]",
                              "(?<=ab)c",
                              "\\",
                              "[a&&]",
                              "[&&a]",
                              "[a&&&&b]",
                              "[a&&b",
                              "\\x{110000}",
                              "\\u00",
                              "(?:a*)*",
                              "a{100000000}",
                              "\\k<a>",
                              "(?:(?:(?:a{500}){500}){500})",
                              "[[:nothing:]]",
                              "(?i:straße)",
                              "\\Q",
                              "\\xff"}) {
    const std::string error = error_of(pattern);
    EXPECT_TRUE(error.starts_with("regular expression")) << pattern << ": " << error;
  }
}

TEST(Regex, DepthIsLimited) {
  std::string deep(60'000, '(');
  EXPECT_NE(error_of(deep + "a" + std::string(60'000, ')')), "no error");
  EXPECT_NE(error_of(std::string(60'000, '[')), "no error");
  std::string atomic;
  for (int i = 0; i < 20'000; ++i) atomic += "(?>";
  EXPECT_NE(error_of(atomic + "a" + std::string(20'000, ')')), "no error");
}

TEST(Regex, StepsAreLimited) {
  const std::string text(3000, 'a');
  const std::string error = error_of("(?:a|aa)+(?:a|aa)+(?:a|aa)+b", text);
  EXPECT_NE(error.find("takes too many steps"), std::string::npos) << error;
}

TEST(Regex, LongMatchesNeedNoStack) {
  const std::string text(4'000'000, 'a');
  EXPECT_EQ(found("\\p{L}+", text).size(), 1u);
  EXPECT_EQ(found("(?:a|b)+", text).size(), 1u);
  EXPECT_EQ(found("\\s+(?!\\S)|\\s+", std::string(2'000'000, ' ') + "x").size(), 2u);
}

}  // namespace
}  // namespace latente
