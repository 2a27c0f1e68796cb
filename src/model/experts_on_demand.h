// Routed experts of a model larger than memory: they stay in their files and are read when a router has
// chosen them; those used last are kept (base/residency.h). What every token reads is in memory.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/residency.h"
#include "checkpoint/tensor_source.h"
#include "model/transformer.h"

namespace latente {

struct ExpertStack {
  std::string path;
  Tensor tensor;
  View view;                             // its form, without data, matrices one after another
  int64_t bytes = 0;                     // of a matrix
  std::vector<Residency::Piece> pieces;  // a matrix each
};

// Where a mapped tensor's byte `offset` lies; the tensor's file must be known.
Residency::Piece piece_of(const MappedTensor& mapped, int64_t offset = 0);

// The most memory that one token's experts of one layer take at once.
int64_t least_expert_memory(const std::vector<ExpertStack>& stacks, int64_t experts_a_token);

// Error naming what is needed, unless `memory` holds what every token reads and the experts of a layer.
void check_memory(int64_t memory, int64_t every_token, int64_t least_of_experts);

// Binds the stacks: their memory never takes more than `memory` bytes, at least least_expert_memory().
void read_on_demand(const std::vector<ExpertStack>& stacks, int64_t memory);

// Null where all experts are in memory, or there are none. Lives as long as the weights.
const Residency* residency_of(Transformer& model);

}  // namespace latente
