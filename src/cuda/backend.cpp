#include "cuda/backend.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "cuda/coded.h"
#include "cuda/graph.h"
#include "cuda/kernels.h"
#include "cuda/memory.h"
#include "cuda/runtime.h"
#include "cuda/split_linear.h"
#include "tensor/panels.h"

namespace latente::cuda {
namespace {

constexpr int64_t workspace_bytes = int64_t{256} << 20;

int checked_device(int device) {
  const int count = device_count();
  if (count == 0) fail("no CUDA device: expected an NVIDIA GPU and its driver");
  if (device < 0 || device >= count) fail("CUDA device {}: expected 0 to {}", device, count - 1);
  check(cudaSetDevice(device), "CUDA device");
  return device;
}

class GraphReplay final : public Replay {
 public:
  GraphReplay(StreamHandle stream, const std::function<void()>& work)
      : stream_(stream), graph_(stream, work) {}
  void launch() override { graph_.launch(stream_); }

 private:
  StreamHandle stream_;
  Graph graph_;
};

}  // namespace

// The second queue, with scratch of its own.
struct CudaBackend::Beside {
  explicit Beside(const Context& first)
      : workspace(cuda::allocate(first.workspace_bytes)),
        taken(cuda::allocate(2 * sizeof(int))),
        other(first) {
    other.stream = stream;
    other.workspace = workspace.get();
    other.taken = static_cast<int*>(taken.get());
  }
  ~Beside() {
    for (cudaEvent_t event : events) cudaEventDestroy(event);
  }
  Beside(const Beside&) = delete;
  Beside& operator=(const Beside&) = delete;

  // 0: where it begins; then the ends of parts.
  cudaEvent_t event(int index) {
    while (static_cast<int>(events.size()) <= index) {
      events.emplace_back();
      check(cudaEventCreateWithFlags(&events.back(), cudaEventDisableTiming), "CUDA event");
    }
    return events[static_cast<size_t>(index)];
  }

  Stream stream;
  std::shared_ptr<void> workspace, taken;
  Context other;  // of the queue that is not being filled
  std::vector<cudaEvent_t> events;
};

CudaBackend::CudaBackend(int device) : device_(checked_device(device)) {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, device_), "CUDA device");
  if (properties.major < 8) {
    fail("CUDA device {}: expected compute capability 8.0 or later, found {}.{} ({})", device_,
         properties.major, properties.minor, properties.name);
  }
  name_ = properties.name;
  workspace_ = cuda::allocate(workspace_bytes);
  flag_ = cuda::allocate(sizeof(int32_t));
  taken_ = cuda::allocate(2 * sizeof(int));
  context_.stream = stream_;
  context_.workspace = workspace_.get();
  context_.workspace_bytes = workspace_bytes;
  context_.taken = static_cast<int*>(taken_.get());
  context_.multiprocessors = properties.multiProcessorCount;
  context_.compute_capability = properties.major * 10 + properties.minor;
  context_.shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin);
}

CudaBackend::~CudaBackend() = default;

std::string CudaBackend::name() const { return "cuda:" + std::to_string(device_) + " (" + name_ + ")"; }

void CudaBackend::use() const { check(cudaSetDevice(device_), "CUDA device"); }

DType CudaBackend::activation_type(DType weight) const {
  if (weight != DType::f32 && weight != DType::bf16)
    fail("weights on CUDA: expected f32 or bf16, found {}", latente::name_of(weight));
  return weight;
}

int64_t CudaBackend::available_memory() const {
  use();
  size_t available = 0, all = 0;
  check(cudaMemGetInfo(&available, &all), "CUDA memory");
  return static_cast<int64_t>(available);
}

std::shared_ptr<void> CudaBackend::allocate(int64_t bytes) {
  use();
  return cuda::allocate(bytes);
}

