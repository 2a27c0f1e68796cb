// What a training run shows in the terminal: one live line where there is a terminal, plain lines elsewhere.
#pragma once

#include <chrono>
#include <string>

#include "train/trainer.h"

namespace latente {

class TrainDisplay {
 public:
  explicit TrainDisplay(double peak_flops) : peak_flops_(peak_flops) {}

  void corpus(const CorpusProgress& progress);
  void facts(const RunFacts& facts, const TrainOptions& options);
  void step(const StepReport& report, int64_t steps);
  void validation(const ValidationReport& report);
  void sample(const SampleReport& report);
  // A line that stays.
  void note(const std::string& text);

 private:
  // Replaced by the next one; without a terminal printed every ten seconds at most, unless it is the last.
  void live(const std::string& text, bool last);
  void clear();

  double peak_flops_ = 0;
  bool shown_ = false;
  std::chrono::steady_clock::time_point printed_{};
};

}  // namespace latente
