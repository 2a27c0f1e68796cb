// AdamW over a model's parameters, and the routing-bias update of auxiliary-loss-free balancing.
#pragma once

#include "model/transformer.h"
#include "train/objective.h"

namespace latente {

struct OptimizerOptions {
  double beta1 = 0.9, beta2 = 0.95, epsilon = 1e-8;  // as published for DeepSeek-V3
  double weight_decay = 0.1;                         // of matrices; norms and biases do not decay
  double clip = 1.0;                                 // largest gradient norm; 0 = no clipping
  // Of both moments: f32 (as gradients), or bf16, as the report (section 3.3.3) keeps them.
  std::string moments = "f32";
  FIELDS(beta1, beta2, epsilon, weight_decay, clip, moments)
};

class Optimizer {
 public:
  // Gradients must have been allocated. bfloat16 parameters get float32 masters, which then hold the exact
  // value.
  Optimizer(Backend& backend, Transformer& model, GradientMemory& gradients, const OptimizerOptions& options);

  // The bytes a model of this shape needs beside weights and gradients.
  static int64_t state_bytes(Transformer& model, const OptimizerOptions& options);

  // Begins the sum of squares of all gradients; what to download for gradient_norm().
  void sum_squares(std::vector<Backend::Download>& to);
  // sqrt of that.
  double gradient_norm() const;
  // One update with the gradients as they are, scaled down to the clipping norm.
  void step(double learning_rate, double gradient_norm);
  int64_t steps() const { return steps_; }

  // f(name, tensor) for everything that must be saved beside the weights: "m.<parameter>", "v.<parameter>"
  // and, for bfloat16 weights, "master.<parameter>".
  void for_each_state(const std::function<void(const std::string& name, const View& view)>& f);
  void set_steps(int64_t steps) { steps_ = steps; }

 private:
  struct Slot {
    std::string name;
    Tensor parameter, gradient, m, v, master;
    bool decays;
  };
  Backend* backend_;
  GradientMemory* gradients_;
  OptimizerOptions options_;
  std::vector<Slot> slots_;
  Tensor norm_, scalars_;
  RepeatedWork norm_work_, step_work_;
  double sum_of_squares_ = 0;
  int64_t steps_ = 0;
};

// bias += rate · sign(mean load - load) for every router, MTP modules' included; loads are zeroed. Call once
// per optimizer step, after all micro-batches.
void update_routing_biases(Backend& backend, Transformer& model, double rate);

// How unevenly the experts of one router were chosen: (max - mean) / mean (Wang et al. 2024), how many nobody
// chose, and the entropy of the load as a share of the greatest possible.
struct LoadFigures {
  double max_violation = 0;
  int64_t dead = 0;
  double entropy = 1;
};
LoadFigures load_figures(std::span<const float> load);

}  // namespace latente
