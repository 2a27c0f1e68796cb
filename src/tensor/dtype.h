// Element types, and the conversions between float32 and the narrow ones.
#pragma once

#include <bit>
#include <cstdint>
#include <optional>
#include <string_view>

namespace latente {

// q8, q4, q4m: whole numbers with a scale a group, and q4m with an offset a group besides
// (tensor/quantise.h); only as panels, whose size their backend knows.
enum class DType : uint8_t { f64, f32, bf16, f16, f8e4m3, i64, i32, u8, q8, q4, q4m };

constexpr int64_t size_of(DType type) {
  switch (type) {
    case DType::f64:
    case DType::i64:
      return 8;
    case DType::f32:
    case DType::i32:
      return 4;
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::f8e4m3:
    case DType::u8:
      return 1;
    case DType::q8:
    case DType::q4:
    case DType::q4m:
      break;
  }
  return 0;
}

constexpr bool is_floating(DType type) { return type <= DType::f8e4m3; }
constexpr bool is_quantised(DType type) { return type >= DType::q8; }

constexpr std::string_view name_of(DType type) {
  constexpr std::string_view names[] = {"f64", "f32", "bf16", "f16", "f8e4m3", "i64",
                                        "i32", "u8",  "q8",   "q4",  "q4m"};
  return names[static_cast<int>(type)];
}

// "f32" and torch's "float32", "bf16" and "bfloat16", ...; nullopt for other names.
std::optional<DType> dtype_from_name(std::string_view name);

// bfloat16: the upper half of a float32. Narrowing rounds to nearest even and keeps NaN a NaN.
struct bf16 {
  uint16_t bits = 0;
  bf16() = default;
  explicit bf16(float value) {
    uint32_t wide = std::bit_cast<uint32_t>(value);
    bool nan = (wide & 0x7fffffffu) > 0x7f800000u;
    bits = static_cast<uint16_t>(nan ? (wide >> 16) | 0x40u : (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16);
  }
  explicit operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// IEEE binary16.
struct f16 {
  uint16_t bits = 0;
  f16() = default;
  explicit f16(float value);
  explicit operator float() const;
};

// OCP float8 e4m3 ("fn"): no infinities, 0x7f and 0xff are NaN, largest finite value 448.
struct f8e4m3 {
  uint8_t bits = 0;
  f8e4m3() = default;
  explicit f8e4m3(float value);  // rounds to nearest even, saturates at ±448
  explicit operator float() const;
};

template <class T>
constexpr DType dtype_of = DType::u8;
template <>
inline constexpr DType dtype_of<double> = DType::f64;
template <>
inline constexpr DType dtype_of<float> = DType::f32;
template <>
inline constexpr DType dtype_of<bf16> = DType::bf16;
template <>
inline constexpr DType dtype_of<f16> = DType::f16;
template <>
inline constexpr DType dtype_of<f8e4m3> = DType::f8e4m3;
template <>
inline constexpr DType dtype_of<int64_t> = DType::i64;
template <>
inline constexpr DType dtype_of<int32_t> = DType::i32;

// Copies `count` elements from one floating type to another through float32 (double stays double).
void convert(DType from, const void* source, DType to, void* target, int64_t count);

}  // namespace latente
