// Attention over a paged cache on tensor cores of compute capability 8.0 and later: MHA, GQA and MQA in
// bfloat16, and absorbed MLA over latents in bfloat16 or of 8 bits. A block has a piece of a token's context
// and up to 16 · row_tiles heads that share its keys. Of 64 keys at a time, each of eight warps makes the
// scores of eight, then the products with its part of the values' columns.
#include "cuda/attention_paged.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"

namespace latente::cuda {
namespace {

constexpr int warps = 8, threads = warps * 32, tile_keys = 64, stages = 2;
constexpr int padding = 8;  // elements between rows in shared memory: matrices' rows lie in different banks
constexpr int score_pitch = tile_keys + 4, weight_pitch = tile_keys + padding;

// Keys and values, latents (whose first columns are the values), or latents' codes of 8 bits.
enum class Entries { pairs, latents, codes };

struct Work {
  Paged<__nv_bfloat16> a;
  Partials partials;
  const char *keys = nullptr, *values = nullptr;
  // In bytes. Values of latents are the first columns of their keys.
  int64_t key_page = 0, key_slot = 0, key_head = 0, value_page = 0, value_slot = 0, value_head = 0;
  int latent = 0;  // of narrow entries: codes of the latent
  bool fp8 = false;
  int tiles = 1;  // of the heads that share keys

  // Scores are summed over 32 at a time; beyond the keys' own columns stand zeros.
  __host__ __device__ int key_depth() const { return (a.key + 31) / 32 * 32; }
  __host__ __device__ int key_pitch() const { return key_depth() + padding; }
  __host__ __device__ int value_pitch() const { return a.value + padding; }
  __host__ __device__ int entry() const { return latent + 2 * (a.key - latent) + 4; }
};

// Where things stand in shared memory, in bytes.
template <int row_tiles, Entries kind>
struct Layout {
  static constexpr bool narrow = kind == Entries::codes;
  static constexpr int rows = 16 * row_tiles;
  int q, keys, key_stage, values, value_stage, entries, entry_stage, scores, weights, factors, scales, end;

