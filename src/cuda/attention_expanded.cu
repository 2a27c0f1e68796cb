#include "cuda/attention.cuh"
#include "cuda/attention_sm90.h"
#include "cuda/kernels.h"

namespace latente::cuda {
namespace {

// A block a tile of rows and a head. Keys are taken in blocks counted from the start of a row's own sequence,
// run by run of rows that share it.
template <class T, class Tile>
__global__ void __launch_bounds__(Tile::threads) plain_forward(const Expanded<T> a) {
  extern __shared__ float shared[];
  const int first = static_cast<int>(blockIdx.x) * Tile::rows, head = static_cast<int>(blockIdx.y);
  const int group = head / (a.heads / a.groups);
  const int rows = min(Tile::rows, a.tokens - first);
  PlainRows<Tile> tile(shared, a.nope + a.rope, a.value);
  tile.load_queries(
      [&](int row, int i) { return row < rows ? a.scale * widen(a.q.at(first + row, head)[i]) : 0.0f; });
  for (int begin = 0, end; begin < rows; begin = end) {
    const int start = a.starts[first + begin];
    for (end = begin + 1; end < rows && a.starts[first + end] == start;) ++end;
    for (int at = start; at < first + end; at += Tile::keys) {
      tile.add_keys(
          min(Tile::keys, first + end - at),
          [&](int k, int i) {
            return widen(i < a.nope ? a.k.at(at + k, group)[i] : a.k_rope.at(at + k, 0)[i - a.nope]);
          },
          [&](int k, int i) { return widen(a.v.at(at + k, group)[i]); },
          [&](int row, int k) { return row >= begin && row < end && at + k <= first + row; });
    }
  }
  tile.finish(
      [&](int row, int i, float x) {
        if (row < rows) narrow(x, a.out.at(first + row, head) + i);
      },
      [&](int row, float x) {
        if (row < rows) {
          a.lse[(first + row) * a.lse_token + head * a.lse_head] = x * static_cast<float>(ln_2);
        }
      });
}

template <class T, class Tile>
void launch(const Expanded<T>& a, StreamHandle stream) {
  const int64_t bytes = Tile::shared_bytes(a.nope + a.rope, a.value);
  allow_shared_memory(plain_forward<T, Tile>, bytes);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.tokens, Tile::rows)), static_cast<unsigned>(a.heads));
  plain_forward<T, Tile><<<grid, Tile::threads, static_cast<size_t>(bytes), stream>>>(a);
  check_launch("attention_expanded");
}

template <class T>
void forward(const Expanded<T>& a, StreamHandle stream) {
  if (is_wide(a.nope + a.rope, a.value)) {
    launch<T, SmallTile>(a, stream);
  } else {
    launch<T, LargeTile>(a, stream);
  }
}

}  // namespace

void attention_expanded(View q, View k, View k_rope, View v, View starts, double scale, View out, View lse,
                        const Context& context) {
  if (q.count() == 0) return;
  if (q.dtype == DType::bf16) {
    const auto a = expanded<__nv_bfloat16>(q, k, k_rope, v, starts, scale, out, lse);
    if (context.compute_capability == 90 && attention_expanded_sm90(a, context)) return;
    forward(a, context.stream);
  } else {
    forward(expanded<float>(q, k, k_rope, v, starts, scale, out, lse), context.stream);
  }
}

}  // namespace latente::cuda
