#include "infer/runner.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>

#include "base/memory.h"
#include "model/figures.h"
#include "model/layers.h"
#include "tensor/device.h"

namespace latente {
namespace {

constexpr int64_t exact_tokens = 16, exact_in_chains = 4;
bool may_be_padded(int64_t tokens, bool chained) {
  return tokens > (chained ? exact_in_chains : exact_tokens);
}

// Tokens are padded to the next size that has plans: at most by a fifth, in chains, whose numbers of tokens
// make up a plan together, by a half.
int64_t bucket_of(int64_t tokens, bool chained) {
  if (chained) {
    int64_t size = 1;
    while (size < tokens) size *= 2;
    return size >= 4 && size / 4 * 3 >= tokens ? size / 4 * 3 : size;
  }
  if (tokens <= exact_tokens) return tokens;
  int64_t step = 4;
  while (8 * step < tokens) step *= 2;
  return (tokens + step - 1) / step * step;
}

int64_t bytes_a_token(const std::vector<LayerCache>& caches) {
  int64_t bytes = 0;
  for (const LayerCache& cache : caches) {
    for (const Tensor& tensor : {cache.keys, cache.values}) {
      if (tensor) bytes += tensor[2] * tensor[3] * size_of(tensor.dtype());
    }
  }
  return bytes;
}

}  // namespace

Outcome Outcome::take(int64_t rows) {
  Outcome first = *this;
  const auto count = static_cast<size_t>(rows);
  first.chosen = chosen.first(count), chosen = chosen.subspan(count);
  if (!logits.empty()) {
    const auto values = static_cast<size_t>(rows * vocabulary);
    first.logits = logits.first(values), logits = logits.subspan(values);
  }
  return first;
}

DType cache_type_from_name(std::string_view name, const Backend& backend, const Transformer& model) {
  if (name == "auto") return backend.is_host() ? DType::f32 : backend.activation_type(model.weights());
  if (name == "f32" || name == "float32") return DType::f32;
  if (name == "bf16" || name == "bfloat16") return DType::bf16;
  if (name == "int8") return DType::u8;
  if (name == "fp8") return DType::f8e4m3;
  fail("--kv-cache-dtype: expected auto, f32, bf16, int8 or fp8, found {}", name);
}

Runner::Runner(Backend& backend, const Transformer& model, const RunnerOptions& options)
    : backend_(&backend),
      model_(&model),
      options_(options),
      pages_a_sequence_((options.context + options.page_size - 1) / options.page_size),
      multiply_adds_(forward_flops(model.config(), 0, false) / 2) {
  DType activation = backend.activation_type(model.weights());
  const DType cache_type = activation == DType::f64 ? DType::f64 : options.cache_type;
  if (options_.pages == 0 && options.cache_bytes > 0) {
    const int64_t page =
        options.page_size * bytes_a_token(model.make_caches(backend, 1, options.page_size, cache_type));
    if (options.cache_bytes / page < pages_a_sequence_) {
      const int64_t needed = pages_a_sequence_ * page;
      fail("--cache-memory: a sequence of {} tokens needs {} ({} bytes), found {}", options.context,
           bytes_text(static_cast<double>(needed)), needed,
           bytes_text(static_cast<double>(options.cache_bytes)));
    }
    constexpr int64_t most = std::numeric_limits<int32_t>::max();  // slots that can be numbered
    options_.pages = std::min(options.cache_bytes / page, most / options.page_size);
  }
  if (options_.pages == 0) options_.pages = options.sequences * pages_a_sequence_;
  caches_ = model.make_caches(backend, options_.pages, options.page_size, cache_type);
  rope_table_ = make_rope_table(backend, model.config(), options.context);
  block_table_ = buffer(backend, {options.sequences, pages_a_sequence_}, DType::i32, "block table");
  pages_of_.assign(static_cast<size_t>(options.sequences * pages_a_sequence_), 0);
  if (options.count_experts) count_experts();
  if (model.mtp.empty() || options.states == 0) return;
  module_table_ =
      buffer(backend, {options.sequences, pages_a_sequence_}, DType::i32, "block table of modules");
  first_module_page_.assign(static_cast<size_t>(options.sequences), 0);
  for (size_t level = 0; level <= model.mtp.size(); ++level) {
    states_.push_back(
        buffer(backend, {1, options.states, model.config().hidden_size}, activation, "hidden states"));
  }
}

void Runner::set_page(int64_t place, int64_t index, int32_t page) {
  LATENTE_ASSERT(place < options_.sequences && index < pages_a_sequence_ && page < options_.pages);
  const int64_t at = place * pages_a_sequence_ + index;
  pages_of_[static_cast<size_t>(at)] = page;
  backend_->upload(&page, View(block_table_.view().as<int32_t>() + at, {1}, DType::i32));
  if (!module_table_) return;
  const int64_t first = first_module_page_[static_cast<size_t>(place)];
  if (index >= first)
    backend_->upload(&page, View(module_table_.view().as<int32_t>() + at - first, {1}, DType::i32));
}

void Runner::set_first_module_page(int64_t place, int64_t index) {
  LATENTE_ASSERT(module_table_ && place < options_.sequences && index < pages_a_sequence_);
  first_module_page_[static_cast<size_t>(place)] = static_cast<int32_t>(index);
  const int64_t row = place * pages_a_sequence_;
  backend_->upload(pages_of_.data() + row + index,
                   View(module_table_.view().as<int32_t>() + row, {pages_a_sequence_ - index}, DType::i32));
}

void Runner::copy_page(int32_t from, int32_t to) {
  for (const LayerCache& cache : caches_) {
    for (const Tensor& tensor : {cache.keys, cache.values}) {
      if (tensor) backend_->copy(tensor.rows(from, from + 1).view(), {tensor.rows(to, to + 1).view(), false});
    }
  }
}

Runner::Form Runner::form_for(int64_t first, int64_t count) const {
  const Config& config = model_->config();
  if (!config.is_mla() || (first > 0 && count <= 8)) return Form::absorbed;
  // Multiply-adds a head.
  const double rank = static_cast<double>(config.kv_lora_rank),
               rope = static_cast<double>(config.qk_rope_head_dim);
  const double widths = static_cast<double>(config.qk_nope_head_dim + config.v_head_dim);
  const double queries = static_cast<double>(count), entries = static_cast<double>(first + count);
  const double pairs = queries * (static_cast<double>(first) + queries / 2);
  const double absorbed = queries * rank * widths + pairs * (2 * rank + rope);
  const double expanded = entries * rank * widths + pairs * (widths + rope);
  // Of the whole pass. Short prompts share a pass with other sequences' tokens when they are absorbed too,
  // and of a GGUF file of 8 bits the products are llama.cpp's, which always absorbs.
  constexpr double worth = 0.02;
  const double saved =
      (absorbed - expanded) * static_cast<double>(config.num_attention_heads * config.num_hidden_layers);
  return saved > worth * queries * multiply_adds_ ? Form::expanded : Form::absorbed;
}

void Runner::prepare(int64_t drafts, Asked asked, bool chained) {
  for (int64_t entries = 1, pages = 0; pages < pages_a_sequence_; entries = pages * options_.page_size + 1) {
    prepare(drafts, asked, chained, entries);
    pages = table_pages(1, Form::absorbed, entries);
  }
}

void Runner::prepare(int64_t drafts, Asked asked, bool chained, int64_t entries) {
  const auto pages = [&](int64_t rows) { return table_pages(rows, Form::absorbed, entries); };
  const auto main = [&](int64_t rows, bool follows) {
    return Shape{-1, 0, rows, rows, Form::absorbed, follows, pages(rows)};
  };
  const auto size = [&](int64_t rows) { return bucket_of(rows, chained); };
  const int64_t own = std::min(drafts, modules());  // drafts that a module has to itself
  recorded({{main(1, false)}, asked});
  for (int64_t rows = 1; rows <= drafts + 1; ++rows) {
    std::vector<Shape> chain;
    for (int64_t k = 0; k < own; ++k) {
      chain.push_back({k, k, size(rows), 1, Form::absorbed, chained && k > 0, pages(size(rows))});
      if (!chained) recorded({{chain.back()}, asked});
    }
    if (!chained) recorded({{main(rows, false)}, asked});
    if (!chained || own < drafts || drafts == 0) continue;
    chain.push_back(main(size(drafts + 1), true));
    recorded({chain, asked});
  }
}

int64_t Runner::cache_bytes_per_token() const { return bytes_a_token(caches_); }

int64_t Runner::memory_bytes() const {
  int64_t bytes = arena_bytes_ + rope_table_.view().bytes();
  for (const LayerCache& cache : caches_)
    bytes += cache.keys.view().bytes() + (cache.values ? cache.values.view().bytes() : 0);
  for (const Tensor& states : states_) bytes += states.view().bytes();
  return bytes;
}

void Runner::count_experts() {
  int64_t index = 0;
  const auto add = [&](const Layer& layer) {
    if (const Moe* moe = std::get_if<Moe>(&layer.mlp)) {
      loads_.push_back(moe->gate.load);
      expert_loads_.push_back({index, std::vector<int64_t>(static_cast<size_t>(loads_.back().count()), 0)});
      backend_->fill(loads_.back().view(), 0);
    }
    ++index;
  };
  for (const Layer& layer : model_->model.layers) add(layer);
  for (const MtpModule& module : model_->mtp) add(module.layer);
}

const std::vector<Runner::ExpertLoad>& Runner::expert_loads() {
  std::vector<float> counted;
  for (size_t i = 0; i < loads_.size(); ++i) {
    std::vector<int64_t>& tokens = expert_loads_[i].tokens;
    counted.resize(tokens.size());
    backend_->download(loads_[i].view(), counted.data());
    backend_->fill(loads_[i].view(), 0);
    for (size_t e = 0; e < tokens.size(); ++e) tokens[e] += static_cast<int64_t>(counted[e]);
  }
  return expert_loads_;
}

// Records a pass; what its wanted rows choose goes to `first_chosen` of record.chosen and on.
void Runner::record(const Shape& shape, Asked asked, bool chained, const Tensor& inputs, int64_t first_chosen,
                    Recorded& record) {
  Plan& plan = *record.plan;
  auto field = [&](Field::Name which) {
    return inputs.slice(0, which * shape.tokens, (which + 1) * shape.tokens);
  };
  Tensor ids = field(Field::ids);
  if (shape.follows) ids = take_chosen(ids, field(Field::follows), record.chosen);
  const Tensor writes = field(Field::writes);

  Step at;
  at.positions = field(Field::positions);
  at.rope_table = rope_table_;
  at.slots = field(Field::slots);
  at.caches = caches_;
  const Tensor& table = shape.module < 0 ? block_table_ : module_table_;
  at.pages = {table.columns(0, shape.pages), field(Field::places), field(Field::last)};
  at.expand_cache = shape.form == Form::expanded;
  at.count_load = options_.count_experts;
  Tensor& mask = record.masks.emplace_back();
  if (!loads_.empty() && may_be_padded(shape.tokens, chained)) {
    mask = plan.input("token mask", {shape.tokens}, exact_type(model_->weights()));
    at.token_mask = mask;
  }

  Tensor normed;
  if (shape.module < 0) {
    normed = model_->hidden(ids, at);
    if (!states_.empty()) cache_store(normed, writes, states_[0]);
  } else {
    const Tensor& states = states_[static_cast<size_t>(shape.level)];
    Tensor fed = select_rows(states.reshape({states[1], states[2]}), field(Field::reads));
    normed = model_->predict(shape.module, fed, ids, at);
    cache_store(normed, writes, states_[static_cast<size_t>(shape.module + 1)]);
  }
  if (shape.wanted == 0) return;
  const int64_t rows = Field::count * shape.tokens, choices = rows + shape.wanted;
  const Tensor logits = model_->logits(select_rows(normed, inputs.slice(0, rows, choices)));
  choose(logits, inputs.slice(0, choices, inputs.count()),
         record.chosen.slice(0, first_chosen, first_chosen + shape.wanted));
  if (asked != Asked::logits) return;
  record.logits = logits;
  plan.keep(logits);
}

Runner::Recorded& Runner::recorded(const Key& key) {
  auto found = plans_.find(key);
  if (found != plans_.end()) {
    found->second.used = ++clock_;
    return found->second;
  }
  if (plans_.size() >= most_plans) {
    const auto older = [](const auto& a, const auto& b) { return a.second.used < b.second.used; };
    plans_.erase(std::min_element(plans_.begin(), plans_.end(), older));
  }
  LATENTE_ASSERT(key.asked == Asked::tokens || key.passes.size() == 1);
  const auto begin = std::chrono::steady_clock::now();
  Recorded record;
  record.used = ++clock_;
  ++recorded_;
  record.plan = std::make_unique<Plan>(*backend_);
  Plan& plan = *record.plan;
  int64_t inputs = 0, wanted = 0;
  for (const Shape& shape : key.passes) inputs += inputs_of(shape), wanted += shape.wanted;
  record.inputs = plan.input("rows", {inputs}, DType::i32);
  record.chosen = buffer(*backend_, {std::max<int64_t>(wanted, 1)}, DType::i32, "chosen tokens");
  inputs = wanted = 0;
  for (const Shape& shape : key.passes) {
    this->record(shape, key.asked, key.passes.size() > 1,
                 record.inputs.slice(0, inputs, inputs + inputs_of(shape)), wanted, record);
    inputs += inputs_of(shape), wanted += shape.wanted;
  }
  plan.compile();

  if (plan.arena_bytes() > arena_bytes_) {
    arena_bytes_ = plan.arena_bytes();
    arena_ = backend_->allocate(arena_bytes_);
    for (auto& [other, theirs] : plans_) theirs.plan->allocate(arena_);
  }
  plan.allocate(arena_);
  recording_seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return plans_.emplace(key, std::move(record)).first->second;
}

int32_t Runner::slot_of(const Row& row) const {
  const int64_t index = row.place * pages_a_sequence_ + row.position / options_.page_size;
  return static_cast<int32_t>(pages_of_[static_cast<size_t>(index)] * options_.page_size +
                              row.position % options_.page_size);
}

int32_t Runner::last_entry(const Pass& pass, const Row& row) const {
  if (pass.module < 0) return row.position;
  const int32_t first = first_module_page_[static_cast<size_t>(row.place)];
  return row.position - first * static_cast<int32_t>(options_.page_size);
}

int64_t Runner::table_pages(int64_t rows, Form form, int64_t entries) const {
  if (form != Form::absorbed) return pages_a_sequence_;
  const LayerCache& cache = caches_.front();
  const int64_t named = backend_->short_table(rows, model_->config().num_attention_heads, cache.keys.view(),
                                              cache.values ? cache.values.view() : View(), entries);
  const int64_t pages = (named + options_.page_size - 1) / options_.page_size;
  return named > 0 ? std::min(pages, pages_a_sequence_) : pages_a_sequence_;
}

Runner::Shape Runner::shape_of(const Pass& pass, bool chained) const {
  const auto& rows = pass.rows;
  LATENTE_ASSERT(!rows.empty());
  const int64_t wanted = std::count_if(rows.begin(), rows.end(), [](const Row& row) { return row.wanted; });
  const bool follows = std::any_of(rows.begin(), rows.end(), [](const Row& row) { return row.follows >= 0; });
  const int64_t tokens = bucket_of(std::ssize(rows), chained);
  int64_t entries = 0;
  for (const Row& row : rows) entries = std::max(entries, int64_t{last_entry(pass, row)} + 1);
  return {pass.module,
          pass.level,
          tokens,
          bucket_of(wanted, chained),
          pass.form,
          follows,
          table_pages(tokens, pass.form, entries)};
}

void Runner::fill(const Pass& pass, const Shape& shape, std::span<const int32_t> chosen_at,
                  int32_t* inputs) const {
  const std::vector<Row>& rows = pass.rows;
  auto fill = [&](Field::Name which, auto&& value_of, int32_t padding) {
    int32_t* const to = inputs + which * shape.tokens;
    std::fill(std::transform(rows.begin(), rows.end(), to, value_of), to + shape.tokens, padding);
  };
  // Padding attends to nothing and leaves nothing behind.
  fill(
      Field::ids, [](const Row& row) { return row.token; }, rows[0].token);
  fill(
      Field::positions, [](const Row& row) { return row.position; }, 0);
  fill(
      Field::last, [&](const Row& row) { return last_entry(pass, row); }, -1);
  fill(
      Field::slots, [this](const Row& row) { return slot_of(row); }, -1);
  fill(
      Field::places, [](const Row& row) { return row.place; }, rows.back().place);
  fill(
      Field::reads, [](const Row& row) { return row.read; }, 0);
  fill(
      Field::writes, [](const Row& row) { return row.write; }, -1);
  fill(
      Field::follows,
      [&](const Row& row) { return row.follows < 0 ? -1 : chosen_at[static_cast<size_t>(row.follows)]; }, -1);
  int32_t* next = inputs + Field::count * shape.tokens;
  int32_t* choice = std::fill_n(next, shape.wanted, 0);
  std::vector<Choice> choices(static_cast<size_t>(shape.wanted));  // padding: the most likely
  auto its = choices.begin();
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].wanted) *next++ = static_cast<int32_t>(i), *its++ = rows[i].choice;
  }
  std::memcpy(choice, choices.data(), choices.size() * sizeof(Choice));
}

