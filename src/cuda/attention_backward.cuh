// What the kernels of expanded attention's gradient share.
#pragma once

#include <algorithm>

#include "cuda/attention.cuh"

namespace latente::cuda {

template <class T>
struct Backward {
  Expanded<T> forward;
  float scale = 1;  // without log2(e)
  Rows<const T> d_out;
  float* delta = nullptr;
  int64_t delta_token = 0, delta_head = 0;
  GradRows d_q, d_k, d_v;
  // The rotary key's gradient through the kv heads of one wave, [kv head, T, rope]; null if nobody wants it.
  float* rope_parts = nullptr;

  __device__ float* rope_part(int64_t head, int64_t t) const {
    return rope_parts + (head * forward.tokens + t) * forward.rope;
  }
};

// sums [T, rope] (+)= parts [kv head, T, rope], head after head; the last wave's sums go to the gradient.
void add_rope_gradients(const float* parts, float* sums, int64_t tokens, int rope, int groups, bool first,
                        bool last, const GradRows& to, StreamHandle stream);

// launch(backward, first kv head, kv heads) for waves of kv heads whose parts of the rotary key's gradient
// fit into the workspace, and the sum of these parts. How many there are changes no bits.
template <class T, class Launch>
void for_rope_waves(Backward<T> b, const GradRows& d_k_rope, const Context& context, const Launch& launch) {
  const Expanded<T>& a = b.forward;
  if (!d_k_rope) {
    launch(b, 0, a.groups);
    return;
  }
  const int64_t part = static_cast<int64_t>(a.tokens) * a.rope * static_cast<int64_t>(sizeof(float));
  const int64_t wave = std::min<int64_t>(a.groups, context.workspace_bytes / part - 1);
  if (wave < 1) {
    fail("attention: workspace: expected at least {} bytes, found {}", 2 * part, context.workspace_bytes);
  }
  float* sums = static_cast<float*>(context.workspace);
  b.rope_parts = sums + static_cast<int64_t>(a.tokens) * a.rope;
  for (int first = 0; first < a.groups; first += static_cast<int>(wave)) {
    const int groups = std::min(static_cast<int>(wave), a.groups - first);
    launch(b, first, groups);
    add_rope_gradients(b.rope_parts, sums, a.tokens, a.rope, groups, first == 0, first + groups == a.groups,
                       d_k_rope, context.stream);
  }
}

}  // namespace latente::cuda
