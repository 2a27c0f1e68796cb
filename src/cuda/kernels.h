// Kernels of the contract in tensor/backend.h, which says what each computes. They queue work on a stream and
// return; grids follow from shapes alone, so that a captured launch is right whatever the tensors hold.
#pragma once

#include "cuda/stream.h"
#include "tensor/backend.h"

namespace latente::cuda {

// experts.cu
void expert_order(View experts, View offsets, View rows, View slots, StreamHandle stream);
void combine(View y, View weights, View slots, Grad out, StreamHandle stream);

// grouped_linear.cu
void grouped_linear(View x, View rows, View offsets, View w, View out, StreamHandle stream);

}  // namespace latente::cuda
