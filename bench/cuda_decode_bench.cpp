// Decoding passes on a GPU: one token of each of --batch sequences with --context entries in their caches,
// random weights of a config.json's shape, bfloat16 or as --weights says. Microseconds a pass, tokens a
// second, and the share of the bytes' bound: weights (of experts, as many as so many uniform choices reach on
// average) and latents, over what a copy of 1 GB moves in the same run.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <numeric>

#include "base/random.h"
#include "cuda/backend.h"
#include "infer/runner.h"
#include "model/moe.h"
#include "model/run_weights.h"
#include "tensor/device.h"

namespace latente {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <class F>
double median_seconds(Backend& device, int count, int calls, const F& f) {
  f(), f(), f();  // sets up, records, replays
  std::vector<double> times;
  for (int i = 0; i < count; ++i) {
    device.synchronize();
    const double begin = now();
    for (int c = 0; c < calls; ++c) f();
    device.synchronize();
    times.push_back((now() - begin) / calls);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

class Bench {
 public:
  Bench(const std::string& path, const std::string& weights, double copy_rate, cuda::CudaBackend& device)
      : device_(device), rate_(copy_rate) {
    if (weights == "bf16") {
      fill_model(Config::from_file(path));
      return;
    }
    RunWeights how;
    how.type = weights;
    model_ = load_for_running(ModelSource{Config::from_file(path), nullptr}, how, device_);
  }

  void run(int64_t batch, int64_t context, int64_t passes, const Choice& choice, bool profile) {
    RunnerOptions options;
    options.context = std::max<int64_t>(context + 64, 4096);  // of block tables
    options.sequences = batch;
    options.cache_type = DType::bf16;
    const int64_t pages = (context + 64 + options.page_size - 1) / options.page_size;
    options.pages = batch * pages;
    Runner runner(device_, *model_, options);
    for (int64_t s = 0; s < batch; ++s) {
      for (int64_t i = 0; i < pages; ++i) runner.set_page(s, i, static_cast<int32_t>(s * pages + i));
    }
    fill(runner);
    std::vector<Runner::Pass> chain;
    auto pass = [&] {
      chain.assign(static_cast<size_t>(passes), {});
      for (int64_t p = 0; p < passes; ++p) {
        for (int64_t s = 0; s < batch; ++s) {
          const auto token =
              static_cast<int32_t>(random_.below(static_cast<uint64_t>(runner.config().vocab_size)));
          Choice its = choice;
          its.set_number(random_.uniform());
          chain[static_cast<size_t>(p)].rows.push_back(
              {token, static_cast<int32_t>(context + p), static_cast<int32_t>(s), 0, -1, true, its,
               p == 0 ? -1 : static_cast<int32_t>((p - 1) * batch + s)});
        }
      }
      runner.run(chain, Runner::Asked::tokens);
    };
    const double seconds = median_seconds(device_, 7, 20, pass) / static_cast<double>(passes);
    const double bound = bytes(batch, context) / rate_;
    fmt::print("batch {:>3}, context {:>6}: {:9.1f} us a pass, {:9.1f} tok/s, bound {:8.1f} us, {:5.1f} %\n",
               batch, context, seconds * 1e6, static_cast<double>(batch) / seconds, bound * 1e6,
               100 * bound / seconds);
    std::fflush(stdout);
    if (!profile) return;
    std::map<std::string, double> times;
    runner.profile_into(&times);
    for (int i = 0; i < 20; ++i) pass();
    for (const auto& [name, time] : times)
      fmt::print("    {:<40} {:8.1f} us a pass\n", name, time / 20 * 1e6);
  }

 private:
  // Weights that repeat after some millions, on the device at once.
  void fill_model(const Config& config) {
    model_ = std::make_unique<Transformer>(config, DType::bf16);
    constexpr int64_t period = (int64_t{1} << 22) + 8 * 1013;
    std::vector<float> values(static_cast<size_t>(period));
    for (float& x : values) x = static_cast<float>(config.initializer_range * random_.normal());
    std::map<DType, Tensor> random;
    for (const DType type : {DType::bf16, DType::f32}) {
      const Tensor& to = random[type] = buffer(device_, {period}, type);
      HostWriter writer(device_, to.view());
      convert(DType::f32, values.data(), type, writer.view().data, period);
      writer.finish();
    }
    model_->for_each([&](const std::string& path, Tensor& tensor) {
      allocate(device_, tensor);
      if (path.find("norm") != std::string::npos) return device_.fill(tensor.view(), 1);
      if (path.ends_with("bias")) return device_.fill(tensor.view(), 0);
      const int64_t count = tensor.count();
      const View all(tensor.view().data, {count}, tensor.dtype()), from = random.at(tensor.dtype()).view();
      for (int64_t done = 0; done < count; done += period) {
        const int64_t piece = std::min(period, count - done);
        device_.copy(columns_of(from, 0, piece), {columns_of(all, done, done + piece), false});
      }
    });
    for (auto& [path, gate] : model_->gates()) allocate(device_, gate->load);
  }

  // Random entries, one page's everywhere.
  void fill(Runner& runner) {
    for (const LayerCache& cache : runner.caches()) {
      const Tensor& keys = cache.keys;
      const Tensor page = keys.rows(0, 1);
      std::vector<float> values(static_cast<size_t>(page.count()));
      for (float& x : values) x = static_cast<float>(random_.normal());
      HostWriter writer(device_, page.view());
      convert(DType::f32, values.data(), DType::bf16, writer.view().data, page.count());
      writer.finish();
      for (int64_t done = 1; done < keys[0]; done *= 2) {
        const int64_t count = std::min(done, keys[0] - done);
        device_.copy(keys.rows(0, count).view(), {keys.rows(done, done + count).view(), false});
      }
    }
  }

  double bytes(int64_t batch, int64_t context) {
    const Config& config = model_->config();
    const double experts = static_cast<double>(config.n_routed_experts);
    const double reached = experts > 0
                               ? 1 - std::pow(1 - static_cast<double>(config.num_experts_per_tok) / experts,
                                              static_cast<double>(batch))
                               : 0;
    double sum = 0;
    for (const Layer& layer : model_->model.layers) {
      const Mla* mla = std::get_if<Mla>(&layer.self_attn);
      if (!mla || !mla->w_uk) continue;
      sum += static_cast<double>(bytes_of_weight(device_, mla->w_uk.view()) +
                                 bytes_of_weight(device_, mla->w_uv.view()));
    }
    model_->for_each([&](const std::string& path, Tensor& tensor) {
      for (int64_t k = 0; k < config.num_mtp_layers; ++k) {
        if (path.starts_with(model_->mtp_path(k) + ".")) return;
      }
      if (path == "model.embed_tokens.weight" && model_->lm_head) return;
      if (path.ends_with("kv_b_proj.weight") && is_quantised(tensor.dtype())) return;  // its halves, above
      sum += static_cast<double>(bytes_of_weight(device_, tensor.view())) *
             (is_expert_stack(path) ? reached : 1);
    });
    return sum + static_cast<double>(batch * context * 2 * (config.kv_lora_rank + config.qk_rope_head_dim) *
                                     config.num_hidden_layers);
  }

  cuda::CudaBackend& device_;
  double rate_;
  std::unique_ptr<Transformer> model_;
  Random random_{1};
};

int run(int argc, char** argv) {
  CLI::App app("How long a pass of decoding takes, with random weights of a config.json's shape");
  std::string config, weights = "bf16";
  std::vector<int64_t> batches = {1}, contexts = {64};
  bool profile = false;
  int64_t passes = 1;
  Choice choice;
  app.add_option("config", config)->required();
  app.add_option("--weights", weights, "bf16, fp8, int8 or int4");
  app.add_option("--batch", batches, "sequences in a pass")->delimiter(',');
  app.add_option("--context", contexts, "tokens that each has in the cache")->delimiter(',');
  app.add_option("--passes", passes, "that follow one another in a graph, up to 64");
  double temperature = 0;
  app.add_option("--temperature", temperature, "0 = the most likely token");
  app.add_option("--top-p", choice.top_p, "share of the probability to choose from");
  app.add_flag("--profile", profile, "the time of each op as well");
  CLI11_PARSE(app, argc, argv);
  choice.set_temperature(temperature);
  cuda::CudaBackend device;
  double rate = 0;
  {
    const int64_t count = int64_t{1} << 28;
    const Tensor from = buffer(device, {count}, DType::f32), to = buffer(device, {count}, DType::f32);
    device.fill(from.view(), 1.5);
    rate = 8.0 * static_cast<double>(count) / median_seconds(device, 7, 10, [&] {
             device.copy(from.view(), {to.view(), false});
           });
  }
  fmt::print("{}: a copy of 1 GB moves {:.2f} TB/s; {}, {}\n", device.name(), rate / 1e12, config, weights);
  Bench bench(config, weights, rate, device);
  for (const int64_t context : contexts) {
    for (const int64_t batch : batches) bench.run(batch, context, passes, choice, profile);
  }
  return 0;
}

}  // namespace
}  // namespace latente

int main(int argc, char** argv) {
  try {
    return latente::run(argc, argv);
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
