// latente parity: the model against recorded outputs of another implementation.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "checkpoint/safetensors.h"
#include "commands.h"
#include "cpu/cpu_backend.h"
#include "infer/engine.h"
#include "model/weights.h"
#include "train/objective.h"

namespace latente {
namespace {

struct ParityOptions {
  std::string model, reference, dtype = "f32";
  double tolerance = 1e-5, gradient_tolerance = 1e-4;
  int threads = 0;
};

// One tensor of the reference in float64, and what is compared with it.
struct Row {
  std::string name;
  double difference = 0;  // norm(ours - theirs) / norm(theirs)
  double tolerance = 0;
  std::string note;
};

class Parity {
 public:
  Parity(const ParityOptions& options)
      : options_(options),
        reference_(options.reference),
        checkpoint_(options.model),
        backend_(options.threads),
        type_(type_of(options.dtype)),
        model_(load_config(checkpoint_), type_) {
    load_parameters(model_, checkpoint_);
    read_inputs();
  }

  bool run() {
    record();
    for (const SafetensorsEntry& entry : reference_.entries()) compare(entry.name);
    int64_t failed = 0;
    fmt::print("{:<64} {:>12} {:>10}\n", "tensor", "|a-b|/|b|", "tolerance");
    for (const Row& row : rows_) {
      bool good = row.difference <= row.tolerance;  // NaN is not
      failed += good ? 0 : 1;
      fmt::print("{:<64} {:>12.3e} {:>10.1e}{}{}\n", row.name, row.difference, row.tolerance,
                 good ? "" : "  FAIL", row.note.empty() ? "" : "  " + row.note);
    }
    fmt::print("{} tensors compared, {} over tolerance\n", rows_.size(), failed);
    if (rows_.empty()) fail("{}: holds nothing to compare", options_.reference);
    return failed == 0;
  }

 private:
  static DType type_of(const std::string& name) {
    std::optional<DType> type = dtype_from_name(name);
    if (type != DType::f32 && type != DType::f64 && type != DType::bf16)
      fail("--dtype: expected f32, f64 or bf16, found {}", name);
    return *type;
  }

  void read_inputs() {
    const SafetensorsEntry& ids = reference_.at("input_ids");
    if (ids.extents.size() != 2) fail("{}: input_ids: expected [batch, length]", options_.reference);
    batch_ = ids.extents[0], length_ = ids.extents[1];
    ids_.resize(static_cast<size_t>(batch_ * length_));
    reference_.read("input_ids", View(ids_.data(), {batch_, length_}, DType::i32));
    for (int32_t& id : ids_) {
      if (id >= model_.config().vocab_size)
        fail("{}: input_ids: {} is outside the vocabulary", options_.reference, id);
    }
    lengths_.assign(static_cast<size_t>(batch_), length_);
    if (reference_.contains("lengths"))
      reference_.read("lengths", View(lengths_.data(), {batch_}, DType::i64));
    for (int64_t length : lengths_) {
      if (length < 1 || length > length_) fail("{}: lengths: {} is out of range", options_.reference, length);
    }
    if (reference_.contains("mtp_lambda")) {
      reference_.read("mtp_lambda", View(&lambda_, {1}, DType::f64));
    }
    train_mtp_ = reference_.contains("mtp_lambda");
  }

