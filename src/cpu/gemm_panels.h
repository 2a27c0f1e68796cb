// Rows of a product's left operand, as packed for the register tile.
#pragma once

#include <cstdint>

namespace latente::gemm {

// Panels of nearly equal height, at most the register tile's, each as [k, row]: `taller` panels of `low` + 1
// rows, then the others of `low`.
struct Panels {
  int64_t rows = 0, panels = 0, low = 0, taller = 0;
  int64_t origin = 0;  // the panel that stands first in memory
  Panels() = default;
  Panels(int64_t rows_, int64_t highest)
      : rows(rows_), panels((rows + highest - 1) / highest), low(rows / panels), taller(rows % panels) {}
  int64_t start(int64_t p) const { return p * low + (p < taller ? p : taller); }
  int64_t height(int64_t p) const { return p < taller ? low + 1 : low; }
  // Where panel p begins. Packing may write up to `spill` elements beyond a panel's end.
  int64_t offset(int64_t p, int64_t k) const { return (start(p) - start(origin)) * k + (p - origin) * spill; }
  int64_t size(int64_t k) const { return offset(panels, k); }
  static constexpr int64_t spill = 16;
};

}  // namespace latente::gemm
