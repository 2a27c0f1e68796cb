// What the Python package `tokenizers` makes of small tokenizers and hostile text (record_cases.py).
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/file.h"
#include "tokenizer/tokenizer.h"

namespace latente {
namespace {

class Recorded : public testing::TestWithParam<const char*> {};

TEST_P(Recorded, IdsAndTextsAreThePackages) {
  const auto recorded = nlohmann::json::parse(
      read_file(std::string(LATENTE_TEST_DATA "/tokenizer/recorded/") + GetParam() + ".json"));
  size_t cases = 0;
  for (const auto& entry : recorded) {
    SCOPED_TRACE(entry["name"].get<std::string>());
    const Tokenizer tokenizer = Tokenizer::from_json(entry["tokenizer"].dump());
    for (const auto& one : entry["cases"]) {
      const auto text = one[0].get<std::string>();
      SCOPED_TRACE(one[0].dump(-1, ' ', true));
      const auto ids = one[3].get<std::vector<std::int32_t>>();
      EXPECT_EQ(tokenizer.encode(text, {.add_special = one[1], .parse_special = one[2]}), ids);
      EXPECT_EQ(tokenizer.decode(ids), one[4].get<std::string>());
      EXPECT_EQ(tokenizer.decode(ids, true), one[5].get<std::string>());
      StreamDecoder stream(tokenizer);
      std::string pieces;
      for (const std::int32_t id : ids) pieces += stream.push(id);
      EXPECT_EQ(pieces + stream.finish(), one[4].get<std::string>());
      ++cases;
    }
  }
  EXPECT_GT(cases, 100u);
}

INSTANTIATE_TEST_SUITE_P(, Recorded, testing::Values("kinds", "parts"),
                         [](const auto& recording) { return std::string(recording.param); });

}  // namespace
}  // namespace latente
