#include "checkpoint/gguf_blocks.h"

#include <array>
#include <bit>
#include <cstring>

#include "base/error.h"
#include "tensor/dtype.h"

namespace latente {

namespace {

constexpr GgmlBlock blocks[] = {
    {GgmlType::f32, "F32", 1, 4},
    {GgmlType::f16, "F16", 1, 2},
    {GgmlType::bf16, "BF16", 1, 2},
    {GgmlType::f64, "F64", 1, 8},
    {GgmlType::i8, "I8", 1, 1},
    {GgmlType::i16, "I16", 1, 2},
    {GgmlType::i32, "I32", 1, 4},
    {GgmlType::i64, "I64", 1, 8},
    {GgmlType::q4_0, "Q4_0", 32, 18},
    {GgmlType::q4_1, "Q4_1", 32, 20},
    {GgmlType::q5_0, "Q5_0", 32, 22},
    {GgmlType::q5_1, "Q5_1", 32, 24},
    {GgmlType::q8_0, "Q8_0", 32, 34},
    {GgmlType::q2_k, "Q2_K", 256, 84},
    {GgmlType::q3_k, "Q3_K", 256, 110},
    {GgmlType::q4_k, "Q4_K", 256, 144},
    {GgmlType::q5_k, "Q5_K", 256, 176},
    {GgmlType::q6_k, "Q6_K", 256, 210},
    {GgmlType::iq1_s, "IQ1_S", 256, 50},
    {GgmlType::iq1_m, "IQ1_M", 256, 56},
    {GgmlType::iq2_s, "IQ2_S", 256, 82},
    {GgmlType::iq2_xs, "IQ2_XS", 256, 74},
    {GgmlType::iq3_s, "IQ3_S", 256, 110},
    {GgmlType::iq2_xxs, "IQ2_XXS", 256, 66},
    {GgmlType::iq4_nl, "IQ4_NL", 32, 18},
    {GgmlType::iq3_xxs, "IQ3_XXS", 256, 98},
    {GgmlType::iq4_xs, "IQ4_XS", 256, 136},
    {GgmlType::tq1_0, "TQ1_0", 256, 54},
    {GgmlType::tq2_0, "TQ2_0", 256, 66},
    {GgmlType::mxfp4, "MXFP4", 32, 17},
    {GgmlType::nvfp4, "NVFP4", 64, 36},
};

int byte(const std::byte* at) { return static_cast<int>(*at); }

float half(const std::byte* at) {
  f16 value;
  std::memcpy(&value.bits, at, sizeof(value.bits));
  return static_cast<float>(value);
}

// d, 32 int8.
void decode_q8_0(const std::byte* block, float* out) {
  float d = half(block);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(static_cast<int8_t>(block[2 + i]));
}

// d, then (with_min) m, then (bits == 5) 32 high bits, then 32 nibbles, the first 16 values in the lower
// ones. Without a minimum the codes are centred.
void decode_simple(const std::byte* block, int bits, bool with_min, float* out) {
  float d = half(block);
  block += 2;
  float m = 0;
  if (with_min) {
    m = half(block);
    block += 2;
  }
  uint32_t high = 0;
  if (bits == 5) {
    std::memcpy(&high, block, 4);
    block += 4;
  }
  for (int i = 0; i < 32; ++i) {
    int nibble = i < 16 ? byte(block + i) & 15 : byte(block + i - 16) >> 4;
    int code = nibble | static_cast<int>(high >> i & 1) << 4;
    out[i] = with_min ? d * static_cast<float>(code) + m : d * static_cast<float>(code - (1 << (bits - 1)));
  }
}

// 16 bytes of 4-bit scales and minima, 64 bytes of 2-bit codes, d, dmin; parts of 16 values.
void decode_q2_k(const std::byte* block, float* out) {
  const std::byte* codes = block + 16;
  float d = half(block + 80), dmin = half(block + 82);
  for (int i = 0; i < 256; ++i) {
    int scale = byte(block + i / 16);
    int code = byte(codes + i / 128 * 32 + i % 32) >> (i % 128 / 32 * 2) & 3;
    out[i] =
        d * static_cast<float>(scale & 15) * static_cast<float>(code) - dmin * static_cast<float>(scale >> 4);
  }
}

// 32 bytes of inverted high bits, 64 bytes of 2-bit codes, 12 bytes of 6-bit scales, d; parts of 16 values.
void decode_q3_k(const std::byte* block, float* out) {
  const std::byte *codes = block + 32, *packed = block + 96;
  float d = half(block + 108);
  std::array<float, 16> scales;
  for (int j = 0; j < 16; ++j) {
    int low = j < 8 ? byte(packed + j) & 15 : byte(packed + j - 8) >> 4;
    int high = byte(packed + 8 + j % 4) >> (j / 4 * 2) & 3;
    scales[static_cast<size_t>(j)] = d * static_cast<float>((low | high << 4) - 32);
  }
  for (int i = 0; i < 256; ++i) {
    int code = byte(codes + i / 128 * 32 + i % 32) >> (i % 128 / 32 * 2) & 3;
    if ((byte(block + i % 32) >> (i / 32) & 1) == 0) code -= 4;
    out[i] = scales[static_cast<size_t>(i / 16)] * static_cast<float>(code);
  }
}

// The 6-bit scale and minimum of part j (0 to 7) of a Q4_K or Q5_K block, packed into 12 bytes.
struct ScaleMin {
  int scale, min;
};
ScaleMin scale_min(const std::byte* packed, int j) {
  if (j < 4) return {byte(packed + j) & 63, byte(packed + j + 4) & 63};
  return {(byte(packed + j + 4) & 15) | byte(packed + j - 4) >> 6 << 4,
          byte(packed + j + 4) >> 4 | byte(packed + j) >> 6 << 4};
}

// d, dmin, 12 bytes of scales and minima, (high != null: 32 bytes of high bits), 128 bytes of nibbles; parts
// of 32 values, two to 32 bytes of nibbles.
void decode_q45_k(const std::byte* block, const std::byte* high, const std::byte* nibbles, float* out) {
  float d = half(block), dmin = half(block + 2);
  for (int j = 0; j < 8; ++j) {
    ScaleMin part = scale_min(block + 4, j);
    float scale = d * static_cast<float>(part.scale), min = dmin * static_cast<float>(part.min);
    for (int i = 0; i < 32; ++i) {
      int code = byte(nibbles + j / 2 * 32 + i) >> (j % 2 * 4) & 15;
      if (high) code |= (byte(high + i) >> j & 1) << 4;
      out[32 * j + i] = scale * static_cast<float>(code) - min;
    }
  }
}

// 128 bytes of low nibbles, 64 bytes of 2 high bits, 16 int8 scales, d; parts of 16 values.
void decode_q6_k(const std::byte* block, float* out) {
  const std::byte *high = block + 128, *scales = block + 192;
  float d = half(block + 208);
  for (int i = 0; i < 256; ++i) {
    int within = i % 128, quarter = within / 32;
    int low = byte(block + i / 128 * 64 + within % 64) >> (quarter / 2 * 4) & 15;
    int top = byte(high + i / 128 * 32 + i % 32) >> (quarter * 2) & 3;
    float scale = d * static_cast<float>(static_cast<int8_t>(scales[i / 16]));
    out[i] = scale * static_cast<float>((low | top << 4) - 32);
  }
}

// What the codes of IQ4_NL and IQ4_XS stand for.
constexpr std::array<int8_t, 16> iq4_values = {-127, -104, -83, -65, -49, -35, -22, -10,
                                               1,    13,   25,  38,  53,  69,  89,  113};

// 16 bytes: nibbles of 32 values, the first 16 in the lower ones.
void decode_iq4_part(const std::byte* nibbles, float scale, float* out) {
  for (int i = 0; i < 32; ++i) {
    int code = i < 16 ? byte(nibbles + i) & 15 : byte(nibbles + i - 16) >> 4;
    out[i] = scale * static_cast<float>(iq4_values[static_cast<size_t>(code)]);
  }
}

// d, 2 bytes of 2 high bits and 4 bytes of 4 low bits of 8 scales, 128 bytes of nibbles; parts of 32 values.
void decode_iq4_xs(const std::byte* block, float* out) {
  float d = half(block);
  int high = byte(block + 2) | byte(block + 3) << 8;
  for (int j = 0; j < 8; ++j) {
    int scale = (byte(block + 4 + j / 2) >> (j % 2 * 4) & 15) | (high >> (2 * j) & 3) << 4;
    decode_iq4_part(block + 8 + 16 * j, d * static_cast<float>(scale - 32), out + 32 * j);
  }
}

// Null for types without a decoder, and for those of one value.
using DecodeBlock = void (*)(const std::byte* block, float* out);
DecodeBlock decoder_of(GgmlType type) {
  switch (type) {
    case GgmlType::q8_0:
      return decode_q8_0;
    case GgmlType::q4_0:
      return [](const std::byte* block, float* out) { decode_simple(block, 4, false, out); };
    case GgmlType::q4_1:
      return [](const std::byte* block, float* out) { decode_simple(block, 4, true, out); };
    case GgmlType::q5_0:
      return [](const std::byte* block, float* out) { decode_simple(block, 5, false, out); };
    case GgmlType::q5_1:
      return [](const std::byte* block, float* out) { decode_simple(block, 5, true, out); };
    case GgmlType::q2_k:
      return decode_q2_k;
    case GgmlType::q3_k:
      return decode_q3_k;
    case GgmlType::q4_k:
      return [](const std::byte* block, float* out) { decode_q45_k(block, nullptr, block + 16, out); };
    case GgmlType::q5_k:
      return [](const std::byte* block, float* out) { decode_q45_k(block, block + 16, block + 48, out); };
    case GgmlType::q6_k:
      return decode_q6_k;
    case GgmlType::iq4_nl:
      return [](const std::byte* block, float* out) { decode_iq4_part(block + 2, half(block), out); };
    case GgmlType::iq4_xs:
      return decode_iq4_xs;
    default:
      return nullptr;
  }
}

}  // namespace

static_assert(std::endian::native == std::endian::little, "GGUF data is little-endian");

std::optional<GgmlType> ggml_type(uint32_t number) {
  for (const GgmlBlock& block : blocks) {
    if (static_cast<uint32_t>(block.type) == number) return block.type;
  }
  return std::nullopt;
}

const GgmlBlock& block_of(GgmlType type) {
  for (const GgmlBlock& block : blocks) {
    if (block.type == type) return block;
  }
  LATENTE_ASSERT(!"a GGML type without a block");
  return blocks[0];
}

bool can_decode(GgmlType type) {
  return type == GgmlType::f32 || type == GgmlType::f16 || type == GgmlType::bf16 ||
         decoder_of(type) != nullptr;
}

void decode(GgmlType type, const std::byte* source, int64_t count, float* values) {
  const GgmlBlock& block = block_of(type);
  LATENTE_ASSERT(can_decode(type) && count % block.values == 0);
  if (count == 0) return;
  if (type == GgmlType::f32) {
    std::memcpy(values, source, static_cast<size_t>(count) * sizeof(float));
  } else if (type == GgmlType::f16) {
    for (int64_t i = 0; i < count; ++i) values[i] = half(source + 2 * i);
  } else if (type == GgmlType::bf16) {
    for (int64_t i = 0; i < count; ++i) {
      bf16 value;
      std::memcpy(&value.bits, source + 2 * i, sizeof(value.bits));
      values[i] = static_cast<float>(value);
    }
  } else {
    DecodeBlock decode_block = decoder_of(type);
    for (; count > 0; count -= block.values, source += block.bytes, values += block.values)
      decode_block(source, values);
  }
}

}  // namespace latente
