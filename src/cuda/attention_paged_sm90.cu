// Attention over a cache of latents on Hopper. A block has two warps that copy tiles and two warpgroups that
// compute: 64 rows (heads of one token, or of neighbouring tokens of a sequence) against 64 keys at a time.
// The warpgroups take turns at the scores of a block of keys, and each holds half of the results' columns.
#include "cuda/attention_paged.cuh"
#include "cuda/attention_sm90.h"
#include "cuda/hopper.cuh"

namespace latente::cuda {
namespace {

constexpr int tile_rows = 64, block_keys = 64, tile_bytes = 64 * 128;
constexpr int buffers = 2, parts = 3;  // a buffer is waited for in parts, so that scores can begin early
constexpr int threads = 384;

// Key width in tiles of 64 columns and in steps of 16; tiles of values of either warpgroup.
template <int Tiles, int Steps, int First, int Second>
struct LatentShape {
  static constexpr int tiles = Tiles, steps = Steps, first = First, second = Second;
};

struct Shared {
  Barrier q_full, q_empty, full[buffers][parts], empty[buffers];
  // What the warpgroups tell each other of their rows: maxima of a block, sums of a unit. In turns, so that
  // one is read while the next is written.
  float of_rows[2][2][tile_rows];
};

template <class L>
struct Layout {
  static constexpr int q = 0, kv = L::tiles * tile_bytes, kv_bytes = L::tiles * tile_bytes;
  static constexpr int p = kv + buffers * kv_bytes, shared = p + tile_bytes;
  static constexpr int bytes = shared + static_cast<int>(sizeof(Shared)) + 1024;  // to align
  static_assert(bytes <= 227 * 1024);
};

struct Work {
  Paged<__nv_bfloat16> a;
  Partials partials;
  int token_rows;   // rows of a token in a tile: its heads, a multiple of 8
  int tile_tokens;  // tokens that share a tile, if they can
  int head_blocks;  // of a token with more heads than a tile has rows
  int box_keys;     // keys that one copy brings
};

// A piece of the context of the tokens [token, token + count) of one sequence.
struct Unit {
  int token, count, head, begin, end, split;
};

// The tokens that stand in one tile with `token`, if it is their first: of one sequence, cut alike. 0 if it
// is not.
__device__ int tokens_from(const Work& w, int token, int& length) {
  const int first = w.partials.first_token, in_group = (token - first) % w.tile_tokens;
  const int sequence = w.a.sequence[token], size = split_keys(w.a.position[token] + 1, w.a.heads);
  auto alike = [&](int t) {
    return w.a.sequence[t] == sequence && split_keys(w.a.position[t] + 1, w.a.heads) == size;
  };
  if (in_group > 0 && alike(token - 1)) return 0;
  const int end = min(token - in_group + w.tile_tokens, first + w.partials.tokens);
  length = w.a.position[token] + 1;
  int t = token + 1;
  for (; t < end && alike(t); ++t) length = max(length, w.a.position[t] + 1);
  return t - token;
}

// use(unit) for each unit of this block; called by whole warps.
template <class Use>
__device__ void for_units(const Work& w, const Use& use) {
  const int lane = static_cast<int>(threadIdx.x) % 32, grid = static_cast<int>(gridDim.x);
  const int per_split = w.partials.tokens * w.head_blocks, units = per_split * w.partials.splits;
  // In each round the blocks move on by one: where only every second token begins a tile, say, these would
  // otherwise all fall to the same blocks.
  for (int round = lane; (round - lane) * grid < units; round += 32) {
    const int own = round * grid + (static_cast<int>(blockIdx.x) + round) % grid;
    Unit unit{};
    bool real = false;
    if (own < units) {
      unit.split = own / per_split;
      unit.token = w.partials.first_token + own % per_split / w.head_blocks;
      unit.head = own % w.head_blocks * tile_rows;
      int length = 0;
      unit.count = tokens_from(w, unit.token, length);
      const int size = split_keys(length, w.a.heads);
      unit.begin = unit.split * size;
      unit.end = min(length, unit.begin + size);
      real = unit.count > 0 && (unit.split == 0 || unit.begin < length);
    }
    for (unsigned left = __ballot_sync(whole_warp, real); left; left &= left - 1) {
      const int from = __ffs(static_cast<int>(left)) - 1;
      Unit chosen;
      chosen.token = __shfl_sync(whole_warp, unit.token, from);
      chosen.count = __shfl_sync(whole_warp, unit.count, from);
      chosen.head = __shfl_sync(whole_warp, unit.head, from);
      chosen.begin = __shfl_sync(whole_warp, unit.begin, from);
      chosen.end = __shfl_sync(whole_warp, unit.end, from);
      chosen.split = __shfl_sync(whole_warp, unit.split, from);
      use(chosen);
    }
  }
}

// Which buffer a block of keys stands in, and which time it is used.
struct Turn {
  int buffer = 0, phase = 0;
  __device__ void next() {
    buffer ^= 1;
    phase ^= buffer == 0;
  }
};

// What the kernel in front wrote, queries and the newest entries, is first read behind this. Which tokens and
// pages there are comes with a plan, and none of its kernels writes it: that is read before.
__device__ void wait_once(bool& waited) {
  if (waited) return;
  cudaGridDependencySynchronize();
  cudaTriggerProgrammaticLaunchCompletion();  // whoever comes next waits for this kernel's end itself
  waited = true;
}

template <class L>
__device__ void copy_queries(const Work& w, const CUtensorMap& map, char* memory, Shared& s) {
  const int lane = static_cast<int>(threadIdx.x) % 32, heads = min(w.token_rows, tile_rows);
  int phase = 0;
  bool waited = false;
  for_units(w, [&](const Unit& u) {
    wait_once(waited);
    if (lane == 0) {
      s.q_empty.wait(phase ^ 1);
      s.q_full.expect(u.count * L::tiles * min(w.a.heads, tile_rows) * 128);
      for (int j = 0; j < L::tiles; ++j) {
        for (int t = 0; t < u.count; ++t) {
          copy_tile(memory + Layout<L>::q + j * tile_bytes + t * heads * 128, &map, s.q_full,
                    j * tile_columns, u.head, u.token + t);
        }
      }
      phase ^= 1;
    }
  });
  wait_once(waited);
}

template <class L>
__device__ void copy_keys(const Work& w, const CUtensorMap& map, char* memory, Shared& s) {
  Turn turn;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  bool waited = false;
  for_units(w, [&](const Unit& u) {
    const int sequence = w.a.sequence[u.token];
    for (int at = u.begin; at < u.end; at += block_keys) {
      // The pages of this block, a lane each.
      const int boxes = (min(block_keys, u.end - at) + w.box_keys - 1) / w.box_keys;
      const int key = at + lane * w.box_keys;
      const int page = lane < boxes ? static_cast<int>(w.a.page_of(sequence, key)) : 0;
      wait_once(waited);
      if (lane == 0) s.empty[turn.buffer].wait(turn.phase ^ 1);
      __syncwarp();
      char* to = memory + Layout<L>::kv + turn.buffer * Layout<L>::kv_bytes;
      for (int part = 0; part < parts; ++part) {
        const int first = L::tiles * part / parts, last = L::tiles * (part + 1) / parts;
        if (lane == 0) s.full[turn.buffer][part].expect(boxes * (last - first) * w.box_keys * 128);
        __syncwarp();
        if (lane < boxes) {
          for (int j = first; j < last; ++j) {
            copy_tile(to + j * tile_bytes + lane * w.box_keys * 128, &map, s.full[turn.buffer][part],
                      j * tile_columns, key % w.a.page, page);
          }
        }
      }
      turn.next();
    }
  });
  wait_once(waited);
}

// One warpgroup's share: `half` says which, values its tiles of the results' columns.
template <class L, int values>
__device__ void compute_units(const Work& w, int half, char* memory, Shared& s) {
  constexpr int both = 256, columns = values * tile_columns;
  const int first_column = half * L::first * tile_columns;
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;  // and row + 8
  Turn turn;
  int q_phase = 0, parity = 0;
  float out[columns / 2], score[16];

  for_units(w, [&](const Unit& u) {
    const int blocks = (u.end - u.begin + block_keys - 1) / block_keys;
    // The last key that the thread's two rows attend to.
    int last[2], least = INT_MAX;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = (row + 8 * i) / w.token_rows;
      last[i] = t < u.count ? w.a.position[u.token + t] : -1;
    }
    for (int t = 0; t < u.count; ++t) least = min(least, w.a.position[u.token + t]);

    auto begin_scores = [&](const Turn& of) {
      const char* keys = memory + Layout<L>::kv + of.buffer * Layout<L>::kv_bytes + half * 32 * 128;
      products_begin();
#pragma unroll
      for (int step = 0; step < L::steps; ++step) {
        if (step == 0) s.full[of.buffer][0].wait(of.phase);
        if (step == 4 * (L::tiles / parts)) s.full[of.buffer][1].wait(of.phase);
        if (step == 4 * (L::tiles * 2 / parts)) s.full[of.buffer][2].wait(of.phase);
        const int offset = step / 4 * tile_bytes + step % 4 * 32;
        wgmma<0>(score, rows_operand(memory + Layout<L>::q + offset), rows_operand(keys + offset), step > 0);
      }
      products_commit();
    };
    auto release = [&] {
      if (lane == 0) s.empty[turn.buffer].arrive();
    };

    s.q_full.wait(q_phase);
    q_phase ^= 1;
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    if (blocks > 0) {
      begin_scores(turn);
      products_wait<0>();
    }
    for (int n = 0; n < blocks; ++n) {
      const int at = u.begin + n * block_keys;
      char* const kv = memory + Layout<L>::kv + turn.buffer * Layout<L>::kv_bytes;
      if (n == blocks - 1 && lane == 0) s.q_empty.arrive();
      // Nothing has been copied to, or whatever a page holds, beyond the context's end: as values these rows
      // must not be NaN.
      if (at + block_keys > u.end) {
        const int valid = u.end - at;
        for (int i = half * 128 + thread; i < (block_keys - valid) * (L::first + L::second) * 8; i += both) {
          const int piece = i % 8, tile = i / 8 % (L::first + L::second);
          const int r = valid + i / 8 / (L::first + L::second);
          *reinterpret_cast<uint4*>(kv + tile * tile_bytes + r * 128 + piece * 16) = uint4{};
        }
        fence_shared_writes();
      }
      if (at + block_keys - 1 > least) {
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          const int key = at + half * 32 + i / 4 * 8 + lane % 4 * 2 + i % 2;
          if (key > last[i / 2 % 2]) score[i] = -INFINITY;
        }
      }
      float keep[2], top[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        top[i] = fmaxf(score[2 * i], score[2 * i + 1]);
#pragma unroll
        for (int c = 4; c < 16; c += 4) top[i] = fmaxf(top[i], fmaxf(score[c + 2 * i], score[c + 2 * i + 1]));
        top[i] = fmaxf(top[i], __shfl_xor_sync(whole_warp, top[i], 1));
        top[i] = fmaxf(top[i], __shfl_xor_sync(whole_warp, top[i], 2)) * w.a.scale;
        if (lane % 4 == 0) s.of_rows[parity][half][row + 8 * i] = top[i];
      }
      sync_threads(1, both);
      uint32_t p[8];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = row + 8 * i;
        top[i] = fmaxf(maximum[i], fmaxf(top[i], s.of_rows[parity][half ^ 1][r]));
        const float base = top[i] == -INFINITY ? 0 : top[i];
        keep[i] = fast_exp2(maximum[i] - base);
        maximum[i] = top[i];
        float total = 0;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float low = fast_exp2(fmaf(score[4 * c + 2 * i], w.a.scale, -base));
          const float high = fast_exp2(fmaf(score[4 * c + 2 * i + 1], w.a.scale, -base));
          total += low + high;
          p[2 * c + i] = pack_bf16(low, high);
          // The block of probabilities as a tile: [row, key].
          *reinterpret_cast<uint32_t*>(memory + Layout<L>::p + r * 128 + ((half * 4 + c ^ r % 8) << 4) +
                                       lane % 4 * 4) = p[2 * c + i];
        }
        sum[i] = sum[i] * keep[i] + total;  // of this thread's keys
      }
      fence_shared_writes();
      if (!__all_sync(whole_warp, keep[0] == 1 && keep[1] == 1)) {
#pragma unroll
        for (int i = 0; i < columns / 2; i += 4) {
          out[i] *= keep[0], out[i + 1] *= keep[0];
          out[i + 2] *= keep[1], out[i + 3] *= keep[1];
        }
      }
      // The keys of this warpgroup, then the other's.
      const uint64_t value_tiles = columns_operand(kv + half * L::first * tile_bytes, tile_bytes);
      products_begin();
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint32_t own[4] = {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]};
        wgmma<1>(out, own, value_tiles + (2 * half + step) * columns_step, n > 0 || step > 0);
      }
      products_commit();
      sync_threads(2, both);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int other = 2 * (half ^ 1) + step;
        wgmma<1>(out, rows_operand(memory + Layout<L>::p) + other * rows_step,
                 value_tiles + other * columns_step, 1);
      }
      products_commit();
      if (n + 1 < blocks) {
        Turn after = turn;
        after.next();
        begin_scores(after);
        products_wait<1>();
        release();
        products_wait<0>();
      } else {
        products_wait<0>();
        release();
      }
      turn.next();
      parity ^= 1;
    }
    if (blocks == 0 && lane == 0) s.q_empty.arrive();

