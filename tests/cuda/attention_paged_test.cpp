#include <fmt/format.h>
#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <numeric>
#include <span>

#include "cuda/attention_support.h"
#include "cuda/graph.h"

namespace latente {
namespace {

struct PagedCase {
  int64_t heads, groups, key, value, page;
  bool latent;
};
std::string text(const PagedCase& c) {
  return fmt::format("{}/{} heads, {}/{}, pages of {}", c.heads, c.groups, c.key, c.value, c.page);
}
struct Query {
  int32_t sequence, position;
};

// A cache in pages that belong to sequences in random order. Slots nobody stored to hold NaN.
struct Cache {
  Cache(Device& device, const PagedCase& at_, DType type, const std::vector<int64_t>& lengths_,
        Random& random, int64_t spare_columns = 1)
      : at(at_), lengths(lengths_) {
    int64_t used = 0;
    for (const int64_t length : lengths) {
      columns = std::max(columns, (length + at.page - 1) / at.page + spare_columns);
      used += (length + at.page - 1) / at.page;
    }
    pages = used + 3;
    std::vector<int32_t> order(static_cast<size_t>(pages));
    std::iota(order.begin(), order.end(), 0);
    random.shuffle(std::span(order));
    table.assign(lengths.size() * static_cast<size_t>(columns), 0);
    size_t next = 0;
    for (size_t s = 0; s < lengths.size(); ++s)
      for (int64_t p = 0; p * at.page < lengths[s]; ++p)
        table[s * static_cast<size_t>(columns) + static_cast<size_t>(p)] = order[next++];
    table_on_device =
        std::make_unique<DeviceIndices>(device, table, Shape{static_cast<int64_t>(lengths.size()), columns});
    if (Backend::is_narrow_cache(type)) {
      store_narrow(device, type, random);
    } else {
      keys = std::make_unique<DeviceTensor>(device, Shape{pages, at.page, at.groups, at.key}, type);
      fill(*keys, at.key, random);
      key_view = value_view = keys->view;
      if (at.latent) {
        value_view.shape = {pages, at.page, at.groups, at.value};
      } else {
        values = std::make_unique<DeviceTensor>(device, Shape{pages, at.page, at.groups, at.value}, type);
        fill(*values, at.value, random);
        value_view = values->view;
      }
    }
  }

