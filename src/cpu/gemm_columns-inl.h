// What packing and the register tile share: how a panel's columns are read, compiled once for each
// instruction set.
#if defined(LATENTE_GEMM_COLUMNS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef LATENTE_GEMM_COLUMNS_INL_H
#undef LATENTE_GEMM_COLUMNS_INL_H
#else
#define LATENTE_GEMM_COLUMNS_INL_H
#endif

#include "cpu/unroll.h"
#include "hwy/highway.h"
#include "tensor/dtype.h"

HWY_BEFORE_NAMESPACE();
namespace latente::gemm::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

template <class T>
using Tag = hn::ScalableTag<T>;
template <class T>
constexpr int64_t lanes = static_cast<int64_t>(hn::MaxLanes(Tag<T>()));

// With two vectors a row, as many sums as the registers hold.
#if HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM
inline constexpr int rows_of_tile = 12;
#else
inline constexpr int rows_of_tile = 6;
#endif
template <class T>
constexpr int64_t columns_of_tile = 2 * lanes<T>;

// Two vectors: the columns of a panel at one k.
template <class V>
HWY_INLINE void load_columns(const float* from, V& first, V& second) {
  const Tag<float> d;
  first = hn::Load(d, from);
  second = hn::Load(d, from + lanes<float>);
}
template <class V>
HWY_INLINE void load_columns(const double* from, V& first, V& second) {
  const Tag<double> d;
  first = hn::Load(d, from);
  second = hn::Load(d, from + lanes<double>);
}
template <class V>
HWY_INLINE void load_columns(const bf16* from, V& first, V& second) {
  const Tag<float> d;
  const hn::RebindToUnsigned<Tag<float>> bits;
  const auto pairs = hn::Load(bits, reinterpret_cast<const uint32_t*>(from));
  first = hn::BitCast(d, hn::ShiftLeft<16>(pairs));
  second = hn::BitCast(d, hn::And(pairs, hn::Set(bits, 0xffff0000u)));
}

// Codes of FP8 meet rows that were multiplied by their scale, so that few rows need no product a code. The
// exponent of a code, moved to where float32 has its own, counts from 7 instead of 127: it is 2^120 too
// small, and subnormal codes are subnormal numbers. Rows are therefore larger by row_factor, and what is left
// is made up for in the sum, or where columns are widened. All are powers of two, so the bits are the same,
// as long as nothing is lost below the smallest number: an element below least_scaled, 2^-93 in all, counts
// as zero, so that each product is a multiple of the smallest number.
inline constexpr float row_factor = 0x1p96f, code_factor = 0x1p24f, least_scaled = 0x1p3f;

// Two neighbouring k of a panel of FP8, 2^-120 of their values. A code fits into the upper half of a float,
// so two of them are moved at once.
template <class V>
HWY_INLINE void load_columns(const f8e4m3* from, V (&even)[2], V (&odd)[2]) {
  const Tag<float> d;
  const hn::RebindToUnsigned<Tag<float>> bits;
  const auto four = hn::Load(bits, reinterpret_cast<const uint32_t*>(from));
  const auto moved = [&](hn::Vec<decltype(bits)> codes) HWY_ATTR {  // from the upper bytes of 16 bits
#if HWY_TARGET == HWY_SCALAR
    return hn::Or(hn::And(codes, hn::Set(bits, 0x80008000u)),
                  hn::And(hn::ShiftRight<4>(codes), hn::Set(bits, 0x07f007f0u)));
#else
    const hn::Repartition<int16_t, Tag<float>> halves;
    const auto shifted = hn::ShiftRight<4>(hn::BitCast(halves, codes));
    return hn::BitCast(bits, hn::And(shifted, hn::Set(halves, static_cast<int16_t>(0x87f0))));
#endif
  };
  const auto of_second = moved(four), of_first = moved(hn::ShiftLeft<8>(four));
  const auto upper = hn::Set(bits, 0xffff0000u);
  even[0] = hn::BitCast(d, hn::ShiftLeft<16>(of_first)), odd[0] = hn::BitCast(d, hn::And(of_first, upper));
  even[1] = hn::BitCast(d, hn::ShiftLeft<16>(of_second)), odd[1] = hn::BitCast(d, hn::And(of_second, upper));
}

HWY_INLINE float widen(bf16 value) { return static_cast<float>(value); }
HWY_INLINE float widen(float value) { return value; }
HWY_INLINE double widen(double value) { return value; }

#if HWY_TARGET <= HWY_AVX2
using Eight = hn::FixedTag<float, 8>;
using Four = hn::FixedTag<float, 4>;

// Four vectors, of lines 0..3 in the lower and 4..7 in the upper half, become four of eight lines each.
template <class V>
HWY_INLINE void transpose_halves(V (&v)[4]) {
  const hn::Repartition<double, Eight> pairs;
  const Eight d;
  const auto a = hn::BitCast(pairs, hn::InterleaveLower(d, v[0], v[1]));
  const auto b = hn::BitCast(pairs, hn::InterleaveUpper(d, v[0], v[1]));
  const auto e = hn::BitCast(pairs, hn::InterleaveLower(d, v[2], v[3]));
  const auto f = hn::BitCast(pairs, hn::InterleaveUpper(d, v[2], v[3]));
  v[0] = hn::BitCast(d, hn::InterleaveLower(pairs, a, e));
  v[1] = hn::BitCast(d, hn::InterleaveUpper(pairs, a, e));
  v[2] = hn::BitCast(d, hn::InterleaveLower(pairs, b, f));
  v[3] = hn::BitCast(d, hn::InterleaveUpper(pairs, b, f));
}

// Calls use(i, the eight lines at k + i) for i = 0..7.
template <class Use>
HWY_INLINE void transpose_eight(const float* const* line, int64_t k, const Use& use) {
  const Eight d;
  const Four half;
  LATENTE_UNROLL
  for (int q = 0; q < 8; q += 4) {
    hn::Vec<Eight> v[4];
    LATENTE_UNROLL
    for (int i = 0; i < 4; ++i) {
      v[i] = hn::Combine(d, hn::LoadU(half, line[i + 4] + k + q), hn::LoadU(half, line[i] + k + q));
    }
    transpose_halves(v);
    LATENTE_UNROLL
    for (int i = 0; i < 4; ++i) use(q + i, v[i]);
  }
}

// Pairs of neighbours travel as one 32-bit lane.
template <class Use>
HWY_INLINE void transpose_eight(const bf16* const* line, int64_t k, const Use& use) {
  const Eight d;
  const Four half;
  const hn::RebindToUnsigned<Eight> bits;
  hn::Vec<Eight> v[4];
  LATENTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[i] = hn::Combine(d, hn::LoadU(half, reinterpret_cast<const float*>(line[i + 4] + k)),
                       hn::LoadU(half, reinterpret_cast<const float*>(line[i] + k)));
  }
  transpose_halves(v);
  LATENTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto pair = hn::BitCast(bits, v[i]);
    use(2 * i, hn::BitCast(d, hn::ShiftLeft<16>(pair)));
    use(2 * i + 1, hn::BitCast(d, hn::And(pair, hn::Set(bits, 0xffff0000u))));
  }
}
#endif

}  // namespace latente::gemm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
