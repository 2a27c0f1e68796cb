#include "serve/request.h"

#include <charconv>
#include <set>

namespace latente {
namespace {

void read_logit_bias(const Json& body, SamplingOptions& sampling) {
  const Json* biases = field(body, "logit_bias");
  if (biases == nullptr) return;
  if (!biases->is_object())
    refuse("logit_bias", "expected an object from token ids to numbers, found {}", shown(*biases));
  for (const auto& [key, value] : biases->items()) {
    int32_t id = -1;
    const char* end = key.data() + key.size();
    if (const auto [at, error] = std::from_chars(key.data(), end, id);
        error != std::errc() || at != end || id < 0)
      refuse("logit_bias", "expected a token id as key, found {}", shown(key));
    if (!value.is_number() || !(std::abs(value.get<double>()) <= 100))
      refuse("logit_bias", "{}: expected -100 to 100, found {}", id, shown(value));
    sampling.logit_bias.emplace_back(id, value.get<double>());
  }
}

std::vector<std::string> read_stop(const Json& body) {
  constexpr size_t most = 16, longest = 1024;
  const Json* value = field(body, "stop");
  if (value == nullptr) return {};
  std::vector<std::string> stops;
  for (const Json& stop : value->is_array() ? *value : Json::array({*value})) {
    if (!stop.is_string()) refuse("stop", "expected a text or several, found {}", shown(*value));
    stops.push_back(stop.get<std::string>());
    if (stops.back().empty() || stops.back().size() > longest)
      refuse("stop", "expected texts of 1 to {} bytes, found one of {}", longest, stops.back().size());
  }
  if (stops.size() > most) refuse("stop", "expected at most {} texts, found {}", most, stops.size());
  return stops;
}

ResponseForm read_form(const Json& body) {
  const Json* format = field(body, "response_format");
  if (format == nullptr) return {};
  if (!format->is_object()) refuse("response_format", "expected an object, found {}", shown(*format));
  const std::string type = text_field(*format, "type").value_or("");
  if (type == "text") return {};
  if (type == "json_object") {
    // llama.cpp's way to give a schema.
    const Json* schema = field(*format, "schema");
    if (schema != nullptr) return {ResponseForm::Kind::json_schema, schema->dump()};
    return {ResponseForm::Kind::json_object};
  }
  if (type != "json_schema")
    refuse("response_format", "type: expected text, json_object or json_schema, found {}", shown(*format));
  const Json* described = field(*format, "json_schema");
  if (described == nullptr || !described->is_object())
    refuse("response_format", "json_schema: expected an object with the schema");
  const Json* schema = field(*described, "schema");
  if (schema == nullptr || !(schema->is_object() || schema->is_boolean()))
    refuse("response_format", "json_schema: schema: expected a JSON schema");
  return {ResponseForm::Kind::json_schema, schema->dump()};
}

// What both kinds of requests have.
GenerationSettings read_settings(const Json& body, const GenerationOptions& defaults,
                                 const RequestLimits& limits) {
  GenerationSettings settings;
  settings.options = defaults;
  SamplingOptions& sampling = settings.options.sampling;
  const auto set = [](auto& target, const auto& given) {
    if (given) target = static_cast<std::remove_reference_t<decltype(target)>>(*given);
  };
  constexpr int64_t large = int64_t{1} << 31;
  set(sampling.temperature, number_field(body, "temperature", 0, 100));
  set(sampling.top_p, number_field(body, "top_p", 0, 1));
  // 0 is the limit of ever fewer tokens: the most likely one.
  if (sampling.top_p == 0) sampling.top_p = 1, sampling.top_k = 1;
  set(sampling.top_k, integer_field(body, "top_k", -1, large));
  sampling.top_k = std::max<int64_t>(sampling.top_k, 0);  // -1 means all, too, to some clients
  set(sampling.min_p, number_field(body, "min_p", 0, 1));
  set(sampling.typical_p, number_field(body, "typical_p", 0, 1));
  for (const char* name : {"repeat_penalty", "repetition_penalty"})  // llama.cpp's server and vLLM
    set(sampling.repetition_penalty, number_field(body, name, 0, 100));
  set(sampling.presence_penalty, number_field(body, "presence_penalty", -2, 2));
  set(sampling.frequency_penalty, number_field(body, "frequency_penalty", -2, 2));
  if (const auto seed = integer_field(body, "seed", std::numeric_limits<int64_t>::min(),
                                      std::numeric_limits<int64_t>::max())) {
    sampling.seed = static_cast<uint64_t>(*seed);
    settings.options.repeatable = true;
  }
  read_logit_bias(body, sampling);
  try {
    sampling.validate();
  } catch (const Error& error) {
    throw ApiError(400, error.what());
  }
  settings.choices = integer_field(body, "n", 1, limits.choices).value_or(1);
  settings.stop = read_stop(body);
  settings.stream = flag_field(body, "stream").value_or(false);
  if (const Json* options = field(body, "stream_options")) {
    if (!options->is_object()) refuse("stream_options", "expected an object, found {}", shown(*options));
    if (!settings.stream) refuse("stream_options", "is for requests with stream: true alone");
    settings.include_usage = flag_field(*options, "include_usage").value_or(false);
  }
  settings.timings_per_token = flag_field(body, "timings_per_token").value_or(false);
  settings.form = read_form(body);
  return settings;
}

std::string content_text(const Json& content, const std::string& where) {
  if (content.is_string()) return content.get<std::string>();
  if (!content.is_array()) refuse(where, "expected a text or parts, found {}", shown(content));
  std::string text;
  for (const Json& part : content) {
    if (!part.is_object() || part.value("type", Json()) != "text" || !part.contains("text") ||
        !part["text"].is_string())
      refuse(where, "expected parts {{\"type\": \"text\", \"text\": TEXT}}, found {}", shown(part));
    if (!text.empty()) text += '\n';
    text += part["text"].get<std::string>();
  }
  return text;
}

Json read_call(const Json& call, const std::string& where) {
  const Json* function = call.is_object() ? field(call, "function") : nullptr;
  if (function == nullptr || !function->is_object() || !function->value("name", Json()).is_string())
    refuse(where,
           "expected {{\"id\": ..., \"type\": \"function\", \"function\": {{\"name\": ..., \"arguments\": "
           "...}}}}, found {}",
           shown(call));
  const Json* arguments = field(*function, "arguments");
  Json clean = call;
  clean["type"] = "function";
  clean["function"]["arguments"] = arguments == nullptr     ? Json("{}")
                                   : arguments->is_string() ? *arguments
                                                            : Json(arguments->dump());
  return clean;
}

Json read_message(const Json& message, size_t index) {
  static const std::set<std::string> roles = {"system", "developer", "user", "assistant", "tool"};
  const std::string where = fmt::format("messages[{}]", index);
  if (!message.is_object()) refuse(where, "expected an object, found {}", shown(message));
  const Json* role = field(message, "role");
  if (role == nullptr || !role->is_string() || !roles.contains(role->get<std::string>()))
    refuse(where, "role: expected system, developer, user, assistant or tool, found {}",
           role == nullptr ? "none" : shown(*role));
  Json clean = message;
  if (*role == "developer") clean["role"] = "system";
  const Json* calls = field(message, "tool_calls");
  const Json* content = field(message, "content");
  if (content == nullptr && *role != "assistant") refuse(where, "content: expected a text");
  clean["content"] = content == nullptr ? Json() : Json(content_text(*content, where + ".content"));
  if (content == nullptr && calls == nullptr) clean["content"] = "";
  clean.erase("tool_calls");
  if (calls == nullptr) return clean;
  if (!calls->is_array()) refuse(where, "tool_calls: expected an array, found {}", shown(*calls));
  if (calls->empty()) return clean;
  Json all = Json::array();
  for (const Json& call : *calls) all.push_back(read_call(call, where + ".tool_calls"));
  clean["tool_calls"] = std::move(all);
  return clean;
}

void read_tools(const Json& body, ChatRequest& request) {
  constexpr size_t most = 256;
  for (const char* old : {"functions", "function_call"}) {
    if (field(body, old) != nullptr) refuse(old, "is no longer understood: use tools and tool_choice");
  }
  if (const Json* tools = field(body, "tools")) {
    if (!tools->is_array()) refuse("tools", "expected an array, found {}", shown(*tools));
    if (tools->size() > most) refuse("tools", "expected at most {}, found {}", most, tools->size());
    std::set<std::string> names;
    for (const Json& tool : *tools) {
      const Json* function = tool.is_object() ? field(tool, "function") : nullptr;
      const std::string name =
          function != nullptr && function->is_object() ? text_field(*function, "name").value_or("") : "";
      const bool plain =
          !name.empty() && name.size() <= 64 &&
          name.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.") ==
              name.npos;
      if (tool.is_object() && tool.value("type", Json()) != "function")
        refuse("tools", "type: expected function, found {}", shown(tool));
      if (!plain)
        refuse("tools", "function: name: expected up to 64 letters, digits, _, - and ., found {}",
               shown(tool));
      if (!names.insert(name).second) refuse("tools", "function: name: {} is there twice", name);
      const Json* parameters = field(*function, "parameters");
      if (parameters != nullptr && !parameters->is_object())
        refuse("tools", "function: parameters: expected a JSON schema, found {}", shown(*parameters));
      request.tool_list.push_back(
          {name, parameters == nullptr ? R"({"type": "object"})" : parameters->dump()});
      Json clean = tool;
      if (parameters == nullptr)
        clean["function"]["parameters"] = {{"type", "object"}, {"properties", Json::object()}};
      if (field(*function, "description") == nullptr) clean["function"]["description"] = "";
      request.tools.push_back(std::move(clean));
    }
  }
  ToolChoice& choice = request.tool_choice;
  if (!request.tool_list.empty()) choice.kind = ToolChoice::Kind::automatic;
  request.parallel_tool_calls = flag_field(body, "parallel_tool_calls").value_or(true);
  const Json* wanted = field(body, "tool_choice");
  if (wanted == nullptr) return;
  if (wanted->is_object()) {
    const Json* function = field(*wanted, "function");
    choice.name =
        function != nullptr && function->is_object() ? text_field(*function, "name").value_or("") : "";
    choice.kind = ToolChoice::Kind::required;
    bool known = false;
    for (const Tool& tool : request.tool_list) known |= tool.name == choice.name;
    if (!known) refuse("tool_choice", "expected a function among tools, found {}", shown(*wanted));
  } else if (*wanted == "none") {
    choice.kind = ToolChoice::Kind::none;
  } else if (*wanted == "required") {
    choice.kind = ToolChoice::Kind::required;
    if (request.tool_list.empty()) refuse("tool_choice", "required: there are no tools");
  } else if (*wanted != "auto") {
    refuse("tool_choice", "expected none, auto, required or a function, found {}", shown(*wanted));
  }
}

void read_template_kwargs(const Json& body, ChatRequest& request) {
  const Json* kwargs = field(body, "chat_template_kwargs");
  if (kwargs == nullptr) return;
  if (!kwargs->is_object()) refuse("chat_template_kwargs", "expected an object, found {}", shown(*kwargs));
  for (const char* own : {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}) {
    if (kwargs->contains(own)) refuse("chat_template_kwargs", "{} is not for clients to set", own);
  }
  request.template_kwargs = *kwargs;
}

std::vector<int32_t> read_ids(const Json& value) {
  std::vector<int32_t> ids;
  for (const Json& id : value) {
    if (!id.is_number_integer() || id.get<int64_t>() < 0 ||
        id.get<int64_t>() > std::numeric_limits<int32_t>::max())
      refuse("prompt", "expected token ids, found {}", shown(id));
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

}  // namespace

void read_conversation(const Json& body, ChatRequest& request) {
  const Json* messages = field(body, "messages");
  if (messages == nullptr || !messages->is_array() || messages->empty())
    refuse("messages", "expected an array of messages, found {}",
           messages == nullptr ? "none" : shown(*messages));
  for (const Json& message : *messages)
    request.messages.push_back(read_message(message, request.messages.size()));
  read_tools(body, request);
  read_template_kwargs(body, request);
}

ChatRequest read_chat(const Json& body, const GenerationOptions& defaults, const RequestLimits& limits) {
  ChatRequest request;
  read_conversation(body, request);
  GenerationSettings& settings = request.settings = read_settings(body, defaults, limits);
  settings.max_tokens = integer_field(body, "max_completion_tokens", 1, limits.max_tokens);
  if (!settings.max_tokens) settings.max_tokens = integer_field(body, "max_tokens", 1, limits.max_tokens);
  settings.logprobs = flag_field(body, "logprobs").value_or(false);
  const auto top = integer_field(body, "top_logprobs", 0, limits.top_logprobs);
  if (top.value_or(0) > 0 && !settings.logprobs)
    refuse("top_logprobs", "is for requests with logprobs: true alone");
  settings.options.top_logprobs = settings.logprobs ? top.value_or(0) : -1;
  if (request.tool_choice.kind == ToolChoice::Kind::required &&
      settings.form.kind != ResponseForm::Kind::text)
    refuse("tool_choice", "a call and a response_format cannot both be required");
  return request;
}

CompletionRequest read_completion(const Json& body, const GenerationOptions& defaults,
                                  const RequestLimits& limits) {
  CompletionRequest request;
  GenerationSettings& settings = request.settings = read_settings(body, defaults, limits);
  const Json* prompt = field(body, "prompt");
  if (prompt == nullptr) refuse("prompt", "expected a text, token ids, or several of them");
  if (prompt->is_string()) {
    request.prompts.emplace_back(prompt->get<std::string>());
  } else if (!prompt->is_array() || prompt->empty()) {
    refuse("prompt", "expected a text, token ids, or several of them, found {}", shown(*prompt));
  } else if (prompt->front().is_number()) {
    request.prompts.emplace_back(read_ids(*prompt));
  } else {
    if (std::ssize(*prompt) > limits.prompts)
      refuse("prompt", "expected at most {}, found {}", limits.prompts, prompt->size());
    for (const Json& one : *prompt) {
      if (one.is_string()) {
        request.prompts.emplace_back(one.get<std::string>());
      } else if (one.is_array()) {
        request.prompts.emplace_back(read_ids(one));
      } else {
        refuse("prompt", "expected texts or lists of token ids, found {}", shown(one));
      }
    }
  }
  settings.max_tokens = integer_field(body, "max_tokens", 0, limits.max_tokens);
  if (const auto top = integer_field(body, "logprobs", 0, limits.top_logprobs)) {
    settings.logprobs = true;
    settings.options.top_logprobs = *top;
  }
  request.echo = flag_field(body, "echo").value_or(false);
  settings.options.prompt_logprobs = request.echo && settings.logprobs;
  if (settings.max_tokens == 0 && !request.echo)
    refuse("max_tokens", "0 is for requests with echo: true alone");
  if (!text_field(body, "suffix").value_or("").empty()) refuse("suffix", "is not supported");
  if (const auto best = integer_field(body, "best_of", 1, limits.choices); best && *best != settings.choices)
    refuse("best_of", "expected n or nothing, found {}", *best);
  return request;
}

}  // namespace latente
