// Weights of 8 and 4 bits and of FP8 (tensor/panels.h) as products read them here: strips of 8 rows, of which
// 512 bytes at a time, 16 a lane, are the operand of tensor cores for 64 or 128 of the depth as it stands in
// registers. Codes widen to bfloat16: code · scale, rounded once. So a weight is one matrix of bfloat16
// whoever reads it, few rows in registers or many by way of the workspace.
#pragma once

#include <optional>

#include "cuda/context.h"
#include "tensor/view.h"

namespace latente::cuda {

// Whole numbers of 8 or 4 bits with a float16 scale for a group of a row; e4m3 with a float32 scale for a
// square of 128 × 128.
enum class Code : int { q8, q4, f8 };

constexpr int strip_rows = 8, strip_bytes = 512;
template <Code code>
constexpr int strip_depth = code == Code::q4 ? 128 : 64;  // of so many bytes of a strip

// Of a matrix [n, k]: scales, [strips, groups, 8] or [n / 128, k / 128] (numbers of blocks rounded up),
// padded to 512 bytes; then codes, [strips, k / strip_depth, 512].
struct CodedForm {
  Code code;
  int64_t strips, pieces;  // pieces: of a strip, of strip_bytes each
  int64_t groups;          // of a row
  int64_t scale_bytes, bytes;
};
// Nothing for weights in other forms.
std::optional<CodedForm> coded_form(const View& w);
inline bool is_coded(const View& w) {
  return w.layout == Layout::panels;  // the only ones that this backend has
}

// From a matrix in the host's form, in the device's memory, to matrix `index` of `to`.
void lay_out(const void* matrix, const View& to, int64_t index, const Context& context);

// Rows [first, first + rows) (of each matrix of a stack) in bfloat16 in the workspace, of which `rest` has
// what is left; first is a multiple of 8. Of a stack whose rows are grouped by `offsets`, matrices without
// rows may be left out. Error when the workspace is too small.
View widened(const View& w, int64_t first, int64_t rows, const int32_t* offsets, const Context& context,
             Context& rest);
inline View widened(const View& w, const Context& context, Context& rest) {
  return widened(w, 0, w[-2], nullptr, context, rest);
}
// Of a stack: its matrices [first, first + count), where they lie.
View matrices_of(const View& w, int64_t first, int64_t count);
// How many rows of a matrix, or matrices of a stack, the workspace takes widened.
int64_t widened_rows(const View& w, const Context& context);
int64_t widened_matrices(const View& w, const Context& context);

}  // namespace latente::cuda
