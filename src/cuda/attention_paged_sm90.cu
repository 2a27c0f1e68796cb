// Attention over a cache of latents on Hopper: 64 rows (heads of one token, or of neighbouring tokens of a
// sequence) against 64 keys at a time. A block has a warp that copies, a warpgroup that makes scores and
// their softmax, and two warpgroups that each hold half of the results' columns and add the values of one
// block of keys while the scores of the next are made. Results of pieces of a context are kept in half
// precision and put together by a second kernel.
#include "cuda/attention_paged_latents_sm90.cuh"
#include "cuda/attention_sm90.h"
#include "cuda/hopper.cuh"
#include "cuda/launch.cuh"

namespace latente::cuda {
namespace {

using namespace latents;

constexpr int tile_rows = 64, block_keys = 64, tile_bytes = 64 * 128, pair_bytes = 2 * tile_bytes;
constexpr int most_tile_tokens = tile_rows / 8;
constexpr int threads = 512;  // scores, values, values, copies

// A piece of the context of the tokens [token, token + count) of one sequence. None: there is no more.
struct Unit {
  int token, count, head, begin, end, split;
};

struct Told {
  Unit unit;
  bool first, last;  // of a run
  int position[most_tile_tokens];
};

// Which slot of a ring comes next, and which time it is used.
template <int slots>
struct Turn {
  int slot = 0, phase = 0;
  __device__ Turn after(int steps) const {
    const bool wraps = slot + steps >= slots;
    Turn then;
    then.slot = wraps ? slot + steps - slots : slot + steps;
    then.phase = phase ^ static_cast<int>(wraps);
    return then;
  }
};
constexpr int units_told = 2, lasts = 3;

// Full: the copies are there; empty: all have read them. A last tile is ready when the weights of its block's
// values stand in its place. Where lanes themselves write or read what is handed over, each that did arrives:
// one lane after __syncwarp would do, but racecheck does not follow that, and it is no faster.
template <class L>
struct Shared {
  Barrier told_full[units_told], told_empty[units_told], q_full, q_empty;
  Barrier pair_full[L::ring], pair_empty[L::ring], last_full[lasts], last_empty[lasts], ready[lasts];
  Told told[units_told];
  int place[units_told][tile_rows];                               // of rows' results, as place_of says
  float base[units_told][tile_rows], sum[units_told][tile_rows];  // of weights
  float keep[lasts][tile_rows];                                   // what is left of the results so far
};

template <class L>
struct Layout {
  static constexpr int last = L::ring * pair_bytes, q = last + lasts * tile_bytes;
  static constexpr int shared = q + L::tiles * tile_bytes;
  static constexpr int bytes = shared + static_cast<int>(sizeof(Shared<L>));
  static_assert(bytes <= 227 * 1024);
};

struct Work {
  Paged<__nv_bfloat16> a;
  PieceResults pieces;
  int token_rows;   // rows of a token in a tile: its heads, a multiple of 8
  int tile_tokens;  // tokens that share a tile, if they can
  int head_blocks;  // of a token with more heads than a tile has rows
  int box_keys;     // keys that one copy brings
  int tiles;        // of rows: a guess, as tokens of one sequence may share one
};

// The tokens that stand in one tile with `token`, if it is their first: of one sequence, cut alike. 0 if it
// is not.
__device__ int tokens_from(const Work& w, int token, int& length) {
  const int first = w.pieces.partials.first_token, in_group = (token - first) % w.tile_tokens;
  const int sequence = w.a.sequence[token], size = piece_keys(w.a.position[token] + 1);
  auto alike = [&](int t) { return w.a.sequence[t] == sequence && piece_keys(w.a.position[t] + 1) == size; };
  if (in_group > 0 && alike(token - 1)) return 0;
  const int end = min(token - in_group + w.tile_tokens, first + w.pieces.partials.tokens);
  length = w.a.position[token] + 1;
  int t = token + 1;
  for (; t < end && alike(t); ++t) length = max(length, w.a.position[t] + 1);
  return t - token;
}

// Pieces of a context that a block takes one after another, which saves fetching the queries: a power of two,
// at least two such runs a block if all contexts are as long. Longer runs leave less to the second-level
// cache, where tiles of one token's heads read the same keys.
__device__ int run_of(const Work& w, int length) {
  constexpr int most_keys = 2048;
  const int most =
      min(w.tiles * piece_count(length) / (2 * static_cast<int>(gridDim.x)), most_keys / piece_keys(length));
  return most < 2 ? 1 : 1 << (31 - __clz(most));
}

// use(unit, first, last) for each unit of this block, first and last of their runs; called by whole warps.
template <class Use>
__device__ void for_units(const Work& w, const Use& use) {
  const int lane = static_cast<int>(threadIdx.x) % 32, grid = static_cast<int>(gridDim.x);
  const int per_split = w.pieces.partials.tokens * w.head_blocks,
            units = per_split * w.pieces.partials.splits;
  // In each round the blocks move on by one: where only every second token begins a tile, say, these would
  // otherwise all fall to the same blocks.
  for (int round = lane; (round - lane) * grid < units; round += 32) {
    const int own = round * grid + (static_cast<int>(blockIdx.x) + round) % grid;
    Unit unit{};
    bool real = false;
    int more = 0;  // keys of the run's other pieces
    if (own < units) {
      unit.token = w.pieces.partials.first_token + own % per_split / w.head_blocks;
      unit.head = own % w.head_blocks * tile_rows;
      int length = 0;
      unit.count = tokens_from(w, unit.token, length);
      const int size = piece_keys(length);
      const int run = run_of(w, length);
      unit.split = own / per_split * run;
      unit.begin = unit.split * size;
      unit.end = min(length, unit.begin + size);
      more = min(length - unit.end, (run - 1) * size);
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
      int rest = __shfl_sync(whole_warp, more, from);
      for (bool first = true;; first = false) {
        use(chosen, first, rest <= 0);
        if (rest <= 0) break;
        const int size = chosen.end - chosen.begin;
        chosen.begin = chosen.end, chosen.end += min(size, rest), rest -= size, ++chosen.split;
      }
    }
  }
}

// Rows without a context. One warp.
__device__ void clear(const Work& w, const Unit& u) {
  for (int row = 0; row < u.count * w.a.heads; ++row) {
    __nv_bfloat16* to = w.a.out.at(u.token + row / w.a.heads, row % w.a.heads);
    for (int i = static_cast<int>(threadIdx.x) % 32; i < w.a.value; i += 32) to[i] = __nv_bfloat16{};
  }
}

template <class L>
__device__ void copy_units(const Work& w, const CUtensorMap& q_map, const CUtensorMap& kv_map, char* memory,
                           Shared<L>& s) {
  Turn<L::ring> pair;
  Turn<lasts> last;
  Turn<units_told> told;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int q_phase = 1;
  // What a unit is, and where its first keys lie, are inputs of a plan, which none of its kernels writes; so
  // the kernel in front may still be running. Whoever comes next waits for this kernel's end itself.
  bool alone = false;
  auto wait_for_kernel_in_front = [&] {
    if (alone) return;
    cudaGridDependencySynchronize();
    cudaTriggerProgrammaticLaunchCompletion();
    alone = true;
  };
  // Tells a unit, or that there is no more.
  auto tell = [&](const Unit& u, bool first, bool final) {
    s.told_empty[told.slot].wait(told.phase ^ 1);
    if (lane < u.count) s.told[told.slot].position[lane] = w.a.position[u.token + lane];
    if (lane == 0) {
      s.told[told.slot].unit = u;
      s.told[told.slot].first = first;
      s.told[told.slot].last = final;
    }
    s.told_full[told.slot].arrive();
    told = told.after(1);
  };
  for_units(w, [&](const Unit& u, bool first, bool final) {
    if (u.begin >= u.end) {
      wait_for_kernel_in_front();
      clear(w, u);
      return;
    }
    tell(u, first, final);
    const int sequence = w.a.sequence[u.token];
    for (int at = u.begin; at < u.end; at += block_keys) {
      // The pages of this block, a lane each.
      const int boxes = (min(block_keys, u.end - at) + w.box_keys - 1) / w.box_keys;
      const int key = at + lane * w.box_keys, bytes_a_tile = boxes * w.box_keys * 128;
      const int page = lane < boxes ? static_cast<int>(w.a.page_of(sequence, key)) : 0;
      auto copy = [&](int j, char* to, Barrier& full) {
        if (lane < boxes)
          copy_tile(to + lane * w.box_keys * 128, &kv_map, full, j * tile_columns, key % w.a.page, page);
      };
      wait_for_kernel_in_front();
      for (int j = 0; j < L::values; j += 2) {
        Barrier& full = s.pair_full[pair.slot];
        if (lane == 0) {
          s.pair_empty[pair.slot].wait(pair.phase ^ 1);
          full.expect(min(2, L::values - j) * bytes_a_tile);
        }
        __syncwarp();
        copy(j, memory + pair.slot * pair_bytes, full);
        if (j + 1 < L::values) copy(j + 1, memory + pair.slot * pair_bytes + tile_bytes, full);
        pair = pair.after(1);
      }
      if (lane == 0) {
        s.last_empty[last.slot].wait(last.phase ^ 1);
        s.last_full[last.slot].expect(bytes_a_tile);
      }
      __syncwarp();
      copy(L::values, memory + Layout<L>::last + last.slot * tile_bytes, s.last_full[last.slot]);
      last = last.after(1);
      if (at == u.begin && first) {  // the queries, for which there is only one place
        if (lane == 0) {
          const int heads = min(w.token_rows, tile_rows);
          s.q_empty.wait(q_phase);
          s.q_full.expect(L::tiles * u.count * min(w.a.heads, tile_rows) * 128);
          for (int j = 0; j < L::tiles; ++j) {
            for (int t = 0; t < u.count; ++t) {
              copy_tile(memory + Layout<L>::q + j * tile_bytes + t * heads * 128, &q_map, s.q_full,
                        j * tile_columns, u.head, u.token + t);
            }
          }
        }
        q_phase ^= 1;
      }
    }
  });
  tell(Unit{}, true, true);
  wait_for_kernel_in_front();
}

// Where the result of a row of a tile goes: the row of the partial results; or, of a context in one piece, ~
// half the offset in the output; or nowhere.
constexpr int nowhere = INT_MAX;
__device__ int place_of(const Work& w, const Told& told, int row) {
  const Unit& u = told.unit;
  const int t = row / w.token_rows, head = u.head + row % w.token_rows;
  if (t >= u.count || head >= w.a.heads) return nowhere;
  const int splits = piece_count(told.position[t] + 1);
  if (u.split >= splits) return nowhere;  // its context ends before this piece
  return splits == 1 ? ~static_cast<int>(w.a.out.at(u.token + t, head) - w.a.out.data >> 1)
                     : static_cast<int>(w.pieces.partials.row(u.token + t, head, u.split));
}

// A value that all lanes hold, so that the compiler knows.
__device__ int the_same(int x) { return __shfl_sync(whole_warp, x, 0); }

// The weights that a maximum is the base of may grow to 2^slack before the sums so far are scaled anew.
constexpr float slack = 8;

template <class L>
__device__ void make_weights(const Work& w, char* memory, Shared<L>& s) {
  const int warp = static_cast<int>(threadIdx.x) % 128 / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int row = warp * 16 + lane / 4;  // and row + 8
  Turn<L::ring> pair;
  Turn<lasts> last;
  Turn<units_told> told;
  int q_phase = 0;
  float score[32];

  for (;;) {
    s.told_full[told.slot].wait(told.phase);
    const Told& unit = s.told[told.slot];
    const int count = the_same(unit.unit.count), begin = the_same(unit.unit.begin),
              end = the_same(unit.unit.end);
    if (count == 0) return;
    int* const places = s.place[told.slot];
    if (lane % 4 == 0) places[row] = place_of(w, unit, row), places[row + 8] = place_of(w, unit, row + 8);
    const bool final_unit = the_same(unit.last);
    if (the_same(unit.first)) {
      s.q_full.wait(q_phase);
      q_phase ^= 1;
    }
    // The last key that the thread's two rows attend to, and that all do.
    int bound[2], least = INT_MAX;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = (row + 8 * i) / w.token_rows;
      bound[i] = t < count ? unit.position[t] : -1;
    }
    for (int t = 0; t < count; ++t) least = min(least, unit.position[t]);

    auto make_scores = [&](const Turn<L::ring>& first, const Turn<lasts>& of, bool final) {
#pragma unroll
      for (int j = 0; j < L::tiles; ++j) {
        const char* keys;
        if (j == L::values) {
          s.last_full[of.slot].wait(of.phase);
          keys = memory + Layout<L>::last + of.slot * tile_bytes;
        } else {
          const Turn<L::ring> at = first.after(j / 2);
          if (j % 2 == 0) s.pair_full[at.slot].wait(at.phase);
          keys = memory + at.slot * pair_bytes + j % 2 * tile_bytes;
        }
        // After each wait: where the compiler must add it by itself, it may run products one by one.
        if (j % 2 == 0 || j == L::values) products_begin();
        const uint64_t queries = rows_operand(memory + Layout<L>::q + j * tile_bytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int step = 4 * j + i;
          if (step >= L::steps) break;
          wgmma<0>(score, queries + i * rows_step, rows_operand(keys) + i * rows_step, step > 0);
        }
      }
      products_commit();
      products_wait<0>();
      if (final && lane == 0) s.q_empty.arrive();
      if (lane < L::pairs) s.pair_empty[first.after(lane).slot].arrive();
    };

    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    make_scores(pair, last, final_unit && begin + block_keys >= end);
    for (int at = begin; at < end; at += block_keys) {
      if (at + block_keys - 1 > least) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const int key = at + i / 4 * 8 + lane % 4 * 2 + i % 2;
          if (key > bound[i / 2 % 2]) score[i] = -INFINITY;
        }
      }
      // The weights stand as a tile [row, key].
      char* const weights = memory + Layout<L>::last + last.slot * tile_bytes;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float top = fmaxf(score[2 * i], score[2 * i + 1]);
#pragma unroll
        for (int c = 4; c < 32; c += 4) top = fmaxf(top, fmaxf(score[c + 2 * i], score[c + 2 * i + 1]));
        top = fmaxf(top, __shfl_xor_sync(whole_warp, top, 1));
        top = fmaxf(top, __shfl_xor_sync(whole_warp, top, 2)) * w.a.scale;
        float keep = 1;
        if (top > maximum[i] + slack) {
          keep = fast_exp2(maximum[i] - top);
          maximum[i] = top;
        }
        const float base = maximum[i] == -INFINITY ? 0 : maximum[i];
        const int r = row + 8 * i;
        float total = 0;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          const float low = fast_exp2(fmaf(score[4 * c + 2 * i], w.a.scale, -base));
          const float high = fast_exp2(fmaf(score[4 * c + 2 * i + 1], w.a.scale, -base));
          total += low + high;
          *reinterpret_cast<uint32_t*>(weights + r * 128 + ((c ^ r % 8) << 4) + lane % 4 * 4) =
              pack_bf16(low, high);
        }
        sum[i] = sum[i] * keep + total;  // of this thread's keys
        if (lane % 4 == 0) s.keep[last.slot][r] = keep;
      }
      if (at + block_keys >= end) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sum[i] += __shfl_xor_sync(whole_warp, sum[i], 1);
          sum[i] += __shfl_xor_sync(whole_warp, sum[i], 2);
          if (lane % 4 != 0) continue;
          const int r = row + 8 * i;
          s.base[told.slot][r] = maximum[i], s.sum[told.slot][r] = sum[i];
        }
        // Nothing has been copied to, or whatever a page holds, beyond the context's end: as values these
        // rows must not be NaN.
        const int valid = end - at;
