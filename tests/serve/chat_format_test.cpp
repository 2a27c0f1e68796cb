#include "serve/chat_format.h"

#include <gtest/gtest.h>

#include "base/file.h"
#include "grammar/matcher.h"
#include "infer/grammar_constraint.h"
#include "serve/reply_parser.h"

namespace latente {
namespace {

std::string source(const std::string& name) { return read_file(LATENTE_TEST_DATA "/templates/" + name); }

const std::string hermes = "{% for m in messages %}{{ m.content }}{% endfor %}{# <tool_call> #}";

TEST(ChatFormat, KnowsTemplates) {
  EXPECT_FALSE(ChatFormat(source("deepseek_v3.jinja"), "", "").reasons());
  EXPECT_TRUE(ChatFormat(source("deepseek_r1_style.jinja"), "", "").reasons());
  EXPECT_EQ(ChatFormat(source("llama3_style.jinja"), "", "").tools().kind, ToolSyntax::Kind::bare);
  EXPECT_TRUE(opens_reasoning("...<think>\n"));
  EXPECT_FALSE(opens_reasoning("...<think></think>"));
}

ChatRequest request(const std::string& choice, const std::string& kwargs = "{}") {
  ChatRequest request;
  read_conversation(parse_body(R"({"messages": [{"role": "user", "content": "Hi"}], "tools": [
      {"type": "function", "function": {"name": "f", "description": "Does it", "parameters": {"type": "object",
          "properties": {"z": {"type": "integer"}, "a": {"enum": [1, 2]}}, "required": ["z"]}}}], "tool_choice": )" +
                               choice + R"(, "chat_template_kwargs": )" + kwargs + "}"),
                    request);
  return request;
}

TEST(ChatFormat, ToolsAreInThePrompt) {
  for (const char* name : {"deepseek_v3.jinja", "deepseek_v31_style.jinja", "llama3_style.jinja"}) {
    const ChatFormat format(source(name), "<s>", "</s>");
    EXPECT_NE(format.prompt(request("\"auto\"")).find("Does it"), std::string::npos) << name;
    EXPECT_EQ(format.prompt(request("\"none\"")).find("Does it"), std::string::npos) << name;
  }
  const ChatFormat v31(source("deepseek_v31_style.jinja"), "<s>", "</s>");
  EXPECT_TRUE(opens_reasoning(v31.prompt(request("\"none\"", R"({"thinking": true})"))));
  EXPECT_FALSE(opens_reasoning(v31.prompt(request("\"none\""))));
}

// A call and its result, as clients send them back.
std::string called_before(const std::string& templ, const std::string& content = "null") {
  ChatRequest chat;
  read_conversation(parse_body(R"({"messages": [{"role": "user", "content": "Hi"},
      {"role": "assistant", "content": )" +
                               content +
                               R"(, "tool_calls": [{"id": "abc456789", "type": "function",
          "function": {"name": "f", "arguments": "{\"z\": 5}"}}]},
      {"role": "tool", "tool_call_id": "abc456789", "content": "fine"}, {"role": "user", "content": "Thanks"}]})"),
                    chat);
  return ChatFormat(templ, "", "").prompt(chat);
}

TEST(ChatFormat, CallsGoBackAsTemplatesTakeThem) {
  const std::string turns = "{% for m in messages %}[{{ m.role }}]",
                    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}", end = "{% endfor %}";
  const std::vector<std::pair<std::string, std::string>> cases = {
      // Arguments as they came, as JSON of an object, piece by piece.
      {turns + "{{ m.content or '' }}" + calls + "{{ c.function.arguments }}" + end + end,
       "[user]Hi[assistant]f{\"z\": 5}[tool]fine[user]Thanks"},
      {turns + "{{ m.content or '' }}" + calls + "{{ c.function.arguments | tojson }}" + end + end,
       "[user]Hi[assistant]f{\"z\": 5}[tool]fine[user]Thanks"},
      {turns + "{{ m.content or '' }}" + calls +
           "{% for k, v in c.function.arguments.items() %}({{ k }} {{ v }})" + end + end + end,
       "[user]Hi[assistant]f(z 5)[tool]fine[user]Thanks"},
      // No content is an empty text to some, and to others it is not.
      {turns + "{{ m.content.strip() }}" + calls + "{{ c.function.arguments }}" + end + end,
       "[user]Hi[assistant]f{\"z\": 5}[tool]fine[user]Thanks"},
      {turns + "{{ m.content }}" + calls + "{{ c.function.arguments }}" + end + end,
       "[user]Hi[assistant]f{\"z\": 5}[tool]fine[user]Thanks"},
      {turns + "{% if m.content is none %}" + calls + "{{ c.function.arguments }}" + end +
           "{% else %}{{ m.content }}{% endif %}" + end,
       "[user]Hi[assistant]f{\"z\": 5}[tool]fine[user]Thanks"},
      // Nothing is known of calls: they and their results are text, in turns.
      {turns + "{{ m.content }}" + end,
       "[user]Hi[assistant]{\"name\": \"f\", \"arguments\": {\"z\": 5}}[user]f returned:\nfine\n\nThanks"}};
  for (const auto& [templ, prompt] : cases) {
    EXPECT_EQ(called_before(templ), prompt) << templ;
    EXPECT_EQ(called_before(templ, "\"\""), prompt) << templ;
  }
  EXPECT_EQ(called_before(hermes, "\"Well\""),
            "HiWell\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"z\": 5}}\n</tool_call>f "
            "returned:\nfine\n\nThanks");
}

