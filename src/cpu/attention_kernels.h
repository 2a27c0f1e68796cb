// Attention on the CPU: what attention.cpp (checks and division of work) and the vector code of
// attention_{forward,backward,paged}.cpp share. T is float or double.
//
// All of it is one scheme (online softmax: Milakov and Gimelshein 2018; blocked attention: Dao et al. 2022)
// turned by 90 degrees: a block of scores is kept as [key, query], with queries in the vector lanes. Then the
// softmax never reduces across lanes, and every matrix product takes one operand as scalars from rows as they
// lie in memory and the other as vectors, so that only the queries are ever transposed. A query's result is a
// chain of operations in its own lane, in an order fixed by key positions: it depends on nothing else.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tensor/dtype.h"

namespace latente::attention {

// [T, H, D] with unit stride on D.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t token = 0, head = 0;  // strides in elements
  T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
  explicit operator bool() const { return data != nullptr; }
};

// A gradient in the same form.
template <class T>
struct GradRows {
  Rows<T> rows;
  bool accumulate = false;
  explicit operator bool() const { return static_cast<bool>(rows); }
};

// Queries and keys are taken in blocks of this many, counted from the start of their sequence.
inline constexpr int64_t expanded_block = 96;
// Up to this many blocks of queries go over the keys together, so that these are packed less often.
inline constexpr int64_t forward_group = 4;

// Tokens of a packed sequence: none outside attends to it, and it attends to none outside.
struct Segment {
  int64_t begin = 0, end = 0;
};

template <class T>
struct Expanded {
  int64_t heads = 0, groups = 0, nope = 0, rope = 0, value = 0;  // value: dv
  double scale = 1;
  Rows<const T> q, k, k_rope, v;
  const int32_t* starts = nullptr;
  Rows<T> out, lse;
};

template <class T>
struct ExpandedBackward {
  Expanded<T> forward;
  Rows<const T> d_out;
  Rows<T> delta;
  GradRows<T> d_q, d_k, d_v;
  T* d_k_rope = nullptr;  // [kv heads from first_head on, T, rope]: parts that attention.cpp adds up
  int64_t tokens = 0, first_head = 0;
};

// Queries [begin, end) of one head: up to forward_group blocks of the segment.
struct ForwardTask {
  Segment segment;
  int64_t begin = 0, end = 0, head = 0;
};

// out and lse of these queries. `next`, or null, is what the thread does after: its rows are brought into the
// cache meanwhile.
void forward_task(const Expanded<float>& a, const ForwardTask& task, const ForwardTask* next);
void forward_task(const Expanded<double>& a, const ForwardTask& task, const ForwardTask* next);

// delta[t, h] = d_out[t, h] · out[t, h] for the tokens [begin, end).
void delta_task(const ExpandedBackward<float>& a, int64_t begin, int64_t end);
void delta_task(const ExpandedBackward<double>& a, int64_t begin, int64_t end);

// d_k, d_v and the part of d_k_rope of one kv head, for the key blocks of [begin, end) in the segment; with
// `queries`, d_q of the segment too (begin and end must then be the segment's).
void backward_task(const ExpandedBackward<float>& a, Segment segment, int64_t begin, int64_t end,
                   int64_t group, bool queries);
void backward_task(const ExpandedBackward<double>& a, Segment segment, int64_t begin, int64_t end,
                   int64_t group, bool queries);
// d_q of the query block that begins at token `begin`, for one head. Bit for bit what backward_task gives.
void backward_query_task(const ExpandedBackward<float>& a, Segment segment, int64_t begin, int64_t head);
void backward_query_task(const ExpandedBackward<double>& a, Segment segment, int64_t begin, int64_t head);

// Keys of a cache are taken in blocks of paged_block, and these in chunks of paged_chunk: a chunk is reduced
// by online softmax, and chunks are merged in rising order, whoever computed them. The first chunk may be cut
// into shorter ones, of 32, 32, 64 and 128 keys, so that threads can share a short context.
inline constexpr int64_t paged_block = 64;
inline constexpr int64_t paged_chunk = 256;
inline constexpr int64_t paged_cuts = 3;
inline int64_t chunk_begin(int64_t chunk, int64_t cuts) {
  if (chunk > cuts) return (chunk - cuts) * paged_chunk;
  return chunk == 0 ? 0 : paged_chunk >> (cuts + 1 - chunk);
}
inline constexpr int64_t paged_rows = 64;

