// What speculation gains or costs, by workload and by how many sequences run at once: an engine that decodes
// plainly and one that drafts as it sees fit answer the same prompts in one process, taking turns step by
// step, so that what else the machine does strikes both. One JSON object a line.
//
//     speculation MODEL --own TEXT --other TEXT [--sequences 1,4,16,64] [--tokens 256] [--rounds 3]
//
// Workloads: text of the model's own kind, another text, tokens at random, and one phrase again and again.
// ratio: the drafting engine's tokens a second beside the plain one's while writing, the median of the rounds
// with both ends; begin: the same from the prompts on. Greedy texts must be equal.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>

#include "base/file.h"
#include "cpu/cpu_backend.h"
#include "infer/engine.h"
#include "model/run_weights.h"
#include "tokenizer/tokenizer.h"

namespace latente {
namespace {

struct Options {
  std::string model, weights = "auto", own, other;
  std::vector<int64_t> sequences = {1, 4, 16, 64};
  std::vector<double> temperatures = {0, 1};
  std::vector<std::string> workloads = {"own", "other", "random", "repeated"};
  int64_t tokens = 256, prompt = 32, rounds = 3, draft = -1;
  int threads = 0;
};

using Prompts = std::vector<std::vector<int32_t>>;

// An engine and what it has done.
class Side {
 public:
  Side(Backend& backend, const Transformer& model, const Options& options, const Prompts& prompts,
       double temperature, int64_t draft)
      : engine_(backend, model, runner_options(options, prompts)), texts_(prompts.size()) {
    for (size_t i = 0; i < prompts.size(); ++i) {
      Request request;
      request.prompt = prompts[i];
      request.options.max_tokens = options.tokens;
      request.options.sampling.temperature = temperature;
      request.options.sampling.seed = i;
      request.options.draft = draft;
      request.options.repeatable = false;
      request.on_token = [this, i](GeneratedToken token) {
        texts_[i].push_back(token.id);
        return true;
      };
      request.on_finish = [this](const GenerationStats& stats) {
        drafted += stats.drafted, accepted += stats.accepted;
      };
      engine_.submit(std::move(request));
    }
  }

  void step() {
    const bool reads = reading();
    const auto begin = std::chrono::steady_clock::now();
    goes_on_ = engine_.step();
    const double time = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    seconds += time;
    (reads ? reading_seconds : writing_seconds) += time;
  }
  bool goes_on() const { return goes_on_; }
  bool reading() const {
    return std::any_of(texts_.begin(), texts_.end(), [](const auto& text) { return text.empty(); });
  }
  const Prompts& texts() const { return texts_; }

  double seconds = 0, reading_seconds = 0, writing_seconds = 0;
  int64_t drafted = 0, accepted = 0;

 private:
  static RunnerOptions runner_options(const Options& options, const Prompts& prompts) {
    RunnerOptions runner;
    runner.context = options.prompt + options.tokens + 8;
    runner.sequences = static_cast<int64_t>(prompts.size());
    return runner;
  }

  Engine engine_;
  Prompts texts_;
  bool goes_on_ = true;
};

class Bench {
 public:
  explicit Bench(const Options& options) : options_(options), backend_(options.threads) {
    RunWeights weights;
    weights.type = options.weights;
    model_ = load_for_running(open_model(options.model), weights, backend_);
  }

  void run() {
    for (const std::string& workload : options_.workloads) {
      for (const double temperature : options_.temperatures) {
        for (const int64_t sequences : options_.sequences) measure(workload, temperature, sequences);
      }
    }
  }

 private:
  std::vector<int32_t> random_tokens(int64_t count) {
    std::vector<int32_t> ids(static_cast<size_t>(count));
    for (int32_t& id : ids)
      id = static_cast<int32_t>(random_.below(static_cast<uint64_t>(model_->config().vocab_size)));
    return ids;
  }

