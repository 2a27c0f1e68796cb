// Attention of a few tokens over contexts of some pieces in a cache of latents, in one launch: a cluster has
// 16 heads of a token, each of its blocks a piece of 128 keys, as attention_paged_short_sm90.cu has the only
// one. Results of pieces go through distributed shared memory, and each block puts a part of them together,
// rounded and added as attention_paged_sm90.cu rounds and adds them: the same bits.
#include "cuda/attention_paged_short.cuh"
#include "cuda/attention_sm90.h"
#include "cuda/launch.cuh"

namespace latente::cuda {
namespace {

using namespace few_entries;

constexpr int most_pieces = 16;  // blocks of a cluster

// The columns of values that a block has: all, or one of `Parts` equal parts. Of these, what has a unit of
// its own as a result of a piece (RowOfPiece in attention_paged_sm90.cu: a half of the values), gives each
// warp `First` or `Second` tiles of eight. Of a row two neighbouring columns are a word; those of a lane's
// tiles in a half lie side by side, and a lane's beside the next one's.
template <int Key, int First, int Second, int Parts>
struct ValueShape {
  static constexpr int key = Key, first = First, second = Second, tiles = First + Second, parts = Parts;
  static constexpr int columns = warps * tiles * 8, first_columns = warps * first * 8;
  static constexpr int halves = Second > 0 ? 2 : 1;
  static constexpr int row_words = columns / 2, first_words = first_columns / 2, words = rows * row_words;

  // Of a warp's tile.
  __device__ static int column(int warp, int t) {
    return t < first ? (warp * first + t) * 8 : first_columns + (warp * second + t - first) * 8;
  }
  // The first of a word's columns.
  __device__ static int column_of(int word) {
    const auto within = [](int at, int wide) {
      return at / (4 * wide) * 8 * wide + at % wide * 8 + at % (4 * wide) / wide * 2;
    };
    if constexpr (second == 0) return within(word, first);
    return word < first_words ? within(word, first) : first_columns + within(word - first_words, second);
  }
};

template <class L>
struct Shared : Piece<L::key> {
  float most[L::halves][warps][rows];    // magnitudes in the columns of a warp
  float4 statistics[most_pieces][rows];  // RowOfPiece
  Barrier early_full, late_full, exchanged;
  static_assert(L::words * 4 <= sizeof(Piece<L::key>::q));  // what is received stands in place of the queries
};

__device__ unsigned in_block(unsigned address, int block) {
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(block));
  return there;
}
// Words to another block's shared memory; they count toward the phase of its barrier.
__device__ void send(unsigned to, unsigned barrier, const uint32_t (&x)[4]) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(to),
      "r"(barrier), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
      : "memory");
}
__device__ void send(unsigned to, unsigned barrier, const uint32_t (&x)[2]) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%2, %3}, [%1];" ::"r"(to),
               "r"(barrier), "r"(x[0]), "r"(x[1])
               : "memory");
}
__device__ void send(unsigned to, unsigned barrier, const uint32_t (&x)[1]) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %2, [%1];" ::"r"(to),
               "r"(barrier), "r"(x[0])
               : "memory");
}

__device__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// Until the first phase of a barrier that other blocks' words count toward has ended.
__device__ void wait_for_cluster(const Barrier& barrier) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], 0;\n"
      "@!p bra again;\n}\n" ::"r"(shared_address(&barrier))
      : "memory");
}