  int64_t slot(size_t sequence, int64_t position) const {
    const int64_t page =
        table[sequence * static_cast<size_t>(columns) + static_cast<size_t>(position / at.page)];
    return page * at.page + position % at.page;
  }
  void fill(DeviceTensor& tensor, int64_t width, Random& random) {
    for (size_t s = 0; s < lengths.size(); ++s)
      for (int64_t p = 0; p < lengths[s]; ++p)
        for (int64_t i = 0; i < at.groups * width; ++i)
          tensor.values[static_cast<size_t>(slot(s, p) * at.groups * width + i)] =
              tensor.rounded(random.normal());
    tensor.upload();
  }
  // Stored through the kernel; the values are what the entries say.
  void store_narrow(Device& device, DType type, Random& random) {
    const int64_t rope = at.key - at.value, bytes = Backend::narrow_entry_bytes(at.value, rope);
    std::vector<int32_t> slots;
    for (size_t s = 0; s < lengths.size(); ++s)
      for (int64_t p = 0; p < lengths[s]; ++p) slots.push_back(static_cast<int32_t>(slot(s, p)));
    const int64_t count = static_cast<int64_t>(slots.size());
    DeviceTensor latent(device, {count, at.value}, DType::f32, 1, 2),
        rotary(device, {count, rope}, DType::f32);
    latent.randomise(random), rotary.randomise(random);
    const DeviceIndices on_device(device, slots);
    narrow = cuda::allocate(pages * at.page * bytes);
    std::vector<unsigned char> entries(static_cast<size_t>(pages * at.page * bytes), 0xff);
    cuda::upload(entries.data(), View(narrow.get(), {pages * at.page * bytes}, DType::u8), device.stream);
    cuda::cache_store_narrow(latent.view, rotary.view, on_device.view,
                             View(narrow.get(), {pages, at.page, bytes}, type), device.context);
    cuda::download(View(narrow.get(), {pages * at.page * bytes}, DType::u8), entries.data(), device.stream);
    narrow_values.assign(static_cast<size_t>(pages * at.page * at.key), nan);
    double worst = 0;
    for (int64_t t = 0; t < count; ++t) {
      const unsigned char* entry = &entries[static_cast<size_t>(slots[static_cast<size_t>(t)] * bytes)];
      float scale;
      std::memcpy(&scale, entry + at.value + 2 * rope, 4);
      double* to = &narrow_values[static_cast<size_t>(slots[static_cast<size_t>(t)] * at.key)];
      double largest = 0;
      for (int64_t i = 0; i < at.value; ++i) {
        const float code = type == DType::u8 ? static_cast<float>(static_cast<int8_t>(entry[i]))
                                             : static_cast<float>(std::bit_cast<f8e4m3>(entry[i]));
        to[i] = static_cast<double>(scale) * static_cast<double>(code);
        largest = std::max(largest, std::abs(latent.values[static_cast<size_t>(t * at.value + i)]));
      }
      for (int64_t i = 0; i < at.value; ++i) {
        const double x = latent.values[static_cast<size_t>(t * at.value + i)];
        const double step =
            type == DType::u8 ? largest / 254 : std::max(std::abs(x) / 16, largest / 448 / 512);
        worst = std::max(worst, std::abs(to[i] - x) / step);
      }
      for (int64_t i = 0; i < rope; ++i) {
        bf16 half;
        std::memcpy(&half, entry + at.value + 2 * i, 2);
        to[at.value + i] = static_cast<double>(static_cast<float>(half));
        EXPECT_EQ(half.bits, bf16(static_cast<float>(rotary.values[static_cast<size_t>(t * rope + i)])).bits);
      }
    }
    EXPECT_LT(worst, 1.001);
    key_view = View(narrow.get(), {pages, at.page, 1, bytes}, type);
    value_view = key_view;
    value_view.shape = {pages, at.page, 1, at.value};
  }
  double key_at(size_t s, int64_t p, int64_t g, int64_t i) const {
    if (narrow) return narrow_values[static_cast<size_t>(slot(s, p) * at.key + i)];
    return keys->values[static_cast<size_t>((slot(s, p) * at.groups + g) * at.key + i)];
  }
  double value_at(size_t s, int64_t p, int64_t g, int64_t i) const {
    if (at.latent) return key_at(s, p, g, i);
    return values->values[static_cast<size_t>((slot(s, p) * at.groups + g) * at.value + i)];
  }

