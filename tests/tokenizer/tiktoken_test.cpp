// tiktoken.model beside what the Python package tiktoken makes of it (record_tiktoken.py).
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"
#include "tokenizer/tokenizer.h"

namespace latente {
namespace {

using Ids = std::vector<std::int32_t>;

nlohmann::json recorded() {
  return nlohmann::json::parse(read_file(LATENTE_TEST_DATA "/tokenizer/recorded/tiktoken.json"));
}

TEST(Tiktoken, IdsAreThePackages) {
  const nlohmann::json json = recorded();
  const Tokenizer tokenizer =
      Tokenizer::from_tiktoken(json["model"].get<std::string>(), json["config"].dump());
  for (const nlohmann::json& one : json["cases"]) {
    SCOPED_TRACE(one[0].dump(-1, ' ', true));
    const auto text = one[0].get<std::string>();
    const auto ids = one[1].get<Ids>();
    EXPECT_EQ(tokenizer.encode(text), ids);
    EXPECT_EQ(tokenizer.encode(text, {.parse_added = false}), one[2].get<Ids>());
    EXPECT_EQ(tokenizer.decode(ids), text);
  }
  EXPECT_GT(json["cases"].size(), 100u);
}

TEST(Tiktoken, AddedTokensAreTheConfigurations) {
  const nlohmann::json json = recorded();
  const Tokenizer tokenizer =
      Tokenizer::from_tiktoken(json["model"].get<std::string>(), json["config"].dump());
  EXPECT_EQ(tokenizer.bos_id(), 640);
  EXPECT_EQ(tokenizer.eos_id(), 641);
  EXPECT_EQ(tokenizer.vocab_size(), 640 + 256);
  EXPECT_EQ(tokenizer.token_text(645), "<|reserved_token_645|>");     // the configuration names none
  EXPECT_EQ(tokenizer.decode(Ids{642, 646}, true), "<|im_middle|>");  // which is not special
}

std::string refusal_of(const std::string& model, const nlohmann::json& config) {
  try {
    Tokenizer::from_tiktoken(model, config.is_null() ? "" : config.dump(), "dir/tiktoken.model");
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Tiktoken, FaultsAreNamed) {
  const nlohmann::json json = recorded();
  const auto model = json["model"].get<std::string>();
  const nlohmann::json config = json["config"];
  const auto expect = [](const std::string& error, const std::string& part) {
    EXPECT_NE(error.find(part), std::string::npos) << error << "\n  has not: " << part;
  };
  const auto line = [&](std::size_t rank) {
    std::size_t at = 0;
    for (; rank > 0; --rank) at = model.find('\n', at) + 1;
    return at;
  };
  std::string changed = model;
  changed[line(300)] = '!';
  expect(refusal_of(changed, config), "dir/tiktoken.model: line of rank 300: expected base64");
  changed = model;
  changed.erase(line(300), line(301) - line(300));
  expect(refusal_of(changed, config), "line of rank 300: expected the ranks in order");
  changed = model;
  changed.insert(line(300), "x");
  expect(refusal_of(changed, config), "line of rank 300: expected base64");
  expect(refusal_of(model + "nothing", config), "line of rank 640: expected a token in base64, a space");
  nlohmann::json other = config;
  other.erase("added_tokens_decoder");
  expect(refusal_of(model + " 640\n", other), "token 640 is empty");
  expect(refusal_of(model + "YQ== 640\n", other), "repeats another");
  std::string large = model;
  for (int i = 0; i < 2000; ++i) large += "YWFh";
  expect(refusal_of(large + " 640\n", other), "token 640: expected at most 4096 bytes, found 6000");
  expect(refusal_of(model.substr(0, line(200)), config), "each of the 256 bytes");
  expect(refusal_of("", config), "each of the 256 bytes");
  expect(refusal_of(model, nlohmann::json()), "dir/tokenizer_config.json beside it");
  other = config;
  other["tokenizer_class"] = "QWenTokenizer";
  expect(refusal_of(model, other), "tokenizer_class: expected TikTokenTokenizer");
  other = config;
  other["added_tokens_decoder"]["7"] = config["added_tokens_decoder"]["640"];
  expect(refusal_of(model, other), "added_tokens_decoder.7: expected ids from 640");
  other = config;
  other["added_tokens_decoder"]["642"]["content"] = "[EOS]";
  expect(refusal_of(model, other), "tokens 641 and 642 are both '[EOS]'");
  other["added_tokens_decoder"]["642"]["content"] = "a";
  expect(refusal_of(model, other), "tokens 97 and 642 are both 'a'");
  other = config;
  other["added_tokens_decoder"]["641"].erase("special");
  expect(refusal_of(model, other), "added_tokens_decoder.641.special: expected true or false");
}

}  // namespace
}  // namespace latente
