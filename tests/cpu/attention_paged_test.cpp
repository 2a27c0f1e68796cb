#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "cpu/attention_support.h"

namespace latente {

// Of queries and of the cache; a name of its own in lists of tests.
template <class T, class S>
struct Elements {
  using Activation = T;
  using Stored = S;
};

namespace {

// A cache in pages that belong to sequences in random order. Slots nobody stored to hold NaN.
template <class T, class S>
struct Cache {
  Cache(int64_t groups_, int64_t key_, int64_t value_, int64_t page_, bool latent_,
        const std::vector<int64_t>& lengths_, uint64_t seed)
      : groups(groups_), key(key_), value(value_), page(page_), latent(latent_), lengths(lengths_) {
    Random random(seed);
    int64_t used = 0;
    for (const int64_t length : lengths) {
      columns = std::max(columns, (length + page - 1) / page + 1);
      used += (length + page - 1) / page;
    }
    const int64_t pages = used + 3;
    keys.assign(static_cast<size_t>(pages * page * groups * key), S(static_cast<float>(nan)));
    values.assign(static_cast<size_t>(latent ? 0 : pages * page * groups * value),
                  S(static_cast<float>(nan)));
    std::vector<int32_t> order(static_cast<size_t>(pages));
    std::iota(order.begin(), order.end(), 0);
    random.shuffle(std::span(order));
    table.assign(lengths.size() * static_cast<size_t>(columns), 0);
    size_t next = 0;
    for (size_t s = 0; s < lengths.size(); ++s) {
      for (int64_t p = 0; p * page < lengths[s]; ++p) {
        table[s * static_cast<size_t>(columns) + static_cast<size_t>(p)] = order[next++];
      }
      for (int64_t at = 0; at < lengths[s]; ++at) {
        for (int64_t i = 0; i < groups * key; ++i)
          keys[slot(s, at, groups * key) + static_cast<size_t>(i)] = S(static_cast<float>(random.normal()));
        for (int64_t i = 0; !latent && i < groups * value; ++i)
          values[slot(s, at, groups * value) + static_cast<size_t>(i)] =
              S(static_cast<float>(random.normal()));
      }
    }
  }

  // Where the elements of a position begin.
  size_t slot(size_t sequence, int64_t at, int64_t width) const {
    const int64_t number = table[sequence * static_cast<size_t>(columns) + static_cast<size_t>(at / page)];
    return static_cast<size_t>((number * page + at % page) * width);
  }
  double key_at(size_t s, int64_t at, int64_t g, int64_t i) const {
    return static_cast<double>(
        static_cast<T>(keys[slot(s, at, groups * key) + static_cast<size_t>(g * key + i)]));
  }
  double value_at(size_t s, int64_t at, int64_t g, int64_t i) const {
    if (latent) return key_at(s, at, g, i);
    return static_cast<double>(
        static_cast<T>(values[slot(s, at, groups * value) + static_cast<size_t>(g * value + i)]));
  }
  View key_view() { return View(keys.data(), {count(), page, groups, key}, dtype_of<S>); }
  View value_view() {
    if (!latent) return View(values.data(), {count(), page, groups, value}, dtype_of<S>);
    View v = key_view();
    v.shape = {v[0], v[1], v[2], value};
    return v;
  }
  int64_t count() const { return static_cast<int64_t>(keys.size()) / (page * groups * key); }

