// From a reply's text to content, reasoning and calls of tools: the way back of chat_format.h.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "serve/chat_format.h"

namespace latente {

struct ToolCall {
  std::string name, arguments;  // JSON, as the model wrote it
};

// Takes a reply apart as it comes. Text is passed on as soon as it cannot be the beginning of a mark,
// arguments of calls too.
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
    std::vector<ToolCall> calls;  // one without a name goes on with the arguments of the one before
    bool empty() const { return content.empty() && reasoning.empty() && calls.empty(); }
    void add(const Parts& more);
  };
  explicit ReplyParser(Options options);

  Parts push(std::string_view piece);
  // The rest. Calls that have not come as far as their arguments are content.
  Parts finish();

 private:
  enum class State : uint8_t { beginning, reasoning, behind_reasoning, content, calls, arguments, bare };
  // {"name": NAME, "arguments": up to the object there.
  struct Head {
    std::string name;
    size_t size;
  };
  static std::optional<Head> read_head(std::string_view text);
  // Where a JSON object ends that comes in pieces.
  class ObjectEnd {
   public:
    size_t pass(std::string_view piece);  // bytes of it that belong to the object

   private:
    int64_t depth_ = 0;
    bool in_string_ = false, escaped_ = false, ended_ = false;
  };

  bool advance(Parts& parts, bool last);
  bool begin_call(Parts& parts);
  bool begin_bare(Parts& parts, bool last);
  bool go_on_with_call(Parts& parts, bool last);
  bool read_call(Parts& parts);
  bool read_bare(Parts& parts) const;
  // Moves text to `out` up to `mark`, which vanishes; without it, up to what may begin it.
  bool pass_until(std::string_view mark, std::string& out, bool last);

  Options options_;
  State state_;
  std::string held_;
  std::string spaces_;  // of the arguments, that may be their end
  ObjectEnd end_;
};

}  // namespace latente
