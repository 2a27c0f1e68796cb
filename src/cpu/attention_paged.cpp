// Attention over a paged cache. The rows of a unit (query tokens of one sequence x heads that share keys) lie
// in the vector lanes.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/attention_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/attention_paged.cpp"
#include "hwy/foreach_target.h"  // must precede highway.h

#include "cpu/attention_int8-inl.h"
#include "cpu/attention_tile-inl.h"

HWY_BEFORE_NAMESPACE();
namespace latente::attention::HWY_NAMESPACE {

// 32 vectors rather than 16.
inline constexpr bool many_registers = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM;

// Whether latents and what meets them are multiplied as whole numbers.
template <class S>
inline constexpr bool as_codes = std::is_same_v<S, LatentInt8>;

// A unit's result over some keys: out [rows, value] relative to the maxima, in base 2.
template <class T>
struct Partial {
  Partial(T* memory, int64_t value) : out_row(padded<T>(value)) {
    Carver<T> carver(memory);
    out = carver.take(paged_rows * out_row);
    maximum = carver.take(paged_rows);
    sum = carver.take(paged_rows);
  }
  static int64_t elements(int64_t value) { return paged_rows * (padded<T>(value) + 2); }

  int64_t out_row;
  T *out, *maximum, *sum;
};

template <class T, class S>
struct ChunkScratch {
  ChunkScratch(const Paged<T, S>& a, const PagedUnit& unit, void* memory)
      : rows(round_up(unit.rows, lanes<T>())),
        key_row(padded<T>(as_codes<S> ? a.key - a.value : a.key)),
        value_row(a.values_are_keys ? key_row : padded<T>(a.value)) {
    Carver<T> carver(memory);
    queries = carver.take(key_row * paged_rows);
    scores = carver.take(paged_block * paged_rows);
    keys = carver.take(paged_block * key_row);
    values = a.values_are_keys ? keys : carver.take(paged_block * value_row);
    factor = carver.take(paged_rows);
    first = carver.take(paged_rows);
    last = carver.take(paged_rows);
    if constexpr (as_codes<S>) {
      code_row = padded<int16_t>(a.value);
      query_codes = reinterpret_cast<int16_t*>(carver.take(paged_rows * code_row / 2));
      key_codes = reinterpret_cast<int16_t*>(carver.take(paged_block * code_row / 2));
      weight_codes = reinterpret_cast<int32_t*>(carver.take(paged_block / 2 * paged_rows));
      query_scale = carver.take(paged_rows);
      key_scale = carver.take(paged_block);
      weight_scale = carver.take(paged_rows);
    }
    partials = carver.take(0);
  }
  static int64_t elements(const Paged<T, S>& a) {
    int64_t count = paged_block * (2 * padded<T>(a.key) + padded<T>(a.value) + paged_rows + 8) +
                    padded<T>(a.key) * paged_rows;
    if (as_codes<S>)
      count += (paged_rows + paged_block) * padded<int16_t>(a.value) / 2 + paged_block / 2 * paged_rows +
               2 * paged_rows + paged_block;
    return count;
  }

