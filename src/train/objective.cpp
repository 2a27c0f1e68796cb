#include "train/objective.h"

#include "tensor/device.h"

#include <algorithm>

namespace latente {
namespace {

// The inputs of an objective, written in the host's memory.
struct Inputs {
  explicit Inputs(const Objective& to)
      : ids(writer(to.ids)),
        positions(writer(to.positions)),
        starts(writer(to.starts)),
        targets(writer(to.targets)),
        token_weights(writer(to.token_weights)),
        token_mask(writer(to.token_mask)) {
    for (const Objective::Mtp& module : to.mtp)
      mtp.push_back({writer(module.ids), writer(module.targets), writer(module.token_weights)});
  }
  void finish() {
    for (HostWriter* input : {&ids, &positions, &starts, &targets, &token_weights, &token_mask})
      input->finish();
    for (Mtp& module : mtp) module.ids.finish(), module.targets.finish(), module.token_weights.finish();
  }

  HostWriter ids, positions, starts, targets, token_weights, token_mask;
  struct Mtp {
    HostWriter ids, targets, token_weights;
  };
  std::vector<Mtp> mtp;

 private:
  static HostWriter writer(const Tensor& input) { return {input.plan()->backend(), input.view()}; }
};

// value(t) at every place t.
template <class F>
void fill(const HostWriter& to, F value) {
  const View& view = to.view();
  const auto as = [&]<class T>(T* x) {
    for (int64_t t = 0; t < view.count(); ++t) x[t] = static_cast<T>(value(static_cast<size_t>(t)));
  };
  switch (view.dtype) {
    case DType::f64:
      return as(view.as<double>());
    case DType::f32:
      return as(view.as<float>());
    default:
      as(view.as<int32_t>());
  }
}

template <class T>
void put(const HostWriter& to, int64_t index, T value) {
  const View& view = to.view();
  switch (view.dtype) {
    case DType::f64:
      view.as<double>()[index] = static_cast<double>(value);
      break;
    case DType::f32:
      view.as<float>()[index] = static_cast<float>(value);
      break;
    default:
      view.as<int32_t>()[index] = static_cast<int32_t>(value);
  }
}

}  // namespace

std::vector<Tensor> Objective::losses() const {
  std::vector<Tensor> all{main.loss};
  for (const Mtp& module : mtp) all.push_back(module.result.loss);
  all.insert(all.end(), balance_losses.begin(), balance_losses.end());
  return all;
}

Objective record_objective(Plan& plan, const Transformer& model, const Tensor& rope_table,
                           const ObjectiveOptions& options) {
  Shape tokens{options.sequences * options.sequence_length};
  DType type = exact_type(model.weights());
  Objective objective;
  objective.ids = plan.input("ids", tokens, DType::i32);
  objective.positions = plan.input("positions", tokens, DType::i32);
  objective.starts = plan.input("starts", tokens, DType::i32);
  objective.targets = plan.input("targets", tokens, DType::i32);
  objective.token_weights = plan.input("token weights", tokens, type);
  objective.token_mask = plan.input("token mask", tokens, type);

  Step at;
  at.positions = objective.positions;
  at.rope_table = rope_table;
  at.starts = objective.starts;
  at.longest = options.sequence_length;
  at.token_mask = objective.token_mask;
  at.balance = options.balance;
  at.balance.sequence_length = options.sequence_length;
  at.count_load = options.count_load;

  objective.hidden = model.hidden(objective.ids, at);
  objective.main =
      linear_cross_entropy(objective.hidden, model.head(), objective.targets, objective.token_weights);
  Tensor fed = objective.hidden;
  for (int64_t k = 0; k < static_cast<int64_t>(model.mtp.size()); ++k) {
    Objective::Mtp module;
    module.ids = plan.input("mtp ids", tokens, DType::i32);
    module.targets = plan.input("mtp targets", tokens, DType::i32);
    module.token_weights = plan.input("mtp token weights", tokens, type);
    fed = module.normed = model.predict(k, fed, module.ids, at);
    Plan::Scope scope(&plan, model.mtp_path(k));
    module.result = linear_cross_entropy(module.normed, model.head(), module.targets, module.token_weights);
    objective.mtp.push_back(std::move(module));
  }
  objective.balance_losses = std::move(at.balance_losses);
  objective.residuals = std::move(at.residuals);

  plan.keep(objective.main.loss), plan.keep(objective.main.nll), plan.keep(objective.main.predicted);
  for (const Objective::Mtp& module : objective.mtp) {
    plan.keep(module.result.loss), plan.keep(module.result.nll), plan.keep(module.result.predicted);
  }
  for (const Tensor& loss : objective.balance_losses) plan.keep(loss);
  return objective;
}

void fill_from_sequences(Objective& objective, std::span<const int32_t> ids, const ObjectiveOptions& options,
                         std::span<const int64_t> lengths, double mtp_lambda) {
  int64_t length = options.sequence_length;
  int64_t depth = static_cast<int64_t>(objective.mtp.size());
  std::vector<int64_t> counts(static_cast<size_t>(depth + 1), 0);
  auto held = [&](int64_t sequence) {
    return lengths.empty() ? length : lengths[static_cast<size_t>(sequence)];
  };
  for (int64_t s = 0; s < options.sequences; ++s) {
    for (int64_t d = 0; d <= depth; ++d)
      counts[static_cast<size_t>(d)] += std::max<int64_t>(held(s) - 1 - d, 0);
  }
  Inputs to(objective);
  for (int64_t s = 0; s < options.sequences; ++s) {
    for (int64_t i = 0; i < length; ++i) {
      int64_t t = s * length + i;
      auto token = [&](int64_t ahead) {
        return i + ahead < held(s) ? ids[static_cast<size_t>(t + ahead)] : int32_t{-1};
      };
      auto weight = [&](int64_t d) {
        int64_t count = counts[static_cast<size_t>(d)];
        return token(d + 1) < 0 || count == 0 ? 0.0 : 1.0 / static_cast<double>(count);
      };
      put(to.ids, t, std::max(token(0), 0));
      put(to.positions, t, i);
      put(to.starts, t, s * length);
      put(to.targets, t, token(1));
      put(to.token_weights, t, weight(0));
      put(to.token_mask, t, i < held(s) ? 1 : 0);
      for (int64_t k = 0; k < depth; ++k) {
        const Inputs::Mtp& module = to.mtp[static_cast<size_t>(k)];
        put(module.ids, t, std::max(token(k + 1), 0));
        put(module.targets, t, token(k + 2));
        put(module.token_weights, t, weight(k + 1) * mtp_lambda / static_cast<double>(depth));
      }
    }
  }
  to.finish();
}

void fill_from_batch(Objective& objective, const Batch& batch, std::span<const double> weights) {
  LATENTE_ASSERT(objective.ids.count() == batch.sequences * batch.length);
  LATENTE_ASSERT(weights.size() == objective.mtp.size() + 1 && batch.inputs.size() == weights.size());
  const auto length = static_cast<size_t>(batch.length);
  const auto fill_depth = [&](size_t depth, const HostWriter& ids, const HostWriter& targets,
                              const HostWriter& token_weights) {
    const std::vector<int32_t>&inputs = batch.inputs[depth], &wanted = batch.targets[depth];
    fill(ids, [&](size_t t) { return inputs[t]; });
    fill(targets, [&](size_t t) { return wanted[t]; });
    fill(token_weights, [&](size_t t) { return wanted[t] < 0 ? 0.0 : weights[depth]; });
  };
  Inputs to(objective);
  fill_depth(0, to.ids, to.targets, to.token_weights);
  fill(to.positions, [&](size_t t) { return t % length; });
  fill(to.starts, [&](size_t t) { return batch.starts[t]; });
  fill(to.token_mask,
       [&](size_t t) { return t % length < static_cast<size_t>(batch.lengths[t / length]) ? 1 : 0; });
  for (size_t k = 0; k < objective.mtp.size(); ++k) {
    fill_depth(k + 1, to.mtp[k].ids, to.mtp[k].targets, to.mtp[k].token_weights);
  }
  to.finish();
}

View GradientMemory::all() const {
  const DType type = gradients.at(0).dtype();
  return {memory.get(), {bytes / size_of(type)}, type};
}

GradientMemory allocate_gradients(Backend& backend, Transformer& model) {
  GradientMemory block;
  std::vector<int64_t> offsets;
  model.for_each([&](const std::string&, Tensor& tensor) {
    if (!tensor.value().grad) return;
    block.gradients.emplace_back(tensor.value().grad);
    offsets.push_back(block.bytes);
    block.bytes += (block.gradients.back().view().bytes() + 63) / 64 * 64;
  });
  block.memory = backend.allocate(block.bytes);
  for (size_t i = 0; i < offsets.size(); ++i) {
    bind_memory(block.gradients[i], static_cast<char*>(block.memory.get()) + offsets[i], block.memory);
  }
  return block;
}

namespace {

std::vector<Tensor> fp8_tensors(const Tensor& parameter) {
  const std::shared_ptr<Fp8Tensors>& of = parameter.value().fp8;
  if (!of) return {};
  return {of->codes, of->scales, of->across_codes, of->across_scales};
}

}  // namespace

void allocate_fp8(Backend& backend, Transformer& model) {
  model.for_each([&](const std::string&, Tensor& parameter) {
    for (const Tensor& tensor : fp8_tensors(parameter)) allocate(backend, tensor);
  });
}

int64_t fp8_bytes(const Tensor& parameter) {
  int64_t bytes = 0;
  for (const Tensor& tensor : fp8_tensors(parameter)) bytes += tensor.view().bytes();
  return bytes;
}

}  // namespace latente
