// The register tile.
#include "cpu/gemm_kernels.h"

#include <algorithm>
#include <array>
#include <utility>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/gemm_kernels.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/gemm_columns-inl.h"
#include "hwy/cache_control.h"

HWY_BEFORE_NAMESPACE();
namespace latente::gemm::HWY_NAMESPACE {

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
constexpr int panels_at_once(int rows) {
  return rows == 1 ? panels_of_row : 2 * rows <= rows_of_tile ? 2 : 1;
}

// c[H, columns] = init + a · b. a [k, H]; b: P panels [k, 2 vectors], `b_panel` elements apart; what is read
// next lies `then` elements beyond their ends.
template <int H, int P, class T, class S>
void tile(int64_t k, const T* HWY_RESTRICT a, const S* HWY_RESTRICT b, int64_t b_panel,
          [[maybe_unused]] int64_t then, T* c, int64_t c_row, const T* init, int64_t init_row,
          int64_t columns) {
  const Tag<T> d;
  using V = hn::Vec<Tag<T>>;
  constexpr int64_t L = lanes<T>;
  constexpr int N = 2 * P;
  // Few rows read columns faster than the processor foresees, which stops at the ends of pages and panels.
  constexpr bool streams = H < rows_of_tile;
  constexpr int64_t ahead = (H == 1 || sizeof(S) == 1 ? 1024 : 512) / sizeof(S);
  V sum[H][N];
  LATENTE_UNROLL
  for (int i = 0; i < H; ++i) {
    prefetch_to_write(c + i * c_row);
    LATENTE_UNROLL
    for (int j = 0; j < N; ++j) sum[i][j] = hn::Zero(d);
  }
  if constexpr (std::is_same_v<S, f8e4m3>) {
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
      const S* const later = b + ahead + (2 * L * k > ahead ? 0 : then);
      LATENTE_UNROLL
      for (int j = 0; j < P; ++j) {
        LATENTE_UNROLL
        for (int64_t line = 0; line < 8 * L; line += 64) hwy::Prefetch(later + j * b_panel + line);
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
      const S* const later = b + ahead + (2 * L * k > ahead ? 0 : then);
      LATENTE_UNROLL
      for (int j = 0; j < P; ++j) {
        if (streams) hwy::Prefetch(later + j * b_panel);
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
using TileFunction = void (*)(int64_t, const T*, const S*, int64_t, int64_t, T*, int64_t, const T*, int64_t,
                              int64_t);

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
  const int64_t then = p.ends ? ((p.n + width - 1) / width - 1) * p.b_panel : 0;
  for (int64_t j = 0; j < p.n;) {
    int64_t at_once = most;
    while (at_once > 1 && p.n - j < at_once * width) at_once /= 2;
    const auto& tiles = at_once == 4 ? four : at_once == 2 ? two : one;
    const int64_t columns = std::min(at_once * width, p.n - j);
    for (int64_t i = p.first; i < p.last; ++i) {
      const int64_t start = p.panels.start(i), height = p.panels.height(i);
      tiles[static_cast<size_t>(height - 1)](p.k, p.a + p.panels.offset(i, p.k), p.b + j / width * p.b_panel,
                                             p.b_panel, then, p.c + start * p.c_row + j, p.c_row,
                                             p.init ? p.init + start * p.init_row + j : nullptr, p.init_row,
                                             columns);
    }
    j += columns;
  }
}

#if HWY_TARGET <= HWY_AVX2
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

int64_t tile_rows_any() { return rows_of_tile; }
int64_t tile_columns_f32() { return columns_of_tile<float>; }
int64_t tile_columns_f64() { return columns_of_tile<double>; }
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
HWY_EXPORT(block_f32);
HWY_EXPORT(block_f64);
HWY_EXPORT(block_bf16);
HWY_EXPORT(block_fp8);
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
void multiply_block(const Block<float>& p) { HWY_DYNAMIC_DISPATCH(block_f32)(p); }
void multiply_block(const Block<double>& p) { HWY_DYNAMIC_DISPATCH(block_f64)(p); }
void multiply_block(const Block<float, bf16>& p) { HWY_DYNAMIC_DISPATCH(block_bf16)(p); }
void multiply_block(const Block<float, f8e4m3>& p) { HWY_DYNAMIC_DISPATCH(block_fp8)(p); }
bool direct_rows_exist(int64_t rows) { return rows <= HWY_DYNAMIC_DISPATCH(most_direct)(); }
void multiply_direct(const Block<float>& p, const Lines<float>& b, int64_t n0, int64_t k) {
  HWY_DYNAMIC_DISPATCH(direct_f32)(p, b, n0, k);
}
void multiply_direct(const Block<float>& p, const Lines<bf16>& b, int64_t n0, int64_t k) {
  HWY_DYNAMIC_DISPATCH(direct_bf16)(p, b, n0, k);
}
}  // namespace latente::gemm
#endif
