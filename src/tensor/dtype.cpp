#include "tensor/dtype.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "base/error.h"

namespace latente {

std::optional<DType> dtype_from_name(std::string_view name) {
  struct Alias {
    std::string_view name;
    DType type;
  };
  constexpr Alias aliases[] = {
      {"f64", DType::f64},       {"float64", DType::f64},
      {"f32", DType::f32},       {"float32", DType::f32},
      {"bf16", DType::bf16},     {"bfloat16", DType::bf16},
      {"f16", DType::f16},       {"float16", DType::f16},
      {"i64", DType::i64},       {"i32", DType::i32},
      {"f8e4m3", DType::f8e4m3}, {"u8", DType::u8},
      {"fp8", DType::f8e4m3},    {"float8_e4m3fn", DType::f8e4m3},
  };
  for (const Alias& alias : aliases) {
    if (alias.name == name) return alias.type;
  }
  return std::nullopt;
}

f16::f16(float value) {
  uint32_t wide = std::bit_cast<uint32_t>(value);
  uint32_t sign = (wide >> 16) & 0x8000u;
  uint32_t magnitude = wide & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (magnitude >= 0x477ff000u) {  // rounds past 65504
    bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (magnitude < 0x38800000u) {  // subnormal in f16: adding 0.5 aligns the mantissa and rounds it
    float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    bits = static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  } else {
    uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
    bits = static_cast<uint16_t>(sign | (rounded >> 13));
  }
}

f16::operator float() const {
  uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  uint32_t exponent = (bits >> 10) & 0x1fu;
  uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0) {
    float small = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(small) | sign);
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

namespace {

float decode_f8e4m3(uint8_t bits) {
  int exponent = (bits >> 3) & 15;
  int mantissa = bits & 7;
  float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                  : std::ldexp(1.0f + static_cast<float>(mantissa) / 8.0f, exponent - 7);
  if ((bits & 0x7f) == 0x7f) magnitude = std::nanf("");
  return bits & 0x80 ? -magnitude : magnitude;
}

const std::array<float, 256>& f8e4m3_table() {
  static const std::array<float, 256> table = [] {
    std::array<float, 256> values{};
    for (int i = 0; i < 256; ++i) values[static_cast<size_t>(i)] = decode_f8e4m3(static_cast<uint8_t>(i));
    return values;
  }();
  return table;
}

template <class From, class To>
void convert_as(const void* source, void* target, int64_t count) {
  const From* from = static_cast<const From*>(source);
  To* to = static_cast<To*>(target);
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<From, double> && std::is_same_v<To, double>) {
      to[i] = from[i];
    } else {
      to[i] = static_cast<To>(static_cast<float>(from[i]));
    }
  }
}

template <class From>
void convert_from(const void* source, DType to, void* target, int64_t count) {
  switch (to) {
    case DType::f64:
      return convert_as<From, double>(source, target, count);
    case DType::f32:
      return convert_as<From, float>(source, target, count);
    case DType::bf16:
      return convert_as<From, bf16>(source, target, count);
    case DType::f16:
      return convert_as<From, f16>(source, target, count);
    case DType::f8e4m3:
      return convert_as<From, f8e4m3>(source, target, count);
    default:
      fail("cannot convert to {}", name_of(to));
  }
}

}  // namespace

f8e4m3::f8e4m3(float value) {
  uint32_t wide = std::bit_cast<uint32_t>(value);
  uint8_t sign = static_cast<uint8_t>((wide >> 24) & 0x80u);
  uint32_t magnitude = wide & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    bits = sign | 0x7f;
  } else if (magnitude >= 0x43e80000u) {  // 464, the midpoint past 448, and above
    bits = sign | 0x7e;
  } else if (magnitude < 0x3c800000u) {  // below 2^-6: subnormal, in steps of 2^-9
    bits = sign | static_cast<uint8_t>(std::lrintf(std::bit_cast<float>(magnitude) * 512.0f));
  } else {
    uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u) - 0x3c000000u;
    bits = sign | static_cast<uint8_t>(std::min<uint32_t>(rounded >> 20, 0x7e));
  }
}

f8e4m3::operator float() const { return f8e4m3_table()[bits]; }

void convert(DType from, const void* source, DType to, void* target, int64_t count) {
  if (count <= 0) return;  // an empty tensor may have no memory
  if (from == to) {
    std::memcpy(target, source, static_cast<size_t>(count * size_of(from)));
    return;
  }
  switch (from) {
    case DType::f64:
      return convert_from<double>(source, to, target, count);
    case DType::f32:
      return convert_from<float>(source, to, target, count);
    case DType::bf16:
      return convert_from<bf16>(source, to, target, count);
    case DType::f16:
      return convert_from<f16>(source, to, target, count);
    case DType::f8e4m3:
      return convert_from<f8e4m3>(source, to, target, count);
    default:
      fail("cannot convert from {}", name_of(from));
  }
}

}  // namespace latente