  void record() {
    plan_ = std::make_unique<Plan>(backend_, PlanOptions{true, true});
    ObjectiveOptions how{batch_, length_, 0.0, true, false};
    objective_ = record_objective(*plan_, model_, make_rope_table(model_.config(), length_), how);
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

  static std::vector<double> numbers(const View& view) {
    std::vector<double> values(static_cast<size_t>(view.count()));
    convert(view.dtype, view.data, DType::f64, values.data(), view.count());
    return values;
  }

  // The reference's rows of real tokens; its sequences may be `cut` tokens shorter than the input's.
  std::vector<double> reference_rows(const std::string& name, int64_t cut) const {
    const SafetensorsEntry& entry = reference_.at(name);
    std::vector<double> all = reference_numbers(name), kept;
    if (entry.extents.size() < 2 || entry.extents[0] != batch_)
      fail("{}: {}: expected [batch, length, ...]", options_.reference, name);
    int64_t held = entry.extents[1],
            width = static_cast<int64_t>(all.size()) / std::max<int64_t>(batch_ * held, 1);
    for (int64_t b = 0; b < batch_; ++b) {
      int64_t count = std::max<int64_t>(lengths_[static_cast<size_t>(b)] - cut, 0);
      if (count > held)
        fail("{}: {}: holds {} tokens a sequence, expected at least {}", options_.reference, name, held,
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
    double difference = 0, norm = 0;
    for (size_t i = 0; i < ours.size(); ++i) {
      difference += (ours[i] - theirs[i]) * (ours[i] - theirs[i]);
      norm += theirs[i] * theirs[i];
    }
    // A reference of zeros (an expert nobody chose) asks for zeros.
    rows_.push_back({name, std::sqrt(norm > 0 ? difference / norm : difference), tolerance, ""});
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
    fail("{}: does not know what to compare {} with", options_.reference, name);
  }

  static int64_t index_in(const std::string& name, size_t at) {
    int64_t value = -1;
    auto [end, error] = std::from_chars(name.data() + at, name.data() + name.size(), value);
    return error == std::errc() ? value : -1;
  }

  void compare_hidden(const std::string& name) {
    int64_t k = index_in(name, 7), layers = model_.config().num_hidden_layers;
    if (k < 0 || k > layers)
      fail("{}: {}: the model has hidden states 0 to {}", options_.reference, name, layers);
    const Tensor& ours = k == layers ? objective_.hidden : objective_.residuals[static_cast<size_t>(k)];
    add(name, token_rows(ours.view(), 0), reference_rows(name, 0), options_.tolerance);
  }

  void compare_mtp(const std::string& name) {
    int64_t k = index_in(name, 4);
    if (k < 1 || k > static_cast<int64_t>(objective_.mtp.size())) {
      fail("{}: {}: the model has {} MTP modules", options_.reference, name, objective_.mtp.size());
    }
    const Objective::Mtp& module = objective_.mtp[static_cast<size_t>(k - 1)];
    if (name.ends_with(".logits")) {
      return add(name, token_rows(mtp_logits_[static_cast<size_t>(k - 1)].view(), k), reference_rows(name, k),
                 options_.tolerance);
    }
    double sum = 0, count = 0;
    std::vector<double> nll = numbers(module.result.nll.view());
    const int32_t* targets = module.targets.view().as<int32_t>();
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
    if (!found) fail("{}: {}: the model has no such trainable parameter", options_.reference, name);
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
      fail("{}: generated: expected [batch, tokens]", options_.reference);
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

  ParityOptions options_;
  SafetensorsFile reference_;
  Checkpoint checkpoint_;
  CpuBackend backend_;
  DType type_;
  Transformer model_;
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
  std::vector<Row> rows_;
};

}  // namespace

void add_parity(CLI::App& app) {
  auto options = std::make_shared<ParityOptions>();
  CLI::App* command =
      app.add_subcommand("parity", "Compare the model with recorded outputs of another implementation");
  command->add_option("model", options->model, "Model directory")->required()->check(CLI::ExistingDirectory);
  command
      ->add_option("reference", options->reference,
                   "Safetensors file with input_ids and any of hidden.<k>, logits, loss, mtp.<k>.logits, "
                   "mtp.<k>.loss, "
                   "grad.<parameter>, generated")
      ->required()
      ->check(CLI::ExistingFile);
  command->add_option("--tolerance", options->tolerance, "Largest |a-b|/|b| of outputs")
      ->capture_default_str();
  command->add_option("--gradient-tolerance", options->gradient_tolerance, "Largest |a-b|/|b| of gradients")
      ->capture_default_str();
  command->add_option("--dtype", options->dtype, "f32, f64 or bf16 (weights; computes in f32)")
      ->capture_default_str();
  command->add_option("--threads", options->threads, "Threads, 0 = all cores")->capture_default_str();
  command->callback([options] {
    if (!Parity(*options).run()) throw CLI::RuntimeError(1);
  });
}

}  // namespace latente
