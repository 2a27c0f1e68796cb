// Learning-rate schedules: pure functions of the step.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <utility>

#include "base/fields.h"
#include "base/options.h"

namespace latente {

enum class ScheduleKind {
  constant,  // after the warm-up
  cosine,    // from lr to min_lr over all the steps after the warm-up
  wsd,       // warm-up, stable, decay: lr until the last decay_share of the steps, then down to min_lr
             // (Hu et al., arXiv:2404.06395)
  deepseek,  // DeepSeek-V3's (arXiv:2412.19437, section 4.2): constant, cosine to min_lr, constant, final_lr
};
enum class DecayShape { linear, cosine, sqrt };  // sqrt: 1 − √x, which falls fastest at first

template <>
struct EnumNames<ScheduleKind> {
  static constexpr std::pair<std::string_view, ScheduleKind> values[] = {
      {"constant", ScheduleKind::constant},
      {"cosine", ScheduleKind::cosine},
      {"wsd", ScheduleKind::wsd},
      {"deepseek", ScheduleKind::deepseek}};
};
template <>
struct EnumNames<DecayShape> {
  static constexpr std::pair<std::string_view, DecayShape> values[] = {
      {"linear", DecayShape::linear}, {"cosine", DecayShape::cosine}, {"sqrt", DecayShape::sqrt}};
};

// The published schedule of 14.8T tokens, as shares of the training: 2.2e-4 until 10T, a cosine to 2.2e-5
// over 4.3T, constant for 333B, and 7.3e-6 for the last 167B. Those rates are a tenth and a thirtieth of the
// highest.
struct DeepseekPhases {
  static constexpr double constant_until = 10.0 / 14.8;
  static constexpr double cosine_until = 14.3 / 14.8;
  static constexpr double low_until = 14.633 / 14.8;
  static constexpr double min_ratio = 2.2e-5 / 2.2e-4;
  static constexpr double final_ratio = 7.3e-6 / 2.2e-4;
};

struct ScheduleOptions {
  ScheduleKind kind = ScheduleKind::cosine;
  double lr = 2.2e-4;              // the highest
  std::optional<double> min_lr;    // cosine, deepseek: default lr/10; wsd: default 0
  std::optional<double> final_lr;  // deepseek: of the last 1.1 % of the steps; default lr × 7.3/220
  int64_t warmup_steps = 0;        // linear, reaching lr at the last of them; the first step is not at 0
  double decay_share = 0.2;        // wsd: of all steps
  DecayShape decay = DecayShape::linear;  // wsd

  FIELDS(kind, lr, min_lr, final_lr, warmup_steps, decay_share, decay)
  bool operator==(const ScheduleOptions&) const = default;
};

// Throws Error naming the option that cannot be: a rate below 0, a share outside [0, 1], more warm-up than
// steps.
void check_schedule(const ScheduleOptions& options, int64_t steps);

// The rate of `step` in [0, steps); from `steps` on the last rate continues.
double learning_rate(const ScheduleOptions& options, int64_t step, int64_t steps);

// A value that changes once, such as the weight of the MTP loss (0.3, and 0.1 after 10T of 14.8T tokens) or
// the speed of the routing bias (0.001, and 0 after 14.3T): `after` from the step that begins at this share
// of the steps.
double value_at(double before, double after, double share, int64_t step, int64_t steps);

// Optimizer steps that see at least `tokens` tokens. Error unless both are positive.
int64_t steps_for_tokens(int64_t tokens, int64_t tokens_per_step);

}  // namespace latente
