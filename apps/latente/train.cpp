// latente train: pretrains a model from a TOML file.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <csignal>

#include "base/file.h"
#include "base/memory.h"
#include "base/options.h"
#include "commands.h"
#include "device.h"
#include "profile.h"
#include "train/metrics.h"
#include "train_display.h"

namespace latente {
namespace {

struct TrainFlags {
  std::string config, device;
  std::vector<std::string> set;
  bool resume = false, overwrite = false, profile = false, dry_run = false;
};

std::atomic<int> interrupts = 0;

// The first Ctrl-C (or SIGTERM) asks for an end with a save; the second ends at once.
void ask_to_stop() {
  struct sigaction action {};
  action.sa_handler = [](int signal) {
    if (++interrupts < 2) return;
    std::signal(signal, SIG_DFL);
    std::raise(signal);
  };
  action.sa_flags = SA_RESTART;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

// Shows a run and records its figures.
class Watcher final : public TrainObserver {
 public:
  Watcher(const TrainOptions& options, const Device& device, double peak_flops)
      : options_(options), device_(device), peak_flops_(peak_flops), display_(peak_flops) {}

  TrainDisplay& display() { return display_; }
  void set_steps(int64_t steps) { steps_ = steps; }
  int64_t most_memory() const { return most_memory_; }  // after any step

  void on_corpus(const CorpusProgress& progress) override { display_.corpus(progress); }

  void on_start(int64_t first_step) override {
    if (first_step > 0) display_.note(fmt::format("resumed     after step {}", first_step));
    // Also from the beginning: the directory may hold figures of a run that was overwritten, or ended before
    // it saved.
    int64_t resumed_at = first_step + 1;
    writers_.push_back(std::make_unique<JsonlWriter>(options_.out + "/metrics.jsonl", resumed_at));
    if (options_.log.tensorboard) {
      writers_.push_back(std::make_unique<TensorBoardWriter>(options_.out + "/tensorboard", resumed_at));
    }
  }

  void on_step(const StepReport& report) override {
    Metrics metrics{report.step, {}};
    add_losses(metrics, "train/", report.losses);
    metrics.add("train/objective", report.objective);
    metrics.add("train/learning_rate", report.learning_rate);
    metrics.add("train/gradient_norm", report.gradient_norm);
    metrics.add("train/tokens", report.tokens_seen);
    metrics.add("train/epoch", report.epoch);
    if (report.routers > 0) {
      metrics.add("experts/balance_loss", report.losses.balance);
      metrics.add("experts/max_violation", report.max_violation);
      metrics.add("experts/load_entropy", report.load_entropy);
      metrics.add("experts/dead", report.dead_experts);
    }
    metrics.add("speed/tokens_per_second", report.tokens_per_second);
    metrics.add("speed/flops_per_second", report.flops_per_second);
    if (peak_flops_ > 0) metrics.add("speed/share_of_peak", report.flops_per_second / peak_flops_);
    const int64_t memory = device_.used_memory();
    most_memory_ = std::max(most_memory_, memory);
    metrics.add("memory/used", memory);
    write(metrics);
    display_.step(report, steps_);
  }

  void on_validation(const ValidationReport& report) override {
    Metrics metrics{report.step, {}};
    add_losses(metrics, "validation/", report.losses);
    write(metrics);
    display_.validation(report);
  }

  void on_sample(const SampleReport& report) override {
    Metrics metrics{report.step, {}};
    metrics.add("sample", report.prompt + "|" + report.text);
    write(metrics);
    display_.sample(report);
  }

  void on_saved(int64_t step, const std::string& directory) override {
    display_.note(fmt::format("saved       step {} in {}", step, directory));
  }

  bool stop() override { return interrupts > 0; }

 private:
  static void add_losses(Metrics& metrics, const std::string& prefix, const LossSums& losses) {
    metrics.add(prefix + "loss", losses.depths[0].mean());
    for (size_t k = 1; k < losses.depths.size(); ++k) {
      metrics.add(prefix + fmt::format("mtp{}_loss", k), losses.depths[k].mean());
    }
    if (losses.bytes > 0) metrics.add(prefix + "bits_per_byte", losses.bits_per_byte());
    if (losses.compared > 0) metrics.add(prefix + "mtp_acceptance", losses.acceptance());
  }

  void write(const Metrics& metrics) {
    for (auto& writer : writers_) writer->write(metrics);
  }

  TrainOptions options_;
  const Device& device_;
  double peak_flops_ = 0;
  int64_t steps_ = 0, most_memory_ = 0;
  TrainDisplay display_;
  std::vector<std::unique_ptr<MetricWriter>> writers_;
};

void train(const TrainFlags& flags) {
  auto options = load_options<TrainOptions>(flags.config);
  for (const std::string& assignment : flags.set) override_option(options, assignment);
  if (!flags.device.empty()) options.device = flags.device;
  Device device(options.device, options.threads);
  const DType weights = dtype_from_name(options.model.dtype).value_or(DType::f32);
  double peak = options.log.peak_gflops > 0 ? options.log.peak_gflops * 1e9 : device.measure_peak(weights);
  Watcher watcher(options, device, peak);
  Trainer trainer(device.backend(), options, watcher,
                  flags.dry_run ? Trainer::Purpose::facts : Trainer::Purpose::run);
  watcher.set_steps(trainer.facts().steps);
  watcher.display().facts(trainer.facts(), trainer.options());
  if (flags.dry_run) return;
  if (flags.profile) trainer.profile();
  Trainer::Start how = flags.resume      ? Trainer::Start::resume
                       : flags.overwrite ? Trainer::Start::overwrite
                                         : Trainer::Start::fresh;
  size_t notes = trainer.facts().notes.size();
  trainer.start(how);
  for (size_t i = notes; i < trainer.facts().notes.size(); ++i) {
    watcher.display().note("note        " + trainer.facts().notes[i]);
  }
  write_file_atomically(options.out + "/config.toml", write_options(trainer.options()));
  ask_to_stop();
  bool finished = trainer.run();
  watcher.display().note(
      finished ? fmt::format("finished    {}/model holds the model; at most {} were used", options.out,
                             bytes_text(static_cast<double>(watcher.most_memory())))
               : fmt::format("stopped     after step {}; --resume goes on", trainer.step()));
  if (flags.profile) print_profile(trainer.seconds_by_op());
}

}  // namespace

void add_train(CLI::App& app) {
  auto flags = std::make_shared<TrainFlags>();
  CLI::App* command = app.add_subcommand("train", "Pretrain a model on text");
  command
      ->add_option("config", flags->config, "The run, a TOML file (examples/train.toml explains every key)")
      ->required()
      ->check(CLI::ExistingFile);
  command->add_option("--set", flags->set, "Override a key: --set schedule.lr=1e-3 (may be repeated)")
      ->expected(1)
      ->take_all();
  auto* resume =
      command->add_flag("--resume", flags->resume, "Go on from the last saved state, if there is one");
  command->add_option(
      "--device", flags->device,
      "cpu, cuda, cuda:N (the N-th GPU) or auto: a GPU where there is one [as the TOML file says]");
  command->add_flag("--overwrite", flags->overwrite, "Forget the states of an earlier run")->excludes(resume);
  command->add_flag("--dry-run", flags->dry_run,
                    "Print what would be done and the memory it takes, then stop");
  command->add_flag("--profile", flags->profile, "Print the time each op took");
  command->callback([flags] { train(*flags); });
}

}  // namespace latente
