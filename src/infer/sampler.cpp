#include "infer/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <unordered_map>

#include "base/error.h"
#include "tensor/backend.h"

namespace latente {
namespace {

bool more_likely(const Candidate& a, const Candidate& b) {
  return a.probability != b.probability ? a.probability > b.probability : a.id < b.id;
}

bool lower_id(const Candidate& a, const Candidate& b) { return a.id < b.id; }

double probability_of(const Distribution& distribution, int32_t id) {
  const auto found = std::lower_bound(distribution.begin(), distribution.end(), Candidate{id}, lower_id);
  return found != distribution.end() && found->id == id ? found->probability : 0.0;
}

void renormalise(Distribution& distribution) {
  double sum = 0.0;
  for (const Candidate& candidate : distribution) sum += candidate.probability;
  const double inverse = 1.0 / sum;
  for (Candidate& candidate : distribution) candidate.probability *= inverse;
}

bool within(std::span<const float> logits, int32_t id) {
  return id >= 0 && static_cast<size_t>(id) < logits.size();
}

void add_bias(std::span<float> logits, const SamplingOptions& options) {
  for (const auto& [id, bias] : options.logit_bias) {
    if (within(logits, id)) logits[static_cast<size_t>(id)] += static_cast<float>(bias);
  }
}

void penalise(std::span<float> logits, const History& history, const SamplingOptions& options) {
  const double repetition = options.repetition_penalty, presence = options.presence_penalty,
               frequency = options.frequency_penalty;
  if (repetition == 1.0 && presence == 0.0 && frequency == 0.0) return;
  const size_t size = history.tokens.size();
  const size_t first =
      options.penalty_window < 0 ? 0 : size - std::min(size, static_cast<size_t>(options.penalty_window));
  std::unordered_map<int32_t, int64_t> written;  // token seen → how often in the reply
  for (size_t i = first; i < size; ++i) written[history.tokens[i]] += i >= history.prompt ? 1 : 0;
  for (const auto& [id, count] : written) {
    if (!within(logits, id)) continue;
    double logit = logits[static_cast<size_t>(id)];
    logit = logit > 0 ? logit / repetition : logit * repetition;
    if (count > 0) logit -= presence + static_cast<double>(count) * frequency;
    logits[static_cast<size_t>(id)] = static_cast<float>(logit);
  }
}

void keep_admitted(std::span<float> logits, std::span<const uint64_t> admitted) {
  if (admitted.empty()) return;
  LATENTE_ASSERT(admitted.size() * 64 >= logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    // NaN stays, to be found.
    if ((admitted[i / 64] >> (i % 64) & 1) == 0 && !std::isnan(logits[i]))
      logits[i] = -std::numeric_limits<float>::infinity();
  }
}

int32_t most_likely(std::span<const float> logits) {
  size_t best = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i])) fail("the model's logits are not numbers (NaN at token {})", i);
    if (logits[i] > logits[best]) best = i;
  }
  if (std::isinf(logits[best]))
    fail("the model's logits are not finite{}", logits[best] < 0 ? " for any token that may come next" : "");
  return static_cast<int32_t>(best);
}

// All but the `count` most likely, which come first.
void keep_most_likely(Distribution& all, size_t count) {
  if (count >= all.size()) return;
  std::nth_element(all.begin(), all.begin() + static_cast<ptrdiff_t>(count), all.end(), more_likely);
  all.resize(count);
}

// How many of the most likely it takes for their probabilities to satisfy reached(sum); these come first, in
// falling order, and only as many are sorted as may be among them.
template <class Reached>
size_t sort_until(Distribution& all, const Reached& reached) {
  double sum = 0.0;
  size_t count = 0;
  for (size_t sorted = 0; count < all.size() && !reached(sum);) {
    const auto begin = all.begin() + static_cast<ptrdiff_t>(sorted);
    sorted = std::min(std::max<size_t>(64, 4 * sorted), all.size());
    const auto end = all.begin() + static_cast<ptrdiff_t>(sorted);
    if (end != all.end()) std::nth_element(begin, end, all.end(), more_likely);
    std::sort(begin, end, more_likely);
    while (count < sorted && !reached(sum)) sum += all[count++].probability;
  }
  return count;
}

// All but the fewest that reach the probability.
void keep_top(Distribution& all, double probability) {
  all.resize(sort_until(all, [&](double sum) { return sum >= probability; }));
  renormalise(all);
}

// Ties with the last one that is needed stay, as in transformers.
void keep_typical(Distribution& all, double probability) {
  double entropy = 0.0;
  for (const Candidate& candidate : all) entropy -= candidate.probability * std::log(candidate.probability);
  std::vector<std::pair<double, size_t>> order(all.size());  // distance from the entropy, index
  for (size_t i = 0; i < all.size(); ++i) order[i] = {std::abs(-std::log(all[i].probability) - entropy), i};
  std::sort(order.begin(), order.end());
  double reached = 0.0;
  size_t count = 0;
  while (count < order.size() && reached < probability) reached += all[order[count++].second].probability;
  while (count < order.size() && order[count].first == order[count - 1].first) ++count;
  order.resize(count);
  Distribution kept;
  for (const auto& [distance, index] : order) kept.push_back(all[index]);
  all = std::move(kept);
  renormalise(all);
}

}  // namespace

