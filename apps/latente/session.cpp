#include "session.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <future>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/file.h"
#include "base/memory.h"
#include "checkpoint/gguf_tokenizer.h"
#include "grammar/gbnf.h"
#include "grammar/json_schema.h"
#include "infer/grammar_constraint.h"
#include "model/figures.h"
#include "model/gguf.h"

namespace latente {
namespace {

std::atomic<bool> stop_requested = false;

std::pair<int32_t, double> read_bias(const std::string& text) {
  const char* const end = text.data() + text.size();
  int32_t id = -1;
  double bias = std::numeric_limits<double>::quiet_NaN();
  auto [at, error] = std::from_chars(text.data(), end, id);
  if (error != std::errc() || at == end || *at != '=' || std::from_chars(at + 1, end, bias).ptr != end ||
      std::isnan(bias)) {
    fail("--logit-bias: expected ID=BIAS such as 42=-1.5, found {}", text);
  }
  return {id, bias};
}

}  // namespace

bool interrupted() { return stop_requested; }

CatchInterrupts::CatchInterrupts() {
  stop_requested = false;
  struct sigaction action {};
  action.sa_handler = [](int) { stop_requested = true; };
  sigaction(SIGINT, &action, &before_);
}

CatchInterrupts::~CatchInterrupts() { sigaction(SIGINT, &before_, nullptr); }

std::string ReplyText::finish() {
  std::string rest;
  if (!stopped()) rest = add(stops_.push(decoder_.finish()));
  if (!stopped()) rest += add(stops_.finish());
  return rest;
}

Tokenizer load_tokenizer(const std::string& model) {
  if (!is_gguf(model)) return Tokenizer::load(model);
  GgufTokenizer texts = gguf_tokenizer(GgufFile(model));
  return Tokenizer::from_json(texts.tokenizer_json, texts.config_json, model);
}

void add_weight_options(CLI::App& command, RunWeights& weights) {
  command
      .add_option(
          "--dtype,--weights", weights.type,
          "Weights in memory: auto (as stored), f32, bf16, f64, int8, int4, fp8 (on a CPU only as stored)")
      ->capture_default_str();
  command
      .add_option("--group", weights.group,
                  "Elements that share a scale, of int8 and int4: 32, 64, 128 or 256 [64, or as stored]")
      ->check(CLI::IsMember({32, 64, 128, 256}));
  add_bytes_option(command, "--memory", weights.memory,
                   "Memory for weights, such as 24G; routed experts beyond it are read from the disk when "
                   "they are chosen [what is available, less a margin]");
}

void add_bytes_option(CLI::App& command, const std::string& name, int64_t& bytes, const std::string& help) {
  const auto read = [name, &bytes](const std::string& text) {
    bytes = parse_bytes(name, text);
    if (bytes == 0) fail("{}: expected more than nothing", name);
  };
  command.add_option_function<std::string>(name, read, help)->type_name("SIZE");
}

void announce_experts(Transformer& model) {
  const Residency* residency = residency_of(model);
  if (!residency) return;
  const Residency::Figures figures = residency->figures();
  const auto text = [](int64_t bytes) { return bytes_text(static_cast<double>(bytes)); };
  std::fprintf(
      stderr,
      "experts: %s of %s stay on the disk and are read when they are chosen; %s of memory keep those "
      "used last\n",
      text(figures.memory - figures.budget).c_str(), text(figures.memory).c_str(),
      text(figures.budget).c_str());
}

std::string describe_experts(const Residency::Figures& figures) {
  return fmt::format(
      "{:.1f} % found in memory, {} read, {:.1f} s waited, {} in memory",
      100.0 * static_cast<double>(figures.found) / static_cast<double>(std::max<int64_t>(figures.wanted, 1)),
      bytes_text(static_cast<double>(figures.bytes_read)), figures.waited,
      bytes_text(static_cast<double>(figures.resident)));
}

void add_cache_option(CLI::App& command, std::string& type) {
  command
      .add_option("--kv-cache-dtype", type,
                  "f32, bf16, or for MLA int8 or fp8; auto: f32, on a GPU the activations' type")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "f32", "bf16", "int8", "fp8"}));
}

void add_threads_option(CLI::App& command, ThreadOptions& threads) {
  command.add_option("--threads", threads.count, "0 = all cores")
      ->capture_default_str()
      ->check(CLI::Range(0, 1024));
  command.add_flag("--pin", threads.pin,
                   "Keep each thread on a core of its own: for machines that do nothing else");
}

