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

// 16 bytes: nibbles of 32 values, the first 16 in the lower ones.
void nibbles_of(const std::byte* bytes, int8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = static_cast<int8_t>(byte(bytes + i) & 15);
    codes[i + 16] = static_cast<int8_t>(byte(bytes + i) >> 4);
  }
}

// 4 bytes of fifth bits, then nibbles.
void five_bits_of(const std::byte* bytes, int8_t* codes) {
  uint32_t high;
  std::memcpy(&high, bytes, 4);
  nibbles_of(bytes + 4, codes);
  for (int i = 0; i < 32; ++i) codes[i] = static_cast<int8_t>(codes[i] | (high >> i & 1) << 4);
}

// d, m, then codes of 4 or 5 bits.
void decode_with_min(const std::byte* block, int bits, float* out) {
  float d = half(block), m = half(block + 2);
  int8_t codes[32];
  (bits == 4 ? nibbles_of : five_bits_of)(block + 4, codes);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(codes[i]) + m;
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

void iq4_codes(const std::byte* nibbles, int8_t* codes) {
  nibbles_of(nibbles, codes);
  for (int i = 0; i < 32; ++i) codes[i] = iq4_values[static_cast<size_t>(codes[i])];
}

// d, 2 bytes of 2 high bits and 4 bytes of 4 low bits of 8 scales, 128 bytes of nibbles; parts of 32 values.
void decode_iq4_xs(const std::byte* block, float* out) {
  float d = half(block);
  int high = byte(block + 2) | byte(block + 3) << 8;
  for (int j = 0; j < 8; ++j) {
    int scale = (byte(block + 4 + j / 2) >> (j % 2 * 4) & 15) | (high >> (2 * j) & 3) << 4;
    int8_t codes[32];
    iq4_codes(block + 8 + 16 * j, codes);
    for (int i = 0; i < 32; ++i)
      out[32 * j + i] = d * static_cast<float>(scale - 32) * static_cast<float>(codes[i]);
  }
}

// Of 32 values, from the bytes behind d; null for types that are more than d and codes.
using CodesOfBlock = void (*)(const std::byte* bytes, int8_t* codes);
CodesOfBlock codes_of(GgmlType type) {
  switch (type) {
    case GgmlType::q8_0:
      return [](const std::byte* bytes, int8_t* codes) { std::memcpy(codes, bytes, 32); };
    case GgmlType::q4_0:
      return [](const std::byte* bytes, int8_t* codes) {
        nibbles_of(bytes, codes);
        for (int i = 0; i < 32; ++i) codes[i] = static_cast<int8_t>(codes[i] - 8);
      };
    case GgmlType::q5_0:
      return [](const std::byte* bytes, int8_t* codes) {
        five_bits_of(bytes, codes);
        for (int i = 0; i < 32; ++i) codes[i] = static_cast<int8_t>(codes[i] - 16);
      };
    case GgmlType::iq4_nl:
      return iq4_codes;
    default:
      return nullptr;
  }
}

template <GgmlType type>
void decode_scaled(const std::byte* block, float* out) {
  float d = half(block);
  int8_t codes[32];
  codes_of(type)(block + 2, codes);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(codes[i]);
}

// Null for types without a decoder, and for those of one value.
using DecodeBlock = void (*)(const std::byte* block, float* out);
DecodeBlock decoder_of(GgmlType type) {
  switch (type) {
    case GgmlType::q8_0:
      return decode_scaled<GgmlType::q8_0>;
    case GgmlType::q4_0:
      return decode_scaled<GgmlType::q4_0>;
    case GgmlType::q4_1:
      return [](const std::byte* block, float* out) { decode_with_min(block, 4, out); };
    case GgmlType::q5_0:
      return decode_scaled<GgmlType::q5_0>;
    case GgmlType::q5_1:
      return [](const std::byte* block, float* out) { decode_with_min(block, 5, out); };
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
      return decode_scaled<GgmlType::iq4_nl>;
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

CodeForm code_form(GgmlType type) {
  if (type == GgmlType::q4_1 || type == GgmlType::q4_k) return {4, true};
  return {type == GgmlType::q4_0 ? 4 : codes_of(type) ? 8 : 0, false};
}

void decode_codes(GgmlType type, const std::byte* source, int64_t count, int8_t* codes, float* scales) {
  const GgmlBlock& block = block_of(type);
  LATENTE_ASSERT(count % block.values == 0);
  float* offsets = scales + count / 32;
  // Codes from 0 on, with what is there at 0.
  const auto centre = [&](float scale, float minimum) {
    for (int i = 0; i < 32; ++i) codes[i] = static_cast<int8_t>(codes[i] - 8);
    codes += 32;
    *scales++ = scale;
    *offsets++ = minimum + 8 * scale;
  };
  if (type == GgmlType::q4_1) {
    for (; count > 0; count -= 32, source += block.bytes) {
      nibbles_of(source + 4, codes);
      centre(half(source), half(source + 2));
    }
    return;
  }
  if (type == GgmlType::q4_k) {
    for (; count > 0; count -= 256, source += block.bytes) {
      for (int j = 0; j < 8; ++j) {
        const ScaleMin part = scale_min(source + 4, j);
        for (int i = 0; i < 32; ++i)
          codes[i] = static_cast<int8_t>(byte(source + 16 + j / 2 * 32 + i) >> (j % 2 * 4) & 15);
        centre(half(source) * static_cast<float>(part.scale),
               -half(source + 2) * static_cast<float>(part.min));
      }
    }
    return;
  }
  const CodesOfBlock of_block = codes_of(type);
  LATENTE_ASSERT(of_block);
  for (; count > 0; count -= 32, source += block.bytes, codes += 32) {
    *scales++ = half(source);
    of_block(source + 2, codes);
  }
}

}  // namespace latente
