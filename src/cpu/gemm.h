// Matrix products, all of one form: c[m, n] (+)= sum over k of a(m, k) · b(k, n).
//
// Both operands are packed into panels that the innermost loop reads in order (Goto and van de Geijn 2008):
// whatever an operand looks like in memory - transposed, strided, gathered, bfloat16 - only packing knows. An
// element of c is one chain of fused multiply-adds in rising k for each block of k (of equal depth, at most
// most_depth), and these sums are added in rising order; so it depends neither on the tile it falls into, nor
// on m and n, nor on threads.
#pragma once

#include <cstdint>
#include <span>

#include "base/threads.h"
#include "tensor/dtype.h"
#include "tensor/pending_panels.h"

namespace latente::gemm {

inline constexpr int64_t most_depth = 384, usual_depth = 256;

// A matrix as lines of unit stride.
template <class T>
struct Lines {
  const T* data = nullptr;
  int64_t stride = 0;
  bool along_k = false;  // a line runs along k, and there is one for each m (or n); else the reverse
  const int32_t* order = nullptr;  // line i stands at data + order[i] * stride; null: at data + i * stride
  const T* line(int64_t i) const { return data + (order ? order[i] : i) * stride; }
};

template <class T, class S>
struct Problem {
  int64_t m = 0, n = 0, k = 0;
  Lines<T> a{};
  Lines<S> b{};
  const S* panels = nullptr;      // b as pack() left it; then `b` is not read
  PendingMatrix pending{};        // instead of them
  int64_t panel = 0;              // elements from one of them to the next
  int64_t first_panel = 0;        // the one that `panels` begin with
  const float* scales = nullptr;  // of panels of FP8: [scales_of(n), scales_of(k)]
  T* c = nullptr;
  int64_t c_row = 0;
  const T* bias = nullptr;  // [n]
  bool accumulate = false;
};

// A weight [n, k] packed for good: panels of panel_columns() rows of it, each [k, columns]; the last is
// padded with zeros. In bfloat16, columns i and i + half of a k are neighbours, so that one 32-bit lane holds
// both.
//
// FP8 has a scale for 128 rows and 128 columns. It is a(m, k) that is multiplied by it, rounded to float32;
// the codes are exact. A product with a scale is below 2^32 in magnitude, else the result is not finite, and
// below 2^-93 it counts as zero. The columns i and i + half of two neighbouring k are one 32-bit lane; k must
// be even.
inline constexpr int64_t fp8_block = 128;
inline int64_t scales_of(int64_t k) { return (k + fp8_block - 1) / fp8_block; }
int64_t panel_columns(DType type);
template <class S>
void pack(ThreadPool& pool, const Lines<S>& b, int64_t n, int64_t k, S* panels);

// codes [n, k] and scales [scales_of(n), scales_of(k)], or null. False where a value is NaN, or a scale is
// not within 0 to 128.
bool pack_fp8(ThreadPool& pool, const uint8_t* codes, const float* scales, int64_t n, int64_t k,
              f8e4m3* panels, float* scales_of_panels);

// Solves all problems, which must not overlap in c. T, S: float, float; float, bf16; float, f8e4m3 (packed);
// double, double.
template <class T, class S>
void multiply(ThreadPool& pool, std::span<const Problem<T, S>> problems);

}  // namespace latente::gemm
