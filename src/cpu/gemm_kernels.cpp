// Packing and the register tile.
#include "cpu/gemm_kernels.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "cpu/unroll.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/gemm_kernels.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "hwy/cache_control.h"
#include "hwy/highway.h"

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

// A line that another core has read is costly to own: ask early.
HWY_INLINE void prefetch_to_write(const void* line) {
#if HWY_ARCH_X86_64
  asm volatile("prefetchw %0" : : "m"(*static_cast<const char*>(line)));
#else
  hwy::Prefetch(static_cast<const char*>(line));
#endif
}

// Panels of b that a tile of `rows` rows takes at once: a low tile needs several for its chains of
// multiply-adds to hide their latency.
constexpr int panels_at_once(int rows) { return rows == 1 ? 4 : 2 * rows <= rows_of_tile ? 2 : 1; }

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

// c[H, columns] = init + a · b. a [k, H]; b: P panels [k, 2 vectors], `b_panel` elements apart.
template <int H, int P, class T, class S>
void tile(int64_t k, const T* HWY_RESTRICT a, const S* HWY_RESTRICT b, int64_t b_panel, T* c, int64_t c_row,
          const T* init, int64_t init_row, int64_t columns) {
  const Tag<T> d;
  using V = hn::Vec<Tag<T>>;
  constexpr int64_t L = lanes<T>;
  constexpr int N = 2 * P;
  // Few rows read columns faster than the processor foresees; one row reads enough panels at once.
  constexpr bool streams = H > 1 && H < rows_of_tile;
  constexpr int64_t ahead = 512 / sizeof(S);
  V sum[H][N];
  LATENTE_UNROLL
  for (int i = 0; i < H; ++i) {
    prefetch_to_write(c + i * c_row);
    LATENTE_UNROLL
    for (int j = 0; j < N; ++j) sum[i][j] = hn::Zero(d);
  }
  if constexpr (std::is_same_v<S, f8e4m3>) {
    constexpr int64_t fp8_ahead = 1024;
    const auto pair = [&]() HWY_ATTR {
      LATENTE_UNROLL
      for (int j = 0; j < P; ++j) {
        V even[2], odd[2];
        load_columns(b + j * b_panel, even, odd);
        LATENTE_UNROLL
        for (int i = 0; i < H; ++i) {
          const V first = hn::Set(d, a[i]), second = hn::Set(d, a[H + i]);
          LATENTE_UNROLL
          for (int half = 0; half < 2; ++half) {
            V& total = sum[i][2 * j + half];
            total = hn::MulAdd(second, odd[half], hn::MulAdd(first, even[half], total));
          }
        }
      }
      a += 2 * H;
      b += 4 * L;
    };
    for (; k >= 4; k -= 4) {
      LATENTE_UNROLL
      for (int j = 0; j < P; ++j) {
        LATENTE_UNROLL
        for (int64_t line = 0; line < 8 * L; line += 64) hwy::Prefetch(b + j * b_panel + fp8_ahead + line);
      }
      pair(), pair();
    }
    if (k > 0) pair();
    LATENTE_UNROLL
    for (int i = 0; i < H; ++i) {
      LATENTE_UNROLL
      for (int j = 0; j < N; ++j) sum[i][j] = hn::Mul(sum[i][j], hn::Set(d, code_factor));
    }
  } else {
    LATENTE_UNROLL_4
    for (; k > 0; --k) {
      V row[N];
      LATENTE_UNROLL
      for (int j = 0; j < P; ++j) {
        if (streams) hwy::Prefetch(b + j * b_panel + ahead);
        load_columns(b + j * b_panel, row[2 * j], row[2 * j + 1]);
      }
      LATENTE_UNROLL
      for (int i = 0; i < H; ++i) {
        const V element = hn::Set(d, a[i]);
        LATENTE_UNROLL
        for (int j = 0; j < N; ++j) sum[i][j] = hn::MulAdd(element, row[j], sum[i][j]);
      }
      a += H;
      b += 2 * L;
    }
  }
  if (columns == N * L) {
    LATENTE_UNROLL
    for (int i = 0; i < H; ++i) {
      LATENTE_UNROLL
      for (int j = 0; j < N; ++j) {
        if (init) sum[i][j] = hn::Add(hn::LoadU(d, init + i * init_row + j * L), sum[i][j]);
        hn::StoreU(sum[i][j], d, c + i * c_row + j * L);
      }
    }
    return;
  }
  HWY_ALIGN T part[H * N * L];
  LATENTE_UNROLL
  for (int i = 0; i < H; ++i) {
    LATENTE_UNROLL
    for (int j = 0; j < N; ++j) hn::Store(sum[i][j], d, part + (i * N + j) * L);
  }
  for (int i = 0; i < H; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const T value = part[i * N * L + j];
      c[i * c_row + j] = init ? init[i * init_row + j] + value : value;
    }
  }
}

