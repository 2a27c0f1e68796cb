#include "cpu/quantised_kernels.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "cpu/unroll.h"
#include "tensor/quantise.h"

// Beside the usual targets, AVX-512 with VNNI (Ice Lake, Zen 4 and later).
#define HWY_WANT_AVX3_DL
#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS ((HWY_AVX3_DL - 1) | HWY_SSE4 | HWY_SSSE3)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/quantised_kernels.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "hwy/cache_control.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace latente::quantised::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, panel_rows>;
using Ints = hn::RebindToSigned<Floats>;
constexpr int64_t lanes = static_cast<int64_t>(hn::MaxLanes(Floats()));
constexpr int vectors = static_cast<int>(panel_rows / lanes);  // of a panel at one step

#if HWY_TARGET <= HWY_AVX3
inline constexpr int tile_rows = 6;
#else
inline constexpr int tile_rows = 4;
#endif

// Panels of columns that a tile of `rows` rows takes at once. One row waits for memory, which answers four
// readers sooner than two.
constexpr int panels_of(int rows) {
#if HWY_TARGET <= HWY_AVX3
  return rows == 1 ? 4 : 2;
#else
  return rows == 1 ? 4 : rows == 2 ? 2 : 1;
#endif
}

// What is added to signed codes so that the processor's product of bytes, unsigned times signed, takes them.
#if HWY_TARGET == HWY_AVX3_DL
inline constexpr int32_t offset_of_8_bits = 128;
#else
inline constexpr int32_t offset_of_8_bits = 0;
#endif
constexpr int32_t offset_of(int bits) { return bits == 8 ? offset_of_8_bits : 8; }

using V = hn::Vec<Ints>;

// Codes of 8 bits as they are multiplied.
HWY_INLINE V with_offset(V codes) {
#if HWY_TARGET == HWY_AVX3_DL
  return hn::Xor(codes, hn::Set(Ints(), static_cast<int32_t>(0x80808080u)));
#else
  return codes;
#endif
}

// sum + the four products of bytes in each lane. w: unsigned and below 16, or 8 bits with_offset; x: signed,
// within [-127, 127].
template <int bits>
HWY_INLINE V add_products(V sum, V w, V x) {
#if HWY_TARGET == HWY_AVX3_DL
  // The intrinsic needs a compiler flag that Highway's target has only in later versions.
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.raw) : "v"(w.raw), "v"(x.raw));
  return sum;
#elif HWY_TARGET == HWY_AVX2
  // Pairs fit into 16 bits: 2·127·127.
  const __m256i pairs = bits == 8
                            ? _mm256_maddubs_epi16(_mm256_abs_epi8(x.raw), _mm256_sign_epi8(w.raw, x.raw))
                            : _mm256_maddubs_epi16(w.raw, x.raw);
  return hn::Add(sum, V{_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))});
#else
  sum = hn::Add(sum,
                hn::Mul(hn::ShiftRight<24>(hn::ShiftLeft<24>(w)), hn::ShiftRight<24>(hn::ShiftLeft<24>(x))));
  sum = hn::Add(sum,
                hn::Mul(hn::ShiftRight<24>(hn::ShiftLeft<16>(w)), hn::ShiftRight<24>(hn::ShiftLeft<16>(x))));
  sum =
      hn::Add(sum, hn::Mul(hn::ShiftRight<24>(hn::ShiftLeft<8>(w)), hn::ShiftRight<24>(hn::ShiftLeft<8>(x))));
  return hn::Add(sum, hn::Mul(hn::ShiftRight<24>(w), hn::ShiftRight<24>(x)));
#endif
}

// Sums of products of 4 bits stay in 16 bits, pairs of bytes side by side, for a stretch of a group: eight
// times 2·15·127 at most.
constexpr int64_t stretch = 32;
constexpr bool has_pairs(int bits) { return bits == 4 && HWY_TARGET == HWY_AVX2; }

HWY_INLINE V add_pairs(V sum, V w, V x) {
#if HWY_TARGET == HWY_AVX2
  return V{_mm256_add_epi16(sum.raw, _mm256_maddubs_epi16(w.raw, x.raw))};
#else
  return add_products<4>(sum, w, x);
#endif
}

HWY_INLINE V add_sums_of_pairs(V sum, V pairs) {
#if HWY_TARGET == HWY_AVX2
  return hn::Add(sum, V{_mm256_madd_epi16(pairs.raw, _mm256_set1_epi16(1))});
#else
  return hn::Add(sum, pairs);
#endif
}

