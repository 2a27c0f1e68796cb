#include "cuda/attention_paged.cuh"
#include "cuda/attention_sm90.h"
#include "cuda/coded.h"
#include "cuda/kernels.h"

namespace latente::cuda {
namespace {

// Keys and values of some heads of some sequences, expanded from the latents at positions from first_key on:
// [sequence, head, key, width].
template <class T>
struct ExpandedKeys {
  T *keys = nullptr, *values = nullptr;
  int first_sequence = 0, sequences = 0, first_head = 0, heads = 0, first_key = 0, count = 0;
  int nope = 0, value = 0;
  const int32_t* lengths = nullptr;  // entries that any row of a sequence attends to

  __host__ __device__ int64_t row(int sequence, int head, int key) const {
    return (static_cast<int64_t>(sequence) * heads + head) * count + key;
  }
};

// A block a sequence.
__global__ void lengths_kernel(const int32_t* sequence, const int32_t* position, int tokens,
                               int32_t* lengths) {
  __shared__ int longest;
  if (threadIdx.x == 0) longest = 0;
  __syncthreads();
  int own = 0;
  for (int t = static_cast<int>(threadIdx.x); t < tokens; t += static_cast<int>(blockDim.x)) {
    if (sequence[t] == static_cast<int>(blockIdx.x)) own = max(own, position[t] + 1);
  }
  atomicMax(&longest, own);
  __syncthreads();
  if (threadIdx.x == 0) lengths[blockIdx.x] = longest;
}

constexpr int expand_tile = 64, expand_depth = 16, expand_threads = 256;

// A block expand_tile entries of a sequence and as many columns of a head: latents · kv_bᵀ.
template <class T, class W, class E>
__global__ void __launch_bounds__(expand_threads)
    expand_kernel(const Paged<T> a, const E cache, const W* kv_b, int64_t kv_b_row, int64_t kv_b_column,
                  int rank, const ExpandedKeys<T> to) {
  __shared__ float latents[expand_depth][expand_tile + 1], weights[expand_depth][expand_tile + 1];
  const int width = to.nope + to.value, column_tiles = (width + expand_tile - 1) / expand_tile;
  const int key = static_cast<int>(blockIdx.x) * expand_tile, sequence = static_cast<int>(blockIdx.z);
  const int head = static_cast<int>(blockIdx.y) / column_tiles;
  const int column = static_cast<int>(blockIdx.y) % column_tiles * expand_tile;
  const int length = to.lengths[to.first_sequence + sequence] - to.first_key;
  if (key >= length) return;
  const int x = static_cast<int>(threadIdx.x) % 16, y = static_cast<int>(threadIdx.x) / 16;
  float sum[4][4] = {};
  for (int depth = 0; depth < rank; depth += expand_depth) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < expand_tile * expand_depth; i += expand_threads) {
      const int d = i % expand_depth, r = i / expand_depth, at = to.first_key + key + r;
      const bool inside = depth + d < rank;
      latents[d][r] = inside && key + r < min(length, to.count)
                          ? cache.at(a.page_of(to.first_sequence + sequence, at), at % a.page, 0, depth + d)
                          : 0;
      weights[d][r] =
          inside && column + r < width
              ? widen(kv_b[(static_cast<int64_t>(to.first_head + head) * width + column + r) * kv_b_row +
                           (depth + d) * kv_b_column])
              : 0;
    }
    __syncthreads();
    for (int d = 0; d < expand_depth; ++d) {
      for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) {
          sum[i][j] = fmaf(latents[d][y + 16 * i], weights[d][x + 16 * j], sum[i][j]);
        }
      }
    }
  }
  for (int i = 0; i < 4; ++i) {
    if (key + y + 16 * i >= to.count) continue;
    const int64_t row = to.row(sequence, head, key + y + 16 * i);
    for (int j = 0; j < 4; ++j) {
      const int c = column + x + 16 * j;
      if (c < to.nope) {
        narrow(sum[i][j], to.keys + row * to.nope + c);
      } else if (c < width) {
        narrow(sum[i][j], to.values + row * to.value + c - to.nope);
      }
    }
  }
}

