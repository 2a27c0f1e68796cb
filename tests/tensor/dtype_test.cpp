#include "tensor/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/error.h"

namespace latente {
namespace {

// A value by the definition of a binary format: sign, `exponent` bits of exponent, `mantissa` bits of
// mantissa. Infinities and NaN are the caller's.
double by_definition(uint32_t code, int exponent_bits, int mantissa_bits) {
  int bias = (1 << (exponent_bits - 1)) - 1;
  uint32_t exponent = code >> mantissa_bits & ((1u << exponent_bits) - 1);
  uint32_t mantissa = code & ((1u << mantissa_bits) - 1);
  bool negative = code >> (exponent_bits + mantissa_bits) & 1;
  double fraction = std::ldexp(static_cast<double>(mantissa), -mantissa_bits);
  double magnitude = exponent == 0 ? std::ldexp(fraction, 1 - bias)
                                   : std::ldexp(1.0 + fraction, static_cast<int>(exponent) - bias);
  return negative ? -magnitude : magnitude;
}

// The code of the nearest value, ties to the even code, among magnitudes 0 to `largest`; beyond it, `largest`
// + 1 stands for infinity and has the value the next step would have.
template <class Value>
uint32_t nearest_code(float x, uint32_t largest, Value value) {
  double magnitude = std::abs(static_cast<double>(x));
  uint32_t low = 0, high = largest + 1;
  while (high - low > 1) {
    uint32_t middle = (low + high) / 2;
    (value(middle) <= magnitude ? low : high) = middle;
  }
  double below = magnitude - value(low), above = value(low + 1) - magnitude;
  return below < above || (below == above && low % 2 == 0) ? low : low + 1;
}

std::vector<float> samples() {
  uint32_t seed = std::random_device{}();
  std::printf("seed %u\n", seed);
  std::mt19937 generator(seed);
  std::vector<float> values;
  for (int i = 0; i < 200'000; ++i) {
    values.push_back(std::bit_cast<float>(static_cast<uint32_t>(generator())));
    values.push_back(std::ldexp(static_cast<float>(generator()), static_cast<int>(generator() % 60) - 60));
  }
  return values;
}

TEST(DType, SizesAndNames) {
  EXPECT_EQ(size_of(DType::f64), 8);
  EXPECT_EQ(size_of(DType::bf16), 2);
  EXPECT_EQ(size_of(DType::f8e4m3), 1);
  EXPECT_EQ(dtype_from_name("bfloat16"), DType::bf16);
  EXPECT_EQ(dtype_from_name("float8_e4m3fn"), DType::f8e4m3);
  EXPECT_EQ(dtype_from_name("bfloat"), std::nullopt);
  for (int i = 0; i <= static_cast<int>(DType::u8); ++i) {
    DType type = static_cast<DType>(i);
    EXPECT_EQ(dtype_from_name(name_of(type)), type);
  }
}

TEST(Float8, AllCodes) {
  for (uint32_t code = 0; code < 256; ++code) {
    f8e4m3 x;
    x.bits = static_cast<uint8_t>(code);
    float value = static_cast<float>(x);
    if ((code & 0x7f) == 0x7f) {
      EXPECT_TRUE(std::isnan(value)) << code;
      EXPECT_EQ(f8e4m3(value).bits & 0x7f, 0x7f);
    } else {
      EXPECT_EQ(value, by_definition(code, 4, 3)) << code;
      EXPECT_EQ(std::signbit(value), code >= 128) << code;
      EXPECT_EQ(f8e4m3(value).bits, code);
    }
  }
}

// The table in the OCP 8-bit floating point specification, revision 1.0.
TEST(Float8, SpecifiedValues) {
  auto value = [](uint8_t bits) {
    f8e4m3 x;
    x.bits = bits;
    return static_cast<float>(x);
  };
  EXPECT_EQ(value(0x7e), 448.0f);
  EXPECT_EQ(value(0x08), 0x1p-6f);
  EXPECT_EQ(value(0x07), 0.875f * 0x1p-6f);
  EXPECT_EQ(value(0x01), 0x1p-9f);
  EXPECT_EQ(value(0x38), 1.0f);
  EXPECT_EQ(value(0x80), 0.0f);
}

TEST(Float8, RoundsToNearestEvenAndSaturates) {
  auto value = [](uint32_t code) { return by_definition(code, 4, 3); };
  auto check = [&](float x) {
    if (std::isnan(x)) return;
    uint32_t expected = std::abs(x) >= 448 ? 0x7e : nearest_code(x, 0x7e, value);
    expected |= std::signbit(x) ? 0x80u : 0u;
    EXPECT_EQ(f8e4m3(x).bits, expected) << x;
  };
  for (float x : samples()) check(x);
  for (uint32_t code = 0; code < 0x7e; ++code) {  // exact midpoints and their neighbours
    float middle = static_cast<float>((value(code) + value(code + 1)) / 2);
    for (float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1000.0f)}) {
      check(x);
      check(-x);
    }
  }
  check(463.9f);
  check(464.0f);
  check(std::numeric_limits<float>::infinity());
}