template <class T, class S>
using TileFunction = void (*)(int64_t, const T*, const S*, int64_t, T*, int64_t, const T*, int64_t, int64_t);

// For 1 row and more, and at most so many panels of columns.
template <int most, class T, class S, int... H>
constexpr std::array<TileFunction<T, S>, sizeof...(H)> tile_table(std::integer_sequence<int, H...>) {
  return {&tile<H + 1, std::min(panels_at_once(H + 1), most), T, S>...};
}

template <class T, class S>
void block(const Block<T, S>& p) {
  constexpr int64_t width = columns_of_tile<T>;
  constexpr auto heights = std::make_integer_sequence<int, rows_of_tile>();
  static constexpr auto one = tile_table<1, T, S>(heights);
  static constexpr auto two = tile_table<2, T, S>(heights);
  static constexpr auto four = tile_table<4, T, S>(heights);
  const int64_t most = p.last - p.first > 1 ? 1 : panels_at_once(static_cast<int>(p.panels.height(p.first)));
  for (int64_t j = 0; j < p.n;) {
    int64_t at_once = most;
    while (at_once > 1 && p.n - j < at_once * width) at_once /= 2;
    const auto& tiles = at_once == 4 ? four : at_once == 2 ? two : one;
    const int64_t columns = std::min(at_once * width, p.n - j);
    for (int64_t i = p.first; i < p.last; ++i) {
      const int64_t start = p.panels.start(i), height = p.panels.height(i);
      tiles[static_cast<size_t>(height - 1)](p.k, p.a + p.panels.offset(i, p.k), p.b + j / width * p.b_panel,
                                             p.b_panel, p.c + start * p.c_row + j, p.c_row,
                                             p.init ? p.init + start * p.init_row + j : nullptr, p.init_row,
                                             columns);
    }
    j += columns;
  }
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

// c[H, columns] = init + a · b for the 8·G columns of b that stand as lines along k.
template <int H, int G, class S>
void direct_tile(int64_t count, const float* HWY_RESTRICT a, const S* const* line, float* c, int64_t c_row,
                 const float* init, int64_t init_row, int64_t columns) {
  const Eight d;
  using V = hn::Vec<Eight>;
  V sum[H][G];
  LATENTE_UNROLL
  for (int i = 0; i < H; ++i) {
    LATENTE_UNROLL
    for (int g = 0; g < G; ++g) sum[i][g] = hn::Zero(d);
  }
  int64_t k = 0;
  // A cache line of each line at once: with many lines, it may be gone the next time.
  constexpr int64_t at_once = 64 / sizeof(S), ahead = 512 / sizeof(S);
  for (; k + at_once <= count; k += at_once) {
    LATENTE_UNROLL
    for (int g = 0; g < G; ++g) {
      LATENTE_UNROLL
      for (int j = 0; j < 8; ++j) hwy::Prefetch(line[8 * g + j] + k + ahead);
      LATENTE_UNROLL
      for (int64_t part = k; part < k + at_once; part += 8) {
        transpose_eight(line + 8 * g, part, [&](int i, V column) HWY_ATTR {
          LATENTE_UNROLL
          for (int h = 0; h < H; ++h) {
            sum[h][g] = hn::MulAdd(hn::Set(d, a[(part + i) * H + h]), column, sum[h][g]);
          }
        });
      }
    }
  }
  HWY_ALIGN float part[8];
  for (; k < count; ++k) {
    LATENTE_UNROLL
    for (int g = 0; g < G; ++g) {
      for (int j = 0; j < 8; ++j) part[j] = widen(line[8 * g + j][k]);
      const V column = hn::Load(d, part);
      LATENTE_UNROLL
      for (int h = 0; h < H; ++h) sum[h][g] = hn::MulAdd(hn::Set(d, a[k * H + h]), column, sum[h][g]);
    }
  }
  LATENTE_UNROLL
  for (int h = 0; h < H; ++h) {
    LATENTE_UNROLL
    for (int g = 0; g < G; ++g) {
      hn::Store(sum[h][g], d, part);
      for (int64_t j = 0; j < std::min<int64_t>(8, columns - 8 * g); ++j) {
        const int64_t at = 8 * g + j;
        c[h * c_row + at] = init ? init[h * init_row + at] + part[j] : part[j];
      }
    }
  }
}

template <int H, class S>
void direct_rows(const Block<float>& p, const Lines<S>& b, int64_t n0, int64_t k) {
  constexpr int groups = direct_columns / 8;
  for (int64_t j = 0; j < p.n; j += direct_columns) {
    const S* line[direct_columns];
    for (int64_t i = 0; i < direct_columns; ++i) line[i] = b.line(n0 + std::min(j + i, p.n - 1)) + k;
    if constexpr (H <= 2) {
      direct_tile<H, groups>(p.k, p.a, line, p.c + j, p.c_row, p.init ? p.init + j : nullptr, p.init_row,
                             p.n - j);
    } else {
      // One group at a time: the sums and a transposed block fill the registers.
      for (int64_t g = 0; 8 * g < std::min(p.n - j, direct_columns); ++g) {
        const int64_t at = j + 8 * g;
        direct_tile<H, 1>(p.k, p.a, line + 8 * g, p.c + at, p.c_row, p.init ? p.init + at : nullptr,
                          p.init_row, p.n - at);
      }
    }
  }
}
#endif

inline constexpr int64_t most_direct_rows = HWY_TARGET <= HWY_AVX2 ? 4 : 0;

template <class S>
void direct([[maybe_unused]] const Block<float>& p, [[maybe_unused]] const Lines<S>& b,
            [[maybe_unused]] int64_t n0, [[maybe_unused]] int64_t k) {
#if HWY_TARGET <= HWY_AVX2
  switch (p.panels.rows) {
    case 1:
      return direct_rows<1>(p, b, n0, k);
    case 2:
      return direct_rows<2>(p, b, n0, k);
    case 3:
      return direct_rows<3>(p, b, n0, k);
    case 4:
      return direct_rows<4>(p, b, n0, k);
  }
#endif
  HWY_DASSERT(false);
}

template <class T>
HWY_INLINE void prefetch(const T* from, int64_t count) {
  constexpr auto line = static_cast<int64_t>(64 / sizeof(T));
  for (int64_t i = 0; i < count; i += line) hwy::Prefetch(from + i);
  hwy::Prefetch(from + count - 1);
}

// to[k * step + i] = line first + i at k0 + k, for at most eight lines. With `spills`, it may also write up
// to to[k * step + 7].
template <class T, class S>
HWY_INLINE void transpose_lines(const Lines<S>& from, int64_t first, int64_t lines, int64_t k0, int64_t count,
                                [[maybe_unused]] bool spills, T* to, int64_t step) {
  const S* line[8];
  for (int64_t i = 0; i < 8; ++i) line[i] = from.line(first + std::min(i, lines - 1)) + k0;
  int64_t k = 0;
#if HWY_TARGET <= HWY_AVX2
  if constexpr (sizeof(T) == 4) {
    if (lines == 8 || spills) {
      for (; k + 8 <= count; k += 8) {
        transpose_eight(
            line, k, [&](int i, hn::Vec<Eight> v) HWY_ATTR { hn::StoreU(v, Eight(), to + (k + i) * step); });
      }
    }
  }
#endif
  for (; k < count; ++k) {
    for (int64_t i = 0; i < lines; ++i) to[k * step + i] = widen(line[i][k]);
  }
}

template <class T>
void rows(const Lines<T>& a, const Panels& panels, int64_t first, int64_t last, int64_t k, int64_t count,
          T* to) {
  if (a.along_k) {
    for (int64_t p = first; p < last; ++p) {
      const int64_t start = panels.start(p), height = panels.height(p);
      T* panel = to + panels.offset(p, count);
      if (height == 1) {
        std::memcpy(panel, a.line(start) + k, static_cast<size_t>(count) * sizeof(T));
        continue;
      }
      if (height == 2) {
        const Tag<T> d;
        const T *even = a.line(start) + k, *odd = a.line(start + 1) + k;
        int64_t i = 0;
        for (; i + lanes<T> <= count; i += lanes<T>) {
          hn::StoreInterleaved2(hn::LoadU(d, even + i), hn::LoadU(d, odd + i), d, panel + 2 * i);
        }
        for (; i < count; ++i) panel[2 * i] = even[i], panel[2 * i + 1] = odd[i];
        continue;
      }
      // The last lines first: what they spill onto the next k's first lines is then overwritten.
      for (int64_t i = (height - 1) / 8 * 8; i >= 0; i -= 8) {
        transpose_lines(a, start + i, std::min<int64_t>(height - i, 8), k, count, true, panel + i, height);
      }
    }
    return;
  }
  // A few lines at a time: neighbouring panels share their cache lines.
  constexpr int64_t lines = 16;
  for (int64_t begin = 0; begin < count; begin += lines) {
    const int64_t end = std::min(begin + lines, count);
    for (int64_t i = end; i < std::min(end + lines, count); ++i) {
      prefetch(a.line(k + i) + panels.start(first), panels.start(last) - panels.start(first));
    }
    for (int64_t p = first; p < last; ++p) {
      const int64_t start = panels.start(p), height = panels.height(p);
      T* panel = to + panels.offset(p, count);
      if (sizeof(T) == 4 && height == rows_of_tile && rows_of_tile <= lanes<T> && p + 1 < last) {
        // A whole vector: what it spills onto the next k's elements is then overwritten.
        const Tag<T> d;
        for (int64_t i = begin; i < end; ++i) {
          hn::StoreU(hn::LoadU(d, a.line(k + i) + start), d, panel + i * rows_of_tile);
        }
      } else if (height == rows_of_tile) {
        for (int64_t i = begin; i < end; ++i) {
          std::memcpy(panel + i * rows_of_tile, a.line(k + i) + start, rows_of_tile * sizeof(T));
        }
      } else {
        for (int64_t i = begin; i < end; ++i) {
          std::memcpy(panel + i * height, a.line(k + i) + start, static_cast<size_t>(height) * sizeof(T));
        }
      }
    }
  }
}

template <class S>
HWY_INLINE void copy_line(const S* from, S* to) {
  std::memcpy(to, from, columns_of_tile<S> * sizeof(S));
}
HWY_INLINE void copy_line(const bf16* from, float* to) {
  const Tag<float> d;
  const hn::Rebind<uint16_t, Tag<float>> narrow;
  const hn::RebindToUnsigned<Tag<float>> wide;
  constexpr int64_t L = lanes<float>;
  LATENTE_UNROLL
  for (int j = 0; j < 2; ++j) {
    const auto bits = hn::LoadU(narrow, reinterpret_cast<const uint16_t*>(from) + j * L);
    hn::Store(hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(wide, bits))), d, to + j * L);
  }
}

