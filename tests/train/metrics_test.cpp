#include "train/metrics.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/file.h"

namespace latente {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

class MetricsTest : public testing::Test {
 protected:
  MetricsTest() {
    std::string pattern = (fs::temp_directory_path() / "latente-metrics-XXXXXX").string();
    directory_ = ::mkdtemp(pattern.data());
  }
  ~MetricsTest() override { fs::remove_all(directory_); }
  std::string at(const std::string& name) const { return directory_ + "/" + name; }

  static std::vector<Json> lines_of(const std::string& path) {
    std::vector<Json> lines;
    std::ifstream file(path);
    for (std::string line; std::getline(file, line);) lines.push_back(Json::parse(line));
    return lines;
  }
  std::string directory_;
};

using Jsonl = MetricsTest;
using TensorBoard = MetricsTest;

TEST_F(Jsonl, HoldsEveryKindOfValueInOrder) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  std::string path = at("deep/below/metrics.jsonl");
  JsonlWriter writer(path);
  writer.write({3,
                {{"loss", 0.1},
                 {"tokens", int64_t{9007199254740993}},
                 {"text", std::string("ein „Ton“\n\"\\\xff")},
                 {"nan", std::nan("")},
                 {"high", infinity},
                 {"low", -infinity}}});
  writer.write({4, {}});
  std::vector<Json> lines = lines_of(path);
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0]["step"], 3);
  EXPECT_NEAR(lines[0]["time"].get<double>(), static_cast<double>(std::time(nullptr)), 60);
  EXPECT_EQ(lines[0]["loss"].get<double>(), 0.1);
  EXPECT_EQ(lines[0]["tokens"].get<int64_t>(), 9007199254740993);
  EXPECT_EQ(lines[0]["text"], "ein „Ton“\n\"\\\xef\xbf\xbd");  // what is not UTF-8 is U+FFFD
  EXPECT_EQ(lines[0]["nan"], "nan");
  EXPECT_EQ(lines[0]["high"], "inf");
  EXPECT_EQ(lines[0]["low"], "-inf");
  EXPECT_EQ(lines[1].size(), 2u);
  std::string text = read_file(path);
  EXPECT_LT(text.find("\"step\""), text.find("\"loss\""));
  EXPECT_LT(text.find("\"loss\""), text.find("\"tokens\""));
}

TEST_F(Jsonl, ARecordIsThereWhenWriteReturns) {
  JsonlWriter writer(at("m.jsonl"));
  for (int64_t step = 1; step <= 3; ++step) {
    writer.write({step, {{"loss", 1.0}}});
    EXPECT_EQ(lines_of(at("m.jsonl")).size(), static_cast<size_t>(step));
  }
}

TEST_F(Jsonl, RemovesAPartialLastLine) {
  const std::string whole = "{\"step\":1,\"loss\":2.5}\n{\"step\":2,\"loss\":2.25}\n";
  for (size_t cut = 0; cut <= whole.size(); ++cut) {
    std::ofstream(at("m.jsonl")) << whole.substr(0, cut);
    { JsonlWriter writer(at("m.jsonl")); }
    std::string kept = read_file(at("m.jsonl"));
    EXPECT_EQ(kept, cut == whole.size() ? whole : cut >= 22 ? whole.substr(0, 22) : "") << cut;
    { JsonlWriter(at("m.jsonl")).write({9, {}}); }
    EXPECT_EQ(lines_of(at("m.jsonl")).back()["step"], 9);
  }
}

TEST_F(Jsonl, ResumingDropsThatStepAndLaterOnes) {
  // Steps are compared as numbers, in whatever order they stand; what is no record is left alone.
  std::ofstream(at("m.jsonl"))
      << "{\"step\":1}\n{\"step\":10}\n{\"step\":3}\nnot JSON\n{\"step\":2}\n{\"other\":7}\n"
      << "{\"step\":4,\"text\":\"a\\n\\\"step\\\":1\"}\n{\"step\":11";
  { JsonlWriter writer(at("m.jsonl"), 3); }
  EXPECT_EQ(read_file(at("m.jsonl")), "{\"step\":1}\nnot JSON\n{\"step\":2}\n{\"other\":7}\n");
  { JsonlWriter writer(at("m.jsonl")); }
  EXPECT_EQ(read_file(at("m.jsonl")), "{\"step\":1}\nnot JSON\n{\"step\":2}\n{\"other\":7}\n");
}