  Prompts prompts_of(const std::string& workload, int64_t sequences) {
    Prompts prompts;
    const auto length = static_cast<size_t>(options_.prompt);
    if (workload == "own" || workload == "other") {
      const std::string& path = workload == "own" ? options_.own : options_.other;
      const std::vector<int32_t> ids =
          Tokenizer::load(options_.model).encode(read_file(path).substr(0, 4 << 20));
      if (ids.size() <= length) fail("{}: expected more than {} tokens, found {}", path, length, ids.size());
      for (int64_t i = 0; i < sequences; ++i) {
        const auto at = ids.begin() + static_cast<ptrdiff_t>(random_.below(ids.size() - length));
        prompts.emplace_back(at, at + static_cast<ptrdiff_t>(length));
      }
    } else if (workload == "random") {
      for (int64_t i = 0; i < sequences; ++i) prompts.push_back(random_tokens(options_.prompt));
    } else if (workload == "repeated") {
      for (int64_t i = 0; i < sequences; ++i) {
        const std::vector<int32_t> phrase = random_tokens(8);
        prompts.emplace_back();
        for (size_t k = 0; k < length; ++k) prompts.back().push_back(phrase[k % phrase.size()]);
      }
    } else {
      fail("--workloads: expected own, other, random or repeated, found {}", workload);
    }
    return prompts;
  }

  void measure(const std::string& workload, double temperature, int64_t sequences) {
    struct Round {
      double writing, whole;
    };
    std::vector<Round> rounds;
    int64_t drafted = 0, accepted = 0, tokens = 0;
    double plain_seconds = 0;
    for (int64_t i = 0; i < options_.rounds; ++i) {
      const Prompts prompts = prompts_of(workload, sequences);
      Side plain(backend_, *model_, options_, prompts, temperature, 0);
      Side drafting(backend_, *model_, options_, prompts, temperature, options_.draft);
      while (plain.goes_on() || drafting.goes_on()) {
        const bool first = !drafting.goes_on() || (plain.goes_on() && plain.seconds <= drafting.seconds);
        (first ? plain : drafting).step();
      }
      if (temperature == 0 && plain.texts() != drafting.texts())
        fail("{}, {} sequences: the texts differ", workload, sequences);
      rounds.push_back({plain.writing_seconds / drafting.writing_seconds, plain.seconds / drafting.seconds});
      drafted += drafting.drafted, accepted += drafting.accepted;
      for (const auto& text : plain.texts()) tokens += static_cast<int64_t>(text.size());
      plain_seconds += plain.writing_seconds;
    }
    const auto quantile = [&](double Round::*what, double at) {
      std::vector<double> values;
      for (const Round& round : rounds) values.push_back(round.*what);
      std::sort(values.begin(), values.end());
      return values[static_cast<size_t>(at * static_cast<double>(values.size() - 1) + 0.5)];
    };
    fmt::print(
        "{{\"workload\":\"{}\",\"temperature\":{},\"sequences\":{},\"plain_tok_s\":{:.0f},\"ratio\":{:.3f},"
        "\"low\":{:.3f},\"high\":{:.3f},\"begin\":{:.3f},\"drafted\":{:.3f},\"acceptance\":{:.3f}}}\n",
        workload, temperature, sequences, static_cast<double>(tokens) / plain_seconds,
        quantile(&Round::writing, 0.5), quantile(&Round::writing, 0), quantile(&Round::writing, 1),
        quantile(&Round::whole, 0.5), static_cast<double>(drafted) / static_cast<double>(tokens),
        drafted > 0 ? static_cast<double>(accepted) / static_cast<double>(drafted) : 0.0);
    std::fflush(stdout);
  }

  const Options& options_;
  CpuBackend backend_;
  std::unique_ptr<Transformer> model_;
  Random random_{1};
};

}  // namespace
}  // namespace latente

int main(int argc, char** argv) try {
  latente::Options options;
  CLI::App app("What speculation gains or costs");
  app.add_option("model", options.model)->required()->check(CLI::ExistingPath);
  app.add_option("--weights", options.weights)->capture_default_str();
  app.add_option("--own", options.own, "Text of the model's own kind");
  app.add_option("--other", options.other, "Another text");
  app.add_option("--workloads", options.workloads)->delimiter(',')->capture_default_str();
  app.add_option("--temperatures", options.temperatures)->delimiter(',')->capture_default_str();
  app.add_option("--sequences", options.sequences)->delimiter(',')->capture_default_str();
  app.add_option("--tokens", options.tokens, "Written by each sequence")->capture_default_str();
  app.add_option("--prompt", options.prompt, "Tokens of a prompt")->capture_default_str();
  app.add_option("--rounds", options.rounds)->capture_default_str();
  app.add_option("--draft", options.draft, "-1 = as many as pay")->capture_default_str();
  app.add_option("--threads", options.threads)->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  latente::Bench(options).run();
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 1;
}
