// Parity: the model against recorded outputs of another implementation (a reference file). The `parity`
// command and the tests share it.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/safetensors.h"
#include "model/transformer.h"

namespace latente {

struct ParityOptions {
  double tolerance = 1e-5;           // of outputs
  double gradient_tolerance = 1e-4;  // of parameters' gradients
};

// One tensor of the reference and how far ours is from it.
struct ParityRow {
  std::string name;
  // norm(ours - theirs) / norm(theirs); where a gradient vanishes, / the norm of the largest gradient; for
  // `generated` the share of tokens that differ
  double difference = 0;
  double tolerance = 0;
  std::string note;

  bool good() const { return difference <= tolerance; }  // NaN is not
};

// A row for every tensor that `reference` holds beside its inputs.
// Inputs: input_ids [batch, length]; lengths [batch], when rows are padded at their end; mtp_lambda, when the
// gradients are of the loss with MTP.
// Compared: hidden.<k> (before layer k; k = layers: after the final norm), logits, loss, mtp.<k>.logits and
// mtp.<k>.loss from k = 1, grad.<parameter> (experts one by one, or stacked as transformers holds them),
// generated [batch, tokens] (greedy). Errors: a tensor that the model has nothing to compare with, ids or
// lengths out of range, nothing to compare.
std::vector<ParityRow> compare_with_reference(Backend& backend, Transformer& model,
                                              const SafetensorsFile& reference,
                                              const ParityOptions& options = {});

}  // namespace latente
