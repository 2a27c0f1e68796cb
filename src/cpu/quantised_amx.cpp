// Products of bytes on the tiles of AMX: sixteen rows of activations by sixteen of a panel's columns by 64
// bytes an instruction. Sums within a group are the same whole numbers as everywhere, and are scaled and
// added in the same order.
#include "cpu/quantised_kernels.h"
#include "hwy/detect_compiler_arch.h"

#if HWY_ARCH_X86_64
#include <cpuid.h>
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's own header, inlined
#include <immintrin.h>
#pragma GCC diagnostic pop
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "cpu/scratch.h"

#define LATENTE_AMX __attribute__((target("amx-tile,amx-int8,avx512f,avx512bw,avx512dq,avx512vl,f16c")))

namespace latente::quantised {
namespace {

// What ldtilecfg reads (Intel SDM, "Intel AMX", palette 1).
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Registers 0 to 3 hold sums [16, 16], 4 and 5 activations [16, bytes], 6 and 7 codes [bytes / 4, 16, 4].
TileShapes shapes_for(int64_t bytes) {
  TileShapes shapes;
  for (size_t i = 0; i < 8; ++i) {
    shapes.rows[i] = static_cast<uint8_t>(i < 6 ? 16 : bytes / 4);
    shapes.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? bytes : 64);
  }
  return shapes;
}

constexpr int64_t tile = rows_of_amx_tile;
using Sums = int32_t[2][2][tile][panel_rows];

// Sums of one group for R panels of rows and P of columns. codes: P of them, `panel` bytes apart.
template <int R, int P>
LATENTE_AMX inline void add_up(const std::byte* a, int64_t a_panel, const std::byte* codes, int64_t panel,
                               int64_t group, int64_t bytes, Sums& sums) {
  _tile_zero(0);
  if constexpr (P > 1) _tile_zero(1);
  if constexpr (R > 1) _tile_zero(2);
  if constexpr (R > 1 && P > 1) _tile_zero(3);
  for (int64_t k = 0; k < group; k += bytes) {
    _tile_loadd(4, a + k, group);
    if constexpr (R > 1) _tile_loadd(5, a + a_panel + k, group);
    _tile_loadd(6, codes + k * panel_rows, 64);
    if constexpr (P > 1) _tile_loadd(7, codes + panel + k * panel_rows, 64);
    _tile_dpbssd(0, 4, 6);
    if constexpr (P > 1) _tile_dpbssd(1, 4, 7);
    if constexpr (R > 1) _tile_dpbssd(2, 5, 6);
    if constexpr (R > 1 && P > 1) _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums[0][0], 64);
  if constexpr (P > 1) _tile_stored(1, sums[0][1], 64);
  if constexpr (R > 1) _tile_stored(2, sums[1][0], 64);
  if constexpr (R > 1 && P > 1) _tile_stored(3, sums[1][1], 64);
}

using Totals = float[2][tile][2][panel_rows];

LATENTE_AMX inline __m512 load_halves(const std::byte* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

template <bool with_offsets, int R, int P>
LATENTE_AMX inline void scale(const Sums& sums, const std::byte* a, int64_t a_panel, int64_t group,
                              const std::byte* scales, const std::byte* offsets, int64_t panel,
                              const int64_t (&heights)[2], Totals& totals) {
  __m512 of_columns[P], offset[P];
  for (int p = 0; p < P; ++p) {
    of_columns[p] = load_halves(scales + p * panel);
    offset[p] = with_offsets ? load_halves(offsets + p * panel) : of_columns[p];
  }
  for (int r = 0; r < R; ++r) {
    const auto* of_rows = reinterpret_cast<const float*>(a + r * a_panel + tile * group);
    for (int64_t i = 0; i < heights[r]; ++i) {
      const __m512 of_row = _mm512_set1_ps(of_rows[i]);
      for (int p = 0; p < P; ++p) {
        float* total = totals[r][i][p];
        const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[r][p][i])), of_row);
        __m512 out = _mm512_fmadd_ps(sum, of_columns[p], _mm512_load_ps(total));
        if constexpr (with_offsets) out = _mm512_fmadd_ps(_mm512_set1_ps(of_rows[tile + i]), offset[p], out);
        _mm512_store_ps(total, out);
      }
    }
  }
}

// Panels of 4 bits as panels of 8, `groups` groups of each.
LATENTE_AMX void widen(const std::byte* from, int64_t bytes, std::byte* to) {
  const __m512i low = _mm512_set1_epi8(0x0f), offset = _mm512_set1_epi8(8);
  for (int64_t i = 0; i < bytes; i += 64, to += 128) {
    const __m512i both = _mm512_loadu_si512(from + i);
    const __m512i first = _mm512_and_si512(both, low);
    const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
    _mm512_store_si512(to, _mm512_sub_epi8(first, offset));
    _mm512_store_si512(to + 64, _mm512_sub_epi8(second, offset));
  }
}

struct Place {
  const std::byte *a, *codes, *scales, *offsets;
  int64_t a_panel, panel, codes_panel;  // bytes from one panel to the next
  float* c;
  const float* init;
  int64_t columns;
};