#pragma unroll 1
        for (int i = warp * 32 + lane; i < (block_keys - valid) * L::values * 8; i += 128) {
          const int piece = i % 8, tile = i / 8 % L::values, r = valid + i / 8 / L::values;
          char* const to = memory + pair.after(tile / 2).slot * pair_bytes + tile % 2 * tile_bytes;
          *reinterpret_cast<uint4*>(to + r * 128 + piece * 16) = uint4{};
        }
      }
      fence_shared_writes();
      __syncwarp();
      pair = pair.after(L::pairs);
      const Turn<lasts> next = last.after(1);
      if (lane % 4 == 0) s.ready[last.slot].arrive();
      if (at + block_keys < end) make_scores(pair, next, final_unit && at + 2 * block_keys >= end);
      last = next;
    }
    s.told_empty[told.slot].arrive();
    told = told.after(1);
  }
}

// One warpgroup's share: `half` says which, values its tiles of the results' columns.
template <class L, int values>
__device__ void add_values(const Work& w, int half, char* memory, Shared<L>& s) {
  // Tiles of a product: with 128 registers at the start, the compiler takes no more than two.
  constexpr int wide = values < 2 ? values : 2, products = values / wide, sums = wide * tile_columns / 2;
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;  // and row + 8
  Turn<L::ring> pair;
  Turn<lasts> last;
  Turn<units_told> told;
  float out[products][sums];

  for (;;) {
    s.told_full[told.slot].wait(told.phase);
    if (the_same(s.told[told.slot].unit.count) == 0) return;
    int keys = the_same(s.told[told.slot].unit.end - s.told[told.slot].unit.begin);
#pragma unroll
    for (int part = 0; part < products; ++part) {
#pragma unroll
      for (int i = 0; i < sums; ++i) out[part][i] = 0;
    }
    for (; keys > 0; keys -= block_keys) {
      Turn<L::ring> at = pair.after(half * L::first / 2);
#pragma unroll
      for (int part = 0; part < products; ++part) s.pair_full[at.after(part).slot].wait(at.after(part).phase);
      s.ready[last.slot].wait(last.phase);
      const float keep[2] = {s.keep[last.slot][row], s.keep[last.slot][row + 8]};
      if (!__all_sync(whole_warp, keep[0] == 1 && keep[1] == 1)) {
#pragma unroll
        for (int part = 0; part < products; ++part) {
#pragma unroll
          for (int i = 0; i < sums; ++i) out[part][i] *= keep[i / 2 % 2];
        }
      }
      const uint64_t weights = rows_operand(memory + Layout<L>::last + last.slot * tile_bytes);
      products_begin();
#pragma unroll
      for (int part = 0; part < products; ++part) {
        const uint64_t block = columns_operand(memory + at.after(part).slot * pair_bytes, tile_bytes);
#pragma unroll
        for (int step = 0; step < block_keys / 16; ++step)
          wgmma<1>(out[part], weights + step * rows_step, block + step * columns_step, 1);
        products_commit();
      }
      auto release = [&](int part) {
        if (lane == 0) s.pair_empty[at.after(part).slot].arrive();
      };
      if constexpr (products == 2) {
        products_wait<1>();
        release(0);
      }
      products_wait<0>();
      release(products - 1);
      s.last_empty[last.slot].arrive();
      pair = pair.after(L::pairs);
      last = last.after(1);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int place = s.place[told.slot][row + 8 * i];
      if (place == nowhere) continue;
      const float sum = s.sum[told.slot][row + 8 * i];
      if (place < 0) {
        const float inverse = sum != 0 ? 1 / sum : 0;
        uint32_t* to = reinterpret_cast<uint32_t*>(w.a.out.data) + ~place + half * L::first * 32 + lane % 4;
#pragma unroll
        for (int c = 0; c < values * 8; ++c) {
          const float* x = out[c / (8 * wide)] + c % (8 * wide) * 4 + 2 * i;
          const uint32_t packed = inverse != 0 ? pack_bf16(x[0] * inverse, x[1] * inverse) : 0;
          asm volatile("st.global.b32 [%0], %1;" ::"l"(to + 4 * c), "r"(packed) : "memory");
        }
      } else {
        float most = 0;
#pragma unroll
        for (int part = 0; part < products; ++part) {
#pragma unroll
          for (int c = 0; c < sums; c += 4)
            most = fmaxf(most, fmaxf(fabsf(out[part][c + 2 * i]), fabsf(out[part][c + 2 * i + 1])));
        }
        const unsigned quad = 0xfu << (lane & ~3);
        most = fmaxf(most, __shfl_xor_sync(quad, most, 1));
        const PieceUnit unit(fmaxf(most, __shfl_xor_sync(quad, most, 2)));
        const float factor = unit.inverse();
        if (lane % 4 == 0) {
          RowOfPiece& known = w.pieces.rows[place];
          known.unit[half] = unit.value();
          if (half == 0) known.base = s.base[told.slot][row + 8 * i], known.sum = sum;
        }
        __half* const to = w.pieces.values + static_cast<int64_t>(place) * w.a.value +
                           half * L::first * tile_columns + lane % 4 * 8;
#pragma unroll
        for (int c = 0; c < values * 8; c += 4) {
          const float* x = out[c / (8 * wide)] + c % (8 * wide) * 4 + 2 * i;
          asm volatile(
              "st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to + 8 * c),
              "r"(pack_half(x[0] * factor, x[1] * factor)), "r"(pack_half(x[4] * factor, x[5] * factor)),
              "r"(pack_half(x[8] * factor, x[9] * factor)), "r"(pack_half(x[12] * factor, x[13] * factor))
              : "memory");
        }
      }
    }
    s.told_empty[told.slot].arrive();
    told = told.after(1);
  }
}

