#include "cpu/attention_kernels.h"
#include "cpu/cpu_backend.h"
#include "cpu/scratch.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

namespace latente {
namespace attention {

void* scratch(int slot, int64_t bytes) {
  struct Free {
    void operator()(std::byte* p) const { ::operator delete (p, std::align_val_t{64}); }
  };
  struct Memory {
    std::unique_ptr<std::byte, Free> data;
    int64_t size = 0;
  };
  thread_local Memory slots[2];
  Memory& memory = slots[slot];
  if (memory.size < bytes) {
    memory.data.reset();
    memory.size = 0;
    memory.data.reset(
        static_cast<std::byte*>(::operator new (static_cast<size_t>(bytes), std::align_val_t{64})));
    memory.size = bytes;
  }
  return memory.data.get();
}

namespace {

// body(task) for each task in [0, tasks), handed out in order to whoever is free.
template <class Body>
void for_each_task(ThreadPool& pool, int64_t tasks, const Body& body) {
  pool.parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(task);
  });
}

template <class T>
Rows<T> rows_of(const View& v) {
  if (!v) return {};
  return {v.as<std::remove_const_t<T>>(), v.stride(0), v.shape.rank() == 3 ? v.stride(1) : 1};
}

template <class T>
GradRows<T> grad_rows(const Grad& g) {
  return {rows_of<T>(g.view), g.accumulate};
}

template <class T>
Expanded<T> expanded(const View& q, const View& k, const View& k_rope, const View& v, const View& starts,
                     double scale, const View& out, const View& lse) {
  LATENTE_ASSERT(q.shape.rank() == 3 && k.shape.rank() == 3 && v.shape.rank() == 3 && out.shape.rank() == 3);
  Expanded<T> a;
  a.heads = q[1];
  a.groups = k[1];
  a.nope = k[2];
  a.rope = k_rope ? k_rope[-1] : 0;
  a.value = v[2];
  LATENTE_ASSERT(q[2] == a.nope + a.rope && a.heads % a.groups == 0 && v[1] == a.groups);
  LATENTE_ASSERT(k[0] == q[0] && v[0] == q[0] && starts.count() == q[0] && starts.contiguous());
  LATENTE_ASSERT(out[0] == q[0] && out[1] == a.heads && out[2] == a.value && lse[0] == q[0] &&
                 lse[1] == a.heads);
  a.scale = scale;
  a.q = rows_of<const T>(q);
  a.k = rows_of<const T>(k);
  a.k_rope = rows_of<const T>(k_rope);
  a.v = rows_of<const T>(v);
  a.starts = starts.as<int32_t>();
  a.out = rows_of<T>(out);
  a.lse = {lse.as<T>(), lse.stride(0), lse.stride(1)};
  return a;
}

struct Block {
  Segment segment;
  int64_t begin = 0, end = 0;
};

// A segment begins at each token such that neither it nor any later one attends to a token before it.
void segments_of(const int32_t* starts, int64_t tokens, std::vector<Segment>& segments) {
  segments.clear();
  int64_t end = tokens, earliest = tokens;
  for (int64_t t = tokens - 1; t >= 0; --t) {
    earliest = std::min<int64_t>(earliest, starts[t]);
    if (earliest < t && t > 0) continue;
    segments.push_back({t, end});
    end = t;
  }
  std::reverse(segments.begin(), segments.end());
}

// Pieces of up to `size` tokens, counted from the start of each segment.
void blocks_of(const std::vector<Segment>& segments, int64_t size, std::vector<Block>& blocks) {
  blocks.clear();
  for (Segment s : segments) {
    for (int64_t t = s.begin; t < s.end; t += size) blocks.push_back({s, t, std::min(t + size, s.end)});
  }
}

// Reused from call to call.
struct Division {
  std::vector<Segment> segments;
  std::vector<Block> blocks;
  std::vector<PagedUnit> units;
  std::vector<int64_t> first_chunk;
};
Division& division() {
  thread_local Division d;
  return d;
}

template <class T>
void forward(ThreadPool& pool, const Expanded<T>& a, int64_t tokens) {
  Division& d = division();
  segments_of(a.starts, tokens, d.segments);
  // Long pieces, while there are enough for all threads.
  const int64_t blocks_a_thread = a.heads * tokens / expanded_block / (4 * pool.size());
  blocks_of(d.segments, expanded_block * std::clamp<int64_t>(blocks_a_thread, 1, forward_group), d.blocks);
  // All heads of a piece, then the next piece; the longest ones first, for even ends.
  auto task_at = [&a, &d](int64_t i) {
    const Block& block = d.blocks[d.blocks.size() - 1 - static_cast<size_t>(i / a.heads)];
    return ForwardTask{block.segment, block.begin, block.end, i % a.heads};
  };
  const int64_t tasks = a.heads * static_cast<int64_t>(d.blocks.size());
  pool.parallel_for(tasks, std::clamp<int64_t>(tasks / (8 * pool.size()), 1, 16),
                    [&](int64_t i, int64_t end) {
                      for (ForwardTask task = task_at(i), next; i < end; ++i, task = next) {
                        if (i + 1 < end) next = task_at(i + 1);
                        forward_task(a, task, i + 1 < end ? &next : nullptr);
                      }
                    });
}

template <class T>
void add_parts(const T* parts, int64_t heads, int64_t tokens, int64_t rope, bool accumulate,
               const Rows<T>& to, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    T* sum = to.at(t, 0);
    if (!accumulate) std::fill(sum, sum + rope, T{0});
    for (int64_t h = 0; h < heads; ++h) {
      const T* part = parts + (h * tokens + t) * rope;
      for (int64_t i = 0; i < rope; ++i) sum[i] += part[i];
    }
  }
}

