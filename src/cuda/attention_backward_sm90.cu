// The gradient of expanded attention on Hopper. One kernel gives the gradients of keys and values: a block
// owns 128 keys and walks the queries that see them; another gives those of queries the same way around.
// Scores are computed in both, so that every sum is made by one warpgroup in one order.
#include "cuda/attention_backward_sm90.cuh"

namespace latente::cuda {
namespace {

constexpr int most_stages = 4;

// Key width in tiles of 64 columns and in columns, value width in tiles.
template <int Tiles, int Width, int Values>
struct HeadShape {
  static constexpr int tiles = Tiles, width = Width, steps = Width / 16, values = Values;
  static constexpr int value_width = Values * tile_columns;
  // Sums of keys and values leave no registers for two products at once.
  static constexpr bool crowded = Width + value_width > 256;
  // Of narrow heads a block has one warpgroup, beside another block on the same multiprocessor, and the next
  // scores are computed while the last sums are added.
  static constexpr bool ahead = Width + value_width < 256;
  static constexpr int groups = ahead ? 1 : 2, own_rows = groups * 64, own_bytes = own_rows * 128;
  static constexpr int copier = groups * 128;  // the first thread of the warp that copies
  static constexpr int threads = copier + 128, blocks_at_once = groups == 1 ? 2 : 1;
  static constexpr int registers = groups == 1 ? 232 : 240;
  // What a block owns (keys and values, or queries and d_out), then stages of what it walks.
  static constexpr int own_key = 0, own_value = tiles * own_bytes, walked = own_value + values * own_bytes;
  static constexpr int stage_bytes = (tiles + values) * block_bytes, walked_value = tiles * block_bytes;
  static constexpr int stages = ahead || tiles > 2 ? 3 : most_stages;
  static constexpr int shared = walked + stages * stage_bytes;
};

struct Shared {
  Barrier own, full[most_stages], empty[most_stages];
  float lse[most_stages][block_rows], delta[most_stages][block_rows];  // lse in base 2
  int starts[most_stages][block_rows], latest[most_stages];            // latest: of the starts
  unsigned seen[most_blocks / 32];  // blocks of queries with one that sees one of the keys
};

// The lowest and the highest start in each block of tokens, a warp a block.
__global__ void start_ranges(const int32_t* starts, int tokens, int2* ranges) {
  const int block = static_cast<int>(blockIdx.x), lane = static_cast<int>(threadIdx.x);
  int low = INT_MAX, high = -1;
  for (int i = lane; i < block_rows && block * block_rows + i < tokens; i += 32) {
    low = min(low, starts[block * block_rows + i]);
    high = max(high, starts[block * block_rows + i]);
  }
  low = __reduce_min_sync(whole_warp, low);
  high = __reduce_max_sync(whole_warp, high);
  if (lane == 0) ranges[block] = {low, high};
}

// use(block) for the blocks of queries that are marked.
template <class Use>
__device__ void for_seen(const Shared& s, int first, int blocks, const Use& use) {
  for (int word = first / 32; word * 32 < blocks; ++word) {
    for (unsigned left = s.seen[word]; left; left &= left - 1) {
      use(word * 32 + __ffs(static_cast<int>(left)) - 1);
    }
  }
}

template <class H>
__global__ void __launch_bounds__(H::threads, H::blocks_at_once)
    backward_keys(const Gradient b, const int2* ranges, int first_group, const __grid_constant__ Maps maps) {
  extern __shared__ char unaligned[];
  char* memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  Shared& s = *reinterpret_cast<Shared*>(memory + H::shared);
  if (!b.when.met()) return;
  const Expanded<__nv_bfloat16>& a = b.forward;
  const int key = static_cast<int>(blockIdx.x) * H::own_rows,
            group = first_group + static_cast<int>(blockIdx.y);
  const int share = a.heads / a.groups, thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int blocks = (a.tokens + block_rows - 1) / block_rows, first_block = key / block_rows;
  for (int i = first_block / 32 * 32 + thread; i < (blocks + 31) / 32 * 32; i += H::threads) {
    const bool sees = i >= first_block && i < blocks && ranges[i].x < key + H::own_rows;
    const unsigned word = __ballot_sync(whole_warp, sees);
    if (lane == 0) s.seen[i / 32] = word;
  }
  if (thread == 0) {
    s.own.init(1);
    // Every thread that writes or reads rows' numbers arrives itself; the tiles are one arrival more.
    for (int i = 0; i < H::stages; ++i) s.full[i].init(33), s.empty[i].init(H::copier);
    barriers_ready();
  }
  __syncthreads();

  if (thread >= H::copier) {
    fewer_registers<24>();
    if (thread >= H::copier + 32) return;
    if (lane == 0) {
      s.own.expect((H::tiles + H::values) * H::own_bytes);
      copy_keys(memory + H::own_key, H::own_bytes, H::tiles, maps, a.nope / tile_columns, s.own, key, group);
      for (int j = 0; j < H::values; ++j) {
        copy_tile(memory + H::own_value + j * H::own_bytes, &maps.v, s.own, j * tile_columns, key, group);
      }
    }
    Stage<H::stages> stage;
    for (int head = group * share; head < (group + 1) * share; ++head) {
      for_seen(s, first_block, blocks, [&](int block) {
        const int query = block * block_rows;
        const int latest = ranges[block].y;
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
          s.latest[stage.index] = latest;
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
    return;
  }

  more_registers<H::registers>();
  const int group_row = thread / 128 * 64, row = group_row + thread % 128 / 32 * 16 + lane / 4;
  float d_k[H::width / 2], d_v[H::value_width / 2];
  Stage<H::stages> stage;
  bool add = false;  // there are sums
  s.own.wait(0);
  for (int head = group * share; head < (group + 1) * share; ++head) {
    for_seen(s, first_block, blocks, [&](int block) {
      const char* walked = memory + H::walked + stage.index * H::stage_bytes;
      // [key, query]
      float score[32], d_score[32];
      uint32_t p[16];
      auto begin_d_score = [&] {
        begin_product<4 * H::values, H::own_bytes>(d_score, memory + H::own_value + group_row * 128,
                                                   walked + H::walked_value);
        products_commit();
      };
      s.full[stage.index].wait(stage.phase);
      products_begin();
      begin_product<H::steps, H::own_bytes>(score, memory + H::own_key + group_row * 128, walked);
      products_commit();
      if constexpr (H::crowded) {
        products_wait<0>();
      } else {
        begin_d_score();
        if constexpr (H::ahead) {
          products_wait<2>();
          if (add) s.empty[stage.before()].arrive();
        }
        products_wait<1>();
      }
      const int query = block * block_rows;
      const bool masked = query < key + group_row + 63 || s.latest[stage.index] > key + group_row;
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const float2 lse = two_of(s.lse[stage.index], i / 4 * 8 + lane % 4 * 2);
        score[i] = fast_exp2(fmaf(score[i], a.scale, i % 2 ? -lse.y : -lse.x));
      }
      if (masked) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const int column = i / 4 * 8 + lane % 4 * 2 + i % 2, k = key + row + i / 2 % 2 * 8;
          if (k > query + column || k < s.starts[stage.index][column]) score[i] = 0;
        }
      }
      pack(score, p);
      if constexpr (!H::crowded) products_wait<0>();
      products_begin();
      if constexpr (H::crowded) begin_d_score();
      begin_sum(d_v, p, walked + H::walked_value, add);
      products_commit();
      if constexpr (H::crowded) products_wait<1>();
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const float2 delta = two_of(s.delta[stage.index], i / 4 * 8 + lane % 4 * 2);
        const float weight = __uint_as_float(i % 2 ? p[i / 2] & 0xffff0000u : p[i / 2] << 16);
        d_score[i] = weight * (d_score[i] - (i % 2 ? delta.y : delta.x));
      }
      uint32_t d_p[16];
      pack(d_score, d_p);
      products_begin();
      begin_sum(d_k, d_p, walked, add);
      products_commit();
      add = true;
      if constexpr (!H::ahead) {
        products_wait<0>();
        s.empty[stage.index].arrive();
      }
      stage.next();
    });
  }
  products_wait<0>();
  if (!add) {
#pragma unroll
    for (float& x : d_k) x = 0;
#pragma unroll
    for (float& x : d_v) x = 0;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = key + row + 8 * i;
    if (t >= a.tokens) continue;
#pragma unroll
    for (int c = 0; c < H::width / 8; ++c) {
      const int column = 8 * c + lane % 4 * 2;
      const float x = d_k[4 * c + 2 * i] * b.scale, y = d_k[4 * c + 2 * i + 1] * b.scale;
      if (column < a.nope) {
        if (b.d_k) b.d_k.store_pair(t, group, column, x, y);
      } else if (b.rope_parts) {
        *reinterpret_cast<float2*>(b.rope_part(blockIdx.y, t) + column - a.nope) = float2{x, y};
      }
    }
    if (!b.d_v) continue;
#pragma unroll
    for (int c = 0; c < H::value_width / 8; ++c) {
      b.d_v.store_pair(t, group, 8 * c + lane % 4 * 2, d_v[4 * c + 2 * i], d_v[4 * c + 2 * i + 1]);
    }
  }
}

template <class H>
__global__ void __launch_bounds__(H::threads, H::blocks_at_once)
    backward_queries(const Gradient b, const int2* ranges, const __grid_constant__ Maps maps) {
  extern __shared__ char unaligned[];
  char* memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  Shared& s = *reinterpret_cast<Shared*>(memory + H::shared);
  if (!b.when.met()) return;
  const Expanded<__nv_bfloat16>& a = b.forward;
  // The longest first.
  const int query = static_cast<int>(gridDim.x - 1 - blockIdx.x) * H::own_rows;
  const int head = static_cast<int>(blockIdx.y), group = head / (a.heads / a.groups);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int last = min(query + H::own_rows, a.tokens) - 1;
  int2 range = ranges[query / block_rows];
  if (query + block_rows <= last) {
    const int2 second = ranges[query / block_rows + 1];
    range = {min(range.x, second.x), max(range.y, second.y)};
  }
  const int first_key = range.x / block_rows * block_rows;
  if (thread == 0) {
    s.own.init(1);
    for (int i = 0; i < H::stages; ++i) s.full[i].init(1), s.empty[i].init(H::copier / 32);
    barriers_ready();
  }
  __syncthreads();

  if (thread >= H::copier) {
    fewer_registers<24>();
    if (thread > H::copier) return;
    s.own.expect((H::tiles + H::values) * H::own_bytes);
    for (int half = 0; half < H::groups; ++half) {  // boxes of queries have block_rows rows
      for (int j = 0; j < H::tiles; ++j) {
        copy_tile(memory + H::own_key + j * H::own_bytes + half * block_bytes, &maps.q, s.own,
                  j * tile_columns, query + half * block_rows, head);
      }
      for (int j = 0; j < H::values; ++j) {
        copy_tile(memory + H::own_value + j * H::own_bytes + half * block_bytes, &maps.d_out, s.own,
                  j * tile_columns, query + half * block_rows, head);
      }
    }
    Stage<H::stages> stage;
    for (int key = first_key; key <= last; key += block_rows) {
      s.empty[stage.index].wait(stage.phase ^ 1);
      s.full[stage.index].expect(H::stage_bytes);
      char* to = memory + H::walked + stage.index * H::stage_bytes;
      copy_keys(to, block_bytes, H::tiles, maps, a.nope / tile_columns, s.full[stage.index], key, group);
      for (int j = 0; j < H::values; ++j) {
        copy_tile(to + H::walked_value + j * block_bytes, &maps.v, s.full[stage.index], j * tile_columns, key,
                  group);
      }
      stage.next();
    }
    return;
  }

  more_registers<H::registers>();
  const int group_row = thread / 128 * 64, row = group_row + thread % 128 / 32 * 16 + lane / 4;
  float d_q[H::width / 2], lse[2], delta[2];
  int start[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = query + row + 8 * i;
    const bool real = t < a.tokens;
    lse[i] = real ? a.lse[t * a.lse_token + head * a.lse_head] * static_cast<float>(log2_e) : INFINITY;
    delta[i] = real ? b.delta[t * b.delta_token + head * b.delta_head] : 0;
    start[i] = real ? a.starts[t] : INT_MAX;
  }
  Stage<H::stages> stage;
  bool add = false;  // there are sums
  s.own.wait(0);
  for (int key = first_key; key <= last; key += block_rows) {
    const char* walked = memory + H::walked + stage.index * H::stage_bytes;
    s.full[stage.index].wait(stage.phase);
    if (key > query + group_row + 63) {  // the last ones
      if (lane == 0) s.empty[stage.index].arrive();
      stage.next();
      continue;
    }
    // [query, key]
    float score[32], d_score[32];
    products_begin();
    begin_product<H::steps, H::own_bytes>(score, memory + H::own_key + group_row * 128, walked);
    products_commit();
    begin_product<4 * H::values, H::own_bytes>(d_score, memory + H::own_value + group_row * 128,
                                               walked + H::walked_value);
    products_commit();
    const bool masked = key + block_rows - 1 > query + group_row || range.y > key;
    products_wait<2>();
    if (add && lane == 0) s.empty[stage.before()].arrive();
    products_wait<1>();
#pragma unroll
    for (int i = 0; i < 32; ++i) score[i] = fast_exp2(fmaf(score[i], a.scale, -lse[i / 2 % 2]));
    if (masked) {
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const int k = key + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (k > query + row + i / 2 % 2 * 8 || k < start[i / 2 % 2]) score[i] = 0;
      }
    }
    products_wait<0>();
#pragma unroll
    for (int i = 0; i < 32; ++i) d_score[i] = score[i] * (d_score[i] - delta[i / 2 % 2]);
    uint32_t p[16];
    pack(d_score, p);
    products_begin();
    begin_sum(d_q, p, walked, add);
    products_commit();
    add = true;
    stage.next();
  }
  products_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int t = query + row + 8 * i;
    if (t >= a.tokens) continue;
#pragma unroll
    for (int c = 0; c < H::width / 8; ++c) {
      b.d_q.store_pair(t, head, 8 * c + lane % 4 * 2, d_q[4 * c + 2 * i] * b.scale,
                       d_q[4 * c + 2 * i + 1] * b.scale);
    }
  }
}

