#include "checkpoint/safetensors.h"

#include <chrono>
#include <set>

#include "checkpoint/copy.h"
#include "checkpoint/hostile.h"
#include "checkpoint/json.h"
#include "checkpoint/support.h"

#include <nlohmann/json.hpp>

namespace latente {
namespace {

SafetensorsFile open_bytes(const std::string& bytes) {
  return SafetensorsFile(std::as_bytes(std::span(bytes.data(), bytes.size())), "file");
}

std::string length_prefix(uint64_t length) { return bytes_of(&length, 8); }

// {"a": <entry>} over `size` bytes of data.
std::string one(const std::string& entry, size_t size) {
  return safetensors_bytes("{\"a\":" + entry + "}", std::string(size, '\0'));
}

std::string shaped(const std::string& dtype, const std::string& shape, const std::string& offsets,
                   size_t size) {
  return one("{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}", size);
}

std::string two(const std::string& first, const std::string& second, size_t size) {
  auto entry = [](const std::string& offsets) {
    return "{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":" + offsets + "}";
  };
  return safetensors_bytes("{\"a\":" + entry(first) + ",\"b\":" + entry(second) + "}",
                           std::string(size, '\0'));
}

std::vector<Hostile> hostile_files() {
  const std::string good = R"({"dtype":"U8","shape":[4],"data_offsets":[0,4]})";
  std::string deep = "{\"a\":", nested;
  for (int i = 0; i < 1'000'000; ++i) nested += '[';
  return {
      {"empty", "", "at least 8 bytes, found 0"},
      {"under 8 bytes", "1234567", "at least 8 bytes, found 7"},
      {"no header", length_prefix(0), "starts with '{'"},
      {"header longer than the file", length_prefix(100) + "{}", "expected a header of 100 bytes, found 2"},
      {"header one byte short", length_prefix(3) + "{}", "expected a header of 3 bytes, found 2"},
      {"header over 100 MB", length_prefix(100'000'001) + "{}", "at most 100000000 bytes"},
      {"largest length", length_prefix(~uint64_t{0}) + "{}", "at most 100000000 bytes"},
      {"negative length", length_prefix(uint64_t{1} << 63) + "{}", "at most 100000000 bytes"},
      {"not an object", safetensors_bytes("[]"), "starts with '{'"},
      {"space before", safetensors_bytes(" {}"), "starts with '{'"},
      {"byte order mark", safetensors_bytes("\xef\xbb\xbf{}"), "starts with '{'"},
      {"cut off", safetensors_bytes("{\"a\":"), "not valid JSON"},
      {"text after the end", safetensors_bytes("{} x"), "not valid JSON"},
      {"second object", safetensors_bytes("{}{}"), "not valid JSON"},
      {"NUL padding", safetensors_bytes(std::string("{}\0\0", 4)), "a NUL byte"},
      {"NUL then text", safetensors_bytes(std::string("{}\0{", 4)), "a NUL byte"},
      {"comment", safetensors_bytes("{/* */}"), "not valid JSON"},
      {"trailing comma", safetensors_bytes("{\"a\":" + good + ",}", "0000"), "not valid JSON"},
      {"not UTF-8 in a name", safetensors_bytes("{\"\xff\":" + good + "}", "0000"), "not UTF-8"},
      {"overlong UTF-8", safetensors_bytes("{\"\xc0\xaf\":" + good + "}", "0000"), "not UTF-8"},
      {"UTF-8 cut off", safetensors_bytes("{\"\xe2\x82\":" + good + "}", "0000"), "not UTF-8"},
      {"encoded surrogate", safetensors_bytes("{\"\xed\xa0\x80\":" + good + "}", "0000"), "not UTF-8"},
      {"not UTF-8 outside strings", safetensors_bytes("{\xff}"), "not "},
      {"lone surrogate escape", safetensors_bytes("{\"\\ud800\":" + good + "}", "0000"), "not valid JSON"},
      {"newline in a name", safetensors_bytes("{\"a\\nb\":" + good + "}", "0000"), "control character"},
      {"NUL in a name", safetensors_bytes("{\"a\\u0000b\":" + good + "}", "0000"), "control character"},
      {"deep nesting in place of an entry", safetensors_bytes(deep + nested),
       "expected an object, found an array"},
      {"deep nesting in a shape", one("{\"dtype\":\"U8\",\"shape\":" + nested, 0),
       "expected an unsigned extent"},
      {"deep nesting in metadata", safetensors_bytes("{\"__metadata__\":{\"a\":" + nested),
       "expected a string"},
      {"entry is null", one("null", 0), "expected an object, found null"},
      {"entry is a string", one("\"x\"", 0), "expected an object"},
      {"entry is a number", one("4", 0), "expected an object"},
      {"entry is a boolean", one("true", 0), "expected an object"},
      {"entry is empty", one("{}", 0), "no dtype"},
      {"no shape", one(R"({"dtype":"U8","data_offsets":[0,0]})", 0), "no shape"},
      {"no offsets", one(R"({"dtype":"U8","shape":[0]})", 0), "no data_offsets"},
      {"unknown key", one(R"({"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":1})", 4), "unknown key"},
      {"key twice in an entry", one(R"({"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]})", 4),
       "duplicate key"},
      {"shape twice", one(R"({"dtype":"U8","shape":[],"shape":[4],"data_offsets":[0,4]})", 4),
       "duplicate key"},
      {"same tensor twice", safetensors_bytes("{\"a\":" + good + ",\"a\":" + good + "}", "0000"), ""},
      {"same empty tensor twice",
       safetensors_bytes(R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},)"
                         R"("a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})"),
       "duplicate tensor"},
      {"same tensor twice, apart",
       safetensors_bytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                         R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                         "01"),
       "duplicate tensor"},
      {"same name by escapes",
       safetensors_bytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                         R"("\u0061":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                         "01"),
       "duplicate tensor"},
      {"metadata twice", safetensors_bytes(R"({"__metadata__":{},"__metadata__":{}})"),
       "duplicate key __metadata__"},
      {"metadata key twice", safetensors_bytes(R"({"__metadata__":{"a":"1","a":"1"}})"), "duplicate key"},
      {"metadata is null", safetensors_bytes(R"({"__metadata__":null})"), "expected an object"},
      {"metadata value is a number", safetensors_bytes(R"({"__metadata__":{"a":1}})"),
       "expected a string, found 1"},
      {"metadata value is an object", safetensors_bytes(R"({"__metadata__":{"a":{}}})"), "expected a string"},
      {"dtype is a number", one(R"({"dtype":1,"shape":[4],"data_offsets":[0,4]})", 4),
       "expected a dtype string"},
      {"unknown dtype", shaped("F31", "[4]", "[0,4]", 4), "unknown dtype \"F31\""},
      {"dtype in lower case", shaped("f32", "[1]", "[0,4]", 4), "unknown dtype"},
      {"hostile dtype", shaped("\\u0000\\n\\u001b[2J", "[1]", "[0,4]", 4),
       "unknown dtype \"\\x00\\x0a\\x1b[2J\""},
      {"shape is a number", shaped("U8", "4", "[0,4]", 4), "expected an array of extents"},
      {"shape is an object", shaped("U8", "{}", "[0,4]", 4), "expected an array of extents"},
      {"negative extent", shaped("U8", "[-4]", "[0,4]", 4), "expected an unsigned extent, found -4"},
      {"negative extents with a positive product", shaped("U8", "[-2,-2]", "[0,4]", 4), "found -2"},
      {"negative zero", shaped("U8", "[-0]", "[0,0]", 0), "expected an unsigned extent"},
      {"fractional extent", shaped("U8", "[4.5]", "[0,4]", 4), "expected an unsigned extent"},
      {"extent as a float", shaped("U8", "[4.0]", "[0,4]", 4), "expected an unsigned extent"},
      {"extent with an exponent", shaped("U8", "[4e0]", "[0,4]", 4), "expected an unsigned extent"},
      {"extent as a string", shaped("U8", "[\"4\"]", "[0,4]", 4), "expected an unsigned extent"},
      {"extent null", shaped("U8", "[null]", "[0,4]", 4), "expected an unsigned extent"},
      {"extent over 2^63", shaped("U8", "[9223372036854775808]", "[0,4]", 4), "too large"},
      {"extent over 2^64", shaped("U8", "[18446744073709551617]", "[0,1]", 1), "expected an unsigned extent"},
      {"product overflows", shaped("U8", "[4294967296,4294967296]", "[0,0]", 0), "not a size in bytes"},
      {"product wraps to the size", shaped("U8", "[4611686018427387905,4]", "[0,4]", 4),
       "not a size in bytes"},
      {"dtype overflows", shaped("F32", "[4611686018427387904]", "[0,0]", 0), "not a size in bytes"},
      {"overflow behind a zero", shaped("U8", "[0,4294967296,4294967296]", "[0,0]", 0),
       "not a size in bytes"},
      {"rank 9", shaped("U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]", 1), "expected 8 extents at most"},
      {"half a byte", shaped("F4", "[3]", "[0,2]", 2), "not a size in bytes"},
      {"offsets are a number", shaped("U8", "[4]", "4", 4), "expected an array of 2 offsets"},
      {"no offset", shaped("U8", "[4]", "[]", 4), "expected 2 data_offsets, found 0"},
      {"one offset", shaped("U8", "[4]", "[4]", 4), "expected 2 data_offsets, found 1"},
      {"three offsets", shaped("U8", "[4]", "[0,4,4]", 4), "expected 2 offsets, found more"},
      {"negative offset", shaped("U8", "[4]", "[-4,0]", 4), "expected an unsigned offset, found -4"},
      {"fractional offset", shaped("U8", "[4]", "[0.5,4.5]", 4), "expected an unsigned offset"},
      {"offsets over 2^63", shaped("U8", "[4]", "[0,18446744073709551615]", 4), "too large"},
      {"offsets reversed", shaped("U8", "[4]", "[4,0]", 4), "found 4 to 0"},
      {"beyond the data", shaped("U8", "[5]", "[0,5]", 4), "within 4 bytes of data, found 0 to 5"},
      {"no data", shaped("U8", "[5]", "[0,5]", 0), "within 0 bytes"},
      {"length too long for the shape", shaped("U8", "[3]", "[0,4]", 4),
       "expected 3 bytes for [3] of U8, found 4"},
      {"length too short for the shape", shaped("F32", "[2]", "[0,4]", 4), "expected 8 bytes"},
      {"scalar of the wrong length", shaped("F32", "[]", "[0,8]", 8), "expected 4 bytes"},
      {"gap at the start", shaped("U8", "[4]", "[4,8]", 8), "a gap"},
      {"gap between", two("[0,4]", "[8,12]", 12), "a gap"},
      {"gap at the end", shaped("U8", "[4]", "[0,4]", 5), "expected 4 bytes of data, found 5"},
      {"overlap", two("[0,4]", "[2,6]", 6), "an overlap"},
      {"same bytes twice", two("[0,4]", "[0,4]", 4), "an overlap"},
      {"data without tensors", safetensors_bytes("{}", "x"), "expected 0 bytes of data, found 1"},
  };
}

