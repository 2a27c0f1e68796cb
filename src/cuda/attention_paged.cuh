// What the kernels of attention over a paged cache share: how a context is cut, where partial results go,
// elements of caches.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>

#include "cuda/attention.cuh"

namespace latente::cuda {

// The keys of a row whose context has `length` entries are cut into pieces of this many, and the results of
// the pieces are put together in their order. A function of the model and of the row's own context: the same
// bits whatever shares the call. Small enough that one sequence keeps most of the device busy; the more
// heads, the more a piece's results weigh, which are written and read again.
__host__ __device__ constexpr int split_keys(int length, int heads) {
  return length <= 2048    ? 128
         : length <= 8192  ? (heads < 64 ? 256 : 512)
         : length <= 32768 ? (heads < 64 ? 512 : 1024)
                           : 4096;
}
__host__ __device__ constexpr int split_count(int length, int heads) {
  return length <= 0 ? 1 : (length + split_keys(length, heads) - 1) / split_keys(length, heads);
}
// The most pieces of any context up to `length` entries.
constexpr int most_splits(int64_t length, int64_t heads) {
  int most = 1;
  for (const int64_t edge : {int64_t{2048}, int64_t{8192}, int64_t{32768}, length}) {
    most = std::max(most, split_count(static_cast<int>(std::min(edge, length)), static_cast<int>(heads)));
  }
  return most;
}

// Results of pieces, of the tokens from first_token on: quotients and logarithms (base 2) of sums.
struct Partials {
  float *out = nullptr, *lse = nullptr;  // [token, head, split, value], [token, head, split]
  int first_token = 0, tokens = 0, heads = 0, splits = 1;

  __device__ int64_t row(int token, int head, int split) const {
    return (static_cast<int64_t>(token - first_token) * heads + head) * splits + split;
  }
};

// What float16 results of a row of a piece are in units of: a power of two that makes the largest one between
// 2^14 and 2^15.
struct PieceUnit {
  uint32_t up;

  __device__ explicit PieceUnit(float largest) {
    up = min(127 + 14 + 127 - (__float_as_uint(largest) >> 23), 253);
  }
  __device__ float value() const { return __uint_as_float((254 - up) << 23); }
  __device__ float inverse() const { return __uint_as_float(up << 23); }
};

// What is known of a row of a float16 result: its weights, in units of two to the power of `base`, have this
// sum; the columns of either half are in units of their own beside.
struct RowOfPiece {
  float base, sum, unit[2];
};
// Results of pieces in float16, and what is known of their rows: those of `partials`.
struct PieceResults {
  Partials partials;
  // [token, head, split, value]; of each 32 columns eight a lane: 8c + 2i and 8c + 2i + 1 of lane i.
  __half* values = nullptr;
  RowOfPiece* rows = nullptr;
};

template <class T>
struct Paged {
  int tokens = 0, heads = 0, groups = 0, key = 0, value = 0, page = 0;
  float scale = 1;  // with log2(e)
  Rows<const T> q;
  Rows<T> out;
  const int32_t *block_table = nullptr, *sequence = nullptr, *position = nullptr;
  int64_t table_row = 0;