// What a pass is told comes first: from then on its thread launches on this device.
void CudaBackend::upload(const void* host, View device) {
  use();
  uploads_.upload(host, device);
}
void CudaBackend::download(View device, void* host) {
  use();
  downloads_.download(device, host);
}
void CudaBackend::download_all(std::span<const Download> parts) {
  use();
  downloads_.download_all(parts);
}
void CudaBackend::synchronize() { stream_.synchronize(); }

std::unique_ptr<Replay> CudaBackend::record(const std::function<void()>& work) {
  use();
  return std::make_unique<GraphReplay>(stream_, work);
}

int64_t CudaBackend::beside_bytes() const { return beside_ ? 0 : workspace_bytes; }

void CudaBackend::begin_beside() {
  if (!beside_) beside_ = std::make_unique<Beside>(context_);
  check(cudaEventRecord(beside_->event(0), stream_), "CUDA event");
  check(cudaStreamWaitEvent(beside_->stream, beside_->event(0), 0), "CUDA event");
  std::swap(context_, beside_->other);
}

void CudaBackend::end_beside(int part) {
  std::swap(context_, beside_->other);
  check(cudaEventRecord(beside_->event(part + 1), beside_->stream), "CUDA event");
}

void CudaBackend::after_beside(int part) {
  check(cudaStreamWaitEvent(stream_, beside_->event(part + 1), 0), "CUDA event");
}

bool CudaBackend::all_finite(View x) {
  // Codes in FP8 are of values that were looked at before.
  if (!is_floating(x.dtype) || x.dtype == DType::f8e4m3) return true;
  int32_t finite = 1;
  const View flag(flag_.get(), {1}, DType::i32);
  upload(&finite, flag);
  cuda::clear_unless_finite(x, flag, context_);
  download(flag, &finite);
  return finite != 0;
}

// -- forms of weights --

std::optional<Backend::Packed> CudaBackend::packed(View) const { return std::nullopt; }
void CudaBackend::pack(View, View) { LATENTE_ASSERT(false); }

std::optional<Backend::Packed> CudaBackend::quantised(Shape shape, DType type, int64_t group) const {
  const bool known =
      type == DType::q8 || type == DType::q4 || (type == DType::f8e4m3 && group == quantised::square);
  if (!known || (shape.rank() != 2 && shape.rank() != 3)) return {};
  const View view = quantised::view_of(shape, type, group);
  return Packed{view, quantised::bytes_of(view)};
}

namespace {

// The panel of row `row`, in the host's memory.
std::byte* panel_of(const View& to, int64_t index, int64_t row, const quantised::Form& form) {
  LATENTE_ASSERT(row % quantised::panel_rows == 0);
  const int64_t matrix = quantised::bytes(form, to[-2], to[-1]);
  return static_cast<std::byte*>(to.data) + index * matrix +
         row / quantised::panel_rows * quantised::panel_bytes(form, to[-1]);
}

void pack_panels(const int8_t* codes, const float* scales, const View& to, int64_t index, int64_t row,
                 int64_t rows) {
  const quantised::Form form = quantised::form_of(to.dtype, to.group);
  const int64_t k = to[-1], groups = groups_of(k, form.group), panel = quantised::panel_rows;
  for (int64_t r = 0; r < rows; r += panel) {
    quantised::pack_panel(form, codes + r * k, scales + r * groups, nullptr, std::min(panel, rows - r), k,
                          panel_of(to, index, row + r, form));
  }
}

}  // namespace

void CudaBackend::pack_quantised(const int8_t* codes, const float* scales, View to, int64_t index,
                                 int64_t row, int64_t rows) {
  pack_panels(codes, scales, to, index, row, rows);
}

bool CudaBackend::quantise(const float* values, const float* importance, View to, int64_t index, int64_t row,
                           int64_t rows) {
  const int64_t k = to[-1];
  thread_local std::vector<int8_t> codes;
  thread_local std::vector<float> scales;
  codes.resize(static_cast<size_t>(rows * k));
  scales.resize(static_cast<size_t>(rows * groups_of(k, to.group)));
  latente::quantise_rows(values, rows, k, to.dtype == DType::q8 ? 8 : 4, to.group, codes.data(),
                         scales.data(), importance);
  const auto finite = [](float x) { return std::isfinite(x); };
  if (!std::all_of(values, values + rows * k, finite)) return false;
  if (!std::all_of(scales.begin(), scales.end(), finite)) return false;
  pack_panels(codes.data(), scales.data(), to, index, row, rows);
  return true;
}