  __host__ __device__ explicit Layout(const Work& w) {
    int at = 0;
    auto take = [&](int bytes) {
      const int from = at;
      at += (bytes + 15) / 16 * 16;
      return from;
    };
    q = take(rows * w.key_pitch() * 2);
    key_stage = tile_keys * w.key_pitch() * 2;
    keys = take(narrow ? key_stage : stages * key_stage);
    value_stage = kind == Entries::pairs ? tile_keys * w.value_pitch() * 2 : 0;
    values = kind == Entries::pairs ? take(stages * value_stage) : keys;
    entry_stage = narrow ? tile_keys * w.entry() : 0;
    entries = take(stages * entry_stage);
    scores = take(rows * score_pitch * 4);
    weights = take(rows * weight_pitch * 2);
    factors = take(rows * 4);
    scales = take(narrow ? tile_keys * 4 : 0);
    end = at;
  }
};

// A tile's keys, or values, of bfloat16: four threads a row.
__device__ inline void copy_rows(unsigned to, int pitch, int width, const char* from, int64_t page_bytes,
                                 int64_t slot_bytes, int64_t page, int slot, bool inside) {
  const char* row = inside ? from + page * page_bytes + slot * slot_bytes : from;
  const unsigned line = to + static_cast<unsigned>(threadIdx.x / 4 * pitch * 2);
  for (int c = static_cast<int>(threadIdx.x) % 4; c < width / 8; c += 4)
    mma::copy_async(line + c * 16, inside ? row + c * 16 : row, inside);
}

template <Entries kind>
__device__ inline void copy_tile(const Work& w, unsigned keys, unsigned values, int sequence, int group,
                                 int at, int end) {
  const int key = at + static_cast<int>(threadIdx.x) / 4;
  const bool inside = key < end;
  const int64_t page = inside ? w.a.page_of(sequence, key) : 0;
  const int slot = key % w.a.page;
  copy_rows(keys, w.key_pitch(), w.a.key, w.keys + group * w.key_head, w.key_page, w.key_slot, page, slot,
            inside);
  if constexpr (kind != Entries::pairs) return;
  copy_rows(values, w.value_pitch(), w.a.value, w.values + group * w.value_head, w.value_page, w.value_slot,
            page, slot, inside);
}

// A tile's entries as they are: a warp a row.
__device__ inline void copy_entries(const Work& w, unsigned to, int sequence, int at, int end) {
  const int lane = static_cast<int>(threadIdx.x) % 32, words = w.entry() / 4;
  for (int k = static_cast<int>(threadIdx.x) / 32; k < tile_keys; k += warps) {
    const int key = at + k;
    const bool inside = key < end;
    const char* row = w.keys;
    if (inside) row += w.a.page_of(sequence, key) * w.key_page + key % w.a.page * w.key_slot;
    for (int i = lane; i < words; i += 32)
      mma::copy_word_async(to + static_cast<unsigned>(k * words + i) * 4, inside ? row + i * 4 : row, inside);
  }
}

__device__ inline unsigned two_bf16(float x, float y) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// Codes of 8 bits as bfloat16, which holds them exactly; the rotary part as it is; scales apart.
__device__ inline void widen_entries(const Work& w, const unsigned* entries, char* keys, float* scales) {
  const int lane = static_cast<int>(threadIdx.x) % 32, words = w.entry() / 4, codes = w.latent / 4;
  for (int k = static_cast<int>(threadIdx.x) / 32; k < tile_keys; k += warps) {
    const unsigned* from = entries + k * words;
    char* to = keys + k * w.key_pitch() * 2;
    for (int i = lane; i < codes; i += 32) {
      const unsigned four = from[i];
      uint2 wide;
      if (w.fp8) {
        const auto pair = [](unsigned two) {
          const __half2_raw raw =
              __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(two), __NV_E4M3);
          const float2 x = __half22float2(__half2(raw));
          return two_bf16(x.x, x.y);
        };
        wide = {pair(four & 0xffff), pair(four >> 16)};
      } else {
        const auto code = [&](int byte) {
          return static_cast<float>(static_cast<signed char>(four >> (8 * byte)));
        };
        wide = {two_bf16(code(0), code(1)), two_bf16(code(2), code(3))};
      }
      *reinterpret_cast<uint2*>(to + i * 8) = wide;
    }
    for (int i = codes + lane; i < words - 1; i += 32)
      *reinterpret_cast<unsigned*>(to + w.latent * 2 + (i - codes) * 4) = from[i];
    if (lane == 0) scales[k] = __uint_as_float(from[words - 1]);
  }
}

// The scores of eight keys: sums of depth `begin` to `end`.
template <int row_tiles>
__device__ inline void add_scores(float (&sums)[row_tiles][4], unsigned q, unsigned keys, int pitch,
                                  int begin, int end) {
  const int lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8, r = lane % 8;
  for (int d = begin; d < end; d += 32) {
    unsigned b[4];
    mma::load_matrices<false>(b, keys + static_cast<unsigned>(r * pitch + d + matrix * 8) * 2);
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        unsigned a[4];
        const int row = i * 16 + matrix % 2 * 8 + r, column = d + half * 16 + matrix / 2 * 8;
        mma::load_matrices<false>(a, q + static_cast<unsigned>(row * pitch + column) * 2);
        mma::multiply(sums[i], a, b[half * 2], b[half * 2 + 1]);
      }
    }
  }
}

// Zeros between the keys' columns and the next row.
template <int row_tiles, Entries kind>
__device__ void clear_beyond(const Work& w, const Layout<row_tiles, kind>& at, char* memory) {
  const int columns = w.key_depth() - w.a.key, pitch = w.key_pitch();
  const auto clear = [&](int from, int rows) {
    for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += threads)
      reinterpret_cast<__nv_bfloat16*>(memory + from)[i / columns * pitch + w.a.key + i % columns] = 0.0f;
  };
  if (columns == 0) return;
  clear(at.q, Layout<row_tiles, kind>::rows);
  clear(at.keys, kind == Entries::codes ? tile_keys : stages * tile_keys);
}