// The block's share of a row tile's results, `share` words of each piece: added as
// attention_paged_combine_sm90.cu adds them.
template <class L, int most>
__device__ void combine(const Shared<L>& s, const Rows<__nv_bfloat16>& out, int token, int head, int heads,
                        int column, int pieces, int share) {
  const char* const from = s.q[0];
  const int first = static_cast<int>(blockIdx.x) * share;
  for (int i = static_cast<int>(threadIdx.x) * 2; i < share; i += threads * 2) {
    const int r = (first + i) / L::row_words, word = (first + i) % L::row_words;
    if (r >= heads) return;
    float weight[most], sums[most], top = -INFINITY;
#pragma unroll
    for (int j = 0; j < most; ++j) {
      weight[j] = j < pieces ? s.statistics[j][r].x : -INFINITY;
      top = fmaxf(top, weight[j]);
    }
#pragma unroll
    for (int j = 0; j < most; ++j) {
      weight[j] = exp2f(weight[j] - top);
      sums[j] = j < pieces ? __fmul_rn(weight[j], s.statistics[j][r].y) : 0;  // no part of an fma
    }
#pragma unroll
    for (int step = most / 2; step > 0; step /= 2) {
#pragma unroll
      for (int j = 0; j < most / 2; ++j) {
        if (j < step) sums[j] += sums[j + step];
      }
    }
    float x[4] = {};
#pragma unroll
    for (int j = 0; j < most; ++j) {
      if (j >= pieces) continue;
      const float unit = word < L::first_words ? s.statistics[j][r].z : s.statistics[j][r].w;
      const float factor = weight[j] * unit;
      const uint2 packed = *reinterpret_cast<const uint2*>(from + (j * share + i) * 4);
      const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&packed.x)),
                   high = __half22float2(*reinterpret_cast<const __half2*>(&packed.y));
      x[0] = fmaf(factor, low.x, x[0]), x[1] = fmaf(factor, low.y, x[1]);
      x[2] = fmaf(factor, high.x, x[2]), x[3] = fmaf(factor, high.y, x[3]);
    }
    const float inverse = 1 / sums[0];
    __nv_bfloat16* const to = out.at(token, head + r) + column;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      *reinterpret_cast<uint32_t*>(to + L::column_of(word + c)) =
          pack_bf16(x[2 * c] * inverse, x[2 * c + 1] * inverse);
    }
  }
}

