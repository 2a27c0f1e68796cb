// A pool of threads for short parallel loops: kernels fork and join thousands of times a second. Idle workers
// spin for a few tens of microseconds, then sleep, so that a busy neighbour on the same cores is not starved.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <type_traits>
#include <vector>

namespace latente {

// Cores this process may use: affinity and cgroup quota considered; at least 1.
int default_threads();

struct ThreadOptions {
  int count = 0;  // 0 = default_threads()
  // Each worker stays on a core of its own, where its caches are. The thread that calls the pool is left to
  // the system, since what it starts would be bound with it. Whoever else binds threads to the same cores, or
  // keeps them busy, is then waited for.
  bool pin = false;

  ThreadOptions(int count_ = 0, bool pin_ = false) : count(count_), pin(pin_) {}
};

class ThreadPool {
 public:
  // The calling thread is one of them. Error for more than there may be, or to pin to more cores than there
  // are.
  explicit ThreadPool(ThreadOptions options = {});
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // body(part) for each part in [0, size()), by whoever is free; returns when all are done. The first
  // exception is rethrown.
  template <class Body>
  void run(Body&& body) {
    parallel_for(size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) body(static_cast<int>(part));
    });
  }

  // body(begin, end) over pieces of [0, n) of at most `grain`, handed out in order to whoever is free.
  template <class Body>
  void parallel_for(int64_t n, int64_t grain, Body&& body) {
    grain = std::max<int64_t>(grain, 1);
    if (n <= 0) return;
    if (n <= grain || workers_.empty() || inside()) {
      for (int64_t begin = 0; begin < n; begin += grain) body(begin, std::min(begin + grain, n));
      return;
    }
    std::atomic<int64_t> next{0};
    auto share = [&] {
      for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < n;) {
        body(begin, std::min(begin + grain, n));
      }
    };
    using Share = decltype(share);
    offer([](void* object) { (*static_cast<Share*>(object))(); }, &share);
  }

 private:
  using Work = void (*)(void*);
  static bool inside();  // is this thread running a body?
  // Calls work(object) here and on the workers that come before it is done here: a worker that the system
  // does not run just now is not waited for.
  void offer(Work work, void* object);
  void execute();
  void serve();

  std::vector<std::thread> workers_;
  Work work_ = nullptr;
  void* object_ = nullptr;
  std::atomic<uint32_t> job_{0};  // its number, whether workers may still join, and how many work on it
  std::atomic<bool> ending_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

}  // namespace latente