TEST(SafetensorsHostile, EveryCaseIsAnError) { expect_errors<SafetensorsFile>(hostile_files(), open_bytes); }

// Cut or changed at every byte, a good file is either an Error or a file whose tensors lie within it.
TEST(SafetensorsHostile, EveryTruncationAndByte) {
  std::string good = safetensors_bytes(
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":)"
      R"({"dtype":"BF16","shape":[3],"data_offsets":[8,14]}})",
      "01234567890123");
  EXPECT_EQ(open_bytes(good).entries().size(), 2u);
  const int accepted =
      expect_errors_when_damaged(good, open_bytes, [](const SafetensorsFile& file, const std::string& bytes) {
        for (const SafetensorsEntry& entry : file.entries()) {
          const char* begin = reinterpret_cast<const char*>(entry.data);
          EXPECT_GE(begin, bytes.data());
          EXPECT_LE(begin + entry.bytes, bytes.data() + bytes.size());
        }
      });
  EXPECT_GT(accepted, 8 * 14);  // at least every change of data
}

TEST(Safetensors, AcceptsWhatTheFormatAllows) {
  std::string bytes = safetensors_bytes(
      R"({ "scalar": {"data_offsets":[4,8],"shape":[],"dtype":"F32"}, "empty" :{"dtype":"I64","shape":[0,3],"data_offsets":[4,4]},)"
      "\n\t"
      R"("first":{"dtype":"BOOL","shape":[4],"data_offsets":[0,4]},"nämé \u00e9":{"dtype":"I16","shape":[1,1,1,1,1],"data_offsets":[8,10]}}   )",
      std::string("\1\0\0\1", 4) + bytes_of(std::vector<float>{2.5f}) + "xx");
  SafetensorsFile file = open_bytes(bytes);
  std::vector<std::string> order;
  for (const SafetensorsEntry& entry : file.entries()) order.push_back(entry.name);
  EXPECT_EQ(order, (std::vector<std::string>{"first", "empty", "scalar", "nämé é"}));
  EXPECT_EQ(file.at("scalar").shape(), Shape{1});
  EXPECT_EQ(file.at("first").dtype, DType::u8);
  EXPECT_EQ(file.at("empty").shape(), (Shape{0, 3}));
  EXPECT_TRUE(file.metadata().empty());
  std::vector<float> value(1);
  file.read("scalar", view_of(value, {1}));
  EXPECT_EQ(value[0], 2.5f);
  std::vector<int64_t> flags(4);
  file.read("first", view_of(flags, {4}));
  EXPECT_EQ(flags, (std::vector<int64_t>{1, 0, 0, 1}));

  // A type and a rank that only matter when asked for.
  EXPECT_FALSE(file.at("nämé é").dtype);
  EXPECT_FALSE(file.try_view(file.at("nämé é")));
  expect_has(message_of([&] { file.view("nämé é"); }), "elements of type I16");
  std::vector<int32_t> integers(1);
  expect_has(message_of([&] { file.read("nämé é", view_of(integers, {1})); }), "elements of type I16");
  expect_has(message_of([&] { file.at("nämé é").shape(); }), "at most 4 axes, found 5");
  expect_has(message_of([&] { file.at("none"); }), "file: no tensor \"none\"");
  EXPECT_TRUE(open_bytes(safetensors_bytes("{}")).entries().empty());
}