template <class T>
void backward(ThreadPool& pool, ExpandedBackward<T>& b, const GradRows<T>& d_k_rope) {
  const Expanded<T>& a = b.forward;
  const int64_t tokens = b.tokens;
  constexpr int64_t rows = 16;
  const int64_t row_tasks = (tokens + rows - 1) / rows;
  for_each_task(pool, row_tasks,
                [&](int64_t task) { delta_task(b, task * rows, std::min(tokens, (task + 1) * rows)); });

  Division& d = division();
  segments_of(a.starts, tokens, d.segments);
  blocks_of(d.segments, expanded_block, d.blocks);
  const int64_t segments = static_cast<int64_t>(d.segments.size());
  const int64_t blocks = static_cast<int64_t>(d.blocks.size());
  const bool keys = b.d_k || b.d_v || d_k_rope;
  const bool queries = static_cast<bool>(b.d_q);
  // With enough (kv head, sequence) pairs one pass gives every gradient; otherwise keys and queries have a
  // pass each, divided by blocks, with the same results.
  const bool one_pass = keys && queries && (pool.size() == 1 || a.groups * segments >= 4 * pool.size());

  // Kv heads go in waves, for their parts of d_k_rope to fit into memory.
  const int64_t wave = d_k_rope ? std::min<int64_t>(a.groups, 32) : a.groups;
  if (d_k_rope) {
    b.d_k_rope = static_cast<T*>(scratch(1, wave * tokens * a.rope * static_cast<int64_t>(sizeof(T))));
  }
  for (int64_t first = 0; keys && first < a.groups; first += wave) {
    b.first_head = first;
    const int64_t heads = std::min(wave, a.groups - first);
    if (one_pass) {
      for_each_task(pool, heads * segments, [&](int64_t task) {
        const Segment s = d.segments[static_cast<size_t>(task % segments)];
        backward_task(b, s, s.begin, s.end, first + task / segments, true);
      });
    } else {
      for_each_task(pool, heads * blocks, [&](int64_t task) {
        const Block& block = d.blocks[static_cast<size_t>(task % blocks)];
        backward_task(b, block.segment, block.begin, block.end, first + task / blocks, false);
      });
    }
    if (d_k_rope) {
      for_each_task(pool, row_tasks, [&](int64_t task) {
        add_parts(b.d_k_rope, heads, tokens, a.rope, d_k_rope.accumulate || first > 0, d_k_rope.rows,
                  task * rows, std::min(tokens, (task + 1) * rows));
      });
    }
  }
  if (queries && !one_pass) {
    for_each_task(pool, a.heads * blocks, [&](int64_t task) {
      const Block& block = d.blocks[static_cast<size_t>(blocks - 1 - task % blocks)];
      backward_query_task(b, block.segment, block.begin, task / blocks);
    });
  }
}

