// Attention of one token over a context of one piece in a cache of latents, from queries and latents as they
// come from their projections to what the last projection takes: absorbed queries, the token's entry of the
// cache, attention and the values' up-projection in one launch. A cluster has a head; each of its blocks has
// 64 columns of the latents (of absorbed queries and of results), some of the keys' scores, and some columns
// of the head's values; what they make of their parts they send one another. All weights and all entries of
// earlier passes are in shared memory before the kernel in front has ended. Elements have the bits that the
// kernels for each of these give them: the same chains of products, and sums in the same order.
#include "cuda/attention_paged_short.cuh"
#include "cuda/few_rows.cuh"
#include "cuda/kernels.h"

namespace latente::cuda {
namespace {

using namespace few_entries;

constexpr int columns = 64;  // of latents, of a block
constexpr int key_groups = piece_keys / warp_keys;
constexpr int most_depth = 512;  // of the values' up-projection
constexpr int first_value_warp = warps / 2;

using QueryWeights = WeightStream<true, 2, true>;
using ValueWeights = WeightStream<false, most_depth / mma::step, true>;

struct Token {
  Work work{};
  const bf16* q = nullptr;  // of the first head
  int64_t q_head = 0;
  RowsWeights w_uk, w_uv;  // a head's is a batch
  bf16* out = nullptr;
  int64_t out_head = 0;
  LatentRows latents;
  int nope = 0, value = 0;  // value: of a head
};

template <int key>
struct TokenShared : Weighing {
  static constexpr int rank = key == 576 ? 512 : 192;
  static constexpr int blocks = rank / columns, groups = (key_groups + blocks - 1) / blocks;
  static constexpr int key_pitch = key * 2 + 16, value_pitch = columns * 2 + 16;
  alignas(128) char keys[groups * warp_keys][key_pitch];  // whole, of some groups of 16
  char values[piece_keys][value_pitch];                   // of all, the block's columns
  char q[key_pitch];
  char attended[row_pitch(rank, mma::step)];
  alignas(16) float scores[piece_keys];
  char x[first_value_warp][row_pitch(128, mma::step)];
  alignas(128) char query_ring[first_value_warp][QueryWeights::bytes];
  // Up to two warps have columns of values where blocks are few.
  static constexpr int value_warps = blocks < 8 ? 2 : 1,
                       value_bytes = rank / mma::step * ValueWeights::stage_bytes;
  alignas(128) char value_ring[value_warps][value_bytes];
  int64_t entries[piece_keys];
  Barrier queries, scored, results;  // that all blocks' parts are here
};

// 16 bytes to another block of the cluster, which count toward the phase of its barrier.
__device__ inline void send(const void* to, unsigned block, const uint4& x, Barrier& done) {
  asm volatile(
      "{\n.reg .b32 to, done;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\n"
      "mapa.shared::cluster.u32 done, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%3, %4, %5, %6}, [done];\n}\n" ::
          "r"(shared_address(to)),
      "r"(shared_address(&done)), "r"(block), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
      : "memory");
}

template <int key>
__global__ void __launch_bounds__(threads, 1) token_kernel(const __grid_constant__ Token p) {
  using Shared = TokenShared<key>;
  constexpr int rank = Shared::rank, rope = key - rank, blocks = Shared::blocks;
  extern __shared__ __align__(128) char memory[];
  auto& s = *reinterpret_cast<Shared*>(memory);
  const Work& work = p.work;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int head = static_cast<int>(blockIdx.x) / blocks, block = static_cast<int>(blockIdx.x) % blocks;
  const int column = block * columns;
  if (thread == 0) {
    for (Barrier* barrier : {&s.queries, &s.scored, &s.results}) barrier->init(1);
    barriers_ready();
    s.queries.expect(rank * 2), s.scored.expect(piece_keys * 4), s.results.expect(rank * 2);
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");  // others may send from here on

  // What is known before the kernel in front has ended: weights, where entries lie, and all of them but the
  // token's own.
  QueryWeights w_uk;
  if (warp < first_value_warp) {
    w_uk.ring = shared_address(s.query_ring[warp]), w_uk.depth = p.nope;
    w_uk.point(0, p.w_uk, head, column + warp * warp_columns);
    w_uk.point(1, p.w_uk, head, column + warp * warp_columns + 8);
    w_uk.begin();
  }
  ValueWeights w_uv;
  const int value_column = (block + (warp - first_value_warp) * blocks) * warp_columns;
  const bool makes_values =
      warp >= first_value_warp && warp < first_value_warp + Shared::value_warps && value_column < p.value;
  if (makes_values) {
    w_uv.ring = shared_address(s.value_ring[warp - first_value_warp]), w_uv.depth = rank;
    w_uv.point(0, p.w_uv, head, value_column);
    w_uv.point(1, p.w_uv, head, value_column + 8);
    w_uv.begin();
  }
  const int end = work.a.position[0] + 1, early = max(end - 1, 0);
  if (thread < early) {
    s.entries[thread] = work.a.page_of(work.a.sequence[0], thread) * work.page_stride +
                        thread % work.a.page * work.entry_stride;
  }
  __syncthreads();
  const auto group_of = [&](int i) { return block + i * blocks; };  // the block's i-th group of keys
  constexpr int chunks = key / 8;
  for (int i = thread; i < Shared::groups * warp_keys * chunks; i += threads) {
    const int row = i / chunks, at = group_of(row / warp_keys) * warp_keys + row % warp_keys;
    if (at < early) {
      mma::copy_async(shared_address(s.keys[row] + i % chunks * 16),
                      work.cache + s.entries[at] + i % chunks * 8, true);
    }
  }
  const int padded = (end + block_keys - 1) / block_keys * block_keys;
  for (int i = thread; i < padded * (columns / 8); i += threads) {
    const int at = i / (columns / 8), chunk = i % (columns / 8);
    char* to = s.values[at] + chunk * 16;
    if (at < early) {
      mma::copy_async(shared_address(to), work.cache + s.entries[at] + column + chunk * 8, true);
    } else if (at >= end) {
      *reinterpret_cast<uint4*>(to) = uint4{};  // beyond the context's end, values must not be NaN
    }
  }
  mma::commit();
  // The last key stands here, if it is one of the block's.
  const int last = max(end - 1, 0), last_group = last / warp_keys;
  char* const own_key =
      last_group % blocks == block ? s.keys[last_group / blocks * warp_keys + last % warp_keys] : nullptr;
  const LatentRows& entry = p.latents;
  const float* angles = entry.table + entry.positions[0] * entry.table_row;
  float cosine = 0, sine = 0;
  if (lane < rope / 2) cosine = angles[lane], sine = angles[rope / 2 + lane];
  const int first = entry.interleaved ? 2 * lane : lane,
            second = entry.interleaved ? first + 1 : rope / 2 + lane;
  uint4 norm_weights[2];
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int at = (k * 32 + lane) * 8;
    norm_weights[k] = at < rank ? *reinterpret_cast<const uint4*>(entry.latent.weight + at) : uint4{};
  }
  bf16* const stored = head == 0 && block == 0 ? entry.entry(0) : nullptr;

  wait_for_earlier_kernels();
  if (warp < first_value_warp) {
    if (lane * 8 < p.nope)
      *reinterpret_cast<uint4*>(s.x[warp] + lane * 16) =
          *reinterpret_cast<const uint4*>(p.q + head * p.q_head + lane * 8);
  } else if (warp == first_value_warp) {  // the latent's norm: norm_rows()'s order
    float x[2][8], squares = 0;
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int at = (k * 32 + lane) * 8;
      if (at >= rank) continue;
      load<8>(entry.latent.x + at, x[k]);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares = fmaf(x[k][j], x[k][j], squares);
    }
    const float mean = warp_sum(squares) / static_cast<float>(rank);
    const float r = 1 / sqrtf(mean + entry.latent.eps);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int at = (k * 32 + lane) * 8;
      if (at >= rank) continue;
      const auto& weight = reinterpret_cast<const Pack<bf16, 8>&>(norm_weights[k]);
      Pack<bf16, 8> y;
#pragma unroll
      for (int j = 0; j < 8; ++j) y.at[j] = narrow<bf16>(x[k][j] * (r * widen(weight.at[j])));
      const auto& bits = reinterpret_cast<const uint4&>(y);
      if (own_key) *reinterpret_cast<uint4*>(own_key + at * 2) = bits;
      if (at / columns == block && end > 0)
        *reinterpret_cast<uint4*>(s.values[last] + at % columns * 2) = bits;
      if (stored) *reinterpret_cast<uint4*>(stored + at) = bits;
    }
  } else if (warp <= first_value_warp + 2) {  // rotary parts
    const bool of_key = warp == first_value_warp + 1;
    const bf16* from = of_key ? entry.rotary : p.q + head * p.q_head + p.nope;
    if (lane < rope / 2) {
      float a = widen(from[first]), b = widen(from[second]);
      rotate(a, b, cosine, sine);
      const auto put = [&](bf16* to) { to[first] = narrow<bf16>(a), to[second] = narrow<bf16>(b); };
      if (!of_key) put(reinterpret_cast<bf16*>(s.q) + rank);
      if (of_key && own_key) put(reinterpret_cast<bf16*>(own_key) + rank);
      if (of_key && stored) put(stored + rank);
    }
  }
  mma::wait<0>();
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (warp < first_value_warp) {  // absorbed queries: columns lane / 4 and 8 more of the warp's
    __syncwarp();
    float sums[4] = {};
    w_uk.multiply(shared_address(s.x[warp]), 0, 1, sums);
    unsigned half[2][4];  // pairs of columns, in all lanes
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float low = __shfl_sync(whole_warp, sums[2 * h], 8 * i);
        const float high = __shfl_sync(whole_warp, sums[2 * h], 8 * i + 4);
        half[h][i] = pack_bf16(low, high);
      }
    }
    if (lane < 2 * blocks) {
      const int h = lane % 2;
      send(s.q + (column + warp * warp_columns + h * 8) * 2, static_cast<unsigned>(lane / 2),
           h == 0 ? uint4{half[0][0], half[0][1], half[0][2], half[0][3]}
                  : uint4{half[1][0], half[1][1], half[1][2], half[1][3]},
           s.queries);
    }
  }
  __syncthreads();  // entries and rotary parts are there

  // Scores: keys lane / 4 and 8 more of a warp's sixteen.
  if (warp < Shared::groups && group_of(warp) < key_groups) {
    const int first_key = group_of(warp) * warp_keys;
    float sums[4] = {};
    s.queries.wait(0);
    if (first_key < end) {
      const unsigned keys = shared_address(s.keys[warp * warp_keys + lane % 16]) + lane / 16 * 16;
      const unsigned q = shared_address(s.q) + lane / 8 * 16;
      constexpr int steps = key / 16, ahead = 4;
      unsigned k[ahead][4], x[ahead / 2][4];
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        mma::load_matrices<false>(k[i], keys + static_cast<unsigned>(i * 32));
        if (i % 2 == 0) mma::load_matrices<false>(x[i / 2], q + static_cast<unsigned>(i * 32));
      }
#pragma unroll
      for (int i = 0; i < steps; ++i) {
        const unsigned(&two)[4] = x[i % ahead / 2];
        mma::multiply(sums, k[i % ahead], two[i % 2 * 2], two[i % 2 * 2 + 1]);
        if (i + ahead >= steps) continue;
        mma::load_matrices<false>(k[i % ahead], keys + static_cast<unsigned>((i + ahead) * 32));
        if (i % 2 == 1)
          mma::load_matrices<false>(x[i % ahead / 2], q + static_cast<unsigned>((i - 1 + ahead) * 32));
      }
    }
    float four[4];
    const int chunk = lane % 4;  // keys chunk · 4 and the next three
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float low = __shfl_sync(whole_warp, sums[0], chunk % 2 * 16 + i * 4);
      const float high = __shfl_sync(whole_warp, sums[2], chunk % 2 * 16 + i * 4);
      four[i] = chunk < 2 ? low : high;
    }
    if (lane < 4 * blocks) {
      send(s.scores + first_key + chunk * 4, static_cast<unsigned>(lane / 4),
           {__float_as_uint(four[0]), __float_as_uint(four[1]), __float_as_uint(four[2]),
            __float_as_uint(four[3])},
           s.scored);
    }
  }
  unsigned v[tiles / 4][4];
