#include <algorithm>
#include <cmath>
#include <vector>

#include "base/threads.h"
#include "cpu/cpu_backend.h"
#include "tensor/choice.h"

namespace latente {
namespace {

template <class T>
int32_t most_likely_of(const T* logits, int64_t count) {
  int64_t best = 0;
  bool numbers = true;
  for (int64_t i = 0; i < count; ++i) {
    numbers = numbers && logits[i] == logits[i];
    if (logits[i] > logits[best]) best = i;
  }
  if (!numbers) return Backend::not_a_number;
  return std::isinf(logits[best]) ? Backend::not_finite : static_cast<int32_t>(best);
}

// The tokens that have a weight, in falling order, sorted as far as somebody has looked.
class Falling {
 public:
  struct Token {
    float logit;
    int32_t id;
    uint64_t weight;
  };

  template <class T>
  Falling(const T* logits, int64_t count, float top, float inverse_temperature) {
    for (int64_t i = 0; i < count; ++i) {
      const auto logit = static_cast<float>(logits[i]);
      const float exponent = (logit - top) * inverse_temperature;
      if (exponent <= Choice::least_exponent) continue;
      const auto weight = static_cast<uint64_t>(std::exp(exponent) * Choice::one);
      if (weight > 0) all_.push_back({logit, static_cast<int32_t>(i), weight});
    }
  }

  size_t size() const { return all_.size(); }
  const Token& operator[](size_t i) {
    while (i >= sorted_) {
      const auto begin = at(sorted_);
      sorted_ = std::min(std::max<size_t>(64, 4 * sorted_), all_.size());
      if (sorted_ < all_.size()) std::nth_element(begin, at(sorted_), all_.end(), before);
      std::sort(begin, at(sorted_), before);
    }
    return all_[i];
  }
  // All but the first ones go.
  void keep(size_t count) {
    if (count >= all_.size()) return;
    if (count > sorted_) std::nth_element(at(sorted_), at(count), all_.end(), before);
    all_.resize(count);
    sorted_ = std::min(sorted_, count);
  }
  uint64_t weight() const {
    uint64_t sum = 0;
    for (const Token& token : all_) sum += token.weight;
    return sum;
  }
  // The first token with which the sum of weights exceeds `least`, which is less than all of them.
  size_t find(uint64_t least) {
    uint64_t sum = 0;
    for (size_t i = 0;; ++i) {
      sum += (*this)[i].weight;
      if (sum > least) return i;
    }
  }

 private:
  static bool before(const Token& a, const Token& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
  }
  std::vector<Token>::iterator at(size_t i) { return all_.begin() + static_cast<ptrdiff_t>(i); }

  std::vector<Token> all_;
  size_t sorted_ = 0;
};

template <class T>
int32_t chosen_of(const T* logits, int64_t count, const Choice& choice) {
  const int32_t best = most_likely_of(logits, count);
  if (best < 0 || choice.greedy()) return best;
  Falling tokens(logits, count, static_cast<float>(logits[best]), choice.inverse_temperature);
  if (choice.top_k > 0) tokens.keep(static_cast<size_t>(choice.top_k));
  uint64_t weight = tokens.weight();
  if (choice.top_p < 1) {
    const double share = std::ceil(static_cast<double>(choice.top_p) * static_cast<double>(weight));
    tokens.keep(tokens.find(std::min(static_cast<uint64_t>(share), weight) - 1) + 1);
    weight = tokens.weight();
  }
  if (choice.min_p > 0) {
    const float least = choice.min_p * Choice::one;
    size_t kept = 1;
    while (kept < tokens.size() && static_cast<float>(tokens[kept].weight) >= least) ++kept;
    tokens.keep(kept);
    weight = tokens.weight();
  }
  const uint64_t number = static_cast<uint64_t>(choice.high) << 32 | choice.low;
  return tokens[tokens.find(static_cast<uint64_t>(static_cast<unsigned __int128>(number) * weight >> 64))].id;
}

}  // namespace

void CpuBackend::choose(View logits, View choices, View out) {
  LATENTE_ASSERT(logits.shape.rank() == 2 && out.count() == logits[0] && out.contiguous());
  LATENTE_ASSERT(choices.count() == logits[0] * Choice::words && choices.contiguous());
  pool_.parallel_for(logits[0], 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Choice& choice = reinterpret_cast<const Choice*>(choices.as<int32_t>())[t];
      int32_t& found = out.as<int32_t>()[t];
      if (logits.dtype == DType::f64) {
        found = chosen_of(logits.as<double>() + t * logits.stride(0), logits[1], choice);
      } else {
        found = chosen_of(logits.as<float>() + t * logits.stride(0), logits[1], choice);
      }
    }
  });
}

void CpuBackend::take_chosen(View ids, View from, View chosen, View out) {
  LATENTE_ASSERT(from.count() == ids.count() && out.count() == ids.count());
  for (int64_t t = 0; t < ids.count(); ++t) {
    const int32_t row = from.as<int32_t>()[t];
    out.as<int32_t>()[t] = row < 0 ? ids.as<int32_t>()[t] : std::max<int32_t>(chosen.as<int32_t>()[row], 0);
  }
}

}  // namespace latente