TEST(Safetensors, ReadErrorsNameShapes) {
  std::string bytes = shaped("F32", "[2,3]", "[0,24]", 24);
  SafetensorsFile file = open_bytes(bytes);
  std::vector<float> values(6);
  EXPECT_EQ(message_of([&] {
              file.read("a", view_of(values, {3, 2}));
            }),
            "a: expected [3, 2], found [2, 3] in file");
  EXPECT_EQ(message_of([&] { file.read("a", view_of(values, {6})); }),
            "a: expected [6], found [2, 3] in file");
  std::vector<int32_t> integers(6);
  expect_has(message_of([&] { file.read("a", view_of(integers, {2, 3})); }), "cannot convert f32 to i32");
}

TEST(Safetensors, IntegersAreCheckedForRange) {
  std::vector<int64_t> values = {-5, 2147483648};
  std::string bytes =
      safetensors_bytes(R"({"a":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}})", bytes_of(values));
  SafetensorsFile file = open_bytes(bytes);
  std::vector<int32_t> narrow(2);
  expect_has(message_of([&] { file.read("a", view_of(narrow, {2})); }),
             "a: 2147483648 does not fit into i32");
  EXPECT_EQ(narrow[0], -5);
  std::vector<uint8_t> bytes_target(2);
  expect_has(message_of([&] { file.read("a", View(bytes_target.data(), {2}, DType::u8)); }),
             "-5 does not fit into u8");
}

