#include "train/parity.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "infer/engine.h"
#include "model/weights.h"
#include "tensor/device.h"
#include "train/objective.h"

namespace latente {
namespace {

class Parity {
 public:
  Parity(Backend& backend, Transformer& model, const SafetensorsFile& reference, const ParityOptions& options)
      : backend_(backend), model_(model), reference_(reference), options_(options) {
    read_inputs();
    record();
  }

  std::vector<ParityRow> run() {
    for (const SafetensorsEntry& entry : reference_.entries()) {
      if (entry.name.starts_with("grad."))
        largest_gradient_ = std::max(largest_gradient_, norm_of(reference_numbers(entry.name)));
    }
    for (const SafetensorsEntry& entry : reference_.entries()) compare(entry.name);
    if (rows_.empty()) fail("{}: holds nothing to compare", reference_.path());
    return std::move(rows_);
  }

 private:
  void read_inputs() {
    const SafetensorsEntry& ids = reference_.at("input_ids");
    if (ids.extents.size() != 2) fail("{}: input_ids: expected [batch, length]", reference_.path());
    batch_ = ids.extents[0], length_ = ids.extents[1];
    ids_.resize(static_cast<size_t>(batch_ * length_));
    reference_.read("input_ids", View(ids_.data(), {batch_, length_}, DType::i32));
    for (int32_t& id : ids_) {
      if (id >= model_.config().vocab_size)
        fail("{}: input_ids: {} is outside the vocabulary", reference_.path(), id);
    }
    lengths_.assign(static_cast<size_t>(batch_), length_);
    if (reference_.contains("lengths"))
      reference_.read("lengths", View(lengths_.data(), {batch_}, DType::i64));
    for (int64_t length : lengths_) {
      if (length < 1 || length > length_) fail("{}: lengths: {} is out of range", reference_.path(), length);
    }
    if (reference_.contains("mtp_lambda")) {
      reference_.read("mtp_lambda", View(&lambda_, {1}, DType::f64));
    }
    train_mtp_ = reference_.contains("mtp_lambda");
  }

  void record() {
    plan_ = std::make_unique<Plan>(backend_, PlanOptions{true, true});
    ObjectiveOptions how{.sequences = batch_, .sequence_length = length_};
    objective_ = record_objective(*plan_, model_, make_rope_table(backend_, model_.config(), length_), how);
    plan_->keep(objective_.hidden);
    for (const Tensor& residual : objective_.residuals) plan_->keep(residual);
    logits_ = model_.logits(objective_.hidden);
    plan_->keep(logits_);
    for (const Objective::Mtp& module : objective_.mtp) {
      mtp_logits_.push_back(model_.logits(module.normed));
      plan_->keep(mtp_logits_.back());
    }
    std::vector<Tensor> losses{objective_.main.loss};
    for (const Objective::Mtp& module : objective_.mtp) {
      if (train_mtp_) losses.push_back(module.result.loss);
    }
    plan_->backward(losses);
    gradients_ = allocate_gradients(backend_, model_);
    plan_->compile();
    plan_->allocate();
    fill_from_sequences(objective_, ids_, how, lengths_, lambda_);
    plan_->run();
  }

  // Rows of [batch · length, width] that are not padding, the first `cut` of each sequence fewer at its end.
  std::vector<double> token_rows(const View& view, int64_t cut) const {
    std::vector<double> all = numbers(view), kept;
    int64_t width = view.count() / (batch_ * length_);
    for (int64_t b = 0; b < batch_; ++b) {
      auto first = all.begin() + b * length_ * width;
      kept.insert(kept.end(), first,
                  first + std::max<int64_t>(lengths_[static_cast<size_t>(b)] - cut, 0) * width);
    }
    return kept;
  }

  std::vector<double> numbers(const View& view) const {
    const HostCopy copy = on_host(backend_, view);
    std::vector<double> values(static_cast<size_t>(view.count()));
    convert(view.dtype, copy.view.data, DType::f64, values.data(), view.count());
    return values;
  }