#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(whole_warp, sum[i], 1);
      sum[i] += __shfl_xor_sync(whole_warp, sum[i], 2);
      if (lane % 4 == 0) s.of_rows[parity][half][row + 8 * i] = sum[i];
    }
    sync_threads(3, both);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = row + 8 * i, t = r / w.token_rows, head = u.head + r % w.token_rows;
      if (t >= u.count || head >= w.a.heads) continue;
      const int token = u.token + t, length = w.a.position[token] + 1;
      if (u.split >= split_count(length, w.a.heads)) continue;  // its context ends before this piece
      const float total = s.of_rows[parity][0][r] + s.of_rows[parity][1][r];
      const float inverse = total != 0 ? 1 / total : 0;
      const int column = first_column + lane % 4 * 2;
      if (split_count(length, w.a.heads) == 1) {
        __nv_bfloat16* to = w.a.out.at(token, head) + column;
#pragma unroll
        for (int c = 0; c < columns / 8; ++c) {
          const float x = out[4 * c + 2 * i], y = out[4 * c + 2 * i + 1];
          *reinterpret_cast<uint32_t*>(to + 8 * c) = total != 0 ? pack_bf16(x * inverse, y * inverse) : 0;
        }
      } else {
        const int64_t to_row = w.partials.row(token, head, u.split);
        float* to = w.partials.out + to_row * w.a.value + first_column + lane % 4 * 4;  // by lanes
#pragma unroll
        for (int c = 0; c < columns / 16; ++c) {
          const float* x = out + 8 * c + 2 * i;
          *reinterpret_cast<float4*>(to + 16 * c) =
              float4{x[0] * inverse, x[1] * inverse, x[4] * inverse, x[5] * inverse};
        }
        if (half == 0 && lane % 4 == 0) w.partials.lse[to_row] = maximum[i] + log2f(total);
      }
    }
    parity ^= 1;
  });
}

