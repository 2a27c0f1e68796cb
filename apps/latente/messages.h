// Conversations as JSON: [{"role": ..., "content": ...}, ...].
#pragma once

#include <nlohmann/json.hpp>
#include <vector>

#include "tokenizer/chat_template.h"

namespace latente {

// Error naming what was found instead of a message.
std::vector<ChatMessage> messages_from_json(const nlohmann::json& json);
nlohmann::json json_of(const std::vector<ChatMessage>& messages);

}  // namespace latente
