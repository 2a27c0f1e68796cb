#include "infer/likelihood.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "infer/sequence_runner.h"
#include "infer/uncached_pass.h"

namespace latente {
namespace {

constexpr int64_t rows_at_once = 128;  // of logits

double score_of(std::span<const double> logits, int32_t token) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (double logit : logits) sum += std::exp(logit - largest);
  return largest + std::log(sum) - logits[static_cast<size_t>(token)];
}

// The hidden states of `count` tokens from the beginning of a text, and the logits of some of them.
class Reader {
 public:
  Reader(Backend& backend, const Transformer& model, int64_t count)
      : backend_(backend), count_(count), body_(backend, model, count), head_(backend) {
    rows_ =
        head_.input("hidden states", {std::min(rows_at_once, count), body_.hidden[1]}, body_.hidden.dtype());
    logits_ = model.logits(rows_);
    head_.keep(logits_);
    head_.compile();
    head_.allocate();

    states_.resize(static_cast<size_t>(body_.hidden.view().bytes()));
    logit_bytes_.resize(static_cast<size_t>(logits_.view().bytes()));
    row_.resize(static_cast<size_t>(logits_[1]));
  }

  int64_t count() const { return count_; }

  // Adds the likelihoods of tokens[first], tokens[first + 1], ..., which are `count` in all.
  void score(std::span<const int32_t> tokens, int64_t first, std::vector<double>& scores) {
    backend_.upload(tokens.data(), body_.ids.view());
    body_.plan.run();
    backend_.download(body_.hidden.view(), states_.data());
    const int64_t row_bytes = body_.hidden[1] * size_of(body_.hidden.dtype()), at_once = rows_[0];
    for (int64_t token = first; token < count_;) {
      // The rows that predict token, token + 1, ...; at the end some that were done before.
      const int64_t row = std::min(token - 1, count_ - at_once);
      backend_.upload(states_.data() + row * row_bytes, rows_.view());
      head_.run();
      backend_.download(logits_.view(), logit_bytes_.data());
      for (; token < count_ && token - 1 < row + at_once; ++token)
        scores.push_back(score_of(token - 1 - row, tokens[static_cast<size_t>(token)]));
    }
  }

 private:
  double score_of(int64_t row, int32_t token) {
    const int64_t vocabulary = logits_[1];
    const char* from = logit_bytes_.data() + row * vocabulary * size_of(logits_.dtype());
    convert(logits_.dtype(), from, DType::f64, row_.data(), vocabulary);
    return latente::score_of(row_, token);
  }

  Backend& backend_;
  int64_t count_;
  UncachedPass body_;
  Plan head_;
  Tensor rows_, logits_;
  std::vector<char> states_, logit_bytes_;
  std::vector<double> row_;
};

// The same over a cache.
class CachedReader {
 public:
  CachedReader(Backend& backend, const Transformer& model, int64_t count, DType cache)
      : count_(count), runner_(backend, model, {.context = count, .cache_type = cache}) {}

  int64_t count() const { return count_; }

  void score(std::span<const int32_t> tokens, int64_t first, std::vector<double>& scores) {
    std::vector<double> row;
    for (int64_t at = 0; at < count_;) {
      const int64_t piece = std::min(runner_.runner().options().chunk, count_ - at);
      const auto logits =
          runner_.forward(tokens.subspan(static_cast<size_t>(at), static_cast<size_t>(piece)), at, piece);
      const size_t vocabulary = logits.size() / static_cast<size_t>(piece);
      for (int64_t i = 0; i < piece; ++i) {
        const int64_t token = at + i + 1;
        if (token < first || token >= count_) continue;
        const auto of_token = logits.subspan(static_cast<size_t>(i) * vocabulary, vocabulary);
        row.assign(of_token.begin(), of_token.end());
        scores.push_back(score_of(row, tokens[static_cast<size_t>(token)]));
      }
      at += piece;
    }
  }

 private:
  int64_t count_;
  SequenceRunner runner_;
};

template <class Any>
std::vector<double> score_all(Any&& reader, std::span<const int32_t> tokens,
                              const LikelihoodOptions& options) {
  const int64_t total = static_cast<int64_t>(tokens.size());
  std::vector<double> scores;
  scores.reserve(tokens.size());
  for (int64_t done = 1, begin = 0; done < total; begin += options.stride) {
    // The last reading ends with the text.
    const int64_t start = std::min(begin, total - reader.count());
    reader.score(tokens.subspan(static_cast<size_t>(start), static_cast<size_t>(reader.count())),
                 done - start, scores);
    done = start + reader.count();
    if (options.progress) options.progress(done, total);
  }
  return scores;
}

}  // namespace

std::vector<double> negative_log_likelihoods(Backend& backend, const Transformer& model,
                                             std::span<const int32_t> tokens,
                                             const LikelihoodOptions& options) {
  const int64_t total = static_cast<int64_t>(tokens.size());
  if (total < 2) fail("perplexity: expected a text of at least two tokens, found {}", total);
  if (options.stride < 1 || options.stride >= options.context)
    fail("perplexity: expected a stride of 1 to {}, one below the context, found {}", options.context - 1,
         options.stride);
  const int64_t at_once = std::min(options.context, total);
  if (options.cache) return score_all(CachedReader(backend, model, at_once, *options.cache), tokens, options);
  return score_all(Reader(backend, model, at_once), tokens, options);
}

double Perplexity::perplexity() const { return std::exp(mean); }

double Perplexity::bits_per_byte(int64_t bytes) const {
  return mean * static_cast<double>(tokens) / std::numbers::ln2 / static_cast<double>(bytes);
}

Perplexity perplexity_of(std::span<const double> scores) {
  Perplexity result;
  result.tokens = static_cast<int64_t>(scores.size());
  const double count = static_cast<double>(scores.size());
  result.mean = std::accumulate(scores.begin(), scores.end(), 0.0) / count;
  double squares = 0;
  for (double score : scores) squares += (score - result.mean) * (score - result.mean);
  if (scores.size() > 1) result.standard_error = std::sqrt(squares / (count - 1) / count);
  return result;
}

}  // namespace latente