  int64_t rows;  // of the unit, padded: the row length of scores [key, row]
  int64_t key_row, value_row;
  T *queries, *scores, *keys, *values, *factor, *first, *last;
  // With codes, queries and keys above are the rotary parts alone.
  int64_t code_row;
  int16_t *query_codes, *key_codes;  // [row, code_row]
  int32_t* weight_codes;             // pairs: [key / 2, row]
  T *query_scale, *key_scale, *weight_scale;
  T* partials;  // what follows in memory
};

// A cached key and its value.
template <class S>
struct Entry {
  const S *key, *value;
};

template <class T, class S>
Entry<S> entry_at(const Paged<T, S>& a, const PagedUnit& unit, int64_t position) {
  const int64_t page = a.block_table[unit.sequence * a.block_table_row + position / a.page];
  const int64_t slot = position % a.page;
  return {a.keys + page * a.key_page + slot * a.key_slot + unit.group * a.key_head,
          a.values + page * a.value_page + slot * a.value_slot + unit.group * a.value_head};
}

struct RowAt {
  int64_t token, head;
};

template <class T, class S>
RowAt row_at(const Paged<T, S>& a, const PagedUnit& unit, int64_t row) {
  const int64_t share = a.heads / a.groups, index = unit.first_row + row;
  return {unit.token + index / share, unit.group * share + index % share};
}

// Scores are computed with rows in the lanes, queries lying as [i, row], where the heads that share a key
// fill them and registers are few: then a tile has more sums. Else lanes run along the width, queries lying
// as [row, key_row]. The model and the processor decide alone, so that a row's bits do not depend on other
// rows.
template <class T, class S>
bool rows_in_lanes(const Paged<T, S>& a) {
  return !as_codes<S> && !many_registers && a.rows_together >= lanes<T>();
}

template <class T, class S>
void load_paged_queries(const Paged<T, S>& a, const PagedUnit& unit, ChunkScratch<T, S>& s) {
  const T scale = static_cast<T>(a.scale * 1.4426950408889634);
  if (rows_in_lanes(a)) {
    const int64_t share = a.heads / a.groups;
    if (share == 1) {  // a row is a token
      transpose(a.q.at(unit.token + unit.first_row, unit.group), a.q.token, unit.rows, a.key, scale,
                s.queries, s.rows, s.rows);
      return;
    }
    for (int64_t row = 0; row < unit.rows;) {
      const RowAt at = row_at(a, unit, row);
      const int64_t here = std::min(unit.rows - row, (unit.group + 1) * share - at.head);
      const bool final = row + here == unit.rows;
      transpose(a.q.at(at.token, at.head), a.q.head, here, a.key, scale, s.queries + row, s.rows,
                final ? s.rows - row : here);
      row += here;
    }
    return;
  }
  // Rows up to the next four, zeros beyond the unit's.
  for (int64_t row = 0; row < round_up(unit.rows, 4); ++row) {
    T* to = s.queries + row * s.key_row;
    if (row >= unit.rows) {
      std::fill_n(to, s.key_row, T{0});
      if constexpr (as_codes<S>) {
        std::fill_n(s.query_codes + row * s.code_row, s.code_row, int16_t{0});
        s.query_scale[row] = 0;
      }
      continue;
    }
    const RowAt at = row_at(a, unit, row);
    const T* from = a.q.at(at.token, at.head);
    int64_t width = a.key;
    if constexpr (as_codes<S>) {
      s.query_scale[row] = round_query(from, a.value, scale, s.query_codes + row * s.code_row);
      from += a.value, width -= a.value;
    }
    for (int64_t i = 0; i < width; ++i) to[i] = scale * from[i];
    std::fill(to + width, to + s.key_row, T{0});
  }
}

// to[0..count) = factor · codes
HWY_INLINE void load_codes(const LatentInt8* from, int64_t count, float factor, float* to) {
  const Tag<float> d;
  const hn::Rebind<int8_t, Tag<float>> narrow;
  const hn::Rebind<int32_t, Tag<float>> wide;
  constexpr int64_t L = lanes<float>();
  const auto scale = hn::Set(d, factor);
  const int8_t* codes = &from->code;
  int64_t i = 0;
  for (; i + L <= count; i += L)
    hn::StoreU(hn::Mul(scale, hn::ConvertTo(d, hn::PromoteTo(wide, hn::LoadU(narrow, codes + i)))), d,
               to + i);
  for (; i < count; ++i) to[i] = factor * static_cast<float>(codes[i]);
}

// The exponent moves by 120: float32 counts from 127, e4m3 from 7. That scales subnormals, too; NaN becomes
// 480 with its sign (such entries have a scale that is not finite).
HWY_INLINE void load_codes(const LatentFp8* from, int64_t count, float factor, float* to) {
  const Tag<float> d;
  const hn::Rebind<uint8_t, Tag<float>> narrow;
  const hn::RebindToUnsigned<Tag<float>> wide;
  constexpr int64_t L = lanes<float>();
  const auto scale = hn::Set(d, factor * 0x1p120f);
  const uint8_t* codes = &from->code.bits;
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    const auto bits = hn::PromoteTo(wide, hn::LoadU(narrow, codes + i));
    const auto sign = hn::ShiftLeft<24>(hn::And(bits, hn::Set(wide, 0x80u)));
    const auto rest = hn::ShiftLeft<20>(hn::And(bits, hn::Set(wide, 0x7fu)));
    hn::StoreU(hn::Mul(scale, hn::BitCast(d, hn::Or(sign, rest))), d, to + i);
  }
  for (; i < count; ++i) {
    const uint32_t bits = codes[i];
    to[i] = factor * 0x1p120f * std::bit_cast<float>(((bits & 0x80u) << 24) | ((bits & 0x7fu) << 20));
  }
}

