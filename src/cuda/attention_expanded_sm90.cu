// Expanded attention on Hopper (after Shah et al. 2024, "FlashAttention-3"): a block has a warp that copies
// tiles and two warpgroups of 64 queries each; scores of the next keys are computed while probabilities of
// the last ones meet their values.
#include "cuda/attention_sm90.h"
#include "cuda/hopper.cuh"

namespace latente::cuda {
namespace {

constexpr int block_keys = 128, stages = 2;
constexpr int tile_bytes = block_keys * 128;

// Key width in tiles of 64 columns and steps of 16, value width in tiles.
template <int Tiles, int Steps, int Values>
struct HeadShape {
  static constexpr int tiles = Tiles, steps = Steps, values = Values;
  // Of narrow heads a block has one warpgroup, beside another block on the same multiprocessor.
  static constexpr int groups = Values == 1 ? 1 : 2, blocks_at_once = groups == 1 ? 2 : 1;
  static constexpr int query_rows = groups * 64, query_bytes = query_rows * 128;
  static constexpr int copier = groups * 128;  // the first thread of those that copy
  static constexpr int threads = copier + 128, registers = groups == 1 ? 232 : 240;
  static constexpr int q = 0, k = tiles * query_bytes, v = k + stages * tiles * tile_bytes;
  static constexpr int shared = v + stages * values * tile_bytes;
};

// What a launch computes. Within a call, row t attends to the keys start[t]..t of its own call; over a cache,
// to the keys 0..position[t] of sequence[t], as they were expanded.
struct Work {
  int tokens = 0, nope_tiles = 0, share = 1;  // share: heads that have the same keys
  float scale = 1;                            // with log2(e)
  Rows<__nv_bfloat16> out;
  float* lse = nullptr;
  int64_t lse_token = 0, lse_head = 0;
  const int32_t* start = nullptr;
  const int32_t *sequence = nullptr, *position = nullptr;
  int first_sequence = 0, sequences = 0, first_head = 0, heads = 0;
};

template <class H>
struct Shared {
  Barrier q_full, k_full[stages], k_empty[stages], v_full[stages], v_empty[stages];
  // A row's start or sequence, and the last key that it attends to.
  int run[H::query_rows], last[H::query_rows];
  int least[H::query_rows / 32], most[H::query_rows / 32];  // of last
};

// Blocks of keys, run by run of rows that have the same start or sequence.
template <class H, bool cached>
struct Blocks {
  const Shared<H>& s;
  const Work& w;
  int first, rows;  // the tile's first token, and how many it has
  int begin, end;   // rows of the run
  int at, last;     // the block's first key, and the run's last one

