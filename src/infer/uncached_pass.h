// The main model over the first `count` tokens of a text at once, without a cache.
#pragma once

#include "model/transformer.h"

namespace latente {

struct UncachedPass {
  UncachedPass(Backend& backend, const Transformer& model, int64_t count, PlanOptions options = {});

  Plan plan;
  Tensor ids;     // [count] i32: to be filled before the plan runs
  Tensor hidden;  // [count, hidden]: what the head reads
};

}  // namespace latente
