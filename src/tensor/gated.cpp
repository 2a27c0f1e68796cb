// What each call on a gate and what it gates stands for.
#include "tensor/backend.h"

namespace latente {

void Backend::gated_linear(View x, View gate, View up, View gated, View risen, View out, bool) {
  linear_both(x, gate, up, gated, risen);
  swiglu(gated, risen, out);
}

void Backend::grouped_gated_linear(View x, View rows, View offsets, View gate, View up, View gated,
                                   View risen, View out) {
  grouped_linear(x, rows, offsets, gate, gated);
  grouped_linear(x, rows, offsets, up, risen);
  swiglu(gated, risen, out);
}

void Backend::gated_linear_backward_input(View d_gated, View d_risen, View gate, View up, Grad d_x) {
  linear_backward_input(d_gated, gate, d_x);
  linear_backward_input(d_risen, up, {d_x.view, true});
}

void Backend::grouped_gated_linear_backward_input(View d_gated, View d_risen, View offsets, View gate,
                                                  View up, Grad d_x) {
  grouped_linear_backward_input(d_gated, offsets, gate, d_x);
  grouped_linear_backward_input(d_risen, offsets, up, {d_x.view, true});
}

void Backend::gated_linear_backward_weight(View d_gated, View d_risen, View x, Grad d_gate, Grad d_up) {
  linear_backward_weight(d_gated, x, d_gate);
  linear_backward_weight(d_risen, x, d_up);
}

void Backend::grouped_gated_linear_backward_weight(View d_gated, View d_risen, View x, View rows,
                                                   View offsets, Grad d_gate, Grad d_up) {
  grouped_linear_backward_weight(d_gated, x, rows, offsets, d_gate);
  grouped_linear_backward_weight(d_risen, x, rows, offsets, d_up);
}

}  // namespace latente
