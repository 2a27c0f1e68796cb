// How a model's chat template writes calls of tools and reasoning, and the way back: from a conversation to a
// prompt, and from a reply's text to content, reasoning and calls.
#pragma once

#include <memory>
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
  std::string render(const Json& messages, const Json& tools, const Json& kwargs, bool objects) const;

  std::string source_, bos_, eos_;
  ChatTemplate template_;
  ToolSyntax tools_;
  bool reasons_, knows_tools_;
  bool objects_ = false;  // it wants the arguments of calls as objects, not as text
};

// Whether a reply to this prompt begins inside of <think>, because the template opened it.
bool opens_reasoning(std::string_view prompt);

// What the reply must be: a form, or calls. Nothing if it may be anything. With `reasoning`, it comes behind
// </think>. ApiError (400) for a schema that is not understood.
std::optional<grammar::Grammar> reply_grammar(const ResponseForm& form, const ChatRequest* chat,
                                              const ToolSyntax& syntax, bool reasoning);

struct ToolCall {
  std::string name, arguments;  // JSON, as the model wrote it
};

// A reply's text as it comes, taken apart. Text is passed on as soon as it cannot be the beginning of a mark.
class ReplyParser {
 public:
  struct Options {
    bool reasons = false;               // <think> is a mark
    bool reasoning = false;             // the reply begins inside of it
    const ToolSyntax* tools = nullptr;  // calls are looked for
    std::vector<Tool> known{};          // that may be called, bare
  };
  struct Parts {
    std::string content, reasoning;
    std::vector<ToolCall> calls;
    bool empty() const { return content.empty() && reasoning.empty() && calls.empty(); }
  };
  explicit ReplyParser(Options options);

  Parts push(std::string_view piece);
  // The rest. Calls that were begun and are none are content.
  Parts finish();

 private:
  enum class State : uint8_t { beginning, reasoning, behind_reasoning, content, calls, bare };
  bool advance(Parts& parts, bool last);
  bool read_call(Parts& parts);
  bool read_bare(Parts& parts) const;
  // Moves text to `out` up to `mark`, which vanishes; without it, up to what may begin it.
  bool pass_until(std::string_view mark, std::string& out, bool last);

  Options options_;
  State state_;
  std::string held_;
};

}  // namespace latente