template <class L>
__global__ void __launch_bounds__(threads, 1) pieces_kernel(const __grid_constant__ Work p) {
  constexpr int key = L::key;
  extern __shared__ __align__(128) char memory[];
  auto& s = *reinterpret_cast<Shared<L>*>(memory);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int token = static_cast<int>(blockIdx.y), piece = static_cast<int>(blockIdx.x),
            blocks = static_cast<int>(gridDim.x);
  const int head = static_cast<int>(blockIdx.z) / L::parts * rows,
            column = static_cast<int>(blockIdx.z) % L::parts * L::columns;
  if (thread == 0) {
    s.early_full.init(1);
    s.late_full.init(1);
    s.exchanged.init(1);
    barriers_ready();
  }
  // What is known before the kernel in front has ended: where entries lie, and all of them but those of this
  // pass, whose tokens follow one another.
  const int length = p.a.position[token] + 1, sequence = p.a.sequence[token];
  const int pieces = max((length + piece_keys - 1) / piece_keys, 1), begin = piece * piece_keys;
  const int share = L::words / blocks;
  __syncthreads();
  if (thread == 0 && pieces > 1)
    s.exchanged.expect(pieces * (share * 4 + rows * static_cast<int>(sizeof(float4))));
  const int heads = min(rows, p.a.heads - head);
  auto put_together = [&] {
    wait_for_cluster(s.exchanged);
    if (pieces <= 8) {
      combine<L, 8>(s, p.a.out, token, head, heads, column, pieces, share);
    } else {
      combine<L, 16>(s, p.a.out, token, head, heads, column, pieces, share);
    }
  };
  if (piece >= pieces) {
    if (pieces == 1) return;
    cluster_arrive();
    wait_for_earlier_kernels();
    cluster_wait();
    put_together();
    return;
  }
  const int end = min(length - begin, piece_keys), early = min(max(length - p.a.tokens - begin, 0), end);
  const __nv_bfloat16* const own = thread < end ? p.entry(sequence, begin + thread) : nullptr;
  if (thread == 0) s.early_full.expect(early * key * 2);
  if (thread < early) copy_row(s.keys[thread], own, key * 2, s.early_full);
  // Beyond the context's end, values must not be NaN.
  const int padded = (end + block_keys - 1) / block_keys * block_keys;
  constexpr int value_chunks = L::columns / 8;
  for (int i = end * value_chunks + thread; i < padded * value_chunks; i += threads)
    *reinterpret_cast<uint4*>(s.keys[i / value_chunks] + column * 2 + i % value_chunks * 16) = uint4{};
  __syncthreads();

  wait_for_earlier_kernels();
  if (thread == 0) s.late_full.expect((heads + end - early) * key * 2);
  if (thread >= early && thread < end) copy_row(s.keys[thread], own, key * 2, s.late_full);
  const int query = thread - piece_keys;
  if (query >= 0 && query < heads) copy_row(s.q[query], p.a.q.at(token, head + query), key * 2, s.late_full);

  const int first_key = warp * warp_keys;
  const bool late = min(first_key + warp_keys, end) > early;
  Keys<key> k;
  s.early_full.wait(0);
  if (!late) k.read(s);
  s.late_full.wait(0);
  if (late) k.read(s);
  float score[2][4] = {};
  if (first_key < end) k.multiply(s, score);
  cluster_arrive();  // the queries have been read

  unsigned v[L::tiles][piece_keys / 32][4];
  auto read_values = [&](int t, int i) {
    mma::load_matrices<true>(v[t][i],
                             mma::shared_address(s.keys[i * 32 + lane] + (column + L::column(warp, t)) * 2));
  };
#pragma unroll
  for (int t = 0; t < L::tiles; ++t) read_values(t, 0), read_values(t, 1);
  const Statistics known = make_weights(s, score, end, p.a.scale);

  float out[L::tiles][4] = {};
  const unsigned weights = mma::shared_address(s.weights[lane % 16] + lane / 16 * 16);
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    if (b * block_keys >= end) break;
    unsigned w[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      mma::load_matrices<false>(w[i], weights + static_cast<unsigned>((b * 4 + i) * 32));
    if (b > 0) {
#pragma unroll
      for (int t = 0; t < L::tiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[t][i] *= known.keep[i / 2][b];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int t = 0; t < L::tiles; ++t) {
        if (b == 0 && i % 2 == 0 && padded > block_keys) read_values(t, 2 + i / 2);
        mma::multiply(out[t], w[i], v[t][b * 2 + i / 2][i % 2 * 2], v[t][b * 2 + i / 2][i % 2 * 2 + 1]);
      }
    }
  }

  const float sum[2] = {known.sum(s, 0), known.sum(s, 1)};
  const int row = lane / 4;
  if (pieces == 1) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (row + 8 * i >= heads) continue;
      const float inverse = sum[i] != 0 ? 1 / sum[i] : 0;
      __nv_bfloat16* const to = p.a.out.at(token, head + row + 8 * i) + column + lane % 4 * 2;
#pragma unroll
      for (int t = 0; t < L::tiles; ++t) {
        *reinterpret_cast<uint32_t*>(to + L::column(warp, t)) =
            inverse != 0 ? pack_bf16(out[t][2 * i] * inverse, out[t][2 * i + 1] * inverse) : 0;
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float most[2] = {0, 0};
#pragma unroll
    for (int t = 0; t < L::tiles; ++t) {
      float& of = most[t >= L::first];
      of = fmaxf(of, fmaxf(fabsf(out[t][2 * i]), fabsf(out[t][2 * i + 1])));
    }
#pragma unroll
    for (int half = 0; half < L::halves; ++half) {
      most[half] = fmaxf(most[half], __shfl_xor_sync(whole_warp, most[half], 1));
      most[half] = fmaxf(most[half], __shfl_xor_sync(whole_warp, most[half], 2));
      if (lane % 4 == 0) s.most[half][warp][row + 8 * i] = most[half];
    }
  }
  __syncthreads();
  cluster_wait();
  const unsigned exchanged = shared_address(&s.exchanged), received = shared_address(s.q);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = row + 8 * i;
    float unit[2] = {};
#pragma unroll
    for (int half = 0; half < L::halves; ++half) {
      float most = s.most[half][0][r];
#pragma unroll
      for (int w = 1; w < warps; ++w) most = fmaxf(most, s.most[half][w][r]);
      const PieceUnit its(most);
      const float factor = its.inverse();
      unit[half] = its.value();
      const auto give = [&](auto first_tile, auto tiles_of_half) {
        constexpr int tile = decltype(first_tile)::value, wide = decltype(tiles_of_half)::value;
        uint32_t packed[wide];
#pragma unroll
        for (int c = 0; c < wide; ++c)
          packed[c] = pack_half(out[tile + c][2 * i] * factor, out[tile + c][2 * i + 1] * factor);
        const int word = r * L::row_words + (tile > 0 ? L::first_words : 0) + (warp * 4 + lane % 4) * wide;
        const int owner = word * blocks / L::words, at = piece * share + word - owner * share;
        send(in_block(received + static_cast<unsigned>(at * 4), owner), in_block(exchanged, owner), packed);
      };
      if (half == 0) {
        give(std::integral_constant<int, 0>{}, std::integral_constant<int, L::first>{});
      } else if constexpr (L::second > 0) {
        give(std::integral_constant<int, L::first>{}, std::integral_constant<int, L::second>{});
      }
    }
    if (lane % 4 != 0) continue;
    const uint32_t statistics[4] = {__float_as_uint(known.maximum[i]), __float_as_uint(sum[i]),
                                    __float_as_uint(unit[0]), __float_as_uint(unit[1])};
    for (int other = warp; other < blocks; other += warps) {
      send(in_block(shared_address(&s.statistics[piece][r]), other), in_block(exchanged, other), statistics);
    }
  }
  put_together();
}

