// What a training run shows in the terminal.
#pragma once

#include <string>

#include "status_line.h"
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
  StatusLine line_;
  double peak_flops_ = 0;
};

}  // namespace latente