  int64_t groups, key, value, page;
  bool latent;
  std::vector<int64_t> lengths;
  int64_t columns = 0;
  std::vector<S> keys, values;
  std::vector<int32_t> table;
};

struct Query {
  int32_t sequence, position;
};

template <class T, class S>
Strided<T> paged(CpuBackend& cpu, Cache<T, S>& cache, const Strided<T>& q, const std::vector<Query>& rows,
                 double scale) {
  Strided<T> out(q.view[0], q.view[1], cache.value);
  std::vector<int32_t> sequence, position;
  for (const Query& row : rows) {
    sequence.push_back(row.sequence);
    position.push_back(row.position);
  }
  const Pages pages{
      View(cache.table.data(), {static_cast<int64_t>(cache.lengths.size()), cache.columns}, DType::i32),
      vector_view(sequence), vector_view(position)};
  cpu.attention_paged(q.view, cache.key_view(), cache.value_view(), pages, scale, out.view);
  return out;
}

template <class T, class S>
Strided<double> paged_oracle(const Cache<T, S>& cache, const Strided<T>& q, const std::vector<Query>& rows,
                             double scale) {
  Strided<double> out(q.view[0], q.view[1], cache.value);
  out.fill([] { return 0.0; });
  for (int64_t t = 0; t < q.view[0]; ++t) {
    const Query& row = rows[static_cast<size_t>(t)];
    if (row.position < 0) continue;  // attends to nothing
    const auto s = static_cast<size_t>(row.sequence);
    for (int64_t h = 0; h < q.view[1]; ++h) {
      const int64_t g = h / (q.view[1] / cache.groups);
      std::vector<double> p;
      for (int64_t at = 0; at <= row.position; ++at) {
        double dot = 0;
        for (int64_t i = 0; i < cache.key; ++i)
          dot += static_cast<double>(q.at(t, h, i)) * cache.key_at(s, at, g, i);
        p.push_back(dot * scale);
      }
      const double top = *std::max_element(p.begin(), p.end());
      double sum = 0;
      for (double& x : p) sum += x = std::exp(x - top);
      for (int64_t at = 0; at <= row.position; ++at) {
        for (int64_t i = 0; i < cache.value; ++i) {
          out.at(t, h, i) += p[static_cast<size_t>(at)] / sum * cache.value_at(s, at, g, i);
        }
      }
    }
  }
  return out;
}

struct PagedCase {
  int64_t heads, groups, key, value, page;
  bool latent;
};
const std::vector<PagedCase> paged_cases = {
    {8, 1, 576, 512, 64, true}, {16, 1, 40, 32, 16, true}, {5, 1, 24, 17, 1, true},
    {128, 1, 36, 32, 16, true}, {8, 2, 64, 64, 16, false}, {4, 4, 16, 24, 64, false},
    {6, 1, 32, 32, 1, false},   {12, 3, 13, 9, 5, false},  {1, 1, 8, 8, 64, true},
    {96, 1, 16, 8, 256, false},
};

template <class E>
class PagedAttention : public ::testing::Test {
 protected:
  CpuBackend one{1}, three{3};
};
using PagedElements =
    ::testing::Types<Elements<float, float>, Elements<float, bf16>, Elements<double, double>>;
TYPED_TEST_SUITE(PagedAttention, PagedElements);

TYPED_TEST(PagedAttention, MatchesDoubleLoops) {
  using T = typename TypeParam::Activation;
  Random random(20);
  for (const PagedCase& c : paged_cases) {
    const std::vector<int64_t> lengths = {random.between(257, 700), 1, random.between(2, 256), 64, 256};
    Cache<T, typename TypeParam::Stored> cache(c.groups, c.key, c.value, c.page, c.latent, lengths,
                                               random.next_u64());
    std::vector<Query> rows;  // several tokens of a sequence, then another
    for (int block = 0; block < 4; ++block) {
      const size_t s = random.below(lengths.size());
      const int64_t tokens = std::min(random.between(1, 20), lengths[s]);
      const int64_t first = random.chance(0.3) ? 0 : lengths[s] - tokens;
      for (int64_t i = 0; i < tokens; ++i)
        rows.push_back({static_cast<int32_t>(s), static_cast<int32_t>(first + i)});
    }
    Strided<T> q(static_cast<int64_t>(rows.size()), c.heads, c.key, 2, 1);
    q.randomise(random);
    SCOPED_TRACE(::testing::Message() << c.heads << "/" << c.groups << " heads, " << c.key << "/" << c.value
                                      << ", pages of " << c.page << ", " << rows.size() << " rows");
    const double scale = 1 / std::sqrt(static_cast<double>(c.key));
    const Strided<double> expected = paged_oracle(cache, q, rows, scale);
    const Strided<T> out = paged(this->one, cache, q, rows, scale);
    EXPECT_LT(error(out, expected), tolerance<T>);
    EXPECT_EQ(differences(out, paged(this->three, cache, q, rows, scale)), 0);
  }
}

TYPED_TEST(PagedAttention, HasTheSameBitsForAnyThreadsAndRows) {
  using T = typename TypeParam::Activation;
  Random random(21);
  for (const PagedCase& c : paged_cases) {
    const std::vector<int64_t> lengths = {random.between(300, 600), random.between(1, 300)};
    Cache<T, typename TypeParam::Stored> cache(c.groups, c.key, c.value, c.page, c.latent, lengths,
                                               random.next_u64());
    for (int64_t tokens = 1; tokens <= 8; ++tokens) {
      std::vector<Query> rows;
      for (int64_t i = 0; i < tokens; ++i) {  // a draft of the first sequence, at times among others
        rows.push_back({0, static_cast<int32_t>(lengths[0] - tokens + i)});
        if (tokens % 3 == 0)
          rows.push_back({1, static_cast<int32_t>(random.below(static_cast<uint64_t>(lengths[1])))});
      }
      Strided<T> q(static_cast<int64_t>(rows.size()), c.heads, c.key);
      q.randomise(random);
      const Strided<T> together = paged(this->one, cache, q, rows, 0.1);
      EXPECT_EQ(differences(together, paged(this->three, cache, q, rows, 0.1)), 0);
      for (size_t row = 0; row < rows.size(); ++row) {
        Strided<T> single(1, c.heads, c.key);
        for (int64_t h = 0; h < c.heads; ++h)
          for (int64_t i = 0; i < c.key; ++i) single.at(0, h, i) = q.at(static_cast<int64_t>(row), h, i);
        const Strided<T> alone = paged(row % 2 ? this->one : this->three, cache, single, {rows[row]}, 0.1);
        int64_t different = 0;
        for (int64_t h = 0; h < c.heads; ++h)
          for (int64_t i = 0; i < c.value; ++i)
            different += alone.at(0, h, i) != together.at(static_cast<int64_t>(row), h, i);
        EXPECT_EQ(different, 0) << c.heads << " heads, row " << row << " of " << rows.size();
      }
    }
  }
}

// MLA's cache with keys and values expanded from the latents: against attention over a cache that holds them
// expanded, and the same bits for any rows and threads.
TYPED_TEST(PagedAttention, ExpandsLatents) {
  using T = typename TypeParam::Activation;
  using S = typename TypeParam::Stored;
  Random random(22);
  struct Shape {
    int64_t heads, nope, rope, value, rank, page;
  };
  for (const Shape& c : {Shape{3, 16, 8, 12, 24, 16}, Shape{1, 7, 3, 5, 9, 1}, Shape{8, 64, 64, 64, 128, 64},
                         Shape{16, 8, 4, 16, 16, 7}}) {
    const std::vector<int64_t> lengths = {random.between(520, 900), random.between(1, 300), 256};
    Cache<T, S> cache(1, c.rank + c.rope, c.rank, c.page, true, lengths, random.next_u64());
    Strided<T> kv_b(c.heads * (c.nope + c.value), 1, c.rank);
    kv_b.randomise(random);
    Cache<double, double> expanded(c.heads, c.nope + c.rope, c.value, c.page, false, lengths, 5);
    for (size_t s = 0; s < lengths.size(); ++s) {
      for (int64_t at = 0; at < lengths[s]; ++at) {
        for (int64_t h = 0; h < c.heads; ++h) {
          for (int64_t i = 0; i < c.nope + c.value; ++i) {
            double sum = 0;
            for (int64_t r = 0; r < c.rank; ++r)
              sum +=
                  static_cast<double>(kv_b.at(h * (c.nope + c.value) + i, 0, r)) * cache.key_at(s, at, 0, r);
            if (i < c.nope) {
              expanded.keys[expanded.slot(s, at, c.heads * (c.nope + c.rope)) +
                            static_cast<size_t>(h * (c.nope + c.rope) + i)] = sum;
            } else {
              expanded.values[expanded.slot(s, at, c.heads * c.value) +
                              static_cast<size_t>(h * c.value + i - c.nope)] = sum;
            }
          }
          for (int64_t i = 0; i < c.rope; ++i) {
            expanded.keys[expanded.slot(s, at, c.heads * (c.nope + c.rope)) +
                          static_cast<size_t>(h * (c.nope + c.rope) + c.nope + i)] =
                cache.key_at(s, at, 0, c.rank + i);
          }
        }
      }
    }
    std::vector<Query> rows;
    for (int32_t s : {0, 2, 1}) {
      const int64_t tokens = std::min<int64_t>(random.between(1, 90), lengths[static_cast<size_t>(s)]);
      for (int64_t i = 0; i < tokens; ++i)
        rows.push_back({s, static_cast<int32_t>(lengths[static_cast<size_t>(s)] - tokens + i)});
    }
    rows.push_back({1, -1});  // padding
    const int64_t count = static_cast<int64_t>(rows.size());
    Strided<T> q(count, c.heads, c.nope + c.rope);
    q.randomise(random);
    const double scale = 1 / std::sqrt(static_cast<double>(c.rank));
    auto attend = [&](CpuBackend& cpu, const Strided<T>& queries, const std::vector<Query>& which) {
      Strided<T> out(queries.view[0], c.heads, c.value);
      std::vector<int32_t> sequence, position;
      for (const Query& row : which) sequence.push_back(row.sequence), position.push_back(row.position);
      const Pages pages{
          View(cache.table.data(), {static_cast<int64_t>(lengths.size()), cache.columns}, DType::i32),
          vector_view(sequence), vector_view(position)};
      View weight = kv_b.view;
      weight.shape = {c.heads * (c.nope + c.value), c.rank};
      weight.strides = {kv_b.view.stride(0), 1, 0, 0};
      cpu.attention_paged_expanded(queries.view, cache.key_view(), weight, pages, scale, out.view);
      return out;
    };
    const Strided<T> out = attend(this->one, q, rows);
    Strided<double> wide(count, c.heads, c.nope + c.rope);
    for (int64_t t = 0; t < count; ++t)
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t i = 0; i < c.nope + c.rope; ++i) wide.at(t, h, i) = static_cast<double>(q.at(t, h, i));
    EXPECT_LT(error(out, paged_oracle(expanded, wide, rows, scale)), 4 * tolerance<T>);
    EXPECT_EQ(differences(out, attend(this->three, q, rows)), 0);
    for (size_t row = 0; row < rows.size(); row += 17) {
      Strided<T> single(1, c.heads, c.nope + c.rope);
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t i = 0; i < c.nope + c.rope; ++i)
          single.at(0, h, i) = q.at(static_cast<int64_t>(row), h, i);
      const Strided<T> alone = attend(this->one, single, {rows[row]});
      int64_t different = 0;
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t i = 0; i < c.value; ++i)
          different += alone.at(0, h, i) != out.at(static_cast<int64_t>(row), h, i);
      EXPECT_EQ(different, 0) << "row " << row;
    }
  }
}

