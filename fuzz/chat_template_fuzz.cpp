// Whatever the template is, it is refused with Error, or renders within its limits, twice the same way.
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "tokenizer/chat_template.h"

namespace {

const nlohmann::ordered_json& context() {
  static const auto json = nlohmann::ordered_json::parse(R"({
    "messages": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi\né"},
                 {"role": "assistant", "content": null,
                  "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1.5}}}]}],
    "tools": [{"function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}}],
    "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": true, "n": 3, "s": "a,b c", "xs": [3, "x", null],
    "d": {"a": [1], "b": "z"}})");
  return json;
}

// An error of rendering, or the text.
std::string outcome(const latente::ChatTemplate& program) {
  latente::ChatTemplate::Limits limits;
  limits.steps = 100'000;
  limits.memory_bytes = 16 << 20;
  limits.output_bytes = 1 << 20;
  try {
    std::string text = program.render(context(), limits);
    if (text.size() > limits.output_bytes) std::abort();
    return text;
  } catch (const latente::Error& error) {
    return error.what();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string source(reinterpret_cast<const char*>(data), size);
  try {
    latente::ChatTemplate program(source);
    std::string first = outcome(program);
    if (source.find("strftime_now") == source.npos && outcome(program) != first) std::abort();
  } catch (const latente::Error&) {
  }
  return 0;
}
