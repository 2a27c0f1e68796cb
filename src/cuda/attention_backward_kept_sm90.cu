// The gradient of expanded attention on Hopper in five products instead of seven: one kernel computes scores'
// gradients, once, keeps them in memory and adds up those of values; another multiplies what was kept by
// queries and by keys. Every sum is made by one warpgroup in one order.
//
// Kept is the gradient before the scale in bfloat16, in tiles of 64 keys × 64 queries of a head: [8, 8]
// blocks of [8 keys, 8 queries]. Of a head come the blocks of queries in order, and of each the blocks of
// keys from the first that any of its queries sees.
#include "cuda/attention_backward_sm90.cuh"

namespace latente::cuda {
namespace {

constexpr int groups = 2, own_rows = groups * 64, own_bytes = own_rows * 128;
constexpr int copier = groups * 128;  // the first thread of the warp that copies
constexpr int threads = copier + 128;
constexpr int registers = 240, most_stages = 6;
constexpr int most_sorted = 4096;  // blocks; of more, rows are taken as they come
constexpr int kept_bytes = block_rows * block_rows * 2;

struct Kept {
  char* tiles = nullptr;        // [head of the wave, most]
  const int* before = nullptr;  // [blocks + 1] tiles before those of a block of queries
  int most = 0;                 // tiles of a head that there is room for
  const int* keys = nullptr;    // [rows] rows of keys, those seen by most blocks of queries first

