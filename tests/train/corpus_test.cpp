#include "train/corpus.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <zstd.h>

#include <filesystem>
#include <fstream>
#include <random>

#include "base/error.h"
#include "train/corpus_hash.h"
#include "train/corpus_reader.h"

namespace latente {
namespace {

namespace fs = std::filesystem;

// A tokenizer of bytes, shifted so that token 0 never comes up and tokens need 16 bits.
TextEncoder byte_encoder() {
  TextEncoder encoder;
  encoder.encode = [](std::string_view text) {
    std::vector<int32_t> tokens;
    for (const unsigned char c : text) tokens.push_back(c + 300);
    return tokens;
  };
  encoder.fingerprint = "bytes";
  encoder.vocabulary = 600;
  return encoder;
}

class Corpora : public testing::Test {
 protected:
  Corpora() {
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    directory_ = fs::path(testing::TempDir()) / fmt::format("latente_corpus_{}_{}", info->name(), getpid());
    fs::remove_all(directory_);
    fs::create_directories(directory_);
    options.cache = path("cache");
    options.threads = 3;
  }
  ~Corpora() override { fs::remove_all(directory_); }

  std::string path(const std::string& name) const { return (directory_ / name).string(); }

  std::string put(const std::string& name, const std::string& content) const {
    std::ofstream(path(name), std::ios::binary) << content;
    return path(name);
  }

  std::string put_zstd(const std::string& name, const std::string& content) const {
    std::string packed(ZSTD_compressBound(content.size()), '\0');
    packed.resize(ZSTD_compress(packed.data(), packed.size(), content.data(), content.size(), 3));
    return put(name, packed);
  }

  std::shared_ptr<const TokenCache> open(std::vector<std::string> files) const {
    return TokenCache::open_or_make(files, options, encoder, progress);
  }

  std::string error_of(std::vector<std::string> files) const {
    try {
      open(files);
    } catch (const Error& error) {
      std::string text = error.what();
      for (size_t at; (at = text.find(directory_.string() + "/")) != text.npos;) {
        text.erase(at, directory_.string().size() + 1);
      }
      return text;
    }
    return "no error";
  }

  std::vector<std::string> documents(const Corpus& corpus) const {
    std::vector<std::string> out;
    for (int64_t d = 0; d < corpus.documents(); ++d) {
      std::vector<int32_t> tokens(static_cast<size_t>(corpus.start(d + 1) - corpus.start(d)));
      corpus.read(corpus.start(d), tokens);
      std::string text;
      for (const int32_t token : tokens)
        text += token >= 300 ? std::string(1, char(token - 300)) : fmt::format("<{}>", token);
      out.push_back(text);
    }
    return out;
  }

  std::vector<std::string> caches() const {
    std::vector<std::string> names;
    if (fs::exists(options.cache)) names = list_directory(options.cache);
    return names;
  }