// Brings nearer where the block's first unit finds its entries. These are inputs of a plan, which none of its
// kernels writes, so the kernel in front may still be running. One warp.
__device__ void read_ahead(const Work& w) {
  const auto touch = [](const int32_t* at) { asm volatile("prefetch.global.L1 [%0];" ::"l"(at)); };
  const int lane = static_cast<int>(threadIdx.x) % 32, per_split = w.pieces.partials.tokens * w.head_blocks;
  const int token = w.pieces.partials.first_token + static_cast<int>(blockIdx.x) % per_split / w.head_blocks;
  touch(w.a.position + token);
  const int32_t* pages = w.a.block_table + w.a.sequence[token] * w.a.table_row;
  if (lane * 32 < w.a.table_row) touch(pages + lane * 32);
}

template <class L>
__global__ void __launch_bounds__(threads, 1)
    latent_kernel(const Work w, const __grid_constant__ CUtensorMap q_map,
                  const __grid_constant__ CUtensorMap kv_map) {
  extern __shared__ __align__(1024) char memory[];
  Shared<L>& s = *reinterpret_cast<Shared<L>*>(memory + Layout<L>::shared);
  if (threadIdx.x == 0) {
    for (Barrier& b : s.told_full) b.init(32);
    for (Barrier& b : s.told_empty) b.init(12 * 32);
    s.q_full.init(1);
    s.q_empty.init(4);
    for (Barrier& b : s.pair_full) b.init(1);
    for (Barrier& b : s.pair_empty) b.init(8);
    for (Barrier& b : s.last_full) b.init(1);
    for (Barrier& b : s.last_empty) b.init(8 * 32);
    for (Barrier& b : s.ready) b.init(4 * 8);
    barriers_ready();
    prefetch_map(q_map);
    prefetch_map(kv_map);
  }
  if (threadIdx.x / 32 == 12) read_ahead(w);
  __syncthreads();
  const int group = __shfl_sync(whole_warp, static_cast<int>(threadIdx.x) / 128, 0);
  if (group == 3) {
    fewer_registers<64>();
    if (threadIdx.x / 32 == 12) copy_units<L>(w, q_map, kv_map, memory, s);
  } else if (group == 0) {
    fewer_registers<96>();
    make_weights<L>(w, memory, s);
  } else {
    more_registers<176>();
    if constexpr (L::first == L::second) {
      add_values<L, L::first>(w, group - 1, memory, s);
    } else if (group == 1) {
      add_values<L, L::first>(w, 0, memory, s);
    } else {
      add_values<L, L::second>(w, 1, memory, s);
    }
  }
}