// False where so many clusters are not on the device at a time.
template <class L>
bool launch(const Work& p, dim3 grid, const Context& context) {
  const auto kernel = pieces_kernel<L>;
  const size_t bytes = sizeof(Shared<L>);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "attention_paged");
  if (grid.x > 8)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "attention_paged");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {grid.x, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int most = 0;
  check(cudaOccupancyMaxActiveClusters(&most, kernel, &config), "attention_paged");
  if (int64_t{grid.y} * grid.z > most) return false;
  launch_early_in_clusters(kernel, grid, grid.x, threads, bytes, "attention_paged", context, p);
  return true;
}

}  // namespace

bool attention_paged_pieces_sm90(const Paged<__nv_bfloat16>& a, const View& keys, const Pages& pages,
                                 const Context& context) {
  unsigned blocks = 1;
  while (blocks * piece_keys < capacity(keys, pages)) blocks *= 2;
  if (blocks > most_pieces) return false;
  const auto tokens = static_cast<unsigned>(a.tokens), tiles = static_cast<unsigned>(ceil_div(a.heads, rows));
  const int64_t all = int64_t{blocks} * tokens * tiles, most = context.multiprocessors;
  if (all > most) return false;
  const Work p{a, device_data<__nv_bfloat16>(keys), keys.stride(0), keys.stride(1)};
  if (a.key == 224) return launch<ValueShape<224, 2, 1, 1>>(p, {blocks, tokens, tiles}, context);
  // Half the values a block takes less time where reading the keys twice is little.
  if (8 * all <= most) return launch<ValueShape<576, 4, 0, 2>>(p, {blocks, tokens, 2 * tiles}, context);
  return launch<ValueShape<576, 4, 4, 1>>(p, {blocks, tokens, tiles}, context);
}

int64_t short_table_sm90(int64_t tokens, int64_t heads, const View& keys, int64_t entries,
                         const Context& context) {
  constexpr int64_t most_tokens = 16;
  if (tokens > most_tokens || (keys[3] != 576 && keys[3] != 224)) return 0;
  for (const int64_t named : {int64_t{piece_keys}, int64_t{8 * piece_keys}, int64_t{16 * piece_keys}}) {
    const int64_t blocks = named / piece_keys * tokens * ceil_div(heads, rows);
    if (entries <= named && named % keys[1] == 0 && blocks <= context.multiprocessors) return named;
  }
  return 0;
}

}  // namespace latente::cuda
