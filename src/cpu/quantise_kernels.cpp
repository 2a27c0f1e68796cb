#include "cpu/quantise_kernels.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "tensor/quantise.h"

// Compiled without contraction of products and sums (CMakeLists.txt): codes are the same on every machine.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/quantise_kernels.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace latente::quantised::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// A lane a row.
using Floats = hn::CappedTag<float, panel_rows>;
using Ints = hn::RebindToSigned<Floats>;
using V = hn::Vec<Floats>;
constexpr int64_t lanes = static_cast<int64_t>(hn::MaxLanes(Floats()));

// As in tensor/quantise.cpp.
HWY_INLINE V rounded(V x) {
  const V magic = hn::Set(Floats(), 12582912.0f);
  return hn::Sub(hn::Add(x, magic), magic);
}

HWY_INLINE V inverse_of(V scale) {
  const Floats d;
  const auto none = hn::Eq(scale, hn::Zero(d));
  return hn::IfThenZeroElse(none, hn::Div(hn::Set(d, 1.0f), hn::IfThenElse(none, hn::Set(d, 1.0f), scale)));
}

HWY_INLINE V code_of(V x, V inverse) {
  const Floats d;
  return hn::Min(hn::Max(rounded(hn::Mul(x, inverse)), hn::Set(d, -8.0f)), hn::Set(d, 7.0f));
}

struct Best {
  V scale, gain;
};

// Tries three scales at once, which keeps the chains of sums apart and all of them in registers.
HWY_INLINE void try_scales(const float* x, const float* importance, V mean_square, int64_t count,
                           const V* scales, Best& best) {
  const Floats d;
  const V inverse0 = inverse_of(scales[0]), inverse1 = inverse_of(scales[1]),
          inverse2 = inverse_of(scales[2]);
  V xq0 = hn::Zero(d), xq1 = xq0, xq2 = xq0, qq0 = xq0, qq1 = xq0, qq2 = xq0;
  for (int64_t i = 0; i < count; ++i) {
    const V value = hn::Load(d, x + i * panel_rows);
    const V weight =
        importance ? hn::Set(d, importance[i]) : hn::Add(hn::Mul(value, value), mean_square);
    const V weighted = hn::Mul(weight, value);
    const auto add = [&](V inverse, V& xq, V& qq) HWY_ATTR {
      const V q = code_of(value, inverse);
      xq = hn::Add(xq, hn::Mul(weighted, q));
      qq = hn::Add(qq, hn::Mul(hn::Mul(weight, q), q));
    };
    add(inverse0, xq0, qq0);
    add(inverse1, xq1, qq1);
    add(inverse2, xq2, qq2);
  }
  const auto compare = [&](V xq, V qq) HWY_ATTR {
    const auto some = hn::Gt(qq, hn::Zero(d));
    const V safe = hn::IfThenElse(some, qq, hn::Set(d, 1.0f));
    const V scale = hn::IfThenElseZero(some, hn::Div(xq, safe));
    const V gain = hn::IfThenElseZero(some, hn::Div(hn::Mul(xq, xq), safe));
    const auto better = hn::Gt(gain, best.gain);
    best.scale = hn::IfThenElse(better, scale, best.scale);
    best.gain = hn::IfThenElse(better, gain, best.gain);
  };
  compare(xq0, qq0);
  compare(xq1, qq1);
  compare(xq2, qq2);
}

// The scales of a group [count, 16] before they are rounded to float16; `poison` gets NaN lanes from values
// that are not finite.
HWY_INLINE V four_bit_scales(const float* x, const float* importance, int64_t count, V& poison) {
  const Floats d;
  V extreme = hn::Zero(d), squares = hn::Zero(d);
  for (int64_t i = 0; i < count; ++i) {
    const V value = hn::Load(d, x + i * panel_rows);
    squares = hn::Add(squares, hn::Mul(value, value));
    extreme = hn::IfThenElse(hn::Gt(hn::Abs(value), hn::Abs(extreme)), value, extreme);
    poison = hn::Add(poison, hn::Mul(value, hn::Zero(d)));
  }
  const V mean_square = hn::Div(squares, hn::Set(d, static_cast<float>(count)));
  Best best{hn::Div(extreme, hn::Set(d, -8.0f)), hn::Set(d, -1.0f)};
  static_assert(four_bit_divisors.size() % 3 == 0);
  for (size_t at = 0; at < four_bit_divisors.size(); at += 3) {
    V scales[3];
    for (size_t i = 0; i < 3; ++i) scales[i] = hn::Div(extreme, hn::Set(d, four_bit_divisors[at + i]));
    try_scales(x, importance, mean_square, count, scales, best);
  }
  return best.scale;
}

// Rows [count, k] from column `at` on as [columns, 16], zeros beside them.
void transpose(const float* rows, int64_t count, int64_t k, int64_t at, int64_t columns, float* to) {
  if (count < panel_rows) std::fill_n(to, columns * panel_rows, 0.0f);
  for (int64_t r = 0; r < count; ++r) {
    const float* row = rows + r * k + at;
    for (int64_t i = 0; i < columns; ++i) to[i * panel_rows + r] = row[i];
  }
}

