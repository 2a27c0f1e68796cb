#include "base/threads.h"

#include <sched.h>

#include <chrono>
#include <cmath>
#include <fstream>
#include <string>
#include <system_error>

#include "base/error.h"

namespace latente {
namespace {

thread_local bool inside_body = false;
thread_local int thread_number = 0;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Parts of ThreadPool::job_.
constexpr uint32_t open = 1u << 15, one_job = 1u << 16;
constexpr int most_threads = 1 << 15;
uint32_t number(uint32_t job) { return job / one_job; }
uint32_t workers_on(uint32_t job) { return job % open; }

// Waits until the value differs from `old`: spinning first, asleep after.
uint32_t await_change(const std::atomic<uint32_t>& value, uint32_t old) {
  constexpr auto patience = std::chrono::microseconds(40);
  auto start = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < 64; ++i) {
      uint32_t now = value.load(std::memory_order_acquire);
      if (now != old) return now;
      relax();
    }
  } while (std::chrono::steady_clock::now() - start < patience);
  uint32_t now;
  while ((now = value.load(std::memory_order_acquire)) == old) value.wait(old, std::memory_order_acquire);
  return now;
}

void end(std::vector<std::thread>& workers, std::atomic<bool>& ending, std::atomic<uint32_t>& job) {
  ending.store(true);
  job.fetch_add(one_job, std::memory_order_release);
  job.notify_all();
  for (std::thread& worker : workers) worker.join();
}

std::vector<int> cores_allowed() {
  std::vector<int> cores;
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(core, &set)) cores.push_back(core);
  }
  return cores;
}

// A wish: where the system refuses, the thread runs anywhere.
void stay_on(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  sched_setaffinity(0, sizeof(set), &set);
}

// The CPU quota of cgroup v2, in whole cores; 0 = none.
int cgroup_cores() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return 0;
  double limit = std::strtod(quota.c_str(), nullptr);
  return limit > 0 ? std::max(1, static_cast<int>(std::lround(limit / period))) : 0;
}

}  // namespace

int default_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 0;
  if (cores == 0) cores = static_cast<int>(std::thread::hardware_concurrency());
  if (int quota = cgroup_cores()) cores = std::min(cores, quota);
  return std::max(cores, 1);
}

ThreadPool::ThreadPool(ThreadOptions options) {
  int count = options.count > 0 ? options.count : default_threads();
  if (count > most_threads) fail("threads: expected at most {}, found {}", most_threads, count);
  const std::vector<int> cores = options.pin ? cores_allowed() : std::vector<int>();
  if (options.pin && count > static_cast<int>(cores.size()))
    fail("threads: expected at most {} to pin, one for each core, found {}", cores.size(), count);
  shares_ = std::make_unique<Remainder[]>(static_cast<size_t>(count));
  try {
    for (int i = 1; i < count; ++i) {
      const int core = options.pin ? cores[static_cast<size_t>(i)] : -1;
      workers_.emplace_back([this, core, i] {
        if (core >= 0) stay_on(core);
        serve(i);
      });
    }
  } catch (const std::system_error& error) {
    const int started = size();
    end(workers_, ending_, job_);
    fail("threads: the system lets {} of {} start: {}", started, count, error.what());
  }
}

ThreadPool::~ThreadPool() { end(workers_, ending_, job_); }

bool ThreadPool::Remainder::take(bool from_front, int64_t& begin, int64_t& end) {
  uint64_t rest = rest_.load(std::memory_order_relaxed);
  for (;;) {
    const auto first = static_cast<int64_t>(rest >> 32), last = static_cast<int64_t>(rest & 0xffffffffu);
    if (first == last) return false;
    const int64_t half = (last - first + 1) / 2;
    begin = from_front ? first : last - half;
    end = begin + half;
    const uint64_t left = from_front ? both(end, last) : both(first, begin);
    if (rest_.compare_exchange_weak(rest, left, std::memory_order_relaxed)) return true;
  }
}

bool ThreadPool::inside() { return inside_body; }
int ThreadPool::number_of_thread() { return thread_number; }

void ThreadPool::execute() {
  inside_body = true;
  try {
    work_(object_);
  } catch (...) {
    if (!failed_.exchange(true)) failure_ = std::current_exception();
  }
  inside_body = false;
}

void ThreadPool::serve(int own_number) {
  thread_number = own_number;
  uint32_t job = job_.load(std::memory_order_acquire);
  for (uint32_t served = number(job); !ending_.load();) {
    job = await_change(job_, job);
    if (number(job) == served) continue;
    // The number changes only when nobody works, so whoever joins works on the job it saw.
    while ((job & open) && !job_.compare_exchange_weak(job, job + 1, std::memory_order_acq_rel)) {
    }
    served = number(job);
    if (!(job & open)) continue;
    execute();
    job = job_.fetch_sub(1, std::memory_order_acq_rel) - 1;
    if (!(job & open) && workers_on(job) == 0) job_.notify_all();
  }
}

void ThreadPool::offer(Work work, void* object) {
  work_ = work;
  object_ = object;
  failed_.store(false);
  job_.store((job_.load(std::memory_order_relaxed) + one_job) | open, std::memory_order_release);
  job_.notify_all();
  execute();
  uint32_t job = job_.fetch_and(~open, std::memory_order_acq_rel) & ~open;
  while (workers_on(job) != 0) job = await_change(job_, job);
  if (failed_.load()) std::rethrow_exception(failure_);
}

}  // namespace latente