std::shared_ptr<void> CudaBackend::take_panels(const void* panels, View& view) {
  use();
  const int64_t matrices = view.shape.rank() == 3 ? view[0] : 1;
  const int64_t from = quantised::bytes_of(view) / std::max<int64_t>(matrices, 1);
  view.strides = {coded_form(view)->bytes};
  std::shared_ptr<void> memory = cuda::allocate(matrices * view.strides[0]);
  view.data = memory.get();
  // A matrix at a time, as it lies in the host's memory.
  const std::shared_ptr<void> staging = cuda::allocate(from);
  for (int64_t i = 0; i < matrices; ++i) {
    upload(static_cast<const std::byte*>(panels) + i * from, View(staging.get(), {from}, DType::u8));
    cuda::lay_out(staging.get(), view, i, context_);
  }
  synchronize();
  return memory;
}

void CudaBackend::will_read(View, View, View, View) { fail("experts read on demand: not on CUDA yet"); }

// -- kernels --

void CudaBackend::fill(View x, double value) { cuda::fill(x, value, context_); }

void CudaBackend::copy(View from, Grad to) { cuda::copy(from, to, context_); }

void CudaBackend::add(View a, View b, View out) { cuda::add(a, b, out, context_); }

void CudaBackend::swiglu(View gate, View up, View out) { cuda::swiglu(gate, up, out, context_); }

void CudaBackend::swiglu_backward(View d_out, View gate, View up, Grad d_gate, Grad d_up) {
  cuda::swiglu_backward(d_out, gate, up, d_gate, d_up, context_);
}

void CudaBackend::embedding(View ids, View table, View out) { cuda::embedding(ids, table, out, context_); }

void CudaBackend::embedding_backward(View ids, View d_out, Grad d_table) {
  cuda::embedding_backward(ids, d_out, d_table, context_);
}

void CudaBackend::rms_norm(View x, View weight, double eps, View out, View rstd) {
  cuda::rms_norm(x, weight, eps, out, rstd, context_);
}

void CudaBackend::rms_norm_add(View h, View x, View weight, double eps, View sum, View out, View rstd) {
  cuda::rms_norm_add(h, x, weight, eps, sum, out, rstd, context_);
}

void CudaBackend::rms_norm_backward(View d_out, View x, View weight, View rstd, Grad d_x, Grad d_weight) {
  cuda::rms_norm_backward(d_out, x, weight, rstd, d_x, d_weight, context_);
}

void CudaBackend::rope(View x, View positions, View table, bool interleaved, bool inverse) {
  cuda::rope(x, positions, table, interleaved, inverse, context_);
}

void CudaBackend::linear(View x, View w, View bias, Grad out) { cuda::linear(x, w, bias, out, context_); }

void CudaBackend::linear_of_many(View x, View w, View out) {
  if (!cuda::split_linear(x, w, out, context_)) Backend::linear_of_many(x, w, out);
}

void CudaBackend::linear_backward_input(View d_out, View w, Grad d_x) {
  cuda::linear_backward_input(d_out, w, d_x, context_);
}

void CudaBackend::linear_backward_weight(View d_out, View x, Grad d_w) {
  cuda::linear_backward_weight(d_out, x, d_w, context_);
}

void CudaBackend::linear_backward_bias(View d_out, Grad d_bias) {
  cuda::linear_backward_bias(d_out, d_bias, context_);
}

void CudaBackend::head_linear(View x, View w, bool transpose, View out) {
  cuda::head_linear(x, w, transpose, out, context_);
}

