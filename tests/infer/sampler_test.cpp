#include "infer/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.h"
#include "infer/statistics.h"

namespace latente {
namespace {

using Row = std::vector<float>;

Row random_row(Random& random, size_t vocabulary, double scale = 2.0) {
  Row row(vocabulary);
  for (float& x : row) x = static_cast<float>(scale * random.normal());
  return row;
}

// Token → probability, written as the definitions stand, one transformation after the other.
std::map<int32_t, double> plain_distribution(const Row& row, const History& history,
                                             const SamplingOptions& how, const std::set<int32_t>& admitted) {
  std::vector<float> logits = row;
  for (const auto& [id, bias] : how.logit_bias) logits[static_cast<size_t>(id)] += static_cast<float>(bias);
  std::set<int32_t> seen;
  std::map<int32_t, int> written;
  for (size_t back = 0; back < history.tokens.size(); ++back) {
    if (how.penalty_window >= 0 && back >= static_cast<size_t>(how.penalty_window)) break;
    size_t place = history.tokens.size() - 1 - back;
    seen.insert(history.tokens[place]);
    if (place >= history.prompt) ++written[history.tokens[place]];
  }
  for (int32_t id : seen) {
    double x = logits[static_cast<size_t>(id)];
    x = x > 0 ? x / how.repetition_penalty : x * how.repetition_penalty;
    x -= written[id] * how.frequency_penalty + (written[id] > 0 ? 1 : 0) * how.presence_penalty;
    logits[static_cast<size_t>(id)] = static_cast<float>(x);
  }
  std::vector<int32_t> order;
  for (int32_t id = 0; id < static_cast<int32_t>(row.size()); ++id) {
    if (admitted.contains(id) && !std::isinf(logits[static_cast<size_t>(id)])) order.push_back(id);
  }
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  if (how.temperature == 0) return {{order[0], 1.0}};
  auto softmax = [&](const std::vector<int32_t>& ids) {
    double largest = logits[static_cast<size_t>(order[0])], sum = 0;
    std::vector<double> p;
    for (int32_t id : ids)
      p.push_back(std::exp((logits[static_cast<size_t>(id)] - largest) / how.temperature)), sum += p.back();
    for (double& x : p) x /= sum;
    return p;
  };
  if (how.top_k > 0 && static_cast<size_t>(how.top_k) < order.size())
    order.resize(static_cast<size_t>(how.top_k));
  std::vector<double> p = softmax(order);
  double before = 0;
  size_t kept = 0;
  for (; kept < order.size() && before < how.top_p; ++kept) before += p[kept];
  if (how.top_p < 1) order.resize(kept);
  p = softmax(order);
  std::vector<int32_t> final_ids;
  for (size_t i = 0; i < order.size(); ++i) {
    if (p[i] >= how.min_p * p[0]) final_ids.push_back(order[i]);
  }
  p = softmax(final_ids);
  if (how.typical_p < 1) {
    double entropy = 0, reached = 0;
    for (double x : p) entropy -= x * std::log(x);
    std::multimap<double, size_t> by_distance;
    for (size_t i = 0; i < p.size(); ++i) by_distance.emplace(std::abs(std::log(p[i]) + entropy), i);
    std::vector<int32_t> typical;
    for (const auto& [distance, i] : by_distance) {
      if (reached >= how.typical_p) break;
      typical.push_back(final_ids[i]), reached += p[i];
    }
    final_ids = typical;
    p = softmax(final_ids);
  }
  std::map<int32_t, double> result;
  for (size_t i = 0; i < final_ids.size(); ++i) result[final_ids[i]] = p[i];
  return result;
}

TEST(Sampler, TransformsAsDefined) {
  Random random(11);
  const std::vector<SamplingOptions> settings{
      {.temperature = 0},
      {.temperature = 1},
      {.temperature = 0.3},
      {.temperature = 2.5},
      {.temperature = 1, .top_k = 1},
      {.temperature = 0.8, .top_k = 7},
      {.temperature = 0.8, .top_k = 1000},
      {.temperature = 1, .top_p = 0.01},
      {.temperature = 1, .top_p = 0.5},
      {.temperature = 1.4, .top_p = 0.95},
      {.temperature = 1, .min_p = 0.1},
      {.temperature = 1, .min_p = 1},
      {.temperature = 1, .repetition_penalty = 1.3},
      {.temperature = 0, .repetition_penalty = 3},
      {.temperature = 1, .repetition_penalty = 0.5},
      {.temperature = 0.7, .top_k = 20, .top_p = 0.9, .min_p = 0.05, .repetition_penalty = 1.1},
      {.temperature = 1, .typical_p = 0.01},
      {.temperature = 1.5, .typical_p = 0.6},
      {.temperature = 0, .presence_penalty = 1.5},
      {.temperature = 1, .presence_penalty = -0.5, .frequency_penalty = 0.9},
      {.temperature = 1, .repetition_penalty = 1.3, .frequency_penalty = 2, .penalty_window = 3},
      {.temperature = 1, .repetition_penalty = 1.3, .presence_penalty = 2, .penalty_window = 0},
      {.temperature = 0, .logit_bias = {{0, 4.0}}},
      {.temperature = 1.2,
       .top_k = 30,
       .top_p = 0.97,
       .min_p = 0.02,
       .typical_p = 0.9,
       .repetition_penalty = 1.2,
       .presence_penalty = 0.3,
       .frequency_penalty = 0.2,
       .penalty_window = 5,
       .logit_bias = {{0, -100.0}, {1, 2.0}, {0, 0.5}}},
  };
  for (int trial = 0; trial < 50; ++trial) {
    for (size_t s = 0; s < settings.size(); ++s) {
      Row row = random_row(random, 2 + random.below(150));
      std::vector<int32_t> tokens(random.below(8));
      for (int32_t& id : tokens) id = static_cast<int32_t>(random.below(std::min<size_t>(row.size(), 6)));
      History history(tokens, random.below(tokens.size() + 1));
      std::set<int32_t> ids;
      std::vector<uint64_t> bits((row.size() + 63) / 64, 0);
      const bool all = random.chance(0.5);
      for (int32_t id = 0; id < static_cast<int32_t>(row.size()); ++id) {
        if (!all && id > 0 && random.chance(0.6)) continue;
        ids.insert(id);
        bits[static_cast<size_t>(id) / 64] |= uint64_t{1} << (id % 64);
      }
      if (all && random.chance(0.5)) bits.clear();
      std::map<int32_t, double> want = plain_distribution(row, history, settings[s], ids);
      Distribution got = distribution_of(row, history, settings[s], bits);
      ASSERT_EQ(got.size(), want.size()) << "setting " << s;
      double sum = 0;
      for (size_t i = 0; i < got.size(); ++i) {
        ASSERT_TRUE(want.contains(got[i].id)) << "setting " << s;
        EXPECT_NEAR(got[i].probability, want[got[i].id], 1e-9) << "setting " << s;
        sum += got[i].probability;
        if (i > 0) {
          EXPECT_LT(got[i - 1].id, got[i].id);
        }
      }
      EXPECT_NEAR(sum, 1, 1e-12);
    }
  }
}

TEST(Sampler, BreaksTiesByTheLowestId) {
  Row row{1, 3, 3, 0, 3};
  EXPECT_EQ(distribution_of(row, {}, {}).front().id, 1);
  Distribution two = distribution_of(row, {}, {.temperature = 1, .top_k = 2});
  ASSERT_EQ(two.size(), 2u);
  EXPECT_EQ(two[0].id, 1);
  EXPECT_EQ(two[1].id, 2);
  EXPECT_EQ(two[0].probability, 0.5);
}

TEST(Sampler, HandlesExtremes) {
  const float lowest = -std::numeric_limits<float>::infinity();
  Row row{lowest, 2, lowest, 1};
  Distribution some = distribution_of(row, {}, {.temperature = 1});
  ASSERT_EQ(some.size(), 2u);
  EXPECT_NEAR(some[0].probability, 1 / (1 + std::exp(-1.0)), 1e-12);
  row = {1e30f, -1e30f, 1e30f};
  some = distribution_of(row, {}, {.temperature = 1e-6});
  ASSERT_EQ(some.size(), 2u);
  EXPECT_EQ(some[0].probability, 0.5);
  row = {5};
  EXPECT_EQ(distribution_of(row, {}, {.temperature = 1}).size(), 1u);
  // Ids of the history that the row lacks are no concern.
  row = {1, 2};
  std::vector<int32_t> history{-1, 7, 1};
  EXPECT_EQ(distribution_of(row, history, {.repetition_penalty = 4}).front().id, 0);
}

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Sampler, RefusesSenselessOptions) {
  const double nan = std::numeric_limits<double>::quiet_NaN(),
               infinite = std::numeric_limits<double>::infinity();
  auto expect = [](const SamplingOptions& options, const std::string& part) {
    std::string message = message_of([&] { options.validate(); });
    EXPECT_NE(message.find(part), message.npos) << message << " lacks " << part;
  };
  SamplingOptions fine{.temperature = 100, .top_k = 3, .top_p = 1e-9, .min_p = 1, .repetition_penalty = 0.01};
  EXPECT_NO_THROW(fine.validate());
  EXPECT_NO_THROW(SamplingOptions{}.validate());
  for (double bad : {-0.1, nan, infinite, 100.5})
    expect({.temperature = bad}, "temperature: expected 0 to 100");
  expect({.top_k = -1}, "top_k: expected 0 (all) or more, found -1");
  for (double bad : {0.0, -1.0, 1.01, nan}) expect({.top_p = bad}, "top_p: expected above 0, at most 1");
  for (double bad : {-0.1, 1.1, nan}) expect({.min_p = bad}, "min_p: expected 0 to 1");
  for (double bad : {0.0, -1.0, nan, 1000.0})
    expect({.repetition_penalty = bad}, "repetition_penalty: expected");
  for (double bad : {0.0, -1.0, 1.01, nan})
    expect({.typical_p = bad}, "typical_p: expected above 0, at most 1");
  for (double bad : {-2.1, 2.1, nan, infinite}) {
    expect({.presence_penalty = bad}, "presence_penalty: expected -2 to 2");
    expect({.frequency_penalty = bad}, "frequency_penalty: expected -2 to 2");
  }
  expect({.penalty_window = -2}, "penalty_window: expected -1 (all tokens), 0 or more, found -2");
  expect({.logit_bias = {{-1, 0.0}}}, "logit_bias: expected token ids, found -1");
  for (double bad : {-100.5, 101.0, nan, infinite})
    expect({.logit_bias = {{7, bad}}}, "logit_bias: 7: expected -100 to 100, or -inf");
  SamplingOptions banned{.logit_bias = {{7, -infinite}, {8, 100}}};
  EXPECT_NO_THROW(banned.validate());
}

TEST(Sampler, RefusesLogitsThatAreNoNumbers) {
  const float nan = std::numeric_limits<float>::quiet_NaN(),
              infinite = std::numeric_limits<float>::infinity();
  for (double temperature : {0.0, 1.0}) {
    SamplingOptions how{.temperature = temperature};
    for (Row row : {Row{nan, 1, 2}, Row{1, 2, nan}}) {
      EXPECT_NE(message_of([&] { distribution_of(row, {}, how); }).find("NaN"), std::string::npos);
    }
    for (Row row : {Row{-infinite, -infinite}, Row{1, infinite}}) {
      EXPECT_NE(message_of([&] { distribution_of(row, {}, how); }).find("not finite"), std::string::npos);
    }
  }
}

TEST(Sampler, SaysWhenNothingMayCome) {
  const double banned = -std::numeric_limits<double>::infinity();
  Row row{1, 2};
  const std::vector<uint64_t> second{2};
  EXPECT_EQ(message_of([&] {
              distribution_of(row, {}, {.logit_bias = {{1, banned}}}, second);
            }),
            "the model's logits are not finite for any token that may come next");
  row = {std::numeric_limits<float>::quiet_NaN(), 2};
  EXPECT_NE(message_of([&] { distribution_of(row, {}, {}, second); }).find("NaN"), std::string::npos);
}

// What transformers' processors make of the same logits, in float64 (record_samplers.py), and OpenAI's
// penalties by their formula.
TEST(Sampler, EqualsTransformers) {
  std::ifstream file(LATENTE_TEST_DATA "/infer/recorded/samplers.json");
  const nlohmann::json cases = nlohmann::json::parse(file);
  ASSERT_GT(cases.size(), 100u);
  for (size_t c = 0; c < cases.size(); ++c) {
    const nlohmann::json& given = cases[c];
    SamplingOptions how;
    how.temperature = given["temperature"], how.top_k = given["top_k"], how.top_p = given["top_p"];
    how.min_p = given["min_p"], how.typical_p = given["typical_p"];
    how.repetition_penalty = given["repetition_penalty"];
    how.presence_penalty = given["presence_penalty"], how.frequency_penalty = given["frequency_penalty"];
    for (const auto& [id, bias] : given["logit_bias"].items())
      how.logit_bias.emplace_back(std::stoi(id), bias);
    Row row = given["logits"].get<Row>();
    const auto tokens = given["tokens"].get<std::vector<int32_t>>();
    const Distribution got = distribution_of(row, {tokens, given["prompt"].get<size_t>()}, how);
    std::map<int32_t, double> want;
    for (const auto& [id, p] : given["probabilities"].items()) want[std::stoi(id)] = p;
    ASSERT_EQ(got.size(), want.size()) << "case " << c;
    for (const Candidate& candidate : got) {
      ASSERT_TRUE(want.contains(candidate.id)) << "case " << c;
      EXPECT_NEAR(candidate.probability, want[candidate.id], 1e-6) << "case " << c;
    }
  }
}

// -- the distribution of what is drawn --

std::vector<double> dense(const Distribution& distribution, size_t vocabulary) {
  std::vector<double> p(vocabulary, 0.0);
  for (const Candidate& candidate : distribution)
    p[static_cast<size_t>(candidate.id)] = candidate.probability;
  return p;
}

TEST(Sampler, PutsProbabilitiesOneBehindTheOther) {
  const Distribution distribution{{3, 0.2}, {5, 0.5}, {8, 0.2}, {9, 0.1}};
  for (const auto& [number, token] : std::vector<std::pair<double, int32_t>>{
           {0, 5}, {0.49, 5}, {0.51, 3}, {0.69, 3}, {0.71, 8}, {0.89, 8}, {0.91, 9}, {1 - 0x1p-53, 9}})
    EXPECT_EQ(token_at(distribution, number), token) << number;
  EXPECT_EQ(token_at({{4, 1.0}}, 0.7), 4);
  Distribution many;
  for (int32_t id = 0; id < 1000; ++id) many.push_back({id, (id + 1) / 500500.0});
  int32_t last = 1000;
  for (double number = 0; number < 1; number += 1e-3) {
    const int32_t token = token_at(many, number);
    EXPECT_LE(token, last);
    // The sum over those above it.
    EXPECT_NEAR(1 - static_cast<double>(token + 1) * static_cast<double>(token + 2) / 2 / 500500, number,
                3e-3);
    last = token;
  }
}

TEST(Sampler, DrawsByProbability) {
  for (uint64_t seed : {1, 2, 3, 4, 5}) {
    Random random(seed);
    Row row = random_row(random, 9, 1.0);
    Distribution p = distribution_of(row, {}, {.temperature = 1});
    std::vector<int64_t> counts(9, 0);
    for (int i = 0; i < 300'000; ++i) ++counts[static_cast<size_t>(sample(p, random))];
    EXPECT_LT(test::deviation(counts, dense(p, 9)), test::implausible) << "seed " << seed;
  }
}

using Verify = std::function<Verdict(const Distribution&, const Distribution&, int32_t, Random&)>;

constexpr size_t small_vocabulary = 6;

// Pairs of model and draft distributions as generation has them: similar and dissimilar, with supports that
// top-k and top-p cut differently, greedy ones among them.
std::vector<std::pair<Distribution, Distribution>> pairs() {
  Random random(2024);
  const std::vector<SamplingOptions> settings{{.temperature = 1},
                                              {.temperature = 0.7, .top_k = 3},
                                              {.temperature = 1.2, .top_p = 0.8},
                                              {.temperature = 1, .min_p = 0.2}};
  std::vector<std::pair<Distribution, Distribution>> all;
  for (size_t i = 0; i < 16; ++i) {
    Row p = random_row(random, small_vocabulary, 1.0), q = p;
    for (float& x : q) x += static_cast<float>((i % 2 == 0 ? 0.4 : 2.0) * random.normal());
    SamplingOptions how = settings[i / 2 % settings.size()];
    Distribution drafted = distribution_of(q, {}, i == 15 ? SamplingOptions{} : how);
    all.emplace_back(distribution_of(p, {}, how), drafted);
  }
  return all;
}

// The largest deviation (in normal standard deviations) of what `rule` yields from p, over all pairs.
double worst_deviation(const Verify& rule, int64_t draws) {
  double worst = 0;
  uint64_t seed = 1;
  for (const auto& [p, q] : pairs()) {
    Random random(seed++);
    std::vector<int64_t> counts(small_vocabulary, 0);
    for (int64_t i = 0; i < draws; ++i) {
      int32_t draft = sample(q, random);
      ++counts[static_cast<size_t>(rule(p, q, draft, random).token)];
    }
    worst = std::max(worst, test::deviation(counts, dense(p, small_vocabulary)));
  }
  return worst;
}

constexpr int64_t draws = 400'000;

TEST(Speculation, YieldsExactlyTheModelsDistribution) {
  EXPECT_LT(worst_deviation(verify, draws), test::implausible);
}

double probability_of(const Distribution& distribution, int32_t id) {
  for (const Candidate& candidate : distribution) {
    if (candidate.id == id) return candidate.probability;
  }
  return 0;
}

// The same test must catch every rule that is nearly right.
TEST(Speculation, TheTestCatchesWrongRules) {
  std::map<std::string, Verify> wrong;
  wrong["accepts always"] = [](const Distribution&, const Distribution&, int32_t draft, Random&) {
    return Verdict{true, draft};
  };
  wrong["accepts what the model would have drawn, else draws again"] =
      [](const Distribution& p, const Distribution&, int32_t draft, Random& random) {
        bool equal = sample(p, random) == draft;
        return Verdict{equal, equal ? draft : sample(p, random)};
      };
  wrong["accepts the most likely token alone"] = [](const Distribution& p, const Distribution&, int32_t draft,
                                                    Random& random) {
    bool equal = p.front().id == draft;
    return Verdict{equal, equal ? draft : sample(p, random)};
  };
  wrong["draws from p, not from the residual"] = [](const Distribution& p, const Distribution& q,
                                                    int32_t draft, Random& random) {
    Verdict verdict = verify(p, q, draft, random);
    if (!verdict.accepted) verdict.token = sample(p, random);
    return verdict;
  };
  wrong["accepts with probability p"] = [](const Distribution& p, const Distribution& q, int32_t draft,
                                           Random& random) {
    Verdict verdict = verify(p, q, draft, random);
    if (random.uniform() < probability_of(p, draft)) verdict = {true, draft};
    return verdict;
  };
  for (const auto& [name, rule] : wrong)
    EXPECT_GT(worst_deviation(rule, draws), 3 * test::implausible) << name;

  // A bias of 1 % in one token's probability: one draw in a hundred yields the most likely token whatever
  // happened.
  Verify biased = [](const Distribution& p, const Distribution& q, int32_t draft, Random& random) {
    Verdict verdict = verify(p, q, draft, random);
    if (random.uniform() < 0.01 / (1 - p.front().probability)) verdict.token = p.front().id;
    return verdict;
  };
  EXPECT_GT(worst_deviation(biased, draws), test::implausible);
}

TEST(Speculation, AcceptsAsOftenAsPossible) {
  for (const auto& [p, q] : pairs()) {
    double overlap = 0;
    for (const Candidate& candidate : q)
      overlap += std::min(candidate.probability, probability_of(p, candidate.id));
    Random random(5);
    int64_t accepted = 0;
    constexpr int64_t tries = 50'000;
    for (int64_t i = 0; i < tries; ++i) accepted += verify(p, q, sample(q, random), random).accepted ? 1 : 0;
    double share = static_cast<double>(accepted) / tries;
    EXPECT_NEAR(share, overlap, 4.5 * std::sqrt(overlap * (1 - overlap) / tries) + 1e-9);
  }
}

TEST(Speculation, OfGreedyDistributionsIsEquality) {
  Random random(1);
  Distribution three{{3, 1.0}}, four{{4, 1.0}};
  Verdict verdict = verify(three, three, 3, random);
  EXPECT_TRUE(verdict.accepted);
  EXPECT_EQ(verdict.token, 3);
  verdict = verify(three, four, 4, random);
  EXPECT_FALSE(verdict.accepted);
  EXPECT_EQ(verdict.token, 3);
}

}  // namespace
}  // namespace latente