// A block a tile of tokens and a head. `state` holds rows between stretches of keys: [head, token, value +
// 2].
template <class T, class E, class Tile>
__global__ void __launch_bounds__(Tile::threads)
    plain_paged_expanded(const Paged<T> a, const E cache, int rank, const ExpandedKeys<T> from, float* state,
                         bool first, bool last) {
  extern __shared__ float shared[];
  const int token = static_cast<int>(blockIdx.x) * Tile::rows, head = static_cast<int>(blockIdx.y);
  const int rows = min(Tile::rows, a.tokens - token);
  bool any = false;
  for (int r = 0; r < rows; ++r) {
    any |= static_cast<unsigned>(a.sequence[token + r] - from.first_sequence) <
           static_cast<unsigned>(from.sequences);
  }
  if (!any) return;
  PlainRows<Tile> tile(shared, a.key, a.value);
  tile.load_queries([&](int row, int i) {
    return row < rows ? a.scale * widen(a.q.at(token + row, from.first_head + head)[i]) : 0.0f;
  });
  auto state_at = [&](int row) {
    return state + (static_cast<int64_t>(head) * a.tokens + token + row) * (a.value + 2);
  };
  if (!first) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < rows * a.value; i += Tile::threads) {
      tile.out[i] = state_at(i / a.value)[i % a.value];
    }
    for (int i = 0; i < Tile::each; ++i) {
      if (tile.row_of(i) >= rows) continue;
      tile.maximum[i] = state_at(tile.row_of(i))[a.value];
      tile.sum[i] = state_at(tile.row_of(i))[a.value + 1];
    }
  }
  for (int begin = 0, end; begin < rows; begin = end) {
    const int sequence = a.sequence[token + begin], local = sequence - from.first_sequence;
    int length = 0;
    for (end = begin; end < rows && a.sequence[token + end] == sequence; ++end) {
      length = max(length, a.position[token + end] + 1);
    }
    if (local < 0 || local >= from.sequences) continue;
    length = min(length - from.first_key, from.count);
    for (int key = 0; key < length; key += Tile::keys) {
      tile.add_keys(
          min(Tile::keys, length - key),
          [&](int k, int i) {
            if (i < from.nope) return widen(from.keys[from.row(local, head, key + k) * from.nope + i]);
            const int at = from.first_key + key + k;
            return cache.at(a.page_of(sequence, at), at % a.page, 0, rank + i - from.nope);
          },
          [&](int k, int i) { return widen(from.values[from.row(local, head, key + k) * from.value + i]); },
          [&](int row, int k) {
            return row >= begin && row < end && from.first_key + key + k <= a.position[token + row];
          });
    }
  }
  if (!last) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < rows * a.value; i += Tile::threads) {
      state_at(i / a.value)[i % a.value] = tile.out[i];
    }
    for (int i = 0; i < Tile::each; ++i) {
      if (tile.key_of() != 0 || tile.row_of(i) >= rows) continue;
      state_at(tile.row_of(i))[a.value] = tile.maximum[i];
      state_at(tile.row_of(i))[a.value + 1] = tile.sum[i];
    }
    return;
  }
  tile.finish(
      [&](int row, int i, float x) {
        if (row >= rows) return;
        const int local = a.sequence[token + row] - from.first_sequence;
        if (local < 0 || local >= from.sequences) return;
        narrow(x, a.out.at(token + row, from.first_head + head) + i);
      },
      [](int, float) {});
}

// How expanded keys are cut so that they fit into the workspace: all entries if possible, then as many
// sequences, then heads. Changes no bits.
struct Cut {
  int64_t sequences, heads, keys;
  float* state;
  int32_t* lengths;
  char* memory;
};

Cut cut(int64_t sequences, int64_t heads, int64_t keys, int64_t entry_bytes, int64_t state_bytes,
        const Context& context) {
  Cut c;
  c.lengths = static_cast<int32_t*>(context.workspace);
  char* next = static_cast<char*>(context.workspace) + 256 * ceil_div(sequences * 4, 256);
  int64_t left = context.workspace_bytes - (next - static_cast<char*>(context.workspace));
  c.keys = keys, c.heads = 1, c.sequences = 1;
  c.state = nullptr;
  if (left < keys * entry_bytes) {
    c.state = reinterpret_cast<float*>(next);
    const int64_t bytes = 256 * ceil_div(state_bytes, 256);
    next += bytes, left -= bytes;
    c.keys = left / entry_bytes / 256 * 256;
    if (c.keys < 256) {
      fail("attention: workspace: expected at least {} bytes, found {}",
           context.workspace_bytes - left + 256 * entry_bytes, context.workspace_bytes);
    }
  } else {
    c.sequences = std::min(sequences, left / (keys * entry_bytes));
    c.heads = std::clamp<int64_t>(left / (c.sequences * keys * entry_bytes), 1, heads);
  }
  c.memory = next;
  return c;
}

