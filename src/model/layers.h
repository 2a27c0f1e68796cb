// The small parts: members carry the checkpoint's names.
#pragma once

#include "model/config.h"
#include "model/step.h"
#include "tensor/parameters.h"

namespace latente {

struct Linear {
  Tensor weight;  // [out, in]
  Tensor bias;    // [out] or null; of the exact type
  FIELDS(weight, bias)

  Linear() = default;
  Linear(int64_t in, int64_t out, DType type, bool with_bias = false)
      : weight(parameter({out, in}, type)), bias(with_bias ? parameter({out}, exact_type(type)) : Tensor()) {}
  explicit operator bool() const { return static_cast<bool>(weight); }
  Tensor operator()(const Tensor& x) const { return linear(x, weight, bias); }
};

struct Norm {
  Tensor weight;
  double eps = 1e-6;
  FIELDS(weight)

  Norm() = default;
  Norm(int64_t width, double epsilon, DType type) : weight(parameter({width}, type)), eps(epsilon) {}
  Tensor operator()(const Tensor& x) const { return rms_norm(x, weight, eps); }
};

struct Embedding {
  Tensor weight;  // [vocabulary, hidden]
  FIELDS(weight)

  Embedding() = default;
  Embedding(int64_t vocabulary, int64_t hidden, DType type) : weight(parameter({vocabulary, hidden}, type)) {}
  Tensor operator()(const Tensor& ids) const { return embedding(ids, weight); }
};

// The residual stream h + pending: the sum is taken by the next norm, in one pass.
struct Stream {
  Tensor h, pending;

  // Adds what is pending and returns the norm of the sum.
  Tensor normed(const Norm& norm);
  // For an op that does the same; it returns the sum, which is to be kept.
  Unnormed unnormed(const Norm& norm) const { return {h, pending, norm.weight, norm.eps}; }
  void keep(const Tensor& sum) { h = sum, pending = Tensor(); }
};

// SwiGLU: down(silu(gate(x)) · up(x)).
struct Mlp {
  Linear gate_proj, up_proj, down_proj;
  FIELDS(gate_proj, up_proj, down_proj)

  Mlp() = default;
  Mlp(int64_t hidden, int64_t inner, DType type)
      : gate_proj(hidden, inner, type), up_proj(hidden, inner, type), down_proj(inner, hidden, type) {}
  // Of the stream's norm.
  Tensor operator()(Stream& stream, const Norm& norm, Step& at) const {
    return (*this)(stream.normed(norm), at);
  }
  Tensor operator()(const Tensor& x, Step& at) const;
};

// The cosines and sines of every position: [positions, dim] f32 (see Backend::rope), with YaRN's or Llama 3's
// frequencies where the config asks for them.
Tensor make_rope_table(Backend& backend, const Config& config, int64_t positions);

}  // namespace latente