// The end of the tokens from `begin` on that belong to one sequence.
int64_t run_end(const int32_t* sequence, int64_t begin, int64_t tokens) {
  int64_t end = begin + 1;
  while (end < tokens && sequence[end] == sequence[begin]) ++end;
  return end;
}

// Of the keys up to `last`; 1 if there are none.
int64_t chunks_to(int64_t last, int64_t cuts) {
  if (last >= paged_chunk) return last / paged_chunk + 1 + cuts;
  int64_t chunks = 1;
  while (chunk_begin(chunks, cuts) <= last) ++chunks;
  return chunks;
}

// The units of the tokens [begin, end) of one sequence.
template <class T, class S>
void add_units(const Paged<T, S>& a, int64_t begin, int64_t end, int64_t sequence,
               std::vector<PagedUnit>& units) {
  const int64_t share = a.heads / a.groups, rows = (end - begin) * share;
  for (int64_t g = 0; g < a.groups; ++g) {
    for (int64_t row = 0; row < rows; row += paged_rows) {
      PagedUnit unit{begin, end - begin, sequence, g, row, std::min(paged_rows, rows - row), 0};
      int64_t last = -1;
      for (int64_t i = row / share; i <= (row + unit.rows - 1) / share; ++i) {
        last = std::max<int64_t>(last, a.position[begin + i]);
      }
      unit.chunks = chunks_to(last, a.cuts);
      units.push_back(unit);
    }
  }
}

template <class T, class S>
void paged(ThreadPool& pool, const View& q, const View& keys, const View& values, const Pages& pages,
           double scale, const View& out) {
  Paged<T, S> a;
  a.heads = q[1];
  a.groups = keys[2];
  a.key = q[2];
  a.value = values[3];
  a.entry = keys[3];
  a.page = keys[1];
  a.rows_together = a.heads / a.groups;
  a.cuts = paged_cuts;
  a.scale = scale;
  a.q = rows_of<const T>(q);
  a.out = rows_of<T>(out);
  a.keys = static_cast<const S*>(keys.data);
  a.values = static_cast<const S*>(values.data);
  a.key_page = keys.stride(0), a.key_slot = keys.stride(1), a.key_head = keys.stride(2);
  a.value_page = values.stride(0), a.value_slot = values.stride(1), a.value_head = values.stride(2);
  a.values_are_keys = a.keys == a.values && a.value <= a.key && a.key_page == a.value_page &&
                      a.key_slot == a.value_slot && (a.groups == 1 || a.key_head == a.value_head);
  a.block_table = pages.block_table.as<int32_t>();
  a.block_table_row = pages.block_table.stride(0);
  a.position = pages.position.as<int32_t>();
  const int32_t* sequence = pages.sequence.as<int32_t>();

  Division& d = division();
  d.units.clear();
  for (int64_t t = 0, next; t < q[0]; t = next) {
    next = run_end(sequence, t, q[0]);
    add_units(a, t, next, sequence[t], d.units);
  }
  d.first_chunk.clear();
  int64_t chunks = 0;
  for (const PagedUnit& unit : d.units) {
    d.first_chunk.push_back(chunks);
    chunks += unit.chunks;
  }
  const int64_t units = static_cast<int64_t>(d.units.size());
  const int64_t partial = paged_partial_size<T>(a.value);
  const int64_t partial_bytes = chunks * partial * static_cast<int64_t>(sizeof(T));
  if (pool.size() == 1 || chunks == units || units >= 8 * pool.size() ||
      partial_bytes > (int64_t{64} << 20)) {
    for_each_task(pool, units, [&](int64_t task) { paged_unit_task(a, d.units[static_cast<size_t>(task)]); });
    return;
  }
  T* partials = static_cast<T*>(scratch(1, partial_bytes));
  // Neighbouring chunks go to one thread, which has then fetched the next one's beginning. Of few chunks, the
  // long ones first.
  const bool few = chunks < 4 * pool.size();
  pool.parallel_shares(chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t chunk = few ? chunks - 1 - i : i;
      const auto after = std::upper_bound(d.first_chunk.begin(), d.first_chunk.end(), chunk);
      const size_t unit = static_cast<size_t>(after - d.first_chunk.begin()) - 1;
      paged_chunk_task(a, d.units[unit], chunk - d.first_chunk[unit], partials + chunk * partial);
    }
  });
  for_each_task(pool, units, [&](int64_t task) {
    const size_t unit = static_cast<size_t>(task);
    paged_merge_task(a, d.units[unit], partials + d.first_chunk[unit] * partial, partial);
  });
}

