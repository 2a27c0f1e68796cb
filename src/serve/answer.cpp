#include "serve/answer.h"

#include <algorithm>

#include "grammar/work.h"
#include "infer/grammar_constraint.h"
#include "serve/answer_choice.h"

namespace latente {
namespace {

// Status and message.
std::pair<int, std::string> reason_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const grammar::TooMuch& too_much) {
    return {400, too_much.what()};
  } catch (const std::exception& exception) {
    return {500, exception.what()};
  }
}

}  // namespace

Answer::Answer(const ServedModel& model, AnswerOptions options, std::shared_ptr<HttpReply> reply,
               Metrics& metrics)
    : model_(&model),
      options_(std::move(options)),
      reply_(std::move(reply)),
      metrics_(&metrics),
      id_(random_name(options_.chat ? "chatcmpl-" : "cmpl-")),
      created_(std::chrono::duration_cast<std::chrono::seconds>(
                   std::chrono::system_clock::now().time_since_epoch())
                   .count()) {}

Answer::~Answer() = default;

void Answer::add(std::vector<int32_t> prompt, GenerationOptions options) {
  auto choice = std::make_unique<Choice>(*model_, options_, choices_.size());
  choice->prompt = std::move(prompt);
  choice->generation = std::move(options);
  if (options_.echo) choice->read_echo(*model_->tokenizer);
  if (choice->generation.prompt_logprobs)
    choice->scored.push_back({{}, {choice->prompt.front(), 0, {}}, true});
  choices_.push_back(std::move(choice));
}

void Answer::start() {
  // Until the task has run, the loop holds the answer; then the requests' callbacks do.
  model_->loop->post([self = shared_from_this()](EngineLoop&) { self->submit(); });
  reply_->on_abandoned([weak = weak_from_this(), loop = model_->loop](Abandoned reason) {
    loop->post([weak, reason](EngineLoop&) {
      if (const auto self = weak.lock()) self->abandon(reason);
    });
  });
}

void Answer::submit() {
  const auto self = shared_from_this();
  for (const auto& pointer : choices_) {
    Choice& choice = *pointer;
    choice.settled = false;
  }
  for (const auto& pointer : choices_) {
    Choice& choice = *pointer;
    Request request;
    request.prompt = choice.prompt;
    request.options = choice.generation;
    if (options_.grammar) request.options.constraint = std::make_shared<GrammarConstraint>(options_.grammar);
    if (!options_.calls.empty())
      request.options.constraint = std::make_shared<TriggeredConstraint>(options_.calls, options_.scope);
    request.on_token = [self, &choice](GeneratedToken token) { return self->take(choice, token); };
    request.on_prompt_token = [self, &choice](const TokenLogprobs& logprobs) {
      self->take_prompt_token(choice, logprobs);
    };
    request.on_finish = [self, &choice](const GenerationStats& stats) { self->end(choice, stats); };
    try {
      choice.id = model_->loop->submit(std::move(request));
    } catch (const Error& error) {
      fail(400, error.what());
      return;
    }
  }
  if (!options_.stream) return;
  reply_->begin({200, "text/event-stream"});
  for (const auto& choice : choices_) {
    if (!options_.chat) break;
    Json event = envelope(true);
    event["choices"] = Json::array({{{"index", choice->index},
                                     {"delta", {{"role", "assistant"}, {"content", ""}}},
                                     {"logprobs", nullptr},
                                     {"finish_reason", nullptr}}});
    send(event);
  }
  reply_->flush();
}

void Answer::settle(Choice& choice) {
  if (std::exchange(choice.settled, true)) return;
  model_->loop->release(1);
}

// Nobody listens any more, or it takes too long: then what there is is the reply.
void Answer::abandon(Abandoned reason) {
  for (const auto& choice : choices_) {
    if (choice->settled) continue;
    if (reason == Abandoned::too_long) {
      too_long_ = true;
      model_->loop->engine().interrupt(choice->id);
    } else {
      model_->loop->cancel(choice->id);
      settle(*choice);
    }
  }
}

void Answer::fail(int status, const std::string& message) {
  for (const auto& choice : choices_) {
    if (!choice->settled && choice->id != 0) model_->loop->cancel(choice->id);
    settle(*choice);
  }
  if (std::exchange(failed_, true)) return;
  const std::string body = error_body(status, message);
  if (reply_->begun()) {
    reply_->write("data: " + body + "\n\n");
    reply_->end();
  } else {
    reply_->respond({status, "application/json"}, body);
  }
}

// -- Tokens

bool Answer::take(Choice& choice, const GeneratedToken& token) {
  const auto now = Clock::now();
  const auto seconds = [&](Clock::time_point from) {
    return std::chrono::duration<double>(now - from).count();
  };
  const bool first = choice.last_token == Clock::time_point();
  if (first) {
    metrics_->first_token(seconds(begun_));
    choice.first_token = now;
  } else {
    metrics_->next_token(seconds(choice.last_token));
  }
  choice.last_token = now;
  choice.stats = *token.stats;
  choice.stats.decode_seconds = seconds(choice.first_token);
  choice.drafted = token.drafted;
  if (token.logprobs != nullptr) choice.scored.push_back({choice.decoded, *token.logprobs});
  const std::string piece = choice.decoder.push(token.id);
  choice.decoded.pass(piece);
  const std::string text = choice.stops.push(piece);
  choice.shown += text.size();
  show(choice, choice.parser.push(text), false);
  if (first) reply_->flush();  // the first one does not wait for what else the step does
  return !choice.stops.stopped();
}

void Answer::take_prompt_token(Choice& choice, const TokenLogprobs& logprobs) {
  choice.scored.push_back({choice.prompt_begins[choice.scored.size()], logprobs});
}

void Answer::end(Choice& choice, const GenerationStats& stats) {
  choice.stats = stats;
  metrics_->finished(stats);
  settle(choice);
  if (failed_) return;
  if (stats.error) {
    const auto [status, message] = reason_of(stats.error);
    fail(status, message);
    return;
  }
  ReplyParser::Parts rest;
  if (!choice.stops.stopped()) {
    std::string text = choice.stops.push(choice.decoder.finish());
    if (!choice.stops.stopped()) text += choice.stops.finish();
    choice.shown += text.size();
    rest = choice.parser.push(text);
  }
  rest.add(choice.parser.finish());
  const bool cut = stats.finish == Finish::length || stats.finish == Finish::context_full ||
                   (stats.finish == Finish::interrupted && !choice.stops.stopped());
  const bool called = !choice.all.calls.empty() || !rest.calls.empty();
  choice.finish_reason = cut ? "length" : called ? "tool_calls" : "stop";
  show(choice, rest, true);
  if (std::all_of(choices_.begin(), choices_.end(),
                  [](const auto& one) { return !one->finish_reason.empty(); }))
    complete();
}

}  // namespace latente