// Bytes of a narrow latent cache (Backend::narrow_entry_bytes).
struct LatentInt8 {
  int8_t code;
};
struct LatentFp8 {
  f8e4m3 code;
};
template <class S>
inline constexpr bool is_narrow = false;
template <>
inline constexpr bool is_narrow<LatentInt8> = true;
template <>
inline constexpr bool is_narrow<LatentFp8> = true;

// S: element type of the cache.
template <class T, class S>
struct Paged {
  int64_t heads = 0, groups = 0, key = 0, value = 0, page = 0;  // key: dk; value: dv; page: slots a page
  int64_t entry = 0;                                            // elements of a key as stored
  // Rows that share keys whatever the call, at least: how the kernel computes scores hangs on it, never on
  // the number of tokens.
  int64_t rows_together = 1;
  int64_t cuts = 0;  // of the first chunk
  double scale = 1;
  Rows<const T> q;
  Rows<T> out;
  const S* keys = nullptr;
  const S* values = nullptr;
  int64_t key_page = 0, key_slot = 0, key_head = 0;  // strides
  int64_t value_page = 0, value_slot = 0, value_head = 0;
  bool values_are_keys = false;  // the first `value` columns
  const int32_t* block_table = nullptr;
  int64_t block_table_row = 0;
  const int32_t* position = nullptr;
};

// Up to paged_rows query rows that share keys: rows first_row.. of the tokens [token, token + tokens) of one
// sequence, numbered token by token over the heads of kv head `group`.
struct PagedUnit {
  int64_t token = 0, tokens = 0, sequence = 0, group = 0, first_row = 0, rows = 0;
  int64_t chunks = 0;
};

// Elements of a unit's partial result: rows x (value, padded), then rows maxima and rows sums.
template <class T>
int64_t paged_partial_size(int64_t value);

// Reduces one chunk of the unit's keys into `partial`.
template <class T, class S>
void paged_chunk_task(const Paged<T, S>& a, const PagedUnit& unit, int64_t chunk, T* partial);
// Merges the chunks' partial results (`stride` elements apart) in order and writes out.
template <class T, class S>
void paged_merge_task(const Paged<T, S>& a, const PagedUnit& unit, T* partials, int64_t stride);
// Both for all chunks of the unit, one after another.
template <class T, class S>
void paged_unit_task(const Paged<T, S>& a, const PagedUnit& unit);
// One chunk added to the result of those before it (chunk 0 begins one), in `partial`.
template <class T, class S>
void paged_onto_task(const Paged<T, S>& a, const PagedUnit& unit, int64_t chunk, T* partial);

// An entry of a narrow cache (u8 or f8e4m3) as numbers.
void load_narrow(DType type, const std::byte* entry, int64_t rank, int64_t rope, float* latent,
                 float* rotary);

// Memory that lives as long as the calling thread and only grows, aligned to 64 bytes. `slot` 0 belongs to
// the task running on the thread, 1 to the kernel that divides the work.
void* scratch(int slot, int64_t bytes);

// Cuts scratch memory into arrays that begin on cache lines.
template <class T>
class Carver {
 public:
  explicit Carver(void* memory) : next_(static_cast<T*>(memory)) {}
  T* take(int64_t count) {
    T* taken = next_;
    next_ += (count + line - 1) / line * line;
    return taken;
  }
  static constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(T));

 private:
  T* next_;
};

// Row length in scratch for `count` elements: an odd number of cache lines, so that rows spread over all sets
// of the cache.
template <class T>
constexpr int64_t padded(int64_t count) {
  return ((count + Carver<T>::line - 1) / Carver<T>::line | 1) * Carver<T>::line;
}

}  // namespace latente::attention