constexpr int64_t lines_ahead = 8;

template <class T, class S>
void columns(const Lines<S>& b, int64_t n0, int64_t n, int64_t k, int64_t count, T* to) {
  constexpr int64_t width = columns_of_tile<T>;
  const int64_t whole = n / width * width;
  if (b.along_k) {
    for (int64_t j = 0; j < n; j += width) {
      T* panel = to + j * count;
      const int64_t lines = std::min(width, n - j);
      for (int64_t i = 0; i < lines; i += 8) {
        transpose_lines(b, n0 + j + i, std::min<int64_t>(lines - i, 8), k, count, false, panel + i, width);
      }
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const S* line = b.line(k + i) + n0;
      if (i + lines_ahead < count) prefetch(b.line(k + i + lines_ahead) + n0, n);
      for (int64_t j = 0; j < whole; j += width) copy_line(line + j, to + j * count + i * width);
      for (int64_t j = whole; j < n; ++j) to[whole * count + i * width + j - whole] = widen(line[j]);
    }
  }
  if (whole < n) {
    for (int64_t i = 0; i < count; ++i) {
      T* row = to + whole * count + i * width;
      std::fill(row + (n - whole), row + width, T{0});
    }
  }
}

void panel(const Lines<bf16>& b, int64_t n0, int64_t n, int64_t k, bf16* to) {
  constexpr int64_t width = columns_of_tile<float>, half = width / 2;
  for (int64_t j = 0; j < width; ++j) {
    const int64_t at = j < half ? 2 * j : 2 * (j - half) + 1;
    if (j >= n) {
      for (int64_t i = 0; i < k; ++i) to[i * width + at] = bf16{};
    } else {
      const bf16* line = b.line(n0 + j);
      for (int64_t i = 0; i < k; ++i) to[i * width + at] = line[i];
    }
  }
}