  __device__ char* at(int64_t tile) const { return tiles + tile * kept_bytes; }
  // Of a head and the first block of keys, if block `query` of queries saw it.
  __device__ int tile(int head, int query, int first) const { return head * most + before[query] - first; }
};

// Key and value widths in tiles of 64 columns.
template <int Tiles, int Values>
struct ScoreShape {
  static constexpr int tiles = Tiles, values = Values, value_width = Values * tile_columns;
  static constexpr int own_key = 0, own_value = tiles * own_bytes, walked = own_value + values * own_bytes;
  static constexpr int stage_bytes = (tiles + values) * block_bytes, walked_value = tiles * block_bytes;
  static constexpr int stages = tiles > 2 ? 3 : 4, shared = walked + stages * stage_bytes;
};

struct ScoreShared {
  Barrier own, full[4], empty[4];
  float lse[4][block_rows], delta[4][block_rows];  // lse in base 2
  int starts[4][block_rows];
  // Of a stage: its block of queries or -1 after the last one, the latest start, the first block of keys that
  // is kept and where this block's first would be.
  int block[4], latest[4], first[4], tile[4];
  unsigned seen[most_blocks / 32];
};

struct SumShared {
  Barrier full[most_stages], empty[most_stages];
  int kept[most_stages];  // which warpgroups have a tile, as bits, or -1 after the last one
  unsigned seen[most_blocks / 32];
};

// Tiles before each block of queries, [blocks + 1], and the order of rows of keys; seen [rows] is scratch.
__global__ void __launch_bounds__(1024)
    count_tiles(const int2* ranges, int blocks, int* before, int* keys, int* seen) {
  __shared__ int parts[32];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int share = (blocks + 1023) / 1024, first = min(thread * share, blocks),
            last = min(first + share, blocks);
  int own = 0;
  for (int i = first; i < last; ++i) own += i - ranges[i].x / block_rows + 1;
  int sum = own;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(whole_warp, sum, static_cast<unsigned>(step));
    if (lane >= step) sum += other;
  }
  if (lane == 31) parts[thread / 32] = sum;
  __syncthreads();
  int start = sum - own;
  for (int i = 0; i < thread / 32; ++i) start += parts[i];
  for (int i = first; i < last; ++i) {
    before[i] = start;
    start += i - ranges[i].x / block_rows + 1;
  }
  if (thread == 1023) before[blocks] = start;
  __syncthreads();
  const int rows = (blocks + groups - 1) / groups;
  for (int row = thread; row < rows; row += 1024) {
    int count = 0;
    for (int i = row * groups; i < blocks && blocks <= most_sorted; ++i) {
      count += ranges[i].x < (row + 1) * own_rows ? 1 : 0;
    }
    seen[row] = count;
  }
  __syncthreads();
  for (int row = thread; row < rows; row += 1024) {
    const int own_count = seen[row];
    int place = row;
    if (blocks <= most_sorted) {
      place = 0;
      for (int i = 0; i < rows; ++i)
        place += seen[i] > own_count || (seen[i] == own_count && i < row) ? 1 : 0;
    }
    keys[place] = row;
  }
}

// Marks the blocks of queries with one that sees one of the keys.
__device__ void mark_seen(unsigned* seen, const int2* ranges, int blocks, int key) {
  const int thread = static_cast<int>(threadIdx.x), first = key / block_rows;
  for (int i = first / 32 * 32 + thread; i < (blocks + 31) / 32 * 32; i += threads) {
    const bool sees = i >= first && i < blocks && ranges[i].x < key + own_rows;
    const unsigned word = __ballot_sync(whole_warp, sees);
    if (thread % 32 == 0) seen[i / 32] = word;
  }
}
template <class Use>
__device__ void for_seen(const unsigned* seen, int first, int blocks, const Use& use) {
  for (int word = first / 32; word * 32 < blocks; ++word) {
    for (unsigned left = seen[word]; left; left &= left - 1) {
      use(word * 32 + __ffs(static_cast<int>(left)) - 1);
    }
  }
}

template <class H>
__global__ void __launch_bounds__(threads, 1)
    backward_scores(const Gradient b, const int2* ranges, const Kept kept, int first_group,
                    const __grid_constant__ Maps maps) {
  extern __shared__ char unaligned[];
  const Expanded<__nv_bfloat16>& a = b.forward;
  const int blocks = (a.tokens + block_rows - 1) / block_rows;
  if (!b.when.met()) return;
  char* memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  ScoreShared& s = *reinterpret_cast<ScoreShared*>(memory + H::shared);
  const int key = kept.keys[blockIdx.y] * own_rows, first_block = key / block_rows;
  const int group = first_group + static_cast<int>(blockIdx.x);
  const int share = a.heads / a.groups, thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  mark_seen(s.seen, ranges, blocks, key);
  if (thread == 0) {
    s.own.init(1);
    // Every thread that writes or reads rows' numbers arrives itself; the tiles are one arrival more.
    for (int i = 0; i < H::stages; ++i) s.full[i].init(33), s.empty[i].init(copier);
    barriers_ready();
  }
  __syncthreads();

  if (thread >= copier) {
    fewer_registers<24>();
    if (thread >= copier + 32) return;
    if (lane == 0) {
      s.own.expect((H::tiles + H::values) * own_bytes);
      copy_keys(memory + H::own_key, own_bytes, H::tiles, maps, a.nope / tile_columns, s.own, key, group);
      for (int j = 0; j < H::values; ++j) {
        copy_tile(memory + H::own_value + j * own_bytes, &maps.v, s.own, j * tile_columns, key, group);
      }
    }
    Stage<H::stages> stage;
    for (int head = group * share; head < (group + 1) * share; ++head) {
      for_seen(s.seen, first_block, blocks, [&](int block) {
        const int query = block * block_rows;
        const int2 range = ranges[block];
        const int first = range.x / block_rows;
        const int tile = kept.tile(head - first_group * share, block, first) + first_block;
        float lse[2], delta[2];
        int start[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int t = query + lane + i * 32;
          const bool real = t < a.tokens;
          lse[i] = real ? a.lse[t * a.lse_token + head * a.lse_head] * static_cast<float>(log2_e) : INFINITY;
          delta[i] = real ? b.delta[t * b.delta_token + head * b.delta_head] : 0;
          start[i] = real ? a.starts[t] : INT_MAX;
        }
        s.empty[stage.index].wait(stage.phase ^ 1);
        if (lane == 0) {
          char* to = memory + H::walked + stage.index * H::stage_bytes;
          s.full[stage.index].expect(H::stage_bytes);
          for (int j = 0; j < H::tiles; ++j) {
            copy_tile(to + j * block_bytes, &maps.q, s.full[stage.index], j * tile_columns, query, head);
          }
          for (int j = 0; j < H::values; ++j) {
            copy_tile(to + H::walked_value + j * block_bytes, &maps.d_out, s.full[stage.index],
                      j * tile_columns, query, head);
          }
          s.block[stage.index] = block, s.latest[stage.index] = range.y;
          s.first[stage.index] = first, s.tile[stage.index] = tile;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          s.lse[stage.index][lane + i * 32] = lse[i];
          s.delta[stage.index][lane + i * 32] = delta[i];
          s.starts[stage.index][lane + i * 32] = start[i];
        }
        s.full[stage.index].arrive();
        stage.next();
      });
    }
    s.empty[stage.index].wait(stage.phase ^ 1);
    if (lane == 0) s.block[stage.index] = -1, s.full[stage.index].arrive();
    s.full[stage.index].arrive();
    return;
  }

  more_registers<registers>();
  const int warpgroup = thread / 128, group_row = warpgroup * 64, warp = thread % 128 / 32;
  const int row = group_row + warp * 16 + lane / 4;
  float d_v[H::value_width / 2], score[32], d_score[32];  // scores are [key, query]
  Stage<H::stages> stage;
  auto begin_scores = [&] {
    const char* walked = memory + H::walked + stage.index * H::stage_bytes;
    begin_product<4 * H::tiles, own_bytes>(score, memory + H::own_key + group_row * 128, walked);
    begin_product<4 * H::values, own_bytes>(d_score, memory + H::own_value + group_row * 128,
                                            walked + H::walked_value);
    products_commit();
  };
  s.own.wait(0);
  s.full[0].wait(0);
  int block = s.block[0];
  products_begin();
  begin_scores();
  products_wait<0>();
  bool add = false;  // there are sums
  while (block >= 0) {
    const int at = stage.index, query = block * block_rows;
    const bool masked = query < key + group_row + 63 || s.latest[at] > key + group_row;
    uint32_t p[16], d_p[16];
    {
      float weight[32];
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const float2 lse = two_of(s.lse[at], i / 4 * 8 + lane % 4 * 2);
        weight[i] = fast_exp2(fmaf(score[i], a.scale, i % 2 ? -lse.y : -lse.x));
      }
      if (masked) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const int column = i / 4 * 8 + lane % 4 * 2 + i % 2, k = key + row + i / 2 % 2 * 8;
          if (k > query + column || k < s.starts[at][column]) weight[i] = 0;
        }
      }
      pack(weight, p);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float2 delta = two_of(s.delta[at], i / 2 * 8 + lane % 4 * 2);
      d_p[i] = pack_bf16(__uint_as_float(p[i] << 16) * (d_score[2 * i] - delta.x),
                         __uint_as_float(p[i] & 0xffff0000u) * (d_score[2 * i + 1] - delta.y));
    }
    stage.next();
    s.full[stage.index].wait(stage.phase);
    products_begin();
    begin_sum(d_v, p, memory + H::walked + at * H::stage_bytes + H::walked_value, add);
    begin_scores();  // after the last block of stale tiles, for nothing
    const int own_block = first_block + warpgroup;
    const bool kept_here = own_block <= block && own_block >= s.first[at];
    const int tile = s.tile[at] + warpgroup;
    products_wait<0>();
    s.empty[at].arrive();
    if (kept_here) {
      uint32_t* to = reinterpret_cast<uint32_t*>(kept.at(tile)) + warp * 512 + lane;
#pragma unroll
      for (int i = 0; i < 16; ++i) to[i % 2 * 256 + i / 2 * 32] = d_p[i];
    }
    block = s.block[stage.index];
    add = true;
  }
  if (!b.d_v) return;
  if (!add) {
#pragma unroll
    for (float& x : d_v) x = 0;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = key + row + 8 * i;
    if (t >= a.tokens) continue;
#pragma unroll
    for (int c = 0; c < H::value_width / 8; ++c) {
      b.d_v.store_pair(t, group, 8 * c + lane % 4 * 2, d_v[4 * c + 2 * i], d_v[4 * c + 2 * i + 1]);
    }
  }
}

