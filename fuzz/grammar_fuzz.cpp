// Whatever the text is, parse_gbnf and Automaton refuse it with Error, or tokens can be read under it: masks
// say what accept does, accepted tokens leave a way on or an end, and copies stand where they stood.
#include <cstdint>
#include <string_view>

#include "base/error.h"
#include "grammar/gbnf.h"
#include "grammar_walk.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 4) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 4, size - 4);
  std::shared_ptr<const latente::grammar::Automaton> automaton;
  try {
    automaton = std::make_shared<const latente::grammar::Automaton>(latente::grammar::parse_gbnf(text));
  } catch (const latente::Error& error) {
    require(error.what()[0] != '\0');
    return 0;
  }
  // Without more than small repetitions, the sizes of what is compiled follow the text's.
  if (text.find('{') == text.npos) require(automaton->states() <= 64 * (size + 1));
  walk_tokens(automaton, data[0] | data[1] << 8 | data[2] << 16);
  return 0;
}
