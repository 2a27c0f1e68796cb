#include "tokenizer/chat_template.h"

#include <nlohmann/json.hpp>

#include "tokenizer/jinja_interpreter.h"
#include "tokenizer/jinja_parser.h"
#include "tokenizer/jinja_text.h"

namespace latente {

namespace {

using namespace jinja;

Value checked_text(Runtime& runtime, const std::string& text) {
  if (!is_utf8(text)) fail("chat template: expected UTF-8 in the context, found other bytes");
  return runtime.text(text);
}

template <class Json>
Value to_value(Runtime& runtime, const Json& json) {
  Nested nested(runtime);
  runtime.step();
  switch (json.type()) {
    case Json::value_t::null:
      return Value::none();
    case Json::value_t::boolean:
      return Value::boolean(json.template get<bool>());
    case Json::value_t::number_integer:
      return Value::integer(json.template get<int64_t>());
    case Json::value_t::number_unsigned:
      return Value::integer(json.template get<uint64_t>());
    case Json::value_t::number_float:
      return Value::real(json.template get<double>());
    case Json::value_t::string:
      return checked_text(runtime, json.template get_ref<const std::string&>());
    case Json::value_t::array: {
      std::vector<Value> items;
      for (const auto& item : json) items.push_back(to_value(runtime, item));
      return runtime.list(std::move(items));
    }
    case Json::value_t::object: {
      Dict* dict = runtime.dict();
      for (const auto& [key, value] : json.items()) {
        dict->set(runtime, checked_text(runtime, key), to_value(runtime, value));
      }
      return dict;
    }
    default:
      fail("chat template: expected JSON values in the context, found {}", json.type_name());
  }
}

template <class Json>
std::string render_json(const Program& program, const Json& context, const Limits& limits) {
  if (!context.is_object())
    fail("chat template: expected an object as context, found {}", context.type_name());
  Runtime runtime(limits);
  auto variables = make_globals(runtime);
  for (const auto& [name, value] : context.items()) variables.emplace_back(name, to_value(runtime, value));
  return run(program, runtime, variables);
}

}  // namespace

ChatTemplate::ChatTemplate(std::string_view source) : program_(parse(source)) {}
ChatTemplate::~ChatTemplate() = default;
ChatTemplate::ChatTemplate(ChatTemplate&&) noexcept = default;
ChatTemplate& ChatTemplate::operator=(ChatTemplate&&) noexcept = default;

std::string ChatTemplate::render(const nlohmann::json& context, const Limits& limits) const {
  return render_json(*program_, context, limits);
}

std::string ChatTemplate::render(const nlohmann::ordered_json& context, const Limits& limits) const {
  return render_json(*program_, context, limits);
}

std::string ChatTemplate::render(std::span<const ChatMessage> messages, bool add_generation_prompt,
                                 const std::string& bos_token, const std::string& eos_token) const {
  nlohmann::ordered_json context = {{"messages", nlohmann::ordered_json::array()},
                                    {"add_generation_prompt", add_generation_prompt},
                                    {"bos_token", bos_token},
                                    {"eos_token", eos_token}};
  for (const ChatMessage& message : messages) {
    context["messages"].push_back({{"role", message.role}, {"content", message.content}});
  }
  return render(context);
}

}  // namespace latente