// a[s]: rows of 16 and step s of 16 of the depth, from blocks of a tile, as they are or transposed.
template <bool transposed>
__device__ void read_kept(uint32_t (&a)[16], const char* tile, int warp, int lane) {
  const int row = 2 * warp + lane / 8 % 2, step = lane / 16;
  const uint32_t from =
      shared_address(tile) + 128 * (transposed ? step * 8 + row : row * 8 + step) + lane % 8 * 16;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    if constexpr (transposed) {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(a[4 * s]), "=r"(a[4 * s + 1]), "=r"(a[4 * s + 2]), "=r"(a[4 * s + 3])
                   : "r"(from + s * 2048)
                   : "memory");
    } else {
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(a[4 * s]), "=r"(a[4 * s + 1]), "=r"(a[4 * s + 2]), "=r"(a[4 * s + 3])
                   : "r"(from + s * 256)
                   : "memory");
    }
  }
}

template <int Tiles>
struct SumShape {
  static constexpr int tiles = Tiles, width = Tiles * tile_columns;
  static constexpr int walked = groups * kept_bytes, stage_bytes = walked + tiles * block_bytes;
  static constexpr int stages = tiles > 2 ? 5 : 6, shared = stages * stage_bytes;
};

// sum (+)= kept tiles · walked rows, while there are any.
template <class H, bool transposed>
__device__ void sum_kept(float (&sum)[H::width / 2], const char* memory, SumShared& s, int thread) {
  const int warpgroup = thread / 128, warp = thread % 128 / 32, lane = thread % 32;
  Stage<H::stages> stage;
  int pending = -1;  // a stage that products in flight read
  uint32_t a[2][16];
#pragma unroll
  for (float& x : sum) x = 0;
  for (;;) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      s.full[stage.index].wait(stage.phase);
      const int kept = s.kept[stage.index];
      if (kept < 0) {
        products_wait<0>();
        return;
      }
      if (kept >> warpgroup & 1) {
        const char* from = memory + stage.index * H::stage_bytes;
        read_kept<transposed>(a[half], from + warpgroup * kept_bytes, warp, lane);
        products_begin();
        begin_sum(sum, a[half], from + H::walked, true);
        products_commit();
        products_wait<1>();
        if (pending >= 0) s.empty[pending].arrive();
        pending = stage.index;
      } else {
        products_wait<0>();
        if (pending >= 0) s.empty[pending].arrive();
        s.empty[stage.index].arrive();
        pending = -1;
      }
      stage.next();
    }
  }
}

