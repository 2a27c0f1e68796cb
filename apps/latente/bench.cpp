// latente bench: how fast a model, or a model of some shape, reads prompts and writes on this machine.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/memory.h"
#include "base/random.h"
#include "commands.h"
#include "device.h"
#include "infer/sequence_runner.h"
#include "model/figures.h"
#include "model/gguf.h"
#include "model/model_source.h"
#include "model/run_weights.h"
#include "profile.h"
#include "session.h"
#include "status_line.h"
#include "tensor/device.h"

namespace latente {
namespace {

struct BenchOptions {
  std::string model, cache = "auto", device = "cpu";
  RunWeights weights;
  int64_t prompt = 512, generate = 128, repeat = 3;
  std::vector<int64_t> depths = {0};
  ThreadOptions threads;
  bool json = false, profile = false;
};

struct Row {
  std::string kind;
  int64_t tokens = 0, depth = 0;
  double per_second = 0, best = 0, spread = 0, bound = 0;
  double bandwidth = 0;                         // of memory beside the runs, where that is the bound
  std::optional<Residency::Figures> experts{};  // of the measured runs, where they are read from the disk
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

class Bench {
 public:
  explicit Bench(const BenchOptions& options) : options_(options), device_(options.device, options.threads) {
    const auto start = std::chrono::steady_clock::now();
    // A config.json alone.
    const bool random = !std::filesystem::is_directory(options.model) && !is_gguf(options.model);
    const ModelSource source =
        random ? ModelSource{Config::from_file(options.model), nullptr} : open_model(options.model);
    model_ = load_for_running(source, options.weights, device_.backend());
    weights_ = type_text(*model_);
    announce_experts(*model_);
    load_seconds_ = seconds_since(start);

    RunnerOptions runner;
    runner.context = *std::max_element(options.depths.begin(), options.depths.end()) +
                     std::max(options.prompt, options.generate) + 1;
    runner.cache_type = cache_type_from_name(options.cache, device_.backend(), *model_);
    cache_ = name_of(runner.cache_type);
    runner_ = std::make_unique<SequenceRunner>(device_.backend(), *model_, runner);

    // On a GPU what meets them is bfloat16.
    bytes_multiplied_ = weights_.starts_with("int") && device_.backend().is_host();
    peak_ = device_.measure_peak(bytes_multiplied_ ? DType::q8 : model_->weights());
  }

  void run() {
    if (!options_.json) {
      std::printf("%s, %s weights, %s cache, %s; loaded in %.1f s, %s\n", options_.model.c_str(),
                  weights_.c_str(), cache_.c_str(), device_.describe().c_str(), load_seconds_,
                  bytes_text(static_cast<double>(resident_memory())).c_str());
      std::printf("memory reads %.1f GB/s; products %.0f %s\n\n", device_.measure_bandwidth() / 1e9,
                  peak_ / 1e9, bytes_multiplied_ ? "GOP/s in 8 bits" : "GFLOP/s");
      std::printf("%-8s %7s %7s %12s %8s %12s\n", "", "tokens", "depth", "tok/s", "spread", "of the bound");
    }
    for (int64_t depth : options_.depths) {
      fill_to(depth);
      if (options_.prompt > 0) show(prefill(depth));
      if (options_.generate > 0) show(decode(depth));
    }
  }

 private:
  static constexpr int64_t most_read = 1024;  // tokens

  std::vector<int32_t> tokens(int64_t count) {
    std::vector<int32_t> ids(static_cast<size_t>(count));
    for (int32_t& id : ids)
      id = static_cast<int32_t>(random_.below(static_cast<uint64_t>(model_->config().vocab_size)));
    return ids;
  }

  void read(int64_t count, int64_t depth) {
    const std::vector<int32_t> ids = tokens(count);
    for (int64_t at = 0; at < count; at += runner_->runner().options().chunk) {
      const int64_t piece = std::min(runner_->runner().options().chunk, count - at);
      runner_->forward(std::span(ids).subspan(static_cast<size_t>(at), static_cast<size_t>(piece)),
                       depth + at, 1);
    }
  }

