// What the parts of Answer share: a sequence under way (answer.cpp drives it, answer_reply.cpp says it).
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "serve/answer.h"
#include "serve/logprobs.h"
#include "tokenizer/stop_strings.h"

namespace latente {

// Names in replies need to be distinct, not secret.
std::string random_name(const std::string& prefix);

struct Answer::Choice {
  Choice(const ServedModel& model, const AnswerOptions& options, size_t at)
      : index(at),
        decoder(*model.tokenizer, !options.show_special),
        stops(options.stop),
        parser(options.parser) {}

  size_t index;
  std::vector<int32_t> prompt;
  GenerationOptions generation;
  uint64_t id = 0;      // the engine's
  bool settled = true;  // not, or no longer, in the engine

  StreamDecoder decoder;
  StopStrings stops;
  ReplyParser parser;
  // Of the text, an echoed prompt included: what the decoder gave, and the bytes that stop strings let
  // through.
  TextPosition decoded;
  size_t shown = 0;
  std::string echo;                         // not shown yet
  std::vector<TextPosition> prompt_begins;  // by token of an echoed prompt

  void read_echo(const Tokenizer& tokenizer) {
    StreamDecoder text(tokenizer, true);
    const auto add_text = [&](const std::string& piece) {
      echo += piece;
      decoded.pass(piece);
    };
    for (int32_t token : prompt) {
      prompt_begins.push_back(decoded);
      add_text(text.push(token));
    }
    add_text(text.finish());
    shown = decoded.bytes;
  }

  std::vector<ScoredToken> scored;  // tokens told of, an echoed prompt's first
  size_t scored_shown = 0;

  ReplyParser::Parts all;  // so far
  size_t calls_shown = 0;
  GenerationStats stats;
  std::string finish_reason;
  Clock::time_point first_token{}, last_token{};
  bool drafted = false;  // the last token was

  // An event that brings text alone, cut where the text stands: most are such, and there is one a token.
  struct Cut {
    std::string before, behind;
  };
  std::optional<Cut> cuts[2];  // by drafted
};

}  // namespace latente
