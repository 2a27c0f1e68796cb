// What clients ask for: bodies of /v1/chat/completions and /v1/completions, checked. OpenAI's fields, and
// those that llama.cpp's server and vLLM have beside them; unknown fields are ignored.
#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "infer/generation.h"
#include "serve/json_fields.h"

namespace latente {

// Bounds on what one request may ask for.
struct RequestLimits {
  int64_t max_tokens = 1 << 20;
  int64_t choices = 128;
  int64_t prompts = 256;
  int64_t top_logprobs = 20;
};

struct ResponseForm {
  enum class Kind : uint8_t { text, json_object, json_schema };
  Kind kind = Kind::text;
  std::string schema{};  // JSON
};

struct ToolChoice {
  enum class Kind : uint8_t { none, automatic, required };
  Kind kind = Kind::none;
  std::string name{};  // required: this one, if not empty
};

struct Tool {
  std::string name, parameters;  // a JSON schema
};

struct GenerationSettings {
  GenerationOptions options;  // max_tokens is set later, when the prompt's length is known
  std::optional<int64_t> max_tokens;
  std::vector<std::string> stop;
  int64_t choices = 1;
  bool stream = false, include_usage = false, timings_per_token = false;
  bool logprobs = false;
  ResponseForm form;
};

struct ChatRequest {
  GenerationSettings settings;
  // As templates take them: content is a text or null, arguments of calls are texts.
  Json messages = Json::array();
  Json tools = Json::array();  // as they came
  std::vector<Tool> tool_list;
  ToolChoice tool_choice;
  bool parallel_tool_calls = true;
  Json template_kwargs = Json::object();
};

struct CompletionRequest {
  using Prompt = std::variant<std::string, std::vector<int32_t>>;
  GenerationSettings settings;
  std::vector<Prompt> prompts;
  bool echo = false;
};

// `defaults`: the model's own settings. Errors are ApiErrors of status 400 that name the field.
ChatRequest read_chat(const Json& body, const GenerationOptions& defaults, const RequestLimits& limits = {});
CompletionRequest read_completion(const Json& body, const GenerationOptions& defaults,
                                  const RequestLimits& limits = {});
// The parts of a chat request that make its prompt: messages, tools, tool_choice, chat_template_kwargs.
void read_conversation(const Json& body, ChatRequest& request);

}  // namespace latente
