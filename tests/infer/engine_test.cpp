#include "infer/engine.h"

#include <gtest/gtest.h>

#include <limits>
#include <set>

#include "infer/statistics.h"
#include "infer/support.h"
#include "model/weights.h"

namespace latente {
namespace {

using namespace test;

struct Trial {
  Tiny tiny;
  DType type = DType::f32;
  double quiet = 1;
};

Trial random_trial(Random& random) {
  Trial trial;
  trial.tiny.mtp = static_cast<int64_t>(random.below(4));
  trial.tiny.tied = random.chance(0.3);
  trial.tiny.compressed = random.chance(0.5);
  trial.tiny.layers = random.between(1, 3);
  trial.tiny.vocabulary = random.between(5, 70);
  if (random.chance(0.15)) trial.tiny.family = "llama", trial.tiny.mtp = 0;
  const DType types[] = {DType::f32, DType::f32, DType::bf16, DType::f64};
  trial.type = types[random.below(4)];
  trial.quiet = random.chance(0.75) ? random.uniform(0.05, 0.5) : 1.0;
  return trial;
}

// Greedy decoding with drafts gives plain decoding's text, token for token: over random models, prompts,
// numbers of drafts (also beyond the modules), stop tokens, limits and cache layouts.
TEST(Engine, SpeculativeTextIsPlainText) {
  GenerationStats all;
  std::set<Finish> finishes;
  int64_t stops_in_a_run = 0;
  for (uint64_t seed = 1; seed <= 80; ++seed) {
    Random random(seed);
    Trial trial = random_trial(random);
    Transformer model = made(trial.tiny, seed, trial.quiet, trial.type);
    RunnerOptions how;
    how.context = random.between(12, 90);
    how.page_size = random.between(1, 20);
    how.chunk = random.between(1, 40);
    how.cache_type = random.chance(0.3) ? DType::bf16 : DType::f32;
    std::vector<int32_t> prompt = random_tokens(
        random, random.between(1, std::min<int64_t>(how.context - 1, 40)), trial.tiny.vocabulary);
    GenerationOptions options;
    options.max_tokens = random.between(1, 60);
    SamplingOptions& sampling = options.sampling;
    if (random.chance(0.3)) sampling.repetition_penalty = random.uniform(0.8, 1.6);
    if (random.chance(0.3)) sampling.presence_penalty = random.uniform(-0.5, 2);
    if (random.chance(0.3)) sampling.frequency_penalty = random.uniform(-0.5, 2);
    if (random.chance(0.5)) sampling.penalty_window = random.between(0, 20);
    if (random.chance(0.3))
      sampling.logit_bias = {{0, -std::numeric_limits<double>::infinity()}, {1, 0.5}, {2, -3.0}};
    Text whole = plain(model, how, prompt, options);
    // Half of the trials stop at a token that occurs somewhere in the text.
    if (random.chance(0.5)) options.stop_tokens = {whole.tokens[random.below(whole.tokens.size())], -5};
    Text want = plain(model, how, prompt, options);
    finishes.insert(want.finish);
    if (random.chance(0.5)) pack_weights(model, backend());
    for (int64_t depth = -1; depth <= 7; ++depth) {
      Engine engine(backend(), model, how);
      engine.chain_passes(seed % 2 == 0);
      options.draft = depth;
      Text got;
      int64_t drafted = 0;
      GenerationStats stats = engine.generate(prompt, options, [&](GeneratedToken token) {
        got.tokens.push_back(token.id);
        drafted += token.drafted ? 1 : 0;
        return true;
      });
      got.finish = stats.finish;
      ASSERT_EQ(got, want) << "seed " << seed << ", draft " << depth << ", " << trial.tiny.mtp << " modules";
      bool stopped = stats.finish == Finish::stop_token;
      EXPECT_EQ(stats.generated_tokens, static_cast<int64_t>(want.tokens.size()));
      EXPECT_EQ(stats.prompt_tokens, static_cast<int64_t>(prompt.size()));
      EXPECT_EQ(stats.reused_tokens, 0);
      EXPECT_LE(stats.accepted, stats.drafted);
      EXPECT_LE(stats.accepted - drafted, stopped ? 1 : 0);
      stops_in_a_run += stopped && stats.accepted > drafted ? 1 : 0;
      if (depth == 0 || (trial.tiny.mtp == 0 && depth > 0)) {
        EXPECT_EQ(stats.drafted, 0);
        EXPECT_EQ(stats.passes, stats.generated_tokens - (stopped ? 0 : 1));
      } else if (depth > 0) {
        EXPECT_LE(stats.drafted, depth * stats.passes);
      }
      all.drafted += stats.drafted, all.accepted += stats.accepted;
    }
  }
  // The trials would prove little if nothing was ever accepted, or everything.
  EXPECT_EQ(finishes.size(), 3u);
  EXPECT_GT(stops_in_a_run, 5);
  EXPECT_GT(all.acceptance(), 0.1);
  EXPECT_LT(all.acceptance(), 0.9);
  std::printf("%ld of %ld drafts accepted, %ld stop tokens inside drafted runs\n",
              static_cast<long>(all.accepted), static_cast<long>(all.drafted),
              static_cast<long>(stops_in_a_run));
}

// A backend that prefers block tables of some lengths, as one with kernels for short contexts does.
class ShortTables : public CpuBackend {
 public:
  ShortTables() : CpuBackend(ThreadOptions{2}) {}
  int64_t short_table(int64_t tokens, int64_t, View, View, int64_t entries) const override {
    for (const int64_t length : {16, 40, 64}) {
      if (tokens <= 6 && entries <= length) return length;
    }
    return 0;
  }
  void attention_paged(View q, View keys, View values, const Pages& pages, double scale, View out) override {
    const int64_t named = pages.block_table.shape[1] * keys.shape[1];
    for (int64_t t = 0; t < pages.position.shape[0]; ++t) {
      const int32_t position = static_cast<const int32_t*>(pages.position.data)[t];
      ASSERT_LT(position, named);
    }
    lengths.insert(named);
    CpuBackend::attention_paged(q, keys, values, pages, scale, out);
  }
  std::set<int64_t> lengths;
};

TEST(Engine, ShortBlockTablesChangeNothing) {
  for (uint64_t seed = 1; seed <= 6; ++seed) {
    Tiny tiny;
    tiny.mtp = static_cast<int64_t>(seed % 3);
    Transformer model = made(tiny, seed, 0.2);
    RunnerOptions how;
    how.context = 96;
    how.page_size = seed % 2 == 0 ? 8 : 5;
    how.chunk = 16;
    Random random(seed);
    const std::vector<int32_t> prompt = random_tokens(random, 9, tiny.vocabulary);
    GenerationOptions options;
    options.max_tokens = 80;
    options.draft = tiny.mtp;
    ShortTables backend_of_some;
    Engine engine(backend_of_some, model, how);
    engine.chain_passes(seed % 2 == 0);
    EXPECT_EQ(generated(engine, prompt, options), plain(model, how, prompt, options)) << "seed " << seed;
    EXPECT_GE(backend_of_some.lengths.size(), 4u) << "seed " << seed;
  }
}

// An engine that is used again reuses what its cache holds and still gives the text of a fresh one.
TEST(Engine, ReusesPrefixesWithoutATrace) {
  int64_t reused = 0;
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    Random random(seed, 1);
    Trial trial = random_trial(random);
    Transformer model = made(trial.tiny, seed, trial.quiet, trial.type);
    // Chunks of at most 8 always attend over the latents: the same bits whatever was there before.
    RunnerOptions how{.context = 80, .page_size = 16, .chunk = random.between(1, 8)};
    how.cache_type = random.chance(0.3) ? DType::bf16 : DType::f32;
    Engine used(backend(), model, how);
    std::vector<int32_t> text;
    for (int turn = 0; turn < 8; ++turn) {
      // The text so far, cut somewhere, and something new behind.
      if (random.chance(0.4)) text.resize(random.below(text.size() + 1));
      if (text.size() > 50) text.resize(20);
      for (int32_t id : random_tokens(random, random.between(1, 12), trial.tiny.vocabulary))
        text.push_back(id);
      GenerationOptions options;
      options.max_tokens = random.between(1, 14);
      options.draft = random.between(-1, 7);
      options.sampling.seed = random.below(1000);
      if (random.chance(0.5)) options.sampling.temperature = 0.9, options.sampling.top_p = 0.95;
      if (random.chance(0.3)) options.stop_tokens = {static_cast<int32_t>(random.below(5))};
      Engine fresh(backend(), model, how);
      GenerationStats stats;
      Text want = generated(fresh, text, options), got = generated(used, text, options, &stats);
      ASSERT_EQ(got.tokens, want.tokens)
          << "seed " << seed << ", turn " << turn << ", draft " << options.draft << " T"
          << options.sampling.temperature << " cache " << name_of(how.cache_type) << " w "
          << name_of(trial.type) << " reused " << stats.reused_tokens << " of " << text.size() << " chunk "
          << how.chunk << " mtp " << trial.tiny.mtp << " page " << how.page_size << " " << trial.tiny.family;
      EXPECT_LT(stats.reused_tokens, stats.prompt_tokens);
      reused += stats.reused_tokens;
      text.insert(text.end(), got.tokens.begin(), got.tokens.end());
    }
  }
  EXPECT_GT(reused, 1000);
}

TEST(Engine, ReusesTheWholePromptForTheSameModules) {
  Transformer model = made({.mtp = 2}, 3, 0.3);
  for (int64_t depth : {0, 1, 2, 5}) {
    Engine engine(backend(), model, {.context = 100, .page_size = 16, .chunk = 32});
    Random random(4);
    std::vector<int32_t> text = random_tokens(random, 30, 64);
    GenerationOptions options;
    options.draft = depth, options.max_tokens = 20;
    GenerationStats stats;
    Text first = generated(engine, text, options, &stats);
    EXPECT_EQ(stats.reused_tokens, 0);
    text.insert(text.end(), first.tokens.begin(), first.tokens.end());
    text.push_back(5);
    generated(engine, text, options, &stats);
    EXPECT_GE(stats.reused_tokens, 30 + 20 - 8) << "draft " << depth;
  }
}

TEST(Engine, GoesOnAfterAnInterruption) {
  Transformer model = made({.mtp = 1}, 3, 0.3);
  RunnerOptions how{.context = 100, .page_size = 16, .chunk = 8};
  Random random(4);
  std::vector<int32_t> text = random_tokens(random, 10, 64);
  GenerationOptions options;
  options.max_tokens = 60;
  Text want = plain(model, how, text, options);
  for (int64_t after : {1, 2, 3, 10, 11, 59}) {
    Engine engine(backend(), model, how);
    std::vector<int32_t> got, prompt = text;
    GenerationStats stats = engine.generate(prompt, options, [&](GeneratedToken token) {
      got.push_back(token.id);
      return static_cast<int64_t>(got.size()) < after;
    });
    EXPECT_EQ(stats.finish, Finish::interrupted);
    EXPECT_EQ(stats.generated_tokens, after);
    prompt.insert(prompt.end(), got.begin(), got.end());
    GenerationOptions rest = options;
    rest.max_tokens -= after;
    Text more = generated(engine, prompt, rest, &stats);
    got.insert(got.end(), more.tokens.begin(), more.tokens.end());
    EXPECT_EQ(got, want.tokens) << "interrupted after " << after;
    EXPECT_GT(stats.reused_tokens, 0);
  }
}

TEST(Engine, SampledTextDependsOnTheSeedAlone) {
  Transformer model = made({.mtp = 1}, 3, 0.3);
  RunnerOptions how{.context = 100, .page_size = 16, .chunk = 32};
  Engine engine(backend(), model, how), other(backend(), model, how);
  std::vector<int32_t> prompt{1, 2, 3};
  GenerationOptions options;
  options.max_tokens = 40;
  options.sampling = {.temperature = 1.2, .seed = 5};
  Text first = generated(engine, prompt, options);
  EXPECT_EQ(generated(other, prompt, options), first);
  options.sampling.seed = 6;
  EXPECT_NE(generated(other, prompt, options), first);
}

// Whatever is drafted, by modules or by looking up, and however much of it.
TEST(Engine, SampledTextWithASeedIsThatWithoutDrafts) {
  GenerationStats all;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    Random random(seed, 3);
    Tiny tiny{.mtp = random.between(0, 2), .vocabulary = random.between(5, 64)};
    Transformer model = made(tiny, seed, 0.2);
    RunnerOptions how{.context = 100, .page_size = 16, .chunk = 32};
    const std::vector<int32_t> prompt = random_tokens(random, random.between(1, 20), tiny.vocabulary);
    GenerationOptions options;
    options.max_tokens = 60;
    options.sampling = {.temperature = random.uniform(0.3, 1.2), .seed = seed};
    if (random.chance(0.5)) options.sampling.top_p = 0.9;
    options.draft = 0;
    Engine plain_engine(backend(), model, how);
    const Text want = generated(plain_engine, prompt, options);
    for (int64_t draft : {-1, 1, 3}) {
      Engine engine(backend(), model, how);
      options.draft = draft;
      GenerationStats stats;
      EXPECT_EQ(generated(engine, prompt, options, &stats), want) << "seed " << seed << ", draft " << draft;
      all.drafted += stats.drafted, all.accepted += stats.accepted;
    }
  }
  EXPECT_GT(all.acceptance(), 0.1);
  EXPECT_LT(all.acceptance(), 0.95);
}