#pragma unroll
  for (int i = 0; i < tiles / 4; ++i) {
    if (i * 32 < padded) mma::load_matrices<true>(v[i], shared_address(s.values[i * 32 + lane]) + warp * 16);
  }
  s.scored.wait(0);
  float score[2][4];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) score[t][i] = s.scores[warp * warp_keys + t * 8 + lane % 4 * 2 + i % 2];
  }
  const Statistics known = make_weights(s, score, end, work.a.scale);

  float out[4] = {};
  add_values(shared_address(s.weights[lane % 16]) + lane / 16 * 16, known, v, end, out);
  const float sum = known.sum(s, 0);
  const float inverse = sum != 0 ? 1 / sum : 0;
  const unsigned pair = inverse != 0 ? pack_bf16(out[0] * inverse, out[1] * inverse) : 0;
  uint4 eight;  // the warp's columns
  eight.x = __shfl_sync(whole_warp, pair, 0), eight.y = __shfl_sync(whole_warp, pair, 1);
  eight.z = __shfl_sync(whole_warp, pair, 2), eight.w = __shfl_sync(whole_warp, pair, 3);
  if (lane < blocks)
    send(s.attended + (column + warp * 8) * 2, static_cast<unsigned>(lane), eight, s.results);

  // Nobody leaves before all that is sent to it is there.
  s.results.wait(0);
  if (!makes_values) return;
  float sums[4] = {};
  w_uv.multiply(shared_address(s.attended), 0, 1, sums);
  if (lane % 4 != 0) return;
  bf16* to = p.out + head * p.out_head + value_column + lane / 4;
  to[0] = narrow<bf16>(sums[0]), to[8] = narrow<bf16>(sums[2]);
}