  // Reads the first pages; those behind them are copies, which take as long to attend to.
  void fill_to(int64_t depth) {
    const int64_t page = runner_->runner().options().page_size;
    const int64_t to_read = std::min(depth, (most_read + page - 1) / page * page);
    if (to_read > filled_) read(to_read - filled_, filled_);
    filled_ = std::max(filled_, to_read);
    for (; filled_ < depth; filled_ += page) {
      const auto at = static_cast<int32_t>(filled_ / page);
      runner_->runner().copy_page(at % static_cast<int32_t>(to_read / page), at);
    }
  }

  // before_each is called before each run and after the last one.
  template <class Body, class BeforeEach>
  Row measure(const char* kind, int64_t count, int64_t depth, const Body& body,
              const BeforeEach& before_each) {
    rates_.clear();
    body();  // records plans, warms caches
    std::map<std::string, double> seconds;
    if (options_.profile) runner_->runner().profile_into(&seconds);
    const Residency* residency = residency_of(*model_);
    const Residency::Figures before = residency ? residency->figures() : Residency::Figures();
    for (int64_t i = 0; i < options_.repeat; ++i) {
      before_each();
      const auto start = std::chrono::steady_clock::now();
      body();
      rates_.push_back(static_cast<double>(count) / seconds_since(start));
    }
    before_each();
    if (options_.profile) {
      runner_->runner().profile_into(nullptr);
      fmt::print("\n{} {} at {}:\n", kind, count, depth);
      print_profile(seconds);
    }
    Row row{kind, count, depth};
    row.per_second = median(rates_);
    const auto [least, most] = std::minmax_element(rates_.begin(), rates_.end());
    row.best = *most;
    row.spread = (*most - *least) / row.per_second;
    if (residency) row.experts = residency->figures().since(before);
    return row;
  }

  Row prefill(int64_t depth) {
    Row row = measure(
        "prefill", options_.prompt, depth, [&] { read(options_.prompt, depth); }, [] {});
    const int64_t context = depth + options_.prompt / 2;  // on average
    row.bound = row.per_second * forward_flops(model_->config(), context, depth > 0) / peak_;
    return row;
  }

  Row decode(int64_t depth) {
    // Each run is held against what memory gave right before and after it: others may use it, too.
    std::vector<double> bandwidths, shares;
    Row row = measure(
        "decode", options_.generate, depth,
        [&] {
          for (int64_t i = 0; i < options_.generate; ++i) runner_->forward(tokens(1), depth + i, 1);
        },
        [&] { bandwidths.push_back(device_.measure_bandwidth()); });
    const int64_t context = depth + options_.generate / 2;  // on average
    const int64_t layers = model_->config().num_hidden_layers;
    const int64_t cache = context * runner_->runner().cache_bytes_per_token() * layers /
                          (layers + model_->config().num_mtp_layers);
    for (size_t i = 0; i < rates_.size(); ++i) {
      const double bandwidth = (bandwidths[i] + bandwidths[i + 1]) / 2;
      shares.push_back(rates_[i] * (active_bytes() + static_cast<double>(cache)) / bandwidth);
    }
    row.bound = median(shares);
    row.bandwidth = median(bandwidths);
    return row;
  }

