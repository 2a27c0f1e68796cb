#include "serve/chat_format.h"

#include <gtest/gtest.h>

#include <random>

#include "base/file.h"
#include "grammar/matcher.h"
#include "infer/grammar_constraint.h"

namespace latente {
namespace {

std::string source(const std::string& name) { return read_file(LATENTE_TEST_DATA "/templates/" + name); }

const std::string hermes = "{% for m in messages %}{{ m.content }}{% endfor %}{# <tool_call> #}";

ReplyParser::Parts whole(const ReplyParser::Options& options, std::string_view text) {
  ReplyParser parser(options);
  ReplyParser::Parts parts = parser.push(text);
  const ReplyParser::Parts rest = parser.finish();
  parts.content += rest.content;
  parts.reasoning += rest.reasoning;
  parts.calls.insert(parts.calls.end(), rest.calls.begin(), rest.calls.end());
  return parts;
}

// However a text is cut into pieces, its parts are the same.
ReplyParser::Parts parsed(const ReplyParser::Options& options, std::string_view text) {
  const ReplyParser::Parts expected = whole(options, text);
  std::minstd_rand random(1);
  for (int trial = 0; trial < 20; ++trial) {
    ReplyParser parser(options);
    ReplyParser::Parts parts;
    const auto take = [&](const ReplyParser::Parts& more) {
      parts.content += more.content;
      parts.reasoning += more.reasoning;
      for (const ToolCall& call : more.calls) parts.calls.push_back(call);
    };
    for (size_t at = 0; at < text.size();) {
      const size_t count = trial == 0 ? 1 : 1 + random() % 9;
      take(parser.push(text.substr(at, count)));
      at += count;
    }
    take(parser.finish());
    EXPECT_EQ(parts.content, expected.content);
    EXPECT_EQ(parts.reasoning, expected.reasoning);
    EXPECT_EQ(parts.calls.size(), expected.calls.size());
  }
  return expected;
}

TEST(ReplyParser, Reasoning) {
  const ReplyParser::Options either{.reasons = true}, opened{.reasons = true, .reasoning = true};
  ReplyParser::Parts parts = parsed(either, "<think>\nWhy?</think>\n\nSo.");
  EXPECT_EQ(parts.reasoning, "\nWhy?");
  EXPECT_EQ(parts.content, "So.");
  parts = parsed(opened, "Why?</think>So. </think>");
  EXPECT_EQ(parts.reasoning, "Why?");
  EXPECT_EQ(parts.content, "So. </think>");
  parts = parsed(opened, "Why </thin");
  EXPECT_EQ(parts.reasoning, "Why </thin");
  EXPECT_EQ(parts.content, "");
  parts = parsed(either, "<thing> is no mark <think>");
  EXPECT_EQ(parts.content, "<thing> is no mark <think>");
  EXPECT_EQ(parts.reasoning, "");
  EXPECT_EQ(parsed({}, "<think>x</think>").content, "<think>x</think>");
  EXPECT_EQ(parsed(either, " \n").content, " \n");
  EXPECT_EQ(parsed(either, "").content, "");
}

TEST(ReplyParser, CallsInTheTemplatesForms) {
  const ChatFormat v3(source("deepseek_v3.jinja"), "", ""), qwen(hermes, "", "");
  const ChatFormat v31("{{ messages[0].content }}{# <｜tool▁call▁begin｜> #}", "", "");
  const std::string calls = "<｜tool▁calls▁begin｜>", call = "<｜tool▁call▁begin｜>",
                    separator = "<｜tool▁sep｜>", end = "<｜tool▁call▁end｜>",
                    all_end = "<｜tool▁calls▁end｜>";
  ReplyParser::Parts parts =
      parsed({.tools = &v3.tools()}, "Let me see.\n" + calls + call + "function" + separator +
                                         "f\n```json\n{\"a\": 1}\n```" + end + "\n" + call + "function" +
                                         separator + "g\n```json\n{}\n```" + end + all_end);
  EXPECT_EQ(parts.content, "Let me see.\n");
  ASSERT_EQ(parts.calls.size(), 2U);
  EXPECT_EQ(parts.calls[0].name, "f");
  EXPECT_EQ(parts.calls[0].arguments, "{\"a\": 1}");
  EXPECT_EQ(parts.calls[1].name, "g");

  parts = parsed({.reasons = true, .reasoning = true, .tools = &v31.tools()},
                 "Hm.</think>" + calls + call + "f" + separator + "{\"a\": 1}" + end + all_end);
  EXPECT_EQ(parts.reasoning, "Hm.");
  EXPECT_EQ(parts.content, "");
  ASSERT_EQ(parts.calls.size(), 1U);
  EXPECT_EQ(parts.calls[0].name, "f");
  EXPECT_EQ(parts.calls[0].arguments, "{\"a\": 1}");

  parts = parsed({.tools = &qwen.tools()},
                 "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": "
                 "\"x\"}}</tool_call>\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>");
  ASSERT_EQ(parts.calls.size(), 2U);
  EXPECT_EQ(parts.calls[0].arguments, "{\"a\":\"x\"}");
  EXPECT_EQ(parts.calls[1].name, "g");

  // What is none stays text.
  parts = parsed({.tools = &v3.tools()}, "x" + calls + call + "function" + separator + "f");
  EXPECT_TRUE(parts.calls.empty());
  EXPECT_EQ(parts.content, "x" + calls + call + "function" + separator + "f");
}

TEST(ReplyParser, BareCalls) {
  const ToolSyntax bare;
  const ReplyParser::Options options{.tools = &bare, .known = {{"f", "{}"}}};
  ReplyParser::Parts parts = parsed(options, " {\"name\": \"f\", \"parameters\": {\"a\": 1}}\n");
  ASSERT_EQ(parts.calls.size(), 1U);
  EXPECT_EQ(parts.calls[0].arguments, "{\"a\":1}");
  EXPECT_EQ(parts.content, "");
  for (const std::string text : {"{\"name\": \"g\"}", "{\"name\": 5}", "{\"a\": 1}", "{", "[]", "[1]", "{} x",
                                 "plain {\"name\": \"f\"}"}) {
    parts = parsed(options, text);
    EXPECT_TRUE(parts.calls.empty()) << text;
    EXPECT_EQ(parts.content, text);
  }
}

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
    const ReplyParser::Parts parts = parsed({.tools = &format->tools(), .known = chat.tool_list}, text);
    ASSERT_EQ(parts.calls.size(), 1U) << text;
    EXPECT_EQ(parts.calls[0].name, "f");
    EXPECT_EQ(parts.content, "");
  }
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
