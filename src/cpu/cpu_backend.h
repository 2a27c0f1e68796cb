// The CPU backend: every kernel of the contract, in float32 and (for gradient checks) float64. The files
// beside this one hold them by family. Work is divided so that a row's result depends neither on the batch
// nor on the thread count.
#pragma once

#include <memory>

#include "base/threads.h"
#include "tensor/backend.h"

namespace latente {

class CpuBackend : public Backend {
 public:
  // By default as many threads as this process may use.
  explicit CpuBackend(ThreadOptions threads = {});
  ThreadPool& threads() { return pool_; }

  std::string name() const override;
  DType activation_type(DType weight) const override { return exact_type(weight); }
  bool is_host() const override { return true; }
  int64_t available_memory() const override;
  std::shared_ptr<void> allocate(int64_t bytes) override;
  void upload(const void* host, View device) override;
  void download(View device, void* host) override;
  void synchronize() override;
  std::unique_ptr<Replay> record(const std::function<void()>&) override { return nullptr; }
  bool all_finite(View x) override;
  void fill(View x, double value) override;
  void copy(View from, Grad to) override;
  void add(View a, View b, View out) override;
  void swiglu(View gate, View up, View out) override;
  void swiglu_backward(View d_out, View gate, View up, Grad d_gate, Grad d_up) override;
  void embedding(View ids, View table, View out) override;
  void embedding_backward(View ids, View d_out, Grad d_table) override;
  void rms_norm(View x, View weight, double eps, View out, View rstd) override;
  void rms_norm_add(View h, View x, View weight, double eps, View sum, View out, View rstd) override;
  void rms_norm_backward(View d_out, View x, View weight, View rstd, Grad d_x, Grad d_weight) override;
  void rope(View x, View positions, View table, bool interleaved, bool inverse) override;
  void linear(View x, View w, View bias, Grad out) override;
  void linear_backward_input(View d_out, View w, Grad d_x) override;
  void linear_backward_weight(View d_out, View x, Grad d_w) override;
  void linear_backward_bias(View d_out, Grad d_bias) override;
  std::optional<Packed> packed(View w) const override;
  void pack(View w, View to) override;
  bool pack_fp8(View codes, const float* scales, View to, int64_t index) override;
  std::optional<Packed> quantised(Shape shape, DType type, int64_t group) const override;
  void pack_quantised(const int8_t* codes, const float* scales, View to, int64_t index, int64_t row,
                      int64_t rows) override;
  bool pack_blocks(const std::byte* blocks, View to, int64_t index, int64_t row, int64_t rows) override;
  bool quantise(const float* values, const float* importance, View to, int64_t index, int64_t row,
                int64_t rows) override;
  std::shared_ptr<void> take_panels(const void* panels, View& view) override;
  void head_linear(View x, View w, bool transpose, View out) override;
  void route(View logits, View bias, View token_mask, const Routing& routing, View scores, View weights,
             View experts, View load, View balance_loss) override;
  void route_backward(View d_weights, View scores, View weights, View experts, View token_mask,
                      const Routing& routing, Grad d_logits) override;
  void expert_order(View experts, View offsets, View rows, View slots) override;
  void will_read(View gate, View up, View down, View offsets) override;
  void grouped_linear(View x, View rows, View offsets, View w, View out) override;
  void grouped_linear_backward_input(View d_out, View offsets, View w, Grad d_x) override;
  void grouped_linear_backward_weight(View d_out, View x, View rows, View offsets, Grad d_w) override;
  void combine(View y, View weights, View slots, Grad out) override;
  void combine_backward(View d_out, View y, View weights, View slots, Grad d_y, Grad d_weights) override;
  void attention_expanded(View q, View k, View k_rope, View v, View starts, double scale, View out,
                          View lse) override;
  void attention_expanded_backward(View d_out, View q, View k, View k_rope, View v, View starts, double scale,
                                   View out, View lse, const AttentionScratch& scratch, Grad d_q, Grad d_k,
                                   Grad d_k_rope, Grad d_v) override;
  void attention_paged(View q, View keys, View values, const Pages& pages, double scale, View out) override;
  void cache_store_narrow(View latent, View rotary, View slots, View cache) override;
  void attention_paged_expanded(View q, View cache, View kv_b, const Pages& pages, double scale,
                                View out) override;
  void cache_store(View x, View slots, View cache) override;
  bool fuses() const override { return true; }
  void linear_both(View x, View w, View other_w, View out, View other_out) override;
  void expert_layer(const ExpertLayer& layer) override;
  void choose(View logits, View choices, View out) override;
  void take_chosen(View ids, View from, View chosen, View out) override;
  void linear_cross_entropy(View h, View w, View targets, View token_weights, View scratch, View nll,
                            View predicted, View loss) override;
  void linear_cross_entropy_with_gradient(View h, View w, View targets, View token_weights, View scratch,
                                          View nll, View predicted, View loss, Grad d_h, Grad d_w) override;
  void add_sum_of_squares(View x, View result) override;
  void adamw(View parameter, View master, View gradient, View m, View v, View scalars,
             const AdamW& options) override;
  void update_routing_bias(View load, View bias, double rate) override;

 private:
  ThreadPool pool_;
};

}  // namespace latente