template <class H>
void launch(Gradient b, const GradRows& d_k_rope, Context context) {
  const Expanded<__nv_bfloat16>& a = b.forward;
  constexpr int bytes = H::shared + static_cast<int>(sizeof(Shared)) + 1024;
  const int64_t blocks = ceil_div(a.tokens, block_rows), bytes_of_ranges = 256 * ceil_div(8 * blocks, 256);
  int2* ranges = static_cast<int2*>(context.workspace);
  int* before = reinterpret_cast<int*>(static_cast<char*>(context.workspace) + bytes_of_ranges);
  const int64_t taken = bytes_of_ranges + 256 * ceil_div(4 * kept_numbers(blocks), 256);
  context.workspace = static_cast<char*>(context.workspace) + taken;
  context.workspace_bytes -= taken;
  start_ranges<<<static_cast<unsigned>(blocks), 32, 0, context.stream>>>(a.starts, a.tokens, ranges);
  check_launch("attention_expanded_backward");
  if (attention_backward_kept_sm90(b, d_k_rope, ranges, before, context, b.when)) return;
  const unsigned tiles = static_cast<unsigned>(ceil_div(a.tokens, H::own_rows));
  if (b.d_k || b.d_v || d_k_rope) {
    allow_shared_memory(backward_keys<H>, bytes);
    const Maps maps = maps_of(b, block_rows, H::own_rows);
    for_waves(b, d_k_rope, context, 0, [&](const Gradient& part, int first, int groups, void*) {
      backward_keys<H><<<dim3(tiles, static_cast<unsigned>(groups)), H::threads, bytes, context.stream>>>(
          part, ranges, first, maps);
      check_launch("attention_expanded_backward");
    });
  }
  if (b.d_q) {
    allow_shared_memory(backward_queries<H>, bytes);
    backward_queries<H><<<dim3(tiles, static_cast<unsigned>(a.heads)), H::threads, bytes, context.stream>>>(
        b, ranges, maps_of(b, block_rows, block_rows));
    check_launch("attention_expanded_backward");
  }
}

}  // namespace

