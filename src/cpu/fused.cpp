// What decoding does in a row, with the products that do not wait for one another in one region: for a single
// token, the threads' meeting costs as much as a small product.
#include "cpu/cpu_backend.h"
#include "cpu/products.h"

namespace latente {

void CpuBackend::linear_both(View x, View w, View other_w, View out, View other_out) {
  Products products(pool_);
  products.add(x, w, {}, {out, false});
  products.add(x, other_w, {}, {other_out, false});
  products.solve();
}

void CpuBackend::expert_layer(const ExpertLayer& at) {
  expert_order(at.experts, at.offsets, at.rows, at.slots);
  const bool shared = static_cast<bool>(at.shared_gate);
  Products first(pool_);
  first.add_experts(at.x, at.rows, at.offsets, at.gate, at.gated);
  first.add_experts(at.x, at.rows, at.offsets, at.up, at.risen);
  if (shared) {
    first.add(at.x, at.shared_gate, {}, {at.shared_gated, false});
    first.add(at.x, at.shared_up, {}, {at.shared_risen, false});
  }
  first.solve();
  swiglu(at.gated, at.risen, at.inner);
  if (shared) swiglu(at.shared_gated, at.shared_risen, at.shared_inner);
  Products second(pool_);
  second.add_experts(at.inner, {}, at.offsets, at.down, at.results);
  if (shared) second.add(at.shared_inner, at.shared_down, {}, {at.out, false});
  second.solve();
  combine(at.results, at.weights, at.slots, {at.out, shared});
}

}  // namespace latente