void add_model_options(CLI::App& command, SessionOptions& options) {
  command.add_option("model", options.model, "Model directory (Hugging Face layout) or GGUF file")
      ->required()
      ->check(CLI::ExistingPath);
  command
      .add_option("--draft", options.draft,
                  "Tokens the MTP modules draft each pass, 0 to 7 [up to one a module, while it pays]")
      ->check(CLI::Range(0, 7));
  command.add_flag("--plain", options.plain, "Decode without drafting (same as --draft 0)");
  command.add_option("--ctx-size", options.context, "Tokens a sequence can have [the model's, at most 4096]")
      ->check(CLI::Range(2, 1 << 24));
  add_bytes_option(
      command, "--cache-memory", options.cache_memory,
      "Memory for the cache, such as 2G [what --ctx-size needs for each sequence at a time]: what "
      "finds no room in it waits, and what was kept of earlier prompts goes");
  add_cache_option(command, options.cache);
  add_weight_options(command, options.weights);
  add_device_option(command, options.device);
  add_threads_option(command, options.threads);
}

void add_sampling_options(CLI::App& command, SessionOptions& options) {
  command.add_option("-t,--temperature", options.temperature,
                     "0 = always the most likely token [model's default, else 0]");
  command.add_option("--top-k", options.top_k, "Sample among the k most likely; 0 = all");
  command.add_option("--top-p", options.top_p, "Sample among the fewest that reach this probability");
  command.add_option("--min-p", options.min_p, "Drop tokens below this share of the most likely");
  command.add_option("--typical-p", options.typical_p,
                     "Sample among the fewest that reach this probability, the most typical first");
  command.add_option("--repetition-penalty", options.repetition_penalty,
                     "Above 1 makes tokens of prompt and reply less likely");
  command.add_option("--presence-penalty", options.presence_penalty,
                     "Taken from the logits of tokens that the reply has, -2 to 2");
  command.add_option("--frequency-penalty", options.frequency_penalty,
                     "The same, as often as the reply has the token");
  command.add_option("--penalty-window", options.penalty_window,
                     "Penalties look at this many last tokens; -1 = at all");
}

void add_session_options(CLI::App& command, SessionOptions& options) {
  add_model_options(command, options);
  command.add_option("-n,--max-tokens", options.max_tokens, "Tokens to write at most")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  add_sampling_options(command, options);
  command
      .add_option("--logit-bias", options.logit_bias,
                  "ID=BIAS: added to the token's logit, -100 to 100; -inf bans it (may be repeated)")
      ->expected(1)
      ->take_all();
  command.add_option("--seed", options.seed, "Of the sampler [from the clock]");
  command.add_option("--stop", options.stop, "Stop at this text (may be repeated)")->expected(1)->take_all();
  CLI::Option* grammar =
      command.add_option("--grammar", options.grammar, "The reply matches this grammar: a file in GBNF")
          ->check(CLI::ExistingFile);
  CLI::Option* schema = command
                            .add_option("--json-schema", options.json_schema,
                                        "The reply is JSON that is valid against this schema: a file, or the "
                                        "schema itself if it begins with {")
                            ->excludes(grammar);
  command.add_flag("--json", options.json, "The reply is a JSON object")->excludes(grammar)->excludes(schema);
  command.add_flag("--stats", options.stats, "Print speed, acceptance and cache size at the end");
}

void add_parallel_options(CLI::App& command, SessionOptions& options) {
  options.parallel = 16;
  command.add_option("--parallel", options.parallel, "Sequences that run at a time")
      ->capture_default_str()
      ->check(CLI::Range(1, 1024));
  command
      .add_option("--cache-tokens", options.cache_tokens,
                  "Tokens the cache holds for all of them [--ctx-size for each]; who finds no room waits")
      ->excludes("--cache-memory");
}

