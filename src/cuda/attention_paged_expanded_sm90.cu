// Attention over a cache of latents, expanded, on Hopper: a product makes keys and values of some heads for
// all entries that a row attends to, then attention runs over them as within a call.
#include <algorithm>

#include "cuda/attention_sm90.h"
#include "cuda/hopper.cuh"

namespace latente::cuda {
namespace {

constexpr int own_keys = 128, stages = 3, threads = 384;
constexpr int latent_bytes = own_keys * 128;  // of a tile of 64 columns

template <int width>  // of a head: keys and values
struct Layout {
  static constexpr int weight_bytes = width * 128, stage_bytes = latent_bytes + weight_bytes;
  static constexpr int shared = stages * stage_bytes;
};

struct Shared {
  Barrier full[stages], empty[stages];
};

// A block a sequence: how many entries its rows attend to.
__global__ void lengths_kernel(const int32_t* sequence, const int32_t* position, int tokens, int first,
                               int32_t* lengths) {
  int own = 0;
  for (int t = static_cast<int>(threadIdx.x); t < tokens; t += static_cast<int>(blockDim.x)) {
    if (sequence[t] == first + static_cast<int>(blockIdx.x)) own = max(own, position[t] + 1);
  }
  __shared__ int longest;
  if (threadIdx.x == 0) longest = 0;
  __syncthreads();
  atomicMax(&longest, own);
  __syncthreads();
  if (threadIdx.x == 0) lengths[blockIdx.x] = longest;
}

struct Work {
  Paged<__nv_bfloat16> a;
  ExpandedCache to;
  const __nv_bfloat16* cache;
  int64_t page_stride, slot_stride;
  int rank, box_keys;
  const int32_t* lengths;
};

// A block 128 entries of a sequence and a head: latents · kv_bᵀ. Rows past the sequence's end become zeros.
template <int width>
__global__ void __launch_bounds__(threads, 1)
    expand_kernel(const Work w, const __grid_constant__ CUtensorMap cache_map,
                  const __grid_constant__ CUtensorMap weight_map) {
  extern __shared__ char unaligned[];
  char* memory = unaligned + (1024 - shared_address(unaligned) % 1024) % 1024;
  using L = Layout<width>;
  Shared& s = *reinterpret_cast<Shared*>(memory + L::shared);
  const int first = static_cast<int>(blockIdx.x) * own_keys, head = static_cast<int>(blockIdx.y);
  const int local = static_cast<int>(blockIdx.z), sequence = w.to.first_sequence + local;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int count = min(own_keys, w.lengths[local] - first);
  if (count <= 0) return;
  if (thread == 0) {
    for (int i = 0; i < stages; ++i) s.full[i].init(1), s.empty[i].init(8);
    barriers_ready();
  }
  __syncthreads();
  const int tiles = w.rank / tile_columns;

  if (thread >= 256) {
    fewer_registers<24>();
    if (thread >= 256 + 32) return;
    const int boxes = (count + w.box_keys - 1) / w.box_keys, key = first + lane * w.box_keys;
    const int page = lane < boxes ? static_cast<int>(w.a.page_of(sequence, key)) : 0;
    for (int j = 0; j < tiles; ++j) {
      const int stage = j % stages;
      s.empty[stage].wait((j / stages & 1) ^ 1);
      char* to = memory + stage * L::stage_bytes;
      if (lane == 0) {
        s.full[stage].expect(boxes * w.box_keys * 128 + L::weight_bytes);
        copy_tile(to + latent_bytes, &weight_map, s.full[stage], j * tile_columns,
                  (w.to.first_head + head) * width, 0);
      }
      __syncwarp();
      if (lane < boxes) {
        copy_tile(to + lane * w.box_keys * 128, &cache_map, s.full[stage], j * tile_columns, key % w.a.page,
                  page);
      }
    }
    return;
  }

  more_registers<240>();
  const int group_row = thread / 128 * 64, row = group_row + thread % 128 / 32 * 16 + lane / 4;
  float sum[width / 2];
  for (int j = 0; j < tiles; ++j) {
    const char* from = memory + j % stages * L::stage_bytes;
    s.full[j % stages].wait(j / stages & 1);
    products_begin();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      wgmma<0>(sum, rows_operand(from + group_row * 128) + step * rows_step,
               rows_operand(from + latent_bytes) + step * rows_step, j > 0 || step > 0);
    }
    products_commit();
    products_wait<0>();
    if (lane == 0) s.empty[j % stages].arrive();
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = row + 8 * i;
    if (first + r >= w.to.count) continue;
    const int64_t at = (static_cast<int64_t>(local) * w.to.heads + head) * w.to.count + first + r;
#pragma unroll
    for (int c = 0; c < width / 8; ++c) {
      const int column = 8 * c + lane % 4 * 2;
      const uint32_t pair = r < count ? pack_bf16(sum[4 * c + 2 * i], sum[4 * c + 2 * i + 1]) : 0;
      __nv_bfloat16* to = column < w.to.nope ? w.to.keys + at * w.to.nope + column
                                             : w.to.values + at * w.a.value + column - w.to.nope;
      *reinterpret_cast<uint32_t*>(to) = pair;
    }
  }
  if (head > 0) return;
  const int rope = w.a.key - w.to.nope;
  for (int i = thread; i < own_keys * rope / 8; i += 256) {
    const int r = i / (rope / 8), piece = i % (rope / 8) * 8, key = first + r;
    if (key >= w.to.count) break;
    uint4 x{};
    if (r < count) {
      x = *reinterpret_cast<const uint4*>(w.cache + w.a.page_of(sequence, key) * w.page_stride +
                                          key % w.a.page * w.slot_stride + w.rank + piece);
    }
    *reinterpret_cast<uint4*>(w.to.rope + (static_cast<int64_t>(local) * w.to.count + key) * rope + piece) =
        x;
  }
}

template <int width>
void expand(const Work& w, const View& cache, const View& kv_b, StreamHandle stream) {
  const CUtensorMap cache_map =
      tile_map(cache.data, w.rank, cache[1], cache.stride(1), cache[0], cache.stride(0), w.box_keys);
  const CUtensorMap weight_map =
      tile_map(kv_b.data, w.rank, kv_b[0], kv_b.stride(0), 1, kv_b.stride(0), width);
  constexpr int bytes = Layout<width>::shared + static_cast<int>(sizeof(Shared)) + 1024;
  allow_shared_memory(expand_kernel<width>, bytes);
  const dim3 grid(static_cast<unsigned>(ceil_div(w.to.count, own_keys)), static_cast<unsigned>(w.to.heads),
                  static_cast<unsigned>(w.to.sequences));
  expand_kernel<width><<<grid, threads, bytes, stream>>>(w, cache_map, weight_map);
  check_launch("attention_paged_expanded");
}

}  // namespace

