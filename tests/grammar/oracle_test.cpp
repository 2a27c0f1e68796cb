// The C++ half of compare_with_jsonschema.py: answers the schemas in a file. Skipped unless the script runs
// it.
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "grammar/json_schema.h"
#include "grammar/support.h"

namespace latente::grammar {
namespace {

using namespace test;
using Json = nlohmann::ordered_json;

std::vector<std::string> walk_tokens() {
  std::vector<std::string> tokens{""};
  for (int c = 1; c < 256; ++c) tokens.push_back(std::string(1, static_cast<char>(c)));
  for (const char* text : {"{\"",  "\":", "\",",  "\"}", "true", "null", ": ", ", \"", "\\u00", "12", "-1",
                           "\n  ", "abc", "\\\"", "é",   "中文", "name", "0.", "e+",   "other", "😀"})
    tokens.emplace_back(text);
  return tokens;
}

// Documents are to end, and strings to be valid UTF-8: what closes is likely, single bytes beyond ASCII are
// not.
int likelihood(const std::string& token, bool late) {
  if (token.empty()) return 400;
  const char c = token.size() == 1 ? token[0] : '\0';
  if (c == '}' || c == ']') return late ? 4000 : 6;
  if (c == '"') return late ? 100 : 30;
  return token.size() == 1 && (c & 0x80) != 0 ? 0 : 1;
}

std::string written(const std::shared_ptr<const TokenGrammar>& grammar,
                    const std::vector<std::string>& tokens, uint64_t seed) {
  Random random(seed);
  Matcher matcher(grammar);
  std::vector<uint64_t> mask(grammar->vocabulary().words());
  std::string text;
  for (int step = 0; step < 600 && !matcher.finished(); ++step) {
    matcher.admitted(mask);
    std::vector<int32_t> next;
    for (int32_t token = 0; token < static_cast<int32_t>(tokens.size()); ++token) {
      if (!admits(mask, token)) continue;
      const int count = likelihood(tokens[static_cast<size_t>(token)], step > 40);
      next.insert(next.end(), static_cast<size_t>(count), token);
    }
    if (next.empty()) return "";
    const int32_t token = next[random.below(next.size())];
    EXPECT_TRUE(matcher.accept(token));
    text += tokens[static_cast<size_t>(token)];
  }
  return matcher.finished() ? text : "";
}

TEST(Oracle, AnswersSchemas) {
  const char* path = std::getenv("LATENTE_SCHEMAS");
  if (path == nullptr) GTEST_SKIP() << "run by compare_with_jsonschema.py";
  std::ifstream file(path);
  std::ofstream out(std::string(path) + ".answers");
  const std::vector<std::string> tokens = walk_tokens();
  const auto vocabulary = std::make_shared<Vocabulary>(tokens, std::vector<int32_t>{0});
  uint64_t seed = 0;
  for (std::string line; std::getline(file, line);) {
    const Json one = Json::parse(line);
    std::shared_ptr<const Automaton> automaton;
    try {
      automaton = compiled(parse_json_schema(one["schema"].get<std::string>()));
    } catch (const Error& error) {
      out << Json{{"error", error.what()}}.dump() << "\n";
      continue;
    }
    const auto grammar = std::make_shared<TokenGrammar>(automaton, vocabulary);
    Json answer{{"matches", Json::array()}, {"written", Json::array()}};
    for (const Json& document : one["documents"])
      answer["matches"].push_back(matches(automaton, document[0].get<std::string>()));
    for (int i = 0; i < 10; ++i) {
      const std::string text = written(grammar, tokens, ++seed);
      if (!text.empty()) answer["written"].push_back(text);
    }
    out << answer.dump() << "\n";
  }
}

}  // namespace
}  // namespace latente::grammar
