// A pool of threads for short parallel loops: kernels fork and join thousands of times a second. Idle workers
// spin for a few tens of microseconds, then sleep, so that a busy neighbour on the same cores is not starved.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
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

  // body(begin, end) over pieces of [0, n), n < 2^32: each thread has a share of its own, which it goes
  // through in rising order in pieces that become smaller, and then helps others from the ends of theirs. For
  // reading memory: a piece goes on where the thread's last one ended.
  template <class Body>
  void parallel_shares(int64_t n, Body&& body) {
    if (n <= 0) return;
    if (n == 1 || workers_.empty() || inside()) return body(int64_t{0}, n);
    for (int i = 0; i < size(); ++i) shares_[i].set(n * i / size(), n * (i + 1) / size());
    auto through = [&] {
      const int own = number_of_thread() % size();
      for (int i = 0; i < size(); ++i) {
        Remainder& share = shares_[(own + i) % size()];
        for (int64_t begin, end; share.take(i == 0, begin, end);) body(begin, end);
      }
    };
    using Through = decltype(through);
    offer([](void* object) { (*static_cast<Through*>(object))(); }, &through);
  }

 private:
  using Work = void (*)(void*);
  // What is left of a thread's share, on a cache line of its own.
  class alignas(64) Remainder {
   public:
    void set(int64_t begin, int64_t end) { rest_.store(both(begin, end), std::memory_order_relaxed); }
    // Takes half of it; false when there is nothing left.
    bool take(bool from_front, int64_t& begin, int64_t& end);

   private:
    static uint64_t both(int64_t begin, int64_t end) {
      return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end);
    }
    std::atomic<uint64_t> rest_{0};
  };

  static bool inside();           // is this thread running a body?
  static int number_of_thread();  // of a worker, from 1 on; 0 elsewhere
  // Calls work(object) here and on the workers that come before it is done here: a worker that the system
  // does not run just now is not waited for.
  void offer(Work work, void* object);
  void execute();
  void serve(int own_number);

  std::vector<std::thread> workers_;
  std::unique_ptr<Remainder[]> shares_;
  Work work_ = nullptr;
  void* object_ = nullptr;
  std::atomic<uint32_t> job_{0};  // its number, whether workers may still join, and how many work on it
  std::atomic<bool> ending_{false};
  std::atomic<bool> failed_{false};
  std::exception_ptr failure_;
};

}  // namespace latente
