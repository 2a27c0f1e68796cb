// Chat templates: the Jinja programs in tokenizer_config.json that turn a conversation into a prompt.
//
// Renders what Python's jinja2 renders in the environment that transformers sets up for chat templates
// (ImmutableSandboxedEnvironment, trim_blocks, lstrip_blocks, loop controls, raise_exception, strftime_now,
// tojson without HTML escapes). Supported: set, for, if, macro, call, filter, with, generation, break,
// continue, raw, comments; not supported: include, import, extends, block, autoescape, recursive loops,
// formatting with % and format(), and filters that published chat templates do without (groupby, batch, ...).
// A template can read nothing but its context; every error is an Error whose message has the template's line.
#pragma once

#include <cstddef>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>

namespace latente {

struct ChatMessage {
  std::string role, content;
};

namespace jinja {
class Program;

// What one rendering may use; beyond it, rendering fails with an Error.
struct Limits {
  size_t steps = 20'000'000;        // evaluated nodes, elements passed, and 256-byte pieces of text handled
  size_t memory_bytes = 512 << 20;  // text alive, and every container ever made
  size_t output_bytes = 64 << 20;
  size_t depth = 400;  // nested evaluations, macro calls included; at most 1 KB of stack or so for each
  double seconds = 10;
};
}  // namespace jinja

class ChatTemplate {
 public:
  using Limits = jinja::Limits;

  // Throws Error ("chat template, line 3: ...") on syntax that Jinja would reject or that is not supported.
  explicit ChatTemplate(std::string_view source);
  ~ChatTemplate();
  ChatTemplate(ChatTemplate&&) noexcept;
  ChatTemplate& operator=(ChatTemplate&&) noexcept;

  // context: an object with messages, add_generation_prompt, bos_token, eos_token, tools, and any other
  // variable. nlohmann::json sorts keys; ordered_json keeps the order of tool schemas that `tools | tojson`
  // writes out, as Python's dict does. Thread-safe: renderings share nothing that changes.
  std::string render(const nlohmann::json& context, const Limits& limits = {}) const;
  std::string render(const nlohmann::ordered_json& context, const Limits& limits = {}) const;
  std::string render(std::span<const ChatMessage> messages, bool add_generation_prompt,
                     const std::string& bos_token = "", const std::string& eos_token = "") const;

 private:
  std::unique_ptr<const jinja::Program> program_;
};

}  // namespace latente
