// Calls of tools and their results in earlier messages of a conversation, as a chat template takes them.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "serve/chat_format.h"

namespace latente {

// Found out by trying. `render`: the template's prompt for these messages, with a function `probe` among its
// tools; nothing where it refuses them.
HistoryForm history_form(const std::function<std::optional<std::string>(const Json& messages)>& render);

// Messages as ChatRequest has them. As text, a call is what a reply would have been, and results come from
// the user.
Json in_form(Json messages, const HistoryForm& form, const ToolSyntax& syntax);

// For templates that say nothing of tools: adds what tools there are and how to call them.
Json with_instructions(Json messages, const Json& tools, const HistoryForm& form, const ToolSyntax& syntax);

}  // namespace latente