// Header lengths that are not multiples of 8 leave the data anywhere.
TEST(Safetensors, MisalignedDataIsReadAndNotMapped) {
  std::mt19937 generator = seeded();
  std::vector<float> values = random_floats(generator, 3000);
  for (size_t shift = 0; shift < 8; ++shift) {
    std::string header = R"({"a":{"dtype":"F32","shape":[30,100],"data_offsets":[0,12000]}})";
    while ((8 + header.size()) % 8 != shift) header += ' ';
    TemporaryDirectory directory;
    directory.put("x", safetensors_bytes(header, bytes_of(values)));
    SafetensorsFile file(directory.at("x"));
    std::vector<float> same(3000);
    file.read("a", view_of(same, {30, 100}));
    EXPECT_EQ(same, values);
    std::vector<double> wide(3000);
    file.read("a", view_of(wide, {30, 100}));
    EXPECT_EQ(wide, std::vector<double>(values.begin(), values.end()));
    EXPECT_EQ(file.try_view(file.at("a")).has_value(), shift % 4 == 0) << shift;
    if (shift % 4 != 0) expect_has(message_of([&] { file.view("a"); }), "not aligned to 4 bytes");
  }
}

TEST(Safetensors, HundredThousandEntries) {
  constexpr int count = 100'000;
  std::string header = "{";
  for (int i = 0; i < count; ++i) {
    header += fmt::format(R"({}"model.layers.{}.weight":{{"dtype":"U8","shape":[1],"data_offsets":[{},{}]}})",
                          i ? "," : "", i, count - 1 - i, count - i);
  }
  std::string data(count, '\0');
  for (int i = 0; i < count; ++i) data[static_cast<size_t>(i)] = static_cast<char>(i % 251);
  std::string bytes = safetensors_bytes(header + "}", data);
  auto begin = std::chrono::steady_clock::now();
  SafetensorsFile file = open_bytes(bytes);
  std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  std::printf("%.0f ms\n", seconds.count() * 1e3);
  ASSERT_EQ(file.entries().size(), static_cast<size_t>(count));
  for (int i = 0; i < count; i += 997) {
    const SafetensorsEntry& entry = file.at(fmt::format("model.layers.{}.weight", i));
    EXPECT_EQ(static_cast<int>(*entry.data), (count - 1 - i) % 251);
  }
  bytes[bytes.find("layers.77777.") + 7] = '1';  // now the name of another one
  expect_has(message_of([&] { open_bytes(bytes); }), "duplicate tensor \"model.layers.17777.weight\"");
}