// Rounds a latent to codes; returns their scale, not finite if a value is not.
float round_latent(DType type, const float* latent, int64_t rank, std::byte* entry) {
  float largest = 0;
  bool finite = true;
  for (int64_t i = 0; i < rank; ++i) {
    largest = std::max(largest, std::abs(latent[i]));
    finite &= std::isfinite(latent[i]);
  }
  if (!finite) {
    std::memset(entry, 1, static_cast<size_t>(rank));
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float top = type == DType::u8 ? 127.0f : 448.0f;
  const float scale = largest / top, inverse = largest > 0 ? top / largest : 0;
  for (int64_t i = 0; i < rank; ++i) {
    const float x = latent[i] * inverse;
    entry[i] = type == DType::u8 ? static_cast<std::byte>(static_cast<int8_t>(std::lrint(x)))
                                 : std::bit_cast<std::byte>(f8e4m3(x));
  }
  return scale;
}

// Keys and values of one chunk, expanded: [head, entry, width], rows padded.
template <class T>
struct ExpandedChunk {
  int64_t heads, key, value;
  Scratch<T> latents, product, keys, values;

  int64_t key_row() const { return padded<T>(key); }
  int64_t value_row() const { return padded<T>(value); }

  // Entries [begin, begin + count) of a sequence, whose pages are block_table[0..]; `expand` multiplies
  // latents [count, rank] by kv_b.
  template <class Expand>
  void load(ThreadPool& pool, const View& cache, const int32_t* block_table, int64_t rank, int64_t begin,
            int64_t count, const Expand& expand) {
    const bool narrow = Backend::is_narrow_cache(cache.dtype);
    const int64_t rope = Backend::rotary_width(cache.dtype, cache[3], rank);
    const int64_t nope = key - rope, width = heads * (nope + value);
    const int64_t page = cache[1], size = size_of(cache.dtype);
    const DType type = dtype_of<T>;
    T* latent = latents.reserve(paged_chunk * (rank + rope));  // the latents, then the rotary parts
    T* rotary = latent + paged_chunk * rank;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t at = begin + k;
      const std::byte* entry =
          static_cast<const std::byte*>(cache.data) +
          (block_table[at / page] * cache.stride(0) + at % page * cache.stride(1)) * size;
      if (narrow) {
        if constexpr (std::is_same_v<T, float>)
          load_narrow(cache.dtype, entry, rank, rope, latent + k * rank, rotary + k * rope);
      } else {
        convert(cache.dtype, entry, type, latent + k * rank, rank);
        convert(cache.dtype, entry + rank * size, type, rotary + k * rope, rope);
      }
    }
    T* kv = product.reserve(paged_chunk * width);
    expand(View(latent, {count, rank}, type), View(kv, {count, width}, type));
    T* key_to = keys.reserve(heads * paged_chunk * key_row());
    T* value_to = values.reserve(heads * paged_chunk * value_row());
    pool.parallel_for(heads, 1, [&](int64_t head, int64_t end) {
      for (; head < end; ++head) {
        for (int64_t k = 0; k < count; ++k) {
          const T* from = kv + k * width + head * (nope + value);
          T* to = key_to + (head * paged_chunk + k) * key_row();
          std::copy_n(from, nope, to);
          std::copy_n(rotary + k * rope, rope, to + nope);
          std::fill(to + key, to + key_row(), T{0});
          to = value_to + (head * paged_chunk + k) * value_row();
          std::copy_n(from + nope, value, to);
          std::fill(to + value, to + value_row(), T{0});
        }
      }
    });
  }
};