  PagedCase at;
  std::vector<int64_t> lengths;
  int64_t columns = 0, pages = 0;
  std::vector<int32_t> table;
  std::unique_ptr<DeviceIndices> table_on_device;
  std::unique_ptr<DeviceTensor> keys, values;
  std::shared_ptr<void> narrow;
  std::vector<double> narrow_values;
  View key_view, value_view;
};

std::vector<double> attend(Device& device, const Cache& cache, const DeviceTensor& q,
                           const std::vector<Query>& rows, double scale) {
  DeviceTensor out(device, {q.view[0], q.view[1], cache.at.value}, q.view.dtype, 2, 4);
  std::vector<int32_t> sequence, position;
  for (const Query& row : rows) sequence.push_back(row.sequence), position.push_back(row.position);
  const DeviceIndices sequences(device, sequence), positions(device, position);
  cuda::attention_paged(q.view, cache.key_view, cache.value_view,
                        {cache.table_on_device->view, sequences.view, positions.view}, scale, out.view,
                        device.context);
  device.stream.synchronize();
  const std::vector<double> result = out.read();
  EXPECT_EQ(out.written_outside, 0);
  return result;
}

// key(s, p, h, i) and value(s, p, h, i) for a head.
template <class Key, class ValueOf>
std::vector<double> by_loops(const DeviceTensor& q, int64_t value, const std::vector<Query>& rows,
                             double scale, const Key& key, const ValueOf& value_of) {
  const int64_t heads = q.view[1], width = q.view[2];
  std::vector<double> out(static_cast<size_t>(q.view[0] * heads * value));
  in_parallel(q.view[0] * heads, [&](int64_t task) {
    const int64_t t = task / heads, h = task % heads;
    const Query row = rows[static_cast<size_t>(t)];
    if (row.position < 0) return;  // attends to nothing
    const auto s = static_cast<size_t>(row.sequence);
    std::vector<double> p;
    for (int64_t at = 0; at <= row.position; ++at) {
      double dot = 0;
      for (int64_t i = 0; i < width; ++i) dot += q.at(t, h, i) * key(s, at, h, i);
      p.push_back(dot * scale);
    }
    const double top = *std::max_element(p.begin(), p.end());
    double sum = 0;
    for (double& x : p) sum += x = std::exp(x - top);
    double* to = &out[static_cast<size_t>(task * value)];
    for (int64_t at = 0; at <= row.position; ++at)
      for (int64_t i = 0; i < value; ++i) to[i] += p[static_cast<size_t>(at)] / sum * value_of(s, at, h, i);
  });
  return out;
}

std::vector<double> oracle(const Cache& cache, const DeviceTensor& q, const std::vector<Query>& rows,
                           double scale) {
  const int64_t share = cache.at.heads / cache.at.groups;
  return by_loops(
      q, cache.at.value, rows, scale,
      [&](size_t s, int64_t at, int64_t h, int64_t i) { return cache.key_at(s, at, h / share, i); },
      [&](size_t s, int64_t at, int64_t h, int64_t i) { return cache.value_at(s, at, h / share, i); });
}

const std::vector<PagedCase> paged_cases = {
    {128, 1, 576, 512, 64, true}, {64, 1, 576, 512, 128, true}, {16, 1, 576, 512, 64, true},
    {20, 1, 576, 512, 32, true},  {12, 1, 224, 192, 16, true},  {96, 1, 224, 192, 64, true},
    {16, 1, 40, 32, 16, true},    {5, 1, 24, 17, 1, true},      {8, 2, 64, 64, 16, false},
    {32, 8, 128, 128, 64, false}, {4, 4, 16, 24, 64, false},    {12, 3, 13, 9, 5, false},
    {96, 1, 16, 8, 256, false},   {8, 1, 576, 512, 5, true},    {8, 8, 64, 64, 3, false},
    {48, 2, 128, 128, 16, false}, {70, 1, 128, 128, 64, false}, {6, 3, 96, 64, 32, false},
    {4, 1, 80, 64, 64, true},     {20, 1, 112, 96, 16, true},   {8, 1, 272, 256, 64, true},
    {3, 1, 48, 16, 8, true},      {33, 1, 336, 304, 32, true},
};

class CudaPagedAttention : public testing::Test {
 protected:
  void SetUp() override {
    if (cuda::device_count() == 0) GTEST_SKIP() << "no CUDA device";
  }
};

// Several tokens of a sequence, then another, and a padding row.
std::vector<Query> draw_rows(Random& random, const std::vector<int64_t>& lengths, int64_t most) {
  std::vector<Query> rows;
  for (int block = 0; block < 5; ++block) {
    const size_t s = block == 0 ? 0 : random.below(lengths.size());
    const int64_t tokens = std::min(random.between(1, most), lengths[s]);
    const int64_t first = random.chance(0.3) ? 0 : lengths[s] - tokens;
    for (int64_t i = 0; i < tokens; ++i)
      rows.push_back({static_cast<int32_t>(s), static_cast<int32_t>(first + i)});
  }
  rows.push_back({1, -1});
  return rows;
}

void check_case(Device& device, Random& random, const PagedCase& c, DType activation, DType stored,
                const std::vector<int64_t>& lengths, int64_t most, int64_t spare_columns = 1) {
  SCOPED_TRACE(fmt::format("{}, {} over {}", text(c), name_of(activation), name_of(stored)));
  const Cache cache(device, c, stored, lengths, random, spare_columns);
  const std::vector<Query> rows = draw_rows(random, lengths, most);
  DeviceTensor q(device, {static_cast<int64_t>(rows.size()), c.heads, c.key}, activation, 8, 8);
  q.randomise(random);
  const double scale = 1 / std::sqrt(static_cast<double>(c.key));
  EXPECT_LT(distance(attend(device, cache, q, rows, scale), oracle(cache, q, rows, scale)),
            activation == DType::f32 ? 1e-5 : 6e-3);
}

TEST_F(CudaPagedAttention, MatchesDoubleLoops) {
  Device device;
  Random random(20);
  for (const PagedCase& c : paged_cases) {
    for (const auto& [activation, stored] :
         {std::pair{DType::f32, DType::f32}, {DType::f32, DType::bf16}, {DType::bf16, DType::bf16}}) {
      // Contexts around 2048 are cut in two ways.
      check_case(device, random, c, activation, stored,
                 {random.between(2047, 2060), 1, random.between(2, 256), 64, 128, random.between(300, 700)},
                 8);
    }
  }
}

TEST_F(CudaPagedAttention, ReadsNarrowCaches) {
  Device device;
  Random random(21);
  for (const PagedCase& c : {PagedCase{16, 1, 576, 512, 64, true}, PagedCase{128, 1, 576, 512, 64, true},
                             PagedCase{12, 1, 224, 192, 16, true}, PagedCase{40, 1, 224, 192, 7, true},
                             PagedCase{5, 1, 25, 17, 3, true}}) {
    for (const DType activation : {DType::f32, DType::bf16})
      for (const DType stored : {DType::u8, DType::f8e4m3})
        check_case(device, random, c, activation, stored, {random.between(2047, 2300), 1, 64, 129}, 5);
  }
}

// Longer contexts than one kind of piece.
TEST_F(CudaPagedAttention, CutsLongContexts) {
  Device device(int64_t{256} << 20);
  Random random(22);
  check_case(device, random, {16, 1, 576, 512, 64, true}, DType::bf16, DType::bf16, {40000, 9000, 33}, 3);
  check_case(device, random, {4, 1, 224, 192, 64, true}, DType::f32, DType::bf16, {33000, 8200, 8193}, 3);
}

// Every `step`-th row by itself has the bits that it has in `together`.
void expect_rows_alone(Device& device, const Cache& cache, const PagedCase& c, DType type,
                       const DeviceTensor& q, const std::vector<Query>& rows,
                       const std::vector<double>& together, size_t step) {
  const int64_t width = c.heads * c.key, out_width = c.heads * c.value;
  for (size_t row = 0; row < rows.size(); row += step) {
    DeviceTensor single(device, {1, c.heads, c.key}, type);
    std::copy_n(q.values.begin() + static_cast<int64_t>(row) * width, width, single.values.begin());
    single.upload();
    const auto begin = together.begin() + static_cast<int64_t>(row) * out_width;
    EXPECT_EQ(attend(device, cache, single, {rows[row]}, 0.1), std::vector<double>(begin, begin + out_width))
        << "row " << row;
  }
}

// A row's bits depend neither on other rows, nor on the block table's width, nor on the workspace.
TEST_F(CudaPagedAttention, RowsDoNotDependOnTheirCompany) {
  Device device, small(int64_t{6} << 20);
  Random random(23);
  for (const PagedCase& c : paged_cases) {
    for (const DType type : {DType::f32, DType::bf16}) {
      SCOPED_TRACE(fmt::format("{}, {}", text(c), name_of(type)));
      const std::vector<int64_t> lengths = {random.between(2049, 2056), random.between(1, 300), 600};
      const Cache cache(device, c, type, lengths, random);
      std::vector<Query> rows;
      for (int64_t i = 0; i < 8; ++i) rows.push_back({0, static_cast<int32_t>(lengths[0] - 8 + i)});
      for (int64_t i = 0; i < 3; ++i) rows.push_back({2, static_cast<int32_t>(100 + 90 * i)});
      rows.push_back({1, static_cast<int32_t>(lengths[1] - 1)});
      DeviceTensor q(device, {static_cast<int64_t>(rows.size()), c.heads, c.key}, type);
      q.randomise(random);
      const std::vector<double> together = attend(device, cache, q, rows, 0.1);
      EXPECT_EQ(attend(device, cache, q, rows, 0.1), together);
      EXPECT_EQ(attend(small, cache, q, rows, 0.1), together);
      expect_rows_alone(device, cache, c, type, q, rows, together, 1);
    }
  }
}

// Of many sequences a block takes several pieces of a context one after another.
TEST_F(CudaPagedAttention, RowsOfManySequencesAreTheSameAlone) {
  Device device;
  Random random(30);
  for (const PagedCase& c : {PagedCase{128, 1, 576, 512, 64, true}, PagedCase{96, 1, 224, 192, 32, true}}) {
    SCOPED_TRACE(text(c));
    std::vector<int64_t> lengths;
    std::vector<Query> rows;
    for (int32_t s = 0; s < 26; ++s) {
      lengths.push_back(random.between(s % 5 == 0 ? 10 : 900, 1100));
      for (int64_t i = 1; i <= 2; ++i) rows.push_back({s, static_cast<int32_t>(lengths.back() - i)});
    }
    const Cache cache(device, c, DType::bf16, lengths, random);
    DeviceTensor q(device, {static_cast<int64_t>(rows.size()), c.heads, c.key}, DType::bf16);
    q.randomise(random);
    const std::vector<double> together = attend(device, cache, q, rows, 0.1);
    expect_rows_alone(device, cache, c, DType::bf16, q, rows, together, 3);
  }
}

// Rows of many pieces are put together in two ways, by how many they are.
TEST_F(CudaPagedAttention, RowsOfLongContextsAreTheSameAlone) {
  Device device;
  Random random(33);
  for (const PagedCase& c : {PagedCase{128, 1, 576, 512, 64, true}, PagedCase{96, 1, 224, 192, 64, true}}) {
    SCOPED_TRACE(text(c));
    const std::vector<int64_t> lengths = {random.between(16900, 17400), random.between(4000, 9000)};
    const Cache cache(device, c, DType::bf16, lengths, random);
    std::vector<Query> rows;
    for (int32_t i = 0; i < 8; ++i)
      rows.push_back({i % 2, static_cast<int32_t>(lengths[static_cast<size_t>(i % 2)] - 1 - i / 2)});
    DeviceTensor q(device, {static_cast<int64_t>(rows.size()), c.heads, c.key}, DType::bf16);
    q.randomise(random);
    const std::vector<double> together = attend(device, cache, q, rows, 0.1);
    expect_rows_alone(device, cache, c, DType::bf16, q, rows, together, 3);
  }
}

// Block tables that name few entries, and few tokens: latents have kernels of their own.
TEST_F(CudaPagedAttention, ShortTablesGiveTheSameBits) {
  Device device;
  for (const PagedCase& c : {PagedCase{16, 1, 576, 512, 64, true}, PagedCase{20, 1, 576, 512, 16, true},
                             PagedCase{128, 1, 576, 512, 64, true}, PagedCase{12, 1, 224, 192, 64, true},
                             PagedCase{33, 1, 224, 192, 32, true}}) {
    SCOPED_TRACE(text(c));
    for (const int64_t length :
         {1, 9, 63, 64, 65, 80, 113, 128, 129, 192, 200, 257, 640, 1024, 1025, 1930, 2048}) {
      const std::vector<int64_t> lengths = {length, 40};
      Random random(29), again(29);
      const Cache cache(device, c, DType::bf16, lengths, random, 0),
          wide(device, c, DType::bf16, lengths, again, 1 + 2048 / c.page);
      // Tokens of one sequence, of which some may be in another piece than others; padding; one piece.
      std::vector<Query> rows;
      for (int64_t i = std::max<int64_t>(length - 3, 0); i < length; ++i)
        rows.push_back({0, static_cast<int32_t>(i)});
      rows.push_back({1, -1});
      rows.push_back({1, 39});
      DeviceTensor q(device, {static_cast<int64_t>(rows.size()), c.heads, c.key}, DType::bf16, 8, 8);
      q.randomise(random);
      for (const double scale : {0.05, 1.0}) {
        const std::vector<double> few = attend(device, cache, q, rows, scale);
        EXPECT_EQ(attend(device, wide, q, rows, scale), few) << length << " entries, scale " << scale;
        if (c.heads <= 20) {
          EXPECT_LT(distance(few, oracle(cache, q, rows, scale)), scale < 1 ? 6e-3 : 3e-2);
        }
      }
      DeviceTensor single(device, {1, c.heads, c.key}, DType::bf16);
      single.randomise(random);
      const std::vector<Query> row = {{0, static_cast<int32_t>(length - 1)}};
      EXPECT_EQ(attend(device, wide, single, row, 0.05), attend(device, cache, single, row, 0.05));
    }
  }
}

// attention_paged_expanded over a few pieces of a prompt.
struct Expansion {
  int64_t heads, nope, rope, value, rank, page;
  DType stored;
};
void check_expansion(Random& random, const Expansion& c, DType type, const std::vector<int64_t>& lengths,
                     int64_t most) {
  // The second workspace holds a few heads of one sequence at a time, the third not even one.
  Device device, small(int64_t{3} << 20), tiny(int64_t{1} << 20);
  SCOPED_TRACE(fmt::format("{} heads, {}+{}/{} from {}, {} over {}", c.heads, c.nope, c.rope, c.value, c.rank,
                           name_of(type), name_of(c.stored)));
  const Cache cache(device, {c.heads, 1, c.rank + c.rope, c.rank, c.page, true}, c.stored, lengths, random);
  DeviceTensor kv_b(device, {c.heads * (c.nope + c.value), c.rank}, type);
  kv_b.set([&] { return random.normal() / std::sqrt(static_cast<double>(c.rank)); });
  std::vector<std::vector<double>> expanded;  // a sequence each: [position, head, nope + value]
  const int64_t width = c.heads * (c.nope + c.value);
  for (size_t s = 0; s < lengths.size(); ++s) {
    expanded.emplace_back(static_cast<size_t>(lengths[s] * width));
    in_parallel(lengths[s], [&](int64_t at) {
      for (int64_t i = 0; i < width; ++i) {
        double sum = 0;
        for (int64_t r = 0; r < c.rank; ++r)
          sum += kv_b.values[static_cast<size_t>(i * c.rank + r)] * cache.key_at(s, at, 0, r);
        expanded[s][static_cast<size_t>(at * width + i)] = sum;
      }
    });
  }
  std::vector<Query> rows;
  for (int32_t s : {0, 2, 1}) {
    const int64_t tokens = std::min<int64_t>(random.between(1, most), lengths[static_cast<size_t>(s)]);
    for (int64_t i = 0; i < tokens; ++i)
      rows.push_back({s, static_cast<int32_t>(lengths[static_cast<size_t>(s)] - tokens + i)});
  }
  rows.push_back({1, -1});
  DeviceTensor q(device, {static_cast<int64_t>(rows.size()), c.heads, c.nope + c.rope}, type);
  q.randomise(random);
  const double scale = 1 / std::sqrt(static_cast<double>(c.nope + c.rope));
  auto run = [&](Device& on, const DeviceTensor& queries, const std::vector<Query>& which) {
    DeviceTensor out(device, {queries.view[0], c.heads, c.value}, type);
    std::vector<int32_t> sequence, position;
    for (const Query& row : which) sequence.push_back(row.sequence), position.push_back(row.position);
    const DeviceIndices sequences(device, sequence), positions(device, position);
    cuda::attention_paged_expanded(queries.view, cache.key_view, kv_b.view,
                                   {cache.table_on_device->view, sequences.view, positions.view}, scale,
                                   out.view, on.context);
    on.stream.synchronize();
    return out.read();
  };
  const std::vector<double> out = run(device, q, rows);
  auto of_head = [&](size_t s, int64_t at, int64_t h, int64_t i) {
    return expanded[s][static_cast<size_t>(at * width + h * (c.nope + c.value) + i)];
  };
  const std::vector<double> expected = by_loops(
      q, c.value, rows, scale,
      [&](size_t s, int64_t at, int64_t h, int64_t i) {
        return i < c.nope ? of_head(s, at, h, i) : cache.key_at(s, at, 0, c.rank + i - c.nope);
      },
      [&](size_t s, int64_t at, int64_t h, int64_t i) { return of_head(s, at, h, c.nope + i); });
  EXPECT_LT(distance(out, expected), type == DType::f32 ? 1e-5 : 8e-3);
  EXPECT_EQ(run(small, q, rows), out);
  EXPECT_EQ(run(tiny, q, rows), out);
  const int64_t row_width = c.heads * (c.nope + c.rope), out_width = c.heads * c.value;
  for (size_t row = 0; row < rows.size(); row += 17) {
    DeviceTensor single(device, {1, c.heads, c.nope + c.rope}, type);
    std::copy_n(q.values.begin() + static_cast<int64_t>(row) * row_width, row_width, single.values.begin());
    single.upload();
    const auto begin = out.begin() + static_cast<int64_t>(row) * out_width;
    EXPECT_EQ(run(device, single, {rows[row]}), std::vector<double>(begin, begin + out_width));
  }
}

// Each kernel once, on little: for compute-sanitizer.
TEST_F(CudaPagedAttention, SmallCallsOfEachKernel) {
  Device device;
  for (const PagedCase& c : {PagedCase{16, 1, 576, 512, 64, true}, PagedCase{12, 1, 224, 192, 16, true}}) {
    for (const int64_t spare : {0, 40}) {  // few entries, any contexts
      for (const std::vector<int64_t>& lengths : {std::vector<int64_t>{100, 40}, {300, 70}}) {
        SCOPED_TRACE(fmt::format("{}, {} entries, {} columns spare", text(c), lengths[0], spare));
        Random random(31);
        check_case(device, random, c, DType::bf16, DType::bf16, lengths, 3, spare * 64 / c.page);
      }
    }
  }
  Random random(32);
  check_expansion(random, {2, 128, 64, 128, 512, 64, DType::bf16}, DType::bf16, {150, 40, 90}, 20);
  check_expansion(random, {3, 64, 32, 64, 192, 16, DType::bf16}, DType::bf16, {150, 40, 90}, 20);
  const PagedCase large{16, 1, 576, 512, 64, true}, odd{5, 1, 24, 17, 1, true};
  for (const DType narrow : {DType::u8, DType::f8e4m3})
    check_case(device, random, large, DType::bf16, narrow, {200, 40}, 3);
  for (const PagedCase& c : {PagedCase{8, 2, 64, 64, 16, false}, PagedCase{8, 1, 128, 128, 64, false}})
    check_case(device, random, c, DType::bf16, DType::bf16, {200, 40}, 3);
  check_case(device, random, large, DType::f32, DType::bf16, {200, 40}, 3);
  check_case(device, random, odd, DType::bf16, DType::bf16, {200, 40}, 3);
  // Rows enough to be put together by warps.
  std::vector<int64_t> lengths;
  for (int i = 0; i < 40; ++i) lengths.push_back(random.between(1, 300));
  const PagedCase many{80, 1, 576, 512, 64, true};
  const Cache cache(device, many, DType::bf16, lengths, random);
  std::vector<Query> rows;
  for (size_t s = 0; s < lengths.size(); ++s)
    rows.push_back({static_cast<int32_t>(s), static_cast<int32_t>(lengths[s] - 1)});
  DeviceTensor q(device, {static_cast<int64_t>(rows.size()), many.heads, many.key}, DType::bf16, 8, 8);
  q.randomise(random);
  EXPECT_LT(distance(attend(device, cache, q, rows, 0.05), oracle(cache, q, rows, 0.05)), 6e-3);
}

TEST_F(CudaPagedAttention, TellsWhichShortTablesItGainsBy) {
  Device device;
  if (device.context.compute_capability != 90) GTEST_SKIP() << "no Hopper";
  const View latents(nullptr, {100, 64, 1, 576}, DType::bf16);
  const auto named = [&](int64_t tokens, int64_t heads, const View& keys, const View& values,
                         int64_t entries) {
    return cuda::attention_short_table(tokens, heads, keys, values, entries, device.context);
  };
  EXPECT_EQ(named(1, 16, latents, {}, 0), 128);
  EXPECT_EQ(named(16, 16, latents, {}, 128), 128);
  EXPECT_EQ(named(1, 16, latents, {}, 129), 1024);
  EXPECT_EQ(named(1, 128, latents, {}, 1024), 1024);
  EXPECT_EQ(named(1, 16, latents, {}, 1025), 2048);
  EXPECT_EQ(named(1, 16, latents, {}, 2049), 0);
  EXPECT_EQ(named(17, 16, latents, {}, 1), 0);
  EXPECT_EQ(named(3, 128, latents, {}, 200), 0) << "more blocks than multiprocessors";
  EXPECT_EQ(named(1, 16, View(nullptr, {100, 256, 1, 576}, DType::bf16), {}, 1), 1024) << "whole pages";
  EXPECT_EQ(named(1, 16, View(nullptr, {100, 64, 1, 576}, DType::f32), {}, 1), 0);
  EXPECT_EQ(named(1, 16, View(nullptr, {100, 64, 1, 128}, DType::bf16), {}, 1), 0);
  char none = 0;
  const View heads(&none, {100, 64, 1, 576}, DType::bf16);
  EXPECT_EQ(named(1, 16, heads, heads, 1), 0) << "MQA";
}

// A recorded call follows positions and tables that change between replays.
TEST_F(CudaPagedAttention, IsRecordedOnce) {
  Device device;
  Random random(24);
  for (const DType type : {DType::f32, DType::bf16}) {
    const PagedCase c{16, 1, 576, 512, 64, true};
    const std::vector<int64_t> lengths = {3000, 500};
    const Cache cache(device, c, type, lengths, random);
    DeviceTensor q(device, {2, c.heads, c.key}, type), out(device, {2, c.heads, c.value}, type);
    q.randomise(random);
    const DeviceIndices sequences(device, {0, 0}), positions(device, {0, 0});
    const cuda::Graph graph(device.stream, [&] {
      cuda::attention_paged(q.view, cache.key_view, cache.value_view,
                            {cache.table_on_device->view, sequences.view, positions.view}, 0.05, out.view,
                            device.context);
    });
    for (const std::vector<Query>& rows :
         {std::vector<Query>{{0, 2999}, {1, 499}}, {{1, 3}, {0, 200}}, {{0, 2100}, {0, 2101}}}) {
      for (size_t i = 0; i < 2; ++i) {
        cuda::upload(&rows[i].sequence, View(sequences.view.as<int32_t>() + i, {1}, DType::i32),
                     device.stream);
        cuda::upload(&rows[i].position, View(positions.view.as<int32_t>() + i, {1}, DType::i32),
                     device.stream);
      }
      graph.launch(device.stream);
      EXPECT_LT(distance(out.read(), oracle(cache, q, rows, 0.05)), type == DType::f32 ? 1e-5 : 6e-3);
    }
  }
}

TEST_F(CudaPagedAttention, ExpandsLatents) {
  Random random(25);
  for (const DType type : {DType::f32, DType::bf16}) {
    for (const Expansion& c :
         {Expansion{3, 16, 8, 12, 24, 16, type}, Expansion{1, 7, 3, 5, 9, 1, type},
          Expansion{4, 128, 64, 128, 512, 64, type}, Expansion{12, 64, 32, 64, 192, 16, DType::bf16},
          Expansion{4, 64, 32, 64, 192, 16, DType::u8}}) {
      check_expansion(random, c, type, {random.between(520, 900), random.between(1, 300), 256}, 90);
    }
  }
}

TEST_F(CudaPagedAttention, StoresColumnsOfSlots) {
  Device device;
  Random random(26);
  const int64_t pages = 5, page = 4, width = 6, tokens = 9;
  for (const DType from : {DType::f32, DType::bf16}) {
    for (const DType to : {DType::f32, DType::bf16}) {
      DeviceTensor x(device, {tokens, width}, from, 2, 1), cache(device, {pages, page, width}, to, 3, 2);
      x.randomise(random);
      std::vector<int32_t> slots(static_cast<size_t>(pages * page));
      std::iota(slots.begin(), slots.end(), 0);
      random.shuffle(std::span(slots));
      slots.resize(static_cast<size_t>(tokens));
      slots[4] = -1;
      const DeviceIndices on_device(device, slots);
      cuda::cache_store(x.view, on_device.view, cache.view, device.context);
      const std::vector<double> stored = cache.read();
      EXPECT_EQ(cache.written_outside, 0);
      for (int64_t slot = 0; slot < pages * page; ++slot) {
        const auto found = std::find(slots.begin(), slots.end(), slot);
        for (int64_t i = 0; i < width; ++i) {
          const double got = stored[static_cast<size_t>(slot * width + i)];
          if (found == slots.end()) {
            EXPECT_TRUE(std::isnan(got));
          } else {
            EXPECT_EQ(got, cache.rounded(x.values[static_cast<size_t>((found - slots.begin()) * width + i)]));
          }
        }
      }
    }
  }
}

TEST_F(CudaPagedAttention, EntriesThatAreNotFiniteStayNotFinite) {
  Device device;
  const PagedCase c{2, 1, 24, 16, 4, true};
  for (const DType type : {DType::u8, DType::f8e4m3}) {
    Random random(27);
    const Cache cache(device, c, type, {6}, random);
    DeviceTensor latent(device, {1, 16}, DType::f32), rotary(device, {1, 8}, DType::f32);
    latent.randomise(random), rotary.randomise(random);
    latent.values[3] = nan;
    latent.upload();
    View entries = cache.key_view;
    entries.shape = {cache.pages, c.page, entries[3]};
    entries.strides = {entries.strides[0], entries.strides[1], 1, 0};
    const DeviceIndices slot(device, {static_cast<int32_t>(cache.slot(0, 2))});
    cuda::cache_store_narrow(latent.view, rotary.view, slot.view, entries, device.context);
    DeviceTensor q(device, {1, 2, 24}, DType::f32);
    q.randomise(random);
    for (const double x : attend(device, cache, q, {{0, 5}}, 0.2)) EXPECT_TRUE(std::isnan(x));
  }
}

}  // namespace
}  // namespace latente