template <class L>
void launch(const Work& w, const View& q, const View& cache, const Context& context) {
  const CUtensorMap q_map = tile_map(q.data, q[2], q[1], q.stride(1), q[0], q.stride(0),
                                     std::min(static_cast<int>(q[1]), tile_rows));
  const CUtensorMap kv_map =
      tile_map(cache.data, cache[3], cache[1], cache.stride(1), cache[0], cache.stride(0), w.box_keys);
  const int64_t units =
      static_cast<int64_t>(w.pieces.partials.tokens) * w.head_blocks * w.pieces.partials.splits;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(units, context.multiprocessors));
  launch_early(latent_kernel<L>, grid, threads, Layout<L>::bytes, "attention_paged", context, w, q_map,
               kv_map);
  if (w.pieces.partials.splits > 1) combine_pieces_sm90(w.a, w.pieces, context);
}

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
  if (attention_paged_short_sm90(a, keys, pages, context) ||
      attention_paged_pieces_sm90(a, keys, pages, context)) {
    return true;
  }
  Work w;
  w.a = a;
  w.token_rows = static_cast<int>(std::min<int64_t>(8 * ceil_div(a.heads, 8), tile_rows));
  w.tile_tokens = tile_rows / w.token_rows;
  w.head_blocks = static_cast<int>(ceil_div(a.heads, tile_rows));
  w.box_keys = static_cast<int>(std::min<int64_t>(page, block_keys));
  w.tiles = static_cast<int>(w.head_blocks * std::max(ceil_div(a.tokens, w.tile_tokens),
                                                      std::min<int64_t>(a.tokens, pages.block_table[0])));
  const int64_t row_bytes = 2 * a.value + static_cast<int64_t>(sizeof(RowOfPiece));
  for_token_rounds_of(row_bytes, a.tokens, a.heads, most_pieces_of(capacity(keys, pages)), context,
                      [&](const Partials& partials, int64_t most_rows) {
                        auto* const rows = static_cast<RowOfPiece*>(context.workspace);
                        w.pieces = {partials, reinterpret_cast<__half*>(rows + most_rows), rows};
                        (large ? launch<Latent512> : launch<Latent192>)(w, q, keys, context);
                      });
  return true;
}

}  // namespace latente::cuda