// A block sums for 128 keys of a kv head, or for 128 queries of a head; [rows, keys or queries] along the
// grid, and heads.
template <class H>
__global__ void __launch_bounds__(threads, 1)
    backward_sums(const Gradient b, const int2* ranges, const Kept kept, int first_group, bool of_keys,
                  const __grid_constant__ Maps maps) {
  extern __shared__ char unaligned[];
  const Expanded<__nv_bfloat16>& a = b.forward;
  const int blocks = (a.tokens + block_rows - 1) / block_rows;
  if (!b.when.met()) return;
  char* memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  SumShared& s = *reinterpret_cast<SumShared*>(memory + H::shared);
  const int share = a.heads / a.groups, thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  // The longest of a context come first: its first keys, its last queries.
  const int row = static_cast<int>(blockIdx.x) / 2, head = first_group * share + static_cast<int>(blockIdx.y);
  const bool keys = blockIdx.x % 2 == 0;
  const int own = (keys ? row : static_cast<int>(gridDim.x) / 2 - 1 - row) * own_rows;
  const int own_block = own / block_rows, group = head / share;
  if (keys ? !of_keys || head % share != 0 : !b.d_q) return;
  if (keys) mark_seen(s.seen, ranges, blocks, own);
  if (thread == 0) {
    for (int i = 0; i < H::stages; ++i) s.full[i].init(1), s.empty[i].init(copier);
    barriers_ready();
  }
  __syncthreads();

  if (thread >= copier) {
    fewer_registers<24>();
    if (thread > copier) return;
    Stage<H::stages> stage;
    // The tiles of either warpgroup, null if there is none.
    auto begin = [&](const char* first, const char* second) {
      s.empty[stage.index].wait(stage.phase ^ 1);
      char* to = memory + stage.index * H::stage_bytes;
      Barrier& done = s.full[stage.index];
      s.kept[stage.index] = (first ? 1 : 0) + (second ? 2 : 0);
      done.expect(H::tiles * block_bytes + ((first ? 1 : 0) + (second ? 1 : 0)) * kept_bytes);
      if (first) copy_row(to, first, kept_bytes, done);
      if (second) copy_row(to + kept_bytes, second, kept_bytes, done);
      return to + H::walked;
    };
    if (keys) {
      for (int h = group * share; h < (group + 1) * share; ++h) {
        for_seen(s.seen, own_block, blocks, [&](int block) {
          const int first = ranges[block].x / block_rows;
          const char* tile = kept.at(kept.tile(h - first_group * share, block, first) + own_block);
          char* to = begin(own_block >= first ? tile : nullptr,
                           own_block + 1 <= block ? tile + kept_bytes : nullptr);
          for (int j = 0; j < H::tiles; ++j) {
            copy_tile(to + j * block_bytes, &maps.q, s.full[stage.index], j * tile_columns,
                      block * block_rows, h);
          }
          stage.next();
        });
      }
    } else {
      const int last = min(own_block + 1, blocks - 1);
      const int firsts[2] = {ranges[own_block].x / block_rows,
                             last > own_block ? ranges[last].x / block_rows : INT_MAX};
      const int at[2] = {kept.tile(head - first_group * share, own_block, firsts[0]),
                         last > own_block ? kept.tile(head - first_group * share, last, firsts[1]) : 0};
      for (int block = min(firsts[0], firsts[1]); block <= last; ++block) {
        char* to = begin(block >= firsts[0] && block <= own_block ? kept.at(at[0] + block) : nullptr,
                         block >= firsts[1] ? kept.at(at[1] + block) : nullptr);
        copy_keys(to, block_bytes, H::tiles, maps, a.nope / tile_columns, s.full[stage.index],
                  block * block_rows, group);
        stage.next();
      }
    }
    s.empty[stage.index].wait(stage.phase ^ 1);
    s.kept[stage.index] = -1;
    s.full[stage.index].arrive();
    return;
  }

  more_registers<registers>();
  const int first_row = own + thread / 128 * 64 + thread % 128 / 32 * 16 + lane / 4;
  float sum[H::width / 2];
  if (keys) {
    sum_kept<H, false>(sum, memory, s, thread);
  } else {
    sum_kept<H, true>(sum, memory, s, thread);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = first_row + 8 * i;
    if (t >= a.tokens) continue;
#pragma unroll
    for (int c = 0; c < H::width / 8; ++c) {
      const int column = 8 * c + lane % 4 * 2;
      const float x = sum[4 * c + 2 * i] * b.scale, y = sum[4 * c + 2 * i + 1] * b.scale;
      if (!keys) {
        b.d_q.store_pair(t, head, column, x, y);
      } else if (column < a.nope) {
        if (b.d_k) b.d_k.store_pair(t, group, column, x, y);
      } else if (b.rope_parts) {
        *reinterpret_cast<float2*>(b.rope_part(group - first_group, t) + column - a.nope) = float2{x, y};
      }
    }
  }
}

