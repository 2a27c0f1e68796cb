#include "tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "base/error.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/stop_strings.h"
#include "tokenizer/unicode.h"

namespace latente {
namespace {

using Json = nlohmann::ordered_json;
using Ids = std::vector<std::int32_t>;

// Bytes, and tokens for "ab", "abc" and two spaces; <s> and <e> are special, "foo" is added.
Json byte_level() {
  Json vocabulary = Json::object();
  for (int byte = 0; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    vocabulary[spell_bytes({&c, 1})] = byte;
  }
  vocabulary["ab"] = 256;
  vocabulary["abc"] = 257;
  vocabulary["ĠĠ"] = 258;
  const auto added = [](int id, const char* text, bool special) {
    return Json{{"id", id},        {"content", text},     {"single_word", false}, {"lstrip", false},
                {"rstrip", false}, {"normalized", false}, {"special", special}};
  };
  return {
      {"version", "1.0"},
      {"added_tokens",
       Json::array({added(259, "<s>", true), added(260, "<e>", true), added(261, "foo", false)})},
      {"normalizer", nullptr},
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
      {"post_processor", nullptr},
      {"decoder", {{"type", "ByteLevel"}}},
      {"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", Json::array({"a b", "ab c", "Ġ Ġ"})}}}};
}

Tokenizer make(const Json& json, const std::string& config = {}) {
  return Tokenizer::from_json(json.dump(), config);
}

std::string error_of(const Json& json) {
  try {
    make(json);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

void expect_error(const Json& json, const std::string& part) {
  const std::string error = error_of(json);
  EXPECT_NE(error.find(part), std::string::npos) << error << "\n  has not: " << part;
}

TEST(Tokenizer, EncodesByHand) {
  const Tokenizer tokenizer = make(byte_level());
  EXPECT_EQ(tokenizer.encode("abcab"), (Ids{257, 256}));
  EXPECT_EQ(tokenizer.encode("<s>ab"), (Ids{259, 256}));
  EXPECT_EQ(tokenizer.encode("<s>", {.parse_special = false}), (Ids{'<', 's', '>'}));
  EXPECT_EQ(tokenizer.encode("foo", {.parse_special = false}), (Ids{261}));
  EXPECT_EQ(tokenizer.encode("foo", {.parse_added = false}), (Ids{'f', 'o', 'o'}));
  EXPECT_EQ(tokenizer.encode(""), Ids{});
  EXPECT_EQ(tokenizer.vocab_size(), 262);
  EXPECT_TRUE(tokenizer.is_special(259));
  EXPECT_FALSE(tokenizer.is_special(261));
  EXPECT_TRUE(tokenizer.has(261));
  EXPECT_FALSE(tokenizer.has(262));
  EXPECT_FALSE(tokenizer.has(-1));
  EXPECT_EQ(tokenizer.id_of("abc"), 257);
  EXPECT_EQ(tokenizer.id_of("none"), std::nullopt);
  EXPECT_EQ(tokenizer.token_bytes(258), "  ");
  EXPECT_EQ(tokenizer.token_text(258), "ĠĠ");
  EXPECT_THROW(tokenizer.token_text(262), Error);
}

TEST(Tokenizer, ConfigurationNamesTokensAndTemplate) {
  const Tokenizer tokenizer =
      make(byte_level(), R"({"bos_token": {"content": "<s>"}, "eos_token": "<e>", "add_bos_token": true,
                             "chat_template": [{"name": "default", "template": "x"}]})");
  EXPECT_EQ(tokenizer.bos_id(), 259);
  EXPECT_EQ(tokenizer.eos_id(), 260);
  EXPECT_EQ(tokenizer.pad_id(), std::nullopt);
  EXPECT_TRUE(tokenizer.adds_bos());
  EXPECT_EQ(tokenizer.chat_template(), "x");
  EXPECT_EQ(tokenizer.encode("ab"), (Ids{259, 256}));
  EXPECT_EQ(tokenizer.encode("ab", {.add_special = false}), (Ids{256}));
  EXPECT_EQ(tokenizer.decode(Ids{259, 256, 260}, true), "ab");
}

TEST(Tokenizer, InvalidUtf8IsReplaced) {
  const Tokenizer tokenizer = make(byte_level());
  EXPECT_EQ(tokenizer.encode("a\xff"
                             "b"),
            tokenizer.encode("a\uFFFDb"));
  EXPECT_EQ(tokenizer.encode("\xe4\xb8"), tokenizer.encode("\uFFFD"));
  EXPECT_EQ(tokenizer.encode("\xc0\x80"), tokenizer.encode("\uFFFD\uFFFD"));
  EXPECT_EQ(tokenizer.encode("\xed\xa0\x80"), tokenizer.encode("\uFFFD\uFFFD\uFFFD"));
  std::mt19937 random(5);
  for (int i = 0; i < 2000; ++i) {
    std::string text;
    for (unsigned n = random() % 30; n > 0; --n) text += static_cast<char>(random() % 3 ? random() : 'a');
    std::string valid;
    unicode::append_lossy(valid, text);
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), valid);
  }
}

