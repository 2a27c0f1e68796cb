#include "tensor/plan.h"

#include <algorithm>
#include <chrono>

namespace latente {
namespace {

constexpr int64_t alignment = 64;
// Steps after which what runs beside them is waited for, so that memory comes back: about a layer's.
constexpr size_t most_steps_beside = 32;

}  // namespace

Tensor Plan::input(std::string name, Shape shape, DType dtype) {
  Tensor tensor = parameter(shape, dtype, false);
  tensor.value().name = std::move(name);
  tensor.value().plan = this;
  inputs_.push_back(tensor);
  return tensor;
}

int64_t Plan::input_bytes() const {
  int64_t bytes = 0;
  for (const Tensor& tensor : inputs_) bytes += tensor.view().bytes();
  return bytes;
}

Tensor Plan::intermediate(Shape shape, DType dtype) {
  Tensor tensor = parameter(shape, dtype, false);
  tensor.value().plan = this;
  intermediates_.push_back(tensor);
  lifetimes_[root_of(tensor)].bytes = shape.count() * size_of(dtype);
  return tensor;
}

Tensor Plan::updated(const Tensor& x) {
  auto value = std::make_shared<Value>(x.value());
  value->base = x.value().base ? x.value().base : x.shared();
  value->owner.reset();
  ++value->version;
  return Tensor(std::move(value));
}

Fp8Tensors& Plan::fp8_of(const Tensor& x) {
  Fp8Entry& entry = fp8_[&x.value()];
  entry.of = x;
  return entry.tensors;
}

Plan::Lifetime& Plan::lifetime_of(const Tensor& tensor) { return lifetimes_.at(root_of(tensor)); }

void Plan::record(const char* op, std::vector<Tensor> reads, std::vector<Tensor> writes, Run run,
                  Gradient gradient) {
  LATENTE_ASSERT(!compiled_);
  std::erase_if(reads, [](const Tensor& tensor) { return !tensor; });
  std::erase_if(writes, [](const Tensor& tensor) { return !tensor; });
  if (options_.training && gradient) {
    bool wanted =
        std::any_of(reads.begin(), reads.end(), [](const Tensor& tensor) { return tensor.requires_grad(); });
    for (const Tensor& tensor : writes) {
      if (wanted && tensor.plan() && is_floating(tensor.dtype())) {
        tensor.value().requires_grad = true;
        if (tensor.value().base) tensor.value().base->requires_grad = true;
      }
    }
    if (!wanted) gradient = {};
  }
  nodes_.push_back(
      {op, scope_, std::move(reads), std::move(writes), std::move(run), std::move(gradient), false, {}});
}

void Plan::record_again(std::vector<Tensor> reads, std::vector<Tensor> writes, Run run) {
  nodes_.back().again = {std::move(reads), std::move(writes), std::move(run)};
}

void Plan::checkpoint(const Tensor& tensor) { lifetime_of(tensor).checkpoint = true; }

void Plan::keep(const Tensor& tensor) {
  auto found = lifetimes_.find(root_of(tensor));
  if (found != lifetimes_.end()) found->second.kept = true;
}

void Plan::backward(const std::vector<Tensor>& losses) {
  LATENTE_ASSERT(options_.training);
  Gradients gradients(*this);
  for (const Tensor& loss : losses) gradients.entries_[root_of(loss)].loss = true;
  std::string scope = scope_;
  backward_begin_ = nodes_.size();
  for (size_t i = nodes_.size(); i-- > 0;) {
    Gradient gradient = nodes_[i].gradient;
    if (!gradient) continue;
    bool reached = std::any_of(nodes_[i].writes.begin(), nodes_[i].writes.end(),
                               [&](const Tensor& tensor) { return gradients.reached(tensor); });
    if (!reached) continue;
    gradients.node_ = i;
    scope_ = nodes_[i].scope;
    gradient(gradients);
  }
  gradients.complete_parameters();
  scope_ = scope;
  for (const Tensor& loss : losses) keep(loss);
}

void Plan::check_order() const {
  struct Update {
    int version;
    Gradients::Region region;
  };
  std::unordered_map<const Value*, bool> written;
  std::unordered_map<const Value*, std::vector<Update>> updates;
  auto refuse = [](const Node& node, const char* what) {
    throw std::logic_error(fmt::format("plan: {} in {} reads {}", node.op, node.scope, what));
  };
  for (const Node& node : nodes_) {
    if (node.replaced) continue;
    for (const Tensor& tensor : node.reads) {
      const Value* root = root_of(tensor);
      if (lifetimes_.contains(root) && !written[root]) refuse(node, "a value before it is written");
      auto found = updates.find(root);
      if (found == updates.end()) continue;
      Gradients::Region region = Gradients::region_of(tensor);
      for (const Update& update : found->second) {
        if (update.version > tensor.value().version && !Gradients::disjoint(update.region, region))
          refuse(node, "a value that has since been changed in place");
      }
    }
    for (const Tensor& tensor : node.writes) {
      written[root_of(tensor)] = true;
      int version = tensor.value().version;
      if (version > 0) updates[root_of(tensor)].push_back({version, Gradients::region_of(tensor)});
    }
  }
}

void Plan::compile() {
  LATENTE_ASSERT(!compiled_);
  compiled_ = true;
  check_order();
  for (const Node& node : nodes_) {
    if (!node.replaced) steps_.push_back({&node, false, {}});
  }
  if (options_.beside && options_.memory == 0 && backward_begin_ > 0 && backend_->runs_beside()) put_beside();
  for (auto& [root, lifetime] : lifetimes_)
    lifetime.bytes = (lifetime.bytes + alignment - 1) / alignment * alignment;
  place_steps();
  if (options_.memory > 0 && backward_begin_ > 0 && arena_bytes_ > options_.memory) drop_what_is_cheap();
}

// Steps of the backward pass that write gradients of parameters alone. A later step waits for them if it
// writes what they read or touches what they write.
void Plan::put_beside() {
  std::vector<size_t> parts;  // steps
  const auto touches = [](const std::vector<Tensor>& tensors, const Value* root) {
    return std::any_of(tensors.begin(), tensors.end(),
                       [&](const Tensor& tensor) { return root_of(tensor) == root; });
  };
  const auto conflict = [&](const Node& earlier, const Node& later) {
    return std::any_of(later.writes.begin(), later.writes.end(),
                       [&](const Tensor& tensor) {
                         return touches(earlier.reads, root_of(tensor)) ||
                                touches(earlier.writes, root_of(tensor));
                       }) ||
           std::any_of(later.reads.begin(), later.reads.end(),
                       [&](const Tensor& tensor) { return touches(earlier.writes, root_of(tensor)); });
  };
  int waited = -1;
  for (size_t i = 0; i < steps_.size(); ++i) {
    Step& step = steps_[i];
    const Node& node = *step.node;
    const bool backward = static_cast<size_t>(&node - nodes_.data()) >= backward_begin_;
    if (backward && std::none_of(node.writes.begin(), node.writes.end(),
                                 [](const Tensor& tensor) { return tensor.plan() != nullptr; })) {
      step.beside = static_cast<int>(parts.size());
      parts.push_back(i);
      continue;
    }
    for (int part = static_cast<int>(parts.size()) - 1; part > waited; --part) {
      const size_t from = parts[static_cast<size_t>(part)];
      if (i - from < most_steps_beside && !conflict(*steps_[from].node, node)) continue;
      step.after = waited = part;
    }
  }
  parts_beside_ = static_cast<int>(parts.size());
}

bool Plan::Lifetime::overlaps(const Lifetime& other) const {
  return std::any_of(spans.begin(), spans.end(), [&](const Span& mine) {
    return std::any_of(other.spans.begin(), other.spans.end(), [&](const Span& theirs) {
      return mine.first <= theirs.last && theirs.first <= mine.last;
    });
  });
}

// When each intermediate lives in steps_, and where: largest first, each at the lowest offset that is free
// whenever it lives.
void Plan::place_steps() {
  for (auto& [root, lifetime] : lifetimes_) lifetime.spans.clear();
  const int count = static_cast<int>(steps_.size());
  for (int i = 0; i < count; ++i) {
    const Step& step = steps_[static_cast<size_t>(i)];
    auto touch = [&](const Tensor& tensor) {
      const Value* root = root_of(tensor);
      auto found = lifetimes_.find(root);
      if (found == lifetimes_.end()) return;
      std::vector<Lifetime::Span>& spans = found->second.spans;
      const bool anew = std::find(step.anew.begin(), step.anew.end(), root) != step.anew.end();
      if (spans.empty() || (anew && spans.back().first < i)) spans.push_back({i, i});
      spans.back().last = i;
    };
    for (const Tensor& tensor : step.reads()) touch(tensor);
    for (const Tensor& tensor : step.writes()) touch(tensor);
  }
  // What runs beside others reads until they wait for it.
  std::vector<int> last(static_cast<size_t>(parts_beside_), count);
  int waited = 0;
  for (int i = 0; i < count; ++i) {
    for (; waited <= steps_[static_cast<size_t>(i)].after; ++waited)
      last[static_cast<size_t>(waited)] = i - 1;
  }
  for (const Step& step : steps_) {
    if (step.beside < 0) continue;
    for (const Tensor& tensor : step.reads()) {
      auto found = lifetimes_.find(root_of(tensor));
      if (found == lifetimes_.end()) continue;
      int& end = found->second.spans.back().last;
      end = std::max(end, last[static_cast<size_t>(step.beside)]);
    }
  }

  std::vector<Lifetime*> lifetimes;
  unplanned_bytes_ = arena_bytes_ = 0;
  for (const Tensor& tensor : intermediates_) {
    Lifetime& lifetime = lifetime_of(tensor);
    if (lifetime.spans.empty()) continue;
    if (lifetime.kept || !options_.reuse_memory) lifetime.spans.back().last = count;
    if (!options_.reuse_memory) lifetime.spans.front().first = 0;
    unplanned_bytes_ += lifetime.bytes;
    lifetimes.push_back(&lifetime);
  }
  std::stable_sort(lifetimes.begin(), lifetimes.end(),
                   [](const Lifetime* a, const Lifetime* b) { return a->bytes > b->bytes; });
  std::vector<Lifetime*> placed;  // by offset
  for (Lifetime* lifetime : lifetimes) {
    int64_t offset = 0;
    for (const Lifetime* other : placed) {
      if (!other->overlaps(*lifetime)) continue;
      if (other->offset >= offset + lifetime->bytes) break;
      offset = std::max(offset, other->offset + other->bytes);
    }
    lifetime->offset = offset;
    arena_bytes_ = std::max(arena_bytes_, offset + lifetime->bytes);
    auto at = std::upper_bound(placed.begin(), placed.end(), lifetime,
                               [](const Lifetime* a, const Lifetime* b) { return a->offset < b->offset; });
    placed.insert(at, lifetime);
  }
}

void Plan::allocate(std::shared_ptr<void> arena) {
  LATENTE_ASSERT(compiled_);
  repeated_.forget();
  arena_ = arena ? std::move(arena) : backend_->allocate(arena_bytes_);
  for (const Tensor& tensor : intermediates_) {
    const Lifetime& lifetime = lifetime_of(tensor);
    if (!lifetime.spans.empty()) tensor.value().data = static_cast<char*>(arena_.get()) + lifetime.offset;
  }
  for (const Tensor& tensor : inputs_) {
    if (tensor.has_storage()) continue;
    std::shared_ptr<void> memory = backend_->allocate(tensor.view().bytes());
    void* data = memory.get();
    bind_memory(tensor, data, std::move(memory));
  }
}

void Plan::run() {
  repeated_.run(*backend_, [this] { run_eagerly(); });
}

void Plan::run_eagerly() {
  LATENTE_ASSERT(arena_ != nullptr);
  for (const Step& step : steps_) {
    if (step.beside >= 0) backend_->begin_beside();
    if (step.after >= 0) backend_->after_beside(step.after);
    step.run()(*backend_);
    if (step.beside >= 0) backend_->end_beside(step.beside);
  }
  if (parts_beside_ > 0) backend_->after_beside(parts_beside_ - 1);
}

void Plan::run_checked() {
  LATENTE_ASSERT(arena_ != nullptr);
  for (const Step& step : steps_) {
    const Node& node = *step.node;
    step.run()(*backend_);
    for (const Tensor& tensor : step.writes()) {
      if (!is_floating(tensor.dtype()) || backend_->all_finite(tensor.view())) continue;
      std::string parameters;
      for (const Tensor& read : node.reads) {
        if (!read.plan() && !read.name().empty())
          parameters += (parameters.empty() ? "" : ", ") + read.name();
      }
      fail("not finite: first in op {} of {}{}", node.op, node.scope.empty() ? "the plan" : node.scope,
           parameters.empty() ? "" : " with parameter " + parameters);
    }
  }
}

void Plan::run_observed(const Observer& observe) {
  LATENTE_ASSERT(arena_ != nullptr);
  for (const Step& step : steps_) {
    observe(step.node->op, step.reads());
    step.run()(*backend_);
  }
}

void Plan::run_profiled(std::map<std::string, double>& seconds) {
  LATENTE_ASSERT(arena_ != nullptr);
  using Clock = std::chrono::steady_clock;
  for (const Step& step : steps_) {
    std::string label = step.node->op;
    for (const Tensor& read : step.reads()) {
      std::string_view name = read.name();
      if (name.ends_with(".weight")) name.remove_suffix(7);
      const size_t dot = name.rfind('.');  // as in "model.layers.3.self_attn.q_proj"
      if (!read.plan() && dot != name.npos) label.append(" ").append(name.substr(dot + 1));
    }
    if (step.again) label += " (again)";
    Clock::time_point start = Clock::now();
    step.run()(*backend_);
    backend_->synchronize();
    seconds[label] += std::chrono::duration<double>(Clock::now() - start).count();
  }
}

std::string Plan::describe() const {
  std::string text;
  for (const Node& node : nodes_) {
    if (node.replaced) continue;
    text += fmt::format("{:<36} {}", node.op, node.scope);
    for (const Tensor& tensor : node.writes) text += " " + tensor.shape().str();
    text += "\n";
  }
  return text;
}

Plan::Scope::Scope(Plan* plan, std::string_view name) : plan_(plan) {
  if (!plan_) return;
  length_ = plan_->scope_.size();
  if (!plan_->scope_.empty()) plan_->scope_ += '.';
  plan_->scope_ += name;
}

Plan::Scope::~Scope() {
  if (plan_) plan_->scope_.resize(length_);
}

}  // namespace latente