HWY_INLINE int32_t word_at(const std::byte* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

HWY_INLINE V load_codes(const std::byte* from) {
  return hn::Load(Ints(), reinterpret_cast<const int32_t*>(from));
}

HWY_INLINE hn::Vec<Floats> load_scales(const std::byte* from) {
  const hn::Rebind<hwy::float16_t, Floats> narrow;
  return hn::PromoteTo(Floats(), hn::LoadU(narrow, reinterpret_cast<const hwy::float16_t*>(from)));
}

// c[H, columns] = init + a · w over P panels of columns, which begin `panel` bytes behind the block's.
// `then`: the panels that are read next, as far apart, or null.
template <int bits, bool offsets, int H, int P>
void tile(const Block& b, const std::byte* HWY_RESTRICT a, int64_t panel, const std::byte* then, float* c,
          const float* init, int64_t columns) {
  const std::byte* HWY_RESTRICT scales = b.scales + panel;
  const std::byte* HWY_RESTRICT codes = b.codes + panel;
  const std::byte* HWY_RESTRICT of_groups = offsets ? b.offsets + panel : nullptr;
  const Floats d;
  const Ints di;
  constexpr int N = P * vectors;
  constexpr int64_t line = panel_rows * 4;  // bytes of codes that a panel takes at once
  const int64_t steps = b.form.group / 4;
  hn::Vec<Floats> total[H][N];
  const bool whole = columns == P * panel_rows;
  LATENTE_UNROLL
  for (int i = 0; i < H; ++i) {
    HWY_ALIGN float part[N * lanes];
    const float* from = part;
    if (!init) {
      std::fill_n(part, N * lanes, 0.0f);
    } else if (whole) {
      from = init + i * b.init_row;
    } else {
      std::copy_n(init + i * b.init_row, columns, part);
      std::fill(part + columns, part + N * lanes, 0.0f);
    }
    LATENTE_UNROLL
    for (int j = 0; j < N; ++j) total[i][j] = hn::LoadU(d, from + j * lanes);
  }
  // The processor's own fetching stops at the end of each page and panel.
  constexpr int64_t distance = 1024;
  const std::byte* ahead = codes + distance;
  const std::byte* const end = codes + b.groups * b.form.group * panel_rows * bits / 8;
  const auto fetch = [&]() HWY_ATTR {
    LATENTE_UNROLL
    for (int p = 0; p < P; ++p) hwy::Prefetch(ahead + p * b.panel);
    ahead += line;
  };
  const std::byte* const scales_then = H == 1 ? then : nullptr;
  for (int64_t g = 0; g < b.groups; ++g) {
    // Scales are a stream of their own, too slow for the processor to foresee: fetched a panel ahead.
    if (scales_then && g % 2 == 0) {
      LATENTE_UNROLL
      for (int p = 0; p < P; ++p) hwy::Prefetch(scales_then + p * b.panel + g * panel_rows * 2);
    }
    V sum[H][N];
    LATENTE_UNROLL
    for (int i = 0; i < H; ++i) {
      const V start = hn::Set(di, word_at(a + 4 * (H + i)));
      LATENTE_UNROLL
      for (int j = 0; j < N; ++j) sum[i][j] = start;
    }
    const std::byte* x = a + 8 * H;
    if (H == 1 && then && ahead >= end) {
      ahead = then + (b.codes - b.scales) + (ahead - end);
      then = nullptr;
    }
    const auto codes_of = [&](int j) HWY_ATTR {
      return load_codes(codes + j / vectors * b.panel + j % vectors * lanes * 4);
    };
    if constexpr (bits == 8) {
      LATENTE_UNROLL_4
      for (int64_t s = 0; s < steps; ++s) {
        V w[N];
        if constexpr (H == 1) fetch();
        LATENTE_UNROLL
        for (int j = 0; j < N; ++j) w[j] = with_offset(codes_of(j));
        codes += line;
        LATENTE_UNROLL
        for (int i = 0; i < H; ++i) {
          const V element = hn::Set(di, word_at(x + 4 * i));
          LATENTE_UNROLL
          for (int j = 0; j < N; ++j) sum[i][j] = add_products<8>(sum[i][j], w[j], element);
        }
        x += 4 * H;
      }
    } else {
      const V low = hn::Set(di, 0x0f0f0f0f);
      for (int64_t at = 0; at < b.form.group; at += stretch) {
        V part[H][N];
        LATENTE_UNROLL
        for (int i = 0; i < H; ++i) {
          LATENTE_UNROLL
          for (int j = 0; j < N; ++j) part[i][j] = has_pairs(bits) ? hn::Zero(di) : sum[i][j];
        }
        // Unrolled, the compiler would sum in a tree, for which the registers do not suffice.
        LATENTE_KEEP_ROLLED
        for (int64_t s = 0; s < stretch; s += 8) {
          if constexpr (H == 1) fetch();
          LATENTE_UNROLL
          for (int j = 0; j < N; ++j) {
            const V both = codes_of(j);
            const V first = hn::And(both, low), second = hn::And(hn::ShiftRight<4>(both), low);
            LATENTE_UNROLL
            for (int i = 0; i < H; ++i) {
              part[i][j] = add_pairs(part[i][j], first, hn::Set(di, word_at(x + 4 * i)));
              part[i][j] = add_pairs(part[i][j], second, hn::Set(di, word_at(x + 4 * (H + i))));
            }
          }
          codes += line;
          x += 8 * H;
        }
        LATENTE_UNROLL
        for (int i = 0; i < H; ++i) {
          LATENTE_UNROLL
          for (int j = 0; j < N; ++j)
            sum[i][j] = has_pairs(bits) ? add_sums_of_pairs(sum[i][j], part[i][j]) : part[i][j];
        }
      }
    }
    LATENTE_UNROLL
    for (int j = 0; j < N; ++j) {
      const auto of_columns = load_scales(scales + j / vectors * b.panel + j % vectors * lanes * 2);
      [[maybe_unused]] hn::Vec<Floats> offset;
      if constexpr (offsets)
        offset = load_scales(of_groups + j / vectors * b.panel + j % vectors * lanes * 2);
      LATENTE_UNROLL
      for (int i = 0; i < H; ++i) {
        float scale;
        std::memcpy(&scale, a + 4 * i, sizeof(scale));
        total[i][j] =
            hn::MulAdd(hn::Mul(hn::ConvertTo(d, sum[i][j]), hn::Set(d, scale)), of_columns, total[i][j]);
        if constexpr (offsets) {
          // The sum of the row's codes, from what its sums began with.
          const float ones = static_cast<float>(word_at(a + 4 * (H + i)) / -offset_of(bits)) * scale;
          total[i][j] = hn::MulAdd(hn::Set(d, ones), offset, total[i][j]);
        }
      }
    }
    scales += panel_rows * 2;
    if constexpr (offsets) of_groups += panel_rows * 2;
    a += H * (8 + b.form.group);
  }
  LATENTE_UNROLL
  for (int i = 0; i < H; ++i) {
    float* to = c + i * b.c_row;
    if (whole) {
      LATENTE_UNROLL
      for (int j = 0; j < N; ++j) hn::StoreU(total[i][j], d, to + j * lanes);
    } else {
      HWY_ALIGN float part[N * lanes];
      LATENTE_UNROLL
      for (int j = 0; j < N; ++j) hn::Store(total[i][j], d, part + j * lanes);
      std::copy_n(part, columns, to);
    }
  }
}

using TileFunction = void (*)(const Block&, const std::byte*, int64_t, const std::byte*, float*, const float*,
                              int64_t);

// For 1 row and more, and at most so many panels of columns.
template <int bits, bool offsets, int most, int... H>
constexpr std::array<TileFunction, sizeof...(H)> tile_table(std::integer_sequence<int, H...>) {
  return {&tile<bits, offsets, H + 1, std::min(panels_of(H + 1), most)>...};
}

template <int bits, bool offsets>
void block_of(const Block& b) {
  constexpr auto heights = std::make_integer_sequence<int, tile_rows>();
  static constexpr auto one = tile_table<bits, offsets, 1>(heights);
  static constexpr auto two = tile_table<bits, offsets, 2>(heights);
  static constexpr auto four = tile_table<bits, offsets, 4>(heights);
  const int64_t start = b.panels.start(b.first), row_bytes = packed_bytes(1, b.form.group, b.groups);
  // Heights of several panels differ by one; all of them take as many columns at once as the tallest.
  const int64_t most =
      panels_of(b.last - b.first > 1 ? tile_rows : static_cast<int>(b.panels.height(b.first)));
  for (int64_t j = 0; j < b.n;) {
    int64_t at_once = most;
    while (at_once > 1 && b.n - j < at_once * panel_rows) at_once /= 2;
    const auto& tiles = at_once == 4 ? four : at_once == 2 ? two : one;
    const int64_t columns = std::min(b.n - j, at_once * panel_rows);
    const int64_t panel = j / panel_rows * b.panel;
    const std::byte* then = j + columns < b.n ? b.scales + panel + columns / panel_rows * b.panel : b.then;
    for (int64_t i = b.first; i < b.last; ++i) {
      const int64_t row = b.panels.start(i);
      tiles[static_cast<size_t>(b.panels.height(i) - 1)](
          b, b.a + (row - start) * row_bytes, panel, then, b.c + row * b.c_row + j,
          b.init ? b.init + row * b.init_row + j : nullptr, columns);
    }
    j += columns;
  }
}

void block(const Block& b) {
  if (b.form.bits == 8) {
    block_of<8, false>(b);
  } else if (b.form.offsets) {
    block_of<4, true>(b);
  } else {
    block_of<4, false>(b);
  }
}

// A scale rounded to float16, as llama.cpp keeps those of activations, so that a file's blocks of 32 give its
// products; but as it is where that would lose more than 1/256 of it. Highway's own narrowing does not round
// alike on all targets.
HWY_INLINE float half_scale(float scale) {
  if (!(scale >= 0x1p-17f && scale <= 65504.0f)) return scale;  // NaN too
  if (scale < 0x1p-14f)
    return (scale + 0.75f) - 0.75f;  // float16's steps are 2^-24 there, as float32's at 0.75
  auto bits = std::bit_cast<uint32_t>(scale);
  bits += 0xfff + (bits >> 13 & 1);
  return std::bit_cast<float>(bits & ~0x1fffu);
}

// Codes of one group of a row, `count` of them real, and its scale; returns the sum of the codes.
int32_t quantise_group(const float* x, int64_t count, int64_t group, int8_t* codes, float& scale) {
  const hn::ScalableTag<float> d;
  const hn::RebindToSigned<decltype(d)> di;
  const hn::Rebind<int8_t, decltype(d)> narrow;
  const auto width = static_cast<int64_t>(hn::Lanes(d));
  HWY_ALIGN float padded[most_group];
  if (count < group) {
    std::copy_n(x, count, padded);
    std::fill(padded + count, padded + group, 0.0f);
    x = padded;
  }
  auto extent = hn::Zero(d), nothing = hn::Zero(d);
  for (int64_t i = 0; i < group; i += width) {
    const auto value = hn::LoadU(d, x + i);
    extent = hn::Max(extent, hn::Abs(value));
    nothing = hn::MulAdd(value, hn::Zero(d), nothing);  // NaN for NaN and infinities
  }
  const float largest = hn::GetLane(hn::MaxOfLanes(d, extent));
  const float poison = hn::GetLane(hn::SumOfLanes(d, nothing));
  scale = largest / 127 + poison;
  if (group == 32) scale = half_scale(scale);
  if (std::isnan(poison)) {  // so is the result, whatever the codes
    std::fill_n(codes, group, int8_t{0});
    return 0;
  }
  const auto inverse = hn::Set(d, largest > 1e-30f ? 127 / largest : 0.0f);
  auto sum = hn::Zero(di);
  for (int64_t i = 0; i < group; i += width) {
    const auto code = hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), inverse));
    sum = hn::Add(sum, code);
    hn::StoreU(hn::DemoteTo(narrow, code), narrow, codes + i);
  }
  return hn::GetLane(hn::SumOfLanes(di, sum));
}