TEST(BFloat16, AllCodes) {
  for (uint32_t code = 0; code < 65536; ++code) {
    bf16 x;
    x.bits = static_cast<uint16_t>(code);
    float value = static_cast<float>(x);
    if ((code & 0x7fff) > 0x7f80) {
      ASSERT_TRUE(std::isnan(value)) << code;
      ASSERT_TRUE(std::isnan(static_cast<float>(bf16(value)))) << code;
      continue;
    }
    if ((code & 0x7fff) == 0x7f80) {
      ASSERT_EQ(value, code >> 15 ? -INFINITY : INFINITY);
    } else {
      ASSERT_EQ(value, by_definition(code, 8, 7)) << code;
    }
    ASSERT_EQ(bf16(value).bits, code);
  }
}

TEST(BFloat16, RoundsToNearestEven) {
  auto value = [](uint32_t code) { return by_definition(code, 8, 7); };
  auto check = [&](float x) {
    if (!std::isfinite(x)) return;
    uint32_t expected = nearest_code(x, 0x7f7f, value) | (std::signbit(x) ? 0x8000u : 0u);
    EXPECT_EQ(bf16(x).bits, expected) << x;
  };
  for (float x : samples()) check(x);
  check(std::numeric_limits<float>::max());
  check(std::numeric_limits<float>::denorm_min());
  for (uint32_t code = 0; code < 0x7f7f; ++code) {
    float middle = static_cast<float>((value(code) + value(code + 1)) / 2);
    check(middle);
    check(-std::nextafter(middle, INFINITY));
  }
  // A NaN whose payload lies only in the dropped bits stays a NaN.
  EXPECT_TRUE(std::isnan(static_cast<float>(bf16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(Float16, AllCodes) {
  for (uint32_t code = 0; code < 65536; ++code) {
    f16 x;
    x.bits = static_cast<uint16_t>(code);
    float value = static_cast<float>(x);
    if ((code & 0x7fff) > 0x7c00) {
      ASSERT_TRUE(std::isnan(value)) << code;
      ASSERT_TRUE(std::isnan(static_cast<float>(f16(value)))) << code;
      continue;
    }
    if ((code & 0x7fff) == 0x7c00) {
      ASSERT_EQ(value, code >> 15 ? -INFINITY : INFINITY);
    } else {
      ASSERT_EQ(value, by_definition(code, 5, 10)) << code;
      ASSERT_EQ(std::signbit(value), code >> 15 == 1);
    }
    ASSERT_EQ(f16(value).bits, code);
  }
}

TEST(Float16, RoundsToNearestEven) {
  auto value = [](uint32_t code) { return by_definition(code, 5, 10); };
  auto check = [&](float x) {
    if (std::isnan(x)) return;
    uint32_t expected = std::isinf(x) || std::abs(x) >= 65536 ? 0x7c00 : nearest_code(x, 0x7bff, value);
    expected |= std::signbit(x) ? 0x8000u : 0u;
    EXPECT_EQ(f16(x).bits, expected) << x;
#ifdef __FLT16_MAX__  // the compiler's own conversion
    EXPECT_EQ(f16(x).bits, std::bit_cast<uint16_t>(static_cast<_Float16>(x))) << x;
#endif
  };
  for (float x : samples()) check(x);
  for (uint32_t code = 0; code < 0x7bff; ++code) {
    float middle = static_cast<float>((value(code) + value(code + 1)) / 2);
    check(middle);
    check(-middle);
    check(std::nextafter(middle, 0.0f));
    check(std::nextafter(middle, INFINITY));
  }
  for (float x : {65504.0f, 65519.996f, 65520.0f, 65535.0f, 65536.0f, INFINITY, -INFINITY}) check(x);
}

TEST(Convert, BetweenAllFloatingTypes) {
  constexpr DType types[] = {DType::f64, DType::f32, DType::bf16, DType::f16, DType::f8e4m3};
  std::vector<float> values = {0.0f, 1.0f, -2.0f, 0.5f, 448.0f, -0.015625f, 96.0f};  // exact in every type
  int64_t count = static_cast<int64_t>(values.size());
  for (DType from : types) {
    for (DType to : types) {
      std::vector<std::byte> a(64), b(64);
      std::vector<float> back(values.size());
      convert(DType::f32, values.data(), from, a.data(), count);
      convert(from, a.data(), to, b.data(), count);
      convert(to, b.data(), DType::f32, back.data(), count);
      EXPECT_EQ(back, values) << name_of(from) << " to " << name_of(to);
    }
  }
  double third = 1.0 / 3.0, copy = 0;
  convert(DType::f64, &third, DType::f64, &copy, 1);
  EXPECT_EQ(copy, third);
  EXPECT_THROW(convert(DType::f32, values.data(), DType::i32, &copy, 1), Error);
  EXPECT_THROW(convert(DType::i64, &copy, DType::f32, values.data(), 1), Error);
}

}  // namespace
}  // namespace latente
