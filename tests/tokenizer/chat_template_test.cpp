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