void rows_for_amx(const gemm::Lines<float>& a, const gemm::Panels& panels, int64_t first, int64_t last,
                  int64_t k, int64_t end, int64_t group, int64_t groups, std::byte* to) {
  for (int64_t p = first; p < last; ++p) {
    for (int64_t i = 0; i < panels.height(p); ++i) {
      const float* row = a.line(panels.start(p) + i);
      for (int64_t g = 0; g < groups; ++g) {
        std::byte* at = to + packed_amx_bytes(1, group, (p - first) * groups + g);
        const int64_t column = k + g * group;
        float scale;
        const int32_t sum = quantise_group(row + column, std::min(group, end - column), group,
                                           reinterpret_cast<int8_t*>(at + i * group), scale);
        const float scaled = static_cast<float>(sum) * scale;
        std::memcpy(at + rows_of_amx_tile * group + 4 * i, &scale, 4);
        std::memcpy(at + rows_of_amx_tile * (group + 4) + 4 * i, &scaled, 4);
      }
    }
  }
}

void rows(const gemm::Lines<float>& a, const gemm::Panels& panels, int64_t first, int64_t last, int64_t k,
          int64_t end, Form form, int64_t groups, std::byte* to) {
  const int64_t group = form.group;
  const int32_t offset = offset_of(form.bits);
  int8_t codes[most_group];
  for (int64_t p = first; p < last; ++p) {
    const int64_t height = panels.height(p), start = panels.start(p);
    std::byte* panel = to + packed_bytes(start - panels.start(first), group, groups);
    for (int64_t i = 0; i < height; ++i) {
      const float* row = a.line(start + i);
      for (int64_t g = 0; g < groups; ++g) {
        std::byte* at = panel + g * packed_bytes(height, group, 1);
        float scale;
        const int64_t column = k + g * group;
        const int32_t sum = quantise_group(row + column, std::min(group, end - column), group, codes, scale);
        const int32_t begin = -offset * sum;
        std::memcpy(at + 4 * i, &scale, 4);
        std::memcpy(at + 4 * (height + i), &begin, 4);
        std::byte* word = at + 8 * height + 4 * i;
        for (int64_t s = 0; s < group; s += 4, word += 4 * height) std::memcpy(word, codes + s, 4);
      }
    }
  }
}