template <class L>
__global__ void __launch_bounds__(threads, 1)
    latent_kernel(const Work w, const __grid_constant__ CUtensorMap q_map,
                  const __grid_constant__ CUtensorMap kv_map) {
  extern __shared__ char unaligned[];
  char* memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  Shared& s = *reinterpret_cast<Shared*>(memory + Layout<L>::shared);
  if (threadIdx.x == 0) {
    s.q_full.init(1);
    s.q_empty.init(8);
    for (int b = 0; b < buffers; ++b) {
      for (int part = 0; part < parts; ++part) s.full[b][part].init(1);
      s.empty[b].init(8);
    }
    barriers_ready();
    prefetch_map(q_map);
    prefetch_map(kv_map);
  }
  __syncthreads();
  const int group = __shfl_sync(whole_warp, static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 2) {
    fewer_registers<24>();
    const int warp = __shfl_sync(whole_warp, static_cast<int>(threadIdx.x) / 32, 0);
    if (warp == 8) copy_keys<L>(w, kv_map, memory, s);
    if (warp == 9) copy_queries<L>(w, q_map, memory, s);
    return;
  }
  more_registers<240>();
  if constexpr (L::first == L::second) {
    compute_units<L, L::first>(w, group, memory, s);
  } else if (group == 0) {
    compute_units<L, L::first>(w, 0, memory, s);
  } else {
    compute_units<L, L::second>(w, 1, memory, s);
  }
}

