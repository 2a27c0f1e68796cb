#include "train/optimizer.h"

#include "tensor/device.h"

#include <algorithm>
#include <cmath>

namespace latente {

Optimizer::Optimizer(Backend& backend, Transformer& model, GradientMemory& gradients,
                     const OptimizerOptions& options)
    : backend_(&backend),
      gradients_(&gradients),
      options_(options),
      norm_(buffer(backend, {1}, DType::f64, "gradient norm")),
      scalars_(buffer(backend, {4}, DType::f64, "optimizer scalars")) {
  model.for_each([&](const std::string& path, Tensor& tensor) {
    if (!tensor.value().grad) return;
    Slot slot;
    slot.name = path;
    slot.parameter = tensor;
    slot.gradient = Tensor(tensor.value().grad);
    const DType moments = options.moments == "bf16" ? DType::bf16 : slot.gradient.dtype();
    slot.m = buffer(backend, tensor.shape(), moments);
    slot.v = buffer(backend, tensor.shape(), moments);
    if (tensor.dtype() == DType::bf16) {
      slot.master = buffer(backend, tensor.shape(), DType::f32);
      HostWriter master(backend, slot.master.view());
      convert(DType::bf16, on_host(backend, tensor.view()).view.data, DType::f32, master.view().data,
              tensor.count());
      master.finish();
    }
    slot.decays = tensor.shape().rank() > 1;
    slots_.push_back(std::move(slot));
  });
}

int64_t Optimizer::state_bytes(Transformer& model, const OptimizerOptions& options) {
  int64_t bytes = 0;
  model.for_each([&](const std::string&, Tensor& tensor) {
    if (!tensor.requires_grad()) return;
    int64_t width = options.moments == "bf16" ? 2 : size_of(exact_type(tensor.dtype()));
    bytes += tensor.count() * (2 * width + (tensor.dtype() == DType::bf16 ? 4 : 0));
  });
  return bytes;
}

void Optimizer::sum_squares(std::vector<Backend::Download>& to) {
  norm_work_.run(*backend_, [this] {
    backend_->fill(norm_.view(), 0.0);
    backend_->add_sum_of_squares(gradients_->all(), norm_.view());
  });
  to.emplace_back(norm_.view(), &sum_of_squares_);
}

double Optimizer::gradient_norm() const { return std::sqrt(sum_of_squares_); }

void Optimizer::step(double learning_rate, double gradient_norm) {
  ++steps_;
  double factor = options_.clip > 0 && gradient_norm > options_.clip ? options_.clip / gradient_norm : 1.0;
  double steps = static_cast<double>(steps_);
  double scalars[4] = {learning_rate, factor, 1 - std::pow(options_.beta1, steps),
                       1 - std::pow(options_.beta2, steps)};
  backend_->upload(scalars, scalars_.view());
  step_work_.run(*backend_, [this] {
    for (const Slot& slot : slots_) {
      AdamW how{options_.beta1, options_.beta2, options_.epsilon, slot.decays ? options_.weight_decay : 0.0};
      backend_->adamw(slot.parameter.view(), slot.master.view(), slot.gradient.view(), slot.m.view(),
                      slot.v.view(), scalars_.view(), how);
    }
  });
}

void Optimizer::for_each_state(const std::function<void(const std::string&, const View&)>& f) {
  for (const Slot& slot : slots_) {
    f("m." + slot.name, slot.m.view());
    f("v." + slot.name, slot.v.view());
    if (slot.master) f("master." + slot.name, slot.master.view());
  }
}

void update_routing_biases(Backend& backend, Transformer& model, double rate) {
  for (auto& [path, gate] : model.gates()) {
    if (gate->e_score_correction_bias) {
      backend.update_routing_bias(gate->load.view(), gate->e_score_correction_bias.view(), rate);
    } else {
      backend.fill(gate->load.view(), 0.0);
    }
  }
}

LoadFigures load_figures(std::span<const float> load) {
  double sum = 0, most = 0;
  LoadFigures figures;
  for (float count : load) {
    sum += count;
    most = std::max<double>(most, count);
    figures.dead += count == 0 ? 1 : 0;
  }
  if (sum == 0) return {};
  double mean = sum / static_cast<double>(load.size());
  figures.max_violation = (most - mean) / mean;
  double entropy = 0;
  for (float count : load) {
    if (count > 0) entropy -= count / sum * std::log(count / sum);
  }
  if (load.size() > 1) figures.entropy = entropy / std::log(static_cast<double>(load.size()));
  return figures;
}

}  // namespace latente