void widen_panels_f32(const bf16* panels, int64_t panel, int64_t n, int64_t count, float* to) {
  constexpr int64_t width = columns_of_tile<float>;
  const Tag<float> d;
  for (int64_t j = 0; j < n; j += width, panels += panel) {
    for (int64_t i = 0; i < count; ++i, to += width) {
      hn::Vec<Tag<float>> first, second;
      load_columns(panels + i * width, first, second);
      hn::Store(first, d, to);
      hn::Store(second, d, to + lanes<float>);
    }
  }
}

void widen_panels_fp8(const f8e4m3* panels, int64_t panel, int64_t n, int64_t count, float* to) {
  constexpr int64_t width = columns_of_tile<float>, L = lanes<float>;
  const Tag<float> d;
  const auto factor = hn::Set(d, code_factor);
  for (int64_t j = 0; j < n; j += width, panels += panel) {
    for (int64_t k = 0; k < count; k += 2, to += 2 * width) {
      hn::Vec<Tag<float>> even[2], odd[2];
      load_columns(panels + k * width, even, odd);
      LATENTE_UNROLL
      for (int half = 0; half < 2; ++half) {
        hn::Store(hn::Mul(even[half], factor), d, to + half * L);
        hn::Store(hn::Mul(odd[half], factor), d, to + width + half * L);
      }
    }
  }
}

