#include "base/threads.h"

#include <sched.h>

#include <chrono>
#include <fstream>
#include <string>

namespace latente {
namespace {

thread_local bool inside_body = false;

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

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

// The CPU quota of cgroup v2, in whole cores; 0 = none.
int cgroup_cores() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return 0;
  double limit = std::strtod(quota.c_str(), nullptr);
  return limit > 0 ? std::max(1, static_cast<int>(limit / period + 0.5)) : 0;
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

ThreadPool::ThreadPool(int threads) {
  int count = threads > 0 ? threads : default_threads();
  for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  ending_.store(true);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

bool ThreadPool::inside() { return inside_body; }

void ThreadPool::execute(int thread) {
  inside_body = true;
  try {
    call_(object_, thread);
  } catch (...) {
    if (!failed_.exchange(true)) failure_ = std::current_exception();
  }
  inside_body = false;
}

void ThreadPool::work(int thread) {
  for (uint32_t seen = 0;;) {
    seen = await_change(epoch_, seen);
    if (ending_.load()) return;
    execute(thread);
    if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_one();
  }
}

void ThreadPool::run_erased(Erased call, void* object) {
  if (inside() || workers_.empty()) return call(object, 0);
  call_ = call;
  object_ = object;
  failed_.store(false);
  pending_.store(static_cast<uint32_t>(workers_.size()), std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  execute(0);
  for (uint32_t left = pending_.load(std::memory_order_acquire); left != 0;)
    left = await_change(pending_, left);
  if (failed_.load()) std::rethrow_exception(failure_);
}

}  // namespace latente
