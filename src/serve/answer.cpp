#include "serve/answer.h"

#include <algorithm>
#include <random>

#include "infer/grammar_constraint.h"
#include "serve/logprobs.h"

namespace latente {
namespace {

// Names in replies need to be distinct, not secret.
std::string random_name(const std::string& prefix) {
  static thread_local std::mt19937_64 random{std::random_device{}()};
  return fmt::format("{}{:016x}{:08x}", prefix, random(), random() & 0xFFFFFFFF);
}

std::string reason_of(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& exception) {
    return exception.what();
  }
}

}  // namespace

std::string dumped(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

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
    choice->scored.push_back({{}, first_entry(*model_->tokenizer, choice->prompt.front())});
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
  if (choice.last_token == Clock::time_point()) {
    metrics_->first_token(seconds(begun_));
    choice.first_token = now;
  } else {
    metrics_->next_token(seconds(choice.last_token));
  }
  choice.last_token = now;
  choice.stats = *token.stats;
  choice.stats.decode_seconds = seconds(choice.first_token);
  choice.drafted = token.drafted;
  if (token.logprobs != nullptr)
    choice.scored.push_back({choice.decoded, logprob_entry(*model_->tokenizer, *token.logprobs)});
  const std::string piece = choice.decoder.push(token.id);
  choice.decoded.pass(piece);
  const std::string text = choice.stops.push(piece);
  choice.shown += text.size();
  show(choice, choice.parser.push(text), false);
  return !choice.stops.stopped();
}

void Answer::take_prompt_token(Choice& choice, const TokenLogprobs& logprobs) {
  choice.scored.push_back(
      {choice.prompt_begins[choice.scored.size()], logprob_entry(*model_->tokenizer, logprobs)});
}