TEST(Tokenizer, StreamsHoldBackUnfinishedCharacters) {
  const Tokenizer tokenizer = make(byte_level());
  StreamDecoder stream(tokenizer);
  EXPECT_EQ(stream.push(0xE4), "");
  EXPECT_EQ(stream.push(0xB8), "");
  EXPECT_EQ(stream.push(0xAD), "中");
  EXPECT_EQ(stream.push(0xE4), "");
  EXPECT_EQ(stream.push('a'), "\uFFFDa");
  EXPECT_EQ(stream.push(0xF0), "");
  EXPECT_EQ(stream.finish(), "\uFFFD");
  EXPECT_EQ(stream.push(999), "");
  EXPECT_THROW(stream.push(-1), Error);
}

// A word of megabytes: near-linear, or this would take hours.
TEST(Tokenizer, MegabytesWithoutASpace) {
  const Tokenizer tokenizer = make(byte_level());
  EXPECT_EQ(tokenizer.encode(std::string(4'000'000, ' ')).size(), 2'000'000u);
  std::string text;
  std::mt19937 random(7);
  size_t expected = 0;
  while (text.size() < 4'000'000) {
    const char* piece = random() % 2 ? "abc" : "x";
    text += piece;
    ++expected;
  }
  EXPECT_EQ(tokenizer.encode(text).size(), expected);
  const Ids ids = tokenizer.encode(text);
  EXPECT_EQ(tokenizer.decode(ids), text);
  std::string chinese;
  for (int i = 0; i < 700'000; ++i) chinese += "中";
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(chinese)), chinese);
  Json plain = byte_level();  // no pre-tokenizer, and the characters themselves
  plain["pre_tokenizer"] = nullptr;
  EXPECT_EQ(make(plain).encode(text).size(), expected);
}

TEST(Tokenizer, HostileFilesAreErrors) {
  const Json good = byte_level();
  ASSERT_EQ(error_of(good), "no error");
  const auto with = [&](const char* pointer, Json value) {
    Json out = good;
    out[Json::json_pointer(pointer)] = std::move(value);
    return out;
  };
  expect_error(with("/model", nullptr), "tokenizer.json.model: expected an object, found null");
  expect_error(with("/model/type", "Unigram"), "expected the model BPE, found \"Unigram\"");
  expect_error(with("/model/vocab", Json::array()), "tokenizer.json.model.vocab: expected an object");
  expect_error(with("/model/vocab/ab", -1), "tokenizer.json.model.vocab.ab: expected an integer");
  expect_error(with("/model/vocab/ab", 1.5), "tokenizer.json.model.vocab.ab: expected an integer");
  expect_error(with("/model/vocab/ab", 18446744073709551615u), "tokenizer.json.model.vocab.ab: expected");
  expect_error(with("/model/vocab/ab", 4294967296), "tokenizer.json.model.vocab.ab: expected");
  expect_error(with("/model/vocab/ab", 2147483647), "tokenizer.json.model.vocab.ab: expected");
  expect_error(with("/model/vocab/ab", 257), "one token for id 257");
  expect_error(with("/model/merges", nullptr), "tokenizer.json.model.merges: expected an array");
  expect_error(with("/model/merges/0", "ab"), "two tokens with a space between them");
  expect_error(with("/model/merges/0", "a b c"), "two tokens with a space between them");
  expect_error(with("/model/merges/0", "a q"), "merges[0]: expected tokens of the vocabulary in 'a q'");
  expect_error(with("/model/merges/0", "zz b"), "found 'zz'");
  expect_error(with("/model/merges/0", Json::array({"a"})), "tokenizer.json.model.merges[0]: expected two");
  expect_error(with("/model/merges/0", Json::array({"a", 1})), "expected a string, found 1");
  expect_error(with("/model/dropout", 0.1), "expected no dropout");
  expect_error(with("/added_tokens", 1), "tokenizer.json.added_tokens: expected an array");
  expect_error(with("/added_tokens/0/id", -5), "tokenizer.json.added_tokens[0].id: expected an integer");
  expect_error(with("/added_tokens/0/content", nullptr), "added_tokens[0].content: expected a string");
  expect_error(with("/added_tokens/0/special", "no"), "special: expected true or false");
  expect_error(with("/pre_tokenizer/type", "Nonsense"),
               "expected a supported pre-tokenizer, found \"Nonsense\"");
  expect_error(with("/decoder/type", 5), "tokenizer.json.decoder.type: expected a string");
  expect_error(with("/normalizer", {{"type", "Precompiled"}}), "expected a supported normalizer");
  expect_error(with("/version", "2.0"), "expected version 1.0");
  expect_error(
      with("/pre_tokenizer",
           {{"type", "Split"}, {"pattern", {{"Regex", "("}}}, {"behavior", "Isolated"}, {"invert", false}}),
      "tokenizer.json.pre_tokenizer.pattern.Regex");
  Json deep = {{"type", "NFC"}};
  for (int i = 0; i < 100; ++i) deep = {{"type", "Sequence"}, {"normalizers", Json::array({deep})}};
  expect_error(with("/normalizer", deep), "nested sequences");
}

