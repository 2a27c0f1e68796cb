// What ops record where a plan multiplies in FP8 (DeepSeek-V3 report, section 3.3): operands quantised, each
// in one pass along its rows and transposed, since the forward pass sums along one and gradients of weights
// along the other.
#pragma once

#include "ops/ops.h"

namespace latente {

// Whether a product of x with this weight is one in FP8: linear layers and experts, but not routers, whose
// weights are exact. Error where the weight's sizes are not in sixteens.
bool in_fp8(const Plan& plan, const Tensor& weight);

// x [R, C], once for all ops of the plan that read it.
const Fp8Tensors& fp8_rows(const Tensor& x);
// The rows of x in the experts' order, or x, which is in it, with null rows.
Fp8Tensors fp8_expert_rows(const Tensor& x, const Tensor& rows, const Tensor& offsets);
// Room for what another op quantises.
Fp8Tensors fp8_room(Plan& plan, int64_t rows, int64_t columns, int64_t experts);
// A weight's, persistent. What is only a part of a parameter is quantised in every plan.
Fp8Tensors fp8_weight(Plan& plan, const Tensor& weight);

// The gradients of out = x · weightᵀ, whose own is `d`; offsets null, or rows sorted by expert.
void record_fp8_backward_input(Plan& plan, const Fp8Tensors& d, const Tensor& weight, const Tensor& offsets,
                               const Gradients::Slot& d_x);
void record_fp8_backward_weight(Plan& plan, const Fp8Tensors& d, const Fp8Tensors& x, const Tensor& offsets,
                                const Gradients::Slot& d_weight);

}  // namespace latente
