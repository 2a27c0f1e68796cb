// The objective recorded for one micro-batch shape, run on batches: with gradients (training) or without
// (validation).
#pragma once

#include <cstddef>
#include <map>

#include "train/batches.h"
#include "train/objective.h"

namespace latente {

// What some micro-batches came to. Depth 0 is the main model, depth k the k-th MTP module.
struct LossSums {
  struct Depth {
    double nll = 0;  // summed over the targets, in nats
    int64_t targets = 0;
    double mean() const { return targets > 0 ? nll / static_cast<double>(targets) : 0; }
  };
  std::vector<Depth> depths;
  double balance = 0;  // balance losses, added over layers and micro-batches
  int64_t bytes = 0;   // of text that the main model's targets stand for
  // Places where the first MTP module's most likely token was the main model's own: what greedy speculative
  // decoding would accept.
  int64_t agreed = 0, compared = 0;

  double bits_per_byte() const;
  double acceptance() const {
    return compared > 0 ? static_cast<double>(agreed) / static_cast<double>(compared) : 0;
  }
  // The objective: main + lambda / D · sum of the MTP losses + balance.
  double objective(double mtp_lambda) const;
};

class Pass {
 public:
  // Records; no memory yet. `how.training`: with gradients.
  Pass(Backend& backend, const Transformer& model, const Tensor& rope_table, const ObjectiveOptions& options,
       const PlanOptions& how);

  const ObjectiveOptions& options() const { return options_; }
  const Plan& plan() const { return *plan_; }
  void allocate(std::shared_ptr<void> arena) { plan_->allocate(std::move(arena)); }

  enum class Mode {
    plain,
    checked,  // stops with an Error at the first op whose result is not finite
    profiled  // adds each op's time to seconds()
  };
  // A target of depth d counts weights[d]. Adds to `sums`.
  void run(const Batch& batch, std::span<const double> weights, LossSums& sums, Mode mode = Mode::plain);
  // The same in parts: what to download when it has been started, and what that came to.
  void start(const Batch& batch, std::span<const double> weights, Mode mode);
  void results(std::vector<Backend::Download>& to);
  void add_losses(const Batch& batch, LossSums& sums) const;
  const std::map<std::string, double>& seconds() const { return seconds_; }

 private:
  // As downloaded: each depth's nll, the balance losses; with MTP modules, what the main model and the first
  // one predicted.
  std::vector<Tensor> results_;
  std::vector<std::vector<std::byte>> downloaded_;

  ObjectiveOptions options_;
  std::unique_ptr<Plan> plan_;
  Objective objective_;
  std::map<std::string, double> seconds_;
};

}  // namespace latente