int64_t rows_of_tile_here() { return tile_rows; }
bool may_use_amx() { return HWY_TARGET == HWY_AVX3_DL; }

// Independent chains of products on registers; returns the operations done.
double products(int64_t rounds, int32_t* sink) {
  const Ints d;
  V sum[12], w = with_offset(hn::Set(d, 0x01020304)), x = hn::Iota(d, 1);
  LATENTE_UNROLL
  for (int i = 0; i < 12; ++i) sum[i] = hn::Set(d, i);
  for (int64_t round = 0; round < rounds; ++round) {
    LATENTE_UNROLL
    for (int i = 0; i < 12; ++i) sum[i] = add_products<8>(sum[i], w, x);
    w = hn::Xor(w, x);
  }
  V total = hn::Zero(d);
  LATENTE_UNROLL
  for (int i = 0; i < 12; ++i) total = hn::Add(total, sum[i]);
  *sink = hn::GetLane(hn::SumOfLanes(d, total));
  return 12.0 * 2 * 4 * static_cast<double>(lanes * rounds);
}

}  // namespace latente::quantised::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente::quantised {

HWY_EXPORT(rows_of_tile_here);
HWY_EXPORT(may_use_amx);
HWY_EXPORT(rows);
HWY_EXPORT(rows_for_amx);
HWY_EXPORT(block);
HWY_EXPORT(products);