  // alike: the whole tile is one run.
  __device__ Blocks(const Shared<H>& s_, const Work& w_, int first_, int rows_, bool alike)
      : s(s_), w(w_), first(first_), rows(rows_), begin(0), end(0), at(0), last(-1) {
    if (alike) {
      end = rows;
      for (int most : s.most) last = max(last, most);
      at = cached ? 0 : s.run[0];
      if (!has_keys()) begin = rows;
    } else {
      next_run();
    }
  }
  __device__ int sequence() const { return s.run[begin] - w.first_sequence; }
  __device__ bool has_keys() const {
    return !cached || (last >= 0 && static_cast<unsigned>(sequence()) < static_cast<unsigned>(w.sequences));
  }
  // Runs without keys, or of sequences that are not here, are left out.
  __device__ void next_run() {
    do {
      begin = end;
      if (begin >= rows) return;
      last = s.last[begin];
      for (end = begin + 1; end < rows && s.run[end] == s.run[begin]; ++end) last = max(last, s.last[end]);
    } while (!has_keys());
    at = cached ? 0 : s.run[begin];
  }
  __device__ bool done() const { return begin >= rows; }
  __device__ void next() {
    at += block_keys;
    if (at > last) next_run();
  }
};

struct Stage {
  int index = 0, phase = 0;
  __device__ void next() {
    if (++index == stages) index = 0, phase ^= 1;
  }
};

struct Maps {
  CUtensorMap q, k, rope, v;
};

template <class H, bool cached>
__device__ void copy_tiles(const Maps& maps, Blocks<H, cached> blocks, int head, char* memory, Shared<H>& s) {
  s.q_full.expect(H::tiles * H::query_bytes);
  for (int j = 0; j < H::tiles; ++j) {
    copy_tile(memory + H::q + j * H::query_bytes, &maps.q, s.q_full, j * tile_columns, blocks.first,
              blocks.w.first_head + head);
  }
  Stage stage;
  for (; !blocks.done(); blocks.next()) {
    const int own = cached ? blocks.sequence() * blocks.w.heads + head : head / blocks.w.share;
    const int shared_by_heads = cached ? blocks.sequence() : 0;
    s.k_empty[stage.index].wait(stage.phase ^ 1);
    s.k_full[stage.index].expect(H::tiles * tile_bytes);
    char* k = memory + H::k + stage.index * H::tiles * tile_bytes;
    for (int j = 0; j < H::tiles; ++j) {
      const bool rope = j >= blocks.w.nope_tiles;
      copy_tile(k + j * tile_bytes, rope ? &maps.rope : &maps.k, s.k_full[stage.index],
                (rope ? j - blocks.w.nope_tiles : j) * tile_columns, blocks.at, rope ? shared_by_heads : own);
    }
    s.v_empty[stage.index].wait(stage.phase ^ 1);
    s.v_full[stage.index].expect(H::values * tile_bytes);
    char* v = memory + H::v + stage.index * H::values * tile_bytes;
    for (int j = 0; j < H::values; ++j) {
      copy_tile(v + j * tile_bytes, &maps.v, s.v_full[stage.index], j * tile_columns, blocks.at, own);
    }
    stage.next();
  }
}

// One warpgroup's 64 rows.
template <class H, bool cached>
__device__ void compute(const Work& w, Blocks<H, cached> blocks, int head, char* memory, Shared<H>& s) {
  constexpr int columns = H::values * tile_columns;
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  const int group = static_cast<int>(threadIdx.x) / 128, group_row = group * 64;
  const int row = group_row + thread / 32 * 16 + lane / 4;
  float out[columns / 2], score[64], maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  uint32_t p[32];
#pragma unroll
  for (int i = 0; i < columns / 2; ++i) out[i] = 0;

  const int first = blocks.first, rows = blocks.rows;
  const int least = min(s.least[2 * group], s.least[2 * group + 1]);
  const int most = max(s.most[2 * group], s.most[2 * group + 1]);
  const int last_key[2] = {s.last[row], s.last[row + 8]};
  Stage stage;
  auto matters = [&] {  // to this warpgroup's rows
    return blocks.at <= most && blocks.end > group_row && blocks.begin < group_row + 64;
  };
  auto begin_scores = [&] {
    const char* k = memory + H::k + stage.index * H::tiles * tile_bytes;
    const char* q = memory + H::q + group_row * 128;
    products_begin();
#pragma unroll
    for (int step = 0; step < H::steps; ++step) {
      wgmma<0>(score, rows_operand(q + step / 4 * H::query_bytes + step % 4 * 32),
               rows_operand(k + step / 4 * tile_bytes + step % 4 * 32), step > 0);
    }
    products_commit();
  };
  auto begin_values = [&](int index) {
    const uint64_t v = columns_operand(memory + H::v + index * H::values * tile_bytes, tile_bytes);
    products_begin();
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      const uint32_t operand[4] = {p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3]};
      wgmma<1>(out, operand, v + step * columns_step, 1);
    }
    products_commit();
  };
  // Scores become weights; returns by what each row's sums shrink.
  auto soften = [&](float(&keep)[2]) {
    if (blocks.begin > group_row || blocks.end < min(group_row + 64, rows) ||
        blocks.at + block_keys - 1 > least) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const int r = row + i / 2 % 2 * 8, key = blocks.at + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (key > last_key[i / 2 % 2] || r < blocks.begin || r >= blocks.end) score[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = score[2 * i];
#pragma unroll
      for (int c = 0; c < 64; c += 4) top = fmaxf(top, fmaxf(score[c + 2 * i], score[c + 2 * i + 1]));
      top = fmaxf(top, __shfl_xor_sync(whole_warp, top, 1));
      top = fmaxf(top, __shfl_xor_sync(whole_warp, top, 2));
      top = fmaxf(top * w.scale, maximum[i]);
      const float base = top == -INFINITY ? 0 : top;
      keep[i] = fast_exp2(maximum[i] - base);
      maximum[i] = top;
      float total = 0;
#pragma unroll
      for (int c = 0; c < 64; c += 4) {
        score[c + 2 * i] = fast_exp2(fmaf(score[c + 2 * i], w.scale, -base));
        score[c + 2 * i + 1] = fast_exp2(fmaf(score[c + 2 * i + 1], w.scale, -base));
        total += score[c + 2 * i] + score[c + 2 * i + 1];
      }
      sum[i] = sum[i] * keep[i] + total;  // of this thread's columns
    }
  };
  auto pack = [&] {
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = pack_bf16(score[2 * i], score[2 * i + 1]);
  };

