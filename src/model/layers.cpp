#include "model/layers.h"

namespace latente {

Tensor Stream::normed(const Norm& norm) {
  if (!pending) return norm(h);
  auto [sum, out] = rms_norm_add(h, pending, norm.weight, norm.eps);
  h = sum;
  pending = Tensor();
  return out;
}

Tensor Mlp::operator()(const Tensor& x, Step&) const {
  return down_proj(gated_linear(x, gate_proj.weight, up_proj.weight));
}

}  // namespace latente