void scale_rows_fp8(const Panels& panels, int64_t first, int64_t last, int64_t k, int64_t count,
                    const float* scales, const float* from, float* to) {
  const Tag<float> d;
  const auto least = hn::Set(d, least_scaled);
  for (int64_t p = first; p < last; ++p) {
    const int64_t height = panels.height(p), start = panels.offset(p, count);
    for (int64_t at = k; at < k + count;) {
      const int64_t end = std::min(k + count, (at / fp8_block + 1) * fp8_block);
      const auto factor = hn::Set(d, scales[at / fp8_block] * row_factor);
      // What the last vector writes behind the end is then overwritten, or spilt.
      for (int64_t i = start + (at - k) * height; i < start + (end - k) * height; i += lanes<float>) {
        const auto scaled = hn::Mul(hn::LoadU(d, from + i), factor);
        hn::StoreU(hn::IfThenZeroElse(hn::Lt(hn::Abs(scaled), least), scaled), d, to + i);
      }
      at = end;
    }
  }
}

int64_t tile_rows_any() { return rows_of_tile; }
int64_t tile_columns_f32() { return columns_of_tile<float>; }
int64_t tile_columns_f64() { return columns_of_tile<double>; }
void rows_f32(const Lines<float>& a, const Panels& panels, int64_t first, int64_t last, int64_t k,
              int64_t count, float* to) {
  rows(a, panels, first, last, k, count, to);
}
void rows_f64(const Lines<double>& a, const Panels& panels, int64_t first, int64_t last, int64_t k,
              int64_t count, double* to) {
  rows(a, panels, first, last, k, count, to);
}
void columns_f32(const Lines<float>& b, int64_t n0, int64_t n, int64_t k, int64_t count, float* to) {
  columns(b, n0, n, k, count, to);
}
void columns_bf16(const Lines<bf16>& b, int64_t n0, int64_t n, int64_t k, int64_t count, float* to) {
  columns(b, n0, n, k, count, to);
}
void columns_f64(const Lines<double>& b, int64_t n0, int64_t n, int64_t k, int64_t count, double* to) {
  columns(b, n0, n, k, count, to);
}
void block_f32(const Block<float>& p) { block(p); }
void block_f64(const Block<double>& p) { block(p); }
void block_bf16(const Block<float, bf16>& p) { block(p); }
void block_fp8(const Block<float, f8e4m3>& p) { block(p); }
void direct_f32(const Block<float>& p, const Lines<float>& b, int64_t n0, int64_t k) { direct(p, b, n0, k); }
void direct_bf16(const Block<float>& p, const Lines<bf16>& b, int64_t n0, int64_t k) { direct(p, b, n0, k); }
int64_t most_direct() { return most_direct_rows; }

}  // namespace latente::gemm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente::gemm {