TEST(CacheStore, WritesColumnsOfSlots) {
  CpuBackend cpu(2);
  Random random(30);
  const int64_t pages = 5, page = 4, width = 11, first = 3, columns = 6, tokens = 9;
  Strided<float> x(tokens, 1, columns, 2, 1);
  x.randomise(random);
  std::vector<int32_t> slots(static_cast<size_t>(pages * page));
  std::iota(slots.begin(), slots.end(), 0);
  random.shuffle(std::span(slots));
  slots.resize(static_cast<size_t>(tokens));
  slots[4] = -1;
  auto check = [&]<class S>(S) {
    std::vector<S> cache(static_cast<size_t>(pages * page * width), S(7.0f)), expected = cache;
    View view(cache.data() + first, {pages, page, columns}, dtype_of<S>);
    view.strides = {page * width, width, 1, 0};
    cpu.cache_store(x.rows(), vector_view(slots), view);
    for (int64_t t = 0; t < tokens; ++t) {
      const int32_t slot = slots[static_cast<size_t>(t)];
      for (int64_t i = 0; slot >= 0 && i < columns; ++i) {
        expected[static_cast<size_t>(slot * width + first + i)] = S(x.at(t, 0, i));
      }
    }
    for (size_t i = 0; i < cache.size(); ++i) {
      EXPECT_EQ(static_cast<float>(cache[i]), static_cast<float>(expected[i])) << i;
    }
  };
  check(float{});
  check(bf16{});
}