TEST(SafetensorsWriter, RandomRoundTrips) {
  std::mt19937 generator = seeded();
  TemporaryDirectory directory;
  constexpr DType types[] = {DType::f64,    DType::f32, DType::bf16, DType::f16,
                             DType::f8e4m3, DType::i64, DType::i32,  DType::u8};
  for (int round = 0; round < 60; ++round) {
    std::vector<TensorSpec> specs;
    std::vector<std::string> data;
    for (int i = 0, n = static_cast<int>(generator() % 12); i < n; ++i) {
      std::vector<int64_t> extents;
      for (size_t axis = 0, rank = 1 + generator() % 4; axis < rank; ++axis)
        extents.push_back(static_cast<int64_t>(generator() % 7));
      TensorSpec spec{fmt::format("tensor \"{}\" \u00e9\\", i), types[generator() % 8],
                      Shape(std::span<const int64_t>(extents))};
      std::string bytes(static_cast<size_t>(spec.bytes()), '\0');
      for (char& c : bytes) c = static_cast<char>(generator());
      specs.push_back(spec);
      data.push_back(bytes);
    }
    std::map<std::string, std::string> metadata = {{"format", "pt"}, {"note", "line\n\"quoted\""}};
    SafetensorsWriter writer(directory.at("x"), specs, metadata);
    std::vector<size_t> order(specs.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), generator);
    for (size_t i : order) writer.write(specs[i].name, View(data[i].data(), specs[i].shape, specs[i].dtype));
    writer.commit();

    SafetensorsFile file(directory.at("x"));
    EXPECT_EQ(file.metadata(), metadata);
    ASSERT_EQ(file.entries().size(), specs.size());
    for (size_t i = 0; i < specs.size(); ++i) {
      View view = file.view(specs[i].name);  // an Error if it were not aligned
      EXPECT_EQ(view.shape, specs[i].shape);
      EXPECT_EQ(view.dtype, specs[i].dtype);
      EXPECT_EQ(bytes_of(view.data, static_cast<size_t>(view.bytes())), data[i]);
    }
    if (!file.entries().empty()) {
      EXPECT_EQ(reinterpret_cast<uintptr_t>(file.entries()[0].data) % 64, 0u);
    }
    // The header by another parser.
    std::string_view text = file.file().text();
    uint64_t length;
    std::memcpy(&length, text.data(), 8);
    EXPECT_EQ(length % 8, 0u);
    EXPECT_EQ(nlohmann::json::parse(text.substr(8, length)).size(), specs.size() + 1);
  }
}