// The rotary part, in bfloat16 at what may be an odd address; returns the scale behind it.
HWY_INLINE float load_rotary(const void* from, int64_t rope, float* to) {
  const auto* at = static_cast<const uint8_t*>(from);
  int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const Tag<float> d;
  const hn::Rebind<uint16_t, Tag<float>> narrow;
  const hn::RebindToUnsigned<Tag<float>> wide;
  const hn::Repartition<uint8_t, decltype(narrow)> bytes;
  for (; i + lanes<float>() <= rope; i += lanes<float>()) {
    const auto bits = hn::PromoteTo(wide, hn::BitCast(narrow, hn::LoadU(bytes, at + 2 * i)));
    hn::StoreU(hn::BitCast(d, hn::ShiftLeft<16>(bits)), d, to + i);
  }
#endif
  for (; i < rope; ++i) {
    uint16_t bits;
    std::memcpy(&bits, at + 2 * i, sizeof bits);
    to[i] = std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }
  float scale;
  std::memcpy(&scale, at + 2 * rope, sizeof scale);
  return scale;
}

template <class S>
HWY_INLINE void load_latent(const S* entry, int64_t rank, int64_t rope, float* latent, float* rotary) {
  load_codes(entry, rank, load_rotary(entry + rank, rope, rotary), latent);
}
void load_narrow_entry(DType type, const std::byte* entry, int64_t rank, int64_t rope, float* latent,
                       float* rotary) {
  if (type == DType::u8) {
    load_latent(reinterpret_cast<const LatentInt8*>(entry), rank, rope, latent, rotary);
  } else {
    load_latent(reinterpret_cast<const LatentFp8*>(entry), rank, rope, latent, rotary);
  }
}

// Keys and values of a block in a form that products take: T, or S where they can be read in place.
template <class K>
struct BlockRows {
  const K *keys, *values;
  int64_t key_row, value_row;
};

// Whether products read blocks as they lie in their page. Of bfloat16 the elements are widened on the way,
// beside the sums, which pays where no second vector of rows would widen them again.
template <class T, class S>
bool in_place(const Paged<T, S>& a, const ChunkScratch<T, S>& s) {
  const bool whole = a.page % paged_block == 0 && a.value % lanes<T>() == 0 && a.key % lanes<T>() == 0;
  return whole &&
         (std::is_same_v<T, S> || (std::is_same_v<S, bf16> && rows_in_lanes(a) && s.rows == lanes<T>()));
}

