#include "train/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "infer/engine.h"

namespace latente {
namespace {

bool due(int64_t step, int64_t every) { return every > 0 && step % every == 0; }

}  // namespace

double Trainer::mtp_lambda() const {
  return value_at(options_.mtp.lambda, options_.mtp.lambda_after, options_.mtp.change_at, step_,
                  facts_.steps);
}

bool Trainer::run() {
  observer_->on_start(step_);
  began_ = std::chrono::steady_clock::now();
  while (step_ < facts_.steps) {
    if (observer_->stop()) {
      save();
      return false;
    }
    StepReport report = step_once();
    if (due(step_, options_.log.every) || step_ == facts_.steps) observer_->on_step(report);
    if (due(step_, options_.validation.every)) validate();
    if (due(step_, options_.samples.every)) sample();
    if (due(step_, options_.save.every)) save();
    const bool other_work = due(step_, options_.validation.every) || due(step_, options_.samples.every) ||
                            due(step_, options_.save.every);
    if (other_work) began_ = std::chrono::steady_clock::now();
  }
  validate();
  save();
  write_model(options_.out + "/model");
  return true;
}

StepReport Trainer::step_once() {
  StepReport report;
  size_t depths = model_->mtp.size() + 1;
  std::vector<int64_t> targets(depths, 0);
  micro_batches_.resize(static_cast<size_t>(facts_.accumulation));
  for (Batch& batch : micro_batches_) {
    batches_->next(batch, facts_.sequences);
    for (size_t d = 0; d < depths; ++d) targets[d] += batch.target_counts[d];
  }
  double lambda = mtp_lambda();
  std::vector<double> weights(depths);
  for (size_t d = 0; d < depths; ++d) {
    double share = d == 0 ? 1.0 : lambda / static_cast<double>(depths - 1);
    weights[d] = targets[d] > 0 ? share / static_cast<double>(targets[d]) : 0.0;
  }

  run_micro_batches(weights, report.losses, mode_);
  report.objective = report.losses.objective(lambda);
  report.gradient_norm = optimizer_->gradient_norm();
  if (!std::isfinite(report.objective) || !std::isfinite(report.gradient_norm)) report_not_finite(weights);
  report.learning_rate = learning_rate(options_.schedule, step_, facts_.steps);
  optimizer_->step(report.learning_rate, report.gradient_norm);
  const BalanceOptions& balance = options_.balance;
  update_biases(value_at(balance.bias_rate, 0.0, balance.bias_until, step_, facts_.steps));
  // A device works on meanwhile.
  add_load_figures(report);

  report.step = ++step_;
  report.tokens = options_.batch.tokens;
  report.tokens_seen = step_ * report.tokens;
  report.epoch = static_cast<double>(batches_->position().epoch) +
                 static_cast<double>(batches_->position().index) / static_cast<double>(batches_->windows());
  const auto now = std::chrono::steady_clock::now();
  report.seconds = std::chrono::duration<double>(now - began_).count();
  began_ = now;
  report.tokens_per_second = static_cast<double>(report.tokens) / report.seconds;
  report.flops_per_second = report.tokens_per_second * facts_.flops_per_token;
  seconds_per_step_ =
      seconds_per_step_ == 0 ? report.seconds : 0.9 * seconds_per_step_ + 0.1 * report.seconds;
  report.seconds_left = seconds_per_step_ * static_cast<double>(facts_.steps - step_);
  return report;
}

// And, waiting for the device once, the gradients' squares and the routers' loads.
void Trainer::run_micro_batches(std::span<const double> weights, LossSums& sums, Pass::Mode mode) {
  std::vector<Backend::Download> parts;
  for (const Batch& batch : micro_batches_) {
    Pass& pass = &batch == &micro_batches_.front() ? *training_ : *adding_;
    pass.start(batch, weights, mode);
    pass.results(parts);
    if (&batch == &micro_batches_.back()) {
      optimizer_->sum_squares(parts);
      loads_.clear();
      for (auto& [path, gate] : model_->gates()) {
        loads_.emplace_back(static_cast<size_t>(gate->load.count()));
        parts.emplace_back(gate->load.view(), loads_.back().data());
      }
    }
    backend_->download_all(parts);
    parts.clear();
    pass.add_losses(batch, sums);
  }
}

void Trainer::update_biases(double rate) {
  if (rate != bias_rate_) bias_work_ = {};
  bias_rate_ = rate;
  bias_work_.run(*backend_, [&] { update_routing_biases(*backend_, *model_, rate); });
}

std::map<std::string, double> Trainer::seconds_by_op() const {
  std::map<std::string, double> sum = training_->seconds();
  if (adding_) {
    for (const auto& [op, seconds] : adding_->seconds()) sum[op] += seconds;
  }
  return sum;
}

void Trainer::add_load_figures(StepReport& report) const {
  for (const std::vector<float>& load : loads_) {
    LoadFigures figures = load_figures(load);
    ++report.routers;
    report.max_violation += figures.max_violation;
    report.load_entropy += figures.entropy;
    report.dead_experts += figures.dead;
  }
  if (report.routers == 0) return;
  report.max_violation /= static_cast<double>(report.routers);
  report.load_entropy /= static_cast<double>(report.routers);
}

// The weights are still those that made the bad value: the step is run again, looking at every op's result.
void Trainer::report_not_finite(const std::vector<double>& weights) {
  LossSums sums;
  try {
    run_micro_batches(weights, sums, Pass::Mode::checked);
  } catch (const Error& error) {
    fail(
        "step {}: {}; the last saved state is unharmed (a lower learning rate or stronger clipping may help)",
        step_ + 1, error.what());
  }
  model_->for_each([&](const std::string& path, Tensor& tensor) {
    if (tensor.value().grad && !backend_->all_finite(Tensor(tensor.value().grad).view())) {
      fail(
          "step {}: the gradient of {} is not finite, summed over micro-batches; the last saved state is "
          "unharmed",
          step_ + 1, path);
    }
  });
  fail("step {}: the gradient's norm is not finite (gradients too large); the last saved state is unharmed",
       step_ + 1);
}

void Trainer::validate() {
  if (!validation_ || validated_step_ == step_) return;
  validated_step_ = step_;
  Batches batches = make_batches(validation_corpus_, true);
  int64_t count = batches.batches(facts_.sequences);
  if (options_.validation.batches > 0) count = std::min(count, options_.validation.batches);
  ValidationReport report;
  report.step = step_;
  std::vector<double> weights(model_->mtp.size() + 1, 1.0);
  Batch batch;
  for (int64_t i = 0; i < count; ++i) {
    batches.next(batch, facts_.sequences);
    validation_->run(batch, weights, report.losses);
  }
  observer_->on_validation(report);
}

void Trainer::sample() {
  std::vector<std::string> prompts = options_.samples.prompts;
  if (prompts.empty()) prompts.emplace_back();
  RunnerOptions runner;
  GenerationOptions how;
  how.max_tokens = options_.samples.tokens;
  how.sampling.temperature = options_.samples.temperature;
  how.sampling.top_k = options_.samples.top_k;
  how.sampling.seed = static_cast<uint64_t>(step_);
  for (int64_t id : model_->config().eos_token_ids) how.stop_tokens.push_back(static_cast<int32_t>(id));
  for (const std::string& prompt : prompts) {
    std::vector<int32_t> ids = tokenizer_->encode(prompt);
    std::optional<int32_t> begin = tokenizer_->bos_id() ? tokenizer_->bos_id() : tokenizer_->eos_id();
    if (ids.empty() && begin) ids.push_back(*begin);
    if (ids.empty()) continue;
    runner.context = static_cast<int64_t>(ids.size()) + how.max_tokens + 8;
    Engine engine(*backend_, *model_, runner);
    std::vector<int32_t> written;
    engine.generate(ids, how, [&](GeneratedToken token) {
      written.push_back(token.id);
      return true;
    });
    observer_->on_sample({step_, prompt, tokenizer_->decode(written, true)});
  }
}

}  // namespace latente