bool attention_backward_sm90(const Backward<__nv_bfloat16>& b, const GradRows& d_k_rope,
                             const Context& context) {
  const Expanded<__nv_bfloat16>& a = b.forward;
  const int key = a.nope + a.rope;
  if ((a.rope && a.nope % tile_columns) || !copies_heads(a) ||
      !copies_tiles(b.d_out.data, b.d_out.token, a.heads > 1 ? b.d_out.head : b.d_out.token) ||
      !b.d_q.has_pairs() || !b.d_k.has_pairs() || !b.d_v.has_pairs() || a.tokens > most_blocks * block_rows) {
    return false;
  }
  if (key == 192 && a.value == 128) {
    launch<HeadShape<3, 192, 2>>(b, d_k_rope, context);
  } else if (key == 128 && a.value == 128) {
    launch<HeadShape<2, 128, 2>>(b, d_k_rope, context);
  } else if (key == 128 && a.value == 64) {
    launch<HeadShape<2, 128, 1>>(b, d_k_rope, context);
  } else if (key == 96 && a.value == 64) {
    launch<HeadShape<2, 96, 1>>(b, d_k_rope, context);
  } else if (key == 64 && a.value == 64) {
    launch<HeadShape<1, 64, 1>>(b, d_k_rope, context);
  } else {
    return false;
  }
  return true;
}

}  // namespace latente::cuda