  auto rescale = [&](const float(&keep)[2]) {
#pragma unroll
    for (int i = 0; i < columns / 2; i += 4) {
      out[i] *= keep[0], out[i + 1] *= keep[0];
      out[i + 2] *= keep[1], out[i + 3] *= keep[1];
    }
  };

  s.q_full.wait(0);
  while (!blocks.done()) {
    if (!matters()) {
      s.k_full[stage.index].wait(stage.phase);
      s.v_full[stage.index].wait(stage.phase);
      if (lane == 0) s.k_empty[stage.index].arrive(), s.v_empty[stage.index].arrive();
      blocks.next();
      stage.next();
      continue;
    }
    float keep[2];
    s.k_full[stage.index].wait(stage.phase);
    begin_scores();
    products_wait<0>();
    if (lane == 0) s.k_empty[stage.index].arrive();
    soften(keep);
    rescale(keep);
    pack();
    for (;;) {
      const Stage before = stage;
      blocks.next();
      stage.next();
      if (blocks.done() || !matters()) {
        s.v_full[before.index].wait(before.phase);
        begin_values(before.index);
        products_wait<0>();
        if (lane == 0) s.v_empty[before.index].arrive();
        break;
      }
      s.k_full[stage.index].wait(stage.phase);
      begin_scores();
      s.v_full[before.index].wait(before.phase);
      begin_values(before.index);
      products_wait<1>();
      if (lane == 0) s.k_empty[stage.index].arrive();
      soften(keep);
      products_wait<0>();
      if (lane == 0) s.v_empty[before.index].arrive();
      rescale(keep);
      pack();
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = sum[i] + __shfl_xor_sync(whole_warp, sum[i], 1);
    total += __shfl_xor_sync(whole_warp, total, 2);
    const int r = row + 8 * i;
    if (r >= rows) continue;
    if (cached && static_cast<unsigned>(s.run[r] - w.first_sequence) >= static_cast<unsigned>(w.sequences)) {
      continue;
    }
    const float inverse = total != 0 ? 1 / total : 0;
    __nv_bfloat16* to = w.out.at(first + r, w.first_head + head) + lane % 4 * 2;
#pragma unroll
    for (int c = 0; c < columns / 8; ++c) {
      *reinterpret_cast<uint32_t*>(to + 8 * c) =
          pack_bf16(out[4 * c + 2 * i] * inverse, out[4 * c + 2 * i + 1] * inverse);
    }
    if (!cached && lane % 4 == 0) {
      w.lse[(first + r) * w.lse_token + head * w.lse_head] =
          (maximum[i] + log2f(total)) * static_cast<float>(ln_2);
    }
  }
}

template <class H, bool cached>
__global__ void __launch_bounds__(H::threads, H::blocks_at_once)
    forward_kernel(const Work w, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char memory[];
  Shared<H>& s = *reinterpret_cast<Shared<H>*>(memory + H::shared);
  // The longest first, all of a head together.
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * H::query_rows;
  const int head = static_cast<int>(blockIdx.y), rows = min(H::query_rows, w.tokens - first);
  const int thread = static_cast<int>(threadIdx.x);
  bool alike = true;
  if (thread < H::query_rows) {
    const bool real = thread < rows;
    const int* runs = cached ? w.sequence : w.start;
    const int last = !real ? -1 : cached ? w.position[first + thread] : first + thread;
    const int run = real ? runs[first + thread] : -1;
    alike = !real || run == runs[first];
    s.run[thread] = run;
    s.last[thread] = last;
    const int least = __reduce_min_sync(whole_warp, real ? last : INT_MAX);
    const int most = __reduce_max_sync(whole_warp, last);
    if (thread % 32 == 0) s.least[thread / 32] = least, s.most[thread / 32] = most;
  }
  if (thread == 0) {
    if (shared_address(memory) % 1024) __trap();
    s.q_full.init(1);
    for (int i = 0; i < stages; ++i) {
      s.k_full[i].init(1), s.v_full[i].init(1);
      s.k_empty[i].init(H::copier / 32), s.v_empty[i].init(H::copier / 32);
    }
    barriers_ready();
  }
  alike = __syncthreads_and(alike);
  const Blocks<H, cached> blocks(s, w, first, rows, alike);
  if (thread < H::copier) {
    more_registers<H::registers>();
    compute<H>(w, blocks, head, memory, s);
  } else {
    fewer_registers<24>();
    if (thread == H::copier) copy_tiles<H>(maps, blocks, head, memory, s);
  }
}

CUtensorMap map_of(const Rows<const __nv_bfloat16>& x, int64_t tokens, int width, int64_t heads, int rows) {
  return tile_map(x.data, width, tokens, x.token, heads, heads > 1 ? x.head : x.token, rows);
}

// Without the queries' map.
template <class H, bool cached>
void launch(const Work& w, Maps maps, const Rows<const __nv_bfloat16>& q, int key, int64_t query_heads,
            int heads, const Context& context) {
  maps.q = map_of(q, w.tokens, key, query_heads, H::query_rows);
  constexpr int bytes = H::shared + static_cast<int>(sizeof(Shared<H>));
  static_assert(H::blocks_at_once * (bytes + 1024) <= 228 * 1024);
  const dim3 grid(static_cast<unsigned>(ceil_div(w.tokens, H::query_rows)), static_cast<unsigned>(heads));
  allow_shared_memory(forward_kernel<H, cached>, bytes);
  forward_kernel<H, cached><<<grid, H::threads, bytes, context.stream>>>(w, maps);
  check_launch("attention");
}

}  // namespace