TEST(ChatFormat, InstructionsReachTemplatesWithoutSystemMessages) {
  const ChatFormat format(
      "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
      "[{{ m.role }}]{{ m.content }}{% endfor %}",
      "", "");
  const std::string prompt = format.prompt(request("\"auto\""));
  EXPECT_TRUE(prompt.starts_with("[user]You may call")) << prompt;
  EXPECT_TRUE(prompt.ends_with("\n\nHi")) << prompt;
}

// What a grammar admits of a text, byte by byte.
bool admits(const grammar::Grammar& rules, const std::string& text) {
  std::vector<std::string> bytes(257);
  for (size_t i = 0; i < 256; ++i) bytes[i] = std::string(1, static_cast<char>(i));
  grammar::Matcher matcher(std::make_shared<grammar::TokenGrammar>(
      std::make_shared<grammar::Automaton>(rules),
      std::make_shared<grammar::Vocabulary>(bytes, std::vector<int32_t>{256})));
  return matcher.accept_text(text) && matcher.can_end();
}

TEST(ReplyGrammar, RequiredCallsParseAsCalls) {
  const ChatFormat v3(source("deepseek_v3.jinja"), "", ""), qwen(hermes, "", ""),
      llama(source("llama3_style.jinja"), "", "");
  const ChatRequest chat = request("\"required\"");
  const std::vector<std::pair<const ChatFormat*, std::string>> cases = {
      {&v3,
       "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"z\": "
       "5}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"},
      {&qwen, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"z\": 5, \"a\": 2}}\n</tool_call>"},
      {&llama, "{\"name\": \"f\", \"arguments\": {\"z\": 5}}"}};
  for (const auto& [format, text] : cases) {
    const auto rules = reply_grammar({}, &chat, format->tools(), false);
    ASSERT_TRUE(rules);
    EXPECT_TRUE(admits(*rules, text)) << text;
    EXPECT_FALSE(admits(*rules, "Hello"));
    ReplyParser parser({.tools = &format->tools(), .known = chat.tool_list});
    ReplyParser::Parts parts;
    parts.add(parser.push(text));
    parts.add(parser.finish());
    ASSERT_EQ(parts.calls.size(), 1U) << text;
    EXPECT_EQ(parts.calls[0].name, "f");
    EXPECT_EQ(parts.content, "");
  }
}

TEST(ReplyGrammar, CallsThatAReplyOpens) {
  const ChatFormat v3(source("deepseek_v3.jinja"), "", ""), qwen(hermes, "", ""),
      llama(source("llama3_style.jinja"), "", "");
  ChatRequest chat = request("\"auto\"");
  chat.tool_list.push_back({"g", R"({"type": "object", "not understood": 1, "minProperties": "x"})"});
  const std::string v3_call = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
                    v3_end = "\n```<｜tool▁call▁end｜>";
  std::vector<OpenedCall> opened = opened_calls(chat, v3.tools());
  ASSERT_EQ(opened.size(), 1U);
  EXPECT_EQ(opened[0].mark, "<｜tool▁calls▁begin｜>");
  for (const char* between : {"", "\n"})
    EXPECT_TRUE(admits(opened[0].grammar, opened[0].mark + v3_call + "f\n```json\n{\"z\": 5}" + v3_end +
                                              between + v3_call + "g\n```json\n{\"any\": [1]}" + v3_end +
                                              "<｜tool▁calls▁end｜>"));
  EXPECT_FALSE(admits(opened[0].grammar, opened[0].mark + v3_call + "f\n```json\n{\"z\": \"x\"}" + v3_end +
                                             "<｜tool▁calls▁end｜>"));
  opened = opened_calls(chat, qwen.tools());
  ASSERT_EQ(opened.size(), 1U);
  EXPECT_EQ(opened[0].mark, "<tool_call>");
  EXPECT_TRUE(
      admits(opened[0].grammar, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"z\": 5}}\n</tool_call>"));
  opened = opened_calls(chat, llama.tools());
  ASSERT_EQ(opened.size(), 2U);
  EXPECT_EQ(opened[1].mark, "{\"name\": \"g\", \"arguments\": ");
  EXPECT_TRUE(admits(opened[1].grammar, opened[1].mark + "{\"any\": {}}}"));
  EXPECT_FALSE(admits(opened[1].grammar, opened[0].mark + "{\"z\": 5}}"));
}

TEST(ReplyGrammar, ComesBehindReasoning) {
  const ResponseForm form{ResponseForm::Kind::json_schema, R"({"enum": ["a"]})"};
  const auto rules = reply_grammar(form, nullptr, {}, true);
  EXPECT_TRUE(admits(*rules, "Is 1 < 2? <b>, <<.</think>\n\n\"a\""));
  EXPECT_TRUE(admits(*rules, "<</think>\"a\""));
  EXPECT_FALSE(admits(*rules, "\"a\""));
  EXPECT_FALSE(admits(*rules, "</think>\"b\""));
  EXPECT_TRUE(admits(*reply_grammar(form, nullptr, {}, false), "\"a\""));
  EXPECT_FALSE(reply_grammar({}, nullptr, {}, true));
  EXPECT_THROW(reply_grammar({ResponseForm::Kind::json_schema, R"({"type": "king"})"}, nullptr, {}, false),
               ApiError);
}

}  // namespace
}  // namespace latente
