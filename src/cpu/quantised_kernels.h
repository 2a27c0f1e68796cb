// The parts of a quantised product that are compiled for each instruction set.
#pragma once

#include "cpu/gemm_panels.h"
#include "cpu/quantised.h"

namespace latente::quantised {

// What multiplies: vectors, or AMX (quantised_amx.cpp) where the machine has it and rows repay it.
enum class Unit : uint8_t { vectors, amx };
Unit unit_for(int64_t rows);

inline constexpr int64_t rows_of_amx_tile = 16;
int64_t rows_of_tile(Unit unit);

// Packed activations. Vectors: for each panel of H rows and each group, float scales [H], int32 starts [H]
// (what a sum of products begins with), codes [group / 4, H, 4]. AMX: a panel is 16 rows, those beyond its
// height undefined; for each group codes [16, group], float scales [16], and the sums of the codes times
// these.
inline int64_t packed_bytes(int64_t rows, int64_t group, int64_t groups) {
  return rows * groups * (8 + group);
}
inline int64_t packed_amx_bytes(int64_t panels, int64_t group, int64_t groups) {
  return panels * rows_of_amx_tile * groups * (8 + group);
}

// Packs the panels [first, last) of the rows of `a`, `groups` groups from column k on; beyond column `end`
// are zeros. A row that holds a NaN or an infinity becomes NaN.
void pack_rows(Unit unit, const gemm::Lines<float>& a, const gemm::Panels& panels, int64_t first,
               int64_t last, int64_t k, int64_t end, Form form, int64_t groups, std::byte* to);

// c = init + a · w for the row panels [first, last) and n columns; a null init means zeros.
struct Block {
  gemm::Panels panels;
  int64_t first = 0, last = 0, n = 0;
  Form form;
  int64_t groups = 0;
  const std::byte* a = nullptr;        // of panel `first` on
  const std::byte* scales = nullptr;   // of the first panel of columns, the first group
  const std::byte* offsets = nullptr;  // likewise; null where the form has none
  const std::byte* codes = nullptr;
  int64_t panel = 0;                // bytes from one panel of columns to the next
  const std::byte* then = nullptr;  // panels that will be read after these, or null
  float* c = nullptr;               // row 0 of the panels
  int64_t c_row = 0;
  const float* init = nullptr;
  int64_t init_row = 0;
};
void multiply_block(Unit unit, const Block& block);

bool amx_available();
void multiply_block_amx(const Block& block);

// As many products of bytes as the registers allow, for measuring; returns the operations (two a product).
double run_products(int64_t rounds, int32_t* sink);

}  // namespace latente::quantised
