// Packing of both operands.
#include "cpu/gemm_kernels.h"

#include <algorithm>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/gemm_packing.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/gemm_columns-inl.h"
#include "hwy/cache_control.h"

HWY_BEFORE_NAMESPACE();
namespace latente::gemm::HWY_NAMESPACE {

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

// The elements of lines j and j + half side by side, in words of 32 bits [.., half]: those of one k, or, of
// bytes, of two. As many k as fill vectors; see(vector) is called for each vector of a line. Returns how
// many.
template <class U, class See>
HWY_INLINE int64_t weave([[maybe_unused]] const U* const* line, [[maybe_unused]] int64_t count,
                         [[maybe_unused]] U* to, [[maybe_unused]] const See& see) {
  int64_t k = 0;
#if HWY_TARGET <= HWY_AVX2
  constexpr int64_t half = lanes<float>;
  constexpr auto step = static_cast<int64_t>(16 / sizeof(U));
  const hn::Full128<U> d;
  const Four four;
  const Eight eight;
  for (; k + step <= count; k += step) {
    auto* words = reinterpret_cast<float*>(to + k * 2 * half);
    for (int64_t j = 0; j < half; j += 8) {
      hn::Vec<Eight> lower[4], upper[4];
      LATENTE_UNROLL
      for (int64_t i = 0; i < 4; ++i) {
        const auto load = [&](int64_t at) HWY_ATTR {
          const auto v = hn::LoadU(d, line[j + at] + k);
          see(v);
          return v;
        };
        const auto a = load(i), b = load(i + half), e = load(i + 4), f = load(i + 4 + half);
        lower[i] = hn::Combine(eight, hn::BitCast(four, hn::InterleaveLower(d, e, f)),
                               hn::BitCast(four, hn::InterleaveLower(d, a, b)));
        upper[i] = hn::Combine(eight, hn::BitCast(four, hn::InterleaveUpper(d, e, f)),
                               hn::BitCast(four, hn::InterleaveUpper(d, a, b)));
      }
      transpose_halves(lower);
      transpose_halves(upper);
      LATENTE_UNROLL
      for (int64_t i = 0; i < 4; ++i) {
        hn::StoreU(lower[i], eight, words + i * half + j);
        hn::StoreU(upper[i], eight, words + (4 + i) * half + j);
      }
    }
  }
#endif
  return k;
}

void panel(const Lines<bf16>& b, int64_t n0, int64_t n, int64_t k, bf16* to) {
  constexpr int64_t width = columns_of_tile<float>, half = width / 2;
  int64_t done = 0;
  if (n == width) {
    const uint16_t* lines[width];
    for (int64_t j = 0; j < width; ++j) lines[j] = reinterpret_cast<const uint16_t*>(b.line(n0 + j));
    done = weave(lines, k, reinterpret_cast<uint16_t*>(to), [](auto) {});
  }
  for (int64_t j = 0; j < width; ++j) {
    const int64_t at = j < half ? 2 * j : 2 * (j - half) + 1;
    for (int64_t i = done; i < k; ++i) to[i * width + at] = j < n ? b.line(n0 + j)[i] : bf16{};
  }
}

bool panel_fp8(const uint8_t* codes, int64_t n, int64_t k, f8e4m3* panel) {
  constexpr int64_t width = columns_of_tile<float>, half = width / 2;
  constexpr uint8_t not_a_number = 0x7f;
  auto* to = reinterpret_cast<uint8_t*>(panel);
  int64_t done = 0;
  bool numbers = true;
#if HWY_TARGET <= HWY_AVX2
  if (n == width) {
    const uint8_t* lines[width];
    for (int64_t j = 0; j < width; ++j) lines[j] = codes + j * k;
    const hn::Full128<uint8_t> d;
    const auto magnitude = hn::Set(d, not_a_number);
    auto largest = hn::Zero(d);
    done = weave(lines, k, to, [&](auto v) HWY_ATTR { largest = hn::Max(largest, hn::And(v, magnitude)); });
    numbers = hn::AllTrue(d, hn::Lt(largest, magnitude));
  }
#endif
  for (int64_t j = 0; j < width; ++j) {
    uint8_t* at = to + done * width + j % half * 4 + j / half;
    for (int64_t i = done; i < k; i += 2, at += 2 * width) {
      at[0] = j < n ? codes[j * k + i] : uint8_t{0};
      at[2] = j < n ? codes[j * k + i + 1] : uint8_t{0};
      numbers &= (at[0] & not_a_number) != not_a_number && (at[2] & not_a_number) != not_a_number;
    }
  }
  return numbers;
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

}  // namespace latente::gemm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente::gemm {

HWY_EXPORT(rows_f32);
HWY_EXPORT(rows_f64);
HWY_EXPORT(columns_f32);
HWY_EXPORT(columns_bf16);
HWY_EXPORT(columns_f64);
HWY_EXPORT(panel);
HWY_EXPORT(panel_fp8);
HWY_EXPORT(widen_panels_f32);
HWY_EXPORT(widen_panels_fp8);
HWY_EXPORT(scale_rows_fp8);

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
void pack_panel(const Lines<bf16>& b, int64_t n0, int64_t n, int64_t k, bf16* to) {
  HWY_DYNAMIC_DISPATCH(panel)(b, n0, n, k, to);
}
bool pack_panel(const uint8_t* codes, int64_t n, int64_t k, f8e4m3* to) {
  return HWY_DYNAMIC_DISPATCH(panel_fp8)(codes, n, k, to);
}
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
}  // namespace latente::gemm
#endif