  // Bytes of weights that the main model's pass over one token reads.
  double active_bytes() {
    const Config& config = model_->config();
    double bytes = 0;
    const auto add = [&](const Tensor& tensor, double share) {
      bytes += share * static_cast<double>(bytes_of_weight(device_.backend(), tensor.view()));
    };
    model_->for_each([&](const std::string& path, Tensor& tensor) {
      for (int64_t k = 0; k < config.num_mtp_layers; ++k) {
        if (path.starts_with(model_->mtp_path(k) + ".")) return;
      }
      if (path == "model.embed_tokens.weight" && model_->lm_head) return;
      if (path.ends_with("kv_b_proj.weight")) return;  // or its two halves, below
      add(tensor, is_expert_stack(path) ? static_cast<double>(config.num_experts_per_tok) /
                                              static_cast<double>(config.n_routed_experts)
                                        : 1.0);
    });
    for (Layer& layer : model_->model.layers) {
      Mla* mla = std::get_if<Mla>(&layer.self_attn);
      if (!mla) continue;
      if (mla->w_uk) {
        add(mla->w_uk, 1), add(mla->w_uv, 1);
      } else {
        add(mla->kv_b_proj.weight, 1);
      }
    }
    return bytes;
  }

  void show(const Row& row) {
    if (options_.json) {
      nlohmann::ordered_json json = {{"kind", row.kind},        {"tokens", row.tokens},
                                     {"depth", row.depth},      {"threads", device_.threads()},
                                     {"weights", weights_},     {"tok_s", row.per_second},
                                     {"best", row.best},        {"spread", row.spread},
                                     {"bound_share", row.bound}};
      if (row.bandwidth > 0) json["bandwidth"] = row.bandwidth;
      if (row.experts) {
        json["experts_wanted"] = row.experts->wanted;
        json["experts_found"] = row.experts->found;
        json["experts_bytes_read"] = row.experts->bytes_read;
        json["experts_seconds_waited"] = row.experts->waited;
        json["experts_resident"] = row.experts->resident;
      }
      std::printf("%s\n", json.dump().c_str());
    } else {
      std::printf("%-8s %7lld %7lld %12.1f %6.1f %% %12s\n", row.kind.c_str(),
                  static_cast<long long>(row.tokens), static_cast<long long>(row.depth), row.per_second,
                  100 * row.spread, share_text(row.bound).c_str());
      if (row.experts) std::printf("  experts: %s\n", describe_experts(*row.experts).c_str());
    }
    std::fflush(stdout);
  }

  const BenchOptions& options_;
  Device device_;
  std::unique_ptr<Transformer> model_;
  std::unique_ptr<SequenceRunner> runner_;
  Random random_{1};
  std::string weights_, cache_;
  std::vector<double> rates_;  // of the last measurement, in order
  double load_seconds_ = 0, peak_ = 0;
  bool bytes_multiplied_ = false;
  int64_t filled_ = 0;
};

}  // namespace

void add_bench(CLI::App& app) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* command = app.add_subcommand(
      "bench", "Measure how fast a model, or a model of a given shape, runs on this machine");
  command
      ->add_option("model", options->model,
                   "Model directory, GGUF file, or a config.json: random weights of that shape")
      ->required()
      ->check(CLI::ExistingPath);
  command->add_option("--prompt", options->prompt, "Tokens read at once; 0 = none")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 20));
  command->add_option("--gen", options->generate, "Tokens written one by one; 0 = none")
      ->capture_default_str()
      ->check(CLI::Range(0, 1 << 20));
  command
      ->add_option("--depth", options->depths,
                   "Tokens in the cache before that (beyond 1024 copies of its first pages); several are "
                   "measured in turn")
      ->capture_default_str()
      ->delimiter(',')
      ->check(CLI::Range(0, 1 << 22));
  options->weights.copied = true;
  add_weight_options(*command, options->weights);
  add_cache_option(*command, options->cache);
  add_device_option(*command, options->device);
  add_threads_option(*command, options->threads);
  command->add_option("--repeat", options->repeat, "Runs of each; the median is shown")
      ->capture_default_str()
      ->check(CLI::Range(1, 1000));
  auto* profile = command->add_flag("--profile", options->profile, "Show the time of each op, too");
  command->add_flag("--json", options->json, "An object a line")->excludes(profile);
  command->callback([options] { Bench(*options).run(); });
}

}  // namespace latente