template <class T, class S>
BlockRows<T> load_block(const Paged<T, S>& a, const PagedUnit& unit, int64_t at, int64_t count,
                        const ChunkScratch<T, S>& s) {
  for (int64_t k = 0; k < count; ++k) {
    const Entry<S> entry = entry_at(a, unit, at + k);
    if constexpr (as_codes<S>) {
      T* to = s.keys + k * s.key_row;
      s.key_scale[k] = load_rotary(entry.key + a.value, a.key - a.value, to);
      std::fill(to + a.key - a.value, to + s.key_row, T{0});
      widen_codes(&entry.key->code, a.value, s.key_codes + k * s.code_row);
    } else if constexpr (is_narrow<S>) {
      T* to = s.keys + k * s.key_row;
      load_latent(entry.key, a.value, a.key - a.value, to, to + a.value);
      std::fill(to + a.key, to + s.key_row, T{0});
    } else {
      load_row(entry.key, a.key, s.keys + k * s.key_row, s.key_row);
      if (!a.values_are_keys) {
        load_row(entry.value, a.value, s.values + k * s.value_row, round_up(a.value, lanes<T>()));
      }
    }
  }
  // The other one of a pair.
  if (as_codes<S> && count % 2 == 1) std::fill_n(s.key_codes + count * s.code_row, s.code_row, int16_t{0});
  return {s.keys, s.values, s.key_row, s.value_row};
}

template <class T, class V>
HWY_INLINE void store_lane_sums(V a, V b, V c, V e, T* to) {
  const Tag<T> d;
#if HWY_TARGET != HWY_SCALAR
  if constexpr (sizeof(T) == sizeof(float)) return store_sums(d, a, b, c, e, to);
#endif
  to[0] = hn::GetLane(hn::SumOfLanes(d, a)), to[1] = hn::GetLane(hn::SumOfLanes(d, b));
  to[2] = hn::GetLane(hn::SumOfLanes(d, c)), to[3] = hn::GetLane(hn::SumOfLanes(d, e));
}

// Memory that will be read soon, brought into the second-level cache line by line between other work: many
// lines at once would have to be waited for.
struct Fetch {
  static constexpr int64_t line = 64;
  const char *next = nullptr, *end = nullptr;

  HWY_INLINE void step() {
#if HWY_COMPILER_GCC || HWY_COMPILER_CLANG
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + line, 0, 2);
#endif
    next = std::min(next + 2 * line, end);
  }
};

// scores[key, row] of 4 rows and C keys; lanes run along the width, so that a few rows fill them too.
template <int C, class T>
void score_tile(int64_t width, const T* HWY_RESTRICT queries, int64_t query_row, const T* HWY_RESTRICT keys,
                int64_t key_row, T* scores, int64_t score_row, Fetch& fetch) {
  const Tag<T> d;
  using V = hn::Vec<Tag<T>>;
  V sum[C][4];
  LATENTE_UNROLL
  for (int c = 0; c < C; ++c) {
    LATENTE_UNROLL
    for (int r = 0; r < 4; ++r) sum[c][r] = hn::Zero(d);
  }
  Fetch ahead = fetch;
  for (int64_t i = 0; i < width; i += lanes<T>()) {
    ahead.step();
    V query[4];
    LATENTE_UNROLL
    for (int r = 0; r < 4; ++r) query[r] = hn::Load(d, queries + r * query_row + i);
    LATENTE_UNROLL
    for (int c = 0; c < C; ++c) {
      const V key = hn::LoadU(d, keys + c * key_row + i);
      LATENTE_UNROLL
      for (int r = 0; r < 4; ++r) sum[c][r] = hn::MulAdd(key, query[r], sum[c][r]);
    }
  }
  fetch = ahead;
  LATENTE_UNROLL
  for (int c = 0; c < C; ++c) {
    store_lane_sums(sum[c][0], sum[c][1], sum[c][2], sum[c][3], scores + c * score_row);
  }
}

// A block is a whole number of tiles.
inline constexpr int keys_of_tile = many_registers ? 4 : 2;

