// What a backend without FP8 products says.
#include "tensor/backend.h"

namespace latente {
namespace {

[[noreturn]] void none(const Backend& backend) { fail("{}: has no products in FP8", backend.name()); }

}  // namespace

void Backend::quantise_fp8(View, View, View, const Fp8Operand&) { none(*this); }
void Backend::quantise_fp8_weight(View, const Fp8Operand&) { none(*this); }
void Backend::linear_fp8(const Fp8Matrix&, const Fp8Matrix&, View, View, Grad) { none(*this); }
void Backend::linear_fp8_backward_weight(const Fp8Matrix&, const Fp8Matrix&, View, Grad) { none(*this); }
void Backend::gated_linear_fp8(const Fp8Matrix&, const Fp8Matrix&, const Fp8Matrix&, View, View, View, View,
                               View) {
  none(*this);
}
void Backend::gated_linear_fp8_backward_input(const Fp8Matrix&, const Fp8Matrix&, const Fp8Matrix&,
                                              const Fp8Matrix&, View, Grad) {
  none(*this);
}
void Backend::gated_linear_fp8_backward_weight(const Fp8Matrix&, const Fp8Matrix&, const Fp8Matrix&, View,
                                               Grad, Grad) {
  none(*this);
}
void Backend::sort_weights(View, View, View) { none(*this); }
void Backend::swiglu_backward_fp8(View, View, View, View, View, View, const Fp8Operand&, const Fp8Operand&,
                                  Grad) {
  none(*this);
}

}  // namespace latente