// c = init + a · w for R panels of rows, `rows` of them the first's, and P panels of columns.
template <bool with_offsets, int R, int P>
LATENTE_AMX void tiles(const Block& b, const Place& at, const int64_t (&heights)[2]) {
  alignas(64) Totals totals;
  alignas(64) Sums sums[2];
  __mmask16 masks[P];
  for (int p = 0; p < P; ++p) {
    const int64_t here = std::clamp<int64_t>(at.columns - p * panel_rows, 0, panel_rows);
    masks[p] = static_cast<__mmask16>((1u << here) - 1);
  }
  for (int64_t r = 0, row = 0; r < R; ++r) {
    for (int64_t i = 0; i < heights[r]; ++i, ++row) {
      for (int p = 0; p < P; ++p) {
        _mm512_store_ps(totals[r][i][p],
                        at.init ? _mm512_maskz_loadu_ps(masks[p], at.init + row * b.init_row + p * panel_rows)
                                : _mm512_setzero_ps());
      }
    }
  }
  const int64_t group = b.form.group, bytes = group % 64 == 0 ? 64 : 32, a_group = tile * (group + 8);
  const auto sums_of = [&](int64_t g) LATENTE_AMX {
    add_up<R, P>(at.a + g * a_group, at.a_panel, at.codes + g * group * panel_rows, at.codes_panel, group,
                 bytes, sums[g % 2]);
  };
  // Tiles work on the next group while this one's sums are scaled.
  sums_of(0);
  for (int64_t g = 0; g < b.groups; ++g) {
    if (g + 1 < b.groups) sums_of(g + 1);
    const int64_t halves = g * panel_rows * 2;
    scale<with_offsets, R, P>(sums[g % 2], at.a + g * a_group, at.a_panel, group, at.scales + halves,
                              with_offsets ? at.offsets + halves : nullptr, at.panel, heights, totals);
  }
  for (int64_t r = 0, row = 0; r < R; ++r) {
    for (int64_t i = 0; i < heights[r]; ++i, ++row) {
      for (int p = 0; p < P; ++p) {
        _mm512_mask_storeu_ps(at.c + row * b.c_row + p * panel_rows, masks[p],
                              _mm512_load_ps(totals[r][i][p]));
      }
    }
  }
}

template <bool with_offsets, int P>
LATENTE_AMX void columns_of(const Block& b, Place at, int64_t j) {
  for (int64_t i = b.first; i < b.last; i += 2) {
    const int64_t row = b.panels.start(i);
    const bool two = i + 1 < b.last;
    const int64_t heights[2] = {b.panels.height(i), two ? b.panels.height(i + 1) : 0};
    at.a = b.a + (i - b.first) * at.a_panel;
    at.c = b.c + row * b.c_row + j;
    at.init = b.init ? b.init + row * b.init_row + j : nullptr;
    if (two) {
      tiles<with_offsets, 2, P>(b, at, heights);
    } else {
      tiles<with_offsets, 1, P>(b, at, heights);
    }
  }
}

bool permitted() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned amx_tile = 1u << 24, amx_int8 = 1u << 25, avx512f = 1u << 16, avx512bw = 1u << 30;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & amx_tile) || !(d & amx_int8) || !(b & avx512f) || !(b & avx512bw)) return false;
  // Linux hands out the tiles' state to processes that ask (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
}

}  // namespace

bool amx_available() {
  static const bool available = permitted();
  return available;
}

LATENTE_AMX void multiply_block_amx(const Block& b) {
  const TileShapes shapes = shapes_for(b.form.group % 64 == 0 ? 64 : 32);
  _tile_loadconfig(&shapes);
  thread_local Scratch<std::byte> wide;
  const int64_t wide_panel = b.groups * b.form.group * panel_rows;
  std::byte* widened = b.form.bits == 4 ? wide.reserve(2 * wide_panel) : nullptr;
  for (int64_t j = 0; j < b.n; j += 2 * panel_rows) {
    const int64_t first = j / panel_rows * b.panel;
    const bool two = b.n - j > panel_rows;
    Place at{};
    at.a_panel = b.groups * tile * (b.form.group + 8);
    at.panel = b.panel;
    at.scales = b.scales + first;
    if (b.offsets) at.offsets = b.offsets + first;
    at.codes = b.codes + first;
    at.codes_panel = b.panel;
    at.columns = b.n - j;
    if (widened) {
      widen(at.codes, wide_panel / 2, widened);
      if (two) widen(at.codes + b.panel, wide_panel / 2, widened + wide_panel);
      at.codes = widened;
      at.codes_panel = wide_panel;
    }
    if (two) {
      (b.offsets ? columns_of<true, 2> : columns_of<false, 2>)(b, at, j);
    } else {
      (b.offsets ? columns_of<true, 1> : columns_of<false, 1>)(b, at, j);
    }
  }
  _tile_release();
}

}  // namespace latente::quantised

#else

namespace latente::quantised {
bool amx_available() { return false; }
void multiply_block_amx(const Block&) {}
}  // namespace latente::quantised

#endif