  __device__ int64_t page_of(int seq, int at) const { return block_table[seq * table_row + at / page]; }
};

template <class T>
Paged<T> paged(const View& q, const View& cache, const Pages& pages, double scale, const View& out) {
  LATENTE_ASSERT(q.shape.rank() == 3 && cache.shape.rank() == 4 && out.shape.rank() == 3);
  LATENTE_ASSERT(pages.sequence.contiguous() && pages.position.contiguous() &&
                 pages.block_table.stride(1) == 1 && pages.sequence.count() == q[0] &&
                 pages.position.count() == q[0] && out[0] == q[0] && out[1] == q[1]);
  Paged<T> a;
  a.tokens = static_cast<int>(q[0]);
  a.heads = static_cast<int>(q[1]);
  a.groups = static_cast<int>(cache[2]);
  a.key = static_cast<int>(q[2]);
  a.value = static_cast<int>(out[2]);
  a.page = static_cast<int>(cache[1]);
  a.scale = static_cast<float>(scale * log2_e);
  a.q = rows_of<const T>(q);
  a.out = rows_of<T>(out);
  a.block_table = pages.block_table.as<int32_t>();
  a.table_row = pages.block_table.stride(0);
  a.sequence = pages.sequence.as<int32_t>();
  a.position = pages.position.as<int32_t>();
  return a;
}

// The entries a block table can name for one sequence.
inline int64_t capacity(const View& cache, const Pages& pages) { return pages.block_table[1] * cache[1]; }

// launch(partials, rows) for stretches of tokens whose partial results, at most so many rows of row_bytes,
// fit into the workspace.
template <class Launch>
void for_token_rounds_of(int64_t row_bytes, int64_t tokens, int64_t heads, int64_t splits,
                         const Context& context, const Launch& launch) {
  const int64_t token_bytes = heads * splits * row_bytes;
  const int64_t round = splits == 1 ? tokens : std::min(tokens, context.workspace_bytes / token_bytes);
  if (round < 1) {
    fail("attention: workspace: expected at least {} bytes, found {}", token_bytes, context.workspace_bytes);
  }
  for (int64_t first = 0; first < tokens; first += round) {
    Partials p;
    p.first_token = static_cast<int>(first);
    p.tokens = static_cast<int>(std::min(round, tokens - first));
    p.heads = static_cast<int>(heads);
    p.splits = static_cast<int>(splits);
    launch(p, round * heads * splits);
  }
}

// launch(partials), with partial results in float32.
template <class Launch>
void for_token_rounds(int64_t tokens, int64_t heads, int64_t value, int64_t splits, const Context& context,
                      const Launch& launch) {
  for_token_rounds_of((value + 1) * static_cast<int64_t>(sizeof(float)), tokens, heads, splits, context,
                      [&](Partials p, int64_t rows) {
                        p.out = static_cast<float*>(context.workspace);
                        p.lse = p.out + rows * value;
                        launch(p);
                      });
}

// A cache's elements. Of a narrow one the latent's codes times their scale, then the rotary part.
template <class S>
struct CacheElements {
  static constexpr bool narrow = false;
  const S* data;
  int64_t page_stride, slot_stride, head_stride;
  __device__ float at(int64_t page, int slot, int head, int i) const {
    return widen(data[page * page_stride + slot * slot_stride + head * head_stride + i]);
  }
};

template <bool fp8>
struct NarrowElements {
  static constexpr bool narrow = true;
  const unsigned char* data;
  int64_t page_stride, slot_stride;
  int rank, rope;
  __device__ const unsigned char* entry(int64_t page, int slot) const {
    return data + page * page_stride + slot * slot_stride;
  }
  // Entries may begin at any address.
  __device__ float scale(const unsigned char* entry) const {
    const unsigned char* from = entry + rank + 2 * rope;
    return __uint_as_float(from[0] | from[1] << 8 | from[2] << 16 | static_cast<unsigned>(from[3]) << 24);
  }
  __device__ float at(int64_t page, int slot, int, int i) const {
    const unsigned char* from = entry(page, slot);
    if (i >= rank) {
      const unsigned char* two = from + rank + 2 * (i - rank);
      return __uint_as_float(static_cast<unsigned>(two[0] | two[1] << 8) << 16);
    }
    if constexpr (fp8) {
      const __half_raw half = __nv_cvt_fp8_to_halfraw(from[i], __NV_E4M3);
      return scale(from) * __half2float(__half(half));
    } else {
      return scale(from) * static_cast<float>(static_cast<signed char>(from[i]));
    }
  }
};

// use(elements) of a cache [pages, page, G, width]; rank of narrow ones.
template <class Use>
void with_elements(const View& cache, int64_t rank, const Use& use) {
  if (Backend::is_narrow_cache(cache.dtype)) {
    const auto* data = static_cast<const unsigned char*>(cache.data);
    const int rope = static_cast<int>(Backend::rotary_width(cache.dtype, cache[3], rank));
    if (cache.dtype == DType::u8) {
      use(NarrowElements<false>{data, cache.stride(0), cache.stride(1), static_cast<int>(rank), rope});
    } else {
      use(NarrowElements<true>{data, cache.stride(0), cache.stride(1), static_cast<int>(rank), rope});
    }
  } else if (cache.dtype == DType::bf16) {
    use(CacheElements<__nv_bfloat16>{device_data<__nv_bfloat16>(cache), cache.stride(0), cache.stride(1),
                                     cache.stride(2)});
  } else {
    use(CacheElements<float>{cache.as<float>(), cache.stride(0), cache.stride(1), cache.stride(2)});
  }
}

// Puts the pieces of rows that have several together. The kernel before it on the stream made them.
template <class T>
void combine_splits(const Paged<T>& a, const Partials& partials, const Context& context);

// On tensor cores of compute capability 8.0 and later; false, having done nothing, for what it has no kernel
// for. MHA, GQA and MQA over bfloat16 with values 64 and 128 wide; absorbed MLA over latents of 8 bits, 192
// and 512 wide, where a block has the shared memory.
bool attention_paged_mma(const Paged<__nv_bfloat16>& a, const View& keys, const View& values,
                         const Pages& pages, const Context& context);

}  // namespace latente::cuda