template <class T, class Expand>
void paged_expanded(ThreadPool& pool, const View& q, const View& cache, int64_t rank, const Pages& pages,
                    double scale, const View& out, const Expand& expand) {
  thread_local ExpandedChunk<T> chunk;
  thread_local std::vector<int32_t> one_page;
  chunk.heads = q[1], chunk.key = q[2], chunk.value = out[2];
  Paged<T, T> a;
  a.heads = a.groups = q[1];
  a.key = a.entry = chunk.key;
  a.value = chunk.value;
  a.page = paged_chunk;
  a.rows_together = paged_rows;
  a.scale = scale;
  a.q = rows_of<const T>(q);
  a.out = rows_of<T>(out);
  a.key_slot = chunk.key_row(), a.key_head = paged_chunk * a.key_slot;
  a.value_slot = chunk.value_row(), a.value_head = paged_chunk * a.value_slot;
  a.position = pages.position.as<int32_t>();
  const int32_t* sequence = pages.sequence.as<int32_t>();
  const int64_t partial = paged_partial_size<T>(a.value);

  Division& d = division();
  for (int64_t t = 0, next; t < q[0]; t = next) {
    next = run_end(sequence, t, q[0]);
    d.units.clear();
    add_units(a, t, next, 0, d.units);
    int64_t chunks = 0;
    for (const PagedUnit& unit : d.units) chunks = std::max(chunks, unit.chunks);
    const int64_t entries = 1 + *std::max_element(a.position + t, a.position + next);
    one_page.assign(static_cast<size_t>(chunks), 0);  // every chunk lies at the same place
    a.block_table = one_page.data();
    const int64_t units = static_cast<int64_t>(d.units.size());
    T* partials = static_cast<T*>(scratch(1, units * partial * static_cast<int64_t>(sizeof(T))));
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t begin = c * paged_chunk, count = std::clamp<int64_t>(entries - begin, 0, paged_chunk);
      if (count > 0) {
        chunk.load(pool, cache, pages.block_table.as<int32_t>() + sequence[t] * pages.block_table.stride(0),
                   rank, begin, count, expand);
      }
      a.keys = chunk.keys.reserve(0), a.values = chunk.values.reserve(0);
      for_each_task(pool, units, [&](int64_t task) {
        const PagedUnit& unit = d.units[static_cast<size_t>(task)];
        if (c < unit.chunks) paged_onto_task(a, unit, c, partials + task * partial);
      });
    }
    for_each_task(pool, units, [&](int64_t task) {
      PagedUnit unit = d.units[static_cast<size_t>(task)];
      unit.chunks = 1;  // merged already
      paged_merge_task(a, unit, partials + task * partial, partial);
    });
  }
}

}  // namespace
}  // namespace attention

void CpuBackend::attention_expanded(View q, View k, View k_rope, View v, View starts, double scale, View out,
                                    View lse) {
  if (q.dtype == DType::f64) {
    attention::forward(pool_, attention::expanded<double>(q, k, k_rope, v, starts, scale, out, lse), q[0]);
  } else {
    attention::forward(pool_, attention::expanded<float>(q, k, k_rope, v, starts, scale, out, lse), q[0]);
  }
}

void CpuBackend::attention_expanded_backward(View d_out, View q, View k, View k_rope, View v, View starts,
                                             double scale, View out, View lse,
                                             const AttentionScratch& scratch, Grad d_q, Grad d_k,
                                             Grad d_k_rope, Grad d_v) {
  auto run = [&]<class T>(T) {
    attention::ExpandedBackward<T> b;
    b.forward = attention::expanded<T>(q, k, k_rope, v, starts, scale, out, lse);
    b.d_out = attention::rows_of<const T>(d_out);
    const View& delta = scratch.delta;
    b.delta = {delta.as<T>(), delta.stride(0), delta.stride(1)};
    b.d_q = attention::grad_rows<T>(d_q);
    b.d_k = attention::grad_rows<T>(d_k);
    b.d_v = attention::grad_rows<T>(d_v);
    b.tokens = q[0];
    attention::backward(pool_, b, attention::grad_rows<T>(d_k_rope));
  };
  q.dtype == DType::f64 ? run(0.0) : run(0.0f);
}

