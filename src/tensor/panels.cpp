#include "tensor/panels.h"

#include <algorithm>
#include <cstring>

#include "tensor/dtype.h"

namespace latente::quantised {
namespace {

constexpr int64_t cache_line = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of row r of a panel's codes.
int code_at(Form form, const std::byte* codes, int64_t r, int64_t i) {
  if (form.bits == 8) return static_cast<int8_t>(codes[(i / 4 * panel_rows + r) * 4 + i % 4]);
  const auto both = static_cast<int>(codes[(i / 8 * panel_rows + r) * 4 + i % 4]);
  return (i % 8 < 4 ? both & 15 : both >> 4) - 8;
}

float half_at(const std::byte* halves, int64_t i) {
  f16 half;
  std::memcpy(&half.bits, halves + i * 2, sizeof(half.bits));
  return static_cast<float>(half);
}

}  // namespace

int64_t scale_bytes(Form form, int64_t k) {
  const int64_t numbers = groups_of(k, form.group) * panel_rows * (form.offsets ? 2 : 1);
  const int64_t bytes = numbers * static_cast<int64_t>(sizeof(f16));
  return divide_up(bytes, cache_line) * cache_line;
}

int64_t panel_bytes(Form form, int64_t k) {
  return scale_bytes(form, k) + groups_of(k, form.group) * form.group * panel_rows * form.bits / 8;
}

int64_t bytes(Form form, int64_t n, int64_t k) { return divide_up(n, panel_rows) * panel_bytes(form, k); }

void unpack(Form form, const std::byte* panels, int64_t k, int64_t first, int64_t rows, float* values) {
  for (int64_t row = first; row < first + rows; ++row, values += k) {
    const std::byte* panel = panels + row / panel_rows * panel_bytes(form, k);
    const std::byte* codes = panel + scale_bytes(form, k);
    const int64_t r = row % panel_rows;
    for (int64_t at = 0; at < k; at += form.group) {
      const int64_t group = at / form.group * panel_rows + r;
      const float step = half_at(panel, group);
      const float offset =
          form.offsets ? half_at(panel, groups_of(k, form.group) * panel_rows + group) : 0.0f;
      for (int64_t i = at; i < std::min(k, at + form.group); ++i) {
        const float value = step * static_cast<float>(code_at(form, codes, r, i));
        values[i] = form.offsets ? value + offset : value;
      }
    }
  }
}

}  // namespace latente::quantised
