// The choice of draft lengths against a simulated decoder, whose costs and acceptance are known.
#include "infer/draft_length.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "base/random.h"

namespace latente {
namespace {

struct Workload {
  const char* name;
  std::vector<double> cost;        // of a pass with 0, 1, ... drafts, beside a plain one
  std::vector<double> acceptance;  // of the i-th draft
  double behind;                   // what catching up costs, a token
  double noise = 0.1;
};

double tokens_a_pass(const Workload& w, size_t drafts) {
  double tokens = 1, right = 1;
  for (size_t i = 0; i < drafts; ++i) tokens += right *= w.acceptance[i];
  return tokens;
}

// Tokens a unit of time, over `tokens` tokens; `second` holds from the middle on.
double speed(const Workload& first, const Workload& second, int64_t tokens, uint64_t seed) {
  Random random(seed);
  DraftLength length(static_cast<int64_t>(first.acceptance.size()));
  double time = 0;
  int64_t done = 0, behind = 0;
  while (done < tokens) {
    const Workload& w = done < tokens / 2 ? first : second;
    const int64_t drafts = length.choose();
    EXPECT_GE(drafts, 0);
    EXPECT_LE(drafts, length.most());
    int64_t accepted = 0;
    while (accepted < drafts && random.uniform() < w.acceptance[static_cast<size_t>(accepted)]) ++accepted;
    double seconds = w.cost[static_cast<size_t>(drafts)] * std::exp(w.noise * random.normal());
    if (random.uniform() < 0.01) seconds *= 5;  // somebody else took the core
    const bool catching_up = drafts > 0 && behind > 2;
    if (drafts > 0) {
      seconds += w.behind * static_cast<double>(behind);
      behind = 0;
    } else {
      behind = std::min<int64_t>(behind + 1, 64);  // what is farther back is given up
    }
    time += seconds;
    done += accepted + 1;
    length.judge(drafts, accepted);
    length.time(drafts, 1e-3 * seconds, catching_up);
  }
  return static_cast<double>(done) / time;
}

const Workload workloads[] = {
    {"a model bound by memory", {1, 1.15}, {0.85}, 0.01},
    {"drafts that cost too much", {1, 1.95}, {0.7}, 0.02},
    {"drafts that are never right", {1, 1.3}, {0.0}, 0.02},
    {"about even", {1, 1.5}, {0.5}, 0.02},
    {"two modules, one of use", {1, 1.2, 1.6}, {0.8, 0.2}, 0.02},
    {"three modules, all of use", {1, 1.1, 1.2, 1.3}, {0.9, 0.8, 0.7}, 0.02},
};

TEST(DraftLength, NeverLosesMuchAndFindsTheBest) {
  for (const Workload& w : workloads) {
    double best = 0;
    for (size_t n = 0; n < w.cost.size(); ++n) best = std::max(best, tokens_a_pass(w, n) / w.cost[n]);
    for (uint64_t seed = 1; seed <= 5; ++seed) {
      // One in a hundred passes takes five times as long: 1.04 on average.
      const double got = 1.04 * std::exp(0.5 * w.noise * w.noise) * speed(w, w, 4000, seed);
      EXPECT_GT(got, 0.95 * best) << w.name << ", seed " << seed;
      EXPECT_GT(got, 0.97) << w.name << ", seed " << seed << ": slower than plain decoding";
    }
  }
}

TEST(DraftLength, FollowsAChange) {
  const Workload good{"good", {1, 1.3}, {0.9}, 0.02}, bad{"bad", {1, 1.3}, {0.1}, 0.02};
  for (uint64_t seed = 1; seed <= 5; ++seed) {
    const double ideal = 2.0 / (1 / (1.9 / 1.3) + 1);
    EXPECT_GT(1.04 * speed(good, bad, 8000, seed), 0.95 * ideal) << "seed " << seed;
    EXPECT_GT(1.04 * speed(bad, good, 8000, seed), 0.90 * ideal) << "seed " << seed;
  }
}

// Trials that say nothing, since modules have to catch up in each, cost time until no more of them can be
// afforded. Modules need not keep up from then on.
TEST(DraftLength, DoesNotKeepModulesForATrialThatIsTooDear) {
  DraftLength length(1);
  EXPECT_TRUE(length.pays());
  int passes = 0;
  while (length.pays() && passes < 100) {
    const bool drafts = length.choose() > 0;
    length.time(drafts ? 1 : 0, drafts ? 4e-3 : 1e-3, drafts);
    ++passes;
  }
  EXPECT_LT(passes, 20);
  EXPECT_EQ(length.choose(), 0);
  while (!length.pays() && passes < 2000) {  // a while later there is time for another one
    length.choose();
    length.time(0, 1e-3, false);
    ++passes;
  }
  EXPECT_GT(passes, 100);
  EXPECT_LT(passes, 2000);
}

TEST(DraftLength, TriesNothingBeforeItsTime) {
  DraftLength length(1, DraftLength::usual_acceptance, DraftLength::usual_trials, 0.2);
  int passes = 0;
  while (length.choose() == 0 && passes < 1000) {
    EXPECT_EQ(length.pays(), passes >= 200) << passes;
    length.time(0, 1.001e-3, false);
    ++passes;
  }
  EXPECT_EQ(passes, 200);
  length.judge(1, 1);
  length.time(1, 1e-3, false);
}

TEST(DraftLength, WithoutModulesNothingIsDrafted) {
  DraftLength length;
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(length.choose(), 0);
    length.judge(0, 0);
    length.time(0, 1e-3, false);
  }
}

}  // namespace
}  // namespace latente
