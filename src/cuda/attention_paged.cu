#include "cuda/attention_paged.cuh"
#include "cuda/attention_sm90.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace latente::cuda {
namespace {

// A block a piece of a token's context and a tile of the heads that share its keys.
template <class T, class E, class Tile>
__global__ void __launch_bounds__(Tile::threads)
    plain_paged(const Paged<T> a, const E keys, const E values, const Partials partials) {
  extern __shared__ float shared[];
  const int token = partials.first_token + static_cast<int>(blockIdx.x), split = static_cast<int>(blockIdx.y);
  const int length = a.position[token] + 1, sequence = a.sequence[token];
  if (split >= split_count(length, a.heads)) return;
  const int share = a.heads / a.groups, tiles = (share + Tile::rows - 1) / Tile::rows;
  const int group = static_cast<int>(blockIdx.z) / tiles;
  const int head = group * share + static_cast<int>(blockIdx.z) % tiles * Tile::rows;
  const int rows = min(Tile::rows, (group + 1) * share - head);
  PlainRows<Tile> tile(shared, a.key, a.value);
  tile.load_queries(
      [&](int row, int i) { return row < rows ? a.scale * widen(a.q.at(token, head + row)[i]) : 0.0f; });
  const int size = split_keys(length, a.heads), end = min(length, (split + 1) * size);
  for (int at = split * size; at < end; at += Tile::keys) {
    tile.add_keys(
        min(Tile::keys, end - at),
        [&](int k, int i) { return keys.at(a.page_of(sequence, at + k), (at + k) % a.page, group, i); },
        [&](int k, int i) { return values.at(a.page_of(sequence, at + k), (at + k) % a.page, group, i); },
        [](int, int) { return true; });
  }
  const bool whole = split_count(length, a.heads) == 1;
  tile.finish(
      [&](int row, int i, float x) {
        if (row >= rows) return;
        if (whole) {
          narrow(x, a.out.at(token, head + row) + i);
        } else {
          partials.out[partials.row(token, head + row, split) * a.value + i] = x;
        }
      },
      [&](int row, float x) {
        if (row < rows && !whole) partials.lse[partials.row(token, head + row, split)] = x;
      });
}

constexpr int most_pieces = 1024, most_columns = 2048;
constexpr int piece_groups = 4, group_threads = 128;

// A block a row, `width` columns a thread. Each group of threads adds every fourth piece, in their order;
// then the groups' sums are added in theirs.
template <class T, int width>
__global__ void __launch_bounds__(piece_groups* group_threads)
    combine_kernel(const Paged<T> a, const Partials partials) {
  __shared__ float weights[most_pieces], sums[piece_groups - 1][most_columns];
  __shared__ float total;
  const int token = partials.first_token + static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const int splits = split_count(a.position[token] + 1, a.heads), thread = static_cast<int>(threadIdx.x);
  wait_for_earlier_kernels();
  if (splits == 1) return;
  const float* lse = partials.lse + partials.row(token, head, 0);
  const float* out = partials.out + partials.row(token, head, 0) * a.value;
  if (thread < 32) {
    float top = -INFINITY, sum = 0;
    for (int s = thread; s < splits; s += 32) top = fmaxf(top, lse[s]);
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(whole_warp, top, step));
    for (int s = thread; s < splits; s += 32) {
      weights[s] = exp2f(lse[s] - top);
      sum += weights[s];
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(whole_warp, sum, step);
    if (thread == 0) total = sum;
  }
  __syncthreads();
  const int group = thread / group_threads;
  for (int base = 0; base < a.value; base += group_threads * width) {
    const int i = base + thread % group_threads * width;
    const bool real = i < a.value;
    float x[width] = {};
#pragma unroll 4
    for (int s = group; s < splits; s += piece_groups) {
      if (!real) break;
      float part[width];
      if constexpr (width == 4) {
        *reinterpret_cast<float4*>(part) = *reinterpret_cast<const float4*>(out + s * a.value + i);
      } else {
        part[0] = out[s * a.value + i];
      }
#pragma unroll
      for (int c = 0; c < width; ++c) x[c] = fmaf(weights[s], part[c], x[c]);
    }
    if (group > 0 && real) {
#pragma unroll
      for (int c = 0; c < width; ++c) sums[group - 1][i + c] = x[c];
    }
    __syncthreads();
    if (group > 0 || !real) continue;
#pragma unroll
    for (int c = 0; c < width; ++c) {
      for (int g = 0; g < piece_groups - 1; ++g) x[c] += sums[g][i + c];
      narrow(x[c] / total, a.out.at(token, head) + i + c);
    }
  }
}

template <class Tile, class T, class E>
void launch(const Paged<T>& a, const E& keys, const E& values, const Partials& partials,
            StreamHandle stream) {
  const int64_t bytes = Tile::shared_bytes(a.key, a.value);
  auto kernel = plain_paged<T, E, Tile>;
  allow_shared_memory(kernel, bytes);
  const int64_t tiles = a.groups * ceil_div(a.heads / a.groups, Tile::rows);
  const dim3 grid(static_cast<unsigned>(partials.tokens), static_cast<unsigned>(partials.splits),
                  static_cast<unsigned>(tiles));
  kernel<<<grid, Tile::threads, static_cast<size_t>(bytes), stream>>>(a, keys, values, partials);
  check_launch("attention_paged");
}

template <class T>
void attend(const View& q, const View& keys, const View& values, const Pages& pages, double scale,
            const View& out, const Context& context) {
  const Paged<T> a = paged<T>(q, keys, pages, scale, out);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (context.compute_capability == 90 && attention_paged_sm90(a, q, keys, values, pages, context)) return;
    if (attention_paged_mma(a, keys, values, pages, context)) return;
  }
  with_elements(keys, values[3], [&]<class E>(const E& key_elements) {
    with_elements(values, values[3], [&]<class F>(F value_elements) {
      if constexpr (std::is_same_v<E, F>) {
        if constexpr (E::narrow) value_elements = key_elements;
        for_token_rounds(a.tokens, a.heads, a.value, most_splits(capacity(keys, pages), a.heads), context,
                         [&](const Partials& partials) {
                           if (is_wide(a.key, a.value)) {
                             launch<SmallTile>(a, key_elements, value_elements, partials, context.stream);
                           } else {
                             launch<LargeTile>(a, key_elements, value_elements, partials, context.stream);
                           }
                           if (partials.splits > 1) combine_splits(a, partials, context);
                         });
      }
    });
  });
}

}  // namespace