  // The reference's rows of real tokens; its sequences may be `cut` tokens shorter than the input's.
  std::vector<double> reference_rows(const std::string& name, int64_t cut) const {
    const SafetensorsEntry& entry = reference_.at(name);
    std::vector<double> all = reference_numbers(name), kept;
    if (entry.extents.size() < 2 || entry.extents[0] != batch_)
      fail("{}: {}: expected [batch, length, ...]", reference_.path(), name);
    int64_t held = entry.extents[1],
            width = static_cast<int64_t>(all.size()) / std::max<int64_t>(batch_ * held, 1);
    for (int64_t b = 0; b < batch_; ++b) {
      int64_t count = std::max<int64_t>(lengths_[static_cast<size_t>(b)] - cut, 0);
      if (count > held)
        fail("{}: {}: holds {} tokens a sequence, expected at least {}", reference_.path(), name, held,
             count);
      auto first = all.begin() + b * held * width;
      kept.insert(kept.end(), first, first + count * width);
    }
    return kept;
  }

  std::vector<double> reference_numbers(const std::string& name) const {
    const SafetensorsEntry& entry = reference_.at(name);
    Shape shape = entry.shape();
    std::vector<double> values(static_cast<size_t>(shape.count()));
    reference_.read(name, View(values.data(), shape, DType::f64));
    return values;
  }

  void add(const std::string& name, const std::vector<double>& ours, const std::vector<double>& theirs,
           double tolerance) {
    if (ours.size() != theirs.size()) {
      rows_.push_back(
          {name, INFINITY, tolerance, fmt::format("{} values, expected {}", ours.size(), theirs.size())});
      return;
    }
    std::vector<double> differences(ours);
    for (size_t i = 0; i < ours.size(); ++i) differences[i] -= theirs[i];
    double scale = norm_of(theirs);
    std::string note;
    // A gradient that vanishes (of an expert nobody chose, of a router with no choice) is no scale, nor is
    // float64's rounding around it: such gradients are measured by the largest one.
    if (name.starts_with("grad.") && scale <= 1e-12 * largest_gradient_) {
      scale = largest_gradient_;
      note = "vanishes";
    }
    rows_.push_back({name, norm_of(differences) / (scale > 0 ? scale : 1.0), tolerance, note});
  }

  static double norm_of(const std::vector<double>& values) {
    double sum = 0;
    for (double value : values) sum += value * value;
    return std::sqrt(sum);
  }

  void compare(const std::string& name) {
    if (name == "input_ids" || name == "lengths" || name == "mtp_lambda") return;
    if (name == "logits")
      return add(name, token_rows(logits_.view(), 0), reference_rows(name, 0), options_.tolerance);
    if (name == "loss")
      return add(name, numbers(objective_.main.loss.view()), reference_numbers(name), options_.tolerance);
    if (name == "generated") return compare_generated();
    if (name.starts_with("hidden.")) return compare_hidden(name);
    if (name.starts_with("mtp.")) return compare_mtp(name);
    if (name.starts_with("grad.")) return compare_gradient(name);
    fail("{}: does not know what to compare {} with", reference_.path(), name);
  }

  static int64_t index_in(const std::string& name, size_t at) {
    int64_t value = -1;
    auto [end, error] = std::from_chars(name.data() + at, name.data() + name.size(), value);
    return error == std::errc() ? value : -1;
  }

  void compare_hidden(const std::string& name) {
    int64_t k = index_in(name, 7), layers = model_.config().num_hidden_layers;
    if (k < 0 || k > layers)
      fail("{}: {}: the model has hidden states 0 to {}", reference_.path(), name, layers);
    const Tensor& ours = k == layers ? objective_.hidden : objective_.residuals[static_cast<size_t>(k)];
    add(name, token_rows(ours.view(), 0), reference_rows(name, 0), options_.tolerance);
  }

  void compare_mtp(const std::string& name) {
    int64_t k = index_in(name, 4);
    if (k < 1 || k > static_cast<int64_t>(objective_.mtp.size())) {
      fail("{}: {}: the model has {} MTP modules", reference_.path(), name, objective_.mtp.size());
    }
    const Objective::Mtp& module = objective_.mtp[static_cast<size_t>(k - 1)];
    if (name.ends_with(".logits")) {
      return add(name, token_rows(mtp_logits_[static_cast<size_t>(k - 1)].view(), k), reference_rows(name, k),
                 options_.tolerance);
    }
    double sum = 0, count = 0;
    std::vector<double> nll = numbers(module.result.nll.view());
    const HostCopy copy = on_host(backend_, module.targets.view());
    const int32_t* targets = copy.view.as<int32_t>();
    for (size_t t = 0; t < nll.size(); ++t) {
      if (targets[t] >= 0) sum += nll[t], count += 1;
    }
    add(name, {sum / count}, reference_numbers(name), options_.tolerance);
  }

