// What generate and chat share: a loaded model with its tokenizer, the sampling flags, and text as it is
// decoded.
#pragma once

#include <CLI/CLI.hpp>
#include <csignal>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "device.h"
#include "grammar/vocabulary.h"
#include "infer/engine.h"
#include "model/experts_on_demand.h"
#include "model/model_source.h"
#include "model/run_weights.h"
#include "model/weights.h"
#include "tokenizer/chat_template.h"
#include "tokenizer/stop_strings.h"
#include "tokenizer/tokenizer.h"

namespace latente {

struct SessionOptions {
  std::string model, cache = "auto", device = "cpu";
  RunWeights weights;
  int64_t context = 0;
  int64_t parallel = 1, cache_tokens = 0;  // sequences at a time; tokens of all of them, 0 = context for each
  int64_t cache_memory = 0;                // bytes; instead, if not 0
  ThreadOptions threads;
  int64_t max_tokens = 256;
  // Not given = the model's own default; the seed is then from the clock.
  std::optional<double> temperature, top_p, min_p, typical_p, repetition_penalty, presence_penalty,
      frequency_penalty;
  std::optional<int64_t> top_k, penalty_window, seed;
  std::vector<std::string> logit_bias;  // ID=BIAS
  int64_t draft = -1;
  bool plain = false, stats = false;
  bool count_experts = false;  // RunnerOptions
  std::vector<std::string> stop;
  std::string grammar, json_schema;  // file; the schema also itself, from its { on
  bool json = false;
};
// The flags of SessionOptions: the model and how it is held; sampling; these and the others; those of many
// sequences.
void add_model_options(CLI::App& command, SessionOptions& options);
void add_sampling_options(CLI::App& command, SessionOptions& options);
void add_session_options(CLI::App& command, SessionOptions& options);
void add_parallel_options(CLI::App& command, SessionOptions& options);

// The flags of RunWeights.
void add_weight_options(CLI::App& command, RunWeights& weights);

// A flag that takes a size such as 2G (base/memory.h), more than 0.
void add_bytes_option(CLI::App& command, const std::string& name, int64_t& bytes, const std::string& help);

void add_cache_option(CLI::App& command, std::string& type);
// --threads and --pin
void add_threads_option(CLI::App& command, ThreadOptions& threads);

// Says on stderr what of the experts is on the disk, if any are.
void announce_experts(Transformer& model);
// How reading them went: "87.5 % found in memory, …".
std::string describe_experts(const Residency::Figures& figures);

// Of a model directory or a GGUF file.
Tokenizer load_tokenizer(const std::string& model);

// The text of a reply as its tokens come, up to a stop string.
class ReplyText {
 public:
  ReplyText(const Tokenizer& tokenizer, const std::vector<std::string>& stops)
      : decoder_(tokenizer, true), stops_(stops) {}

  // Returns what may be shown.
  std::string push(int32_t token) { return add(stops_.push(decoder_.push(token))); }
  std::string finish();
  bool stopped() const { return stops_.stopped(); }
  const std::string& text() const { return text_; }

 private:
  std::string add(std::string piece) {
    text_ += piece;
    return piece;
  }

  StreamDecoder decoder_;
  StopStrings stops_;
  std::string text_;
};

class Session {
 public:
  explicit Session(const SessionOptions& options);

  const Tokenizer& tokenizer() const { return *tokenizer_; }
  const Config& config() const { return model_->config(); }
  Engine& engine() { return *engine_; }
  const GenerationOptions& generation() const { return generation_; }
  // For grammars over the model's tokens.
  std::shared_ptr<const grammar::Vocabulary> vocabulary() const;

  // The ids of a text to continue; an empty one is the beginning of a text. Error: the tokenizer has no token
  // for that.
  std::vector<int32_t> prompt_of(const std::string& text) const;
  // The ids of a conversation that the model is to go on with.
  std::vector<int32_t> prompt_of(const std::vector<ChatMessage>& messages);
  // The model's own. Error: it has none.
  const ChatTemplate& chat_template();

  // Decodes on from `prompt`, handing text to `show` as it becomes final. Ctrl-C ends the reply, also while
  // the prompt is read. Returns the whole text.
  std::string reply(std::span<const int32_t> prompt, const std::function<void(std::string_view)>& show,
                    GenerationStats& stats);
  // Prompt and reply of the last time.
  const std::vector<int32_t>& tokens() const { return tokens_; }
  // The lines of --stats.
  std::string describe(const GenerationStats& stats) const;

 private:
  void read_generation_defaults();
  void read_sampling_flags();
  void read_gguf_defaults();
  void read_grammar();

  SessionOptions options_;
  GenerationOptions generation_;
  Device device_;
  ModelSource source_;
  std::unique_ptr<Transformer> model_;
  std::optional<Tokenizer> tokenizer_;
  std::optional<ChatTemplate> template_;
  std::unique_ptr<Engine> engine_;
  std::vector<int32_t> tokens_;
  std::string weights_;  // types of them
  double load_seconds_ = 0;
};

// While it lives, Ctrl-C is noted rather than the program's end.
class CatchInterrupts {
 public:
  CatchInterrupts();
  ~CatchInterrupts();

 private:
  struct sigaction before_ {};
};
// Set by Ctrl-C while interrupts are caught; cleared when they begin to be.
bool interrupted();

}  // namespace latente