void CudaBackend::route(View logits, View bias, View token_mask, const Routing& routing, View scores,
                        View weights, View experts, View load, View balance_loss) {
  cuda::route(logits, bias, token_mask, routing, scores, weights, experts, load, balance_loss, context_);
}

void CudaBackend::route_backward(View d_weights, View scores, View weights, View experts, View token_mask,
                                 const Routing& routing, Grad d_logits) {
  cuda::route_backward(d_weights, scores, weights, experts, token_mask, routing, d_logits, context_);
}

void CudaBackend::expert_order(View experts, View offsets, View rows, View slots) {
  cuda::expert_order(experts, offsets, rows, slots, context_);
}

void CudaBackend::grouped_linear(View x, View rows, View offsets, View w, View out) {
  cuda::grouped_linear(x, rows, offsets, w, out, context_);
}

void CudaBackend::grouped_linear_backward_input(View d_out, View offsets, View w, Grad d_x) {
  cuda::grouped_linear_backward_input(d_out, offsets, w, d_x, context_);
}

void CudaBackend::grouped_linear_backward_weight(View d_out, View x, View rows, View offsets, Grad d_w) {
  cuda::grouped_linear_backward_weight(d_out, x, rows, offsets, d_w, context_);
}

void CudaBackend::combine(View y, View weights, View slots, Grad out) {
  cuda::combine(y, weights, slots, out, context_);
}

void CudaBackend::combine_backward(View d_out, View y, View weights, View slots, Grad d_y, Grad d_weights) {
  cuda::combine_backward(d_out, y, weights, slots, d_y, d_weights, context_);
}

void CudaBackend::attention_expanded(View q, View k, View k_rope, View v, View starts, double scale, View out,
                                     View lse) {
  cuda::attention_expanded(q, k, k_rope, v, starts, scale, out, lse, context_);
}

void CudaBackend::attention_expanded_backward(View d_out, View q, View k, View k_rope, View v, View starts,
                                              double scale, View out, View lse,
                                              const AttentionScratch& scratch, Grad d_q, Grad d_k,
                                              Grad d_k_rope, Grad d_v) {
  cuda::attention_expanded_backward(d_out, q, k, k_rope, v, starts, scale, out, lse, scratch, d_q, d_k,
                                    d_k_rope, d_v, context_);
}

int64_t CudaBackend::attention_scratch_bytes(const Shape& q, const Shape& k, const Shape& v,
                                             int64_t longest) const {
  return cuda::attention_scratch_bytes(q, k, v, longest, context_);
}

void CudaBackend::attention_paged(View q, View keys, View values, const Pages& pages, double scale,
                                  View out) {
  cuda::attention_paged(q, keys, values, pages, scale, out, context_);
}

int64_t CudaBackend::short_table(int64_t tokens, int64_t heads, View keys, View values,
                                 int64_t entries) const {
  return attention_short_table(tokens, heads, keys, values, entries, context_);
}

void CudaBackend::cache_store_narrow(View latent, View rotary, View slots, View cache) {
  cuda::cache_store_narrow(latent, rotary, slots, cache, context_);
}

void CudaBackend::attention_paged_expanded(View q, View cache, View kv_b, const Pages& pages, double scale,
                                           View out) {
  cuda::attention_paged_expanded(q, cache, kv_b, pages, scale, out, context_);
}

void CudaBackend::cache_store(View x, View slots, View cache) {
  cuda::cache_store(x, slots, cache, context_);
}

void CudaBackend::choose(View logits, View choices, View out) {
  cuda::choose(logits, choices, out, context_);
}
void CudaBackend::take_chosen(View ids, View from, View chosen, View out) {
  cuda::take_chosen(ids, from, chosen, out, context_);
}

// Fused for few rows; the parts one after the other for many.
void CudaBackend::linear_both(View x, View w, View other_w, View out, View other_out) {
  if (!cuda::linear_both(x, w, other_w, out, other_out, context_))
    Backend::linear_both(x, w, other_w, out, other_out);
}

