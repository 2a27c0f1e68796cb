#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "base/error.h"

namespace latente {

namespace {

// The part of the way from the highest to the lowest rate that is still to go: 1 at x = 0, 0 at x = 1.
double remaining(DecayShape shape, double x) {
  x = std::clamp(x, 0.0, 1.0);
  switch (shape) {
    case DecayShape::linear:
      return 1 - x;
    case DecayShape::cosine:
      return 0.5 * (1 + std::cos(std::numbers::pi * x));
    case DecayShape::sqrt:
      return 1 - std::sqrt(x);
  }
  LATENTE_ASSERT(!"a decay of unknown shape");
  return 0;
}

// Where `step` stands between two boundaries, such that the last step before `end` reaches 1.
double part(double begin, double end, int64_t step) {
  const double length = end - 1 - begin;
  return length > 0 ? (static_cast<double>(step) - begin) / length : 1;
}

}  // namespace

void check_schedule(const ScheduleOptions& options, int64_t steps) {
  if (steps <= 0) fail("steps: expected at least 1, found {}", steps);
  if (!(options.lr >= 0)) fail("lr: expected a rate of at least 0, found {}", options.lr);
  if (options.min_lr && !(*options.min_lr >= 0 && *options.min_lr <= options.lr)) {
    fail("min_lr: expected a rate in [0, lr = {}], found {}", options.lr, *options.min_lr);
  }
  if (options.final_lr && !(*options.final_lr >= 0 && *options.final_lr <= options.lr)) {
    fail("final_lr: expected a rate in [0, lr = {}], found {}", options.lr, *options.final_lr);
  }
  if (options.warmup_steps < 0 || options.warmup_steps > steps) {
    fail("warmup_steps: expected a number in [0, steps = {}], found {}", steps, options.warmup_steps);
  }
  if (!(options.decay_share >= 0 && options.decay_share <= 1)) {
    fail("decay_share: expected a share in [0, 1], found {}", options.decay_share);
  }
}

double learning_rate(const ScheduleOptions& options, int64_t step, int64_t steps) {
  LATENTE_ASSERT(step >= 0 && steps > 0);
  step = std::min(step, steps - 1);
  if (step < options.warmup_steps) {
    return options.lr * static_cast<double>(step + 1) / static_cast<double>(options.warmup_steps);
  }
  const double total = static_cast<double>(steps);
  const double warm = static_cast<double>(options.warmup_steps);
  const auto between = [&](double low, DecayShape shape, double x) {
    return low + (options.lr - low) * remaining(shape, x);
  };
  switch (options.kind) {
    case ScheduleKind::constant:
      return options.lr;
    case ScheduleKind::cosine: {
      const double low = options.min_lr.value_or(options.lr * 0.1);
      // The warm-up's last step stands at lr already; the way down begins there.
      return between(low, DecayShape::cosine, part(std::max(warm - 1, 0.0), total, step));
    }
    case ScheduleKind::wsd: {
      const double begin = std::max(warm, std::floor(total * (1 - options.decay_share) + 0.5)) - 1;
      if (static_cast<double>(step) <= begin) return options.lr;
      return between(options.min_lr.value_or(0), options.decay, part(begin, total, step));
    }
    case ScheduleKind::deepseek: {
      using Phases = DeepseekPhases;
      const double low = options.min_lr.value_or(options.lr * Phases::min_ratio);
      const double at = static_cast<double>(step) / total;
      if (at >= Phases::low_until) return options.final_lr.value_or(options.lr * Phases::final_ratio);
      const double x = (at - Phases::constant_until) / (Phases::cosine_until - Phases::constant_until);
      return between(low, DecayShape::cosine, x);
    }
  }
  LATENTE_ASSERT(!"a schedule of unknown kind");
  return 0;
}

double value_at(double before, double after, double share, int64_t step, int64_t steps) {
  return static_cast<double>(step) < share * static_cast<double>(steps) ? before : after;
}

int64_t steps_for_tokens(int64_t tokens, int64_t tokens_per_step) {
  if (tokens <= 0) fail("tokens: expected at least 1, found {}", tokens);
  if (tokens_per_step <= 0) fail("tokens per step: expected at least 1, found {}", tokens_per_step);
  return (tokens - 1) / tokens_per_step + 1;
}

}  // namespace latente