TEST(SafetensorsWriter, ConvertsAndGathersStridedViews) {
  std::mt19937 generator = seeded();
  TemporaryDirectory directory;
  constexpr int64_t rows = 700, columns = 300;
  std::vector<float> values = random_floats(generator, rows * columns);
  View transposed(values.data(), {columns, rows}, DType::f32);
  transposed.strides = {1, columns};
  View window(values.data() + 5, {rows, 200}, DType::f32);
  window.strides = {columns, 1};
  SafetensorsWriter writer(directory.at("x"),
                           {{"t", DType::bf16, {columns, rows}}, {"w", DType::f32, {rows, 200}}});
  writer.write("w", window);
  writer.write("t", transposed);
  writer.commit();
  SafetensorsFile file(directory.at("x"));
  const bf16* t = file.view("t").as<bf16>();
  const float* w = file.view("w").as<float>();
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      float value = values[static_cast<size_t>(r * columns + c)];
      ASSERT_EQ(t[c * rows + r].bits, bf16(value).bits);
      if (c >= 5 && c < 205) {
        ASSERT_EQ(w[r * 200 + c - 5], value);
      }
    }
  }
  // And back into strided targets.
  std::vector<float> back(rows * columns, -1.0f);
  View target(back.data(), {columns, rows}, DType::f32);
  target.strides = {1, columns};
  file.read("t", target);
  for (size_t i = 0; i < back.size(); ++i) ASSERT_EQ(back[i], static_cast<float>(bf16(values[i])));
}

TEST(SafetensorsWriter, MistakesAreErrors) {
  TemporaryDirectory directory;
  std::vector<float> values(6);
  std::string path = directory.at("x");
  {
    SafetensorsWriter writer(path, {{"a", DType::f32, {2, 3}}, {"b", DType::f32, {6}}});
    expect_has(message_of([&] { writer.write("c", view_of(values, {6})); }), "\"c\" was not declared");
    expect_has(message_of([&] {
                 writer.write("a", view_of(values, {3, 2}));
               }),
               "expected [2, 3], found [3, 2]");
    writer.write("a", view_of(values, {2, 3}));
    expect_has(message_of([&] { writer.write("a", view_of(values, {2, 3})); }), "written twice");
    expect_has(message_of([&] { writer.commit(); }), "tensor b was declared but not written");
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory.path()));
  expect_has(message_of([&] {
               SafetensorsWriter w(path, {{"a", DType::f32, {1}}, {"a", DType::f32, {1}}});
             }),
             "duplicate");
  expect_has(message_of([&] {
               SafetensorsWriter w(path, {{"__metadata__", DType::f32, {1}}});
             }),
             "cannot name a tensor");
  expect_has(message_of([&] { SafetensorsWriter w(path, {{"\xff", DType::f32, {1}}}); }), "not UTF-8");
  expect_has(message_of([&] {
               SafetensorsWriter w(path, {{"a\nb", DType::f32, {1}}});
             }),
             "control character");
  expect_has(message_of([&] {
               SafetensorsWriter w(directory.at("none/x"), {{"a", DType::f32, {1}}});
             }),
             "none");
}

TEST(Json, StrictParsing) {
  EXPECT_EQ(parse_json(R"({"a":[1,-2,3.5,"x",null,true,{"b":[]}],"c":18446744073709551615})", "f"),
            nlohmann::json::parse(R"({"a":[1,-2,3.5,"x",null,true,{"b":[]}],"c":18446744073709551615})"));
  EXPECT_EQ(parse_json("3", "f"), 3);
  expect_has(message_of([] { parse_json(R"({"a":1,"b":{"x":1,"x":2}})", "f"); }), "f: duplicate key \"x\"");
  expect_has(message_of([] { parse_json("{\"a\":\n\n!}", "f"); }), "f: not valid JSON at byte 8");
  expect_has(message_of([] { parse_json("", "f"); }), "not valid JSON");
  expect_has(message_of([] { parse_json(std::string_view("1\0garbage", 9), "f"); }), "NUL");
  expect_has(message_of([] { parse_json("[1] 2", "f"); }), "not valid JSON");
  expect_has(message_of([] { parse_json("\"\xff\"", "f"); }), "not valid JSON");
  expect_has(message_of([] { parse_json("1e999", "f"); }), "not valid JSON");
  EXPECT_EQ(parse_json(std::string(64, '[') + std::string(64, ']'), "f").size(), 1u);
  expect_has(message_of([] { parse_json(std::string(65, '[') + std::string(65, ']'), "f"); }),
             "64 nested levels");
  expect_has(message_of([] { parse_json(std::string(1'000'000, '['), "f"); }), "64 nested levels");
  EXPECT_EQ(printable("a\n\x7f\xe9"), "\"a\\x0a\\x7f\\xe9\"");
  EXPECT_LT(printable(std::string(10'000, 'x')).size(), 120u);
}

}  // namespace
}  // namespace latente
