// Chat templates against outputs recorded from jinja2 in transformers' environment (compare_with_jinja2.py
// records them), and against their limits.
#include "tokenizer/chat_template.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "base/error.h"

namespace latente {
namespace {

using Json = nlohmann::ordered_json;

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file) << path;
  return {std::istreambuf_iterator<char>(file), {}};
}

std::string template_source(const Json& request) {
  if (request.contains("source")) return request["source"];
  return read(LATENTE_TEST_DATA "/templates/" + request["file"].get<std::string>());
}

// {"text": ...} or {"error": ...}
Json answer(const Json& request) {
  try {
    return {{"text", ChatTemplate(template_source(request)).render(request["context"])}};
  } catch (const Error& error) {
    return {{"error", error.what()}};
  }
}

TEST(ChatTemplate, EqualsRecordedOutputs) {
  const Json cases = Json::parse(read(LATENTE_TEST_DATA "/templates/recorded.json"));
  ASSERT_GT(cases.size(), 200U);
  for (const Json& recorded : cases) {
    const Json got = answer(recorded);
    const std::string shown = recorded.value("file", "") + recorded.value("source", "");
    if (recorded.contains("text")) {
      EXPECT_EQ(got.value("text", got.dump()), recorded["text"].get<std::string>()) << shown;
    } else {
      EXPECT_TRUE(got.contains("error")) << shown << "\nrendered " << got.dump();
    }
  }
}

std::string error_of(const std::string& source, const ChatTemplate::Limits& limits = {}) {
  try {
    ChatTemplate(source).render(Json::parse(R"({"s": "abc"})"), limits);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(ChatTemplate, ErrorsNameTheLine) {
  EXPECT_EQ(error_of("\n\n{{ raise_exception('no') }}"), "chat template, line 3: no");
  EXPECT_EQ(error_of("a\n{{ x.y }}"), "chat template, line 2: 'x' is undefined");
  EXPECT_TRUE(error_of("\n{% if %}").starts_with("chat template, line 2: "));
  EXPECT_TRUE(error_of("\n{{ 1 +\n 'a' }}").starts_with("chat template, line 2: "));
}

TEST(ChatTemplate, StaysWithinLimits) {
  const std::string loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
  EXPECT_NE(error_of(loops, {.steps = 100'000}).find("steps"), std::string::npos);
  EXPECT_NE(error_of(loops, {.seconds = 0.01}).find("seconds"), std::string::npos);
  const std::string doubling =
      "{% set ns = namespace(t='x') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}";
  EXPECT_NE(error_of(doubling, {.memory_bytes = 1 << 20}).find("memory"), std::string::npos);
  EXPECT_NE(error_of("{{ 'x' * 100000000000 }}").find("memory"), std::string::npos);
  EXPECT_NE(error_of("{{ 'x' * 5000 }}", {.output_bytes = 4096}).find("output"), std::string::npos);
  EXPECT_NE(error_of("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").find("nested"), std::string::npos);
  EXPECT_NE(
      error_of("{{ " + std::string(100'000, '(') + "1" + std::string(100'000, ')') + " }}").find("nested"),
      std::string::npos);
  std::string chain = "{{ s";
  for (int i = 0; i < 100'000; ++i) chain += ".a";
  EXPECT_NE(error_of(chain + " }}").find("nested"), std::string::npos);
}

TEST(ChatTemplate, RendersMessages) {
  const ChatTemplate program(
      "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
      "{% if add_generation_prompt %}<a>{% endif %}");
  const std::vector<ChatMessage> messages = {{"user", "hi"}, {"assistant", "yo"}};
  EXPECT_EQ(program.render(messages, true, "^"), "^<user>hi<assistant>yo<a>");
  EXPECT_THROW(program.render(Json::array()), Error);
  EXPECT_THROW(program.render(Json{{"s", "\xff"}}), Error);
}

// The C++ half of compare_with_jinja2.py: answers a file of requests.
TEST(ChatTemplateOracle, AnswersRequests) {
  const char* requests = std::getenv("LATENTE_TEMPLATE_REQUESTS");
  const char* answers = std::getenv("LATENTE_TEMPLATE_ANSWERS");
  if (!requests || !answers) GTEST_SKIP() << "for tests/tokenizer/compare_with_jinja2.py";
  Json out = Json::array();
  for (const Json& request : Json::parse(read(requests))) out.push_back(answer(request));
  std::ofstream(answers) << out.dump();
}

}  // namespace
}  // namespace latente
