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

// Of `count` float16 numbers, a multiple of 16.
bool are_finite(const std::byte* numbers, int64_t count) {
  const hn::Repartition<uint16_t, Words> d;
  auto largest = hn::Zero(d);
  for (int64_t i = 0; i < count; i += static_cast<int64_t>(hn::Lanes(d))) {
    const auto number = hn::LoadU(d, reinterpret_cast<const uint16_t*>(numbers) + i);
    largest = hn::Max(largest, hn::And(number, hn::Set(d, uint16_t{0x7fff})));
  }
  return hn::AllTrue(d, hn::Lt(largest, hn::Set(d, uint16_t{0x7c00})));
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
  return are_finite(scales, groups * panel_rows) &&
         hn::AllTrue(bytes, hn::Ne(forbidden, hn::Set(bytes, int8_t{-128})));
}

// Q4_K: blocks of eight groups, of float16 numbers d and m, 6 bits for each group to multiply either by, and
// codes of two groups at a time in the halves of 32 bytes.
constexpr int64_t groups_of_k = 8, size_of_k = 144, codes_of_k = 16;

using Floats = hn::RebindToFloat<Words>;

// Of four groups: scales, and what a code of 8 stands for.
HWY_INLINE void put_scales_of_k(W scale, W minimum, hn::Vec<Floats> d, hn::Vec<Floats> m, std::byte* scales,
                                std::byte* offsets) {
  const Floats df;
  const hn::RebindToSigned<Words> di;
  const hn::Rebind<hwy::float16_t, Floats> narrow;
  const W byte = hn::Set(Words(), 0xffu);
  for (int j = 0; j < 4; ++j) {
    const auto number = [&](W of) HWY_ATTR { return hn::ConvertTo(df, hn::BitCast(di, hn::And(of, byte))); };
    const auto step = hn::Mul(d, number(scale));
    const auto offset = hn::Sub(hn::Mul(hn::Set(df, 8.0f), step), hn::Mul(m, number(minimum)));
    hn::StoreU(hn::DemoteTo(narrow, step), narrow, reinterpret_cast<hwy::float16_t*>(scales));
    hn::StoreU(hn::DemoteTo(narrow, offset), narrow, reinterpret_cast<hwy::float16_t*>(offsets));
    scale = hn::ShiftRight<8>(scale), minimum = hn::ShiftRight<8>(minimum);
    scales += panel_rows * scale_size, offsets += panel_rows * scale_size;
  }
}

template <class From>
bool panel_of_k(const From& from, const Rows& next, int64_t groups, std::byte* scales, std::byte* codes) {
  constexpr int64_t line = 64, bytes_of_group = group * panel_rows / 2;
  const hn::Rebind<hwy::float16_t, Floats> narrow;
  const W low = hn::Set(Words(), 0x0f0f0f0fu), six = hn::Set(Words(), 0x3f3f3f3fu),
          two = hn::Set(Words(), 0x30303030u);
  for (int64_t g = 0; g < groups; g += groups_of_k) {
    const int64_t block = g / groups_of_k * size_of_k;
    for (int64_t i = 0; i < size_of_k * panel_rows; i += line)
      hwy::Prefetch(next.blocks + block * panel_rows + i);
    for (int64_t row = 0; row < panel_rows; row += lanes) {
      uint16_t halves[2][lanes];
      for (int64_t i = 0; i < lanes; ++i) {
        std::memcpy(&halves[0][i], from.at(row + i, block), 2);
        std::memcpy(&halves[1][i], from.at(row + i, block) + 2, 2);
      }
      const auto wide = [&](const uint16_t* of) HWY_ATTR {
        return hn::PromoteTo(Floats(), hn::LoadU(narrow, reinterpret_cast<const hwy::float16_t*>(of)));
      };
      const auto d = wide(halves[0]), m = wide(halves[1]);
      const Transposed x = transpose(from, row, block, 0);
      std::byte* scale = scales + (g * panel_rows + row) * scale_size;
      std::byte* offset = scale + groups * panel_rows * scale_size;
      put_scales_of_k(hn::And(x.of[1], six), hn::And(x.of[2], six), d, m, scale, offset);
      // The upper two bits stand above the first four groups'.
      const auto upper = [&](W of) HWY_ATTR { return hn::And(hn::ShiftRight<2>(of), two); };
      put_scales_of_k(hn::Or(hn::And(x.of[3], low), upper(x.of[1])),
                      hn::Or(hn::And(hn::ShiftRight<4>(x.of[3]), low), upper(x.of[2])), d, m,
                      scale + 4 * panel_rows * scale_size, offset + 4 * panel_rows * scale_size);
      for (int64_t pair = 0; pair < groups_of_k / 2; ++pair) {
        std::byte* first = codes + (g + 2 * pair) * bytes_of_group;
        LATENTE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Transposed both = transpose(from, row, block, codes_of_k + 32 * pair + 16 * half);
          LATENTE_UNROLL
          for (int j = 0; j < 2; ++j) {
            const W a = both.of[2 * j], b = both.of[2 * j + 1];
            store(hn::Or(hn::And(a, low), hn::ShiftLeft<4>(hn::And(b, low))), first, 2 * half + j, row);
            store(hn::Or(hn::And(hn::ShiftRight<4>(a), low), hn::AndNot(low, b)), first + bytes_of_group,
                  2 * half + j, row);
          }
        }
      }
    }
  }
  return are_finite(scales, 2 * groups * panel_rows);
}

bool panel_here(Form form, const std::byte* blocks, int64_t count, int64_t k, std::byte* to) {
  const int64_t groups = k / group, row = row_of_blocks(form, k);
  std::byte* codes = to + scale_bytes(form, k);
  std::fill(to + groups * panel_rows * scale_size * (form.offsets ? 2 : 1), codes, std::byte{0});
  // A matrix's next panel stands behind this one in the file.
  const Rows rows{blocks, row}, next{blocks + panel_rows * row, row};
  const auto made_of = [&](const auto& from) HWY_ATTR {
    return form.offsets     ? panel_of_k(from, next, groups, to, codes)
           : form.bits == 4 ? panel<4>(from, next, groups, to, codes)
                            : panel<8>(from, next, groups, to, codes);
  };
  if (count == panel_rows) return made_of(rows);
  // Scales of zero, and codes that 8 was added to; Q4_K has its offsets for that.
  std::byte nothing[size_of_k] = {};
  const std::byte code = form.bits == 4 ? std::byte{0x88} : std::byte{0};
  std::fill(nothing + (form.offsets ? codes_of_k : scale_size), nothing + sizeof(nothing), code);
  return made_of(SomeRows{rows, count, nothing});
}
#endif

}  // namespace latente::quantised::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente::quantised {

HWY_EXPORT(panel_here);

bool panel_of_blocks(Form form, const std::byte* blocks, int64_t count, int64_t k, std::byte* panel) {
  LATENTE_ASSERT(form.group == 32 && k % (form.offsets ? 256 : 32) == 0);
  return HWY_DYNAMIC_DISPATCH(panel_here)(form, blocks, count, k, panel);
}

}  // namespace latente::quantised
#endif