void Answer::end(Choice& choice, const GenerationStats& stats) {
  choice.stats = stats;
  metrics_->finished(stats);
  settle(choice);
  if (failed_) return;
  if (stats.error) {
    fail(500, reason_of(stats.error));
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

// -- The reply

// Adds to what there is of a choice, and streams it.
void Answer::show(Choice& choice, const ReplyParser::Parts& parts, bool last) {
  ReplyParser::Parts& all = choice.all;
  ReplyParser::Parts now = parts;
  now.content.insert(0, std::exchange(choice.echo, {}));
  all.add(now);
  // Tokens of a stop string are not shown, either.
  size_t scored = choice.scored_shown;
  const bool everything = last && !choice.stops.stopped();
  while (scored < choice.scored.size() && (everything || choice.scored[scored].begin.bytes < choice.shown))
    ++scored;
  const size_t scored_before = std::exchange(choice.scored_shown, scored);
  if (!options_.stream || (now.empty() && scored == scored_before && !last)) return;
  const bool text_alone =
      !last && !options_.logprobs && !options_.live_timings && now.reasoning.empty() && now.calls.empty();
  if (text_alone) return send_text(choice, now.content);
  send(event_of(choice, now, last, scored_before));
}

void Answer::send_text(Choice& choice, const std::string& text) {
  std::optional<Choice::Cut>& cut = choice.cuts[choice.drafted ? 1 : 0];
  if (!cut) {
    constexpr std::string_view mark = "\1";
    ReplyParser::Parts parts;
    parts.content = mark;
    const std::string event = dumped(event_of(choice, parts, false, choice.scored_shown));
    const std::string quoted = dumped(mark);
    const size_t at = event.rfind(quoted);
    cut = {"data: " + event.substr(0, at), event.substr(at + quoted.size()) + "\n\n"};
  }
  reply_->write(cut->before + dumped(text) + cut->behind);
}

// What is new of a choice.
Json Answer::event_of(Choice& choice, const ReplyParser::Parts& now, bool last, size_t scored_before) const {
  Json event = envelope(true);
  const Json finish = last ? Json(choice.finish_reason) : Json();
  const Json logprobs = options_.logprobs ? logprobs_of(choice, scored_before) : Json();
  if (options_.chat) {
    event["choices"] = Json::array({{{"index", choice.index},
                                     {"delta", delta_of(choice, now)},
                                     {"logprobs", logprobs},
                                     {"finish_reason", finish}}});
  } else {
    event["choices"] = Json::array({{{"index", choice.index},
                                     {"text", now.content},
                                     {"logprobs", logprobs},
                                     {"finish_reason", finish}}});
  }
  // For who wants to see speculation at work; other clients pass over it.
  if (choice.drafted && !last) event["choices"][0]["drafted"] = true;
  if (options_.include_usage) event["usage"] = nullptr;
  if (last || options_.live_timings) event["timings"] = timings();
  return event;
}

void Answer::complete() {
  HttpReply::Tokens tokens;
  const Json used = usage();
  tokens.prompt = used["prompt_tokens"];
  tokens.cached = used["prompt_tokens_details"]["cached_tokens"];
  tokens.completion = used["completion_tokens"];
  reply_->count(tokens);
  if (options_.stream) {
    if (options_.include_usage) {
      Json event = envelope(true);
      event["choices"] = Json::array();
      event["usage"] = used;
      send(event);
    }
    reply_->write("data: [DONE]\n\n");
    reply_->end();
    return;
  }
  Json body = envelope(false);
  body["choices"] = Json::array();
  for (const auto& choice : choices_) {
    const Json logprobs = options_.logprobs ? logprobs_of(*choice, 0) : Json();
    Json one = {{"index", choice->index}};
    if (options_.chat) {
      one["message"] = message_of(*choice);
    } else {
      one["text"] = choice->all.content;
    }
    one["logprobs"] = logprobs;
    one["finish_reason"] = choice->finish_reason;
    body["choices"].push_back(std::move(one));
  }
  body["usage"] = used;
  body["timings"] = timings();
  reply_->respond({200, "application/json"}, dumped(body));
}

void Answer::send(const Json& event) { reply_->write("data: " + dumped(event) + "\n\n"); }

Json Answer::envelope(bool chunk) const {
  const char* object =
      options_.chat ? (chunk ? "chat.completion.chunk" : "chat.completion") : "text_completion";
  return {{"id", id_},
          {"object", object},
          {"created", created_},
          {"model", model_->name},
          {"choices", Json::array()}};
}

namespace {

Json call_json(const ToolCall& call) {
  return {{"id", random_name("call_")},
          {"type", "function"},
          {"function", {{"name", call.name}, {"arguments", call.arguments}}}};
}

}  // namespace

Json Answer::delta_of(Choice& choice, const ReplyParser::Parts& parts) const {
  Json delta = Json::object();
  if (!parts.content.empty()) delta["content"] = parts.content;
  if (!parts.reasoning.empty()) delta["reasoning_content"] = parts.reasoning;
  for (const ToolCall& call : parts.calls) {
    const bool begins = !call.name.empty();
    choice.calls_shown += begins ? 1 : 0;
    Json one = begins ? call_json(call) : Json{{"function", {{"arguments", call.arguments}}}};
    one["index"] = choice.calls_shown - 1;
    delta["tool_calls"].push_back(std::move(one));
  }
  return delta;
}

Json Answer::message_of(const Choice& choice) const {
  const ReplyParser::Parts& all = choice.all;
  Json message = {{"role", "assistant"}, {"content", all.content}};
  if (all.content.find_first_not_of(" \t\r\n") == all.content.npos && !all.calls.empty())
    message["content"] = nullptr;
  if (!all.reasoning.empty()) message["reasoning_content"] = all.reasoning;
  for (const ToolCall& call : all.calls) message["tool_calls"].push_back(call_json(call));
  message["refusal"] = nullptr;
  return message;
}

// Of the tokens shown, from `first` on.
Json Answer::logprobs_of(const Choice& choice, size_t first) const {
  const auto tokens = std::span(choice.scored).subspan(first, choice.scored_shown - first);
  return options_.chat ? chat_logprobs(tokens) : completion_logprobs(tokens);
}

// Several choices of one prompt count it once.
Json Answer::usage() const {
  int64_t prompt = 0, cached = 0, written = 0;
  for (const auto& choice : choices_) {
    written += choice->stats.generated_tokens;
    if (choice->index % options_.choices_a_prompt != 0) continue;
    prompt += static_cast<int64_t>(choice->prompt.size());
    cached += choice->stats.reused_tokens;
  }
  return {{"prompt_tokens", prompt},
          {"completion_tokens", written},
          {"total_tokens", prompt + written},
          {"prompt_tokens_details", {{"cached_tokens", cached}}}};
}

// As llama.cpp's server has them: of all choices together, times those of the longest.
Json Answer::timings() const {
  GenerationStats sum;
  for (const auto& choice : choices_) {
    const GenerationStats& stats = choice->stats;
    sum.prompt_tokens += stats.prompt_tokens;
    sum.reused_tokens += stats.reused_tokens;
    sum.generated_tokens += stats.generated_tokens;
    sum.drafted += stats.drafted;
    sum.accepted += stats.accepted;
    sum.prompt_seconds = std::max(sum.prompt_seconds, stats.prompt_seconds);
    sum.decode_seconds = std::max(sum.decode_seconds, stats.decode_seconds);
  }
  const auto rate = [](int64_t count, double seconds) {
    return seconds > 0 ? static_cast<double>(count) / seconds : 0.0;
  };
  const int64_t read = sum.prompt_tokens - sum.reused_tokens;
  return {{"cache_n", sum.reused_tokens},
          {"prompt_n", read},
          {"prompt_ms", 1000 * sum.prompt_seconds},
          {"prompt_per_second", rate(read, sum.prompt_seconds)},
          {"predicted_n", sum.generated_tokens},
          {"predicted_ms", 1000 * sum.decode_seconds},
          {"predicted_per_second", rate(sum.generated_tokens, sum.decode_seconds)},
          {"draft_n", sum.drafted},
          {"draft_n_accepted", sum.accepted}};
}

}  // namespace latente
