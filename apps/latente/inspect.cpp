#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>

#include "base/memory.h"
#include "checkpoint/checkpoint.h"
#include "commands.h"
#include "cpu/cpu_backend.h"
#include "model/converted.h"
#include "model/figures.h"
#include "model/gguf.h"
#include "model/model_source.h"
#include "model/quantised_places.h"
#include "model/run_weights.h"

namespace latente {
namespace {

struct InspectOptions {
  std::string model;
  int64_t context = 4096, batch = 1;
  std::string weights, cache = "bf16";
};

std::string grouped(int64_t value) {
  std::string digits = std::to_string(value), text;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

int64_t type_bytes(const std::string& name) {
  std::optional<DType> type = dtype_from_name(name);
  if (!type || !is_floating(*type)) fail("{}: expected a floating type such as f32, bf16, f8e4m3", name);
  return size_of(*type);
}

void print_attention(const Config& config) {
  if (!config.is_mla()) {
    fmt::print("attention      {} query heads of {}, {} key/value heads\n", config.num_attention_heads,
               config.head_dim, config.num_key_value_heads);
    return;
  }
  fmt::print(
      "attention      MLA, {} heads: nope {} + rope {}, value {}; latent {}; {}\n",
      config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim,
      config.kv_lora_rank,
      config.q_lora_rank > 0 ? fmt::format("query rank {}", config.q_lora_rank) : "queries not compressed");
}

void print_experts(const Config& config) {
  if (config.n_routed_experts == 0) return;
  fmt::print("experts        {} routed of {}, top {}, {} shared; gate {} ({})", config.n_routed_experts,
             config.moe_intermediate_size, config.num_experts_per_tok, config.n_shared_experts,
             config.scoring_func, config.topk_method);
  if (config.routing().group_score != GroupScore::none)
    fmt::print(", {} of {} groups", config.topk_group, config.n_group);
  fmt::print("\n");
}

// What a file or a directory of weights holds, by type of elements.
struct Stored {
  struct Sum {
    int64_t tensors = 0, bytes = 0;
  };
  std::string form;
  std::map<std::string, Sum> types;
  int64_t bytes = 0;
  size_t files = 0;
  int64_t experts = 0;  // bytes of routed ones in safetensors

  void add(std::string_view type, int64_t size) {
    Sum& sum = types[std::string(type)];
    ++sum.tensors, sum.bytes += size, bytes += size;
  }
};

Stored stored_in(const GgufCheckpoint& checkpoint) {
  Stored stored{fmt::format("GGUF {}", checkpoint.file().version()), {}, 0, checkpoint.files().size()};
  for (const auto& file : checkpoint.files()) {
    for (const GgufTensor& tensor : file->tensors())
      stored.add(name_of(tensor.type), static_cast<int64_t>(tensor.data.size()));
  }
  return stored;
}

Stored stored_in(const Checkpoint& checkpoint, const ConvertedConfig& converted) {
  Stored stored{converted
                    ? fmt::format("safetensors, int{} in groups of {}", converted.bits, converted.group_size)
                    : "safetensors",
                {},
                0,
                0};
  std::set<std::string> files;
  for (const std::string& name : checkpoint.names()) {
    const SafetensorsEntry& entry = checkpoint.entry(name);
    stored.add(name.ends_with(panels_suffix) ? "panels" : entry.dtype_name, entry.bytes);
    if (name.find(".mlp.experts.") != name.npos) stored.experts += entry.bytes;
    if (const auto scales = checkpoint.scale_name(name)) {
      const SafetensorsEntry& scale = checkpoint.entry(*scales);
      stored.add(scale.dtype_name, scale.bytes);
    }
    files.insert(checkpoint.file_of(name));
  }
  stored.files = files.size();
  return stored;
}

// Nothing for a config alone.
std::optional<Stored> stored_in(const std::string& model, const Config& config) {
  if (is_gguf(model)) return stored_in(GgufCheckpoint(model));
  for (const char* weights : {"/model.safetensors", "/model.safetensors.index.json"}) {
    std::error_code error;
    if (std::filesystem::exists(model + weights, error))
      return stored_in(Checkpoint(model), config.converted);
  }
  return std::nullopt;
}

// The weights in memory where their type follows from how they are stored.
struct Held {
  std::string types;
  int64_t bytes = 0;
};
std::optional<Held> held_as_stored(const std::string& model, const Config& config,
                                   const std::optional<Stored>& stored) {
  if (stored && config.converted) return Held{fmt::format("int{}", config.converted.bits), stored->bytes};
  if (!is_gguf(model)) return std::nullopt;
  CpuBackend backend(1);
  Transformer transformer(config, DType::f32);
  const int64_t bytes = stored_places(transformer, backend, GgufCheckpoint(model)).bytes();
  return Held{type_text(transformer), bytes};
}

// A line for each type of elements, those with the most bytes first.
void print_stored(const Stored& stored, int64_t parameters) {
  std::vector<std::pair<std::string, Stored::Sum>> sorted(stored.types.begin(), stored.types.end());
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const auto& a, const auto& b) { return a.second.bytes > b.second.bytes; });
  fmt::print("\nstored         {}, {} in {} file{}: {:.2f} bits a weight\n", stored.form,
             bytes_text(static_cast<double>(stored.bytes)), stored.files, stored.files == 1 ? "" : "s",
             8 * static_cast<double>(stored.bytes) / static_cast<double>(parameters));
  for (const auto& [type, sum] : sorted)
    fmt::print("  {:<20}{:>22}{:>15} tensors\n", type, bytes_text(static_cast<double>(sum.bytes)),
               sum.tensors);
}

void inspect(const InspectOptions& options) {
  Config config = config_of_model(options.model);
  fmt::print("{}: {} layers of {}, vocabulary {}, context {}{}\n", config.model_type,
             config.num_hidden_layers, config.hidden_size, config.vocab_size, config.max_position_embeddings,
             config.tie_word_embeddings ? ", tied head" : "");
  print_attention(config);
  print_experts(config);
  if (config.rope.type != "default") {
    fmt::print("rope           {} ×{:g} over {}, softmax scale ×{:.5f}\n", config.rope.type,
               config.rope.factor, config.rope.original_max_position_embeddings,
               config.softmax_scale() * std::sqrt(static_cast<double>(config.qk_head_dim())));
  }

  ParameterCount count = count_parameters(config);
  fmt::print("\n{:<22}{:>22}{:>22}\n", "parameters", "total", "active per token");
  for (const auto& part : count.parts) {
    if (part.total > 0 || part.active > 0)
      fmt::print("  {:<20}{:>22}{:>22}\n", part.name, grouped(part.total), grouped(part.active));
  }
  fmt::print("  {:<20}{:>22}{:>22}\n", "main model", grouped(count.total), grouped(count.active));
  if (count.mtp_own > 0) {
    fmt::print("  {:<20}{:>22}\n", fmt::format("MTP (depth {})", config.num_mtp_layers),
               grouped(count.mtp_own));
    fmt::print("  {:<20}{:>22}\n", "  with shared parts", grouped(count.mtp_with_shared));
  }

  CacheFigures cache = cache_figures(config);
  int64_t cache_bytes = type_bytes(options.cache);
  fmt::print("\ncache a token, {} (all layers)\n", options.cache);
  auto row = [&](const char* name, int64_t values) {
    fmt::print("  {:<20}{:>14} bytes  {:>6.1f} %  {:>12} at {} × {} tokens\n", name,
               grouped(values * cache_bytes),
               100.0 * static_cast<double>(values) / static_cast<double>(cache.mha),
               bytes_text(static_cast<double>(values * cache_bytes * options.context * options.batch)),
               options.batch, options.context);
  };
  row(config.is_mla() ? "MLA (this model)" : "this model", cache.own);
  row("MHA", cache.mha);
  row(config.num_attention_heads >= 8 ? "GQA, 8 heads" : "GQA", cache.gqa8);
  row("MQA", cache.mqa);

  const int64_t parameters = count.total + count.mtp_own;
  const std::optional<Stored> stored = stored_in(options.model, config);
  const std::optional<Held> held =
      options.weights.empty() ? held_as_stored(options.model, config, stored) : std::nullopt;
  const std::string weights = held ? held->types : options.weights.empty() ? "bf16" : options.weights;
  double weight_bytes = held ? static_cast<double>(held->bytes) / static_cast<double>(parameters)
                             : static_cast<double>(type_bytes(weights));
  double model_bytes = static_cast<double>(parameters) * weight_bytes;
  double cached = static_cast<double>(cache.own * cache_bytes * options.context * options.batch);
  fmt::print("\nmemory         weights {} ({}) + cache {} = {}\n", bytes_text(model_bytes), weights,
             bytes_text(cached), bytes_text(model_bytes + cached));
  if (stored && stored->experts > 0 && options.weights.empty()) {
    int64_t layers = 0;
    for (int64_t i = 0; i < config.num_hidden_layers + config.num_mtp_layers; ++i)
      layers += config.is_moe_layer(i) ? 1 : 0;
    const auto every_token = static_cast<double>(stored->bytes - stored->experts);
    const double of_layer = static_cast<double>(stored->experts * config.num_experts_per_tok) /
                            static_cast<double>(std::max<int64_t>(layers * config.n_routed_experts, 1));
    fmt::print(
        "from the disk  in {} or more of memory: {} that every token reads, {} for a layer's experts\n",
        bytes_text(every_token + of_layer), bytes_text(every_token), bytes_text(of_layer));
  }
  fmt::print(
      "decode         reads {} a token at context {}\n",
      bytes_text(decode_bytes(config, options.context, weight_bytes, static_cast<double>(cache_bytes))),
      options.context);
  fmt::print(
      "operations     {:.3f} GFLOP a token forward (training: ×3, mean context {}), {:.3f} decoding at "
      "context {}\n",
      forward_flops(config, options.context / 2, false) / 1e9, options.context / 2,
      forward_flops(config, options.context, true) / 1e9, options.context);
  if (stored) print_stored(*stored, parameters);
}

}  // namespace

void add_inspect(CLI::App& app) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* command =
      app.add_subcommand("inspect", "Parameters, cache, memory and operations of a model or a config.json");
  command->add_option("model", options->model, "Model directory, GGUF file or config.json")->required();
  command->add_option("--context", options->context, "Tokens of context")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--batch", options->batch, "Sequences held at once")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--weights", options->weights,
                      "Type of the weights in memory [bf16; of GGUF files and converted models as stored]");
  command->add_option("--cache", options->cache, "Type of the cache")->capture_default_str();
  command->callback([options] { inspect(*options); });
}

}  // namespace latente
