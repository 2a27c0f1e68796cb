// latente perplexity: how well a model predicts a text.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/file.h"
#include "commands.h"
#include "device.h"
#include "infer/likelihood.h"
#include "infer/runner.h"
#include "model/run_weights.h"
#include "session.h"
#include "status_line.h"

namespace latente {
namespace {

struct PerplexityOptions {
  std::string model, file, cache, device = "cpu";
  RunWeights weights;
  int64_t context = 0, stride = 0, most_tokens = 0;
  ThreadOptions threads;
  bool json = false;
};

void measure(const PerplexityOptions& options) {
  Device device(options.device, options.threads);
  Backend& backend = device.backend();
  const ModelSource source = open_model(options.model);
  const Tokenizer tokenizer = load_tokenizer(options.model);
  const std::string text = read_file(options.file);
  std::vector<int32_t> tokens = tokenizer.encode(text, {.add_special = false, .parse_special = true});
  if (options.most_tokens > 0 && static_cast<int64_t>(tokens.size()) > options.most_tokens)
    tokens.resize(static_cast<size_t>(options.most_tokens));
  const bool begins = tokenizer.adds_bos();
  if (begins) tokens.insert(tokens.begin(), *tokenizer.bos_id());
  if (tokens.size() < 2)
    fail("{}: expected a text of at least two tokens, found {}", options.file, tokens.size());
  for (int32_t id : tokens) {
    if (id >= source.config.vocab_size)
      fail("{}: token {} lies outside the model's vocabulary of {}", options.file, id,
           source.config.vocab_size);
  }
  const auto model = load_for_running(source, options.weights, backend);
  announce_experts(*model);
  LikelihoodOptions how;
  how.context =
      options.context > 0 ? options.context : std::min<int64_t>(source.config.max_position_embeddings, 2048);
  how.stride = options.stride > 0 ? options.stride : std::max<int64_t>(how.context / 2, 1);
  if (!options.cache.empty()) how.cache = cache_type_from_name(options.cache, backend, *model);
  StatusLine line;
  const Pace pace;
  how.progress = [&](int64_t done, int64_t total) {
    const double share = static_cast<double>(done) / static_cast<double>(total);
    line.show(fmt::format("{} of {} tokens  {} left", done, total, time_text(pace.left(share))),
              done == total);
  };
  const auto scores = negative_log_likelihoods(backend, *model, tokens, how);
  line.end();

  int64_t bytes = 0;
  for (size_t i = 1; i < tokens.size(); ++i)
    bytes += static_cast<int64_t>(tokenizer.token_bytes(tokens[i]).size());
  const Perplexity result = perplexity_of(scores);
  if (options.json) {
    const nlohmann::ordered_json json = {{"model", options.model},
                                         {"weights", options.weights.type},
                                         {"context", how.context},
                                         {"stride", how.stride},
                                         {"tokens", result.tokens},
                                         {"bytes", bytes},
                                         {"nll", result.mean},
                                         {"nll_error", result.standard_error},
                                         {"perplexity", result.perplexity()},
                                         {"bits_per_byte", result.bits_per_byte(bytes)}};
    fmt::print("{}\n", json.dump());
    return;
  }
  fmt::print("tokens          {} ({} bytes), context {}, stride {}\n", result.tokens, bytes, how.context,
             how.stride);
  fmt::print("nll             {:.5f} ± {:.5f} nats a token\n", result.mean, result.standard_error);
  fmt::print("perplexity      {:.4f} ± {:.4f}\n", result.perplexity(),
             result.perplexity() * result.standard_error);
  fmt::print("bits per byte   {:.5f}\n", result.bits_per_byte(bytes));
}

}  // namespace

void add_perplexity(CLI::App& app) {
  auto options = std::make_shared<PerplexityOptions>();
  CLI::App* command = app.add_subcommand("perplexity", "Measure how well a model predicts a text");
  command->add_option("model", options->model, "Model directory (Hugging Face layout) or GGUF file")
      ->required()
      ->check(CLI::ExistingPath);
  command->add_option("file", options->file, "The text")->required()->check(CLI::ExistingFile);
  options->weights.copied = true;  // there is much to read
  add_weight_options(*command, options->weights);
  command->add_option("--context", options->context, "Tokens read at once [the model's, at most 2048]")
      ->check(CLI::Range(2, 1 << 22));
  command->add_option("--stride", options->stride, "Tokens from one reading to the next [half the context]")
      ->check(CLI::PositiveNumber);
  command->add_option("--max-tokens", options->most_tokens, "Read no more of the text; 0 = all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command
      ->add_option("--kv-cache-dtype", options->cache,
                   "Read over a cache of this type: f32, bf16, or for MLA int8 or fp8 [without one]")
      ->check(CLI::IsMember({"f32", "bf16", "int8", "fp8"}));
  add_device_option(*command, options->device);
  add_threads_option(*command, options->threads);
  command->add_flag("--json", options->json, "An object on one line");
  command->callback([options] { measure(*options); });
}

}  // namespace latente
