#include "infer/calibration.h"

#include <algorithm>
#include <numeric>

#include "infer/uncached_pass.h"

namespace latente {
namespace {

// A column that was always zero still counts a little: another text may use it.
constexpr double least_share = 1e-3;  // of the mean

class Squares {
 public:
  // Adds x [rows, columns] to those of the matrix `name`.
  void add(const std::string& name, const View& x, int64_t first, int64_t last,
           const int32_t* rows = nullptr) {
    if (first == last) return;
    Sum& sum = sums_[name];
    sum.squares.resize(static_cast<size_t>(x[1]));
    for (int64_t r = first; r < last; ++r) {
      const int64_t row = rows ? rows[r] : r;
      const char* from = static_cast<const char*>(x.data) + row * x.stride(0) * size_of(x.dtype);
      values_.resize(sum.squares.size());
      convert(x.dtype, from, DType::f64, values_.data(), x[1]);
      for (size_t i = 0; i < values_.size(); ++i) sum.squares[i] += values_[i] * values_[i];
    }
    sum.rows += last - first;
  }

  Importance importance() const {
    Importance result;
    for (const auto& [name, sum] : sums_) {
      const double count = static_cast<double>(sum.squares.size());
      const double mean = std::accumulate(sum.squares.begin(), sum.squares.end(), 0.0) / count;
      if (!(mean > 0)) continue;
      std::vector<float>& columns = result[name];
      for (double square : sum.squares) columns.push_back(static_cast<float>(square / mean + least_share));
    }
    return result;
  }

 private:
  struct Sum {
    std::vector<double> squares;
    int64_t rows = 0;
  };
  std::map<std::string, Sum> sums_;
  std::vector<double> values_;
};

// What the op is about to multiply with which matrix.
void observe(std::string_view op, std::span<const Tensor> reads, Squares& squares) {
  const auto experts = [&](const Tensor& x, const Tensor* rows, const Tensor& offsets, const Tensor& stack) {
    const int32_t* bounds = offsets.view().as<int32_t>();
    for (int64_t e = 0; e < stack[0]; ++e)
      squares.add(expert_path(stack.name(), e), x.view(), bounds[e], bounds[e + 1],
                  rows ? rows->view().as<int32_t>() : nullptr);
  };
  if (op == "linear") {
    squares.add(reads[1].name(), reads[0].view(), 0, reads[0][0]);
  } else if (op == "linear_onto") {
    squares.add(reads[2].name(), reads[1].view(), 0, reads[1][0]);
  } else if (op == "expert_gate_up") {
    for (size_t i : {3, 4}) experts(reads[0], &reads[1], reads[2], reads[i]);
  } else if (op == "expert_linear") {
    experts(reads[0], nullptr, reads[1], reads[2]);
  }
}

}  // namespace

Importance calibrate(Backend& backend, const Transformer& model, std::span<const int32_t> tokens,
                     const CalibrationOptions& options) {
  LATENTE_ASSERT(backend.is_host());
  const auto total = static_cast<int64_t>(tokens.size()), count = options.context;
  if (total < count) fail("calibration: expected a text of at least {} tokens, found {}", count, total);
  UncachedPass pass(backend, model, count, {.fuse = false});  // sees what each product reads
  Squares squares;
  for (int64_t done = 0; done + count <= total; done += count) {
    backend.upload(tokens.data() + done, pass.ids.view());
    pass.plan.run_observed(
        [&](std::string_view op, std::span<const Tensor> reads) { observe(op, reads, squares); });
    squares.add(model.head().name(), pass.hidden.view(), 0, count);
    if (options.progress) options.progress(done + count, total / count * count);
  }
  return squares.importance();
}

}  // namespace latente