template <class L>
void launch(Work w, const View& q, const View& cache, StreamHandle stream, int multiprocessors) {
  const CUtensorMap q_map = tile_map(q.data, q[2], q[1], q.stride(1), q[0], q.stride(0),
                                     std::min(static_cast<int>(q[1]), tile_rows));
  const CUtensorMap kv_map =
      tile_map(cache.data, cache[3], cache[1], cache.stride(1), cache[0], cache.stride(0), w.box_keys);
  allow_shared_memory(latent_kernel<L>, Layout<L>::bytes);
  const int64_t units = static_cast<int64_t>(w.partials.tokens) * w.head_blocks * w.partials.splits;
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>(units, multiprocessors));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = Layout<L>::bytes;
  config.stream = stream;
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, latent_kernel<L>, w, q_map, kv_map), "attention_paged");
}

using Latent512 = LatentShape<9, 36, 4, 4>;  // 512 + 64
using Latent192 = LatentShape<4, 14, 2, 1>;  // 192 + 32

}  // namespace

bool attention_paged_sm90(const Paged<__nv_bfloat16>& a, const View& q, const View& keys, const View& values,
                          const Pages& pages, const Context& context) {
  const bool large = a.key == 576 && a.value == 512, small = a.key == 224 && a.value == 192;
  if (!large && !small) return false;
  if (keys.dtype != DType::bf16 || keys.data != values.data || a.groups != 1) return false;
  const int64_t page = keys[1];
  if (page % 64 != 0 && page != 32 && page != 16 && page != 8) return false;
  if (!copies_tiles(keys.data, keys.stride(1), keys.stride(0)) ||
      !copies_tiles(q.data, q.stride(1), q.stride(0)) || a.out.token % 2 != 0 || a.out.head % 2 != 0 ||
      reinterpret_cast<uintptr_t>(a.out.data) % 4 != 0) {
    return false;
  }
  Work w;
  w.a = a;
  w.token_rows = static_cast<int>(std::min<int64_t>(8 * ceil_div(a.heads, 8), tile_rows));
  w.tile_tokens = tile_rows / w.token_rows;
  w.head_blocks = static_cast<int>(ceil_div(a.heads, tile_rows));
  w.box_keys = static_cast<int>(std::min<int64_t>(page, block_keys));
  for_token_rounds(a.tokens, a.heads, a.value, most_splits(capacity(keys, pages), a.heads), context,
                   [&](const Partials& partials) {
                     w.partials = partials;
                     w.partials.by_lanes = true;
                     (large ? launch<Latent512> : launch<Latent192>)(w, q, keys, context.stream,
                                                                     context.multiprocessors);
                     if (partials.splits > 1) combine_splits(a, w.partials, context);
                   });
  return true;
}

}  // namespace latente::cuda
