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

class ThreadPool {
 public:
  // 0 = default_threads(). The calling thread is one of them.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // body(thread) on every thread of the pool, thread in [0, size()); returns when all are done. The first
  // exception is rethrown. Called from inside a body, it runs body(0) alone.
  template <class Body>
  void run(Body&& body) {
    using Plain = std::remove_reference_t<Body>;
    run_erased([](void* object, int thread) { (*static_cast<Plain*>(object))(thread); },
               const_cast<void*>(static_cast<const void*>(&body)));
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
    run([&](int) {
      for (int64_t begin; (begin = next.fetch_add(grain, std::memory_order_relaxed)) < n;) {
        body(begin, std::min(begin + grain, n));
      }
    });
  }

 private:
  using Erased = void (*)(void*, int);
  static bool inside();  // is this thread running a body?
  void run_erased(Erased call, void* object);
  void work(int thread);
  void execute(int thread);

  std::vector<std::thread> workers_;
  Erased call_ = nullptr;
  void* object_ = nullptr;
  std::atomic<uint32_t> epoch_{0};    // a new job, or the end
  std::atomic<uint32_t> pending_{0};  // workers that have not finished the job
  std::atomic<bool> ending_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

}  // namespace latente
