#include "tensor/panels.h"

#include <algorithm>
#include <cmath>
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

// Two's complement of four bits, plus 8, in eight bytes.
uint64_t offset_codes(uint64_t codes) { return (codes & 0x0f0f0f0f0f0f0f0fu) ^ 0x0808080808080808u; }

// `count` codes of a row, those from `held` on zeros, into its words of a panel. Copies of a length that the
// compiler knows: this is how fast a model of another program's starts.
void put_codes(int bits, const int8_t* codes, int64_t held, int64_t count, uint32_t* word) {
  for (int64_t at = 0; at < count; at += 8) {
    uint64_t eight = 0;
    if (at + 8 <= held) {
      std::memcpy(&eight, codes + at, 8);
    } else if (at < held) {
      std::memcpy(&eight, codes + at, static_cast<size_t>(held - at));
    }
    if (bits == 4) eight = offset_codes(eight);
    const auto first = static_cast<uint32_t>(eight), second = static_cast<uint32_t>(eight >> 32);
    if (bits == 4) {
      *word = first | (second << 4);
      word += panel_rows;
    } else {
      word[0] = first, word[panel_rows] = second;
      word += 2 * panel_rows;
    }
  }
}

int64_t in_packs(int64_t bytes) { return divide_up(bytes, 16) * 16; }

}  // namespace

Form form_of(DType type, int64_t group) {
  LATENTE_ASSERT(is_quantised(type));
  return {type == DType::q8 ? 8 : 4, group, type == DType::q4m};
}

int64_t scale_bytes(Form form, int64_t k) {
  const int64_t numbers = groups_of(k, form.group) * panel_rows * (form.offsets ? 2 : 1);
  const int64_t bytes = numbers * static_cast<int64_t>(sizeof(f16));
  return divide_up(bytes, cache_line) * cache_line;
}

int64_t panel_bytes(Form form, int64_t k) {
  return scale_bytes(form, k) + groups_of(k, form.group) * form.group * panel_rows * form.bits / 8;
}

int64_t bytes(Form form, int64_t n, int64_t k) { return divide_up(n, panel_rows) * panel_bytes(form, k); }

void pack_panel(Form form, const int8_t* codes, const float* scales, const float* offsets, int64_t rows,
                int64_t k, std::byte* panel) {
  const int64_t groups = groups_of(k, form.group), padded = groups * form.group;
  auto* to_scale = reinterpret_cast<uint16_t*>(panel);
  const auto put = [&](const float* numbers) {
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t r = 0; r < panel_rows; ++r)
        *to_scale++ = r < rows ? f16(numbers[r * groups + g]).bits : uint16_t{0};
    }
  };
  put(scales);
  if (form.offsets) put(offsets);
  std::fill(reinterpret_cast<std::byte*>(to_scale), panel + scale_bytes(form, k), std::byte{0});
  auto* word = reinterpret_cast<uint32_t*>(panel + scale_bytes(form, k));
  for (int64_t at = 0; at < padded; at += form.group, word += form.group * panel_rows * form.bits / 32) {
    for (int64_t r = 0; r < panel_rows; ++r)
      put_codes(form.bits, codes + r * k + at, r < rows ? k - at : 0, form.group, word + r);
  }
}

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

int64_t square_scale_bytes(int64_t n, int64_t k) {
  return in_packs(divide_up(n, square) * divide_up(k, square) * static_cast<int64_t>(sizeof(float)));
}

bool quantise_squares(const float* values, int64_t n, int64_t k, std::byte* matrix) {
  constexpr float most = 448;
  auto* scale = reinterpret_cast<float*>(matrix);
  auto* codes = reinterpret_cast<f8e4m3*>(matrix + square_scale_bytes(n, k));
  for (int64_t row = 0; row < n; row += square) {
    for (int64_t column = 0; column < k; column += square) {
      const int64_t end_row = std::min(n, row + square), end = std::min(k, column + square);
      float extent = 0;
      for (int64_t r = row; r < end_row; ++r) {
        for (int64_t c = column; c < end; ++c) {
          if (!std::isfinite(values[r * k + c])) return false;
          extent = std::max(extent, std::abs(values[r * k + c]));
        }
      }
      *scale = extent / most;
      const float inverse = *scale > 0 ? 1 / *scale : 0;
      for (int64_t r = row; r < end_row; ++r) {
        for (int64_t c = column; c < end; ++c) codes[r * k + c] = f8e4m3(values[r * k + c] * inverse);
      }
      ++scale;
    }
  }
  return true;
}

int64_t matrix_bytes(DType type, int64_t group, int64_t n, int64_t k) {
  if (type == DType::f8e4m3) return square_scale_bytes(n, k) + in_packs(n * k);
  return bytes(form_of(type, group), n, k);
}

View view_of(const Shape& shape, DType type, int64_t group) {
  LATENTE_ASSERT(shape.rank() == 2 || shape.rank() == 3);
  View view;
  view.shape = shape;
  view.dtype = type;
  view.layout = Layout::panels;
  view.group = static_cast<int32_t>(group);
  view.strides = {matrix_bytes(type, group, shape[-2], shape[-1])};
  return view;
}

}  // namespace latente::quantised
