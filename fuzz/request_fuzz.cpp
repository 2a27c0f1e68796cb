// Whatever a client sends, it is refused with an Error of status 400, or becomes a request within its limits,
// a prompt, and a grammar of the reply; and whatever a reply is, cutting it into pieces changes none of its
// parts. Bytes that are not JSON choose mutations of requests instead.
#include <cstdint>
#include <string>

#include "grammar/automaton.h"
#include "json_mutations.h"
#include "serve/reply_parser.h"
#include "support.h"

namespace {

using namespace latente;

const char* const bodies[] = {
    R"({"messages":[{"role":"system","content":"s"},{"role":"user","content":[{"type":"text","text":"é"}]}],"n":2,"stop":["a"],"temperature":0.5,"logit_bias":{"3":-5},"stream":true,"stream_options":{"include_usage":true},"logprobs":true,"top_logprobs":2})",
    R"({"messages":[{"role":"user","content":"x"},{"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function","function":{"name":"f","arguments":"{\"a\": 1}"}}]},{"role":"tool","tool_call_id":"1","content":"2"}],"tools":[{"type":"function","function":{"name":"f","description":"d","parameters":{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]}}}],"tool_choice":"required"})",
    R"({"messages":[{"role":"user","content":"x"}],"response_format":{"type":"json_schema","json_schema":{"name":"n","schema":{"type":"object","properties":{"b":{"enum":["x",1]}}}}},"max_completion_tokens":9,"seed":-1,"chat_template_kwargs":{"thinking":true}})",
    R"({"prompt":["a",[1,2,3]],"max_tokens":0,"echo":true,"logprobs":2,"top_p":0.0,"top_k":-1,"min_p":0.1,"presence_penalty":1,"frequency_penalty":-1,"best_of":1,"suffix":null})"};

const ChatFormat& format(unsigned which) {
  static const ChatFormat formats[] = {
      {"{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] "
       "%}{{ c.function.arguments }}{% endfor %}{% endfor %}<think>\n{# <｜tool▁call▁begin｜> ```json #}",
       "<s>", "</s>"},
      {"{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% "
       "endfor %}"
       "{% endfor %}{% for t in tools or [] %}<tool_call>{{ t | tojson }}{% endfor %}",
       "", ""},
      {"{{ messages | tojson }}", "", ""}};
  return formats[which % std::size(formats)];
}

void check(const GenerationSettings& settings) {
  const RequestLimits limits;
  require(settings.choices >= 1 && settings.choices <= limits.choices);
  require(settings.options.top_logprobs >= -1 && settings.options.top_logprobs <= limits.top_logprobs);
  require(!settings.max_tokens || (*settings.max_tokens >= 0 && *settings.max_tokens <= limits.max_tokens));
  for (const std::string& stop : settings.stop) require(!stop.empty());
  settings.options.sampling.validate();
}

template <class Run>
void refusing(Run run) {
  try {
    run();
  } catch (const ApiError& error) {
    require(error.status == 400 && error.what()[0] != '\0');
  } catch (const Error& error) {  // of grammars that match nothing
    require(error.what()[0] != '\0');
  }
}

ReplyParser::Parts parts_of(const ReplyParser::Options& options, std::string_view text, size_t piece) {
  ReplyParser parser(options);
  ReplyParser::Parts all;
  for (size_t at = 0; at < text.size(); at += piece) all.add(parser.push(text.substr(at, piece)));
  all.add(parser.finish());
  return all;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  unsigned seed = 1;
  for (size_t i = 0; i < size; ++i) seed = seed * 31 + data[i];
  const ChatFormat& chat_format = format(seed);

  for (bool open : {false, true}) {
    const ReplyParser::Options options{true, open, &chat_format.tools(), {{"f", "{}"}}};
    const ReplyParser::Parts whole = parts_of(options, text, size + 1),
                             cut = parts_of(options, text, 1 + seed % 5);
    require(whole.content == cut.content && whole.reasoning == cut.reasoning &&
            whole.calls.size() == cut.calls.size());
    for (size_t i = 0; i < whole.calls.size(); ++i)
      require(whole.calls[i].name == cut.calls[i].name && whole.calls[i].arguments == cut.calls[i].arguments);
  }

  refusing([&] { parse_body(text); });
  if (!nlohmann::json::accept(text)) {
    if (size < 2) return 0;
    JsonMutations mutations(seed);
    nlohmann::json body = nlohmann::json::parse(bodies[data[0] % std::size(bodies)]);
    const nlohmann::json other = nlohmann::json::parse(bodies[data[1] % std::size(bodies)]);
    for (int i = data[1] / 32; i >= 0; --i) mutations.apply(body, other);
    text = body.dump();
  }
  refusing([&] { check(read_completion(parse_body(text), {}).settings); });
  refusing([&] {
    const ChatRequest request = read_chat(parse_body(text), {});
    check(request.settings);
    const std::string prompt = chat_format.prompt(request);
    const auto rules =
        reply_grammar(request.settings.form, &request, chat_format.tools(), opens_reasoning(prompt));
    if (rules) const grammar::Automaton automaton(*rules);
    if (request.tool_choice.kind != ToolChoice::Kind::automatic) return;
    for (const OpenedCall& opened : opened_calls(request, chat_format.tools()))
      const grammar::Automaton automaton(opened.grammar);
  });
  return 0;
}
