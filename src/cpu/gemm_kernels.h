// The parts of a matrix product that are compiled for each instruction set: what gemm.cpp (division of work),
// gemm_packing.cpp and gemm_kernels.cpp (the register tile) share.
#pragma once

#include <cstdint>

#include "cpu/gemm.h"
#include "cpu/gemm_panels.h"

namespace latente::gemm {

// The register tile of this machine.
int64_t tile_rows();
template <class T>
int64_t tile_columns();
// Panels of columns that one row takes at once.
inline constexpr int panels_of_row = 4;

// Packs the panels [first, last) of the rows of `a`, columns [k, k + count).
void pack_rows(const Lines<float>& a, const Panels& panels, int64_t first, int64_t last, int64_t k,
               int64_t count, float* to);
void pack_rows(const Lines<double>& a, const Panels& panels, int64_t first, int64_t last, int64_t k,
               int64_t count, double* to);

// Packs n columns of b from n0 on, rows [k, k + count), as panels [count, tile_columns]; the last is padded
// with zeros.
void pack_columns(const Lines<float>& b, int64_t n0, int64_t n, int64_t k, int64_t count, float* to);
void pack_columns(const Lines<bf16>& b, int64_t n0, int64_t n, int64_t k, int64_t count, float* to);
void pack_columns(const Lines<double>& b, int64_t n0, int64_t n, int64_t k, int64_t count, double* to);

// `to`: packed rows, columns [k, k + count), times the scales of a block of FP8's columns, of which `scales`
// has one for each 128 of all k; as its products take them.
void scale_rows(const Panels& panels, int64_t first, int64_t last, int64_t k, int64_t count,
                const float* scales, const float* from, float* to);

// One panel of gemm.h's pack(): the columns [n0, n0 + n) of b, all k of them.
void pack_panel(const Lines<bf16>& b, int64_t n0, int64_t n, int64_t k, bf16* to);
// The same of FP8 codes [n, k]. False where one is NaN.
bool pack_panel(const uint8_t* codes, int64_t n, int64_t k, f8e4m3* to);
// Some rows of such panels, `panel` elements apart, as pack_columns leaves them; FP8 for scaled rows.
void widen_panels(const bf16* panels, int64_t panel, int64_t n, int64_t count, float* to);
void widen_panels(const f8e4m3* panels, int64_t panel, int64_t n, int64_t count, float* to);

// c = init + a · b for the row panels [first, last); a null init means zeros. Beside FP8, a has scaled rows.
template <class T, class S = T>
struct Block {
  Panels panels;
  int64_t first = 0, last = 0, n = 0, k = 0;
  const T* a = nullptr;
  const S* b = nullptr;
  int64_t b_panel = 0;  // elements between its panels
  bool ends = false;    // with its panels, so that others are read next
  T* c = nullptr;       // row 0 of the panels
  int64_t c_row = 0;
  const T* init = nullptr;
  int64_t init_row = 0;
};
void multiply_block(const Block<float>& block);
void multiply_block(const Block<double>& block);
void multiply_block(const Block<float, bf16>& block);
void multiply_block(const Block<float, f8e4m3>& block);

// The same for a few rows, without packing: block.b is not used, but the columns of b from n0 on, rows from k
// on. Only where is_direct says so.
inline constexpr int64_t direct_columns = 16;  // that stream from memory at once
bool direct_rows_exist(int64_t rows);
void multiply_direct(const Block<float>& block, const Lines<float>& b, int64_t n0, int64_t k);
void multiply_direct(const Block<float>& block, const Lines<bf16>& b, int64_t n0, int64_t k);
inline void multiply_direct(const Block<double>&, const Lines<double>&, int64_t, int64_t) {}
template <class S>
bool is_direct(const Panels& panels, const Lines<S>& b) {
  return sizeof(S) <= 4 && b.along_k && direct_rows_exist(panels.rows);
}

}  // namespace latente::gemm