bool copies_heads(const Expanded<__nv_bfloat16>& a) {
  const auto copied = [](const Rows<const __nv_bfloat16>& x, int heads) {
    return copies_tiles(x.data, x.token, heads > 1 ? x.head : x.token);
  };
  return copied(a.q, a.heads) && copied(a.k, a.groups) && (a.rope == 0 || copied(a.k_rope, 1)) &&
         copied(a.v, a.groups) && a.out.token % 2 == 0 && a.out.head % 2 == 0 &&
         reinterpret_cast<uintptr_t>(a.out.data) % 4 == 0;
}

bool attention_expanded_sm90(const Expanded<__nv_bfloat16>& a, const Context& context) {
  const int key = a.nope + a.rope;
  if ((a.rope && a.nope % tile_columns) || !copies_heads(a)) return false;
  using Launch =
      void (*)(const Work&, Maps, const Rows<const __nv_bfloat16>&, int, int64_t, int, const Context&);
  const Launch launch_shape = key == 192 && a.value == 128   ? launch<HeadShape<3, 12, 2>, false>
                              : key == 128 && a.value == 128 ? launch<HeadShape<2, 8, 2>, false>
                              : key == 128 && a.value == 64  ? launch<HeadShape<2, 8, 1>, false>
                              : key == 96 && a.value == 64   ? launch<HeadShape<2, 6, 1>, false>
                              : key == 64 && a.value == 64   ? launch<HeadShape<1, 4, 1>, false>
                                                             : Launch(nullptr);
  if (!launch_shape) return false;
  Work w;
  w.tokens = a.tokens;
  w.nope_tiles = static_cast<int>(ceil_div(a.nope, tile_columns));
  w.share = a.heads / a.groups;
  w.scale = a.scale;
  w.out = a.out;
  w.lse = a.lse, w.lse_token = a.lse_token, w.lse_head = a.lse_head;
  w.start = a.starts;
  const CUtensorMap k = map_of(a.k, a.tokens, a.nope, a.groups, block_keys);
  const Maps maps{{},
                  k,
                  a.rope ? map_of(a.k_rope, a.tokens, a.rope, 1, block_keys) : k,
                  map_of(a.v, a.tokens, a.value, a.groups, block_keys)};
  launch_shape(w, maps, a.q, key, a.heads, a.heads, context);
  return true;
}

void attend_expanded_cache_sm90(const Paged<__nv_bfloat16>& a, const ExpandedCache& cache,
                                const Context& context) {
  Work w;
  w.tokens = a.tokens;
  w.nope_tiles = cache.nope / tile_columns;
  w.scale = a.scale;
  w.out = a.out;
  w.sequence = a.sequence, w.position = a.position;
  w.first_sequence = cache.first_sequence, w.sequences = cache.sequences;
  w.first_head = cache.first_head, w.heads = cache.heads;
  const auto map = [&](const __nv_bfloat16* data, int width, int64_t outer) {
    return tile_map(data, width, cache.count, width, outer, static_cast<int64_t>(cache.count) * width,
                    block_keys);
  };
  const int64_t rows = static_cast<int64_t>(cache.sequences) * cache.heads;
  const Maps maps{{},
                  map(cache.keys, cache.nope, rows),
                  map(cache.rope, a.key - cache.nope, cache.sequences),
                  map(cache.values, a.value, rows)};
  if (a.key == 192) {
    launch<HeadShape<3, 12, 2>, true>(w, maps, a.q, a.key, a.heads, cache.heads, context);
  } else {
    launch<HeadShape<2, 6, 1>, true>(w, maps, a.q, a.key, a.heads, cache.heads, context);
  }
}

}  // namespace latente::cuda
