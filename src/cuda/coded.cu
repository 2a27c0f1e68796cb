#include "cuda/coded.cuh"
#include "tensor/panels.h"

namespace latente::cuda {
namespace {

constexpr int threads = 256, warps = threads / warp_size;

int64_t quotient(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The matrix in the host's form.
struct Source {
  const uint8_t* codes = nullptr;
  const uint8_t* scales = nullptr;
  int64_t panel = 0;  // bytes from one panel of 16 rows to the next
  int64_t n = 0, k = 0, padded_k = 0, groups = 0;
};

template <Code code>
__device__ unsigned code_at(const Source& p, int64_t row, int64_t at) {
  constexpr unsigned zero = code == Code::q8 ? 128 : code == Code::q4 ? 8 : 0;
  if constexpr (code == Code::f8) return row < p.n && at < p.k ? p.codes[row * p.k + at] : zero;
  if (row >= p.n || at >= p.padded_k) return zero;
  const uint8_t* panel = p.codes + row / 16 * p.panel;
  const int64_t r = row % 16;
  if constexpr (code == Code::q8) return panel[(at / 4 * 16 + r) * 4 + at % 4] ^ 128u;
  const unsigned both = panel[(at / 8 * 16 + r) * 4 + at % 4];
  return at % 8 < 4 ? both & 15 : both >> 4;
}

// A thread a word.
template <Code code>
__global__ __launch_bounds__(threads) void lay_out_kernel(Source p, int64_t words, int64_t pieces,
                                                          unsigned* out) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (index >= words) return;
  const int word = static_cast<int>(index % 4), lane = static_cast<int>(index / 4 % warp_size);
  const int64_t piece = index / (strip_bytes / 4), strip = piece / pieces;
  const int64_t row = strip * strip_rows + lane / 4, base = piece % pieces * strip_depth<code>;
  auto at = [&](int step, int i) {
    return code_at<code>(p, row, base + step * 16 + lane % 4 * 2 + i % 2 + i / 2 * 8);
  };
  unsigned result = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (code == Code::q4) {
#pragma unroll
      for (int s = 0; s < 2; ++s) result |= at(word * 2 + s, i) << (4 * (s * 2 + i / 2) + 16 * (i % 2));
    } else {
      result |= at(word, i) << (8 * i);
    }
  }
  out[index] = result;
}

// [strips, groups, 8] of panels' [groups, 16].
__global__ __launch_bounds__(threads) void scales_kernel(Source p, int64_t count, uint16_t* out) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * threads + threadIdx.x;
  if (index >= count) return;
  const int64_t r = index % strip_rows, group = index / strip_rows % p.groups;
  const int64_t row = index / strip_rows / p.groups * strip_rows + r;
  out[index] = reinterpret_cast<const uint16_t*>(p.scales + row / 16 * p.panel)[group * 16 + row % 16];
}

struct Widening {
  const char* matrices = nullptr;
  int64_t matrix = 0, codes = 0;  // bytes: of a matrix, to its codes
  int64_t first_strip = 0, strips = 0, pieces = 0, groups = 0;
  int64_t rows = 0, depth = 0, group = 0;
  bf16* out = nullptr;
  int64_t out_row = 0, out_matrix = 0;
  const int32_t* offsets = nullptr;
};

// A warp a piece.
template <Code code>
__global__ __launch_bounds__(threads) void widen_kernel(Widening p) {
  constexpr int depth = strip_depth<code>, row_words = depth / 2 + 4, chunks = depth / 8;
  __shared__ __align__(16) unsigned memory[warps][strip_rows * row_words];
  const int64_t matrix = blockIdx.y;
  if (p.offsets && p.offsets[matrix] == p.offsets[matrix + 1]) return;
  const int lane = static_cast<int>(threadIdx.x) % warp_size,
            warp = static_cast<int>(threadIdx.x) / warp_size;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * warps + warp;
  if (index >= p.strips * p.pieces) return;
  const int64_t strip = index / p.pieces, piece = index % p.pieces;
  const char* from = p.matrices + matrix * p.matrix;
  const uint4 codes = *reinterpret_cast<const uint4*>(
      from + p.codes + ((p.first_strip + strip) * p.pieces + piece) * strip_bytes + lane * 16);
  const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
  unsigned* own = memory[warp];
#pragma unroll
  for (int block = 0; block < depth / scale_depth; ++block) {
    const int64_t at = piece * depth + block * scale_depth;
    float scale;
    if constexpr (code == Code::f8) {
      const int64_t row = (p.first_strip + strip) * strip_rows / 128;
      scale = reinterpret_cast<const float*>(from)[row * p.groups + min(at / 128, p.groups - 1)];
    } else {
      const int64_t group = min(at / p.group, p.groups - 1);
      scale = __half2float(reinterpret_cast<const __half*>(
          from)[((p.first_strip + strip) * p.groups + group) * strip_rows + lane / 4]);
    }
    const Widener<code> widener(scale);
#pragma unroll
    for (int i = block * 2; i < block * 2 + 2; ++i) {
      unsigned* to = own + lane / 4 * row_words + i * 8 + lane % 4;
      widener.four(words, i, to[0], to[4]);
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < strip_rows * chunks; i += warp_size) {
    const int64_t row = strip * strip_rows + i / chunks, column = piece * depth + i % chunks * 8;
    if (row >= p.rows || column >= p.depth) continue;
    *reinterpret_cast<uint4*>(p.out + matrix * p.out_matrix + row * p.out_row + column) =
        *reinterpret_cast<const uint4*>(own + i / chunks * row_words + i % chunks * 4);
  }
}

template <class F>
void with_code(Code code, F&& f) {
  if (code == Code::q8) return f(std::integral_constant<Code, Code::q8>());
  if (code == Code::q4) return f(std::integral_constant<Code, Code::q4>());
  f(std::integral_constant<Code, Code::f8>());
}

// Rows of whole packs.
int64_t widened_row(const View& w) { return quotient(w[-1], 8) * 8; }
int64_t widened_bytes(int64_t rows, const View& w) { return rows * widened_row(w) * int64_t{sizeof(bf16)}; }

}  // namespace