template <class T, class W, class Tile>
void attend(const View& q, const View& cache, const View& kv_b, const Pages& pages, double scale,
            const View& out, const Context& context) {
  const Paged<T> a = paged<T>(q, cache, pages, scale, out);
  const int rank = static_cast<int>(kv_b[1]);
  const int rope = static_cast<int>(Backend::rotary_width(cache.dtype, cache[3], rank));
  const int64_t sequences = pages.block_table[0], keys = capacity(cache, pages);
  ExpandedKeys<T> to;
  to.nope = a.key - rope;
  to.value = a.value;
  const int64_t entry_bytes = (to.nope + to.value) * static_cast<int64_t>(sizeof(T));
  const int64_t state_bytes = a.tokens * (a.value + 2) * static_cast<int64_t>(sizeof(float));
  const Cut c = cut(sequences, a.heads, keys, entry_bytes, state_bytes, context);
  to.lengths = c.lengths;
  lengths_kernel<<<static_cast<unsigned>(sequences), 256, 0, context.stream>>>(a.sequence, a.position,
                                                                               a.tokens, c.lengths);
  check_launch("attention_paged_expanded");
  const int64_t bytes = Tile::shared_bytes(a.key, a.value);
  with_elements(cache, rank, [&]<class E>(const E& elements) {
    auto kernel = plain_paged_expanded<T, E, Tile>;
    allow_shared_memory(kernel, bytes);
    for (int64_t s = 0; s < sequences; s += c.sequences) {
      for (int64_t h = 0; h < a.heads; h += c.heads) {
        for (int64_t k = 0; k < keys; k += c.keys) {
          to.first_sequence = static_cast<int>(s);
          to.sequences = static_cast<int>(std::min(c.sequences, sequences - s));
          to.first_head = static_cast<int>(h);
          to.heads = static_cast<int>(std::min(c.heads, a.heads - h));
          to.first_key = static_cast<int>(k);
          to.count = static_cast<int>(std::min(c.keys, keys - k));
          to.keys = reinterpret_cast<T*>(c.memory);
          to.values = to.keys + to.row(to.sequences, 0, 0) * to.nope;
          const dim3 expand_grid(static_cast<unsigned>(ceil_div(to.count, expand_tile)),
                                 static_cast<unsigned>(to.heads * ceil_div(to.nope + to.value, expand_tile)),
                                 static_cast<unsigned>(to.sequences));
          expand_kernel<<<expand_grid, expand_threads, 0, context.stream>>>(
              a, elements, device_data<W>(kv_b), kv_b.stride(0), kv_b.stride(1), rank, to);
          check_launch("attention_paged_expanded");
          const dim3 grid(static_cast<unsigned>(ceil_div(a.tokens, Tile::rows)),
                          static_cast<unsigned>(to.heads));
          kernel<<<grid, Tile::threads, static_cast<size_t>(bytes), context.stream>>>(
              a, elements, rank, to, c.state, k == 0, k + c.keys >= keys);
          check_launch("attention_paged_expanded");
        }
      }
    }
  });
}

template <class T, class W>
void attend_any(const View& q, const View& cache, const View& kv_b, const Pages& pages, double scale,
                const View& out, const Context& context) {
  if (is_wide(q[2], out[2])) {
    attend<T, W, SmallTile>(q, cache, kv_b, pages, scale, out, context);
  } else {
    attend<T, W, LargeTile>(q, cache, kv_b, pages, scale, out, context);
  }
}

}  // namespace

void attention_paged_expanded(View q, View cache, View kv_b, const Pages& pages, double scale, View out,
                              const Context& context) {
  const int64_t rope = Backend::rotary_width(cache.dtype, cache[3], kv_b[1]);
  LATENTE_ASSERT(cache.shape.rank() == 4 && cache[2] == 1 && rope > 0);
  LATENTE_ASSERT(kv_b[0] == q[1] * (q[2] - rope + out[2]));
  if (q.count() == 0) return;
  if (is_coded(kv_b)) {
    Context rest;
    const View rows = widened(kv_b, context, rest);
    return attention_paged_expanded(q, cache, rows, pages, scale, out, rest);
  }
  if (context.compute_capability == 90 &&
      attention_paged_expanded_sm90(q, cache, kv_b, pages, scale, out, context)) {
    return;
  }
  const bool wide = q.dtype == DType::f32, wide_weight = kv_b.dtype == DType::f32;
  auto run =
      wide ? (wide_weight ? attend_any<float, float> : attend_any<float, __nv_bfloat16>)
           : (wide_weight ? attend_any<__nv_bfloat16, float> : attend_any<__nv_bfloat16, __nv_bfloat16>);
  run(q, cache, kv_b, pages, scale, out, context);
}

}  // namespace latente::cuda
