#include "checkpoint/gguf.h"

#include "checkpoint/gguf_bytes.h"
#include "checkpoint/hostile.h"

namespace latente {
namespace {

GgufFile open_bytes(const std::string& bytes) {
  return GgufFile(std::as_bytes(std::span(bytes.data(), bytes.size())), "file");
}

constexpr uint32_t f32 = 0, q4_0 = 2, q8_0 = 8, q4_k = 12;
const std::string four_floats(16, '\1');

GgufBytes good_file() {
  GgufBytes file;
  file.set("general.architecture", "deepseek2").set("deepseek2.block_count", 2u);
  file.set("deepseek2.rope.freq_base", 10000.f).set("deepseek2.expert_weights_norm", true);
  file.set("tokenizer.ggml.tokens", std::vector<std::string>{"a", "", "bc"});
  file.set("tokenizer.ggml.token_type", std::vector<int32_t>{1, -3, 4});
  file.floats("a", {2, 3}, {1, 2, 3, 4, 5, 6});
  file.tensor("b", {32, 1, 2}, q8_0, std::string(68, '\2'));
  file.tensor("c", {}, f32, bytes_of(std::vector<float>{7}));
  return file;
}

TEST(Gguf, ReadsKeysAndTensors) {
  for (uint32_t version : {2u, 3u}) {
    GgufBytes good = good_file();
    good.version = version;
    std::string bytes = good.bytes();
    GgufFile file = open_bytes(bytes);
    EXPECT_EQ(file.version(), version);
    EXPECT_EQ(file.alignment(), 32);
    EXPECT_EQ(file.metadata().size(), 6u);
    EXPECT_EQ(file.string_at("general.architecture"), "deepseek2");
    EXPECT_EQ(file.integer_at("deepseek2.block_count"), 2);
    EXPECT_EQ(file.number_at("deepseek2.rope.freq_base"), 10000);
    EXPECT_EQ(file.boolean("deepseek2.expert_weights_norm"), true);
    EXPECT_EQ(file.strings("tokenizer.ggml.tokens"), (std::vector<std::string_view>{"a", "", "bc"}));
    EXPECT_EQ(file.integers("tokenizer.ggml.token_type"), (std::vector<int64_t>{1, -3, 4}));
    EXPECT_FALSE(file.integer("none"));

    ASSERT_EQ(file.tensors().size(), 3u);
    const GgufTensor& a = *file.find_tensor("a");
    EXPECT_EQ(a.shape, (Shape{3, 2}));
    EXPECT_EQ(a.row_bytes(), 8);
    float values[6];
    std::memcpy(values, a.data.data(), a.data.size());
    EXPECT_EQ(values[5], 6);
    const GgufTensor& b = *file.find_tensor("b");
    EXPECT_EQ(b.shape, (Shape{2, 1, 32}));
    EXPECT_EQ(b.type, GgmlType::q8_0);
    EXPECT_EQ(b.rows(), 2);
    EXPECT_EQ(b.row_bytes(), 34);
    EXPECT_EQ(b.data.size(), 68u);
    EXPECT_EQ(file.find_tensor("c")->shape, Shape{1});
    EXPECT_EQ(file.find_tensor("d"), nullptr);
  }
}

TEST(Gguf, ReadsEveryValueType) {
  auto list = [](uint32_t type, uint64_t count, const std::string& elements) {
    return number_bytes(type) + number_bytes(count) + elements;
  };
  GgufBytes file;
  file.raw("u8", 0, number_bytes<uint8_t>(200)).raw("i8", 1, number_bytes<int8_t>(-100));
  file.raw("u16", 2, number_bytes<uint16_t>(60000)).raw("i16", 3, number_bytes<int16_t>(-30000));
  file.raw("u32", 4, number_bytes<uint32_t>(4000000000)).raw("i32", 5, number_bytes<int32_t>(-2000000000));
  file.raw("u64", 10, number_bytes<uint64_t>(1ull << 62)).raw("i64", 11, number_bytes<int64_t>(-1));
  file.raw("over", 10, number_bytes<uint64_t>(~0ull));
  file.raw("f32", 6, number_bytes(0.5f)).raw("f64", 12, number_bytes(0.1));
  file.raw("no", 7, std::string(1, '\0')).raw("empty", 8, text_bytes(""));
  file.raw("numbers", 9, list(12, 2, number_bytes(1.5) + number_bytes(-2.5)));
  file.raw("flags", 9, list(7, 3, std::string("\1\0\1", 3)));
  file.raw("nothing", 9, list(8, 0, ""));
  file.raw(
      "nested", 9,
      list(9, 2, list(8, 2, text_bytes("x") + text_bytes("yz")) + list(9, 1, list(5, 1, number_bytes(7)))));
  std::string bytes = file.bytes();
  GgufFile read = open_bytes(bytes);
  EXPECT_EQ(read.integer("u8"), 200);
  EXPECT_EQ(read.integer("i8"), -100);
  EXPECT_EQ(read.integer("u16"), 60000);
  EXPECT_EQ(read.integer("i16"), -30000);
  EXPECT_EQ(read.integer("u32"), 4000000000);
  EXPECT_EQ(read.integer("i32"), -2000000000);
  EXPECT_EQ(read.integer("u64"), int64_t{1} << 62);
  EXPECT_EQ(read.integer("i64"), -1);
  EXPECT_EQ(read.number("f32"), 0.5);
  EXPECT_EQ(read.number("f64"), 0.1);
  EXPECT_EQ(read.number("i8"), -100);
  EXPECT_EQ(read.boolean("no"), false);
  EXPECT_EQ(read.string("empty"), "");
  EXPECT_EQ(read.find("numbers")->numbers(), (std::vector<double>{1.5, -2.5}));
  EXPECT_EQ(read.find("flags")->elements()[2].boolean(), true);
  EXPECT_EQ(read.strings("nothing"), std::vector<std::string_view>{});
  std::vector<GgufValue> nested = read.find("nested")->elements();
  ASSERT_EQ(nested.size(), 2u);
  EXPECT_EQ(nested[0].strings(), (std::vector<std::string_view>{"x", "yz"}));
  EXPECT_EQ(nested[1].elements()[0].integers(), std::vector<int64_t>{7});

  EXPECT_EQ(message_of([&] { read.integer("over"); }),
            "file: over: expected an integer, found 1.8446744073709552e+19");
  EXPECT_EQ(message_of([&] { read.integer("f32"); }), "file: f32: expected an integer, found 0.5");
  EXPECT_EQ(message_of([&] { read.string("u8"); }), "file: u8: expected a string, found 200");
  EXPECT_EQ(message_of([&] { read.boolean("empty"); }), "file: empty: expected true or false, found \"\"");
  EXPECT_EQ(message_of([&] { read.number("nested"); }),
            "file: nested: expected a number, found an array of 2 arrays");
  EXPECT_EQ(message_of([&] { read.strings("flags"); }),
            "file: flags: expected an array of strings, found an array of 3 booleans");
  EXPECT_EQ(message_of([&] { read.integers("numbers"); }),
            "file: numbers: expected an array of integers, found an array of 2 64-bit floats");
  EXPECT_EQ(message_of([&] { read.integer_at("none"); }), "file: no key none");
}

TEST(Gguf, AlignmentOfTheFilesChoice) {
  for (uint32_t alignment : {8u, 16u, 64u, 4096u}) {
    GgufBytes file;
    file.alignment = alignment;
    file.set("general.alignment", alignment);
    file.floats("a", {3}, {1, 2, 3}).floats("b", {1}, {4});
    std::string bytes = file.bytes();
    GgufFile read = open_bytes(bytes);
    EXPECT_EQ(read.alignment(), alignment);
    float b;
    std::memcpy(&b, read.find_tensor("b")->data.data(), 4);
    EXPECT_EQ(b, 4);
    EXPECT_EQ((reinterpret_cast<const char*>(read.find_tensor("b")->data.data()) - bytes.data()) % alignment,
              0);
    bytes.resize((bytes.size() + alignment - 1) / alignment * alignment);  // the last one padded too
    EXPECT_NO_THROW(open_bytes(bytes));
    bytes += '\0';
    expect_has(message_of([&] { open_bytes(bytes); }), "bytes of data, found");
  }
}

TEST(Gguf, DescriptionsInAnyOrder) {
  GgufBytes file;
  file.describe("second", {4}, f32, 32).describe("empty", {0}, f32, 32).describe("first", {4}, f32, 0);
  file.data = std::string(32, '\1') + std::string(16, '\2');
  std::string bytes = file.bytes();
  GgufFile read = open_bytes(bytes);
  EXPECT_EQ(read.tensors()[0].name, "first");
  EXPECT_EQ(static_cast<char>(read.find_tensor("second")->data[0]), '\2');
  EXPECT_EQ(read.find_tensor("empty")->data.size(), 0u);
  EXPECT_EQ(read.find_tensor("empty")->shape, Shape{0});
}

std::string with_counts(uint64_t tensors, uint64_t keys) {
  return "GGUF" + number_bytes<uint32_t>(3) + number_bytes(tensors) + number_bytes(keys) +
         std::string(64, '\0');
}

std::string with_value(uint32_t type, const std::string& value) {
  return GgufBytes().raw("k", type, value).bytes();
}

std::string with_list(uint32_t element, uint64_t count, const std::string& elements = {}) {
  return with_value(gguf_array, number_bytes(element) + number_bytes(count) + elements);
}

std::string with_tensor(const std::vector<uint64_t>& extents, uint32_t type, uint64_t offset, size_t data) {
  GgufBytes file;
  file.describe("t", extents, type, offset);
  file.data = std::string(data, '\0');
  return file.bytes();
}

std::string two(uint64_t first, uint64_t second, size_t data) {
  GgufBytes file;
  file.describe("a", {8}, f32, first).describe("b", {8}, f32, second);
  file.data = std::string(data, '\0');
  return file.bytes();
}

std::vector<Hostile> hostile_files() {
  const std::string magic = "GGUF", version = number_bytes<uint32_t>(3);
  std::string deep;
  for (int i = 0; i < 100'000; ++i) deep += number_bytes(gguf_array) + number_bytes<uint64_t>(1);
  GgufBytes old = good_file(), next = good_file(), swapped = good_file();
  old.version = 1, next.version = 4, swapped.version = 0x03000000;
  auto key = [](const std::string& name) { return GgufBytes().raw(name, gguf_u8, "x").bytes(); };
  auto tensor = [](const std::string& name) { return GgufBytes().describe(name, {0}, f32, 0).bytes(); };
  auto alignment = [](uint32_t value) { return GgufBytes().set("general.alignment", value).bytes(); };
  constexpr uint64_t two_to_62 = uint64_t{1} << 62;
  return {
      {"empty", "", "expected 4 bytes of the magic \"GGUF\", found 0"},
      {"magic cut off", "GGU", "found 3"},
      {"another magic", "GGJT" + version + std::string(32, '\0'),
       "expected the magic \"GGUF\", found \"GGJT\""},
      {"a hostile magic", "\x1b[2J" + version, "found \"\\x1b[2J\""},
      {"no version", magic, "expected 4 bytes of a version, found 0"},
      {"version 1", old.bytes(), "expected version 2 or 3, found 1"},
      {"version 4", next.bytes(), "expected version 2 or 3, found 4"},
      {"version 0", magic + std::string(20, '\0'), "expected version 2 or 3, found 0"},
      {"big-endian", swapped.bytes(), "found 50331648, which is big-endian"},
      {"no counts", magic + version, "expected 8 bytes of a count, found 0"},
      {"tensor count -1", with_counts(~0ull, 0), "tensors in 72 bytes, found 18446744073709551615"},
      {"key count -1", with_counts(0, ~0ull), "keys in 64 bytes, found 18446744073709551615"},
      {"tensor count beyond the file", with_counts(3, 0), "expected at most 2 tensors in 72 bytes, found 3"},
      {"key count beyond the file", with_counts(0, 5), "expected at most 4 keys in 64 bytes, found 5"},
      {"tensor count of 2^63", with_counts(uint64_t{1} << 63, 0), "expected at most 2 tensors"},
      {"a key count that multiplies to nothing", with_counts(0, uint64_t{1} << 60),
       "expected at most 4 keys"},
      {"empty key", key(""), "key 1 of 1: expected a key of 1 to 65535 bytes, found 0"},
      {"long key", key(std::string(65536, 'k')), "expected a key of 1 to 65535 bytes, found 65536"},
      {"newline in a key", key("a\nb"), "a key \"a\\x0ab\" has a control character"},
      {"NUL in a key", key(std::string("a\0b", 3)), "has a control character"},
      {"key length -1", with_counts(0, 1).substr(0, 24) + number_bytes(~0ull) + std::string(64, 'x'),
       "key 1 of 1: expected 18446744073709551615 bytes of a key, found 64"},
      {"the same key twice", GgufBytes().set("k", 1u).set("k", "x").bytes(), "key \"k\": is there twice"},
      {"value type 13", with_value(13, "xxxxxxxx"),
       "key \"k\": expected a value type from 0 to 12, found 13"},
      {"negative value type", with_value(~0u, "xxxxxxxx"), "from 0 to 12, found -1"},
      {"huge string", with_value(gguf_string, number_bytes<uint64_t>(1ull << 40) + "x"),
       "key \"k\": expected 1099511627776 bytes of a string"},
      {"string of -1", with_value(gguf_string, number_bytes(~0ull) + "x"), "bytes of a string, found"},
      {"string one byte too long",
       GgufBytes().raw("k", gguf_string, number_bytes<uint64_t>(2) + "x").bytes().substr(0, 46),
       "expected 2 bytes of a string, found 1"},
      {"boolean 2", with_value(gguf_bool, "\2"), "expected booleans of 0 or 1"},
      {"boolean -1 in an array", with_list(gguf_bool, 2, "\1\xff"), "expected booleans of 0 or 1"},
      {"huge array", with_list(gguf_u8, 1ull << 40), "key \"k\": expected at most"},
      {"array of -1", with_list(gguf_i32, ~0ull), "elements in"},
      {"array whose bytes wrap to 0", with_list(gguf_u64, 1ull << 61), "elements in"},
      {"array of strings beyond the file", with_list(gguf_string, 1ull << 32), "elements in"},
      {"array of arrays beyond the file", with_list(gguf_array, 1ull << 60), "elements in"},
      {"string in an array beyond the file", with_list(gguf_string, 1, number_bytes<uint64_t>(999)),
       "expected 999 bytes of a string"},
      {"array of type 13", with_list(13, 1, "xxxx"), "from 0 to 12, found 13"},
      {"deep arrays", with_list(gguf_array, 1, deep), "expected at most 8 nested arrays, found more"},
      {"alignment 0", alignment(0), "general.alignment: expected a power of two from 8 on"},
      {"alignment 1", alignment(1), "a power of two from 8 on as a 32-bit integer, found 1"},
      {"alignment 24", alignment(24), "found 24"},
      {"alignment 4294967295", alignment(~0u), "found 4294967295"},
      {"alignment of a wrong type", GgufBytes().set("general.alignment", "32").bytes(), "found \"32\""},
      {"alignment beyond the file",
       [] {
         GgufBytes file;
         file.set("general.alignment", 1u << 31).describe("t", {4}, f32, 0);
         file.data = four_floats;
         return file.bytes();
       }(),
       "expected 16 bytes of data from byte 0 on, found 0 in all"},
      {"empty name", tensor(""), "tensor 1 of 1: expected a name of 1 to 64 bytes, found 0"},
      {"long name", tensor(std::string(65, 't')), "expected a name of 1 to 64 bytes, found 65"},
      {"escape in a name", tensor("a\x1b[0m"), "has a control character"},
      {"5 axes", with_tensor({1, 1, 1, 1, 1}, f32, 0, 4), "tensor \"t\": expected at most 4 axes, found 5"},
      {"axes -1",
       [] {
         std::string bytes = with_tensor({4}, f32, 0, 16);
         return bytes.replace(33, 4, "\xff\xff\xff\xff");
       }(),
       "expected at most 4 axes, found 4294967295"},
      {"negative extent", with_tensor({4, ~0ull}, f32, 0, 16), "expected no negative extent, found -1"},
      {"extents overflow", with_tensor({1ull << 32, 1ull << 32}, f32, 0, 16),
       "tensor \"t\": [4294967296, 4294967296] of F32 is not a size in bytes"},
      {"extents wrap to the size", with_tensor({two_to_62 + 1, 4}, f32, 0, 16), "is not a size in bytes"},
      {"bytes overflow", with_tensor({two_to_62}, f32, 0, 16), "is not a size in bytes"},
      {"values overflow, bytes do not", with_tensor({256, two_to_62 / 128}, q4_k, 0, 16),
       "is not a size in bytes"},
      {"overflow behind a zero", with_tensor({0, 1ull << 32, 1ull << 32}, f32, 0, 0),
       "is not a size in bytes"},
      {"half a block", with_tensor({48, 2}, q4_0, 0, 54),
       "expected rows of whole Q4_0 blocks of 32 values, found 48 values"},
      {"unknown element type", with_tensor({4}, 5, 0, 16), "tensor \"t\": unknown element type 5"},
      {"negative element type", with_tensor({4}, ~0u, 0, 16), "unknown element type -1"},
      {"element type 2^31", with_tensor({4}, 1u << 31, 0, 16), "unknown element type -2147483648"},
      {"dimensions beyond the data", with_tensor({5}, f32, 0, 16),
       "tensor \"t\": expected 20 bytes of data from byte 0 on, found 16 in all"},
      {"no data", with_tensor({4}, f32, 0, 0), "found 0 in all"},
      {"offset that is not aligned", with_tensor({4}, f32, 4, 36), "found 4 (a gap)"},
      {"offset beyond the data", with_tensor({4}, f32, 1ull << 40, 16), "found 1099511627776 (a gap)"},
      {"offset -32", with_tensor({4}, f32, ~31ull, 16), "a gap"},
      {"empty tensor beyond the data", two(0, 64, 32), "a gap"},
      {"the same bytes twice", two(0, 0, 64),
       "tensor \"b\": expected data from byte 32 on, found 0 (an overlap)"},
      {"overlap", two(0, 16, 64), "found 16 (an overlap)"},
      {"gap", two(0, 64, 96), "tensor \"b\": expected data from byte 32 on, found 64 (a gap)"},
      {"gap at the start", with_tensor({8}, f32, 32, 64), "expected data from byte 0 on, found 32 (a gap)"},
      {"data beyond the last tensor", with_tensor({8}, f32, 0, 33), "expected 32 bytes of data, found 33"},
      {"the same name twice", GgufBytes().floats("a", {1}, {1}).floats("a", {1}, {2}).bytes(),
       "duplicate tensor \"a\""},
      {"the same name twice, empty", GgufBytes().floats("a", {0}, {}).floats("a", {0}, {}).bytes(),
       "duplicate tensor"},
  };
}

TEST(GgufHostile, EveryCaseIsAnError) { expect_errors<GgufFile>(hostile_files(), open_bytes); }

// Cut or changed at every byte, a good file is either an Error or a file whose values and tensors lie within
// it.
TEST(GgufHostile, EveryTruncationAndByte) {
  std::string good = good_file().bytes();
  EXPECT_EQ(open_bytes(good).tensors().size(), 3u);
  const int accepted =
      expect_errors_when_damaged(good, open_bytes, [](const GgufFile& file, const std::string& bytes) {
        auto within = [&](std::span<const std::byte> part) {
          const char* begin = reinterpret_cast<const char*>(part.data());
          return part.empty() ||
                 (begin >= bytes.data() && begin + part.size() <= bytes.data() + bytes.size());
        };
        for (const GgufTensor& tensor : file.tensors()) EXPECT_TRUE(within(tensor.data));
        for (const auto& [key, value] : file.metadata()) {
          EXPECT_TRUE(within(value.bytes));
          EXPECT_FALSE(value.describe().empty());
        }
      });
  EXPECT_GT(accepted, 8 * 96);  // at least every change of data
}

// 200,000 strings, as a large vocabulary has.
TEST(Gguf, LargeVocabulary) {
  std::vector<std::string> tokens;
  for (int i = 0; i < 200'000; ++i) tokens.push_back(fmt::format("token {}", i));
  std::string bytes = GgufBytes().set("tokenizer.ggml.tokens", tokens).bytes();
  GgufFile file = open_bytes(bytes);
  std::vector<std::string_view> read = *file.strings("tokenizer.ggml.tokens");
  ASSERT_EQ(read.size(), tokens.size());
  EXPECT_EQ(read[123'456], "token 123456");
  EXPECT_GE(read[0].data(), bytes.data());  // not copied
}

}  // namespace
}  // namespace latente
