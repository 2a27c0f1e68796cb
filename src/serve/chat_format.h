// How a model's chat template writes calls of tools and reasoning: from a conversation to a prompt, and to
// grammars of what may come. The way back is reply_parser.h.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "grammar/grammar.h"
#include "serve/request.h"
#include "tokenizer/chat_template.h"

namespace latente {

// What surrounds a call: BEGIN [call_begin NAME after_name ARGUMENTS call_end]... END.
struct ToolSyntax {
  // named: as above; object: between call_begin and call_end stands {"name": NAME, "arguments": ARGUMENTS};
  // bare: the reply is such an object and nothing else (or an array of them), "parameters" being as good.
  enum class Kind : uint8_t { named, object, bare };
  Kind kind = Kind::bare;
  std::string begin{}, call_begin{}, after_name{}, call_end{}, end{};
};

// What the first call begins with; of bare ones, nothing.
std::string_view call_mark(const ToolSyntax& syntax);

// What templates differ in where earlier messages have calls of tools (chat_history.h).
struct HistoryForm {
  bool objects = false;    // arguments are objects, not their JSON as a text
  bool no_null = false;    // the content of a message that has calls alone is "", not null
  bool as_text = false;    // calls and results are nothing that the template knows
  bool no_system = false;  // it refuses messages of the system
};

// Around reasoning.
constexpr std::string_view think_begin = "<think>", think_end = "</think>";

// Without white space at both ends.
std::string_view trimmed(std::string_view text);

class ChatFormat {
 public:
  // `source`: the template's. Errors are those of ChatTemplate.
  ChatFormat(std::string source, std::string bos_token, std::string eos_token);

  // ApiError (400) where the template refuses the conversation.
  std::string prompt(const ChatRequest& request) const;

  const std::string& source() const { return source_; }
  const ToolSyntax& tools() const { return tools_; }
  // The template knows <think>: replies may have reasoning.
  bool reasons() const { return reasons_; }

 private:
  std::string render(const Json& messages, const Json& tools, const Json& kwargs) const;

  std::string source_, bos_, eos_;
  ChatTemplate template_;
  ToolSyntax tools_;
  bool reasons_, knows_tools_;
  HistoryForm history_;
};

// Whether a reply to this prompt begins inside of <think>, because the template opened it.
bool opens_reasoning(std::string_view prompt);

// What the reply must be: a form, or calls. Nothing if it may be anything. With `reasoning`, it comes behind
// </think>. ApiError (400) for a schema that is not understood.
std::optional<grammar::Grammar> reply_grammar(const ResponseForm& form, const ChatRequest* chat,
                                              const ToolSyntax& syntax, bool reasoning);

// Calls in a reply that need not have any, from the mark on that opens one: for all tools, or, of bare calls,
// one for each; those marks count at the reply's beginning alone. Arguments whose schema is not understood
// are any JSON object.
struct OpenedCall {
  std::string mark;
  grammar::Grammar grammar;
};
std::vector<OpenedCall> opened_calls(const ChatRequest& chat, const ToolSyntax& syntax);

}  // namespace latente