void CudaBackend::gated_linear(View x, View gate, View up, View gated, View risen, View out, bool kept) {
  if (!(!kept && cuda::gated_few_rows(x, gate, up, out, context_)) &&
      !cuda::gated_linear(x, {}, {}, gate, up, gated, risen, out, context_))
    Backend::gated_linear(x, gate, up, gated, risen, out, kept);
}

void CudaBackend::grouped_gated_linear(View x, View rows, View offsets, View gate, View up, View gated,
                                       View risen, View out) {
  if (!cuda::gated_linear(x, rows, offsets, gate, up, gated, risen, out, context_))
    Backend::grouped_gated_linear(x, rows, offsets, gate, up, gated, risen, out);
}

void CudaBackend::gated_linear_backward_input(View d_gated, View d_risen, View gate, View up, Grad d_x) {
  if (!cuda::gated_linear_backward_input(d_gated, d_risen, {}, gate, up, d_x, context_))
    Backend::gated_linear_backward_input(d_gated, d_risen, gate, up, d_x);
}

void CudaBackend::grouped_gated_linear_backward_input(View d_gated, View d_risen, View offsets, View gate,
                                                      View up, Grad d_x) {
  if (!cuda::gated_linear_backward_input(d_gated, d_risen, offsets, gate, up, d_x, context_))
    Backend::grouped_gated_linear_backward_input(d_gated, d_risen, offsets, gate, up, d_x);
}

void CudaBackend::gated_linear_backward_weight(View d_gated, View d_risen, View x, Grad d_gate, Grad d_up) {
  if (!cuda::gated_linear_backward_weight(d_gated, d_risen, x, {}, {}, d_gate, d_up, context_))
    Backend::gated_linear_backward_weight(d_gated, d_risen, x, d_gate, d_up);
}

void CudaBackend::grouped_gated_linear_backward_weight(View d_gated, View d_risen, View x, View rows,
                                                       View offsets, Grad d_gate, Grad d_up) {
  if (!cuda::gated_linear_backward_weight(d_gated, d_risen, x, rows, offsets, d_gate, d_up, context_))
    Backend::grouped_gated_linear_backward_weight(d_gated, d_risen, x, rows, offsets, d_gate, d_up);
}

void CudaBackend::normed_linear(const NormedRows& x, View w, View other_w, View out, View other_out) {
  if (!cuda::normed_linear(x, w, other_w, out, other_out, context_))
    Backend::normed_linear(x, w, other_w, out, other_out);
}

void CudaBackend::normed_route(const NormedRows& x, View gate, View bias, const Routing& routing, View logits,
                               View scores, View weights, View experts) {
  if (!cuda::normed_route(x, gate, bias, routing, scores, weights, experts, context_))
    Backend::normed_route(x, gate, bias, routing, logits, scores, weights, experts);
}

void CudaBackend::absorb_beside_entries(const LatentEntries& entries, View q, View w, bool transpose,
                                        View out) {
  if (!cuda::absorb_beside_entries(entries, q, w, transpose, out, context_))
    Backend::absorb_beside_entries(entries, q, w, transpose, out);
}

void CudaBackend::attend_entries(const LatentEntries& entries, View q, View w_uk, bool transpose, View keys,
                                 const Pages& pages, double scale, View w_uv, View folded, View attended,
                                 View out) {
  if (!cuda::attend_entries(entries, q, w_uk, transpose, keys, pages, scale, w_uv, folded, attended, out,
                            context_)) {
    Backend::attend_entries(entries, q, w_uk, transpose, keys, pages, scale, w_uv, folded, attended, out);
  }
}

void CudaBackend::quantise_fp8(View x, View rows, View offsets, const Fp8Operand& out) {
  cuda::quantise_fp8(x, rows, offsets, out, context_);
}

void CudaBackend::quantise_fp8_weight(View w, const Fp8Operand& out) {
  cuda::quantise_fp8_weight(w, out, context_);
}