void SamplingOptions::validate() const {
  if (!(temperature >= 0.0 && temperature <= 100.0))
    fail("temperature: expected 0 to 100, found {}", temperature);
  if (top_k < 0) fail("top_k: expected 0 (all) or more, found {}", top_k);
  if (!(top_p > 0.0 && top_p <= 1.0)) fail("top_p: expected above 0, at most 1, found {}", top_p);
  if (!(min_p >= 0.0 && min_p <= 1.0)) fail("min_p: expected 0 to 1, found {}", min_p);
  if (!(typical_p > 0.0 && typical_p <= 1.0))
    fail("typical_p: expected above 0, at most 1, found {}", typical_p);
  if (!(repetition_penalty > 0.0 && repetition_penalty <= 100.0)) {
    fail("repetition_penalty: expected above 0, at most 100, found {}", repetition_penalty);
  }
  if (!(std::abs(presence_penalty) <= 2.0))
    fail("presence_penalty: expected -2 to 2, found {}", presence_penalty);
  if (!(std::abs(frequency_penalty) <= 2.0))
    fail("frequency_penalty: expected -2 to 2, found {}", frequency_penalty);
  if (penalty_window < -1)
    fail("penalty_window: expected -1 (all tokens), 0 or more, found {}", penalty_window);
  for (const auto& [id, bias] : logit_bias) {
    if (id < 0) fail("logit_bias: expected token ids, found {}", id);
    if (!(std::abs(bias) <= 100.0 || bias == -std::numeric_limits<double>::infinity()))
      fail("logit_bias: {}: expected -100 to 100, or -inf, found {}", id, bias);
  }
}

Distribution distribution_of(std::span<float> logits, const History& history, const SamplingOptions& options,
                             std::span<const uint64_t> admitted) {
  add_bias(logits, options);
  penalise(logits, history, options);
  keep_admitted(logits, admitted);
  int32_t best = most_likely(logits);
  if (options.greedy()) return {{best, 1.0}};

  // Below that the random numbers, of 53 bits, are too coarse to ever draw it.
  constexpr double least_exponent = -60.0;
  const double top = logits[static_cast<size_t>(best)];
  Distribution all;
  all.reserve(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    const double exponent = (static_cast<double>(logits[i]) - top) / options.temperature;
    if (exponent > least_exponent) all.push_back({static_cast<int32_t>(i), std::exp(exponent)});
  }
  if (options.top_k > 0) keep_most_likely(all, static_cast<size_t>(options.top_k));
  renormalise(all);
  if (options.top_p < 1.0) keep_top(all, options.top_p);
  if (options.min_p > 0.0) {
    const double most = std::min_element(all.begin(), all.end(), more_likely)->probability;
    const double least = options.min_p * most;
    std::erase_if(all, [&](const Candidate& candidate) { return candidate.probability < least; });
    renormalise(all);
  }
  if (options.typical_p < 1.0) keep_typical(all, options.typical_p);
  if (!std::is_sorted(all.begin(), all.end(), lower_id)) std::sort(all.begin(), all.end(), lower_id);
  return all;
}

Distribution distribution_of(int32_t chosen) {
  if (chosen == Backend::not_a_number) fail("the model's logits are not numbers");
  if (chosen == Backend::not_finite) fail("the model's logits are not finite");
  return {{chosen, 1.0}};
}

int32_t sample(const Distribution& distribution, Random& random) {
  if (distribution.size() == 1) return distribution.front().id;
  double at = random.uniform();
  for (const Candidate& candidate : distribution) {
    at -= candidate.probability;
    if (at < 0.0) return candidate.id;
  }
  return distribution.back().id;
}

int32_t token_at(const Distribution& distribution, double number) {
  if (distribution.size() == 1) return distribution.front().id;
  thread_local Distribution sorted;
  sorted = distribution;
  const size_t count = sort_until(sorted, [&](double sum) { return sum > number; });
  return sorted[count - 1].id;
}

TokenLogprobs logprobs_of(std::span<const float> logits, int32_t token, int64_t top) {
  const double most = logits[static_cast<size_t>(most_likely(logits))];
  double sum = 0.0;
  for (float logit : logits) sum += std::exp(static_cast<double>(logit) - most);
  const double normaliser = most + std::log(sum);
  TokenLogprobs out{token, static_cast<double>(logits[static_cast<size_t>(token)]) - normaliser};
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  const auto count = static_cast<ptrdiff_t>(std::clamp<int64_t>(top, 0, std::ssize(order)));
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int32_t a, int32_t b) {
    const float left = logits[static_cast<size_t>(a)], right = logits[static_cast<size_t>(b)];
    return left != right ? left > right : a < b;
  });
  for (ptrdiff_t i = 0; i < count; ++i) {
    const int32_t id = order[static_cast<size_t>(i)];
    out.top.emplace_back(id, static_cast<double>(logits[static_cast<size_t>(id)]) - normaliser);
  }
  return out;
}

Verdict verify(const Distribution& p, const Distribution& q, int32_t draft, Random& random) {
  double wanted = probability_of(p, draft), drafted = probability_of(q, draft);
  LATENTE_ASSERT(drafted > 0.0);
  if (wanted >= drafted || random.uniform() * drafted < wanted) return {true, draft};
  Distribution residual;
  auto taken = q.begin();
  for (const Candidate& candidate : p) {
    while (taken != q.end() && taken->id < candidate.id) ++taken;
    const double less = taken != q.end() && taken->id == candidate.id ? taken->probability : 0.0;
    if (candidate.probability > less) residual.push_back({candidate.id, candidate.probability - less});
  }
  LATENTE_ASSERT(!residual.empty());
  renormalise(residual);
  return {false, sample(residual, random)};
}

}  // namespace latente
