// Tokenizers in GGUF files, against ids that llama.cpp gave (tests/reference/make_gguf_tokenizers.py).
#include "checkpoint/gguf_tokenizer.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/file.h"
#include "checkpoint/gguf_bytes.h"
#include "tokenizer/chat_template.h"
#include "tokenizer/tokenizer.h"

namespace latente {
namespace {

const nlohmann::json& recorded() {
  static const auto json =
      nlohmann::json::parse(read_file(LATENTE_TEST_DATA "/reference/gguf/tokenizers.json"));
  return json;
}

GgufBytes file_of(const std::string& pre) {
  GgufBytes file;
  file.set("tokenizer.ggml.model", "gpt2").set("tokenizer.ggml.pre", pre);
  file.set("tokenizer.ggml.tokens", recorded()["tokens"].get<std::vector<std::string>>());
  file.set("tokenizer.ggml.token_type", recorded()["token_type"].get<std::vector<int32_t>>());
  file.set("tokenizer.ggml.merges", recorded()["merges"].get<std::vector<std::string>>());
  file.set("tokenizer.ggml.bos_token_id", 0u).set("tokenizer.ggml.eos_token_id", 1u);
  return file;
}

Tokenizer tokenizer_of(const GgufBytes& file) {
  const std::string bytes = file.bytes();
  GgufTokenizer texts =
      gguf_tokenizer(GgufFile(std::as_bytes(std::span(bytes.data(), bytes.size())), "model.gguf"));
  return Tokenizer::from_json(texts.tokenizer_json, texts.config_json, "model.gguf");
}

class PreTokenizers : public testing::TestWithParam<size_t> {};

TEST_P(PreTokenizers, IdsAreLlamaCpps) {
  const nlohmann::json& one = recorded()["recorded"][GetParam()];
  SCOPED_TRACE(one["pre"].get<std::string>());
  const Tokenizer tokenizer = tokenizer_of(file_of(one["pre"]));
  EXPECT_EQ(tokenizer.adds_bos(), one["adds_bos"].get<bool>());
  int compared = 0;
  for (size_t i = 0; i < one["cases"].size(); ++i) {
    const nlohmann::json& ids = one["cases"][i];
    if (ids.is_null()) continue;
    const auto text = recorded()["texts"][i].get<std::string>();
    SCOPED_TRACE(text);
    EXPECT_EQ(tokenizer.encode(text, {.add_special = false}), ids[0].get<std::vector<int32_t>>());
    // llama.cpp then also keeps tokens that are not special whole.
    EXPECT_EQ(tokenizer.encode(text, {.add_special = false, .parse_special = false}),
              ids.back().get<std::vector<int32_t>>());
    EXPECT_EQ(tokenizer.decode(ids[0].get<std::vector<int32_t>>()), text);
    ++compared;
  }
  EXPECT_GT(compared, 30);
}

INSTANTIATE_TEST_SUITE_P(, PreTokenizers, testing::Range<size_t>(0, 8), [](const auto& index) {
  std::string name = recorded()["recorded"][index.param]["pre"];
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

TEST(GgufTokenizer, SpecialTokensAndTheTemplate) {
  GgufBytes file = file_of("deepseek-v3");
  file.set("tokenizer.ggml.add_bos_token", true).set("tokenizer.ggml.padding_token_id", 3u);
  file.set("tokenizer.chat_template", "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}");
  Tokenizer tokenizer = tokenizer_of(file);
  EXPECT_TRUE(tokenizer.adds_bos());
  EXPECT_EQ(tokenizer.bos_id(), 0);
  EXPECT_EQ(tokenizer.eos_id(), 1);
  EXPECT_EQ(tokenizer.pad_id(), 3);
  EXPECT_FALSE(tokenizer.unk_id());
  EXPECT_EQ(tokenizer.bos_token(), "<｜begin▁of▁sentence｜>");
  EXPECT_TRUE(tokenizer.is_special(2));
  const int32_t think = *tokenizer.id_of("<think>");
  EXPECT_FALSE(tokenizer.is_special(think));
  EXPECT_EQ(tokenizer.encode("<｜User｜><think>"), (std::vector<int32_t>{0, 2, think}));
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{2, think}, true), "<think>");
  // The hole at the vocabulary's end has no token.
  const auto last = static_cast<int32_t>(recorded()["tokens"].size()) - 1;
  EXPECT_FALSE(tokenizer.has(last));
  EXPECT_EQ(tokenizer.decode(std::vector<int32_t>{last}), "");
  std::vector<ChatMessage> messages{{"user", "hi"}};
  EXPECT_EQ(ChatTemplate(tokenizer.chat_template()).render(messages, true, tokenizer.bos_token()),
            "<｜begin▁of▁sentence｜>[hi]");
}

TEST(GgufTokenizer, WhatIsWrongIsNamed) {
  struct Case {
    std::function<void(GgufBytes&)> change;
    const char* message;
  };
  using Strings = std::vector<std::string>;
  const Case cases[] = {
      {[](GgufBytes& f) { f.leave_out("tokenizer.ggml.model"); }, "model.gguf: no key tokenizer.ggml.model"},
      {[](GgufBytes& f) { f.set("tokenizer.ggml.model", "llama"); },
       "model.gguf: tokenizer.ggml.model: expected gpt2, found \"llama\""},
      {[](GgufBytes& f) { f.leave_out("tokenizer.ggml.pre"); }, "model.gguf: no key tokenizer.ggml.pre"},
      {[](GgufBytes& f) { f.set("tokenizer.ggml.pre", "tekken\n"); },
       "tokenizer.ggml.pre: unknown pre-tokenizer \"tekken\\x0a\" (known: deepseek-llm, deepseek-coder, "
       "deepseek-v3,"},
      {[](GgufBytes& f) { f.leave_out("tokenizer.ggml.tokens"); }, "no key tokenizer.ggml.tokens"},
      {[](GgufBytes& f) { f.set("tokenizer.ggml.tokens", 5u); },
       "tokenizer.ggml.tokens: expected an array of strings, found 5"},
      {[](GgufBytes& f) {
         f.set("tokenizer.ggml.tokens", Strings{"a", "b"});
       },
       "tokenizer.ggml.token_type: expected 2 values, one a token, found 625"},
      {[](GgufBytes& f) {
         f.set("tokenizer.ggml.tokens", Strings{"a", "b", "a"}).leave_out("tokenizer.ggml.token_type");
       },
       "tokenizer.ggml.tokens: token 2 repeats \"a\""},
      {[](GgufBytes& f) {
         f.set("tokenizer.ggml.tokens", Strings{"a", "b"});
         f.set("tokenizer.ggml.token_type", std::vector<int32_t>{1, 7});
       },
       "tokenizer.ggml.token_type: expected 1 to 6, found 7 for token 1"},
      {[](GgufBytes& f) {
         f.set("tokenizer.ggml.tokens", Strings{"a", "\xff"}).leave_out("tokenizer.ggml.token_type");
       },
       "model.gguf: tokenizer: a token, a merge or the chat template is not UTF-8"},
      {[](GgufBytes& f) { f.set("tokenizer.chat_template", "\xc3"); }, "is not UTF-8"},
      {[](GgufBytes& f) { f.leave_out("tokenizer.ggml.merges"); }, "no key tokenizer.ggml.merges"},
      {[](GgufBytes& f) {
         f.set("tokenizer.ggml.merges", Strings{"a b", "ab"});
       },
       "tokenizer.ggml.merges: expected two tokens with a space between them, found \"ab\" at 1"},
      {[](GgufBytes& f) { f.set("tokenizer.ggml.merges", Strings{"a "}); }, "found \"a \" at 0"},
      {[](GgufBytes& f) { f.set("tokenizer.ggml.merges", Strings{""}); }, "found \"\" at 0"},
      {[](GgufBytes& f) { f.set("tokenizer.ggml.merges", Strings{"qq zz"}); }, "model.gguf"},
      {[](GgufBytes& f) { f.set("tokenizer.ggml.eos_token_id", 625u); },
       "tokenizer.ggml.eos_token_id: expected 0 to 624, found 625"},
      {[](GgufBytes& f) { f.set("tokenizer.ggml.add_bos_token", 1u); },
       "tokenizer.ggml.add_bos_token: expected true or false, found 1"},
  };
  for (const Case& each : cases) {
    SCOPED_TRACE(each.message);
    GgufBytes change, file = file_of("deepseek-v3");
    each.change(change);
    file.override_with(change);
    expect_has(message_of([&] { tokenizer_of(file); }), each.message);
  }
  EXPECT_EQ(message_of([&] { tokenizer_of(file_of("deepseek-v3")); }), "no error");
}

}  // namespace
}  // namespace latente
