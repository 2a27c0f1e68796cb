// What generate and chat share: a loaded model with its tokenizer, the sampling flags, and text as it is
// decoded.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/cpu_backend.h"
#include "infer/engine.h"
#include "model/model_source.h"
#include "model/weights.h"
#include "tokenizer/stop_strings.h"
#include "tokenizer/tokenizer.h"

namespace latente {

struct SessionOptions {
  std::string model, dtype = "auto", cache = "f32";
  int64_t context = 0;
  int threads = 0;
  int64_t max_tokens = 256;
  // Not given = the model's own default; the seed is then from the clock.
  std::optional<double> temperature, top_p, min_p, typical_p, repetition_penalty, presence_penalty,
      frequency_penalty;
  std::optional<int64_t> top_k, penalty_window, seed;
  std::vector<std::string> logit_bias;  // ID=BIAS
  int64_t draft = -1;
  bool plain = false, stats = false;
  std::vector<std::string> stop;
};
// The flags of SessionOptions.
void add_session_options(CLI::App& command, SessionOptions& options);

// Of a model directory or a GGUF file.
Tokenizer load_tokenizer(const std::string& model);

class Session {
 public:
  explicit Session(const SessionOptions& options);

  const Tokenizer& tokenizer() const { return tokenizer_; }
  const Config& config() const { return model_->config(); }

  // Decodes on from `prompt`, handing text to `show` as it becomes final. Ctrl-C ends the reply. Returns the
  // whole text.
  std::string reply(std::span<const int32_t> prompt, const std::function<void(std::string_view)>& show,
                    GenerationStats& stats);
  // The lines of --stats.
  std::string describe(const GenerationStats& stats) const;

 private:
  void read_generation_defaults();
  void read_sampling_flags();
  void read_gguf_defaults();

  SessionOptions options_;
  GenerationOptions generation_;
  ModelSource source_;
  CpuBackend backend_;
  std::unique_ptr<Transformer> model_;
  Tokenizer tokenizer_;
  std::unique_ptr<Engine> engine_;
  double load_seconds_ = 0;
};

// Set by Ctrl-C while a Session replies; cleared when the next reply starts.
bool interrupted();

}  // namespace latente