TEST_F(Jsonl, ErrorsNameTheFile) {
  std::ofstream(at("file")) << "x";
  try {
    JsonlWriter writer(at("file/m.jsonl"));
    FAIL();
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(at("file")), std::string::npos) << error.what();
  }
  EXPECT_THROW(AppendedFile{directory_}, Error);
}

// The check values of RFC 3720, appendix B.4.
TEST(Crc32c, PublishedValues) {
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8A9136AAu);
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62A8AB43u);
  std::string rising, falling;
  for (char i = 0; i < 32; ++i) rising += i, falling.insert(falling.begin(), i);
  EXPECT_EQ(crc32c(rising), 0x46DD794Eu);
  EXPECT_EQ(crc32c(falling), 0x113FDB5Cu);
  EXPECT_EQ(crc32c("123456789"), 0xE3069283u);
  EXPECT_EQ(crc32c(""), 0u);
  // ((crc >> 15) | (crc << 17)) + 0xa282ead8
  EXPECT_EQ(masked_crc32c("123456789"), ((0xE3069283u >> 15) | (0xE3069283u << 17)) + 0xA282EAD8u);
}

// A protocol buffer message, read without the library that wrote it: fields in order, by number.
struct Field {
  uint64_t number = 0, integer = 0;
  std::string bytes;

  double f64() const {
    double value;
    std::memcpy(&value, bytes.data(), 8);
    return value;
  }
  float f32() const {
    float value;
    std::memcpy(&value, bytes.data(), 4);
    return value;
  }
  std::vector<double> f64s() const {
    std::vector<double> values(bytes.size() / 8);
    std::memcpy(values.data(), bytes.data(), values.size() * 8);
    return values;
  }
};

struct Message {
  std::vector<Field> fields;

  Message() = default;
  explicit Message(const std::string& bytes) {
    size_t at = 0;
    auto varint = [&] {
      uint64_t value = 0;
      for (int shift = 0;; shift += 7) {
        auto byte = static_cast<uint8_t>(bytes.at(at++));
        value |= uint64_t{byte & 0x7Fu} << shift;
        if (byte < 0x80) return value;
      }
    };
    while (at < bytes.size()) {
      uint64_t tag = varint();
      Field field;
      field.number = tag >> 3;
      size_t size = tag % 8 == 1 ? 8 : tag % 8 == 5 ? 4 : 0;
      if (tag % 8 == 0) field.integer = varint();
      if (tag % 8 == 2) size = varint();
      EXPECT_LE(at + size, bytes.size());
      field.bytes = bytes.substr(at, size);
      at += size;
      fields.push_back(std::move(field));
    }
  }
  const Field* find(uint64_t number) const {
    auto found =
        std::find_if(fields.begin(), fields.end(), [&](const Field& f) { return f.number == number; });
    return found == fields.end() ? nullptr : &*found;
  }
  Field at(uint64_t number) const {
    const Field* field = find(number);
    EXPECT_NE(field, nullptr) << "field " << number;
    return field ? *field : Field{};
  }
  Message in(uint64_t number) const { return Message(at(number).bytes); }
};

// The events of a file, framing and check values verified.
std::vector<Message> events_of(const std::string& path) {
  std::string text = read_file(path);
  std::vector<Message> events;
  for (size_t at = 0; at < text.size();) {
    uint64_t length = 0;
    uint32_t length_check = 0, check = 0;
    std::memcpy(&length, text.data() + at, 8);
    std::memcpy(&length_check, text.data() + at + 8, 4);
    EXPECT_EQ(length_check, masked_crc32c(std::string_view(text).substr(at, 8)));
    EXPECT_LE(at + 16 + length, text.size());
    if (at + 16 + length > text.size()) break;
    std::string bytes = text.substr(at + 12, length);
    std::memcpy(&check, text.data() + at + 12 + length, 4);
    EXPECT_EQ(check, masked_crc32c(bytes));
    events.emplace_back(bytes);
    at += 16 + length;
  }
  return events;
}