  fs::path directory_;
  CorpusOptions options;
  TextEncoder encoder = byte_encoder();
  OnCorpusProgress progress;
};

using Texts = std::vector<std::string>;

// Made by xxhash 3.x's xxh64_intdigest.
TEST(CorpusHash, AgreesWithThePublishedVectors) {
  EXPECT_EQ(Hash64().value(), 0xEF46DB3751D8E999u);
  Hash64 abc;
  abc.add("abc");
  EXPECT_EQ(abc.value(), 0x44BC2CF5AD770999u);
}

TEST(CorpusHash, IsTheSameHoweverCut) {
  std::mt19937 random(5);
  std::string text(1000, 0);
  for (char& c : text) c = static_cast<char>(random());
  Hash64 whole;
  whole.add(text);
  for (int round = 0; round < 50; ++round) {
    Hash64 parts;
    for (size_t at = 0; at < text.size();) {
      const size_t count = std::min<size_t>(random() % 70, text.size() - at);
      parts.add(std::string_view(text).substr(at, count));
      at += count;
    }
    ASSERT_EQ(parts.value(), whole.value());
  }
}

TEST(CorpusReader, FindsInvalidUtf8) {
  EXPECT_EQ(find_invalid_utf8("plain text of some length, é€😀"), std::string::npos);
  for (const char* bad : {"\x80", "\xC0\x80", "\xC3", "\xE0\x80\x80", "\xED\xA0\x80", "\xF0\x80\x80\x80",
                          "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xE2\x82", "\xE2\x28\xA1", "\xFF"}) {
    for (size_t before = 0; before < 12; ++before) {
      EXPECT_EQ(find_invalid_utf8(std::string(before, 'a') + bad + "tail"), before) << before;
    }
  }
}

TEST_F(Corpora, PlainTextIsSplitAtSeparatorLines) {
  const auto file = put("a.txt",
                        "\xEF\xBB\xBFone\ntwo\n<|endoftext|>\nthree <|endoftext|> four\r\n<|endoftext|>\r\n"
                        "\n  \n<|endoftext|>\nlast");
  const auto cache = open({file});
  EXPECT_EQ(documents(Corpus(cache)), (Texts{"one\ntwo\n", "three <|endoftext|> four\r\n", "last"}));
  EXPECT_EQ(cache->blank_documents(), 1);
  EXPECT_EQ(cache->bytes(), 8 + 26 + 4);
  EXPECT_EQ(cache->document_bytes(1), 26);
  EXPECT_TRUE(cache->was_made());
}

TEST_F(Corpora, WithoutASeparatorAFileIsADocument) {
  const auto file = put("a.txt", "one\n<|endoftext|>\ntwo\n");
  options.separator = "";
  EXPECT_EQ(documents(Corpus(open({file}))), (Texts{"one\n<|endoftext|>\ntwo\n"}));
}

TEST_F(Corpora, FilesAreReadInEveryForm) {
  const std::string json = "{\"id\": 1, \"text\": \"caf\\u00e9\"}\n\n{\"text\": \"\"}\n{\"text\": \"b\\nc\"}";
  put("a.jsonl", json);
  put_zstd("b.jsonl.zst", json);
  put("c.txt", "see");
  put_zstd("d.txt.zst", "sea\n<|endoftext|>\nsun");
  const auto cache = open({path("*.jsonl*"), path("{c,d}.*"), path("c.txt")});
  EXPECT_EQ(documents(Corpus(cache)), (Texts{"café", "b\nc", "café", "b\nc", "see", "sea\n", "sun"}));
  EXPECT_EQ(cache->blank_documents(), 2);
}

TEST_F(Corpora, TokensArePutAroundDocuments) {
  encoder.before = {1};
  encoder.after = {2, 3};
  const auto cache = open({put("a.jsonl", "{\"text\":\"x\"}\n{\"text\":\"yz\"}")});
  EXPECT_EQ(documents(Corpus(cache)), (Texts{"<1>x<2><3>", "<1>yz<2><3>"}));
  EXPECT_EQ(cache->bytes(), 3);
}

TEST_F(Corpora, LargeVocabulariesAreKept) {
  encoder.vocabulary = 129280;
  encoder.encode = [](std::string_view) { return std::vector<int32_t>{129279, 0, 65536}; };
  Corpus corpus(open({put("a.txt", "x")}));
  std::vector<int32_t> tokens(3);
  corpus.read(0, tokens);
  EXPECT_EQ(tokens, (std::vector<int32_t>{129279, 0, 65536}));
}

TEST_F(Corpora, ManyDocumentsKeepTheirOrder) {
  std::mt19937 random(std::random_device{}());
  Texts texts;
  std::string all;
  for (int i = 0; i < 3000; ++i) {
    texts.push_back(
        fmt::format("{} {}", i, std::string(random() % 3 ? random() % 50 : random() % 20000, 'x')));
    all += "{\"text\":\"" + texts.back() + "\"}\n";
  }
  EXPECT_EQ(documents(Corpus(open({put_zstd("a.jsonl.zst", all)}))), texts);
}

TEST_F(Corpora, ACacheIsUsedAgainUntilSomethingChanges) {
  const auto file = put("a.txt", "text");
  EXPECT_TRUE(open({file})->was_made());
  EXPECT_FALSE(open({file})->was_made());
  fs::rename(file, path("b.txt"));
  EXPECT_FALSE(open({path("b.txt")})->was_made());
  encoder.fingerprint = "other";
  EXPECT_TRUE(open({path("b.txt")})->was_made());
  encoder.after = {5};
  EXPECT_TRUE(open({path("b.txt")})->was_made());
  options.separator = "---";
  EXPECT_TRUE(open({path("b.txt")})->was_made());
  put("b.txt", "texT");
  EXPECT_TRUE(open({path("b.txt")})->was_made());
  EXPECT_FALSE(open({path("b.txt")})->was_made());
  EXPECT_EQ(caches().size(), 5u);
}

TEST_F(Corpora, ADamagedCacheIsMadeAnew) {
  const auto file = put("a.txt", "some text to keep\n<|endoftext|>\nmore");
  const std::string cache = open({file})->path();
  const std::string good = read_file(cache);
  std::mt19937 random(std::random_device{}());
  for (int round = 0; round < 40; ++round) {
    std::string bad = good;
    if (round % 2) {
      bad.resize(random() % good.size());
    } else {
      bad[random() % bad.size()] ^= static_cast<char>(1 << random() % 8);
    }
    put("cache/" + fs::path(cache).filename().string(), bad);
    const auto remade = open({file});
    ASSERT_TRUE(remade->was_made());
    ASSERT_NE(remade->damage().find(cache), std::string::npos);
    ASSERT_EQ(read_file(cache), good);
  }
  EXPECT_EQ(open({file})->damage(), "");
}

TEST_F(Corpora, ErrorsNameTheFileAndTheLine) {
  EXPECT_EQ(error_of({path("none*.txt")}), "none*.txt: no file matches");
  EXPECT_EQ(error_of({}), "expected files of text, found none given");
  EXPECT_EQ(error_of({put("a.jsonl", "{\"text\":\"x\"}\n\n{\"text\":}")}).substr(0, 64),
            "a.jsonl:3: expected a JSON object, found invalid JSON: parse err");
  EXPECT_EQ(error_of({put("a.jsonl", "{\"text\":\"x\"}\n{\"tex\":\"x\"}\n")}),
            "a.jsonl:2: expected a field \"text\", found none");
  EXPECT_EQ(error_of({put("a.jsonl", "{\"text\":7}\n")}),
            "a.jsonl:1: expected a string in the field \"text\", found number");
  EXPECT_EQ(error_of({put("a.jsonl", "[]\n")}), "a.jsonl:1: expected a JSON object, found array");
  EXPECT_EQ(error_of({put("a.jsonl", "{\"text\":\"\xff\"}\n")}).substr(0, 36),
            "a.jsonl:1: expected a JSON object, f");
  EXPECT_EQ(error_of({put("a.txt", "x\n<|endoftext|>\ny\nz\xff")}),
            "a.txt:4: expected UTF-8, found the byte 0xff");
  EXPECT_EQ(error_of({put("a.txt", " \n<|endoftext|>\n\n")}),
            "a.txt: expected text, found no document that is not blank");
  EXPECT_EQ(error_of({put("a.txt", "")}), "a.txt: expected text, found no document that is not blank");
  EXPECT_EQ(error_of({put("a.json", "[]")}),
            "a.json: expected plain text or .jsonl, each also as .zst, found .json");
  EXPECT_EQ(error_of({directory_.string()}).substr(directory_.string().size()),
            ": expected files, found a directory");
  EXPECT_EQ(error_of({put("a.txt.zst", "not compressed")}).substr(0, 38),
            "a.txt.zst: expected zstd data, found: ");
  const auto whole = read_file(put_zstd("b.txt.zst", std::string(1000, 'x') + "yz"));
  EXPECT_EQ(error_of({put("b.txt.zst", whole.substr(0, whole.size() - 3))}),
            "b.txt.zst: expected the rest of a zstd frame, found the end of the file");
  encoder.encode = [](std::string_view) { return std::vector<int32_t>{600}; };
  EXPECT_EQ(error_of({put("a.txt", "x\n<|endoftext|>\ny")}),
            "a.txt:1: expected tokens in [0, 600), found 600");
  encoder.encode = [](std::string_view) -> std::vector<int32_t> { fail("no such character"); };
  EXPECT_EQ(error_of({put("a.txt", "\nx")}), "a.txt:1: no such character");
  EXPECT_EQ(caches(), Texts{});
}

TEST_F(Corpora, TheEarliestOfSeveralErrorsIsTold) {
  std::string lines;
  for (int i = 1; i <= 200; ++i) lines += i >= 50 ? "{\n" : "{\"text\":\"x\"}\n";
  for (int round = 0; round < 20; ++round) {
    ASSERT_EQ(error_of({put("a.jsonl", lines)}).substr(0, 11), "a.jsonl:50:");
  }
}

TEST_F(Corpora, ProgressIsReportedAndMayStopTheWork) {
  const auto file = put("a.txt", "text");
  CorpusProgress last;
  progress = [&](const CorpusProgress& now) { last = now; };
  open({file});
  EXPECT_EQ(last.stage, CorpusProgress::Stage::tokenising);
  EXPECT_EQ(last.bytes, 4);
  EXPECT_EQ(last.total_bytes, 4);
  EXPECT_EQ(last.documents, 1);
  EXPECT_EQ(last.tokens, 4);
  progress = [](const CorpusProgress&) { throw std::runtime_error("stop"); };
  EXPECT_THROW(open({put("b.txt", "texts")}), std::runtime_error);
  EXPECT_EQ(caches().size(), 1u);
}

TEST_F(Corpora, TheSplitIsAPartitionThatDoesNotDependOnTheOrder) {
  Texts texts;
  for (int i = 0; i < 100; ++i) texts.push_back(fmt::format("document {}", i % 90));  // ten of them twice
  std::mt19937 random(std::random_device{}());
  Texts aside;
  for (int round = 0; round < 5; ++round) {
    std::shuffle(texts.begin(), texts.end(), random);
    std::string lines;
    for (const auto& text : texts) lines += "{\"text\":\"" + text + "\"}\n";
    options.files = {put("a.jsonl", lines)};
    options.validation_share = 0.1;
    const CorpusSplit split = load_corpus(options, encoder);
    Texts train = documents(split.train), validation = documents(split.validation);
    EXPECT_GE(validation.size(), 10u);
    EXPECT_LE(validation.size(), 11u);
    EXPECT_EQ(split.train.bytes() + split.validation.bytes(), split.train.cache().bytes());
    EXPECT_NE(split.train.fingerprint(), split.validation.fingerprint());
    std::sort(train.begin(), train.end());
    std::sort(validation.begin(), validation.end());
    Texts both, all = texts;
    std::sort(all.begin(), all.end());
    std::merge(train.begin(), train.end(), validation.begin(), validation.end(), std::back_inserter(both));
    EXPECT_EQ(both, all);
    both.clear();
    std::set_intersection(train.begin(), train.end(), validation.begin(), validation.end(),
                          std::back_inserter(both));
    EXPECT_EQ(both, Texts{});
    if (round > 0) {
      EXPECT_EQ(validation, aside);
    }
    aside = validation;
  }
}

TEST_F(Corpora, OneDocumentIsCut) {
  options.files = {put("a.txt", std::string(90, 'a') + std::string(10, 'b'))};
  options.validation_share = 0.1;
  const CorpusSplit split = load_corpus(options, encoder);
  EXPECT_EQ(documents(split.train), Texts{std::string(90, 'a')});
  EXPECT_EQ(documents(split.validation), Texts{std::string(10, 'b')});
  EXPECT_EQ(split.validation.bytes(), 10);
}

TEST_F(Corpora, ValidationMayBeFilesOrNothing) {
  options.files = {put("a.txt", "train")};
  options.validation = {put("b.txt", "valid")};
  EXPECT_EQ(documents(load_corpus(options, encoder).train), Texts{"train"});
  EXPECT_EQ(documents(load_corpus(options, encoder).validation), Texts{"valid"});
  options.validation = {};
  options.validation_share = 0;
  EXPECT_TRUE(load_corpus(options, encoder).validation.empty());
  options.validation_share = 1.5;
  EXPECT_THROW(load_corpus(options, encoder), Error);
  options.validation_share = 0.5;
  options.files = {put("c.jsonl", "{\"text\":\"x\"}\n{\"text\":\"x\"}\n")};
  EXPECT_THROW(load_corpus(options, encoder), Error);
}

TEST_F(Corpora, ReadingCrossesDocuments) {
  const Corpus corpus(open({put("a.jsonl", "{\"text\":\"abc\"}\n{\"text\":\"d\"}\n{\"text\":\"efgh\"}\n")}));
  const std::string all = "abcdefgh";
  EXPECT_EQ(corpus.tokens(), 8);
  for (int64_t first = 0; first < 8; ++first) {
    EXPECT_EQ(corpus.document_of(first), first < 3 ? 0 : first < 4 ? 1 : 2);
    for (int64_t count = 0; first + count <= 8; ++count) {
      std::vector<int32_t> tokens(static_cast<size_t>(count));
      corpus.read(first, tokens);
      for (int64_t i = 0; i < count; ++i) ASSERT_EQ(tokens[i], all[first + i] + 300);
    }
  }
}

}  // namespace
}  // namespace latente