// Entries of 8 bits: what is read back lies within half a code of what was stored, the rotary part within
// bfloat16's rounding; attention over them is attention over the rounded values.
TEST(CacheStore, RoundsLatentsToEightBits) {
  CpuBackend cpu(2);
  Random random(41);
  const int64_t rank = 41, rope = 6, page = 4, pages = 3, tokens = 10, heads = 5;
  const int64_t bytes = Backend::narrow_entry_bytes(rank, rope);
  for (DType type : {DType::u8, DType::f8e4m3}) {
    Strided<float> latent(tokens, 1, rank, 2, 1), rotary(tokens, 1, rope);
    latent.randomise(random);
    rotary.randomise(random);
    for (int64_t i = 0; i < rank; ++i) latent.at(3, 0, i) = 0;
    std::vector<uint8_t> memory(static_cast<size_t>(pages * page * bytes), 0xAA);
    View cache(memory.data(), {pages, page, bytes}, type);
    std::vector<int32_t> slots(static_cast<size_t>(tokens));
    std::iota(slots.begin(), slots.end(), 0);
    slots[7] = -1;
    cpu.cache_store_narrow(latent.rows(), rotary.rows(), vector_view(slots), cache);
    EXPECT_EQ(memory[static_cast<size_t>(7 * bytes)], 0xAA);
    slots[7] = 7;
    cpu.cache_store_narrow(latent.rows(), rotary.rows(), vector_view(slots), cache);

    Cache<float, float> rounded(1, rank + rope, rank, page, true, {tokens}, 1);
    for (int64_t t = 0; t < tokens; ++t) {
      const uint8_t* entry = memory.data() + t * bytes;
      float scale, largest = 0;
      std::memcpy(&scale, entry + rank + 2 * rope, 4);
      for (int64_t i = 0; i < rank; ++i) largest = std::max(largest, std::abs(latent.at(t, 0, i)));
      for (int64_t i = 0; i < rank + rope; ++i) {
        float value = 0;
        if (i >= rank) {
          bf16 narrow;
          std::memcpy(&narrow, entry + rank + 2 * (i - rank), 2);
          value = static_cast<float>(narrow);
          EXPECT_EQ(value, static_cast<float>(bf16(rotary.at(t, 0, i - rank))));
        } else {
          const float x = latent.at(t, 0, i);
          value = scale * (type == DType::u8 ? static_cast<float>(static_cast<int8_t>(entry[i]))
                                             : static_cast<float>(std::bit_cast<f8e4m3>(entry[i])));
          const float unit =
              type == DType::u8 ? largest / 127 : std::max(std::abs(x) / 8, largest / 448 / 512);
          EXPECT_LE(std::abs(value - x), 0.501f * unit) << name_of(type) << " " << x;
        }
        rounded.keys[rounded.slot(0, t, rank + rope) + static_cast<size_t>(i)] = value;
      }
    }
    Strided<float> q(2, heads, rank + rope);
    q.randomise(random);
    std::vector<Query> rows = {{0, 4}, {0, 9}};
    const Strided<double> want = paged_oracle(rounded, q, rows, 0.2);
    Strided<float> out(2, heads, rank);
    std::vector<int32_t> table = {0, 1, 2}, sequence = {0, 0}, position = {4, 9};
    const Pages at{View(table.data(), {1, 3}, DType::i32), vector_view(sequence), vector_view(position)};
    const View keys(memory.data(), {pages, page, 1, bytes}, type);
    View values = keys;
    values.shape = {pages, page, 1, rank};
    cpu.attention_paged(q.view, keys, values, at, 0.2, out.view);
    EXPECT_LT(error(out, want), type == DType::u8 ? 3e-4 : tolerance<float>);

    // A latent that is not finite is not taken for one that is.
    latent.at(5, 0, 2) = std::numeric_limits<float>::infinity();
    cpu.cache_store_narrow(latent.rows(), rotary.rows(), vector_view(slots), cache);
    cpu.attention_paged(q.view, keys, values, at, 0.2, out.view);
    EXPECT_FALSE(std::isfinite(out.at(1, 0, 0)));
  }
}