HWY_EXPORT(tile_rows_any);
HWY_EXPORT(tile_columns_f32);
HWY_EXPORT(tile_columns_f64);
HWY_EXPORT(rows_f32);
HWY_EXPORT(rows_f64);
HWY_EXPORT(columns_f32);
HWY_EXPORT(columns_bf16);
HWY_EXPORT(columns_f64);
HWY_EXPORT(block_f32);
HWY_EXPORT(block_f64);
HWY_EXPORT(block_bf16);
HWY_EXPORT(block_fp8);
HWY_EXPORT(panel);
HWY_EXPORT(widen_panels_f32);
HWY_EXPORT(widen_panels_fp8);
HWY_EXPORT(scale_rows_fp8);
HWY_EXPORT(direct_f32);
HWY_EXPORT(direct_bf16);
HWY_EXPORT(most_direct);

int64_t tile_rows() { return HWY_DYNAMIC_DISPATCH(tile_rows_any)(); }
template <>
int64_t tile_columns<float>() {
  return HWY_DYNAMIC_DISPATCH(tile_columns_f32)();
}
template <>
int64_t tile_columns<double>() {
  return HWY_DYNAMIC_DISPATCH(tile_columns_f64)();
}
void pack_rows(const Lines<float>& a, const Panels& panels, int64_t first, int64_t last, int64_t k,
               int64_t count, float* to) {
  HWY_DYNAMIC_DISPATCH(rows_f32)(a, panels, first, last, k, count, to);
}
void pack_rows(const Lines<double>& a, const Panels& panels, int64_t first, int64_t last, int64_t k,
               int64_t count, double* to) {
  HWY_DYNAMIC_DISPATCH(rows_f64)(a, panels, first, last, k, count, to);
}
void pack_columns(const Lines<float>& b, int64_t n0, int64_t n, int64_t k, int64_t count, float* to) {
  HWY_DYNAMIC_DISPATCH(columns_f32)(b, n0, n, k, count, to);
}
void pack_columns(const Lines<bf16>& b, int64_t n0, int64_t n, int64_t k, int64_t count, float* to) {
  HWY_DYNAMIC_DISPATCH(columns_bf16)(b, n0, n, k, count, to);
}
void pack_columns(const Lines<double>& b, int64_t n0, int64_t n, int64_t k, int64_t count, double* to) {
  HWY_DYNAMIC_DISPATCH(columns_f64)(b, n0, n, k, count, to);
}
void multiply_block(const Block<float>& p) { HWY_DYNAMIC_DISPATCH(block_f32)(p); }
void multiply_block(const Block<double>& p) { HWY_DYNAMIC_DISPATCH(block_f64)(p); }
void multiply_block(const Block<float, bf16>& p) { HWY_DYNAMIC_DISPATCH(block_bf16)(p); }
void pack_panel(const Lines<bf16>& b, int64_t n0, int64_t n, int64_t k, bf16* to) {
  HWY_DYNAMIC_DISPATCH(panel)(b, n0, n, k, to);
}
void multiply_block(const Block<float, f8e4m3>& p) { HWY_DYNAMIC_DISPATCH(block_fp8)(p); }
void widen_panels(const bf16* panels, int64_t panel, int64_t n, int64_t count, float* to) {
  HWY_DYNAMIC_DISPATCH(widen_panels_f32)(panels, panel, n, count, to);
}
void widen_panels(const f8e4m3* panels, int64_t panel, int64_t n, int64_t count, float* to) {
  HWY_DYNAMIC_DISPATCH(widen_panels_fp8)(panels, panel, n, count, to);
}
void scale_rows(const Panels& panels, int64_t first, int64_t last, int64_t k, int64_t count,
                const float* scales, const float* from, float* to) {
  HWY_DYNAMIC_DISPATCH(scale_rows_fp8)(panels, first, last, k, count, scales, from, to);
}
bool direct_rows_exist(int64_t rows) { return rows <= HWY_DYNAMIC_DISPATCH(most_direct)(); }
void multiply_direct(const Block<float>& p, const Lines<float>& b, int64_t n0, int64_t k) {
  HWY_DYNAMIC_DISPATCH(direct_f32)(p, b, n0, k);
}
void multiply_direct(const Block<float>& p, const Lines<bf16>& b, int64_t n0, int64_t k) {
  HWY_DYNAMIC_DISPATCH(direct_bf16)(p, b, n0, k);
}

}  // namespace latente::gemm
#endif
