// A backend of the CUDA kernels there are, for plans that call no other: the rest fail when reached.
#pragma once

#include "cuda/kernels.h"
#include "cuda/memory.h"

namespace latente {

class PartialCudaBackend final : public Backend {
 public:
  const cuda::Stream& stream() const { return stream_; }

  std::string name() const override { return "cuda"; }
  std::shared_ptr<void> allocate(int64_t bytes) override { return cuda::allocate(bytes); }
  void upload(const void* host, View device) override { cuda::upload(host, device, stream_); }
  void download(View device, void* host) override { cuda::download(device, host, stream_); }
  void synchronize() override { stream_.synchronize(); }

  void expert_order(View experts, View offsets, View rows, View slots) override {
    cuda::expert_order(experts, offsets, rows, slots, stream_);
  }
  void grouped_linear(View x, View rows, View offsets, View w, View out) override {
    cuda::grouped_linear(x, rows, offsets, w, out, stream_);
  }
  void combine(View y, View weights, View slots, Grad out) override {
    cuda::combine(y, weights, slots, out, stream_);
  }

  bool all_finite(View) override { unreached(); }
  void fill(View, double) override { unreached(); }
  void copy(View, Grad) override { unreached(); }
  void add(View, View, View) override { unreached(); }
  void swiglu(View, View, View) override { unreached(); }
  void swiglu_backward(View, View, View, Grad, Grad) override { unreached(); }
  void embedding(View, View, View) override { unreached(); }
  void embedding_backward(View, View, Grad) override { unreached(); }
  void rms_norm(View, View, double, View, View) override { unreached(); }
  void rms_norm_add(View, View, View, double, View, View, View) override { unreached(); }
  void rms_norm_backward(View, View, View, View, Grad, Grad) override { unreached(); }
  void rope(View, View, View, bool, bool) override { unreached(); }
  void linear(View, View, View, Grad) override { unreached(); }
  void linear_backward_input(View, View, Grad) override { unreached(); }
  void linear_backward_weight(View, View, Grad) override { unreached(); }
  void linear_backward_bias(View, Grad) override { unreached(); }
  std::optional<Packed> packed(View) const override { return {}; }
  void pack(View, View) override { unreached(); }
  std::optional<Packed> quantised(Shape, DType, int64_t) const override { return {}; }
  void pack_quantised(const int8_t*, const float*, View, int64_t, int64_t, int64_t) override { unreached(); }
  bool quantise(const float*, const float*, View, int64_t, int64_t, int64_t) override { unreached(); }
  void head_linear(View, View, bool, View) override { unreached(); }
  void route(View, View, View, const Routing&, View, View, View, View, View) override { unreached(); }
  void route_backward(View, View, View, View, View, const Routing&, Grad) override { unreached(); }
  void will_read(View, View, View, View) override { unreached(); }
  void grouped_linear_backward_input(View, View, View, Grad) override { unreached(); }
  void grouped_linear_backward_weight(View, View, View, View, Grad) override { unreached(); }
  void combine_backward(View, View, View, View, Grad, Grad) override { unreached(); }
  void attention_expanded(View, View, View, View, View, double, View, View) override { unreached(); }
  void attention_expanded_backward(View, View, View, View, View, View, double, View, View, View, Grad, Grad,
                                   Grad, Grad) override {
    unreached();
  }
  void attention_paged(View, View, View, const Pages&, double, View) override { unreached(); }
  void cache_store_narrow(View, View, View, View) override { unreached(); }
  void attention_paged_expanded(View, View, View, const Pages&, double, View) override { unreached(); }
  void cache_store(View, View, View) override { unreached(); }
  void linear_cross_entropy(View, View, View, View, View, View, View, View) override { unreached(); }
  void linear_cross_entropy_with_gradient(View, View, View, View, View, View, View, View, Grad,
                                          Grad) override {
    unreached();
  }
  void add_sum_of_squares(View, View) override { unreached(); }
  void adamw(View, View, View, View, View, View, const AdamW&) override { unreached(); }
  void update_routing_bias(View, View, double) override { unreached(); }

 private:
  [[noreturn]] static void unreached() {
    throw std::logic_error("the plan reached a kernel beyond its test");
  }

  cuda::Stream stream_;
};

}  // namespace latente
