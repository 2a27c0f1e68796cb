// A training run: data, objective, optimizer, schedules, load balance, validation, samples and saved states,
// from TrainOptions. It never prints: whoever wants to see it gives an observer.
//
//   Trainer trainer(backend, options, observer);   // reads data and records; memory is estimated, not yet
//   taken trainer.start(Trainer::Start::resume);         // takes memory; initial weights, or those of the
//   last state trainer.run();                                 // to the last step, or until stop() says so
//
// A run that was resumed is the run that was not interrupted, bit for bit, on the same machine and number of
// threads.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>

#include "base/directory_lock.h"
#include "checkpoint/checkpoint.h"
#include "tokenizer/tokenizer.h"
#include "train/pass.h"
#include "train/train_options.h"

namespace latente {

// Bytes a run needs, known before any is taken.
struct MemoryEstimate {
  int64_t weights = 0, gradients = 0, optimizer = 0, activations = 0, inputs = 0;
  int64_t total() const { return weights + gradients + optimizer + activations + inputs; }
};

struct RunFacts {
  int64_t steps = 0, accumulation = 1;  // micro-batches a step
  int64_t sequences = 0, length = 0;    // of a micro-batch
  int64_t parameters = 0, active = 0, mtp = 0;
  int64_t train_tokens = 0, train_bytes = 0, validation_tokens = 0;
  int64_t windows = 0;         // sequences an epoch
  double flops_per_token = 0;  // forward and backward
  MemoryEstimate memory;
  int64_t available_memory = 0;
  double recomputed_share = 0;     // of the forward pass, again for the backward pass: for want of memory
  std::vector<std::string> notes;  // skipped states, a damaged cache: worth a line each
};

struct StepReport {
  int64_t step = 0;  // steps done, this one included
  LossSums losses;
  double objective = 0, learning_rate = 0, gradient_norm = 0;
  double seconds = 0, tokens_per_second = 0, flops_per_second = 0;
  int64_t tokens = 0;       // a step
  int64_t tokens_seen = 0;  // by the run
  double epoch = 0;
  // Averages over the routers (none for a dense model).
  int64_t routers = 0;
  double max_violation = 0, load_entropy = 0;
  int64_t dead_experts = 0;
  double seconds_left = 0;
};

struct ValidationReport {
  int64_t step = 0;
  LossSums losses;
};

struct SampleReport {
  int64_t step = 0;
  std::string prompt, text;
};

class TrainObserver {
 public:
  virtual ~TrainObserver() = default;
  virtual void on_corpus(const CorpusProgress&) {}
  virtual void on_start(int64_t /*first_step*/) {}
  virtual void on_step(const StepReport&) {}
  virtual void on_validation(const ValidationReport&) {}
  virtual void on_sample(const SampleReport&) {}
  virtual void on_saved(int64_t /*step*/, const std::string& /*directory*/) {}
  // Asked between steps; true saves and ends the run.
  virtual bool stop() { return false; }
};

class Trainer {
 public:
  enum class Purpose {
    run,    // takes the run's directory: Error while another process, or Trainer, has it
    facts,  // leaves the directory alone; start() is not allowed
  };
  // Error, before anything large is allocated: options, files, a corpus or a model that cannot be.
  Trainer(Backend& backend, const TrainOptions& options, TrainObserver& observer,
          Purpose purpose = Purpose::run);
  ~Trainer();

  const RunFacts& facts() const { return facts_; }
  // The options with what was left to be chosen filled in.
  const TrainOptions& options() const { return options_; }

  enum class Start {
    fresh,      // Error when the directory holds states of a run already
    resume,     // from the last good state; fresh when there is none
    overwrite,  // removes the states
  };
  // Error when the memory does not suffice.
  void start(Start how);
  // Error on a loss or gradient that is not finite, naming where it arose; the last saved state stays as it
  // was. True when the last step was reached, and the model written to OUT/model.
  bool run();
  int64_t step() const { return step_; }

  // Time by op of the training passes, measured when asked for before run().
  void profile() { mode_ = Pass::Mode::profiled; }
  std::map<std::string, double> seconds_by_op() const;

 private:
  void read_model_options();
  void read_corpus();
  void record();
  void choose_sequences();
  void record_passes(bool may_recompute);
  MemoryEstimate estimate_memory() const;
  Batches make_batches(const Corpus& corpus, bool validation) const;
  StepReport step_once();
  void run_micro_batches(std::span<const double> weights, LossSums& sums, Pass::Mode mode);
  void add_load_figures(StepReport& report) const;
  void update_biases(double rate);
  [[noreturn]] void report_not_finite(const std::vector<double>& weights);
  void validate();
  void sample();
  void save();
  void write_model(const std::string& directory);
  double mtp_lambda() const;

  Backend* backend_;
  TrainOptions options_;
  TrainObserver* observer_;
  std::optional<DirectoryLock> lock_;  // of options.out
  Pass::Mode mode_ = Pass::Mode::plain;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Transformer> model_;
  std::unique_ptr<Checkpoint> initial_;  // options.model.from
  Corpus validation_corpus_;
  std::vector<int32_t> token_bytes_;
  std::optional<Batches> batches_;
  Tensor rope_table_;
  // Of a step the first micro-batch writes gradients (training_), further ones add to them (adding_, or
  // null).
  std::unique_ptr<Pass> training_, adding_, validation_;
  bool beside_ = false;  // PlanOptions::beside, of both
  GradientMemory gradients_;
  std::unique_ptr<Optimizer> optimizer_;
  std::vector<Batch> micro_batches_;
  std::vector<std::vector<float>> loads_;  // of each router, in the last step
  RepeatedWork bias_work_;
  double bias_rate_ = 0;  // of bias_work_
  RunFacts facts_;
  int64_t step_ = 0, saved_step_ = -1, validated_step_ = -1;
  double seconds_per_step_ = 0;                  // running average
  std::chrono::steady_clock::time_point began_;  // the step
};

}  // namespace latente