template <int key>
void launch(const Token& p, const Context& context) {
  constexpr unsigned blocks = TokenShared<key>::blocks;
  launch_early_in_clusters(token_kernel<key>, dim3(static_cast<unsigned>(p.work.a.heads) * blocks), blocks,
                           threads, sizeof(TokenShared<key>), "attend_entries", context, p);
}

}  // namespace

bool attend_entries(const LatentEntries& e, View q, View w_uk, bool transpose, View keys, const Pages& pages,
                    double scale, View w_uv, View folded, View attended, View out, const Context& context) {
  const int64_t rank = e.latent[1], rope = e.table[1], nope = q[2] - rope, value = w_uv[1];
  const bool large = rank == 512 && rope == 64, small = rank == 192 && rope == 32;
  const auto plain = [](const View& w) { return w.dtype == DType::bf16 && !is_coded(w); };
  if (context.compute_capability != 90 || q[0] != 1 || !(large || small) || !transpose || !plain(w_uk) ||
      !plain(w_uv) || !plain(q) || !plain(out) || keys.dtype != DType::bf16 || keys[2] != 1 ||
      !in_packs(mma::chunk, {columns_of(q, 0, nope), w_uk, w_uv, keys}) || nope > 2 * mma::step ||
      nope % mma::step != 0 ||  // queries are not filled up with zeros
      value % warp_columns != 0 || capacity(keys, pages) > piece_keys) {
    return false;
  }
  const int64_t blocks = rank / columns;
  if (value >
          (large ? TokenShared<576>::value_warps : TokenShared<224>::value_warps) * blocks * warp_columns ||
      q[1] * blocks > context.multiprocessors)
    return false;
  const auto latents = latent_rows(e);
  if (!latents) return false;
  Token p;
  p.work = {paged<__nv_bfloat16>(folded, keys, pages, scale, attended), device_data<__nv_bfloat16>(keys),
            keys.stride(0), keys.stride(1)};
  p.q = q.as<bf16>(), p.q_head = q.stride(1);
  p.w_uk = rows_weights(w_uk), p.w_uv = rows_weights(w_uv);
  p.out = out.as<bf16>(), p.out_head = out.stride(1);
  p.latents = *latents;
  p.nope = static_cast<int>(nope), p.value = static_cast<int>(value);
  large ? launch<576>(p, context) : launch<224>(p, context);
  return true;
}

}  // namespace latente::cuda