template <class T>
void combine_splits(const Paged<T>& a, const Partials& partials, const Context& context) {
  LATENTE_ASSERT(partials.splits <= most_pieces);
  const bool vectors = a.value % 4 == 0;
  LATENTE_ASSERT(a.value <= most_columns);
  launch_early(vectors ? combine_kernel<T, 4> : combine_kernel<T, 1>,
               dim3(static_cast<unsigned>(partials.tokens), static_cast<unsigned>(a.heads)),
               piece_groups * group_threads, 0, "attention_paged", context, a, partials);
}
template void combine_splits(const Paged<float>&, const Partials&, const Context&);
template void combine_splits(const Paged<__nv_bfloat16>&, const Partials&, const Context&);

int64_t attention_short_table(int64_t tokens, int64_t heads, const View& keys, const View& values,
                              int64_t entries, const Context& context) {
  if (values || keys.dtype != DType::bf16 || context.compute_capability != 90) return 0;
  return short_table_sm90(tokens, heads, keys, entries, context);
}

void attention_paged(View q, View keys, View values, const Pages& pages, double scale, View out,
                     const Context& context) {
  LATENTE_ASSERT(q.shape.rank() == 3 && keys.shape.rank() == 4 && values.shape.rank() == 4);
  const bool is_narrow = Backend::is_narrow_cache(keys.dtype);
  LATENTE_ASSERT(keys[3] == (is_narrow ? Backend::narrow_entry_bytes(values[3], q[2] - values[3]) : q[2]));
  LATENTE_ASSERT(out[2] == values[3] && q[1] % keys[2] == 0 && keys[2] == values[2] && keys[1] == values[1] &&
                 keys.dtype == values.dtype && (!is_narrow || (keys[2] == 1 && keys.data == values.data)));
  if (q.count() == 0) return;
  if (q.dtype == DType::bf16) {
    attend<__nv_bfloat16>(q, keys, values, pages, scale, out, context);
  } else {
    attend<float>(q, keys, values, pages, scale, out, context);
  }
}

}  // namespace latente::cuda
