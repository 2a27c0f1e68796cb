// One request under way: its sequences in the engine, and the reply that their tokens become, whole or as a
// stream of server-sent events.
#pragma once

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "grammar/token_masks.h"
#include "infer/triggered_constraint.h"
#include "serve/http.h"
#include "serve/metrics.h"
#include "serve/model.h"
#include "serve/reply_parser.h"

namespace latente {

struct AnswerOptions {
  bool chat = false;
  bool stream = false, include_usage = false, logprobs = false, echo = false;
  bool live_timings = false;  // in each event of a stream
  bool show_special = false;  // marks of calls may be special tokens
  size_t choices_a_prompt = 1;
  std::vector<std::string> stop{};
  ReplyParser::Options parser{};
  std::shared_ptr<const grammar::TokenGrammar> grammar{};  // of the replies; null = any
  std::vector<TriggeredConstraint::Mark> calls{};          // that they may have, where `scope` says
  TriggeredConstraint::Scope scope{};
};

class Answer : public std::enable_shared_from_this<Answer> {
 public:
  Answer(const ServedModel& model, AnswerOptions options, std::shared_ptr<HttpReply> reply, Metrics& metrics);
  ~Answer();

  // A sequence, whose index is that of the call.
  void add(std::vector<int32_t> prompt, GenerationOptions options);
  // Hands the sequences to the engine; they must have been reserved (EngineLoop::reserve). What it refuses is
  // answered with 400.
  void start();

 private:
  using Clock = std::chrono::steady_clock;
  struct Choice;

  // In the engine's thread.
  void submit();
  void abandon(Abandoned reason);
  bool take(Choice& choice, const GeneratedToken& token);
  void take_prompt_token(Choice& choice, const TokenLogprobs& logprobs);
  void end(Choice& choice, const GenerationStats& stats);
  void settle(Choice& choice);
  void show(Choice& choice, const ReplyParser::Parts& parts, bool last);
  void fail(int status, const std::string& message);
  void complete();

  Json logprobs_of(const Choice& choice, size_t first) const;
  Json delta_of(Choice& choice, const ReplyParser::Parts& parts) const;
  Json message_of(const Choice& choice) const;
  Json envelope(bool chunk) const;
  Json usage() const;
  Json timings() const;
  void flush_after_step();
  void send(const Json& event);
  void send_text(Choice& choice, const std::string& text);
  Json event_of(Choice& choice, const ReplyParser::Parts& now, bool last, size_t scored_before) const;

  const ServedModel* model_;
  AnswerOptions options_;
  std::shared_ptr<HttpReply> reply_;
  Metrics* metrics_;
  std::string id_;
  int64_t created_;
  Clock::time_point begun_ = Clock::now();
  std::vector<std::unique_ptr<Choice>> choices_;
  bool failed_ = false, too_long_ = false;
  bool flushes_ = false;  // behind the step
};

// For JSON in bodies: text that is no UTF-8 has U+FFFD in its place.
std::string dumped(const Json& json);

}  // namespace latente
