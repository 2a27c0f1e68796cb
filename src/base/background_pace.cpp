#include "base/background_pace.h"

#include <chrono>

namespace latente {

double BackgroundPace::seconds(clockid_t clock) {
  timespec time{};
  ::clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

void BackgroundPace::keep(const std::stop_token& stop, double share) {
  constexpr double busy = 0.25;  // cores
  const double all = seconds(CLOCK_PROCESS_CPUTIME_ID), own = seconds(CLOCK_THREAD_CPUTIME_ID);
  const double now = seconds(CLOCK_MONOTONIC), worked = own - own_;
  const bool others_compute = all - all_ - worked > busy * (now - now_);
  // What others do meanwhile counts for the next look.
  all_ = all, own_ = own, now_ = now;
  if (!others_compute) return;
  std::unique_lock lock(mutex_);
  asleep_.wait_for(lock, stop, std::chrono::duration<double>(worked * (1 / share - 1)), [] { return false; });
}

}  // namespace latente
