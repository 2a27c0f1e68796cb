// The forms of replies: whole bodies and events of a stream.
#include <algorithm>
#include <random>

#include "serve/answer_choice.h"

namespace latente {

std::string random_name(const std::string& prefix) {
  static thread_local std::mt19937_64 random{std::random_device{}()};
  return fmt::format("{}{:016x}{:08x}", prefix, random(), random() & 0xFFFFFFFF);
}

std::string dumped(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

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
  // What has been streamed is not asked for again.
  choice.scored.erase(choice.scored.begin(), choice.scored.begin() + static_cast<ptrdiff_t>(scored));
  choice.scored_shown = 0;
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
  flush_after_step();
}

// Whatever comes of a step leaves at once.
void Answer::flush_after_step() {
  if (std::exchange(flushes_, true)) return;
  model_->loop->after_step([self = shared_from_this()](EngineLoop&) {
    self->flushes_ = false;
    self->reply_->flush();
  });
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

void Answer::send(const Json& event) {
  reply_->write("data: " + dumped(event) + "\n\n");
  flush_after_step();
}

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

// Mistral's templates take a call back only if its id has nine letters and digits.
Json call_json(const ToolCall& call) {
  return {{"id", random_name("").substr(0, 9)},
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
  const Tokenizer& tokenizer = *model_->tokenizer;
  return options_.chat ? chat_logprobs(tokenizer, tokens) : completion_logprobs(tokenizer, tokens);
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
