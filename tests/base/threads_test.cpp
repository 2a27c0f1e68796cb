#include "base/threads.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "base/error.h"

namespace latente {
namespace {

TEST(Threads, EachPieceIsDoneOnce) {
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    for (int64_t n : {0, 1, 2, 7, 100, 1000}) {
      for (int64_t grain : {1, 3, 2000}) {
        std::vector<std::atomic<int>> done(static_cast<size_t>(n));
        pool.parallel_for(n, grain, [&](int64_t begin, int64_t end) {
          ASSERT_LE(end - begin, grain);
          for (int64_t i = begin; i < end; ++i) ++done[static_cast<size_t>(i)];
        });
        for (const auto& count : done) ASSERT_EQ(count.load(), 1);
      }
    }
  }
}

TEST(Threads, EachPieceOfAShareIsDoneOnce) {
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    for (int64_t n : {0, 1, 2, 7, 100, 1000}) {
      std::vector<std::atomic<int>> done(static_cast<size_t>(n));
      std::atomic<int64_t> pieces{0};
      for (int round = 1; round <= 50; ++round) {
        pool.parallel_shares(n, [&](int64_t begin, int64_t end) {
          ASSERT_LT(begin, end);
          ++pieces;
          for (int64_t i = begin; i < end; ++i) ++done[static_cast<size_t>(i)];
        });
        for (const auto& count : done) ASSERT_EQ(count.load(), round);
      }
      if (n >= threads) {
        EXPECT_GE(pieces.load(), 50 * threads);
      }
    }
  }
}

TEST(Threads, WhatWasWrittenBeforeAndInsideIsSeenInsideAndAfter) {
  ThreadPool pool(4);
  std::vector<int64_t> values(64, 0);
  for (int64_t round = 1; round <= 20'000; ++round) {
    pool.parallel_for(64, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        values[static_cast<size_t>(i)] = 2 * values[static_cast<size_t>(i)] + 1;
    });
    for (int64_t& value : values) {
      ASSERT_EQ(value, 2 * (round - 1) + 1);
      value = round;
    }
  }
}

// Pools come and go before their workers have started.
TEST(Threads, ShortLivesEnd) {
  for (int i = 0; i < 2000; ++i) {
    ThreadPool pool(3);
    std::atomic<int> sum{0};
    if (i % 2) pool.run([&](int part) { sum += part; });
    ASSERT_EQ(sum.load(), i % 2 ? 3 : 0);
  }
}

TEST(Threads, AnExceptionComesBackAndThePoolLivesOn) {
  ThreadPool pool(3);
  for (int round = 0; round < 200; ++round) {
    EXPECT_THROW(pool.parallel_for(50, 1,
                                   [](int64_t begin, int64_t) {
                                     if (begin == 7) throw std::runtime_error("seven");
                                   }),
                 std::runtime_error);
    std::atomic<int64_t> sum{0};
    pool.parallel_for(50, 1, [&](int64_t begin, int64_t) { sum += begin; });
    ASSERT_EQ(sum.load(), 49 * 50 / 2);
  }
}

TEST(Threads, TooManyAreRefused) { EXPECT_THROW(ThreadPool(1 << 20), Error); }

TEST(Threads, PinnedOnesStayOnCoresOfTheirOwn) {
  cpu_set_t all;
  CPU_ZERO(&all);
  ASSERT_EQ(sched_getaffinity(0, sizeof(all), &all), 0);
  const int cores = CPU_COUNT(&all);
  ThreadPool pool(ThreadOptions(cores, true));
  std::mutex mutex;
  std::set<int> found;
  const auto caller = std::this_thread::get_id();
  // Until all have come: each worker joins while there is work.
  for (int round = 0; round < 1000 && static_cast<int>(found.size()) < cores - 1; ++round) {
    pool.run([&](int) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      if (std::this_thread::get_id() == caller) return;
      cpu_set_t mine;
      CPU_ZERO(&mine);
      sched_getaffinity(0, sizeof(mine), &mine);
      const std::lock_guard lock(mutex);
      EXPECT_EQ(CPU_COUNT(&mine), 1);
      found.insert(sched_getcpu());
    });
  }
  EXPECT_EQ(static_cast<int>(found.size()), cores - 1);
  cpu_set_t after;
  CPU_ZERO(&after);
  sched_getaffinity(0, sizeof(after), &after);
  EXPECT_TRUE(CPU_EQUAL(&all, &after));
  EXPECT_THROW(ThreadPool(ThreadOptions(cores + 1, true)), Error);
}

TEST(Threads, LoopsInsideLoopsRunInPlace) {
  ThreadPool pool(3);
  std::atomic<int64_t> sum{0};
  pool.parallel_for(10, 1, [&](int64_t, int64_t) {
    pool.parallel_for(10, 1, [&](int64_t begin, int64_t) { sum += begin; });
  });
  EXPECT_EQ(sum.load(), 450);
}

}  // namespace
}  // namespace latente