TEST(Engine, RefusesWhatItCannotDo) {
  Transformer model = made({.mtp = 1}, 3);
  Engine engine(backend(), model, {.context = 16, .page_size = 16, .chunk = 8});
  auto message_of = [&](const std::vector<int32_t>& prompt, const GenerationOptions& options) -> std::string {
    try {
      generated(engine, prompt, options);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  GenerationOptions two;
  two.max_tokens = 2;
  EXPECT_EQ(message_of({}, two), "the prompt is empty");
  EXPECT_EQ(message_of(std::vector<int32_t>(16, 1), two), "the prompt has 16 tokens, the context holds 16");
  EXPECT_EQ(message_of({1, 64}, two), "token 64 lies outside the vocabulary of 64");
  EXPECT_EQ(message_of({1, -1}, two), "token -1 lies outside the vocabulary of 64");
  GenerationOptions bad = two;
  bad.max_tokens = -1;
  EXPECT_EQ(message_of({1}, bad), "max_tokens: expected 0 or more, found -1");
  bad = two, bad.draft = 8;
  EXPECT_EQ(message_of({1}, bad), "draft: expected 0 to 7 tokens, or -1, found 8");
  bad = two, bad.draft = -2;
  EXPECT_EQ(message_of({1}, bad), "draft: expected 0 to 7 tokens, or -1, found -2");
  bad = two, bad.sampling.top_p = 0;
  EXPECT_EQ(message_of({1}, bad), "top_p: expected above 0, at most 1, found 0");
  bad = two, bad.sampling.logit_bias = {{63, 1.0}, {64, 1.0}};
  EXPECT_EQ(message_of({1}, bad), "logit_bias: token 64 lies outside the vocabulary of 64");
  EXPECT_EQ(message_of(std::vector<int32_t>(15, 1), two), "no error");
  two.max_tokens = 0;
  GenerationStats stats;
  EXPECT_TRUE(generated(engine, std::vector<int32_t>{1}, two, &stats).tokens.empty());
  EXPECT_EQ(stats.passes, 0);
}

// -- sampled speculation, the whole engine: exactly the distribution of plain sampling --

constexpr int64_t letters = 4, text_length = 3;

// The probability of every text of three tokens, one plain pass after the other.
std::vector<double> exact(const Transformer& model, const RunnerOptions& how,
                          const std::vector<int32_t>& prompt, const SamplingOptions& sampling) {
  SequenceRunner runner(backend(), model, how);
  std::vector<double> probabilities(64, 0.0);
  auto visit = [&](auto& self, std::vector<int32_t> sequence, size_t code, double probability) -> void {
    if (sequence.size() == prompt.size() + text_length) {
      probabilities[code] += probability;
      return;
    }
    std::vector<float> logits =
        copy_of(runner.forward(std::span(&sequence.back(), 1), static_cast<int64_t>(sequence.size()) - 1, 1));
    for (const Candidate& next : distribution_of(logits, {sequence, prompt.size()}, sampling)) {
      std::vector<int32_t> longer = sequence;
      longer.push_back(next.id);
      self(self, longer, code * letters + static_cast<size_t>(next.id), probability * next.probability);
    }
  };
  for (size_t t = 0; t + 1 < prompt.size(); ++t)
    runner.forward(std::span(&prompt[t], 1), static_cast<int64_t>(t), 1);
  visit(visit, prompt, 0, 1.0);
  return probabilities;
}

// Counts by text and, summed, by token of each place: the places are what a bias of one token shows in most.
double worst_deviation(const std::vector<int64_t>& counts, const std::vector<double>& probabilities) {
  double worst = deviation(counts, probabilities);
  for (size_t place : {1, 4, 16}) {
    std::vector<int64_t> count(letters, 0);
    std::vector<double> expected(letters, 0.0);
    for (size_t code = 0; code < counts.size(); ++code) {
      count[code / place % letters] += counts[code];
      expected[code / place % letters] += probabilities[code];
    }
    worst = std::max(worst, deviation(count, expected));
  }
  return worst;
}

double share_of(const std::vector<double>& probabilities, size_t place, size_t letter) {
  double share = 0;
  for (size_t code = 0; code < probabilities.size(); ++code)
    share += code / place % letters == letter ? probabilities[code] : 0;
  return share;
}

// Makes the token `letter` likelier by 0.01 at one place, the others in proportion less.
std::vector<double> biased(std::vector<double> probabilities, size_t place, size_t letter) {
  double share = share_of(probabilities, place, letter);
  for (size_t code = 0; code < probabilities.size(); ++code) {
    probabilities[code] *=
        code / place % letters == letter ? (share + 0.01) / share : (1 - share - 0.01) / (1 - share);
  }
  return probabilities;
}

TEST(Engine, SampledSpeculationHasThePlainDistribution) {
  struct Setting {
    int64_t modules, draft;
    SamplingOptions sampling;
  };
  const std::vector<Setting> settings{{1, 1, {.temperature = 1}},
                                      {1, 2, {.temperature = 0.8, .top_p = 0.9}},
                                      {2, 2, {.temperature = 1.3, .top_k = 3, .repetition_penalty = 1.2}},
                                      {1,
                                       2,
                                       {.temperature = 1.1,
                                        .typical_p = 0.9,
                                        .presence_penalty = 0.4,
                                        .frequency_penalty = 0.7,
                                        .penalty_window = 2,
                                        .logit_bias = {{2, 0.3}}}}};
  constexpr int64_t texts = 60'000;
  for (size_t i = 0; i < 2 * settings.size(); ++i) {
    const size_t s = i / 2;
    const bool by_position = i % 2 == 0;
    const Setting& setting = settings[s];
    Tiny tiny{.mtp = setting.modules, .layers = 1, .vocabulary = letters, .hidden = 8};
    Transformer model = made(tiny, 20 + s, 0.5);
    RunnerOptions how{.context = 16, .page_size = 16, .chunk = 8};
    std::vector<int32_t> prompt{1, 3, 0};
    std::vector<double> probabilities = exact(model, how, prompt, setting.sampling);
    Engine engine(backend(), model, how);
    GenerationOptions options;
    options.max_tokens = text_length, options.draft = setting.draft, options.sampling = setting.sampling;
    options.repeatable = by_position;
    std::vector<int64_t> counts(64, 0);
    GenerationStats all;
    for (int64_t text = 0; text < texts; ++text) {
      options.sampling.seed = static_cast<uint64_t>(text);
      size_t code = 0;
      GenerationStats stats = engine.generate(prompt, options, [&](GeneratedToken token) {
        code = code * letters + static_cast<size_t>(token.id);
        return true;
      });
      ++counts[code];
      all.drafted += stats.drafted, all.accepted += stats.accepted;
    }
    EXPECT_GT(all.acceptance(), 0.1);
    EXPECT_LT(all.acceptance(), 0.95);
    EXPECT_LT(worst_deviation(counts, probabilities), implausible) << "setting " << s;
    // Had the engine such a bias, the same counts would not fit.
    for (size_t place : {1, 4}) {  // the third token and the second: the drafted ones
      double caught = 0;
      for (size_t letter = 0; letter < letters; ++letter) {
        double share = share_of(probabilities, place, letter);
        if (share < 0.02 || share > 0.98) continue;
        caught = std::max(caught, worst_deviation(counts, biased(probabilities, place, letter)));
      }
      EXPECT_GT(caught, implausible) << "setting " << s << ", place " << place;
    }
  }
}

}  // namespace
}  // namespace latente
