// Expanded attention on Hopper (after Shah et al. 2024, "FlashAttention-3"): a block has a warp that copies
// tiles and two warpgroups of 64 queries each; scores of the next keys are computed while probabilities of
// the last ones meet their values.
#include "cuda/attention_sm90.h"
#include "cuda/hopper.cuh"

namespace latente::cuda {
namespace {

constexpr int query_rows = 128, block_keys = 128, stages = 2, threads = 384;
constexpr int tile_bytes = 128 * 128;  // 128 rows

// Key width in tiles of 64 columns and steps of 16, value width in tiles.
template <int Tiles, int Steps, int Values>
struct HeadShape {
  static constexpr int tiles = Tiles, steps = Steps, values = Values;
  static constexpr int q = 0, k = tiles * tile_bytes, v = k + stages * tiles * tile_bytes;
  static constexpr int shared = v + stages * values * tile_bytes;
};

struct Shared {
  Barrier q_full, k_full[stages], k_empty[stages], v_full[stages], v_empty[stages];
  int starts[query_rows];
};

// Blocks of keys, from the start of each run of rows that share one.
struct Blocks {
  const int* starts;
  int first, rows;  // the tile's first token, and how many it has
  int begin, end;   // rows of the run
  int at;           // the block's first key

  // alike: the whole tile is one run.
  __device__ Blocks(const int* starts_, int first_, int rows_, bool alike)
      : starts(starts_), first(first_), rows(rows_), begin(0), end(0), at(0) {
    if (alike) {
      at = starts[0];
      end = rows;
    } else {
      next_run();
    }
  }
  __device__ void next_run() {
    begin = end;
    if (begin >= rows) return;
    at = starts[begin];
    for (end = begin + 1; end < rows && starts[end] == at;) ++end;
  }
  __device__ bool done() const { return begin >= rows; }
  __device__ void next() {
    at += block_keys;
    if (at >= first + end) next_run();
  }
};

struct Stage {
  int index = 0, phase = 0;
  __device__ void next() {
    if (++index == stages) index = 0, phase ^= 1;
  }
};

template <class H>
__device__ void copy_tiles(const CUtensorMap& q_map, const CUtensorMap& k_map, const CUtensorMap& rope_map,
                           const CUtensorMap& v_map, int nope_tiles, Blocks blocks, int head, int group,
                           char* memory, Shared& s) {
  s.q_full.expect(H::tiles * tile_bytes);
  for (int j = 0; j < H::tiles; ++j) {
    copy_tile(memory + H::q + j * tile_bytes, &q_map, s.q_full, j * tile_columns, blocks.first, head);
  }
  Stage stage;
  for (; !blocks.done(); blocks.next()) {
    s.k_empty[stage.index].wait(stage.phase ^ 1);
    s.k_full[stage.index].expect(H::tiles * tile_bytes);
    char* k = memory + H::k + stage.index * H::tiles * tile_bytes;
    for (int j = 0; j < H::tiles; ++j) {
      const bool rope = j >= nope_tiles;
      copy_tile(k + j * tile_bytes, rope ? &rope_map : &k_map, s.k_full[stage.index],
                (rope ? j - nope_tiles : j) * tile_columns, blocks.at, rope ? 0 : group);
    }
    s.v_empty[stage.index].wait(stage.phase ^ 1);
    s.v_full[stage.index].expect(H::values * tile_bytes);
    char* v = memory + H::v + stage.index * H::values * tile_bytes;
    for (int j = 0; j < H::values; ++j) {
      copy_tile(v + j * tile_bytes, &v_map, s.v_full[stage.index], j * tile_columns, blocks.at, group);
    }
    stage.next();
  }
}

// One warpgroup's 64 rows from `row` on.
template <class H>
__device__ void compute(const Expanded<__nv_bfloat16>& a, Blocks blocks, int head, char* memory, Shared& s) {
  constexpr int columns = H::values * tile_columns;
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  const int group_row = static_cast<int>(threadIdx.x) / 128 * 64,
            row = group_row + thread / 32 * 16 + lane / 4;
  float out[columns / 2], score[64], maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  uint32_t p[32];
#pragma unroll
  for (int i = 0; i < columns / 2; ++i) out[i] = 0;

  const int first = blocks.first, rows = blocks.rows;
  Stage stage;
  // Blocks that none of this warpgroup's rows attends to are passed by.
  auto pass = [&] {
    while (!blocks.done() && (blocks.at > first + group_row + 63 || blocks.end <= group_row ||
                              blocks.begin >= group_row + 64)) {
      s.k_full[stage.index].wait(stage.phase);
      s.v_full[stage.index].wait(stage.phase);
      if (lane == 0) s.k_empty[stage.index].arrive(), s.v_empty[stage.index].arrive();
      blocks.next();
      stage.next();
    }
  };
  auto begin_scores = [&] {
    const char* k = memory + H::k + stage.index * H::tiles * tile_bytes;
    const char* q = memory + H::q + group_row * 128;
    products_begin();
#pragma unroll
    for (int step = 0; step < H::steps; ++step) {
      const int offset = step / 4 * tile_bytes + step % 4 * 32;
      wgmma<0>(score, rows_operand(q + offset), rows_operand(k + offset), step > 0);
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
        blocks.at + block_keys - 1 > first + group_row) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        const int r = row + i / 2 % 2 * 8, key = blocks.at + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (key > first + r || r < blocks.begin || r >= blocks.end) score[i] = -INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = score[2 * i];
#pragma unroll
      for (int c = 0; c < 64; c += 4) top = fmaxf(top, fmaxf(score[c + 2 * i], score[c + 2 * i + 1]));
      top = fmaxf(top, __shfl_xor_sync(whole_warp, top, 1));
      top = fmaxf(top, __shfl_xor_sync(whole_warp, top, 2));
      top = fmaxf(top * a.scale, maximum[i]);
      const float base = top == -INFINITY ? 0 : top;
      keep[i] = fast_exp2(maximum[i] - base);
      maximum[i] = top;
      float total = 0;
#pragma unroll
      for (int c = 0; c < 64; c += 4) {
        score[c + 2 * i] = fast_exp2(fmaf(score[c + 2 * i], a.scale, -base));
        score[c + 2 * i + 1] = fast_exp2(fmaf(score[c + 2 * i + 1], a.scale, -base));
        total += score[c + 2 * i] + score[c + 2 * i + 1];
      }
      sum[i] = sum[i] * keep[i] + total;  // of this thread's columns
    }
  };
  auto pack = [&] {
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = pack_bf16(score[2 * i], score[2 * i + 1]);
  };

