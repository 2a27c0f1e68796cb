// The CUDA backend: every kernel of the contract on one device, in float32 and bfloat16, on one stream.
// Weights of 8 and 4 bits and of FP8 (coded.h) meet activations in bfloat16. Experts read on demand are not
// there yet: Errors say so.
#pragma once

#include <memory>
#include <vector>

#include "cuda/context.h"
#include "cuda/memory.h"
#include "cuda/stream.h"
#include "tensor/backend.h"

namespace latente::cuda {

class CudaBackend final : public Backend {
 public:
  // Error without such a device. To be used by one thread at a time.
  explicit CudaBackend(int device = 0);
  ~CudaBackend() override;

  std::string name() const override;
  DType activation_type(DType weight) const override;
  bool is_host() const override { return false; }
  int64_t available_memory() const override;
  std::shared_ptr<void> allocate(int64_t bytes) override;
  void upload(const void* host, View device) override;
  void download(View device, void* host) override;
  void download_all(std::span<const Download> parts) override;
  void synchronize() override;
  std::unique_ptr<Replay> record(const std::function<void()>& work) override;
  bool runs_beside() const override { return true; }
  int64_t beside_bytes() const override;
  void begin_beside() override;
  void end_beside(int part) override;
  void after_beside(int part) override;
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
  void linear_of_many(View x, View w, View out) override;
  void linear_backward_input(View d_out, View w, Grad d_x) override;
  void linear_backward_weight(View d_out, View x, Grad d_w) override;
  void linear_backward_bias(View d_out, Grad d_bias) override;
  std::optional<Packed> packed(View w) const override;
  void pack(View w, View to) override;
  std::optional<Packed> quantised(Shape shape, DType type, int64_t group) const override;
  void pack_quantised(const int8_t* codes, const float* scales, View to, int64_t index, int64_t row,
                      int64_t rows) override;
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
  int64_t attention_scratch_bytes(const Shape& q, const Shape& k, const Shape& v,
                                  int64_t longest) const override;
  void attention_paged(View q, View keys, View values, const Pages& pages, double scale, View out) override;
  int64_t short_table(int64_t tokens, int64_t heads, View keys, View values, int64_t entries) const override;
  void cache_store_narrow(View latent, View rotary, View slots, View cache) override;
  void attention_paged_expanded(View q, View cache, View kv_b, const Pages& pages, double scale,
                                View out) override;
  void cache_store(View x, View slots, View cache) override;
  void choose(View logits, View choices, View out) override;
  void take_chosen(View ids, View from, View chosen, View out) override;
  bool fuses() const override { return true; }
  void linear_both(View x, View w, View other_w, View out, View other_out) override;
  void gated_linear(View x, View gate, View up, View gated, View risen, View out, bool kept) override;
  void grouped_gated_linear(View x, View rows, View offsets, View gate, View up, View gated, View risen,
                            View out) override;
  void gated_linear_backward_input(View d_gated, View d_risen, View gate, View up, Grad d_x) override;
  void grouped_gated_linear_backward_input(View d_gated, View d_risen, View offsets, View gate, View up,
                                           Grad d_x) override;
  void gated_linear_backward_weight(View d_gated, View d_risen, View x, Grad d_gate, Grad d_up) override;
  void grouped_gated_linear_backward_weight(View d_gated, View d_risen, View x, View rows, View offsets,
                                            Grad d_gate, Grad d_up) override;
  void normed_linear(const NormedRows& x, View w, View other_w, View out, View other_out) override;
  void normed_route(const NormedRows& x, View gate, View bias, const Routing& routing, View logits,
                    View scores, View weights, View experts) override;
  bool multiplies_fp8() const override { return context_.compute_capability == 90; }
  void quantise_fp8(View x, View rows, View offsets, const Fp8Operand& out) override;
  void quantise_fp8_weight(View w, const Fp8Operand& out) override;
  void linear_fp8(const Fp8Matrix& x, const Fp8Matrix& w, View offsets, View bias, Grad out) override;
  void linear_fp8_backward_weight(const Fp8Matrix& d_out_across, const Fp8Matrix& x_across, View offsets,
                                  Grad d_w) override;
  void gated_linear_fp8_backward_weight(const Fp8Matrix& d_gated_across, const Fp8Matrix& d_risen_across,
                                        const Fp8Matrix& x_across, View offsets, Grad d_gate,
                                        Grad d_up) override;
  void gated_linear_fp8(const Fp8Matrix& x, const Fp8Matrix& gate, const Fp8Matrix& up, View offsets,
                        View factors, View gated, View risen, View out) override;
  void gated_linear_fp8_backward_input(const Fp8Matrix& d_gated, const Fp8Matrix& d_risen,
                                       const Fp8Matrix& gate_across, const Fp8Matrix& up_across, View offsets,
                                       Grad d_x) override;
  void sort_weights(View weights, View slots, View factors) override;
  void swiglu_backward_fp8(View d_out, View gated, View risen, View factors, View slots, View offsets,
                           const Fp8Operand& d_gated, const Fp8Operand& d_risen, Grad d_weights) override;
  void latent_entries(const LatentEntries& entries) override;
  void absorb_beside_entries(const LatentEntries& entries, View q, View w, bool transpose, View out) override;
  void attend_entries(const LatentEntries& entries, View q, View w_uk, bool transpose, View keys,
                      const Pages& pages, double scale, View w_uv, View folded, View attended,
                      View out) override;
  void absorb_rotated(View q, View w, bool transpose, View positions, View table, bool interleaved,
                      View out) override;
  void expert_layer(const ExpertLayer& layer) override;
  void linear_cross_entropy(View h, View w, View targets, View token_weights, View scratch, View nll,
                            View predicted, View loss) override;
  void linear_cross_entropy_with_gradient(View h, View w, View targets, View token_weights, View scratch,
                                          View nll, View predicted, View loss, Grad d_h, Grad d_w) override;
  void add_sum_of_squares(View x, View result) override;
  void adamw(View parameter, View master, View gradient, View m, View v, View scalars,
             const AdamW& options) override;
  void update_routing_bias(View load, View bias, double rate) override;

  const Stream& stream() const { return stream_; }

 private:
  void use() const;  // makes the device the calling thread's

  int device_;
  std::string name_;
  Stream stream_{true};
  StagedUploads uploads_{stream_};
  StagedDownloads downloads_{stream_};
  std::shared_ptr<void> workspace_, flag_, taken_;
  Context context_;
  struct Beside;
  std::unique_ptr<Beside> beside_;  // once it has been asked for
};

}  // namespace latente::cuda