// Tiles of a head whose contexts are no longer than `longest` and packed one after the other.
int64_t expected_tiles(int64_t tokens, int64_t longest) {
  const int64_t blocks = ceil_div(tokens, block_rows), most = ceil_div(longest, block_rows);
  if (longest >= tokens) return blocks * (blocks + 1) / 2;
  return std::min(blocks * (most + 1), blocks * (most + 3) / 2 + ceil_div(tokens, longest) * most);
}

template <int tiles, int values>
bool launch(Gradient b, const GradRows& d_k_rope, const int2* ranges, int* before, const Context& context,
            Condition& otherwise) {
  using Scores = ScoreShape<tiles, values>;
  using Sums = SumShape<tiles>;
  const Expanded<__nv_bfloat16>& a = b.forward;
  const int share = a.heads / a.groups, blocks = static_cast<int>(ceil_div(a.tokens, block_rows));
  const int64_t longest = a.longest > 0 ? std::min<int64_t>(a.longest, a.tokens) : a.tokens;
  const int64_t most = expected_tiles(a.tokens, longest), group_bytes = share * most * kept_bytes;
  if (waves_of(b, d_k_rope, context, group_bytes) < 1) return false;
  const int rows = static_cast<int>(ceil_div(blocks, groups));
  int* keys = before + blocks + 1;
  count_tiles<<<1, 1024, 0, context.stream>>>(ranges, blocks, before, keys, keys + rows);
  check_launch("attention_expanded_backward");
  if (longest < a.tokens) {
    b.when = {before + blocks, static_cast<int>(most), false};
    otherwise = {before + blocks, static_cast<int>(most), true};
  }
  constexpr int score_bytes = Scores::shared + static_cast<int>(sizeof(ScoreShared)) + 1024;
  constexpr int sum_bytes = Sums::shared + static_cast<int>(sizeof(SumShared)) + 1024;
  allow_shared_memory(backward_scores<Scores>, score_bytes);
  allow_shared_memory(backward_sums<Sums>, sum_bytes);
  const Maps wide = maps_of(b, block_rows, own_rows), narrow = maps_of(b, block_rows, block_rows);
  const bool of_keys = b.d_k || d_k_rope;
  for_waves(b, d_k_rope, context, group_bytes, [&](const Gradient& part, int first, int count, void* memory) {
    const Kept kept{static_cast<char*>(memory), before, static_cast<int>(most), keys};
    const unsigned wave = static_cast<unsigned>(count), tall = static_cast<unsigned>(rows);
    backward_scores<Scores>
        <<<dim3(wave, tall), threads, score_bytes, context.stream>>>(part, ranges, kept, first, wide);
    check_launch("attention_expanded_backward");
    if (!of_keys && !b.d_q) return;
    backward_sums<Sums>
        <<<dim3(2 * tall, wave * static_cast<unsigned>(share)), threads, sum_bytes, context.stream>>>(
            part, ranges, kept, first, of_keys, narrow);
    check_launch("attention_expanded_backward");
  });
  return longest == a.tokens;
}