// Lanes along the width.
template <class T, class S>
void score_rows(const Paged<T, S>& a, const PagedUnit& unit, const ChunkScratch<T, S>& s,
                const BlockRows<T>& block, int64_t keys, Fetch& fetch) {
  const int64_t width = round_up(as_codes<S> ? a.key - a.value : a.key, lanes<T>()),
                rows = round_up(unit.rows, 4);
  if (rows < s.rows) {
    for (int64_t k = 0; k < keys; ++k)
      std::fill(s.scores + k * s.rows + rows, s.scores + (k + 1) * s.rows, T{0});
  }
  for (int64_t k = 0; k < keys;) {
    const int64_t count = keys - k >= keys_of_tile ? keys_of_tile : 1;
    for (int64_t row = 0; row < rows; row += 4) {
      (count > 1 ? score_tile<keys_of_tile, T> : score_tile<1, T>)(width, s.queries + row * s.key_row,
                                                                   s.key_row, block.keys + k * block.key_row,
                                                                   block.key_row, s.scores + k * s.rows + row,
                                                                   s.rows, fetch);
      if constexpr (as_codes<S>) {
        (count > 1 ? score_codes<keys_of_tile>
                   : score_codes<1>)(a.value, s.query_codes + row * s.code_row, s.code_row,
                                     s.query_scale + row, s.key_codes + k * s.code_row, s.code_row,
                                     s.key_scale + k, s.scores + k * s.rows + row, s.rows);
      }
    }
    k += count;
  }
}

// s.scores[key, row] of a block of keys; those of rows beyond the unit's, up to s.rows, are finite.
template <class T, class S, class K>
void score_block(const Paged<T, S>& a, const PagedUnit& unit, const ChunkScratch<T, S>& s,
                 const BlockRows<K>& block, int64_t keys, Fetch& fetch) {
  if (rows_in_lanes(a)) {
    multiply<Start::zero, false>(
        Product<T, K>{keys, s.rows, block.keys, block.key_row, 1, s.queries, s.rows, s.scores, s.rows},
        [&](int64_t, int64_t, int64_t, int64_t) HWY_ATTR {
          return Range{0, a.key};
        },
        fetch);
    return;
  }
  if constexpr (std::is_same_v<T, K>) score_rows(a, unit, s, block, keys, fetch);
}

// to.out = start + the block's values, by their weights in s.scores; range as multiply() takes it.
template <Start start, class T, class S, class K, class RangeOf>
HWY_INLINE void add_values(const Paged<T, S>& a, const PagedUnit& unit, const ChunkScratch<T, S>& s,
                           const BlockRows<K>& block, int64_t keys, const Partial<T>& to,
                           [[maybe_unused]] const RangeOf& range) {
  constexpr int64_t L = lanes<T>();
  const int64_t columns = round_up(a.value, L);
  if constexpr (as_codes<S>) {
    static constexpr auto tiles = value_table<start>(std::make_integer_sequence<int, wide_rows>());
    round_weights(s.scores, s.rows, keys, s.key_scale, s.query_scale, s.weight_codes, s.weight_scale);
    const int64_t count = round_up(unit.rows, wide_rows) / wide_rows;
    for (int64_t n = 0; n < columns; n += shorts) {
      for (int64_t i = 0, row = 0; i < count; ++i) {
        const int64_t height = (unit.rows - row + count - i - 1) / (count - i);
        tiles[static_cast<size_t>(height - 1)]((keys + 1) / 2, s.weight_codes + row, s.rows, s.key_codes + n,
                                               s.code_row, to.out + row * to.out_row + n, to.out_row,
                                               n + L < columns, s.weight_scale + row, s.factor + row);
        row += height;
      }
    }
  } else {
    NoFetch nothing;  // but what range asks for
    multiply<start, true>(Product<T, T, K>{unit.rows, columns, s.scores, 1, s.rows, block.values,
                                           block.value_row, to.out, to.out_row, s.factor},
                          range, nothing);
  }
}

