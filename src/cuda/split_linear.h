// Products of routers in training (split_linear.cu), whose sums are not those of linear() for few rows. Each
// returns false, having done nothing, for what it has no kernel for.
#pragma once

#include "cuda/context.h"
#include "tensor/backend.h"

namespace latente::cuda {

bool split_linear(View x, View w, View out, const Context& context);
bool split_linear_backward_input(View d_out, View w, Grad d_x, const Context& context);
bool split_linear_backward_weight(View d_out, View x, Grad d_w, const Context& context);

}  // namespace latente::cuda
