// Random graphs of ops over values, slices of values and values changed in place: what plans and gradients do
// about sharing, regions and liveness must hold for any graph, not only for the model's.
#include "ops/support.h"

namespace latente::test {
namespace {

constexpr int64_t tokens = 3;

// A handle to some columns of a value.
struct Item {
  Tensor tensor;  // [tokens, end - begin]
  const Value* root;
  int64_t begin, end;
  int64_t width() const { return end - begin; }
  bool overlaps(const Item& other) const {
    return root == other.root && begin < other.end && other.begin < end;
  }
};

class Generator {
 public:
  Generator(Plan& plan, const std::vector<Tensor>& parameters, uint64_t seed)
      : plan_(plan), weight_(parameters[2]), scale_(parameters[3]), random_(seed) {
    fresh(leaf(plan, parameters[0]));
    fresh(leaf(plan, parameters[1]));
    Tensor table = buffer({4, 2}, DType::f32);
    for (int64_t i = 0; i < 8; ++i) table.view().as<float>()[i] = static_cast<float>(random_.normal());
    table_ = on_device(plan, table);
  }

  Graph graph(int steps) {
    for (int i = 0; i < steps; ++i) step();
    Graph graph;
    for (int i = 0; i < 3; ++i) graph.outputs.push_back(any().tensor);
    graph.outputs.push_back(items_.back().tensor);
    return graph;
  }

 private:
  size_t pick(size_t count) { return static_cast<size_t>(random_.below(count)); }
  const Item& any() { return items_[pick(items_.size())]; }

  void fresh(const Tensor& tensor) {
    const Value& value = tensor.value();
    items_.push_back({tensor, value.base ? value.base.get() : &value, 0, tensor[1]});
  }

  // Columns of a random value.
  Item part() {
    Item item = any();
    if (!random_.chance(0.4) || item.width() < 2) return item;
    int64_t begin = random_.between(0, item.width() - 1), end = random_.between(begin + 1, item.width());
    return {item.tensor.columns(begin, end), item.root, item.begin + begin, item.begin + end};
  }
  // Another value cut to the same width, or the same.
  Item match(const Item& item) {
    for (int attempt = 0; attempt < 10; ++attempt) {
      Item other = any();
      if (other.width() < item.width()) continue;
      int64_t begin = random_.between(0, other.width() - item.width());
      return {other.tensor.columns(begin, begin + item.width()), other.root, other.begin + begin,
              other.begin + begin + item.width()};
    }
    return item;
  }
  // Its gradient will read these values: they must stay.
  void save(const Item& item) { saved_.push_back(item); }
  bool may_change(const Item& item) const {
    return std::none_of(saved_.begin(), saved_.end(), [&](const Item& s) { return s.overlaps(item); });
  }
  void changed(const Item& item, const Tensor& now) {
    std::erase_if(items_, [&](const Item& other) { return other.overlaps(item); });
    items_.push_back({now, item.root, item.begin, item.end});
  }

  Tensor projected(const Item& x, int64_t out_width) {
    save(x);
    int64_t row = random_.between(0, weight_[0] - out_width),
            column = random_.between(0, weight_[1] - x.width());
    return linear(x.tensor, weight_.rows(row, row + out_width).columns(column, column + x.width()));
  }

  void step() {
    Item a = part();
    switch (pick(9)) {
      case 0:
        return fresh(add(a.tensor, match(a).tensor));
      case 1: {
        Item b = match(a);
        save(a), save(b);
        return fresh(swiglu(a.tensor, b.tensor));
      }
      case 2:
        return fresh(projected(a, random_.between(1, 6)));
      case 3: {
        save(a);
        int64_t at = random_.between(0, scale_[0] - a.width());
        return fresh(rms_norm(a.tensor, scale_.slice(0, at, at + a.width()), 0.1));
      }
      case 4: {
        SumAndNorm y = rms_norm_add(a.tensor, match(a).tensor, scale_.slice(0, 0, a.width()), 0.1);
        fresh(y.sum);
        save(items_.back());
        return fresh(y.out);
      }
      case 5: {
        std::vector<int32_t> rows;
        for (int64_t t = 0; t < tokens; ++t) rows.push_back(static_cast<int32_t>(random_.below(2)));
        int64_t first = random_.between(0, 1);
        return fresh(select_rows(a.tensor.rows(first, first + 2), indices(plan_, {tokens}, rows)));
      }
      case 6: {  // the two halves of a value, which live on beside it
        Item item = any();
        if (item.width() < 2) return;
        int64_t middle = random_.between(1, item.width() - 1);
        items_.push_back({item.tensor.columns(0, middle), item.root, item.begin, item.begin + middle});
        items_.push_back(
            {item.tensor.columns(middle, item.width()), item.root, item.begin + middle, item.end});
        return;
      }
      case 7: {
        Item base = any(), x = part();
        if (!may_change(base) || base.overlaps(x) || base.width() > 6) return;
        save(x);
        int64_t column = random_.between(0, weight_[1] - x.width());
        return changed(base, linear_onto(base.tensor, x.tensor,
                                         weight_.rows(0, base.width()).columns(column, column + x.width())));
      }
      default: {
        if (a.width() < 2 || !may_change(a)) return;
        Tensor turned = rope(a.tensor.reshape({tokens, 1, a.width()}), indices(plan_, {tokens}, {2, 0, 3}),
                             table_, random_.chance(0.5));
        return changed(a, turned.reshape({tokens, a.width()}));
      }
    }
  }

  Plan& plan_;
  Tensor weight_, scale_, table_;
  Random random_;
  std::vector<Item> items_, saved_;
};

TEST(RandomGraph, GradientsLivenessAndReplay) {
  for (uint64_t seed = 1; seed <= 60; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::vector<Input> inputs = {random_input({tokens, 6}, seed), random_input({tokens, 5}, seed + 100),
                                 random_input({8, 8}, seed + 200, 0.5), random_input({6}, seed + 300)};
    check(
        inputs,
        [seed](Plan& plan, const std::vector<Tensor>& p) { return Generator(plan, p, seed).graph(14); }, 1e-6,
        1e-3, 0);
    if (::testing::Test::HasFailure()) return;
  }
}

}  // namespace
}  // namespace latente::test