template <int column_tiles, int row_tiles, Entries kind>
__global__ void __launch_bounds__(threads) mma_kernel(const Work w) {
  using L = Layout<row_tiles, kind>;
  constexpr bool narrow = L::narrow;
  wait_for_earlier_kernels();
  extern __shared__ __align__(16) char memory[];
  const Paged<__nv_bfloat16>& a = w.a;
  const L at(w);
  const int token = w.partials.first_token + static_cast<int>(blockIdx.x),
            split = static_cast<int>(blockIdx.y);
  const int length = a.position[token] + 1, sequence = a.sequence[token];
  if (split >= split_count(length, a.heads)) return;
  const int share = a.heads / a.groups, group = static_cast<int>(blockIdx.z) / w.tiles;
  const int head = group * share + static_cast<int>(blockIdx.z) % w.tiles * L::rows;
  const int rows = min(L::rows, (group + 1) * share - head);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int matrix = lane / 8, r = lane % 8;
  const int size = split_keys(length, a.heads), begin = split * size, end = min(length, begin + size);
  const unsigned shared = mma::shared_address(memory);
  float* const scores = reinterpret_cast<float*>(memory + at.scores);
  auto* const weights = reinterpret_cast<__nv_bfloat16*>(memory + at.weights);
  float* const factors = reinterpret_cast<float*>(memory + at.factors);
  float* const scales = reinterpret_cast<float*>(memory + at.scales);

  auto copy = [&](int stage, int first) {
    if constexpr (narrow) {
      copy_entries(w, shared + at.entries + stage * at.entry_stage, sequence, first, end);
    } else {
      copy_tile<kind>(w, shared + at.keys + stage * at.key_stage, shared + at.values + stage * at.value_stage,
                      sequence, group, first, end);
    }
    mma::commit();
  };
  for (int c = thread; c < L::rows * (a.key / 8); c += threads) {
    const int row = c / (a.key / 8), column = c % (a.key / 8) * 8;
    mma::copy_async(shared + at.q + static_cast<unsigned>(row * w.key_pitch() + column) * 2,
                    a.q.at(token, head + (row < rows ? row : 0)) + column, row < rows);
  }
  copy(0, begin);
  clear_beyond(w, at, memory);

  constexpr int owned = L::rows / warps;  // rows whose softmax a warp makes
  float top[owned], total[owned], out[row_tiles][column_tiles][4] = {};
#pragma unroll
  for (int i = 0; i < owned; ++i) top[i] = -INFINITY, total[i] = 0;

  int stage = 0;
  for (int first = begin; first < end; first += tile_keys) {
    mma::wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before any more
    copy(stage ^ 1, first + tile_keys);
    unsigned keys = shared + at.keys, values = keys;
    if constexpr (narrow) {
      widen_entries(w, reinterpret_cast<const unsigned*>(memory + at.entries + stage * at.entry_stage),
                    memory + at.keys, scales);
      __syncthreads();
    } else {
      keys += stage * at.key_stage;
      values = kind == Entries::latents ? keys : shared + at.values + stage * at.value_stage;
    }

    float sums[row_tiles][4] = {};
    const unsigned own_keys = keys + static_cast<unsigned>(warp * 8 * w.key_pitch()) * 2;
    add_scores<row_tiles>(sums, shared + at.q, own_keys, w.key_pitch(), 0, narrow ? w.latent : w.key_depth());
    const int column = warp * 8 + lane % 4 * 2;
    if constexpr (narrow) {
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] *= scales[column + j % 2];
      }
      add_scores<row_tiles>(sums, shared + at.q, own_keys, w.key_pitch(), w.latent, w.key_depth());
    }
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* to = scores + (i * 16 + half * 8 + lane / 4) * score_pitch + column;
        to[0] = sums[i][half * 2] * a.scale, to[1] = sums[i][half * 2 + 1] * a.scale;
      }
    }
    __syncthreads();

    const int count = end - first;