bool has_kernels(int64_t key, int64_t value) { return (key == 192 || key == 128) && value == 128; }

}  // namespace

int64_t attention_kept_bytes(const Shape& q, const Shape& k, const Shape& v, int64_t longest,
                             const Context& context) {
  constexpr int64_t most_bytes = int64_t{640} << 20;
  const int64_t tokens = q[0], kv_heads = k[1], key = q[2], rope = key - k[2];
  if (!has_kernels(key, v[2]) || longest <= 0 || tokens > int64_t{most_blocks} * block_rows) return 0;
  const int64_t part = 4 * tokens * rope, fixed = part + 24 * ceil_div(tokens, block_rows) + 2048;
  const int64_t each = part + q[1] / kv_heads * expected_tiles(tokens, longest) * kept_bytes;
  if (fixed + each > most_bytes) return 0;  // a long context: the kernels of seven products need none
  const int64_t most = std::min<int64_t>((most_bytes - fixed) / each, kv_heads);
  const int64_t waves = ceil_div(kv_heads, most), bytes = fixed + ceil_div(kv_heads, waves) * each;
  return bytes > context.workspace_bytes ? bytes : 0;
}

bool attention_backward_kept_sm90(const Gradient& b, const GradRows& d_k_rope, const int2* ranges,
                                  int* before, const Context& context, Condition& otherwise) {
  const Expanded<__nv_bfloat16>& a = b.forward;
  const int key = a.nope + a.rope;
  if (key == 192 && a.value == 128) return launch<3, 2>(b, d_k_rope, ranges, before, context, otherwise);
  if (key == 128 && a.value == 128) return launch<2, 2>(b, d_k_rope, ranges, before, context, otherwise);
  return false;
}

}  // namespace latente::cuda
