#include "serve/reply_parser.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <tuple>

#include "base/file.h"

namespace latente {
namespace {

std::string source(const std::string& name) { return read_file(LATENTE_TEST_DATA "/templates/" + name); }

const std::string hermes = "{% for m in messages %}{{ m.content }}{% endfor %}{# <tool_call> #}";

ReplyParser::Parts whole(const ReplyParser::Options& options, std::string_view text) {
  ReplyParser parser(options);
  ReplyParser::Parts parts;
  parts.add(parser.push(text));
  parts.add(parser.finish());
  return parts;
}

// However a text is cut into pieces, its parts are the same.
ReplyParser::Parts parsed(const ReplyParser::Options& options, std::string_view text) {
  const ReplyParser::Parts expected = whole(options, text);
  std::minstd_rand random(1);
  for (int trial = 0; trial < 20; ++trial) {
    ReplyParser parser(options);
    ReplyParser::Parts parts;
    for (size_t at = 0; at < text.size();) {
      const size_t count = trial == 0 ? 1 : 1 + random() % 9;
      parts.add(parser.push(text.substr(at, count)));
      at += count;
    }
    parts.add(parser.finish());
    EXPECT_EQ(parts.content, expected.content);
    EXPECT_EQ(parts.reasoning, expected.reasoning);
    EXPECT_EQ(parts.calls.size(), expected.calls.size());
    for (size_t i = 0; i < std::min(parts.calls.size(), expected.calls.size()); ++i) {
      EXPECT_EQ(parts.calls[i].name, expected.calls[i].name);
      EXPECT_EQ(parts.calls[i].arguments, expected.calls[i].arguments);
    }
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
  EXPECT_EQ(parts.calls[0].arguments, "{\"a\": \"x\"}");
  EXPECT_EQ(parts.calls[1].name, "g");

  // In an order that cannot be read as it comes, and arguments as a text.
  parts = parsed({.tools = &qwen.tools()},
                 "<tool_call>{\"arguments\": {\"a\": 1}, \"name\": \"f\"}</tool_call><tool_call>"
                 "{\"name\": \"g\", \"arguments\": \"{}\"}</tool_call>");
  ASSERT_EQ(parts.calls.size(), 2U);
  EXPECT_EQ(parts.calls[0].arguments, "{\"a\":1}");
  EXPECT_EQ(parts.calls[1].arguments, "{}");

  // What is cut short in its arguments is a call; before them it stays text.
  parts = parsed({.tools = &v3.tools()},
                 "x" + calls + call + "function" + separator + "f\n```json\n{\"a\": \"}\\\" \n``");
  ASSERT_EQ(parts.calls.size(), 1U);
  EXPECT_EQ(parts.calls[0].arguments, "{\"a\": \"}\\\"");
  EXPECT_EQ(parts.content, "x");
  parts = parsed({.tools = &v3.tools()}, "x" + calls + call + "function" + separator + "f");
  EXPECT_TRUE(parts.calls.empty());
  EXPECT_EQ(parts.content, "x" + calls + call + "function" + separator + "f");
}

TEST(ReplyParser, ArgumentsComeAsTheyAreWritten) {
  const ChatFormat v3(source("deepseek_v3.jinja"), "", ""), qwen(hermes, "", "");
  const ToolSyntax bare;
  const std::string head = "{\"name\": \"f\", \"arguments\": ";
  const std::vector<std::tuple<const ToolSyntax*, std::string, std::string>> forms = {
      {&v3.tools(), "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n",
       "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"},
      {&qwen.tools(), "<tool_call>\n" + head, "}\n</tool_call>"},
      {&bare, head, "}"}};
  for (const auto& [tools, begin, end] : forms) {
    ReplyParser parser({.tools = tools, .known = {{"f", "{}"}}});
    ReplyParser::Parts first = parser.push(begin + "{\"a");
    ASSERT_EQ(first.calls.size(), 2U) << begin;
    EXPECT_EQ(first.calls[0].name, "f");
    EXPECT_EQ(first.calls[1].arguments, "{\"a");
    ReplyParser::Parts next = parser.push("\": {}, \"b\": 1");
    ASSERT_EQ(next.calls.size(), 1U);
    EXPECT_EQ(next.calls[0].name, "");
    EXPECT_EQ(next.calls[0].arguments, "\": {}, \"b\": 1");
    next = parser.push("}" + end);
    ASSERT_EQ(next.calls.size(), 1U);
    EXPECT_EQ(next.calls[0].arguments, "}");
    EXPECT_TRUE(parser.finish().empty());
  }
}

TEST(ReplyParser, BareCalls) {
  const ToolSyntax bare;
  const ReplyParser::Options options{.tools = &bare, .known = {{"f", "{}"}}};
  ReplyParser::Parts parts = parsed(options, " {\"name\": \"f\", \"parameters\": {\"a\": 1}}\n");
  ASSERT_EQ(parts.calls.size(), 1U);
  EXPECT_EQ(parts.calls[0].arguments, "{\"a\": 1}");
  EXPECT_EQ(parts.content, "");
  for (const std::string text : {"{\"name\": \"g\"}", "{\"name\": 5}", "{\"a\": 1}", "{", "[]", "[1]", "{} x",
                                 "plain {\"name\": \"f\"}"}) {
    parts = parsed(options, text);
    EXPECT_TRUE(parts.calls.empty()) << text;
    EXPECT_EQ(parts.content, text);
  }
}

}  // namespace
}  // namespace latente
