// Trainer, before the first step: what is trained on what, and the memory it takes.
#include <algorithm>
#include <cmath>
#include <filesystem>

#include "base/memory.h"
#include "model/figures.h"
#include "model/weights.h"
#include "train/trainer.h"

namespace latente {
namespace {

constexpr int64_t most_tokens_at_once = 16384;  // a micro-batch chosen here; more gains nothing

// Bytes of text each token stands for; special tokens stand for none.
std::vector<int32_t> lengths_of_tokens(const Tokenizer& tokenizer) {
  std::vector<int32_t> lengths(static_cast<size_t>(tokenizer.vocab_size()), 0);
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    if (tokenizer.is_special(id)) continue;
    try {
      lengths[static_cast<size_t>(id)] = static_cast<int32_t>(tokenizer.token_bytes(id).size());
    } catch (const Error&) {
      // a hole in the vocabulary: no text has this token
    }
  }
  return lengths;
}

TextEncoder encoder_of(const Tokenizer& tokenizer, int64_t vocabulary, std::string_view tokenizer_text) {
  TextEncoder encoder;
  EncodeOptions how;
  how.add_special = false;
  how.parse_special = false;  // a corpus cannot write control tokens
  encoder.encode = [&tokenizer, how](std::string_view text) { return tokenizer.encode(text, how); };
  encoder.fingerprint = std::string(tokenizer_text);
  encoder.vocabulary = vocabulary;
  std::optional<int32_t> bos = tokenizer.bos_id(), eos = tokenizer.eos_id();
  if (tokenizer.adds_bos() && bos && bos != eos) encoder.before.push_back(*bos);
  if (eos) encoder.after.push_back(*eos);
  return encoder;
}

int32_t token_named(const Tokenizer& tokenizer, const char* option, const std::string& name) {
  std::optional<int32_t> id = tokenizer.id_of(name);
  if (!id) fail("{}: the tokenizer has no token {}", option, name);
  return *id;
}

}  // namespace

Trainer::Trainer(Backend& backend, const TrainOptions& options, TrainObserver& observer, Purpose purpose)
    : backend_(&backend), options_(options), observer_(&observer) {
  check_train_options(options_);
  if (options_.model.fp8 && !backend_->multiplies_fp8()) {
    fail("model.fp8: expected a GPU of compute capability 9.0 (Hopper) to train on, found {}",
         backend_->name());
  }
  if (purpose == Purpose::run) lock_.emplace(options_.out);
  read_model_options();
  read_corpus();
  record();
}

Trainer::~Trainer() = default;

void Trainer::read_model_options() {
  ModelOptions& chosen = options_.model;
  if (chosen.tokenizer.empty()) chosen.tokenizer = chosen.from;
  tokenizer_ = std::make_unique<Tokenizer>(Tokenizer::load(chosen.tokenizer));
  Config config;
  if (!chosen.from.empty()) {
    initial_ = std::make_unique<Checkpoint>(chosen.from);
    config = load_config(*initial_);
  } else {
    config = Config::from_file(chosen.config);
  }
  if (tokenizer_->vocab_size() > config.vocab_size) {
    fail("{}: vocab_size {} is less than the tokenizer's {}",
         chosen.config.empty() ? chosen.from : chosen.config, config.vocab_size, tokenizer_->vocab_size());
  }
  if (options_.batch.length > config.max_position_embeddings) {
    fail("batch.length: {} is more than the model's max_position_embeddings, {}", options_.batch.length,
         config.max_position_embeddings);
  }
  if (config.n_routed_experts % options_.balance.devices != 0) {
    fail("balance.devices: expected a divisor of the model's {} routed experts, found {}",
         config.n_routed_experts, options_.balance.devices);
  }
  if (config.bos_token_id < 0 && tokenizer_->bos_id()) config.bos_token_id = *tokenizer_->bos_id();
  if (config.eos_token_ids.empty() && tokenizer_->eos_id()) config.eos_token_ids = {*tokenizer_->eos_id()};
  model_ = std::make_unique<Transformer>(config, chosen.dtype == "bf16" ? DType::bf16 : DType::f32);

  int64_t per_step = options_.batch.tokens;
  facts_.steps = options_.steps > 0 ? options_.steps : steps_for_tokens(options_.tokens, per_step);
  check_schedule(options_.schedule, facts_.steps);
  ParameterCount count = count_parameters(config);
  facts_.parameters = count.total;
  facts_.active = count.active;
  facts_.mtp = count.mtp_own;
  facts_.length = options_.batch.length;
  facts_.flops_per_token = training_flops(config, options_.batch.length);
}

Batches Trainer::make_batches(const Corpus& corpus, bool validation) const {
  const BatchSizeOptions& chosen = options_.batch;
  BatchOptions options;
  options.length = chosen.length;
  options.depths = static_cast<int>(model_->mtp.size());
  options.document_mask = chosen.document_mask;
  options.seed = chosen.seed;
  options.shuffle = !validation;
  options.keep_tail = validation;
  if (!validation && chosen.fim_rate > 0) {
    options.fim.rate = chosen.fim_rate;
    options.fim.begin = token_named(*tokenizer_, "batch.fim_begin", chosen.fim_begin);
    options.fim.hole = token_named(*tokenizer_, "batch.fim_hole", chosen.fim_hole);
    options.fim.end = token_named(*tokenizer_, "batch.fim_end", chosen.fim_end);
    options.fim.before = tokenizer_->adds_bos() ? 1 : 0;
    options.fim.after = tokenizer_->eos_id() ? 1 : 0;
  }
  return Batches(corpus, options, token_bytes_);
}

