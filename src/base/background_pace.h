// Work in the background that leaves the processor to others.
#pragma once

#include <time.h>

#include <condition_variable>
#include <mutex>
#include <stop_token>

namespace latente {

// Keeps a thread's share of time small while others of its process compute; while nobody does, it has all. A
// low priority would not do: such a thread stands in the way of others that wait for one another.
class BackgroundPace {
 public:
  // After each piece of work; sleeps until the time since then has been `share` of one core's, or a stop is
  // requested.
  void keep(const std::stop_token& stop, double share);

 private:
  static double seconds(clockid_t clock);

  double all_ = seconds(CLOCK_PROCESS_CPUTIME_ID), own_ = seconds(CLOCK_THREAD_CPUTIME_ID);
  double now_ = seconds(CLOCK_MONOTONIC);
  std::mutex mutex_;
  std::condition_variable_any asleep_;
};

}  // namespace latente
