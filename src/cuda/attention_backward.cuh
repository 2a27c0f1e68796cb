// What the kernels of expanded attention's gradient share.
#pragma once

#include <algorithm>

#include "cuda/attention.cuh"

namespace latente::cuda {

inline constexpr int64_t wave_alignment = 256;

// Whether kernels run, which the device finds: always, or by a number above or not above a limit.
struct Condition {
  const int* number = nullptr;
  int limit = 0;
  bool above = false;

  __device__ bool met() const { return !number || (*number > limit) == above; }
};

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
  Condition when;

  __device__ float* rope_part(int64_t head, int64_t t) const {
    return rope_parts + (head * forward.tokens + t) * forward.rope;
  }
};

// sums [T, rope] (+)= parts [kv head, T, rope], head after head; the last wave's sums go to the gradient.
void add_rope_gradients(const float* parts, float* sums, int64_t tokens, int rope, int groups, bool first,
                        bool last, const GradRows& to, const Condition& when, StreamHandle stream);

template <class T>
int64_t rope_part_bytes(const Backward<T>& b, const GradRows& d_k_rope) {
  return d_k_rope
             ? static_cast<int64_t>(b.forward.tokens) * b.forward.rope * static_cast<int64_t>(sizeof(float))
             : 0;
}

// Waves of kv heads whose parts of the rotary key's gradient, and group_bytes more for each, fit into the
// workspace; 0 if none do.
template <class T>
int waves_of(const Backward<T>& b, const GradRows& d_k_rope, const Context& context, int64_t group_bytes) {
  const int groups = b.forward.groups;
  const int64_t part = rope_part_bytes(b, d_k_rope), each = part + group_bytes;
  if (each == 0) return 1;
  const int64_t most = std::min<int64_t>(groups, (context.workspace_bytes - part - wave_alignment) / each);
  return most < 1 ? 0 : static_cast<int>((groups + most - 1) / most);
}

// launch(backward, first kv head, kv heads, group_bytes for each of them) for such waves, and the sum of the
// parts. How many there are changes no bits.
template <class T, class Launch>
void for_waves(Backward<T> b, const GradRows& d_k_rope, const Context& context, int64_t group_bytes,
               const Launch& launch) {
  const Expanded<T>& a = b.forward;
  const int waves = waves_of(b, d_k_rope, context, group_bytes);
  const int64_t part = rope_part_bytes(b, d_k_rope);
  if (waves < 1) {
    fail("attention: workspace: expected at least {} bytes, found {}",
         2 * part + group_bytes + wave_alignment, context.workspace_bytes);
  }
  const int wave = (a.groups + waves - 1) / waves;
  float* sums = static_cast<float*>(context.workspace);
  if (part > 0) b.rope_parts = sums + static_cast<int64_t>(a.tokens) * a.rope;
  const int64_t before = part * (wave + 1);
  void* memory =
      static_cast<char*>(context.workspace) + (before + wave_alignment - 1) / wave_alignment * wave_alignment;
  for (int first = 0; first < a.groups; first += wave) {
    const int groups = std::min(wave, a.groups - first);
    launch(b, first, groups, memory);
    if (part == 0) continue;
    add_rope_gradients(b.rope_parts, sums, a.tokens, a.rope, groups, first == 0, first + groups == a.groups,
                       d_k_rope, b.when, context.stream);
  }
}

}  // namespace latente::cuda