#pragma unroll
    for (int i = 0; i < owned; ++i) {
      const int row = warp * owned + i;
      const float x = lane < count ? scores[row * score_pitch + lane] : -INFINITY;
      const float y = lane + 32 < count ? scores[row * score_pitch + lane + 32] : -INFINITY;
      float highest = fmaxf(x, y);
      for (int step = 16; step > 0; step /= 2)
        highest = fmaxf(highest, __shfl_xor_sync(whole_warp, highest, step));
      highest = fmaxf(highest, top[i]);
      const float p = exp2f(x - highest), q = exp2f(y - highest), keep = exp2f(top[i] - highest);
      float sum = p + q;
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(whole_warp, sum, step);
      total[i] = total[i] * keep + sum;
      top[i] = highest;
      float scale_p = 1, scale_q = 1;
      if constexpr (narrow) scale_p = scales[lane], scale_q = scales[lane + 32];
      weights[row * weight_pitch + lane] = __float2bfloat16_rn(p * scale_p);
      weights[row * weight_pitch + lane + 32] = __float2bfloat16_rn(q * scale_q);
      if (lane == 0) factors[row] = keep;
    }
    __syncthreads();

    const int value_pitch = kind == Entries::pairs ? w.value_pitch() : w.key_pitch();
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
      const float upper = factors[i * 16 + lane / 4], lower = factors[i * 16 + 8 + lane / 4];
#pragma unroll
      for (int j = 0; j < column_tiles; ++j)
        out[i][j][0] *= upper, out[i][j][1] *= upper, out[i][j][2] *= lower, out[i][j][3] *= lower;
    }
#pragma unroll
    for (int k = 0; k < tile_keys; k += 16) {
      unsigned p[row_tiles][4];
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) {
        const int row = i * 16 + matrix % 2 * 8 + r;
        mma::load_matrices<false>(
            p[i], shared + at.weights + static_cast<unsigned>(row * weight_pitch + k + matrix / 2 * 8) * 2);
      }
#pragma unroll
      for (int j = 0; j < column_tiles; j += 2) {  // of an odd number the last two matrices are not used
        unsigned v[4];
        const int from = (warp * column_tiles + min(j + matrix / 2, column_tiles - 1)) * 8;
        mma::load_matrices<true>(
            v, values + static_cast<unsigned>((k + matrix % 2 * 8 + r) * value_pitch + from) * 2);
#pragma unroll
        for (int i = 0; i < row_tiles; ++i) {
          mma::multiply(out[i][j], p[i], v[0], v[1]);
          if (j + 1 < column_tiles) mma::multiply(out[i][j + 1], p[i], v[2], v[3]);
        }
      }
    }
    stage ^= 1;
  }
  mma::wait<0>();
  __syncthreads();  // everybody has read the last factors

  const bool whole = split_count(length, a.heads) == 1;
#pragma unroll
  for (int i = 0; i < owned; ++i) {
    const int row = warp * owned + i;
    if (lane != 0) continue;
    factors[row] = total[i] > 0 ? 1 / total[i] : 0;  // a padding row sees no key
    if (row < rows && !whole)
      w.partials.lse[w.partials.row(token, head + row, split)] = top[i] + log2f(total[i]);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < row_tiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = i * 16 + half * 8 + lane / 4;
      if (row >= rows) continue;
      const float factor = factors[row];
#pragma unroll
      for (int j = 0; j < column_tiles; ++j) {
        const int column = (warp * column_tiles + j) * 8 + lane % 4 * 2;
        if (kind == Entries::latents && column >= a.value) continue;
        const float x = out[i][j][half * 2] * factor, y = out[i][j][half * 2 + 1] * factor;
        if (whole) {
          *reinterpret_cast<__nv_bfloat162*>(a.out.at(token, head + row) + column) =
              __floats2bfloat162_rn(x, y);
        } else {
          *reinterpret_cast<float2*>(w.partials.out + w.partials.row(token, head + row, split) * a.value +
                                     column) = {x, y};
        }
      }
    }
  }
}