Unit unit_for(int64_t rows) {
  constexpr int64_t worthwhile = 8;
  return rows >= worthwhile && amx_available() && HWY_DYNAMIC_DISPATCH(may_use_amx)() ? Unit::amx
                                                                                      : Unit::vectors;
}
int64_t rows_of_tile(Unit unit) {
  return unit == Unit::amx ? rows_of_amx_tile : HWY_DYNAMIC_DISPATCH(rows_of_tile_here)();
}
void pack_rows(Unit unit, const gemm::Lines<float>& a, const gemm::Panels& panels, int64_t first,
               int64_t last, int64_t k, int64_t end, Form form, int64_t groups, std::byte* to) {
  if (unit == Unit::amx) {
    HWY_DYNAMIC_DISPATCH(rows_for_amx)(a, panels, first, last, k, end, form.group, groups, to);
  } else {
    HWY_DYNAMIC_DISPATCH(rows)(a, panels, first, last, k, end, form, groups, to);
  }
}
void multiply_block(Unit unit, const Block& b) {
  if (unit == Unit::amx) {
    multiply_block_amx(b);
  } else {
    HWY_DYNAMIC_DISPATCH(block)(b);
  }
}
double run_products(int64_t rounds, int32_t* sink) { return HWY_DYNAMIC_DISPATCH(products)(rounds, sink); }

}  // namespace latente::quantised
#endif
