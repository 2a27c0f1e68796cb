#include "serve/request.h"

#include <gtest/gtest.h>

namespace latente {
namespace {

const GenerationOptions defaults = [] {
  GenerationOptions options;
  options.sampling.temperature = 0.6;
  options.sampling.top_p = 0.95;
  options.repeatable = false;
  return options;
}();

ChatRequest chat(const std::string& fields) {
  return read_chat(parse_body(R"({"messages": [{"role": "user", "content": "Hi"}])" + fields + "}"),
                   defaults);
}

CompletionRequest completion(const std::string& fields) {
  return read_completion(parse_body(R"({"prompt": "Once")" + fields + "}"), defaults);
}

// The field that an ApiError names; empty if there is none.
template <class Read>
std::string refused(Read read) {
  try {
    read();
  } catch (const ApiError& error) {
    EXPECT_EQ(error.status, 400);
    return error.param.empty() ? "?" : error.param;
  }
  return "";
}

TEST(Request, DefaultsAreTheModels) {
  const ChatRequest request = chat("");
  EXPECT_EQ(request.settings.options.sampling.temperature, 0.6);
  EXPECT_EQ(request.settings.options.sampling.top_p, 0.95);
  EXPECT_FALSE(request.settings.options.repeatable);
  EXPECT_EQ(request.settings.choices, 1);
  EXPECT_FALSE(request.settings.stream);
  EXPECT_FALSE(request.settings.max_tokens);
  EXPECT_EQ(request.settings.options.top_logprobs, -1);
  EXPECT_EQ(request.tool_choice.kind, ToolChoice::Kind::none);
}

TEST(Request, FieldsReachTheSettings) {
  const ChatRequest request = chat(
      R"(, "temperature": 0, "top_p": 0.5, "top_k": 4, "min_p": 0.1, "seed": -3, "n": 2, "stop": ["a", "b"],
      "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {"7": -100}, "max_tokens": 5, "logprobs": true,
      "top_logprobs": 3, "stream": true, "stream_options": {"include_usage": true}, "unknown": {"a": [1]})");
  const GenerationSettings& settings = request.settings;
  const SamplingOptions& sampling = settings.options.sampling;
  EXPECT_EQ(sampling.temperature, 0);
  EXPECT_EQ(sampling.top_p, 0.5);
  EXPECT_EQ(sampling.top_k, 4);
  EXPECT_EQ(sampling.min_p, 0.1);
  EXPECT_EQ(sampling.seed, static_cast<uint64_t>(-3));
  EXPECT_TRUE(settings.options.repeatable);
  EXPECT_EQ(settings.choices, 2);
  EXPECT_EQ(settings.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(sampling.presence_penalty, 1);
  EXPECT_EQ(sampling.frequency_penalty, -1);
  EXPECT_EQ(sampling.logit_bias, (std::vector<std::pair<int32_t, double>>{{7, -100}}));
  EXPECT_EQ(settings.max_tokens, 5);
  EXPECT_EQ(settings.options.top_logprobs, 3);
  EXPECT_TRUE(settings.stream && settings.include_usage);
  EXPECT_EQ(chat(R"(, "max_tokens": 5, "max_completion_tokens": 7)").settings.max_tokens, 7);
}

TEST(Request, WhatIsOutOfRangeIsNamed) {
  for (const auto& [key, value] :
       std::vector<std::pair<std::string, std::string>>{{"n", "0"},
                                                        {"n", "-1"},
                                                        {"n", "1e18"},
                                                        {"n", "1.5"},
                                                        {"n", "18446744073709551615"},
                                                        {"temperature", "-1"},
                                                        {"temperature", "\"x\""},
                                                        {"top_p", "1.01"},
                                                        {"top_k", "-2"},
                                                        {"min_p", "-0.1"},
                                                        {"seed", "1e300"},
                                                        {"seed", "0.5"},
                                                        {"stop", "[1]"},
                                                        {"stop", "\"\""},
                                                        {"logit_bias", "[1]"},
                                                        {"logit_bias", "{\"x\": 1}"},
                                                        {"logit_bias", "{\"1\": 1000}"},
                                                        {"logit_bias", "{\"1\": null}"},
                                                        {"stream", "1"},
                                                        {"stream_options", "{}"},
                                                        {"response_format", "5"},
                                                        {"response_format", "{\"type\": \"yaml\"}"}}) {
    const std::string field = ", \"" + key + "\": " + value;
    EXPECT_EQ(refused([&] { chat(field); }), key) << field;
    EXPECT_EQ(refused([&] { completion(field); }), key) << field;
  }
  EXPECT_EQ(refused([] { chat(R"(, "max_tokens": 0)"); }), "max_tokens");
  EXPECT_EQ(refused([] { chat(R"(, "top_logprobs": 3)"); }), "top_logprobs");
  EXPECT_EQ(refused([] { completion(R"(, "max_tokens": 0)"); }), "max_tokens");
  EXPECT_EQ(refused([] { completion(R"(, "max_tokens": 0, "echo": true)"); }), "");
}

TEST(Request, BodiesThatAreNone) {
  for (const std::string body : {"", "[", "5", "{\"a\": \xff}", "{\"a\": 1e999}", "{} {}"})
    EXPECT_EQ(refused([&] { parse_body(body); }), "?") << body;
  const auto nested = [](int depth) {
    return "{\"a\": " + std::string(static_cast<size_t>(depth) - 1, '[') +
           std::string(static_cast<size_t>(depth) - 1, ']') + "}";
  };
  EXPECT_EQ(refused([&] { parse_body(nested(most_nested)); }), "");
  EXPECT_EQ(refused([&] { parse_body(nested(most_nested + 1)); }), "?");
  EXPECT_EQ(parse_body(R"({"a": "[[[[\"[[["})")["a"], "[[[[\"[[[");
  EXPECT_EQ(refused([] { parse_body("{\"a\": \"" + std::string(1000, '[') + "\"}"); }), "");
}

TEST(Request, Prompts) {
  const auto prompts = [](const std::string& prompt) {
    return read_completion(parse_body("{\"prompt\": " + prompt + "}"), defaults).prompts;
  };
  using Ids = std::vector<int32_t>;
  EXPECT_EQ(std::get<Ids>(prompts("[1, 2]").at(0)), (Ids{1, 2}));
  EXPECT_EQ(prompts(R"([[1, 2], "x", [3]])").size(), 3U);
  for (const std::string bad : {"null", "[]", "5", "[1, -2]", "[1, 2.5]", "[[1], 5]", "[4294967296]", "{}"})
    EXPECT_EQ(refused([&] { prompts(bad); }), "prompt") << bad;
}

TEST(Request, MessagesBecomeWhatTemplatesTake) {
  const ChatRequest request = read_chat(parse_body(R"({"messages": [
      {"role": "developer", "content": "Be brief."},
      {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
      {"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function",
          "function": {"name": "f", "arguments": {"x": 1}}}]},
      {"role": "tool", "tool_call_id": "1", "content": "2"}, {"role": "assistant"}]})"),
                                        defaults);
  const Json& messages = request.messages;
  EXPECT_EQ(messages[0]["role"], "system");
  EXPECT_EQ(messages[1]["content"], "a\nb");
  EXPECT_TRUE(messages[2]["content"].is_null());
  EXPECT_EQ(messages[2]["tool_calls"][0]["function"]["arguments"], R"({"x":1})");
  EXPECT_EQ(messages[3]["tool_call_id"], "1");
  EXPECT_EQ(messages[4]["content"], "");
}

TEST(Request, Tools) {
  const std::string tools =
      R"(, "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
         {"type": "function", "function": {"name": "g"}}])";
  EXPECT_EQ(chat(tools).tool_choice.kind, ToolChoice::Kind::automatic);
  EXPECT_EQ(chat(tools).tool_list.size(), 2U);
  EXPECT_EQ(chat(tools + R"(, "tool_choice": "none")").tool_choice.kind, ToolChoice::Kind::none);
  EXPECT_EQ(chat(tools + R"(, "tool_choice": "required")").tool_choice.kind, ToolChoice::Kind::required);
  const ChatRequest named =
      chat(tools + R"(, "tool_choice": {"type": "function", "function": {"name": "g"}})");
  EXPECT_EQ(named.tool_choice.kind, ToolChoice::Kind::required);
  EXPECT_EQ(named.tool_choice.name, "g");
  EXPECT_EQ(
      refused([&] { chat(tools + R"(, "tool_choice": {"type": "function", "function": {"name": "h"}})"); }),
      "tool_choice");
  EXPECT_EQ(refused([&] {
              chat(tools + R"(, "tool_choice": "required", "response_format": {"type": "json_object"})");
            }),
            "tool_choice");
}

}  // namespace
}  // namespace latente
