#include "train/pass.h"

#include <cmath>
#include <cstring>
#include <numbers>

namespace latente {
namespace {

template <class F>
void for_each_value(const Tensor& tensor, const std::vector<std::byte>& bytes, const F& f) {
  const auto as = [&]<class T>(T) {
    for (size_t at = 0; at < bytes.size(); at += sizeof(T)) {
      T value;
      std::memcpy(&value, &bytes[at], sizeof(T));
      f(static_cast<double>(value));
    }
  };
  tensor.dtype() == DType::f64 ? as(double{}) : as(float{});
}

std::vector<int32_t> integers_of(const std::vector<std::byte>& bytes) {
  std::vector<int32_t> values(bytes.size() / sizeof(int32_t));
  std::memcpy(values.data(), bytes.data(), bytes.size());
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
  results_.push_back(objective_.main.nll);
  for (const Objective::Mtp& module : objective_.mtp) results_.push_back(module.result.nll);
  results_.insert(results_.end(), objective_.balance_losses.begin(), objective_.balance_losses.end());
  if (!objective_.mtp.empty()) {
    results_.push_back(objective_.main.predicted);
    results_.push_back(objective_.mtp[0].result.predicted);
  }
}

void Pass::run(const Batch& batch, std::span<const double> weights, LossSums& sums, Mode mode) {
  start(batch, weights, mode);
  std::vector<Backend::Download> parts;
  results(parts);
  plan_->backend().download_all(parts);
  add_losses(batch, sums);
}

void Pass::start(const Batch& batch, std::span<const double> weights, Mode mode) {
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
}

void Pass::results(std::vector<Backend::Download>& to) {
  downloaded_.resize(results_.size());
  for (size_t i = 0; i < results_.size(); ++i) {
    const View view = results_[i].view();
    downloaded_[i].resize(static_cast<size_t>(view.bytes()));
    to.emplace_back(view, downloaded_[i].data());
  }
}

void Pass::add_losses(const Batch& batch, LossSums& sums) const {
  const size_t depths = objective_.mtp.size() + 1;
  sums.depths.resize(depths);
  size_t at = 0;
  for (size_t depth = 0; depth < depths; ++depth, ++at) {
    for_each_value(results_[at], downloaded_[at], [&](double nll) { sums.depths[depth].nll += nll; });
    sums.depths[depth].targets += batch.target_counts[depth];
  }
  for (size_t i = 0; i < objective_.balance_losses.size(); ++i, ++at)
    for_each_value(results_[at], downloaded_[at], [&](double loss) { sums.balance += loss; });
  sums.bytes += batch.target_bytes;
  if (objective_.mtp.empty()) return;
  // The module at place i and the main model at place i + 1 predict the same token.
  std::vector<int32_t> main = integers_of(downloaded_[at]);
  std::vector<int32_t> module = integers_of(downloaded_[at + 1]);
  for (int64_t t = 0; t + 1 < batch.sequences * batch.length; ++t) {
    auto place = static_cast<size_t>(t);
    if ((t + 1) % batch.length == 0 || batch.targets[1][place] < 0 || batch.targets[0][place + 1] < 0)
      continue;
    ++sums.compared;
    sums.agreed += module[place] == main[place + 1] ? 1 : 0;
  }
}

}  // namespace latente