// Adds a block of keys to what comes before it in the chunk, of which final_key is the last that any row
// sees.
template <class T, class S, class K>
void attend(const Paged<T, S>& a, const PagedUnit& unit, const BlockRows<K>& block, int64_t at, int64_t keys,
            int64_t final_key, bool start, const ChunkScratch<T, S>& s, const Partial<T>& to) {
  constexpr int64_t L = lanes<T>();
  const int64_t padded_rows = s.rows;
  // The next block's entries, even if it belongs to the next chunk: while scores are computed where they lie
  // together, and what is left with each tile below.
  int64_t fetched = at + keys;
  const int64_t fetch_end = std::min((fetched / paged_block + 1) * paged_block, final_key + 1);
  Fetch fetch;
  const int64_t entry_bytes = a.key_slot * static_cast<int64_t>(sizeof(S));
  if (fetched < fetch_end && a.page % paged_block == 0 && a.values_are_keys && a.groups == 1) {
    fetch.next = reinterpret_cast<const char*>(entry_at(a, unit, fetched).key);
    fetch.end = fetch.next + (fetch_end - fetched) * entry_bytes;
  }
  const char* fetch_begin = fetch.next;
  score_block(a, unit, s, block, keys, fetch);
  fetched += (fetch.next - fetch_begin) / entry_bytes;
  for (int64_t row = 0; row < padded_rows; ++row) {
    s.first[row] = 0;
    const int64_t token = row_at(a, unit, std::min(row, unit.rows - 1)).token;
    s.last[row] = static_cast<T>(a.position[token] - at);
  }
  for (int64_t i = 0; i < padded_rows; i += L) {
    const bool masked = std::any_of(s.last + i, s.last + i + L,
                                    [&](T last) HWY_ATTR { return last < static_cast<T>(keys - 1); });
    auto softmax = masked ? softmax_column<true, T> : softmax_column<false, T>;
    softmax(s.scores + i, padded_rows, keys, keys, s.first + i, s.last + i, to.maximum + i, to.sum + i,
            s.factor + i);
  }
  const int64_t tiles = round_up(unit.rows, wide_rows) / wide_rows * (round_up(a.value, 2 * L) / (2 * L));
  const int64_t entries_a_tile = round_up(paged_block, tiles) / tiles;
  auto range = [&](int64_t, int64_t, int64_t, int64_t) HWY_ATTR {
    for (int64_t i = 0; i < entries_a_tile && fetched < fetch_end; ++i) {
      const Entry<S> entry = entry_at(a, unit, fetched++);
      prefetch_row(entry.key, a.entry);
      if (!a.values_are_keys) prefetch_row(entry.value, a.value);
    }
    return Range{0, keys};
  };
  if (start) {
    add_values<Start::zero>(a, unit, s, block, keys, to, range);
  } else {
    add_values<Start::scale>(a, unit, s, block, keys, to, range);
  }
}

template <class T, class S>
void reduce_chunk(const Paged<T, S>& a, const PagedUnit& unit, int64_t chunk, const ChunkScratch<T, S>& s,
                  const Partial<T>& to) {
  const Tag<T> d;
  int64_t final_key = -1;  // of the rows of this unit
  for (int64_t row = 0; row < unit.rows; ++row) {
    final_key = std::max<int64_t>(final_key, a.position[row_at(a, unit, row).token]);
  }
  for (int64_t i = 0; i < s.rows; i += lanes<T>()) {
    hn::Store(hn::Set(d, lowest<T>()), d, to.maximum + i);
    hn::Store(hn::Zero(d), d, to.sum + i);
  }
  int64_t at = chunk_begin(chunk, a.cuts);
  const int64_t end = std::min(chunk_begin(chunk + 1, a.cuts), final_key + 1);
  if (at >= end) {
    for (int64_t row = 0; row < unit.rows; ++row) std::fill_n(to.out + row * to.out_row, to.out_row, T{0});
    return;
  }
  for (bool start = true; at < end; at += paged_block, start = false) {
    const int64_t keys = std::min(paged_block, end - at);
    if constexpr (std::is_same_v<T, S> || std::is_same_v<S, bf16>) {
      if (in_place(a, s)) {
        const Entry<S> entry = entry_at(a, unit, at);
        const BlockRows<S> block{entry.key, entry.value, a.key_slot, a.value_slot};
        attend(a, unit, block, at, keys, final_key, start, s, to);
        continue;
      }
    }
    attend(a, unit, load_block(a, unit, at, keys, s), at, keys, final_key, start, s, to);
  }
}

