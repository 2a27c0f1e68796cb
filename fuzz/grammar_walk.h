// Reads random tokens under a grammar and checks what Matcher promises.
#pragma once

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "grammar/matcher.h"
#include "support.h"

inline const std::shared_ptr<const latente::grammar::Vocabulary>& walk_vocabulary() {
  static const auto vocabulary = [] {
    std::vector<std::string> tokens{"", ""};
    for (int byte = 1; byte < 256; ++byte) tokens.emplace_back(1, static_cast<char>(byte));
    for (const char* text : {"aa",   "ab", "abc", "aaaaaaaa", "{\"",  "\":", "\",\"", "\"}",    "true",
                             "null", "12", "-1",  "0.",       "\n  ", "  ",  "é",     "中文",   "\\u00",
                             "\\\"", "}}", "]]",  "[[",       "name", "aa",  "b\n",   "2024-02"})
      tokens.emplace_back(text);
    return std::make_shared<const latente::grammar::Vocabulary>(tokens, std::vector<std::int32_t>{0});
  }();
  return vocabulary;
}

// The text that was read, and whether it is whole.
struct Walked {
  std::string text;
  bool whole = false;
};

inline Walked walk_tokens(const std::shared_ptr<const latente::grammar::Automaton>& automaton, unsigned seed,
                          int steps = 30) {
  using latente::grammar::Matcher;
  const auto& vocabulary = walk_vocabulary();
  std::minstd_rand random(seed);
  Walked walked;
  try {
    Matcher matcher(std::make_shared<const latente::grammar::TokenGrammar>(automaton, vocabulary));
    std::vector<std::uint64_t> mask(vocabulary->words()), again(mask.size());
    const auto size = static_cast<std::int32_t>(vocabulary->size());
    for (int step = 0; step < steps && !matcher.finished(); ++step) {
      matcher.admitted(mask);
      std::vector<std::int32_t> next;
      for (std::int32_t token = 0; token < size; ++token) {
        const bool admitted = (mask[static_cast<std::size_t>(token) / 64] >> (token % 64) & 1) != 0;
        Matcher copy = matcher;
        require(copy.accept(token) == admitted);
        if (admitted && token != 0) next.push_back(token);
      }
      require(((mask[0] & 1) != 0) == matcher.can_end());
      matcher.admitted(again);
      require(mask == again);
      // Only the limit of nesting may leave no way on.
      if (next.empty()) break;
      const std::int32_t token = next[random() % next.size()];
      require(matcher.accept(token));
      walked.text += vocabulary->text(token);
    }
    walked.whole = matcher.can_end();
    if (walked.whole) require(latente::grammar::matches(automaton, walked.text));
  } catch (const latente::Error& error) {
    require(error.what()[0] != '\0');  // too ambiguous
  }
  return walked;
}
