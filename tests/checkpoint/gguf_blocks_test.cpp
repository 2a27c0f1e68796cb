// Blocks against what llama.cpp's Python package decodes (tests/reference/make_gguf_blocks.py).
#include "checkpoint/gguf_blocks.h"

#include <set>

#include "checkpoint/safetensors.h"
#include "checkpoint/support.h"

namespace latente {
namespace {

std::vector<GgmlType> known_types() {
  std::vector<GgmlType> types;
  for (uint32_t number = 0; number < 100; ++number) {
    if (std::optional<GgmlType> type = ggml_type(number)) types.push_back(*type);
  }
  return types;
}

TEST(GgufBlocks, DecodeAsThePythonPackageToTheBit) {
  SafetensorsFile file(LATENTE_TEST_DATA "/reference/gguf/blocks.safetensors");
  std::set<std::string> compared;
  for (GgmlType type : known_types()) {
    std::string name(name_of(type));
    if (!file.contains(name + ".blocks")) continue;
    ASSERT_TRUE(can_decode(type)) << name;
    compared.insert(name);
    View blocks = file.view(name + ".blocks"), values = file.view(name + ".values");
    ASSERT_EQ(blocks[0], values[0]);
    ASSERT_EQ(blocks[1], values[1] / block_of(type).values * block_of(type).bytes) << name;
    std::vector<float> ours(static_cast<size_t>(values.count()), -1);
    // Anywhere in memory.
    std::string moved = "x" + bytes_of(blocks.data, static_cast<size_t>(blocks.bytes()));
    decode(type, reinterpret_cast<const std::byte*>(moved.data()) + 1, values.count(), ours.data());
    const float* theirs = values.as<float>();
    int64_t wrong = 0, distinct = 0;
    for (int64_t i = 0; i < values.count(); ++i) {
      wrong += std::bit_cast<uint32_t>(ours[static_cast<size_t>(i)]) != std::bit_cast<uint32_t>(theirs[i]);
      distinct += i > 0 && theirs[i] != theirs[i - 1];
    }
    EXPECT_EQ(wrong, 0) << name << ": " << wrong << " of " << values.count();
    EXPECT_GT(distinct, values.count() / 4) << name;
    // A row by itself.
    std::vector<float> row(static_cast<size_t>(values[1]));
    decode(type, static_cast<const std::byte*>(blocks.data) + blocks[1], values[1], row.data());
    EXPECT_EQ(std::memcmp(row.data(), theirs + values[1], row.size() * sizeof(float)), 0) << name;
  }
  EXPECT_EQ(compared, (std::set<std::string>{"F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K",
                                             "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"}));
}

TEST(GgufBlocks, CodesAndScalesAreTheValues) {
  SafetensorsFile file(LATENTE_TEST_DATA "/reference/gguf/blocks.safetensors");
  std::set<std::string> compared;
  for (GgmlType type : known_types()) {
    const CodeForm form = code_form(type);
    if (form.bits == 0) continue;
    const std::string name(name_of(type));
    compared.insert(name);
    const View values = file.view(name + ".values");
    const auto count = static_cast<size_t>(values.count());
    std::vector<int8_t> codes(count);
    std::vector<float> scales(count / 32 * (form.offsets ? 2 : 1));
    decode_codes(type, static_cast<const std::byte*>(file.view(name + ".blocks").data), values.count(),
                 codes.data(), scales.data());
    for (size_t i = 0; i < count; ++i) {
      const float found = scales[i / 32] * static_cast<float>(codes[i]), expected = values.as<float>()[i];
      if (form.bits == 4) {
        ASSERT_TRUE(codes[i] >= -8 && codes[i] <= 7) << name;
      }
      if (!form.offsets) {
        ASSERT_EQ(found, expected) << name << " at " << i;
      } else {
        const float offset = scales[count / 32 + i / 32];
        ASSERT_NEAR(found + offset, expected, 1e-6 * (std::abs(found) + std::abs(offset)))
            << name << " at " << i;
      }
    }
  }
  EXPECT_EQ(compared, (std::set<std::string>{"Q4_0", "Q4_1", "Q5_0", "Q8_0", "IQ4_NL", "Q4_K"}));
}

TEST(GgufBlocks, Float32IsCopied) {
  std::vector<float> values = {1.5f, -0.0f, 1e-40f}, copy(3);
  decode(GgmlType::f32, reinterpret_cast<const std::byte*>(values.data()), 3, copy.data());
  EXPECT_EQ(std::memcmp(values.data(), copy.data(), 12), 0);
}

TEST(GgufBlocks, TypesHaveNumbersAndSizes) {
  EXPECT_EQ(known_types().size(), 31u);
  EXPECT_EQ(ggml_type(12), GgmlType::q4_k);
  EXPECT_EQ(name_of(GgmlType::iq3_s), "IQ3_S");
  EXPECT_FALSE(ggml_type(4));  // Q4_2, removed from the format
  EXPECT_FALSE(ggml_type(~0u));
  EXPECT_FALSE(can_decode(GgmlType::iq3_s));
  EXPECT_FALSE(can_decode(GgmlType::i32));
}

}  // namespace
}  // namespace latente