bool attention_paged_expanded_sm90(const View& q, const View& cache, const View& kv_b, const Pages& pages,
                                   double scale, const View& out, const Context& context) {
  if (q.dtype != DType::bf16 || cache.dtype != DType::bf16 || kv_b.dtype != DType::bf16) return false;
  Work w;
  w.a = paged<__nv_bfloat16>(q, cache, pages, scale, out);
  w.rank = static_cast<int>(kv_b[1]);
  w.to.nope = w.a.key - static_cast<int>(cache[3] - kv_b[1]);
  const bool large = w.a.key == 192 && w.to.nope == 128 && w.a.value == 128;
  const bool small = w.a.key == 96 && w.to.nope == 64 && w.a.value == 64;
  const int64_t page = cache[1];
  if ((!large && !small) || w.rank % tile_columns != 0) return false;
  if (page % own_keys != 0 && page != 64 && page != 32 && page != 16 && page != 8) return false;
  if (!copies_tiles(cache.data, cache.stride(1), cache.stride(0)) || kv_b.stride(1) != 1 ||
      !copies_tiles(kv_b.data, kv_b.stride(0), kv_b.stride(0)) ||
      !copies_tiles(q.data, q.stride(0), q[1] > 1 ? q.stride(1) : q.stride(0)) || w.a.out.token % 2 != 0 ||
      w.a.out.head % 2 != 0 || reinterpret_cast<uintptr_t>(w.a.out.data) % 4 != 0) {
    return false;
  }
  // As many sequences at a time as fit into the workspace, then heads; one of each at least.
  const int64_t sequences = pages.block_table[0], count = capacity(cache, pages);
  const int64_t rope = w.a.key - w.to.nope, head_bytes = 2 * count * (w.to.nope + w.a.value);
  const int64_t lengths_bytes = 256 * ceil_div(4 * sequences, 256), rope_bytes = 2 * count * rope;
  const int64_t room = context.workspace_bytes - lengths_bytes;
  const int64_t together = std::min(sequences, room / (head_bytes + rope_bytes));
  if (together < 1) return false;
  const int64_t heads = std::clamp<int64_t>((room / together - rope_bytes) / head_bytes, 1, w.a.heads);
  char* memory = static_cast<char*>(context.workspace);
  int32_t* lengths = reinterpret_cast<int32_t*>(memory);
  w.to.count = static_cast<int>(count);
  w.to.rope = reinterpret_cast<__nv_bfloat16*>(memory + lengths_bytes);
  w.to.keys = w.to.rope + together * count * rope;
  w.cache = device_data<__nv_bfloat16>(cache);
  w.page_stride = cache.stride(0), w.slot_stride = cache.stride(1);
  w.box_keys = static_cast<int>(std::min<int64_t>(page, own_keys));
  w.lengths = lengths;
  for (int64_t s = 0; s < sequences; s += together) {
    w.to.first_sequence = static_cast<int>(s);
    w.to.sequences = static_cast<int>(std::min(together, sequences - s));
    lengths_kernel<<<static_cast<unsigned>(w.to.sequences), 256, 0, context.stream>>>(
        w.a.sequence, w.a.position, w.a.tokens, w.to.first_sequence, lengths);
    check_launch("attention_paged_expanded");
    for (int64_t h = 0; h < w.a.heads; h += heads) {
      w.to.first_head = static_cast<int>(h);
      w.to.heads = static_cast<int>(std::min(heads, w.a.heads - h));
      w.to.values = w.to.keys + static_cast<int64_t>(w.to.sequences) * w.to.heads * count * w.to.nope;
      (large ? expand<256> : expand<128>)(w, cache, kv_b, context.stream);
      attend_expanded_cache_sm90(w.a, w.to, context);
    }
  }
  return true;
}

}  // namespace latente::cuda
