// Whatever the bytes are, parse_json_schema refuses them with Error, or a grammar comes of them under which
// tokens can be read; what has been read to its end is JSON. Bytes that are not JSON choose mutations of
// schemas instead.
#include <cstdint>
#include <string>

#include "base/error.h"
#include "grammar/json_schema.h"
#include "grammar_walk.h"
#include "json_mutations.h"

namespace {

const char* const schemas[] = {
    R"({"type":"object","properties":{"a":{"type":"integer","minimum":-5,"maximum":120},"b":{"type":"string","minLength":1,"maxLength":9}},"required":["a"],"additionalProperties":{"type":"boolean"}})",
    R"({"anyOf":[{"$ref":"#/$defs/a"},{"type":"array","items":{"$ref":"#"},"minItems":1,"maxItems":70}],"$defs":{"a":{"type":"string","pattern":"^(ab|c[d-f]){1,3}\\d*$"}}})",
    R"({"allOf":[{"properties":{"x":{"enum":[1,"a",null,{"k":[1]}]}}},{"properties":{"x":{"type":["string","integer"]},"y":{"const":2}},"required":["x"]}],"minProperties":1})",
    R"({"type":"array","prefixItems":[{"type":"number","exclusiveMinimum":0.5,"maximum":1e3},{"format":"date-time"}],"items":false})",
    R"({"properties":{"next":{"oneOf":[{"$ref":"#"},{"type":"null"}]},"é\"":true},"required":["next","z"],"definitions":{"q":{}}})",
    R"({"type":["string","null","boolean","number"],"format":"uuid","multipleOf":1,"exclusiveMaximum":true,"maximum":7})",
    R"({"type":"object","properties":{"k":{"enum":["a","b",3]},"v":{"type":"integer","multipleOf":3,"maximum":99}},"if":{"properties":{"k":{"const":"a"}},"required":["k"]},"then":{"required":["v"]},"else":{"not":{"required":["v"]}},"dependentRequired":{"v":["k"]}})",
    R"({"type":"object","patternProperties":{"^x-":{"type":"number","multipleOf":0.25},"y$":{"type":"boolean"}},"properties":{"s":{"type":"array","items":{"enum":[1,"2",null]},"uniqueItems":true}},"additionalProperties":false})",
    R"({"type":"string","pattern":"^[a-c]+(-[0-9]{2})?$","minLength":2,"maxLength":7,"not":{"anyOf":[{"const":"abc"},{"pattern":"cc"}]},"allOf":[{"pattern":"a"},{"format":"hostname"}]})"};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  unsigned seed = 1;
  for (std::size_t i = 0; i < size; ++i) seed = seed * 31 + data[i];
  if (!nlohmann::json::accept(text)) {
    if (size < 2) return 0;
    JsonMutations mutations(seed);
    nlohmann::json schema = nlohmann::json::parse(schemas[data[0] % std::size(schemas)]);
    const nlohmann::json other = nlohmann::json::parse(schemas[data[1] % std::size(schemas)]);
    for (int i = data[1] / 32; i >= 0; --i) mutations.apply(schema, other);
    text = schema.dump();
  }
  std::shared_ptr<const latente::grammar::Automaton> automaton;
  try {
    automaton =
        std::make_shared<const latente::grammar::Automaton>(latente::grammar::parse_json_schema(text));
  } catch (const latente::Error& error) {
    require(error.what()[0] != '\0');
    return 0;
  }
  const Walked walked = walk_tokens(automaton, seed);
  if (walked.whole) require(nlohmann::json::accept(walked.text));
  return 0;
}