void CpuBackend::attention_paged(View q, View keys, View values, const Pages& pages, double scale, View out) {
  LATENTE_ASSERT(q.shape.rank() == 3 && keys.shape.rank() == 4 && values.shape.rank() == 4);
  const bool narrow = is_narrow_cache(keys.dtype);
  LATENTE_ASSERT(keys[3] == (narrow ? narrow_entry_bytes(values[3], q[2] - values[3]) : q[2]));
  LATENTE_ASSERT(out[2] == values[3] && q[1] % keys[2] == 0 && keys[2] == values[2] && keys[1] == values[1] &&
                 keys.dtype == values.dtype && (!narrow || (keys[2] == 1 && keys.data == values.data)));
  LATENTE_ASSERT(pages.sequence.contiguous() && pages.position.contiguous() &&
                 pages.block_table.stride(1) == 1);
  if (q.dtype == DType::f64) {
    attention::paged<double, double>(pool_, q, keys, values, pages, scale, out);
  } else if (keys.dtype == DType::bf16) {
    attention::paged<float, bf16>(pool_, q, keys, values, pages, scale, out);
  } else if (keys.dtype == DType::u8) {
    attention::paged<float, attention::LatentInt8>(pool_, q, keys, values, pages, scale, out);
  } else if (keys.dtype == DType::f8e4m3) {
    attention::paged<float, attention::LatentFp8>(pool_, q, keys, values, pages, scale, out);
  } else {
    attention::paged<float, float>(pool_, q, keys, values, pages, scale, out);
  }
}

void CpuBackend::attention_paged_expanded(View q, View cache, View kv_b, const Pages& pages, double scale,
                                          View out) {
  const int64_t rank = kv_b[1];
  const int64_t rope = rotary_width(cache.dtype, cache[3], rank);
  LATENTE_ASSERT(q.shape.rank() == 3 && cache.shape.rank() == 4 && cache[2] == 1 && rope > 0);
  LATENTE_ASSERT(q.dtype == DType::f32 || !is_narrow_cache(cache.dtype));
  LATENTE_ASSERT(kv_b[0] == q[1] * (q[2] - rope + out[2]));
  LATENTE_ASSERT(pages.sequence.contiguous() && pages.position.contiguous() &&
                 pages.block_table.stride(1) == 1);
  auto expand = [&](const View& latents, const View& product) {
    linear(latents, kv_b, {}, {product, false});
  };
  if (q.dtype == DType::f64) {
    attention::paged_expanded<double>(pool_, q, cache, rank, pages, scale, out, expand);
  } else {
    attention::paged_expanded<float>(pool_, q, cache, rank, pages, scale, out, expand);
  }
}

void CpuBackend::cache_store_narrow(View latent, View rotary, View slots, View cache) {
  const int64_t rank = latent[1], rope = rotary[1], page = cache[1];
  LATENTE_ASSERT(cache.shape.rank() == 3 && is_narrow_cache(cache.dtype) && latent.dtype == DType::f32 &&
                 rotary.dtype == DType::f32 && cache[2] == narrow_entry_bytes(rank, rope));
  const int32_t* slot = slots.as<int32_t>();
  for (int64_t t = 0; t < latent[0]; ++t) {
    const int64_t at = slot[t * slots.stride(0)];
    if (at < 0) continue;
    LATENTE_ASSERT(at < cache[0] * page);
    std::byte* entry =
        static_cast<std::byte*>(cache.data) + at / page * cache.stride(0) + at % page * cache.stride(1);
    const float scale =
        attention::round_latent(cache.dtype, latent.as<float>() + t * latent.stride(0), rank, entry);
    const float* from = rotary.as<float>() + t * rotary.stride(0);
    for (int64_t i = 0; i < rope; ++i) {
      const bf16 value(from[i]);
      std::memcpy(entry + rank + 2 * i, &value, sizeof value);
    }
    std::memcpy(entry + rank + 2 * rope, &scale, sizeof scale);
  }
}

void CpuBackend::cache_store(View x, View slots, View cache) {
  LATENTE_ASSERT(x.shape.rank() == 2 && cache.shape.rank() == 3 && x[1] <= cache[2] && slots[0] == x[0]);
  const int32_t* slot = slots.as<int32_t>();
  const int64_t page = cache[1], from_size = size_of(x.dtype), to_size = size_of(cache.dtype);
  for (int64_t t = 0; t < x[0]; ++t) {
    const int64_t at = slot[t * slots.stride(0)];
    if (at < 0) continue;
    LATENTE_ASSERT(at < cache[0] * page);
    const std::byte* from = static_cast<const std::byte*>(x.data) + t * x.stride(0) * from_size;
    const int64_t offset = at / page * cache.stride(0) + at % page * cache.stride(1);
    std::byte* to = static_cast<std::byte*>(cache.data) + offset * to_size;
    if (x.dtype == cache.dtype) {
      std::memcpy(to, from, static_cast<size_t>(x[1] * from_size));
    } else {
      convert(x.dtype, from, cache.dtype, to, x[1]);
    }
  }
}

}  // namespace latente