Session::Session(const SessionOptions& options)
    : options_(options), device_(options.device, options.threads), source_(open_model(options.model)) {
  const auto start = std::chrono::steady_clock::now();
  if (!is_gguf(options.model)) MappedFile(Tokenizer::file_of(options.model));  // missing: said before loading
  // Reading a tokenizer takes as long as mapping a model.
  std::future<Tokenizer> tokenizer = std::async(std::launch::async, load_tokenizer, options.model);
  read_generation_defaults();
  read_sampling_flags();
  for (const auto& [id, bias] : generation_.sampling.logit_bias) {
    if (id >= source_.config.vocab_size)
      fail("--logit-bias: token {} lies outside the vocabulary of {}", id, source_.config.vocab_size);
  }
  model_ = load_for_running(source_, options.weights, device_.backend());
  tokenizer_.emplace(tokenizer.get());
  weights_ = type_text(*model_);
  announce_experts(*model_);

  RunnerOptions runner;
  runner.context = options.context > 0 ? options.context
                                       : std::min<int64_t>(model_->config().max_position_embeddings, 4096);
  runner.cache_type = cache_type_from_name(options.cache, device_.backend(), *model_);
  runner.sequences = options.parallel;
  if (options.cache_tokens < 0) fail("--cache-tokens: expected 0 or more, found {}", options.cache_tokens);
  runner.pages = (options.cache_tokens + runner.page_size - 1) / runner.page_size;
  runner.cache_bytes = options.cache_memory;
  runner.count_experts = options.count_experts;
  engine_ = std::make_unique<Engine>(device_.backend(), *model_, runner);

  generation_.max_tokens = options.max_tokens;
  generation_.draft = options.plain ? 0 : options.draft;
  for (int64_t id : model_->config().eos_token_ids)
    generation_.stop_tokens.push_back(static_cast<int32_t>(id));
  if (tokenizer_->eos_id()) generation_.stop_tokens.push_back(*tokenizer_->eos_id());
  read_grammar();
  load_seconds_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void Session::read_sampling_flags() {
  const SessionOptions& options = options_;
  SamplingOptions& sampling = generation_.sampling;
  auto set = [](auto& value, const auto& given) {
    if (given) value = *given;
  };
  set(sampling.temperature, options.temperature);
  set(sampling.top_k, options.top_k);
  set(sampling.top_p, options.top_p);
  set(sampling.min_p, options.min_p);
  set(sampling.typical_p, options.typical_p);
  set(sampling.repetition_penalty, options.repetition_penalty);
  set(sampling.presence_penalty, options.presence_penalty);
  set(sampling.frequency_penalty, options.frequency_penalty);
  set(sampling.penalty_window, options.penalty_window);
  for (const std::string& text : options.logit_bias) sampling.logit_bias.push_back(read_bias(text));
  if (options.seed.value_or(0) < 0) fail("--seed: expected 0 or more, found {}", *options.seed);
  sampling.seed = static_cast<uint64_t>(
      options.seed.value_or(std::chrono::system_clock::now().time_since_epoch().count()));
  sampling.validate();
  generation_.repeatable = options.seed.has_value();
}

// generation_config.json or a GGUF file's keys say how the model's makers sample; flags override them.
void Session::read_generation_defaults() {
  if (is_gguf(options_.model)) return read_gguf_defaults();
  std::string path = options_.model + "/generation_config.json";
  if (!std::filesystem::exists(path)) return;
  nlohmann::json json = nlohmann::json::parse(read_file(path, 1 << 20), nullptr, false);
  if (!json.is_object()) fail("{}: expected a JSON object", path);
  auto number = [&](const char* key, auto& value) {
    auto found = json.find(key);
    if (found == json.end() || found->is_null()) return;
    if (!found->is_number()) fail("{}: {}: expected a number, found {}", path, key, found->dump());
    value = found->template get<std::remove_reference_t<decltype(value)>>();
  };
  SamplingOptions& sampling = generation_.sampling;
  bool samples = json.contains("do_sample") && json["do_sample"] == true;
  if (samples) {
    sampling.temperature = 1.0;
    number("temperature", sampling.temperature);
    number("top_k", sampling.top_k);
    number("top_p", sampling.top_p);
    number("min_p", sampling.min_p);
    number("typical_p", sampling.typical_p);
  }
  number("repetition_penalty", sampling.repetition_penalty);
  if (!json.contains("eos_token_id")) return;
  for (const nlohmann::json& id :
       json["eos_token_id"].is_array() ? json["eos_token_id"] : nlohmann::json{json["eos_token_id"]}) {
    if (id.is_number_integer()) generation_.stop_tokens.push_back(id.get<int32_t>());
  }
}

void Session::read_gguf_defaults() {
  const GgufFile file(options_.model);
  auto number = [&](std::string_view key, double& value) { value = file.number(key).value_or(value); };
  SamplingOptions& sampling = generation_.sampling;
  number("general.sampling.temp", sampling.temperature);
  number("general.sampling.top_p", sampling.top_p);
  number("general.sampling.min_p", sampling.min_p);
  number("general.sampling.penalty_repeat", sampling.repetition_penalty);
  sampling.top_k = file.integer("general.sampling.top_k").value_or(sampling.top_k);
  sampling.penalty_window = file.integer("general.sampling.penalty_last_n").value_or(sampling.penalty_window);
}

void Session::read_grammar() {
  constexpr int64_t most_bytes = 4 << 20;
  std::optional<grammar::Grammar> rules;
  if (!options_.grammar.empty()) {
    rules = grammar::parse_gbnf(read_file(options_.grammar, most_bytes), options_.grammar);
  } else if (options_.json_schema.starts_with('{')) {
    rules = grammar::parse_json_schema(options_.json_schema, "--json-schema");
  } else if (!options_.json_schema.empty()) {
    rules = grammar::parse_json_schema(read_file(options_.json_schema, most_bytes), options_.json_schema);
  } else if (options_.json) {
    rules = grammar::json_object_grammar();
  } else {
    return;
  }
  generation_.constraint = std::make_shared<GrammarConstraint>(
      std::make_shared<grammar::TokenGrammar>(std::make_shared<grammar::Automaton>(*rules), vocabulary()));
}

std::shared_ptr<const grammar::Vocabulary> Session::vocabulary() const {
  const auto size = static_cast<size_t>(config().vocab_size);
  std::vector<std::string> texts(size);
  for (size_t i = 0; i < size; ++i) {
    const auto id = static_cast<int32_t>(i);
    if (tokenizer_->has(id) && !tokenizer_->is_special(id)) texts[i] = tokenizer_->token_bytes(id);
  }
  std::vector<int32_t> stops = generation_.stop_tokens;
  std::erase_if(stops, [&](int32_t id) { return id < 0 || static_cast<size_t>(id) >= size; });
  return std::make_shared<grammar::Vocabulary>(texts, stops);
}

std::vector<int32_t> Session::prompt_of(const std::string& text) const {
  std::vector<int32_t> ids = tokenizer_->encode(text);
  if (!ids.empty()) return ids;
  const std::optional<int32_t> begin = tokenizer_->bos_id() ? tokenizer_->bos_id() : tokenizer_->eos_id();
  if (!begin) fail("the prompt is empty, and the tokenizer has no token that begins a text");
  return {*begin};
}

const ChatTemplate& Session::chat_template() {
  if (template_) return *template_;
  if (tokenizer_->chat_template().empty()) {
    fail(
        "{}: has no chat template ({}) and takes plain prompts only, as of generate", options_.model,
        is_gguf(options_.model) ? "tokenizer.chat_template" : "tokenizer_config.json or chat_template.jinja");
  }
  return template_.emplace(tokenizer_->chat_template());
}

std::vector<int32_t> Session::prompt_of(const std::vector<ChatMessage>& messages) {
  const std::string text =
      chat_template().render(messages, true, tokenizer_->bos_token(), tokenizer_->eos_token());
  return tokenizer_->encode(text, {.add_special = false});  // the template writes its own
}

std::string Session::reply(std::span<const int32_t> prompt, const std::function<void(std::string_view)>& show,
                           GenerationStats& stats) {
  const CatchInterrupts guard;
  ReplyText text(*tokenizer_, options_.stop);
  tokens_.assign(prompt.begin(), prompt.end());
  auto pass = [&](const std::string& piece) {
    if (!piece.empty()) show(piece);
  };
  auto take = [&](GeneratedToken token) {
    tokens_.push_back(token.id);
    pass(text.push(token.id));
    return !text.stopped();
  };
  stats = engine_->generate(prompt, generation_, take, [] { return !interrupted(); });
  pass(text.finish());
  ++generation_.sampling.seed;  // the next reply draws anew
  return text.text();
}

std::string Session::describe(const GenerationStats& stats) const {
  std::string text = fmt::format("prompt      {} tokens ({} from the cache), {:.1f} tok/s\n",
                                 stats.prompt_tokens, stats.reused_tokens, stats.prompt_tokens_per_second());
  text += fmt::format("decode      {} tokens, {:.1f} tok/s, {:.2f} tokens a pass\n", stats.generated_tokens,
                      stats.decode_tokens_per_second(), stats.tokens_per_pass());
  if (stats.drafted > 0) {
    text += fmt::format("drafts      {} drafted, {} accepted ({:.1f} %)\n", stats.drafted, stats.accepted,
                        100 * stats.acceptance());
  }
  CacheFigures cache = cache_figures(config());
  text += fmt::format("cache       {} bytes a token; MHA of the same heads: {:.1f}× the main model's\n",
                      engine_->runner().cache_bytes_per_token(),
                      static_cast<double>(cache.mha) / static_cast<double>(cache.own));
  text += fmt::format("weights     {}\n", weights_);
  if (const Residency* residency = residency_of(*model_))
    text += fmt::format("experts     {}\n", describe_experts(residency->figures()));
  text += fmt::format("loading     {:.2f} s", load_seconds_);
  return text;
}

}  // namespace latente