// int8 latents are multiplied as whole numbers, queries and weights rounded to 15 bits: close to attention
// over the values that the codes stand for, and the same bits for any rows and threads.
TEST(Int8Latents, AttendAsTheirValuesDo) {
  CpuBackend one(1), three(3);
  Random random(43);
  struct Shape {
    int64_t heads, rank, rope, page;
  };
  for (const Shape& c :
       {Shape{8, 512, 64, 64}, Shape{16, 512, 64, 64}, Shape{128, 64, 16, 64}, Shape{5, 41, 6, 16},
        Shape{1, 8, 4, 1}, Shape{13, 80, 2, 7}, Shape{4, 1024, 64, 64}}) {
    const int64_t length = random.between(300, 700), pages = (length + c.page - 1) / c.page;
    const int64_t bytes = Backend::narrow_entry_bytes(c.rank, c.rope);
    Strided<float> latent(length, 1, c.rank), rotary(length, 1, c.rope);
    latent.randomise(random), rotary.randomise(random);
    for (int64_t i = 0; i < c.rank; ++i) latent.at(17, 0, i) = 0;
    std::vector<uint8_t> memory(static_cast<size_t>(pages * c.page * bytes), 0xff);
    std::vector<int32_t> slots(static_cast<size_t>(length)), table(static_cast<size_t>(pages));
    std::iota(slots.begin(), slots.end(), 0), std::iota(table.begin(), table.end(), 0);
    one.cache_store_narrow(latent.rows(), rotary.rows(), vector_view(slots),
                           View(memory.data(), {pages, c.page, bytes}, DType::u8));
    Cache<float, float> rounded(1, c.rank + c.rope, c.rank, c.page, true, {length}, 1);
    for (int64_t t = 0; t < length; ++t) {
      const uint8_t* entry = memory.data() + t * bytes;
      float scale;
      std::memcpy(&scale, entry + c.rank + 2 * c.rope, 4);
      float* to = rounded.keys.data() + rounded.slot(0, t, c.rank + c.rope);
      for (int64_t i = 0; i < c.rank; ++i) to[i] = scale * static_cast<float>(static_cast<int8_t>(entry[i]));
      for (int64_t i = 0; i < c.rope; ++i) to[c.rank + i] = static_cast<float>(bf16(rotary.at(t, 0, i)));
    }
    const View keys(memory.data(), {pages, c.page, 1, bytes}, DType::u8);
    View values = keys;
    values.shape = {pages, c.page, 1, c.rank};
    const double scale = 1 / std::sqrt(static_cast<double>(c.rank));
    const auto attend = [&](CpuBackend& cpu, const Strided<float>& q, int64_t first, int64_t count) {
      Strided<float> out(count, c.heads, c.rank), part(count, c.heads, c.rank + c.rope);
      std::vector<int32_t> sequence(static_cast<size_t>(count)), position(static_cast<size_t>(count));
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t h = 0; h < c.heads; ++h)
          for (int64_t i = 0; i < c.rank + c.rope; ++i) part.at(t, h, i) = q.at(first + t, h, i);
        position[static_cast<size_t>(t)] = static_cast<int32_t>(length - q.view[0] + first + t);
      }
      const Pages at{View(table.data(), {1, pages}, DType::i32), vector_view(sequence),
                     vector_view(position)};
      cpu.attention_paged(part.view, keys, values, at, scale, out.view);
      return out;
    };
    Strided<float> q(7, c.heads, c.rank + c.rope);
    q.randomise(random);
    std::vector<Query> rows;
    for (int64_t t = 0; t < 7; ++t) rows.push_back({0, static_cast<int32_t>(length - 7 + t)});
    const Strided<float> together = attend(one, q, 0, 7);
    EXPECT_LT(error(together, paged_oracle(rounded, q, rows, scale)), 6e-4) << c.rank;
    EXPECT_EQ(differences(together, attend(three, q, 0, 7)), 0);
    for (int64_t t = 0; t < 7; ++t) {
      const Strided<float> alone = attend(t % 2 ? one : three, q, t, 1);
      int64_t different = 0;
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t i = 0; i < c.rank; ++i) different += alone.at(0, h, i) != together.at(t, h, i);
      EXPECT_EQ(different, 0) << c.rank << ", row " << t;
    }
    // A query that is not finite is not taken for one that is, nor does it reach other rows.
    q.at(3, 0, 1) = std::numeric_limits<float>::infinity();
    const Strided<float> spoilt = attend(one, q, 0, 7);
    EXPECT_FALSE(std::isfinite(spoilt.at(3, 0, 0)));
    EXPECT_EQ(spoilt.at(2, 0, 0), together.at(2, 0, 0));
  }
}