std::optional<CodedForm> coded_form(const View& w) {
  if (!is_coded(w)) return {};
  CodedForm form{};
  form.code = w.dtype == DType::q8 ? Code::q8 : w.dtype == DType::q4 ? Code::q4 : Code::f8;
  const int64_t n = w[-2], k = w[-1];
  form.strips = quotient(n, strip_rows);
  form.pieces = quotient(k, form.code == Code::q4 ? strip_depth<Code::q4> : strip_depth<Code::q8>);
  form.groups = quotient(k, w.group);
  const int64_t scales = form.code == Code::f8 ? quotient(n, w.group) * form.groups * 4
                                               : form.strips * form.groups * strip_rows * 2;
  form.scale_bytes = quotient(scales, strip_bytes) * strip_bytes;
  form.bytes = form.scale_bytes + form.strips * form.pieces * strip_bytes;
  return form;
}

void lay_out(const void* matrix, const View& to, int64_t index, const Context& context) {
  const CodedForm form = *coded_form(to);
  const auto* from = static_cast<const uint8_t*>(matrix);
  char* at = static_cast<char*>(to.data) + index * form.bytes;
  Source source;
  source.n = to[-2], source.k = to[-1], source.groups = form.groups;
  if (form.code == Code::f8) {
    source.codes = from + quantised::square_scale_bytes(source.n, source.k);
    const int64_t scales = quotient(source.n, to.group) * form.groups * 4;
    check(cudaMemcpyAsync(at, from, static_cast<size_t>(scales), cudaMemcpyDeviceToDevice, context.stream),
          "lay_out");
  } else {
    const quantised::Form host = quantised::form_of(to.dtype, to.group);
    source.scales = from, source.codes = from + quantised::scale_bytes(host, source.k);
    source.panel = quantised::panel_bytes(host, source.k);
    source.padded_k = form.groups * to.group;
    const int64_t count = form.strips * form.groups * strip_rows;
    scales_kernel<<<blocks_for(count, threads), threads, 0, context.stream>>>(
        source, count, reinterpret_cast<uint16_t*>(at));
    check_launch("lay_out");
  }
  const int64_t words = form.strips * form.pieces * (strip_bytes / 4);
  with_code(form.code, [&](auto code) {
    lay_out_kernel<decltype(code)::value><<<blocks_for(words, threads), threads, 0, context.stream>>>(
        source, words, form.pieces, reinterpret_cast<unsigned*>(at + form.scale_bytes));
  });
  check_launch("lay_out");
}

View matrices_of(const View& w, int64_t first, int64_t count) {
  LATENTE_ASSERT(w.shape.rank() == 3 && first + count <= w[0]);
  View part = w;
  part.shape = {count, w[1], w[2]};
  part.data = static_cast<char*>(w.data) + first * w.stride(0);
  return part;
}

int64_t widened_rows(const View& w, const Context& context) {
  const int64_t rows = context.workspace_bytes / widened_bytes(1, w) / strip_rows * strip_rows;
  return std::min(rows, w[-2]);
}

int64_t widened_matrices(const View& w, const Context& context) {
  return std::min(context.workspace_bytes / widened_bytes(w[-2], w), w[0]);
}

View widened(const View& w, int64_t first, int64_t rows, const int32_t* offsets, const Context& context,
             Context& rest) {
  LATENTE_ASSERT(first % strip_rows == 0 && first + rows <= w[-2]);
  const bool stack = w.shape.rank() == 3;
  const int64_t matrices = stack ? w[0] : 1, bytes = quotient(widened_bytes(matrices * rows, w), 256) * 256;
  if (bytes > context.workspace_bytes)
    fail("weights of {}: workspace: expected at least {} bytes, found {}", name_of(w.dtype), bytes,
         context.workspace_bytes);
  rest = context;
  rest.workspace = static_cast<char*>(context.workspace) + bytes;
  rest.workspace_bytes -= bytes;
  View out(context.workspace, stack ? Shape{matrices, rows, w[-1]} : Shape{rows, w[-1]}, DType::bf16);
  const int64_t row = widened_row(w);
  out.strides = {row, 1};
  if (stack) out.strides = {rows * row, row, 1};
  if (matrices == 0 || rows == 0) return out;

  const CodedForm form = *coded_form(w);
  Widening p;
  p.matrices = static_cast<const char*>(w.data);
  p.matrix = form.bytes, p.codes = form.scale_bytes;
  p.first_strip = first / strip_rows, p.strips = quotient(rows, strip_rows), p.pieces = form.pieces;
  p.groups = form.groups, p.group = w.group;
  p.rows = rows, p.depth = w[-1];
  p.out = out.as<bf16>(), p.out_row = row, p.out_matrix = rows * row;
  p.offsets = offsets;
  const dim3 grid(blocks_for(p.strips * p.pieces, warps), static_cast<unsigned>(matrices));
  with_code(form.code,
            [&](auto code) { widen_kernel<decltype(code)::value><<<grid, threads, 0, context.stream>>>(p); });
  check_launch("widen");
  return out;
}

}  // namespace latente::cuda
