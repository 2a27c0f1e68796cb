// The training objective, recorded once for a shape: L = L_main + (lambda / D) · sum_k L_k + balance losses
// (DeepSeek-V3 report, sections 2.1.2 and 2.2). Evaluation and parity use the same recording.
#pragma once

#include "model/transformer.h"
#include "train/batches.h"

namespace latente {

struct ObjectiveOptions {
  int64_t sequences = 1;
  int64_t sequence_length = 0;  // tokens a sequence
  Balance balance{};            // its sequence_length is that above, whatever it says
  bool count_load = false;      // count expert choices for the routing-bias update
};

// T = sequences · sequence_length throughout. The host fills the inputs before each run.
struct Objective {
  // Inputs.
  Tensor ids;            // [T] i32
  Tensor positions;      // [T] i32
  Tensor starts;         // [T] i32: index of the first token each token attends to
  Tensor targets;        // [T] i32: the next token, negative = none
  Tensor token_weights;  // [T]: what each token's loss counts; usually 1 / number of targets
  Tensor token_mask;     // [T]: 0 for padding
  struct Mtp {
    Tensor ids;            // [T] i32: the token k + 1 places later, 0 where there is none
    Tensor targets;        // [T] i32: the token k + 2 places later, negative = none
    Tensor token_weights;  // [T]: lambda / D / number of targets
    CrossEntropy result;
    Tensor normed;  // [T, hidden] what the head reads
  };
  std::vector<Mtp> mtp;
  // Results, readable after run().
  CrossEntropy main;
  std::vector<Tensor> balance_losses;
  std::vector<Tensor> residuals;  // before each layer and after the last
  Tensor hidden;                  // [T, hidden] after the final norm

  // Every loss the gradient is of.
  std::vector<Tensor> losses() const;
};

Objective record_objective(Plan& plan, const Transformer& model, const Tensor& rope_table,
                           const ObjectiveOptions& options);

// Fills positions 0, 1, ... and starts for plain sequences, a mask of ones, and the targets of `ids` shifted
// by one and, for MTP, by k + 2; the last tokens of a sequence have none. `lengths` cuts sequences short
// (padding behind), and may be empty. Weights are 1 / number of targets, times lambda / D for MTP.
void fill_from_sequences(Objective& objective, std::span<const int32_t> ids, const ObjectiveOptions& options,
                         std::span<const int64_t> lengths, double mtp_lambda);

// Fills everything from a batch of the recorded shape; a target of depth d (0 = main model) counts
// weights[d].
void fill_from_batch(Objective& objective, const Batch& batch, std::span<const double> weights);

// Zeroed memory for the gradient of every parameter that plan.backward() reached, in one block.
struct GradientMemory {
  std::shared_ptr<void> memory;
  int64_t bytes = 0;
  std::vector<Tensor> gradients;  // of one type

  View all() const;  // in a row, with zeros between them
};
GradientMemory allocate_gradients(Backend& backend, Transformer& model);

// The same for the weights' codes and scales in FP8 (PlanOptions::fp8), and what a parameter's take.
void allocate_fp8(Backend& backend, Transformer& model);
int64_t fp8_bytes(const Tensor& parameter);

}  // namespace latente