  pass();
  if (!blocks.done()) {
    s.q_full.wait(0);
    float keep[2];
    s.k_full[stage.index].wait(stage.phase);
    begin_scores();
    products_wait<0>();
    if (lane == 0) s.k_empty[stage.index].arrive();
    soften(keep);
    pack();
    for (;;) {
      const Stage last = stage;
      blocks.next();
      stage.next();
      pass();
      if (blocks.done()) {
        s.v_full[last.index].wait(last.phase);
        begin_values(last.index);
        products_wait<0>();
        break;
      }
      s.k_full[stage.index].wait(stage.phase);
      begin_scores();
      s.v_full[last.index].wait(last.phase);
      begin_values(last.index);
      products_wait<1>();
      if (lane == 0) s.k_empty[stage.index].arrive();
      soften(keep);
      products_wait<0>();
      if (lane == 0) s.v_empty[last.index].arrive();
#pragma unroll
      for (int i = 0; i < columns / 2; i += 4) {
        out[i] *= keep[0], out[i + 1] *= keep[0];
        out[i + 2] *= keep[1], out[i + 3] *= keep[1];
      }
      pack();
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float total = sum[i] + __shfl_xor_sync(whole_warp, sum[i], 1);
    total += __shfl_xor_sync(whole_warp, total, 2);
    const int r = row + 8 * i;
    if (r >= rows) continue;
    const float inverse = 1 / total;
    __nv_bfloat16* to = a.out.at(first + r, head) + lane % 4 * 2;
#pragma unroll
    for (int c = 0; c < columns / 8; ++c) {
      *reinterpret_cast<uint32_t*>(to + 8 * c) =
          pack_bf16(out[4 * c + 2 * i] * inverse, out[4 * c + 2 * i + 1] * inverse);
    }
    if (lane % 4 == 0) {
      a.lse[(first + r) * a.lse_token + head * a.lse_head] =
          (maximum[i] + log2f(total)) * static_cast<float>(ln_2);
    }
  }
}

template <class H>
__global__ void __launch_bounds__(threads, 1)
    forward_kernel(const Expanded<__nv_bfloat16> a, const __grid_constant__ CUtensorMap q_map,
                   const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap rope_map,
                   const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ char unaligned[];
  char* memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  Shared& s = *reinterpret_cast<Shared*>(memory + H::shared);
  // The longest first, all of a head together.
  const int first = static_cast<int>(gridDim.x - 1 - blockIdx.x) * query_rows;
  const int head = static_cast<int>(blockIdx.y), group = head / (a.heads / a.groups);
  const int rows = min(query_rows, a.tokens - first);
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < rows) s.starts[thread] = a.starts[first + thread];
  if (thread == 0) {
    s.q_full.init(1);
    for (int i = 0; i < stages; ++i) {
      s.k_full[i].init(1), s.v_full[i].init(1);
      s.k_empty[i].init(8), s.v_empty[i].init(8);
    }
    barriers_ready();
  }
  const bool alike = __syncthreads_and(thread >= rows || a.starts[first + thread] == a.starts[first]);
  const Blocks blocks(s.starts, first, rows, alike);
  if (thread < 256) {
    more_registers<240>();
    compute<H>(a, blocks, head, memory, s);
  } else {
    fewer_registers<32>();
    if (thread == 256) {
      copy_tiles<H>(q_map, k_map, rope_map, v_map, a.nope / tile_columns, blocks, head, group, memory, s);
    }
  }
}

template <class H>
void launch(const Expanded<__nv_bfloat16>& a, StreamHandle stream) {
  const auto map = [&](const Rows<const __nv_bfloat16>& x, int width, int64_t heads) {
    return tile_map(x.data, width, a.tokens, x.token, heads, heads > 1 ? x.head : x.token, query_rows);
  };
  const CUtensorMap q = map(a.q, a.nope + a.rope, a.heads), k = map(a.k, a.nope, a.groups);
  const CUtensorMap rope = a.rope ? map(a.k_rope, a.rope, 1) : k, v = map(a.v, a.value, a.groups);
  constexpr int bytes = H::shared + static_cast<int>(sizeof(Shared)) + 1024;
  allow_shared_memory(forward_kernel<H>, bytes);
  const dim3 grid(static_cast<unsigned>(ceil_div(a.tokens, query_rows)), static_cast<unsigned>(a.heads));
  forward_kernel<H><<<grid, threads, bytes, stream>>>(a, q, k, rope, v);
  check_launch("attention_expanded");
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
  if (key == 192 && a.value == 128) {
    launch<HeadShape<3, 12, 2>>(a, context.stream);
  } else if (key == 128 && a.value == 128) {
    launch<HeadShape<2, 8, 2>>(a, context.stream);
  } else if (key == 128 && a.value == 64) {
    launch<HeadShape<2, 8, 1>>(a, context.stream);
  } else if (key == 96 && a.value == 64) {
    launch<HeadShape<2, 6, 1>>(a, context.stream);
  } else if (key == 64 && a.value == 64) {
    launch<HeadShape<1, 4, 1>>(a, context.stream);
  } else {
    return false;
  }
  return true;
}

}  // namespace latente::cuda