Outcome Runner::run(std::span<const Pass> chain, Asked asked) {
  Key key{{}, asked};
  for (const Pass& pass : chain) {
    LATENTE_ASSERT(pass.module < 0 || !states_.empty());
    key.passes.push_back(shape_of(pass, chain.size() > 1));
  }
  Recorded& record = recorded(key);
  // All inputs in one copy.
  values_.resize(static_cast<size_t>(record.inputs.count()));
  chosen_at_.clear();
  int32_t* inputs = values_.data();
  int32_t all = 0;  // rows that choose, with those that fill a pass up
  for (size_t i = 0; i < chain.size(); ++i) {
    const Shape& shape = key.passes[i];
    fill(chain[i], shape, chosen_at_, inputs);
    inputs += inputs_of(shape);
    const auto& rows = chain[i].rows;
    const auto wanted = std::count_if(rows.begin(), rows.end(), [](const Row& row) { return row.wanted; });
    for (int32_t w = 0; w < wanted; ++w) chosen_at_.push_back(all + w);
    all += static_cast<int32_t>(shape.wanted);
  }
  backend_->upload(values_.data(), record.inputs.view());
  for (size_t i = 0; i < chain.size(); ++i) {
    const Tensor& mask = record.masks[i];
    const int64_t count = std::ssize(chain[i].rows), tokens = key.passes[i].tokens;
    if (mask) backend_->fill(mask.rows(0, count).view(), 1);
    if (mask && count < tokens) backend_->fill(mask.rows(count, tokens).view(), 0);
  }

  if (seconds_) {
    record.plan->run_profiled(*seconds_);
  } else {
    record.plan->run();
  }

  Outcome outcome;
  constexpr int64_t first_runs = 2;  // RepeatedWork records in the second
  outcome.new_plan = ++record.runs <= first_runs;
  if (chosen_at_.empty()) return outcome;
  chosen_.resize(static_cast<size_t>(record.chosen.count()));
  backend_->download(record.chosen.view(), chosen_.data());
  auto to = chosen_.begin();
  for (int32_t at : chosen_at_) *to++ = chosen_[static_cast<size_t>(at)];
  outcome.chosen = std::span(chosen_).first(chosen_at_.size());
  if (asked == Asked::tokens) return outcome;

  outcome.vocabulary = record.logits[1];
  logits_.resize(static_cast<size_t>(record.logits.count()));
  if (record.logits.dtype() == DType::f32) {
    backend_->download(record.logits.view(), logits_.data());
  } else {
    wide_logits_.resize(logits_.size());
    backend_->download(record.logits.view(), wide_logits_.data());
    std::transform(wide_logits_.begin(), wide_logits_.end(), logits_.begin(),
                   [](double x) { return static_cast<float>(x); });
  }
  outcome.logits = std::span(logits_).first(chosen_at_.size() * static_cast<size_t>(outcome.vocabulary));
  return outcome;
}

}  // namespace latente