TEST(Tokenizer, BrokenJsonIsAnError) {
  const std::string good = byte_level().dump();
  std::mt19937 random(11);
  for (int i = 0; i < 200; ++i) {
    EXPECT_THROW(Tokenizer::from_json(good.substr(0, random() % good.size())), Error);
    std::string changed = good;
    changed[random() % good.size()] = static_cast<char>(random());
    try {
      const Tokenizer tokenizer = Tokenizer::from_json(changed);
      tokenizer.decode(tokenizer.encode("<s> ab foo"));
    } catch (const Error&) {
    }
  }
  EXPECT_THROW(Tokenizer::from_json(""), Error);
  EXPECT_THROW(Tokenizer::from_json("[]"), Error);
  EXPECT_THROW(Tokenizer::from_json("\xff"), Error);
  EXPECT_THROW(Tokenizer::from_json(std::string(1'000'000, '[')), Error);
  EXPECT_THROW(Tokenizer::load("/nonexistent/tokenizer.json"), Error);
}

TEST(StopStrings, HoldBackWhatMayBecomeOne) {
  StopStrings stops({"END", "", "\n\n"});
  EXPECT_EQ(stops.push("abE"), "ab");
  EXPECT_EQ(stops.push("N"), "");
  EXPECT_EQ(stops.push("x\n"), "ENx");
  EXPECT_EQ(stops.push("y"), "\ny");
  EXPECT_EQ(stops.push("E"), "");
  EXPECT_EQ(stops.push("EN"), "E");
  EXPECT_FALSE(stops.stopped());
  EXPECT_EQ(stops.push("D rest"), "");
  EXPECT_TRUE(stops.stopped());
  EXPECT_EQ(stops.push("more"), "");
  EXPECT_EQ(stops.finish(), "");
}

TEST(StopStrings, PiecesDoNotMatter) {
  std::mt19937 random(13);
  for (int i = 0; i < 500; ++i) {
    std::string text;
    for (unsigned n = random() % 40; n > 0; --n) text += static_cast<char>('a' + random() % 3);
    const std::vector<std::string> stop{"abca", "ccc", "bb"};
    StopStrings stops(stop);
    std::string shown;
    for (size_t at = 0; at < text.size();) {
      const size_t size = 1 + random() % 5;
      shown += stops.push(std::string_view(text).substr(at, size));
      at += size;
    }
    if (!stops.stopped()) shown += stops.finish();
    // The stop string that is complete first ends the text.
    size_t end = text.npos, completed = text.npos;
    for (const std::string& one : stop) {
      const size_t at = text.find(one);
      if (at != text.npos && at + one.size() < completed) completed = at + one.size(), end = at;
    }
    if (end == text.npos) {
      EXPECT_EQ(shown, text);
    } else {
      EXPECT_LE(shown.size(), completed);
      EXPECT_TRUE(text.starts_with(shown));
      for (const std::string& one : stop) EXPECT_EQ(shown.find(one), shown.npos);
    }
  }
}

}  // namespace
}  // namespace latente