// The two forms of MLA: keys and values expanded from the latent, or the query folded into it.
TEST(AttentionForms, ExpandedAndAbsorbedAgree) {
  CpuBackend cpu(2);
  Random random(31);
  const int64_t tokens = 90, heads = 3, nope = 16, rope = 8, value = 12, rank = 24, page = 16;
  Strided<double> latent(tokens, 1, rank), w_k(heads, nope, rank), w_v(heads, value, rank);
  for (Strided<double>* s : {&latent, &w_k, &w_v}) s->randomise(random);
  Inputs<double> in({heads, heads, nope, rope, value}, std::vector<int32_t>(tokens, 0), 32);
  Strided<double> folded(tokens, heads, rank + rope), entries(tokens, 1, rank + rope);
  Cache<double, double> cache(1, rank + rope, rank, page, true, {tokens}, 33);
  std::vector<Query> rows;
  for (int64_t t = 0; t < tokens; ++t) {
    rows.push_back({0, static_cast<int32_t>(t)});
    for (int64_t i = 0; i < rank + rope; ++i) {
      cache.keys[cache.slot(0, t, rank + rope) + static_cast<size_t>(i)] =
          i < rank ? latent.at(t, 0, i) : in.k_rope.at(t, 0, i - rank);
    }
    for (int64_t h = 0; h < heads; ++h) {
      auto dot = [&](const Strided<double>& w, int64_t i) {
        double sum = 0;
        for (int64_t r = 0; r < rank; ++r) sum += w.at(h, i, r) * latent.at(t, 0, r);
        return sum;
      };
      for (int64_t i = 0; i < nope; ++i) in.k.at(t, h, i) = dot(w_k, i);
      for (int64_t i = 0; i < value; ++i) in.v.at(t, h, i) = dot(w_v, i);
      for (int64_t r = 0; r < rank; ++r) {
        folded.at(t, h, r) = 0;
        for (int64_t i = 0; i < nope; ++i) folded.at(t, h, r) += w_k.at(h, i, r) * in.q.at(t, h, i);
      }
      for (int64_t i = 0; i < rope; ++i) folded.at(t, h, rank + i) = in.q.at(t, h, nope + i);
    }
  }
  const Outputs<double> expanded = forward(cpu, in);
  const Strided<double> attended = paged(cpu, cache, folded, rows, in.scale);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < value; ++i) {
        double sum = 0;
        for (int64_t r = 0; r < rank; ++r) sum += w_v.at(h, i, r) * attended.at(t, h, r);
        EXPECT_NEAR(sum, expanded.out.at(t, h, i), 1e-11);
      }
    }
  }
}

}  // namespace
}  // namespace latente