void Trainer::read_corpus() {
  CorpusOptions data = options_.data;
  if (data.threads == 0) data.threads = options_.threads;
  const std::string file = Tokenizer::file_of(options_.model.tokenizer);
  std::string text = read_file(file);
  if (!file.ends_with(".json")) {  // the configuration beside it has the added tokens
    text += read_file((std::filesystem::path(file).parent_path() / "tokenizer_config.json").string());
  }
  TextEncoder encoder = encoder_of(*tokenizer_, model_->config().vocab_size, text);
  token_bytes_ = lengths_of_tokens(*tokenizer_);
  CorpusSplit split =
      load_corpus(data, encoder, [this](const CorpusProgress& progress) { observer_->on_corpus(progress); });
  if (!split.train.cache().damage().empty()) facts_.notes.push_back(split.train.cache().damage());
  batches_.emplace(make_batches(split.train, false));
  validation_corpus_ = std::move(split.validation);
  if (validation_corpus_.tokens() < 2) validation_corpus_ = {};
  facts_.train_tokens = split.train.tokens();
  facts_.train_bytes = split.train.bytes();
  facts_.validation_tokens = validation_corpus_.tokens();
  facts_.windows = batches_->windows();
}

void Trainer::record() {
  rope_table_ = make_rope_table(*backend_, model_->config(), options_.batch.length);
  facts_.available_memory = backend_->available_memory();
  if (options_.memory > 0) {
    const auto most = static_cast<int64_t>(options_.memory * static_cast<double>(int64_t{1} << 30));
    facts_.available_memory = std::min(facts_.available_memory, most);
  }
  if (options_.batch.sequences > 0) {
    facts_.sequences = options_.batch.sequences;
    record_passes(true);
  } else {
    choose_sequences();
    options_.batch.sequences = facts_.sequences;
  }
  facts_.accumulation = options_.batch.tokens / options_.batch.length / facts_.sequences;
}

// The largest micro-batch that divides the step, stays below most_tokens_at_once, and fits in memory; a few
// sequences fewer are cheaper than making results of the forward pass again.
void Trainer::choose_sequences() {
  int64_t per_step = options_.batch.tokens / options_.batch.length;
  for (int64_t sequences = per_step; sequences >= 1; --sequences) {
    if (per_step % sequences != 0) continue;
    if (sequences > 1 && sequences * options_.batch.length > most_tokens_at_once) continue;
    facts_.sequences = sequences;
    record_passes(sequences == 1);
    if (facts_.memory.total() <= facts_.available_memory) return;
  }
}

void Trainer::record_passes(bool may_recompute) {
  const BalanceOptions& balance = options_.balance;
  int64_t accumulation = options_.batch.tokens / options_.batch.length / facts_.sequences;
  double share = 1.0 / static_cast<double>(accumulation);  // balance losses are means over the whole step
  ObjectiveOptions objective;
  objective.sequences = facts_.sequences;
  objective.sequence_length = options_.batch.length;
  objective.count_load = true;
  objective.balance.alpha =
      (balance.expert_alpha > 0 ? balance.expert_alpha : balance.sequence_alpha) * share;
  objective.balance.device_alpha = balance.device_alpha * share;
  objective.balance.communication_alpha = balance.communication_alpha * share;
  objective.balance.devices = balance.devices;
  objective.balance.devices_per_token = balance.devices_per_token;
  objective.balance.per_sequence = balance.expert_alpha == 0;
  const auto record_training = [&, objective](bool beside, int64_t most) {
    beside_ = beside;
    PlanOptions how{.training = true,
                    .fresh_gradients = true,
                    .fp8 = options_.model.fp8,
                    .beside = beside,
                    .memory = most};
    training_ = std::make_unique<Pass>(*backend_, *model_, rope_table_, objective, how);
    how.fresh_gradients = false;
    adding_.reset();
    if (accumulation > 1) adding_ = std::make_unique<Pass>(*backend_, *model_, rope_table_, objective, how);
  };
  record_training(true, 0);
  validation_.reset();
  if (!validation_corpus_.empty()) {
    objective.count_load = false;
    objective.balance = {};
    validation_ = std::make_unique<Pass>(*backend_, *model_, rope_table_, objective, PlanOptions{});
  }

  facts_.memory = estimate_memory();
  facts_.recomputed_share = 0;
  if (facts_.memory.total() <= facts_.available_memory) return;
  record_training(false, 0);
  facts_.memory = estimate_memory();
  const int64_t excess = facts_.memory.total() - facts_.available_memory;
  if (excess <= 0 || !may_recompute) return;
  const int64_t room = facts_.memory.activations - excess;
  record_training(false, std::max<int64_t>(room, 1));
  facts_.memory = estimate_memory();
  facts_.recomputed_share = training_->plan().recomputed_share();
}

MemoryEstimate Trainer::estimate_memory() const {
  MemoryEstimate memory;
  model_->for_each([&](const std::string&, Tensor& tensor) {
    memory.weights += tensor.view().bytes() + fp8_bytes(tensor);
    if (tensor.value().grad) memory.gradients += Tensor(tensor.value().grad).view().bytes();
  });
  memory.optimizer = Optimizer::state_bytes(*model_, options_.optimizer);
  memory.inputs = rope_table_.view().bytes() + (beside_ ? backend_->beside_bytes() : 0);
  for (const Pass* pass : {training_.get(), adding_.get(), validation_.get()}) {
    if (!pass) continue;
    memory.activations = std::max(memory.activations, pass->plan().arena_bytes());
    memory.inputs += pass->plan().input_bytes();
  }
  return memory;
}

}  // namespace latente
