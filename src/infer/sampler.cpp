#include "infer/sampler.h"

#include <algorithm>
#include <cmath>
#include <unordered_set>

#include "base/error.h"

namespace latente {
namespace {

bool more_likely(const Candidate& a, const Candidate& b) {
  return a.probability != b.probability ? a.probability > b.probability : a.id < b.id;
}

double probability_of(const Distribution& distribution, int32_t id) {
  for (const Candidate& candidate : distribution) {
    if (candidate.id == id) return candidate.probability;
  }
  return 0.0;
}

void renormalise(Distribution& distribution) {
  double sum = 0.0;
  for (const Candidate& candidate : distribution) sum += candidate.probability;
  for (Candidate& candidate : distribution) candidate.probability /= sum;
}

void penalise(std::span<float> logits, std::span<const int32_t> history, double penalty) {
  if (penalty == 1.0) return;
  std::unordered_set<int32_t> seen(history.begin(), history.end());
  for (int32_t id : seen) {
    if (id < 0 || static_cast<size_t>(id) >= logits.size()) continue;
    float& logit = logits[static_cast<size_t>(id)];
    logit = static_cast<float>(logit > 0 ? logit / penalty : logit * penalty);
  }
}

int32_t most_likely(std::span<const float> logits) {
  size_t best = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i])) fail("the model's logits are not numbers (NaN at token {})", i);
    if (logits[i] > logits[best]) best = i;
  }
  if (std::isinf(logits[best])) fail("the model's logits are not finite");
  return static_cast<int32_t>(best);
}

}  // namespace

void SamplingOptions::validate() const {
  if (!(temperature >= 0.0 && temperature <= 100.0))
    fail("temperature: expected 0 to 100, found {}", temperature);
  if (top_k < 0) fail("top_k: expected 0 (all) or more, found {}", top_k);
  if (!(top_p > 0.0 && top_p <= 1.0)) fail("top_p: expected above 0, at most 1, found {}", top_p);
  if (!(min_p >= 0.0 && min_p <= 1.0)) fail("min_p: expected 0 to 1, found {}", min_p);
  if (!(repetition_penalty > 0.0 && repetition_penalty <= 100.0)) {
    fail("repetition_penalty: expected above 0, at most 100, found {}", repetition_penalty);
  }
}

Distribution distribution_of(std::span<float> logits, std::span<const int32_t> history,
                             const SamplingOptions& options) {
  penalise(logits, history, options.repetition_penalty);
  int32_t best = most_likely(logits);
  if (options.greedy()) return {{best, 1.0}};

  double top = logits[static_cast<size_t>(best)];
  Distribution all(logits.size());
  double sum = 0.0;
  for (size_t i = 0; i < logits.size(); ++i) {
    double weight = std::exp((static_cast<double>(logits[i]) - top) / options.temperature);
    all[i] = {static_cast<int32_t>(i), weight};
    sum += weight;
  }
  for (Candidate& candidate : all) candidate.probability /= sum;

  size_t keep = options.top_k > 0 ? std::min(all.size(), static_cast<size_t>(options.top_k)) : all.size();
  if (keep < all.size()) {
    std::nth_element(all.begin(), all.begin() + static_cast<ptrdiff_t>(keep), all.end(), more_likely);
    all.resize(keep);
  }
  std::sort(all.begin(), all.end(), more_likely);
  renormalise(all);
  if (options.top_p < 1.0) {
    double reached = 0.0;
    size_t count = 0;
    while (count < all.size() && reached < options.top_p) reached += all[count++].probability;
    all.resize(count);
    renormalise(all);
  }
  double least = options.min_p * all.front().probability;
  std::erase_if(all, [&](const Candidate& candidate) {
    return candidate.probability < least || candidate.probability == 0;
  });
  renormalise(all);
  return all;
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

Verdict verify(const Distribution& p, const Distribution& q, int32_t draft, Random& random) {
  double wanted = probability_of(p, draft), drafted = probability_of(q, draft);
  LATENTE_ASSERT(drafted > 0.0);
  if (wanted >= drafted || random.uniform() * drafted < wanted) return {true, draft};
  std::vector<std::pair<int32_t, double>> drafts;
  for (const Candidate& candidate : q) drafts.emplace_back(candidate.id, candidate.probability);
  std::sort(drafts.begin(), drafts.end());
  Distribution residual;
  for (const Candidate& candidate : p) {
    auto found = std::lower_bound(drafts.begin(), drafts.end(), std::pair(candidate.id, -1.0));
    double taken = found != drafts.end() && found->first == candidate.id ? found->second : 0.0;
    if (candidate.probability > taken) residual.push_back({candidate.id, candidate.probability - taken});
  }
  LATENTE_ASSERT(!residual.empty());
  renormalise(residual);
  return {false, sample(residual, random)};
}

}  // namespace latente