bool four_bits(int64_t group, const float* rows, int64_t count, int64_t k, const float* importance,
               uint16_t* scales, uint32_t* words) {
  const Floats d;
  const Ints di;
  HWY_ALIGN float x[most_group * panel_rows];
  HWY_ALIGN float of_lanes[panel_rows];
  V poison = hn::Zero(d);
  bool finite = true;
  for (int64_t at = 0; at < k; at += group) {
    const int64_t columns = std::min(group, k - at);
    transpose(rows, count, k, at, columns, x);
    if (columns < group) std::fill(x + columns * panel_rows, x + group * panel_rows, 0.0f);
    for (int64_t lane = 0; lane < panel_rows; lane += lanes) {
      hn::Store(four_bit_scales(x + lane, importance ? importance + at : nullptr, columns, poison), d,
                of_lanes + lane);
    }
    for (int64_t r = 0; r < panel_rows; ++r) {
      const f16 scale(of_lanes[r]);
      of_lanes[r] = static_cast<float>(scale);
      finite &= std::isfinite(of_lanes[r]);
      *scales++ = scale.bits;
    }
    for (int64_t lane = 0; lane < panel_rows; lane += lanes) {
      const V inverse = inverse_of(hn::Load(d, of_lanes + lane));
      for (int64_t i = 0; i < group; i += 8) {
        const auto code = [&](int64_t j) HWY_ATTR {
          const V q = code_of(hn::Load(d, x + (i + j) * panel_rows + lane), inverse);
          return hn::ConvertTo(di, hn::Add(q, hn::Set(d, 8.0f)));
        };
        auto word = hn::Or(code(0), hn::ShiftLeft<4>(code(4)));
        word = hn::Or(word, hn::Or(hn::ShiftLeft<8>(code(1)), hn::ShiftLeft<12>(code(5))));
        word = hn::Or(word, hn::Or(hn::ShiftLeft<16>(code(2)), hn::ShiftLeft<20>(code(6))));
        word = hn::Or(word, hn::Or(hn::ShiftLeft<24>(code(3)), hn::ShiftLeft<28>(code(7))));
        hn::StoreU(word, di, reinterpret_cast<int32_t*>(words) + i / 8 * panel_rows + lane);
      }
    }
    words += group / 8 * panel_rows;
  }
  return finite && hn::AllTrue(d, hn::Eq(poison, poison));
}

// Along a row: 8 bits have nothing to search for.
bool eight_bits(int64_t group, const float* rows, int64_t count, int64_t k, uint16_t* scales,
                std::byte* codes) {
  const hn::ScalableTag<float> d;
  const hn::Rebind<int8_t, decltype(d)> narrow;
  const hn::RebindToSigned<decltype(d)> di;
  const auto width = static_cast<int64_t>(hn::Lanes(d));
  HWY_ALIGN float padded[most_group];
  HWY_ALIGN int8_t row_codes[most_group];
  auto poison = hn::Zero(d);
  bool finite = true;
  for (int64_t at = 0; at < k; at += group) {
    const int64_t columns = std::min(group, k - at);
    for (int64_t r = 0; r < panel_rows; ++r) {
      if (r >= count) {
        *scales++ = 0;
        std::fill_n(row_codes, group, int8_t{0});
      } else {
        const float* x = rows + r * k + at;
        if (columns < group) {
          std::copy_n(x, columns, padded);
          std::fill(padded + columns, padded + group, 0.0f);
          x = padded;
        }
        auto extent = hn::Zero(d);
        for (int64_t i = 0; i < group; i += width) {
          const auto value = hn::LoadU(d, x + i);
          extent = hn::Max(extent, hn::Abs(value));
          poison = hn::Add(poison, hn::Mul(value, hn::Zero(d)));
        }
        const f16 rounded_scale(hn::GetLane(hn::MaxOfLanes(d, extent)) / 127);
        const float scale = static_cast<float>(rounded_scale);
        finite &= std::isfinite(scale);
        *scales++ = rounded_scale.bits;
        const auto inverse = hn::Set(d, scale != 0 ? 1 / scale : 0);
        const auto magic = hn::Set(d, 12582912.0f);
        for (int64_t i = 0; i < group; i += width) {
          const auto near = hn::Sub(hn::Add(hn::Mul(hn::LoadU(d, x + i), inverse), magic), magic);
          const auto code = hn::Min(hn::Max(near, hn::Set(d, -127.0f)), hn::Set(d, 127.0f));
          hn::StoreU(hn::DemoteTo(narrow, hn::ConvertTo(di, code)), narrow, row_codes + i);
        }
      }
      std::byte* word = codes + 4 * r;
      for (int64_t i = 0; i < group; i += 4, word += 4 * panel_rows) std::memcpy(word, row_codes + i, 4);
    }
    codes += group * panel_rows;
  }
  return finite && hn::AllTrue(d, hn::Eq(poison, poison));
}

bool panel_here(Form form, const float* rows, int64_t count, int64_t k, const float* importance,
                std::byte* panel) {
  auto* scales = reinterpret_cast<uint16_t*>(panel);
  std::byte* codes = panel + scale_bytes(form, k);
  std::fill(panel + groups_of(k, form.group) * panel_rows * 2, codes, std::byte{0});
  if (form.bits == 8) return eight_bits(form.group, rows, count, k, scales, codes);
  return four_bits(form.group, rows, count, k, importance, scales, reinterpret_cast<uint32_t*>(codes));
}

}  // namespace latente::quantised::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente::quantised {

HWY_EXPORT(panel_here);

bool quantise_panel(Form form, const float* rows, int64_t count, int64_t k, const float* importance,
                    std::byte* panel) {
  return HWY_DYNAMIC_DISPATCH(panel_here)(form, rows, count, k, importance, panel);
}

}  // namespace latente::quantised
#endif