template <int column_tiles, int row_tiles, Entries kind>
bool launch(Work& w, int64_t splits, const Context& context) {
  const Layout<row_tiles, kind> layout(w);
  if (layout.end > context.shared_bytes) return false;
  const auto kernel = mma_kernel<column_tiles, row_tiles, kind>;
  w.tiles = static_cast<int>(ceil_div(w.a.heads / w.a.groups, 16 * row_tiles));
  for_token_rounds(w.a.tokens, w.a.heads, w.a.value, splits, context, [&](const Partials& partials) {
    w.partials = partials;
    const dim3 grid(static_cast<unsigned>(partials.tokens), static_cast<unsigned>(partials.splits),
                    static_cast<unsigned>(w.a.groups * w.tiles));
    launch_early(kernel, grid, threads, static_cast<size_t>(layout.end), "attention_paged", context, w);
    if (partials.splits > 1) combine_splits(w.a, partials, context);
  });
  return true;
}

}  // namespace

bool attention_paged_mma(const Paged<__nv_bfloat16>& a, const View& keys, const View& values,
                         const Pages& pages, const Context& context) {
  const bool narrow = Backend::is_narrow_cache(keys.dtype);
  if (!narrow && keys.dtype != DType::bf16) return false;
  const bool latents = !narrow && keys.data == values.data;
  const int64_t bytes = size_of(keys.dtype);
  Work w;
  w.a = a;
  w.keys = static_cast<const char*>(keys.data), w.values = static_cast<const char*>(values.data);
  w.key_page = keys.stride(0) * bytes, w.key_slot = keys.stride(1) * bytes,
  w.key_head = keys.stride(2) * bytes;
  w.value_page = values.stride(0) * bytes, w.value_slot = values.stride(1) * bytes;
  w.value_head = values.stride(2) * bytes;
  w.latent = narrow ? a.value : 0;
  w.fp8 = keys.dtype == DType::f8e4m3;
  const auto aligned = [](int64_t to, std::initializer_list<int64_t> all) {
    return std::all_of(all.begin(), all.end(), [to](int64_t x) { return x % to == 0; });
  };
  const auto address = [](const void* data) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
  };
  if (a.key % (latents ? 16 : 32) != 0 || a.value % (latents ? 16 : 32) != 0 ||
      !aligned(8, {a.q.token, a.q.head}) || !aligned(16, {address(a.q.data)}) ||
      !aligned(2, {a.out.token, a.out.head}) || !aligned(4, {address(a.out.data)}) ||
      !aligned(narrow ? 4 : 16, {address(keys.data), address(values.data), w.key_page, w.key_slot, w.key_head,
                                 w.value_page, w.value_slot, w.value_head})) {
    return false;
  }
  const int64_t splits = most_splits(capacity(keys, pages), a.heads);
  const bool few = a.heads / a.groups <= 16;
  const auto go = [&]<int columns, Entries kind>() {
    return few ? launch<columns, 1, kind>(w, splits, context) : launch<columns, 2, kind>(w, splits, context);
  };
  if (narrow) {
    if (a.value == 512) return go.template operator()<8, Entries::codes>();
    if (a.value == 192) return go.template operator()<3, Entries::codes>();
    return false;
  }
  if (latents) {
    if (a.value <= 64) return go.template operator()<1, Entries::latents>();
    if (a.value <= 128) return go.template operator()<2, Entries::latents>();
    if (a.value <= 192) return go.template operator()<3, Entries::latents>();
    if (a.value <= 256) return go.template operator()<4, Entries::latents>();
    return a.value <= 512 && go.template operator()<8, Entries::latents>();
  }
  if (a.value == 128) return go.template operator()<2, Entries::pairs>();
  return a.value == 64 && go.template operator()<1, Entries::pairs>();
}

}  // namespace latente::cuda