void CudaBackend::linear_fp8(const Fp8Matrix& x, const Fp8Matrix& w, View offsets, View bias, Grad out) {
  cuda::linear_fp8(x, w, offsets, bias, out, context_);
}

void CudaBackend::linear_fp8_backward_weight(const Fp8Matrix& d_out_across, const Fp8Matrix& x_across,
                                             View offsets, Grad d_w) {
  cuda::linear_fp8_backward_weight(d_out_across, x_across, offsets, d_w, context_);
}

void CudaBackend::gated_linear_fp8_backward_weight(const Fp8Matrix& d_gated_across,
                                                   const Fp8Matrix& d_risen_across, const Fp8Matrix& x_across,
                                                   View offsets, Grad d_gate, Grad d_up) {
  cuda::gated_linear_fp8_backward_weight(d_gated_across, d_risen_across, x_across, offsets, d_gate, d_up,
                                         context_);
}

void CudaBackend::gated_linear_fp8(const Fp8Matrix& x, const Fp8Matrix& gate, const Fp8Matrix& up,
                                   View offsets, View factors, View gated, View risen, View out) {
  cuda::gated_linear_fp8(x, gate, up, offsets, factors, gated, risen, out, context_);
}

void CudaBackend::gated_linear_fp8_backward_input(const Fp8Matrix& d_gated, const Fp8Matrix& d_risen,
                                                  const Fp8Matrix& gate_across, const Fp8Matrix& up_across,
                                                  View offsets, Grad d_x) {
  cuda::gated_linear_fp8_backward_input(d_gated, d_risen, gate_across, up_across, offsets, d_x, context_);
}

void CudaBackend::sort_weights(View weights, View slots, View factors) {
  cuda::sort_weights(weights, slots, factors, context_);
}

void CudaBackend::swiglu_backward_fp8(View d_out, View gated, View risen, View factors, View slots,
                                      View offsets, const Fp8Operand& d_gated, const Fp8Operand& d_risen,
                                      Grad d_weights) {
  cuda::swiglu_backward_fp8(d_out, gated, risen, factors, slots, offsets, d_gated, d_risen, d_weights,
                            context_);
}

void CudaBackend::latent_entries(const LatentEntries& entries) {
  if (!cuda::latent_entries(entries, context_)) Backend::latent_entries(entries);
}

void CudaBackend::absorb_rotated(View q, View w, bool transpose, View positions, View table, bool interleaved,
                                 View out) {
  if (!cuda::absorb_rotated(q, w, transpose, positions, table, interleaved, out, context_))
    Backend::absorb_rotated(q, w, transpose, positions, table, interleaved, out);
}

void CudaBackend::expert_layer(const ExpertLayer& layer) {
  if (!cuda::expert_layer(layer, context_)) Backend::expert_layer(layer);
}

void CudaBackend::linear_cross_entropy(View h, View w, View targets, View token_weights, View scratch,
                                       View nll, View predicted, View loss) {
  cuda::linear_cross_entropy(h, w, targets, token_weights, scratch, nll, predicted, loss, context_);
}

void CudaBackend::linear_cross_entropy_with_gradient(View h, View w, View targets, View token_weights,
                                                     View scratch, View nll, View predicted, View loss,
                                                     Grad d_h, Grad d_w) {
  cuda::linear_cross_entropy_with_gradient(h, w, targets, token_weights, scratch, nll, predicted, loss, d_h,
                                           d_w, context_);
}

void CudaBackend::add_sum_of_squares(View x, View result) { cuda::add_sum_of_squares(x, result, context_); }

void CudaBackend::adamw(View parameter, View master, View gradient, View m, View v, View scalars,
                        const AdamW& options) {
  cuda::adamw(parameter, master, gradient, m, v, scalars, options, context_);
}

void CudaBackend::update_routing_bias(View load, View bias, double rate) {
  cuda::update_routing_bias(load, bias, rate, context_);
}

}  // namespace latente::cuda