TEST_F(TensorBoard, ScalarsAndText) {
  TensorBoardWriter writer(at("board"));
  EXPECT_EQ(fs::path(writer.path()).filename().string().rfind("events.out.tfevents.", 0), 0u);
  writer.write({7, {{"train/loss", 2.5}, {"tokens", int64_t{300}}, {"sample", std::string("a|b \xc3\xa9")}}});
  writer.scalar(8, "bad\xff tag", std::nan(""));
  writer.write({9, {}});
  std::vector<Message> events = events_of(writer.path());
  ASSERT_EQ(events.size(), 3u);
  EXPECT_EQ(events[0].at(3).bytes, "brain.Event:2");
  EXPECT_NEAR(events[0].at(1).f64(), static_cast<double>(std::time(nullptr)), 60);
  EXPECT_EQ(events[1].at(2).integer, 7u);
  std::vector<Field> values = events[1].in(5).fields;
  ASSERT_EQ(values.size(), 3u);
  for (const Field& value : values) EXPECT_EQ(value.number, 1u);
  EXPECT_EQ(Message(values[0].bytes).at(1).bytes, "train/loss");
  EXPECT_EQ(Message(values[0].bytes).at(2).f32(), 2.5f);
  EXPECT_EQ(Message(values[1].bytes).at(2).f32(), 300.0f);
  Message text(values[2].bytes);
  EXPECT_EQ(text.in(9).in(1).at(1).bytes, "text");
  EXPECT_EQ(text.in(9).at(4).integer, 2u);
  EXPECT_EQ(text.in(8).at(1).integer, 7u);
  EXPECT_EQ(text.in(8).in(2).in(2).at(1).integer, 1u);
  EXPECT_EQ(text.in(8).at(8).bytes, "a|b \xc3\xa9");
  Message bad(events[2].in(5).at(1).bytes);
  EXPECT_EQ(bad.at(1).bytes, "bad? tag");
  EXPECT_TRUE(std::isnan(bad.at(2).f32()));
}

TEST_F(TensorBoard, ResumingVoidsLaterSteps) {
  TensorBoardWriter first(at("board")), second(at("board"), 5);
  EXPECT_NE(first.path(), second.path());
  EXPECT_EQ(events_of(first.path()).size(), 1u);
  std::vector<Message> events = events_of(second.path());
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[1].at(2).integer, 5u);
  EXPECT_EQ(events[1].in(7).at(1).integer, 1u);
}

TEST_F(TensorBoard, Histograms) {
  TensorBoardWriter writer(at("board"));
  const std::vector<float> values = {1, 5, 3, 3.5f, 2, std::numeric_limits<float>::infinity(), NAN, 1.5f};
  writer.histogram(2, "w", values, 4);
  writer.histogram(2, "one", std::vector<float>{3, 3}, 4);
  writer.histogram(2, "none", std::vector<float>{NAN}, 4);
  std::vector<Message> events = events_of(writer.path());
  ASSERT_EQ(events.size(), 3u);
  Message histogram = Message(events[1].in(5).at(1).bytes).in(5);
  EXPECT_EQ(histogram.at(1).f64(), 1);
  EXPECT_EQ(histogram.at(2).f64(), 5);
  EXPECT_EQ(histogram.at(3).f64(), 6);
  EXPECT_EQ(histogram.at(4).f64(), 16);
  EXPECT_EQ(histogram.at(5).f64(), 1 + 25 + 9 + 12.25 + 4 + 2.25);
  EXPECT_EQ(histogram.at(6).f64s(), (std::vector<double>{2, 3, 4, 5}));
  EXPECT_EQ(histogram.at(7).f64s(), (std::vector<double>{2, 1, 2, 1}));
  Message one = Message(events[2].in(5).at(1).bytes).in(5);
  EXPECT_EQ(one.at(6).f64s(), std::vector<double>{3});
  EXPECT_EQ(one.at(7).f64s(), std::vector<double>{2});
}

}  // namespace
}  // namespace latente
