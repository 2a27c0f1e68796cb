#include "cpu/block_kernels.h"

#include <algorithm>
#include <cstring>

#include "cpu/unroll.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/block_kernels.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace latente::quantised::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

#if HWY_TARGET == HWY_SCALAR
bool panel_here(Form, const std::byte*, int64_t, int64_t, std::byte*) { return false; }
#else
// A lane a row, four rows to 128 bits.
using Words = hn::CappedTag<uint32_t, 8>;
using W = hn::Vec<Words>;
constexpr int64_t lanes = static_cast<int64_t>(hn::MaxLanes(Words()));
static_assert(lanes == 4 || lanes == 8);

constexpr int64_t group = 32;
constexpr int64_t scale_size = 2;  // bytes before a block's codes

// The rows that a panel is made of.
struct Rows {
  const std::byte* blocks;
  int64_t bytes;  // of a row
  const std::byte* at(int64_t row, int64_t block) const { return blocks + row * bytes + block; }
};
// The same where some are missing: these are one block of nothing.
struct SomeRows {
  Rows rows;
  int64_t count;
  const std::byte* nothing;
  const std::byte* at(int64_t row, int64_t block) const {
    return row < count ? rows.at(row, block) : nothing;
  }
};

HWY_INLINE hn::Vec<hn::Full128<uint32_t>> sixteen_bytes(const std::byte* from) {
  return hn::LoadU(hn::Full128<uint32_t>(), reinterpret_cast<const uint32_t*>(from));
}

// 16 bytes of this row, and of row + 4 beside them where vectors are long enough.
template <class D, class From>
HWY_INLINE hn::Vec<D> load(D d, const From& from, int64_t row, int64_t block, int64_t offset) {
  if constexpr (lanes == 4) {
    return sixteen_bytes(from.at(row, block) + offset);
  } else {
    return hn::Combine(d, sixteen_bytes(from.at(row + 4, block) + offset),
                       sixteen_bytes(from.at(row, block) + offset));
  }
}

// Word j of the 16 bytes of each of `lanes` rows: of[j], rows in rising order.
struct Transposed {
  W of[4];
};
template <class From>
HWY_INLINE Transposed transpose(const From& from, int64_t row, int64_t block, int64_t offset) {
  const Words d;
  const hn::Repartition<uint64_t, Words> wide;
  const W a = load(d, from, row, block, offset), b = load(d, from, row + 1, block, offset),
          c = load(d, from, row + 2, block, offset), e = load(d, from, row + 3, block, offset);
  const auto ab = hn::BitCast(wide, hn::InterleaveLower(d, a, b)),
             ce = hn::BitCast(wide, hn::InterleaveLower(d, c, e)),
             ab_upper = hn::BitCast(wide, hn::InterleaveUpper(d, a, b)),
             ce_upper = hn::BitCast(wide, hn::InterleaveUpper(d, c, e));
  return {{hn::BitCast(d, hn::InterleaveLower(wide, ab, ce)),
           hn::BitCast(d, hn::InterleaveUpper(wide, ab, ce)),
           hn::BitCast(d, hn::InterleaveLower(wide, ab_upper, ce_upper)),
           hn::BitCast(d, hn::InterleaveUpper(wide, ab_upper, ce_upper))}};
}

HWY_INLINE void store(W word, std::byte* codes, int64_t step, int64_t row) {
  hn::StoreU(word, Words(), reinterpret_cast<uint32_t*>(codes) + step * panel_rows + row);
}

// Elements i and 16 + i share a byte; in the panel i and 4 + i do.
HWY_INLINE void put_four_bits(const Transposed& x, std::byte* codes, int64_t row) {
  const W low = hn::Set(Words(), 0x0f0f0f0fu);
  LATENTE_UNROLL
  for (int j = 0; j < 2; ++j) {
    const W first = x.of[2 * j], second = x.of[2 * j + 1];
    store(hn::Or(hn::And(first, low), hn::ShiftLeft<4>(hn::And(second, low))), codes, j, row);
    store(hn::Or(hn::And(hn::ShiftRight<4>(first), low), hn::AndNot(low, second)), codes, 2 + j, row);
  }
}

template <int bits, class From>
bool panel(const From& from, const Rows& next, int64_t groups, std::byte* scales, std::byte* codes) {
  constexpr int64_t size = scale_size + group * bits / 8, line = 64;
  const hn::Repartition<int8_t, Words> bytes;
  auto forbidden = hn::Zero(bytes);
  for (int64_t g = 0; g < groups; ++g, codes += group * panel_rows * bits / 8) {
    const int64_t block = g * size;
    // The rows are read side by side, which the processor does not see coming.
    LATENTE_UNROLL
    for (int64_t i = 0; i < size * panel_rows; i += line) hwy::Prefetch(next.blocks + block * panel_rows + i);
    LATENTE_UNROLL
    for (int64_t row = 0; row < panel_rows; row += lanes) {
      if constexpr (bits == 4) {
        put_four_bits(transpose(from, row, block, scale_size), codes, row);
      } else {
        LATENTE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Transposed x = transpose(from, row, block, scale_size + 16 * half);
          LATENTE_UNROLL
          for (int j = 0; j < 4; ++j) {
            forbidden = hn::Min(forbidden, hn::BitCast(bytes, x.of[j]));
            store(x.of[j], codes, 4 * half + j, row);
          }
        }
      }
    }
    LATENTE_UNROLL
    for (int64_t r = 0; r < panel_rows; ++r)
      std::memcpy(scales + (g * panel_rows + r) * scale_size, from.at(r, block), scale_size);
  }
  const hn::Repartition<uint16_t, Words> halves;
  auto largest = hn::Zero(halves);
  for (int64_t i = 0; i < groups * panel_rows; i += static_cast<int64_t>(hn::Lanes(halves))) {
    const auto scale = hn::LoadU(halves, reinterpret_cast<const uint16_t*>(scales) + i);
    largest = hn::Max(largest, hn::And(scale, hn::Set(halves, uint16_t{0x7fff})));
  }
  return hn::AllTrue(halves, hn::Lt(largest, hn::Set(halves, uint16_t{0x7c00}))) &&
         hn::AllTrue(bytes, hn::Ne(forbidden, hn::Set(bytes, int8_t{-128})));
}

bool panel_here(Form form, const std::byte* blocks, int64_t count, int64_t k, std::byte* to) {
  const int64_t groups = k / group, row = groups * (scale_size + group * form.bits / 8);
  std::byte* codes = to + scale_bytes(form, k);
  std::fill(to + groups * panel_rows * scale_size, codes, std::byte{0});
  // A matrix's next panel stands behind this one in the file.
  const Rows rows{blocks, row}, next{blocks + panel_rows * row, row};
  const auto made_of = [&](const auto& from) HWY_ATTR {
    return form.bits == 4 ? panel<4>(from, next, groups, to, codes) : panel<8>(from, next, groups, to, codes);
  };
  if (count == panel_rows) return made_of(rows);
  std::byte nothing[scale_size + group] = {};
  if (form.bits == 4) std::fill(nothing + scale_size, nothing + sizeof(nothing), std::byte{0x88});
  return made_of(SomeRows{rows, count, nothing});
}
#endif

}  // namespace latente::quantised::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente::quantised {

HWY_EXPORT(panel_here);

bool panel_of_blocks(Form form, const std::byte* blocks, int64_t count, int64_t k, std::byte* panel) {
  LATENTE_ASSERT(form.group == 32 && !form.offsets && k % 32 == 0);
  return HWY_DYNAMIC_DISPATCH(panel_here)(form, blocks, count, k, panel);
}

}  // namespace latente::quantised
#endif
