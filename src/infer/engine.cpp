#include "infer/engine.h"

#include <algorithm>
#include <chrono>

namespace latente {
namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

Engine::Engine(Backend& backend, const Transformer& model, const RunnerOptions& options)
    : config_(&model.config()),
      runner_(backend, model, options),
      draft_length_(static_cast<int64_t>(model.mtp.size())),
      predicted_(model.mtp.size(), 0) {}

std::span<float> Engine::row(std::span<float> logits, size_t index) const {
  size_t vocabulary = static_cast<size_t>(config_->vocab_size);
  return logits.subspan(index * vocabulary, vocabulary);
}

void Engine::check(std::span<const int32_t> prompt, const GenerationOptions& options) const {
  options.sampling.validate();
  if (prompt.empty()) fail("the prompt is empty");
  if (static_cast<int64_t>(prompt.size()) >= runner_.context()) {
    fail("the prompt has {} tokens, the context holds {}", prompt.size(), runner_.context());
  }
  for (int32_t id : prompt) {
    if (id < 0 || id >= config_->vocab_size)
      fail("token {} lies outside the vocabulary of {}", id, config_->vocab_size);
  }
  for (const auto& [id, bias] : options.sampling.logit_bias) {
    if (id >= config_->vocab_size)
      fail("logit_bias: token {} lies outside the vocabulary of {}", id, config_->vocab_size);
  }
  if (options.max_tokens < 0) fail("max_tokens: expected 0 or more, found {}", options.max_tokens);
  if (options.draft < -1 || options.draft > 7)
    fail("draft: expected 0 to 7 tokens, or -1, found {}", options.draft);
}

// Runs every module in use over the positions whose later tokens are known, up to what the main model has
// processed.
void Engine::catch_up(int64_t processed) {
  for (size_t k = 0; k < predicted_.size() && static_cast<int64_t>(k) < depth_; ++k) {
    int64_t ahead = static_cast<int64_t>(k) + 1;
    int64_t end = std::min(processed, static_cast<int64_t>(tokens_.size()) - ahead);
    for (int64_t first = predicted_[k]; first < end;) {
      int64_t count = std::min(end - first, runner_.chunk());
      runner_.predict(
          static_cast<int64_t>(k),
          std::span(tokens_).subspan(static_cast<size_t>(first + ahead), static_cast<size_t>(count)), first);
      first += count;
    }
    predicted_[k] = std::max(predicted_[k], end);
  }
}

std::span<float> Engine::prefill(std::span<const int32_t> prompt, int64_t reuse) {
  tokens_.assign(prompt.begin(), prompt.end());
  for (int64_t& position : predicted_) position = std::min(position, reuse);
  int64_t count = static_cast<int64_t>(prompt.size());
  std::span<float> logits;
  for (processed_ = reuse; processed_ < count;) {
    int64_t piece = std::min(count - processed_, runner_.chunk());
    if (processed_ > 0) catch_up(processed_);
    logits = runner_.forward(prompt.subspan(static_cast<size_t>(processed_), static_cast<size_t>(piece)),
                             processed_, 1);
    processed_ += piece;
  }
  return logits;
}

std::vector<Engine::Draft> Engine::draft(int64_t count, size_t prompt, const SamplingOptions& sampling,
                                         Random& random) {
  std::vector<Draft> drafts;
  std::vector<int32_t> sequence = tokens_;  // with the drafts so far
  int64_t known = static_cast<int64_t>(tokens_.size()), last = processed_ - 1;
  for (int64_t j = 0; j < count; ++j) {
    std::span<float> logits;
    if (j < runner_.modules()) {
      int64_t first = predicted_[static_cast<size_t>(j)];
      LATENTE_ASSERT(first <= last);
      auto later = std::span(sequence).subspan(static_cast<size_t>(first + j + 1),
                                               static_cast<size_t>(last - first + 1));
      logits = runner_.predict(j, later, first);
      predicted_[static_cast<size_t>(j)] = std::max<int64_t>(known - 1 - j, 0);
    } else {
      logits = runner_.predict_again(sequence.back(), last + 1 + j - runner_.modules());
    }
    Distribution distribution = distribution_of(logits, {sequence, prompt}, sampling);
    int32_t token = sample(distribution, random);
    sequence.push_back(token);
    drafts.push_back({token, std::move(distribution)});
  }
  return drafts;
}

GenerationStats Engine::generate(std::span<const int32_t> prompt, const GenerationOptions& options,
                                 const std::function<bool(GeneratedToken)>& on_token) {
  check(prompt, options);
  GenerationStats stats;
  stats.prompt_tokens = static_cast<int64_t>(prompt.size());
  if (options.max_tokens == 0) return stats;
  auto start = std::chrono::steady_clock::now();

  depth_ = options.draft < 0 ? runner_.modules() : options.draft;
  if (runner_.modules() == 0) depth_ = 0;
  auto differ = std::mismatch(prompt.begin(), prompt.end(), tokens_.begin(), tokens_.end()).first;
  int64_t same = differ - prompt.begin();
  int64_t reuse = std::min({same, processed_, stats.prompt_tokens - 1});
  for (size_t k = 0; k < predicted_.size(); ++k) {
    // Module k has read k + 1 tokens ahead, maybe of the old sequence alone.
    predicted_[k] = std::clamp<int64_t>(same - 1 - static_cast<int64_t>(k), 0, predicted_[k]);
    // Modules that were not in use are behind; what they need now, the main model has to run again.
    if (static_cast<int64_t>(k) < depth_) reuse = std::min(reuse, predicted_[k]);
  }
  stats.reused_tokens = reuse;
  runner_.prepare(depth_);
  const bool may_adapt =
      options.draft < 0 && depth_ > 0 && (options.sampling.temperature == 0 || !options.repeatable);
  Random random(options.sampling.seed);

  // Emits a token; false ends the generation.
  auto emit = [&](int32_t token, bool drafted) {
    if (std::find(options.stop_tokens.begin(), options.stop_tokens.end(), token) !=
        options.stop_tokens.end()) {
      stats.finish = Finish::stop_token;
      return false;
    }
    tokens_.push_back(token);
    ++stats.generated_tokens;
    if (!on_token({token, drafted})) {
      stats.finish = Finish::interrupted;
      return false;
    }
    stats.finish = Finish::length;
    if (stats.generated_tokens >= options.max_tokens) return false;
    stats.finish = Finish::context_full;
    return static_cast<int64_t>(tokens_.size()) < runner_.context();
  };

  std::span<float> logits = prefill(prompt, reuse);
  Distribution next = distribution_of(logits, {tokens_, prompt.size()}, options.sampling);
  catch_up(processed_);
  stats.prompt_seconds = seconds_since(start);
  start = std::chrono::steady_clock::now();
  bool going = emit(sample(next, random), false);
  while (going) {
    int64_t known = static_cast<int64_t>(tokens_.size());
    int64_t room = std::min(options.max_tokens - stats.generated_tokens, runner_.context() - known) - 1;
    const size_t plans = runner_.plans();
    const auto pass_start = std::chrono::steady_clock::now();
    const bool adaptive = may_adapt && room >= depth_;
    const int64_t wanted = adaptive ? draft_length_.choose() : std::clamp<int64_t>(room, 0, depth_);
    // Passes without drafts leave the modules behind; the hidden states they need are kept for two chunks.
    const int64_t behind = adaptive ? processed_ - predicted_[0] : 0;
    const bool catching_up = wanted > 0 ? behind > depth_ + 1 : behind >= runner_.chunk() / 2;
    if (catching_up) catch_up(processed_ - 1);
    std::vector<Draft> drafts = draft(wanted, prompt.size(), options.sampling, random);
    std::vector<int32_t> input{tokens_.back()};
    for (const Draft& proposal : drafts) input.push_back(proposal.token);
    logits = runner_.forward(input, processed_, static_cast<int64_t>(input.size()));
    ++stats.passes;
    stats.drafted += static_cast<int64_t>(drafts.size());

    size_t j = 0;
    int64_t right = 0;
    for (bool rejected = false; going && !rejected && j < drafts.size(); ++j) {
      next = distribution_of(row(logits, j), {tokens_, prompt.size()}, options.sampling);
      Verdict verdict = verify(next, drafts[j].distribution, drafts[j].token, random);
      rejected = !verdict.accepted;
      right += verdict.accepted ? 1 : 0;
      going = emit(verdict.token, verdict.accepted);
      if (rejected) break;
    }
    if (going && j == drafts.size()) {
      next = distribution_of(row(logits, j), {tokens_, prompt.size()}, options.sampling);
      going = emit(sample(next, random), false);
    }
    stats.accepted += right;
    if (adaptive)
      draft_length_.record(wanted, right, seconds_since(pass_start), catching_up || runner_.plans() > plans);
    processed_ =
        std::min(processed_ + static_cast<int64_t>(input.size()), static_cast<int64_t>(tokens_.size()) - 1);
  }
  stats.decode_seconds = seconds_since(start);
  return stats;
}

}  // namespace latente