// into = the union of into and from.
template <class T>
void merge(const Partial<T>& into, const Partial<T>& from, int64_t rows, int64_t value, T* factors) {
  const Tag<T> d;
  constexpr int64_t L = lanes<T>();
  T *keep = factors, *add = factors + paged_rows;
  for (int64_t i = 0; i < round_up(rows, L); i += L) {
    const auto a = hn::Load(d, into.maximum + i), b = hn::Load(d, from.maximum + i), top = hn::Max(a, b);
    const auto of_a = exp2(d, hn::Sub(a, top)), of_b = exp2(d, hn::Sub(b, top));
    hn::Store(top, d, into.maximum + i);
    hn::Store(of_a, d, keep + i);
    hn::Store(of_b, d, add + i);
    hn::Store(hn::MulAdd(hn::Load(d, from.sum + i), of_b, hn::Mul(hn::Load(d, into.sum + i), of_a)), d,
              into.sum + i);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const auto of_a = hn::Set(d, keep[row]), of_b = hn::Set(d, add[row]);
    T* a = into.out + row * into.out_row;
    const T* b = from.out + row * from.out_row;
    for (int64_t i = 0; i < value; i += L) {
      hn::Store(hn::MulAdd(hn::Load(d, b + i), of_b, hn::Mul(hn::Load(d, a + i), of_a)), d, a + i);
    }
  }
}

template <class T, class S>
void write_rows(const Paged<T, S>& a, const PagedUnit& unit, const Partial<T>& from) {
  for (int64_t row = 0; row < unit.rows; ++row) {
    const RowAt at = row_at(a, unit, row);
    const T sum = from.sum[row], inverse = sum > 0 ? 1 / sum : T{0};
    T* to = a.out.at(at.token, at.head);
    for (int64_t i = 0; i < a.value; ++i) to[i] = from.out[row * from.out_row + i] * inverse;
  }
}

template <class T, class S>
void chunk_task(const Paged<T, S>& a, const PagedUnit& unit, int64_t chunk, T* partial) {
  ChunkScratch<T, S> s(a, unit,
                       scratch(0, ChunkScratch<T, S>::elements(a) * static_cast<int64_t>(sizeof(T))));
  load_paged_queries(a, unit, s);
  reduce_chunk(a, unit, chunk, s, Partial<T>(partial, a.value));
}

template <class T, class S>
void merge_task(const Paged<T, S>& a, const PagedUnit& unit, T* partials, int64_t stride) {
  T* factors = static_cast<T*>(scratch(0, 2 * paged_rows * static_cast<int64_t>(sizeof(T))));
  const Partial<T> result(partials, a.value);
  for (int64_t chunk = 1; chunk < unit.chunks; ++chunk) {
    merge(result, Partial<T>(partials + chunk * stride, a.value), unit.rows, a.value, factors);
  }
  write_rows(a, unit, result);
}

template <class T, class S>
void unit_task(const Paged<T, S>& a, const PagedUnit& unit) {
  const int64_t partial = Partial<T>::elements(a.value);
  const int64_t elements = ChunkScratch<T, S>::elements(a) + 2 * partial + 2 * paged_rows;
  ChunkScratch<T, S> s(a, unit, scratch(0, elements * static_cast<int64_t>(sizeof(T))));
  const Partial<T> result(s.partials, a.value), next(s.partials + partial, a.value);
  load_paged_queries(a, unit, s);
  reduce_chunk(a, unit, 0, s, result);
  for (int64_t chunk = 1; chunk < unit.chunks; ++chunk) {
    reduce_chunk(a, unit, chunk, s, next);
    merge(result, next, unit.rows, a.value, s.partials + 2 * partial);
  }
  write_rows(a, unit, result);
}

