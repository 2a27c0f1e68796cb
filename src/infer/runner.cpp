#include "infer/runner.h"

#include <algorithm>

#include "model/layers.h"

namespace latente {
namespace {

constexpr int64_t most_wanted = 8;

// Tokens are padded to the next size that has a plan.
int64_t bucket_of(int64_t tokens) {
  if (tokens <= most_wanted) return tokens;
  int64_t size = 16;
  while (size < tokens) size *= 2;
  return size;
}

}  // namespace

Runner::Runner(Backend& backend, const Transformer& model, const RunnerOptions& options)
    : backend_(&backend), model_(&model), options_(options) {
  int64_t pages = (options.context + options.page_size - 1) / options.page_size;
  DType activation = activation_type(model.weights());
  caches_ =
      model.make_caches(pages, options.page_size, activation == DType::f64 ? DType::f64 : options.cache_type);
  rope_table_ = make_rope_table(model.config(), options.context + most_wanted);
  block_table_ = buffer({1, pages}, DType::i32, "block table");
  for (int64_t page = 0; page < pages; ++page)
    block_table_.view().as<int32_t>()[page] = static_cast<int32_t>(page);
  ring_ = std::min(options.context, 2 * options.chunk) + 2 * most_wanted;
  if (model.mtp.empty()) return;
  for (size_t level = 0; level <= model.mtp.size(); ++level) {
    history_.push_back(buffer({1, ring_, model.config().hidden_size}, activation, "hidden states"));
  }
}

void Runner::prepare(int64_t drafts) {
  for (int64_t tokens = 1; tokens <= drafts + 1; ++tokens) {
    recorded({-1, 0, tokens, false});
    for (int64_t k = 0; k < std::min(drafts, modules()); ++k) recorded({k, k, tokens, false});
  }
}

int64_t Runner::cache_bytes_per_token() const {
  return model_->cache_values_per_token() * size_of(caches_.front().keys.dtype());
}

int64_t Runner::memory_bytes() const {
  int64_t bytes = arena_bytes_ + rope_table_.view().bytes();
  for (const LayerCache& cache : caches_)
    bytes += cache.keys.view().bytes() + (cache.values ? cache.values.view().bytes() : 0);
  for (const Tensor& states : history_) bytes += states.view().bytes();
  return bytes;
}

Runner::Recorded& Runner::recorded(const Key& key) {
  auto found = plans_.find(key);
  if (found != plans_.end()) return found->second;
  Recorded record;
  record.plan = std::make_unique<Plan>(*backend_);
  Plan& plan = *record.plan;
  Shape tokens{key.tokens};
  record.ids = plan.input("ids", tokens, DType::i32);
  record.positions = plan.input("positions", tokens, DType::i32);
  record.slots = plan.input("slots", tokens, DType::i32);
  record.rows = plan.input("rows", {std::min(key.tokens, most_wanted)}, DType::i32);

  Step at;
  at.positions = record.positions;
  at.rope_table = rope_table_;
  at.slots = record.slots;
  at.caches = caches_;
  if (key.expanded) {
    at.starts = record.starts = plan.input("starts", tokens, DType::i32);
  } else {
    record.sequence = plan.input("sequence", tokens, DType::i32);
    at.pages = {block_table_, record.sequence, record.positions};
  }
  if (!history_.empty()) record.history_slots = plan.input("history slots", tokens, DType::i32);

  Tensor normed;
  if (key.module < 0) {
    normed = model_->hidden(record.ids, at);
    if (!history_.empty()) cache_store(normed, record.history_slots, history_[0]);
  } else {
    record.sources = plan.input("sources", tokens, DType::i32);
    const Tensor& states = history_[static_cast<size_t>(key.level)];
    Tensor fed = select_rows(states.reshape({ring_, states[2]}), record.sources);
    normed = model_->predict(key.module, fed, record.ids, at);
    cache_store(normed, record.history_slots, history_[static_cast<size_t>(key.module + 1)]);
  }
  record.logits = model_->logits(select_rows(normed, record.rows));
  plan.keep(record.logits);
  plan.compile();

  if (plan.arena_bytes() > arena_bytes_) {
    arena_bytes_ = plan.arena_bytes();
    arena_ = backend_->allocate(arena_bytes_);
    for (auto& [other, theirs] : plans_) theirs.plan->allocate(arena_);
  }
  plan.allocate(arena_);
  return plans_.emplace(key, std::move(record)).first->second;
}

std::span<float> Runner::run(const Key& key, std::span<const int32_t> ids, int64_t first,
                             int64_t source_shift, int64_t wanted) {
  Recorded& record = recorded(key);
  int64_t count = static_cast<int64_t>(ids.size());
  std::vector<int32_t> values(static_cast<size_t>(key.tokens));
  auto fill = [&](const Tensor& tensor, auto&& value_of, int32_t padding) {
    if (!tensor) return;
    for (int64_t i = 0; i < key.tokens; ++i) {
      values[static_cast<size_t>(i)] = i < count ? static_cast<int32_t>(value_of(i)) : padding;
    }
    backend_->upload(values.data(), tensor.view());
  };
  fill(
      record.ids, [&](int64_t i) { return ids[static_cast<size_t>(i)]; }, 0);
  fill(
      record.positions, [&](int64_t i) { return first + i; }, 0);
  fill(
      record.slots, [&](int64_t i) { return first + i; }, -1);
  fill(
      record.sequence, [&](int64_t) { return 0; }, 0);
  fill(
      record.sources, [&](int64_t i) { return ring_slot(first + i - source_shift); }, 0);
  fill(
      record.history_slots, [&](int64_t i) { return ring_slot(first + i); }, -1);
  if (record.starts) {
    // Padding attends to itself alone.
    for (int64_t i = 0; i < key.tokens; ++i)
      values[static_cast<size_t>(i)] = i < count ? 0 : static_cast<int32_t>(i);
    backend_->upload(values.data(), record.starts.view());
  }
  int64_t rows = record.rows.count();
  for (int64_t i = 0; i < rows; ++i) {
    values[static_cast<size_t>(i)] = static_cast<int32_t>(std::max<int64_t>(count - rows + i, 0));
  }
  backend_->upload(values.data(), record.rows.view());

  record.plan->run();

  int64_t vocabulary = record.logits[1];
  logits_.resize(static_cast<size_t>(rows * vocabulary));
  if (record.logits.dtype() == DType::f32) {
    backend_->download(record.logits.view(), logits_.data());
  } else {
    wide_logits_.resize(logits_.size());
    backend_->download(record.logits.view(), wide_logits_.data());
    std::transform(wide_logits_.begin(), wide_logits_.end(), logits_.begin(),
                   [](double x) { return static_cast<float>(x); });
  }
  return std::span(logits_).subspan(static_cast<size_t>((rows - wanted) * vocabulary));
}

std::span<float> Runner::forward(std::span<const int32_t> tokens, int64_t first, int64_t wanted) {
  int64_t count = static_cast<int64_t>(tokens.size());
  LATENTE_ASSERT(count > 0 && wanted <= std::min(count, most_wanted) && first + count <= options_.context);
  // The first piece of a prompt is cheaper with expanded keys and values; later ones attend over the latents.
  return run({-1, 0, bucket_of(count), first == 0 && count > most_wanted}, tokens, first, 0, wanted);
}

std::span<float> Runner::predict(int64_t k, std::span<const int32_t> later, int64_t first) {
  int64_t count = static_cast<int64_t>(later.size());
  LATENTE_ASSERT(count > 0 && first >= 0 && first + count <= options_.context);
  return run({k, k, bucket_of(count), first == 0 && count > most_wanted}, later, first, 0, 1);
}

std::span<float> Runner::predict_again(int32_t later, int64_t position) {
  int64_t last = modules() - 1;
  return run({last, last + 1, 1, false}, std::span(&later, 1), position, 1, 1);
}

}  // namespace latente
