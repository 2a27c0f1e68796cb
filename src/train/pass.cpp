#include "train/pass.h"

#include <cmath>
#include <numbers>

namespace latente {
namespace {

std::vector<double> doubles_of(Backend& backend, const Tensor& tensor) {
  View view = tensor.view();
  std::vector<double> values(static_cast<size_t>(view.count()));
  if (view.dtype == DType::f64) {
    backend.download(view, values.data());
    return values;
  }
  std::vector<float> narrow(values.size());
  backend.download(view, narrow.data());
  return {narrow.begin(), narrow.end()};
}

std::vector<int32_t> integers_of(Backend& backend, const Tensor& tensor) {
  std::vector<int32_t> values(static_cast<size_t>(tensor.count()));
  backend.download(tensor.view(), values.data());
  return values;
}

}  // namespace

double LossSums::bits_per_byte() const {
  return bytes > 0 ? depths[0].nll / std::numbers::ln2 / static_cast<double>(bytes) : 0;
}

double LossSums::objective(double mtp_lambda) const {
  double sum = depths.empty() ? 0 : depths[0].mean();
  double modules = static_cast<double>(depths.size()) - 1;
  for (size_t k = 1; k < depths.size(); ++k) sum += mtp_lambda / modules * depths[k].mean();
  return sum + balance;
}

Pass::Pass(Backend& backend, const Transformer& model, const Tensor& rope_table,
           const ObjectiveOptions& options, const PlanOptions& how)
    : options_(options), plan_(std::make_unique<Plan>(backend, how)) {
  objective_ = record_objective(*plan_, model, rope_table, options);
  if (how.training) plan_->backward(objective_.losses());
  plan_->compile();
}

void Pass::run(const Batch& batch, std::span<const double> weights, LossSums& sums, Mode mode) {
  fill_from_batch(objective_, batch, weights);
  switch (mode) {
    case Mode::plain:
      plan_->run();
      break;
    case Mode::checked:
      plan_->run_checked();
      break;
    case Mode::profiled:
      plan_->run_profiled(seconds_);
      break;
  }
  add_losses(batch, sums);
}

void Pass::add_losses(const Batch& batch, LossSums& sums) {
  Backend& backend = plan_->backend();
  sums.depths.resize(objective_.mtp.size() + 1);
  auto add = [&](size_t depth, const CrossEntropy& result) {
    for (double nll : doubles_of(backend, result.nll)) sums.depths[depth].nll += nll;
    sums.depths[depth].targets += batch.target_counts[depth];
  };
  add(0, objective_.main);
  for (size_t k = 0; k < objective_.mtp.size(); ++k) add(k + 1, objective_.mtp[k].result);
  for (const Tensor& loss : objective_.balance_losses) sums.balance += doubles_of(backend, loss)[0];
  sums.bytes += batch.target_bytes;
  if (objective_.mtp.empty()) return;
  // The module at place i and the main model at place i + 1 predict the same token.
  std::vector<int32_t> main = integers_of(backend, objective_.main.predicted);
  std::vector<int32_t> module = integers_of(backend, objective_.mtp[0].result.predicted);
  for (int64_t t = 0; t + 1 < batch.sequences * batch.length; ++t) {
    auto at = static_cast<size_t>(t);
    if ((t + 1) % batch.length == 0 || batch.targets[1][at] < 0 || batch.targets[0][at + 1] < 0) continue;
    ++sums.compared;
    sums.agreed += module[at] == main[at + 1] ? 1 : 0;
  }
}

}  // namespace latente