template <class T, class S>
void onto_task(const Paged<T, S>& a, const PagedUnit& unit, int64_t chunk, T* partial) {
  const int64_t elements = ChunkScratch<T, S>::elements(a) + Partial<T>::elements(a.value) + 2 * paged_rows;
  ChunkScratch<T, S> s(a, unit, scratch(0, elements * static_cast<int64_t>(sizeof(T))));
  const Partial<T> result(partial, a.value), next(s.partials, a.value);
  load_paged_queries(a, unit, s);
  if (chunk == 0) {
    reduce_chunk(a, unit, chunk, s, result);
    return;
  }
  reduce_chunk(a, unit, chunk, s, next);
  merge(result, next, unit.rows, a.value, s.partials + Partial<T>::elements(a.value));
}

#define LATENTE_PAGED(NAME, T, S)                                                               \
  void chunk_##NAME(const Paged<T, S>& a, const PagedUnit& unit, int64_t chunk, T* partial) {   \
    chunk_task(a, unit, chunk, partial);                                                        \
  }                                                                                             \
  void merge_##NAME(const Paged<T, S>& a, const PagedUnit& unit, T* partials, int64_t stride) { \
    merge_task(a, unit, partials, stride);                                                      \
  }                                                                                             \
  void unit_##NAME(const Paged<T, S>& a, const PagedUnit& unit) { unit_task(a, unit); }         \
  void onto_##NAME(const Paged<T, S>& a, const PagedUnit& unit, int64_t chunk, T* partial) {    \
    onto_task(a, unit, chunk, partial);                                                         \
  }
LATENTE_PAGED(f32, float, float)
LATENTE_PAGED(bf16, float, bf16)
LATENTE_PAGED(int8, float, LatentInt8)
LATENTE_PAGED(fp8, float, LatentFp8)
LATENTE_PAGED(f64, double, double)
#undef LATENTE_PAGED

}  // namespace latente::attention::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace latente::attention {

template <class T>
int64_t paged_partial_size(int64_t value) {
  return paged_rows * (padded<T>(value) + 2);
}
template int64_t paged_partial_size<float>(int64_t);
template int64_t paged_partial_size<double>(int64_t);

HWY_EXPORT(load_narrow_entry);
void load_narrow(DType type, const std::byte* entry, int64_t rank, int64_t rope, float* latent,
                 float* rotary) {
  HWY_DYNAMIC_DISPATCH(load_narrow_entry)(type, entry, rank, rope, latent, rotary);
}

#define LATENTE_PAGED(NAME, T, S)                                                                   \
  HWY_EXPORT(chunk_##NAME);                                                                         \
  HWY_EXPORT(merge_##NAME);                                                                         \
  HWY_EXPORT(unit_##NAME);                                                                          \
  HWY_EXPORT(onto_##NAME);                                                                          \
  template <>                                                                                       \
  void paged_chunk_task(const Paged<T, S>& a, const PagedUnit& unit, int64_t chunk, T* partial) {   \
    HWY_DYNAMIC_DISPATCH(chunk_##NAME)(a, unit, chunk, partial);                                    \
  }                                                                                                 \
  template <>                                                                                       \
  void paged_merge_task(const Paged<T, S>& a, const PagedUnit& unit, T* partials, int64_t stride) { \
    HWY_DYNAMIC_DISPATCH(merge_##NAME)(a, unit, partials, stride);                                  \
  }                                                                                                 \
  template <>                                                                                       \
  void paged_unit_task(const Paged<T, S>& a, const PagedUnit& unit) {                               \
    HWY_DYNAMIC_DISPATCH(unit_##NAME)(a, unit);                                                     \
  }                                                                                                 \
  template <>                                                                                       \
  void paged_onto_task(const Paged<T, S>& a, const PagedUnit& unit, int64_t chunk, T* partial) {    \
    HWY_DYNAMIC_DISPATCH(onto_##NAME)(a, unit, chunk, partial);                                     \
  }
LATENTE_PAGED(f32, float, float)
LATENTE_PAGED(bf16, float, bf16)
LATENTE_PAGED(int8, float, LatentInt8)
LATENTE_PAGED(fp8, float, LatentFp8)
LATENTE_PAGED(f64, double, double)
#undef LATENTE_PAGED

}  // namespace latente::attention
#endif