  // A parameter's gradient by the checkpoint's name, or stacked as transformers holds experts in memory:
  // experts.gate_up_proj [E, 2 · inner, hidden] and experts.down_proj [E, hidden, inner].
  void compare_gradient(const std::string& name) {
    std::string path = name.substr(5);
    std::vector<double> ours;
    bool found = false;
    model_.for_each([&](const std::string& own, Tensor& tensor) {
      if (found || !tensor.value().grad) return;
      View gradient = Tensor(tensor.value().grad).view();
      if (own == path) {
        ours = numbers(gradient);
        found = true;
      } else if (is_expert_stack(own)) {
        found = expert_gradient(path, own, gradient, ours);
      }
    });
    if (!found) fail("{}: {}: the model has no such trainable parameter", reference_.path(), name);
    add(name, ours, reference_numbers(name), options_.gradient_tolerance);
  }

  bool expert_gradient(const std::string& path, const std::string& stack, const View& gradient,
                       std::vector<double>& ours) {
    int64_t experts = gradient[0], each = gradient.count() / experts;
    std::string prefix = stack.substr(0, stack.rfind('.') + 1);
    if (!path.starts_with(prefix)) return false;
    std::vector<double> all = numbers(gradient);
    if (path == prefix + "gate_up_proj") {
      if (!stack.ends_with("gate_proj")) return false;
      std::vector<double> up;
      expert_gradient(prefix + "up_proj", prefix + "up_proj", gradient_of(prefix + "up_proj"), up);
      for (int64_t e = 0; e < experts; ++e) {
        ours.insert(ours.end(), all.begin() + e * each, all.begin() + (e + 1) * each);
        ours.insert(ours.end(), up.begin() + e * each, up.begin() + (e + 1) * each);
      }
      return true;
    }
    if (path == stack) {
      ours = std::move(all);
      return true;
    }
    for (int64_t e = 0; e < experts; ++e) {
      if (path != expert_path(stack, e)) continue;
      ours.assign(all.begin() + e * each, all.begin() + (e + 1) * each);
      return true;
    }
    return false;
  }

  View gradient_of(const std::string& path) {
    View view;
    model_.for_each([&](const std::string& own, Tensor& tensor) {
      if (own == path) view = Tensor(tensor.value().grad).view();
    });
    return view;
  }

  void compare_generated() {
    const SafetensorsEntry& entry = reference_.at("generated");
    if (entry.extents.size() != 2 || entry.extents[0] != batch_)
      fail("{}: generated: expected [batch, tokens]", reference_.path());
    int64_t count = entry.extents[1], wrong = 0;
    std::vector<int32_t> theirs(static_cast<size_t>(batch_ * count));
    reference_.read("generated", View(theirs.data(), {batch_, count}, DType::i32));
    RunnerOptions how;
    how.context = length_ + count + 1;
    Engine engine(backend_, model_, how);
    for (int64_t b = 0; b < batch_; ++b) {
      GenerationOptions generation;
      generation.max_tokens = count;
      std::vector<int32_t> ours;
      auto prompt = std::span(ids_).subspan(static_cast<size_t>(b * length_),
                                            static_cast<size_t>(lengths_[static_cast<size_t>(b)]));
      engine.generate(prompt, generation,
                      [&](GeneratedToken token) { return ours.push_back(token.id), true; });
      for (int64_t i = 0; i < count; ++i)
        wrong += ours[static_cast<size_t>(i)] != theirs[static_cast<size_t>(b * count + i)];
    }
    rows_.push_back({"generated", static_cast<double>(wrong) / static_cast<double>(batch_ * count), 0.0,
                     fmt::format("{} of {} tokens differ", wrong, batch_ * count)});
  }

  Backend& backend_;
  Transformer& model_;
  const SafetensorsFile& reference_;
  ParityOptions options_;
  int64_t batch_ = 0, length_ = 0;
  std::vector<int32_t> ids_;
  std::vector<int64_t> lengths_;
  double lambda_ = 0.3;
  bool train_mtp_ = false;
  std::unique_ptr<Plan> plan_;
  Objective objective_;
  Tensor logits_;
  std::vector<Tensor> mtp_logits_;
  GradientMemory gradients_;
  double largest_gradient_ = 0;  // norm
  std::vector<ParityRow> rows_;
};

}  // namespace

std::vector<ParityRow> compare_with_reference(Backend& backend, Transformer& model,
                                              const SafetensorsFile& reference,
                                              const ParityOptions& options) {
  return Parity(backend, model, reference, options).run();
}

}  // namespace latente
