#include "messages.h"

#include "base/error.h"

namespace latente {

std::vector<ChatMessage> messages_from_json(const nlohmann::json& json) {
  if (!json.is_array()) fail("messages: expected an array of messages, found {}", json.dump());
  std::vector<ChatMessage> messages;
  for (const nlohmann::json& message : json) {
    if (!message.is_object() || !message.contains("role") || !message["role"].is_string() ||
        !message.contains("content") || !message["content"].is_string()) {
      fail("messages: expected {{\"role\": TEXT, \"content\": TEXT}}, found {}", message.dump());
    }
    messages.push_back({message["role"].get<std::string>(), message["content"].get<std::string>()});
  }
  return messages;
}

nlohmann::json json_of(const std::vector<ChatMessage>& messages) {
  nlohmann::json json = nlohmann::json::array();
  for (const ChatMessage& message : messages)
    json.push_back({{"role", message.role}, {"content", message.content}});
  return json;
}

}  // namespace latente
