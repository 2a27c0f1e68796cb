// Many sequences in one engine: each has the text it has alone, whatever runs beside it.
#include <gtest/gtest.h>

#include <map>
#include <string>

#include "base/file.h"
#include "infer/support.h"

namespace latente {
namespace {

using namespace test;

struct Asked {
  std::vector<int32_t> prompt;
  GenerationOptions options;
  int priority = 0;
};

Asked random_request(Random& random, const std::vector<int32_t>& shared, int64_t vocabulary,
                     int64_t context) {
  Asked asked;
  if (random.chance(0.5)) asked.prompt.assign(shared.begin(), shared.begin() + random.between(1, 30));
  for (int32_t id : random_tokens(random, random.between(1, 20), vocabulary)) asked.prompt.push_back(id);
  asked.prompt.resize(std::min(asked.prompt.size(), static_cast<size_t>(context - 1)));
  asked.options.max_tokens = random.between(1, 40);
  asked.options.draft = random.between(-1, 3);
  asked.priority = static_cast<int>(random.between(0, 2));
  if (random.chance(0.4)) {
    asked.options.sampling.temperature = 0.8;
    asked.options.sampling.seed = random.below(100);
  }
  if (random.chance(0.3)) asked.options.stop_tokens = {static_cast<int32_t>(random.below(8))};
  return asked;
}

TEST(Scheduler, TextDoesNotDependOnCompany) {
  int64_t reused = 0, waited = 0;
  for (uint64_t seed = 1; seed <= 25; ++seed) {
    Random random(seed);
    Tiny tiny;
    tiny.mtp = random.between(0, 2);
    tiny.layers = random.between(1, 2);
    tiny.vocabulary = random.between(10, 70);
    if (random.chance(0.15)) tiny.family = "llama", tiny.mtp = 0;
    Transformer model = made(tiny, seed, 0.3);
    RunnerOptions how;
    how.context = random.between(40, 90);
    how.page_size = random.between(1, 16);
    how.chunk = random.between(9, 40);
    RunnerOptions many = how;
    many.sequences = random.between(1, 6);
    // At times too few pages for all: some are driven out and come back.
    const int64_t pages = (how.context + how.page_size - 1) / how.page_size;
    many.pages = random.chance(0.6) ? pages + random.between(1, pages) : 0;
    Engine engine(backend(), model, many);
    engine.chain_passes(seed % 2 == 0);
    const std::vector<int32_t> shared = random_tokens(random, 30, tiny.vocabulary);

    if (random.chance(0.7)) engine.try_drafts_after(0);
    std::map<size_t, Text> texts;
    std::map<size_t, Asked> asked;
    size_t finished = 0;
    for (size_t i = 0; i < 14; ++i) {
      Asked& one = asked[i] = random_request(random, shared, tiny.vocabulary, how.context);
      Request request{one.prompt, one.options, one.priority, {}, {}, {}};
      request.on_token = [&texts, i](GeneratedToken token) {
        texts[i].tokens.push_back(token.id);
        return true;
      };
      request.on_finish = [&texts, &finished, &reused, i](const GenerationStats& stats) {
        texts[i].finish = stats.finish;
        reused += stats.reused_tokens;
        ++finished;
      };
      engine.submit(std::move(request));
      for (int64_t steps = random.between(0, 4); steps > 0; --steps) engine.step();
      waited += static_cast<int64_t>(engine.waiting());
    }
    int64_t steps = 0;
    while (engine.step()) ASSERT_LT(++steps, 20000) << "it does not end";
    EXPECT_EQ(finished, asked.size());
    EXPECT_EQ(engine.running() + engine.waiting(), 0u);
    EXPECT_EQ(engine.pages().available(), engine.pages().pages());
    for (auto& [i, one] : asked) {
      Engine alone(backend(), model, how);
      const Text want = generated(alone, one.prompt, one.options);
      ASSERT_EQ(texts[i].tokens, want.tokens)
          << "seed " << seed << ", sequence " << i << " T" << one.options.sampling.temperature << " d"
          << one.options.draft << " mtp" << tiny.mtp << " prompt " << one.prompt.size() << " chunk "
          << how.chunk;
      EXPECT_EQ(texts[i].finish, want.finish);
    }
  }
  EXPECT_GT(reused, 500);
  EXPECT_GT(waited, 100);
}

// More than passes take without being filled up, with drafts behind drafts, and many passes at once.
TEST(Scheduler, ChainsOfManySequencesWriteTheSame) {
  const Tiny tiny{.mtp = 2};
  const Transformer model = made(tiny, 6, 0.3);
  const RunnerOptions how{.context = 64, .page_size = 8, .chunk = 256};
  RunnerOptions many = how;
  many.sequences = 23;
  Random random(3);
  std::vector<std::vector<int32_t>> prompts;
  for (int i = 0; i < 23; ++i) prompts.push_back(random_tokens(random, 4 + i % 5, tiny.vocabulary));
  for (int64_t draft : {0, 1, 3}) {
    for (double temperature : {0.0, 0.8}) {
      GenerationOptions options;
      options.max_tokens = 40;
      options.draft = draft;
      options.sampling.temperature = temperature;
      std::map<bool, std::vector<std::vector<int32_t>>> texts;
      std::map<bool, int64_t> accepted;
      for (bool chained : {false, true}) {
        Engine engine(backend(), model, many);
        engine.chain_passes(chained, 1e9);
        texts[chained].resize(prompts.size());
        for (size_t i = 0; i < prompts.size(); ++i) {
          Request request{prompts[i], options, 0, {}, {}, {}};
          request.options.sampling.seed = i;
          request.on_token = [&, i, chained](GeneratedToken token) {
            return texts[chained][i].push_back(token.id), true;
          };
          request.on_finish = [&, chained](const GenerationStats& stats) {
            accepted[chained] += stats.accepted;
          };
          engine.submit(std::move(request));
        }
        while (engine.step()) {
        }
      }
      EXPECT_EQ(texts[true], texts[false]) << draft << " drafts, T " << temperature;
      EXPECT_EQ(accepted[true], accepted[false]) << draft << " drafts, T " << temperature;
      EXPECT_EQ(accepted[true] > 0, draft > 0);
      Engine alone(backend(), model, how);
      options.draft = 0;
      for (size_t i = 0; i < prompts.size(); ++i) {
        options.sampling.seed = i;
        EXPECT_EQ(texts[true][i], generated(alone, prompts[i], options).tokens)
            << i << ", " << draft << " drafts, T " << temperature;
      }
    }
  }
}

// Pages for little more than one sequence, and several that want all of them.
TEST(Scheduler, DrivenOutAndBackTheTextGoesOn) {
  for (int64_t mtp : {0, 1}) {
    Transformer model = made({.mtp = mtp}, 3, 0.3);
    RunnerOptions how{.context = 96, .page_size = 4, .chunk = 16};
    RunnerOptions many = how;
    many.sequences = 3;
    many.pages = 26;
    Engine engine(backend(), model, many);
    Random random(8);
    std::vector<std::vector<int32_t>> prompts, texts(3);
    for (size_t i = 0; i < 3; ++i) {
      prompts.push_back(random_tokens(random, 8, 64));
      Request request;
      request.prompt = prompts[i];
      request.options.max_tokens = 80;
      request.on_token = [&texts, i](GeneratedToken token) {
        texts[i].push_back(token.id);
        return true;
      };
      engine.submit(std::move(request));
    }
    engine.step();
    EXPECT_EQ(engine.running(), 3u);
    size_t fewest = 3;
    while (engine.step()) fewest = std::min(fewest, engine.running());
    EXPECT_LT(fewest, 3u);
    for (size_t i = 0; i < 3; ++i) {
      GenerationOptions options;
      options.max_tokens = 80;
      EXPECT_EQ(texts[i], plain(model, how, prompts[i], options).tokens) << "sequence " << i << ", " << mtp;
    }
  }
}

TEST(Scheduler, ABudgetInBytesHoldsAsManyPagesAsFit) {
  for (const char* family : {"deepseek_v3", "llama"}) {
    Tiny tiny;
    tiny.family = family;
    Transformer model = made(tiny, 3, 0.3);
    RunnerOptions how{.context = 96, .page_size = 4, .sequences = 3};
    const int64_t page = Engine(backend(), model, how).runner().cache_bytes_per_token() * 4;
    how.cache_bytes = 31 * page - 1;
    Engine engine(backend(), model, how);
    EXPECT_EQ(engine.pages().pages(), 30);
    const RunnerOptions alone{.context = 96, .page_size = 4};
    GenerationOptions options;
    options.max_tokens = 80;
    std::vector<std::vector<int32_t>> texts(3);
    for (int32_t i = 0; i < 3; ++i) {
      Request request;
      request.prompt = {1, 2, 3, i};
      request.options = options;
      request.on_token = [&texts, i](GeneratedToken token) {
        texts[static_cast<size_t>(i)].push_back(token.id);
        return true;
      };
      engine.submit(std::move(request));
    }
    while (engine.step()) {
    }
    for (int32_t i = 0; i < 3; ++i) {
      const std::vector<int32_t> prompt{1, 2, 3, i};
      EXPECT_EQ(texts[static_cast<size_t>(i)], plain(model, alone, prompt, options).tokens);
    }

    how.cache_bytes = 24 * page;
    EXPECT_EQ(Engine(backend(), model, how).pages().pages(), 24);
    how.cache_bytes = 24 * page - 1;
    try {
      Engine(backend(), model, how);
      ADD_FAILURE() << "no sequence fits";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(std::to_string(24 * page) + " bytes"), std::string::npos)
          << error.what();
    }
  }
}

TEST(Scheduler, HigherPrioritiesBeginFirstAndNobodyStarves) {
  Transformer model = made({}, 3);
  Engine engine(backend(), model, {.context = 32, .page_size = 8, .chunk = 16});
  std::vector<int> order;
  auto ask = [&](int name, int priority) {
    Request request;
    request.prompt = {1, 2, static_cast<int32_t>(3 + name % 40)};
    request.options.max_tokens = 2;
    request.priority = priority;
    request.on_finish = [&order, name](const GenerationStats&) { order.push_back(name); };
    engine.submit(std::move(request));
  };
  ask(0, 0);
  ask(1, 0);
  ask(2, 5);
  ask(3, 1);
  while (engine.step()) {
  }
  EXPECT_EQ(order, (std::vector<int>{2, 3, 0, 1}));

  // Urgent ones without end do not keep the other out for ever.
  order.clear();
  ask(99, 0);
  for (int i = 0; i < 3 * static_cast<int>(Engine::patience) + 10; ++i) {
    ask(i, 2);
    ask(i, 2);
    for (int steps = 0; steps < 2; ++steps) engine.step();
  }
  EXPECT_EQ(std::count(order.begin(), order.end(), 99), 1);
}

// Those that begin alike read that part once, though they come at the same time.
TEST(Scheduler, WhatIsBeingReadIsNotReadTwice) {
  for (int64_t mtp : {0, 1}) {
    const Transformer model = made({.mtp = mtp}, 5, 0.3);
    const RunnerOptions how{.context = 128, .page_size = 8, .chunk = 16, .sequences = 4};
    Engine engine(backend(), model, how);
    Random random(9);
    const std::vector<int32_t> shared = random_tokens(random, 60, 64);
    std::vector<std::vector<int32_t>> prompts(4, shared), texts(4);
    prompts[2] = random_tokens(random, 20, 64);  // begins otherwise, and does not wait
    prompts[3].resize(20);                       // ends early
    prompts[3].push_back((shared[20] + 1) % 64);
    std::vector<int64_t> reused(4);
    for (size_t i = 0; i < 4; ++i) {
      Request request{prompts[i], {}, 0, {}, {}, {}};
      request.options.max_tokens = 12;
      request.options.draft = mtp;  // modules keep up, and need the last shared position themselves
      request.on_token = [&, i](GeneratedToken token) {
        texts[i].push_back(token.id);
        return true;
      };
      request.on_finish = [&, i](const GenerationStats& stats) { reused[i] = stats.reused_tokens; };
      engine.submit(std::move(request));
    }
    engine.step();
    EXPECT_EQ(engine.running(), 2u);
    while (engine.step()) {
    }
    EXPECT_EQ(reused[0], 0);
    EXPECT_EQ(reused[1], mtp == 0 ? 56 : 55) << "all whole pages";
    EXPECT_EQ(reused[2], 0);
    EXPECT_EQ(reused[3], mtp == 0 ? 16 : 15);
    for (size_t i = 0; i < 4; ++i) {
      Engine alone(backend(), model, how);
      GenerationOptions options;
      options.max_tokens = 12;
      EXPECT_EQ(texts[i], generated(alone, prompts[i], options).tokens) << i;
    }
  }
}

TEST(Scheduler, CancelledSequencesEndAndFreeTheirPages) {
  Transformer model = made({.mtp = 1}, 3, 0.3);
  RunnerOptions how{.context = 64, .page_size = 4, .chunk = 16, .sequences = 2};
  Engine engine(backend(), model, how);
  int finished = 0, tokens = 0;
  std::vector<uint64_t> ids;
  for (int i = 0; i < 3; ++i) {
    Request request;
    request.prompt = {1, 2, 3, static_cast<int32_t>(i)};
    request.options.max_tokens = 50;
    request.on_token = [&](GeneratedToken) { return ++tokens, true; };
    request.on_finish = [&](const GenerationStats&) { ++finished; };
    ids.push_back(engine.submit(std::move(request)));
  }
  engine.step();
  engine.step();
  EXPECT_EQ(engine.running(), 2u);
  for (uint64_t id : ids) engine.cancel(id);
  engine.cancel(12345);
  const int before = tokens;
  EXPECT_FALSE(engine.step());
  EXPECT_EQ(tokens, before);
  EXPECT_EQ(finished, 0);
  EXPECT_EQ(engine.pages().available(), engine.pages().pages());
}

TEST(Scheduler, InterruptionsActBetweenThePiecesOfAPrompt) {
  Transformer model = made({.mtp = 1}, 3, 0.3);
  RunnerOptions how{.context = 64, .page_size = 4, .chunk = 8};
  Engine engine(backend(), model, how);
  Random random(5);
  const std::vector<int32_t> prompt = random_tokens(random, 40, 64);
  int asked = 0;
  GenerationStats stats = engine.generate(
      prompt, {}, [](GeneratedToken) { return ADD_FAILURE() << "of an unread prompt", true; },
      [&] { return ++asked <= 2; });
  EXPECT_EQ(stats.finish, Finish::interrupted);
  EXPECT_EQ(stats.generated_tokens, 0);
  EXPECT_EQ(stats.decode_seconds, 0);
  EXPECT_EQ(engine.running() + engine.waiting(), 0u);
  EXPECT_EQ(engine.pages().available(), engine.pages().pages());

  GenerationOptions ten;
  ten.max_tokens = 10;
  // The two pieces that were read are known to the next one.
  const Text text = generated(engine, prompt, ten, &stats);
  EXPECT_GE(stats.reused_tokens, 12);
  EXPECT_LE(stats.reused_tokens, 16);
  EXPECT_EQ(text.tokens, plain(model, how, prompt, ten).tokens);

  // One that still waits ends, too.
  int finished = 0;
  Request request;
  request.prompt = prompt;
  request.on_finish = [&](const GenerationStats& result) {
    EXPECT_EQ(result.finish, Finish::interrupted);
    ++finished;
  };
  engine.interrupt(engine.submit(request));
  EXPECT_FALSE(engine.step());
  EXPECT_EQ(finished, 1);
}

TEST(Scheduler, AnErrorInACallbackEndsThatSequenceOnly) {
  Transformer model = made({}, 3);
  Engine engine(backend(), model, {.context = 64, .page_size = 4, .chunk = 16, .sequences = 2});
  std::vector<int32_t> prompt{1, 2, 3}, other;
  GenerationOptions options;
  options.max_tokens = 10;
  Request request;
  request.prompt = {4, 5, 6};
  request.options = options;
  request.on_token = [&](GeneratedToken token) { return other.push_back(token.id), true; };
  engine.submit(std::move(request));
  EXPECT_THROW(
      engine.generate(prompt, options, [](GeneratedToken) -> bool { throw std::runtime_error("no"); }),
      std::runtime_error);
  while (engine.step()) {
  }
  Engine alone(backend(), model, {.context = 64, .page_size = 4, .chunk = 16});
  EXPECT_EQ(other, generated(alone, std::vector<int32_t>{4, 5, 6}, options).tokens);
}

// Also where modules draft, whichever pass it happens in; and whoever asked without waiting is told.
TEST(Scheduler, AnErrorEndsOneOfManySequences) {
  for (int64_t mtp : {0, 1, 2}) {
    Transformer model = made({.mtp = mtp}, 3, 0.3);
    RunnerOptions how{.context = 64, .page_size = 4, .chunk = 16}, many = how;
    many.sequences = 4;
    for (int64_t after : {1, 2, 3, 7}) {
      Engine engine(backend(), model, many);
      std::vector<std::vector<int32_t>> texts(4);
      std::vector<GenerationStats> stats(4);
      for (size_t i = 0; i < 4; ++i) {
        Request request;
        request.prompt = {4, 5, static_cast<int32_t>(i)};
        request.options.max_tokens = 20;
        request.on_token = [&texts, i, after](GeneratedToken token) {
          texts[i].push_back(token.id);
          if (i == 1 && static_cast<int64_t>(texts[i].size()) == after) fail("no more");
          return true;
        };
        request.on_finish = [&stats, i](const GenerationStats& result) { stats[i] = result; };
        engine.submit(std::move(request));
      }
      while (engine.step()) {
      }
      EXPECT_EQ(engine.pages().available(), engine.pages().pages());
      for (size_t i = 0; i < 4; ++i) {
        GenerationOptions options;
        options.max_tokens = 20;
        Text want = plain(model, how, std::vector<int32_t>{4, 5, static_cast<int32_t>(i)}, options);
        if (i == 1) {
          want.tokens.resize(static_cast<size_t>(after));
          EXPECT_EQ(stats[i].finish, Finish::failed);
          EXPECT_THROW(std::rethrow_exception(stats[i].error), Error);
        } else {
          EXPECT_EQ(stats[i].finish, Finish::length);
        }
        EXPECT_EQ(texts[i], want.tokens) << "sequence " << i << ", " << mtp << " modules, after " << after;
      }
    }
  }
}

// A saved cache gives the text of the engine that saved it, and reads nothing again that it holds.
TEST(Engine, SavedCachesGoOn) {
  const std::string path = testing::TempDir() + "saved_cache.safetensors";
  int64_t reused = 0, read = 0;
  for (uint64_t seed = 1; seed <= 24; ++seed) {
    Random random(seed, 7);
    Tiny tiny;
    tiny.mtp = random.between(0, 2);
    if (random.chance(0.2)) tiny.family = "llama", tiny.mtp = 0;
    Transformer model = made(tiny, seed, 0.3);
    RunnerOptions how{.context = 120, .page_size = random.between(1, 20), .chunk = 8};
    const DType types[] = {DType::f32, DType::bf16, DType::u8};
    how.cache_type = types[random.below(tiny.family == "llama" ? 2 : 3)];
    std::vector<int32_t> text = random_tokens(random, random.between(1, 40), 64);
    GenerationOptions options;
    options.max_tokens = 20;
    options.draft = random.between(-1, 2);
    Engine first(backend(), model, how), second(backend(), model, how);
    for (int32_t id : generated(first, text, options).tokens) text.push_back(id);
    const int64_t positions = first.save(path, text, {{"who", "me"}});
    EXPECT_GE(positions, static_cast<int64_t>(text.size()) - 4);
    std::map<std::string, std::string> notes;
    EXPECT_EQ(second.load(path, &notes), positions);
    EXPECT_EQ(notes["who"], "me");
    EXPECT_EQ(second.pages().available(), second.pages().pages());
    text.push_back(5);
    GenerationStats stats;
    EXPECT_EQ(generated(second, text, options, &stats), generated(first, text, options)) << "seed " << seed;
    reused += stats.reused_tokens, read += stats.prompt_tokens;
  }
  EXPECT_GT(reused, read * 8 / 10);
}

TEST(Engine, RefusesSavedCachesThatAreNotItsOwn) {
  const std::string path = testing::TempDir() + "refused_cache.safetensors";
  Transformer model = made({.mtp = 1}, 3, 0.3), other = made({.mtp = 1}, 4, 0.3);
  RunnerOptions how{.context = 64, .page_size = 8, .chunk = 8};
  Engine engine(backend(), model, how);
  std::vector<int32_t> text(40, 3);
  GenerationOptions options;
  options.max_tokens = 4;
  generated(engine, text, options);
  engine.save(path, text);
  auto refused = [&](const Transformer& by, const RunnerOptions& options_, const std::string& why,
                     const std::string& from) {
    Engine there(backend(), by, options_);
    try {
      there.load(from);
      ADD_FAILURE() << "accepted, though " << why;
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find(why), std::string::npos) << error.what();
    }
    EXPECT_EQ(there.pages().available(), there.pages().pages());
    EXPECT_EQ(there.pages().remembered(), 0);
  };
  RunnerOptions changed = how;
  changed.cache_type = DType::bf16;
  refused(model, changed, "another --kv-cache-dtype", path);
  changed = how, changed.page_size = 4;
  refused(model, changed, "pages of 8 tokens", path);
  changed = how, changed.context = 16;
  refused(model, changed, "room for 16", path);
  refused(other, how, "another model", path);
  refused(model, how, "No such file", path + ".missing");
  const std::string whole = read_file(path);
  for (size_t size : {size_t{0}, size_t{7}, size_t{200}, whole.size() / 2, whole.size() - 1}) {
    write_file_atomically(path + ".cut", whole.substr(0, size));
    refused(model, how, ".cut", path + ".cut");
  }
  engine.load(path);
}

// Modules that were left behind begin anew at a page, on the states that are left.
TEST(Drafter, LostModulesBeginAnew) {
  const Tiny tiny{.mtp = 2};
  Transformer model = made(tiny, 12);
  Random random(5);
  for (int64_t page : {8, 16, 64, 128}) {
    RunnerOptions how{.context = 256, .page_size = page, .chunk = 128};
    how.states = Drafter::states_for(1, how.chunk);
    Runner runner(backend(), model, how);
    Drafter drafter(runner);
    for (int64_t index = 0; index < runner.pages(); ++index)
      runner.set_page(0, index, static_cast<int32_t>(index));
    Sequence s;
    s.tokens = random_tokens(random, 100, tiny.vocabulary);
    s.place = 0, s.depth = 2, s.predicted = {0, 0};
    Runner::Pass pass;
    const Stretch all{0, 99, 0};
    for (int32_t i = 0; i < 99; ++i)
      pass.rows.push_back({s.tokens[static_cast<size_t>(i)], i, 0, 0, drafter.state_of(s, i, all)});
    runner.run(pass, Runner::Asked::tokens);
    s.processed = s.unread = 99;
    drafter.let_lie(s);
    ASSERT_TRUE(s.lost());
    const int64_t from = (99 - Drafter::most_behind + page - 1) / page * page;
    ASSERT_EQ(drafter.begin_anew(s), from < 99);
    if (from >= 99) continue;
    EXPECT_EQ(s.modules_from, from);
    drafter.catch_up(s);
    const std::vector<int64_t> wanted{1};
    drafter.draft(std::vector{&s}, wanted);
    ASSERT_EQ(s.drafts.size(), 1u);
    const std::vector<double> logits = uncached(model, s.tokens, 0, from)[98];
    EXPECT_EQ(s.drafts[0].token, std::max_element(logits.begin(), logits.end()) - logits.begin()) << page;
    // Without it the context would be longer, and the logits others.
    EXPECT_EQ(logits == uncached(model, s.tokens, 0)[98], from == 0);
  }
}

TEST(Drafter, LooksUpWhatFollowedBefore) {
  using Tokens = std::vector<int32_t>;
  auto look_up = [](Tokens tokens, int64_t most) { return Drafter::look_up(tokens, most); };
  EXPECT_EQ(look_up({1, 2, 3, 4, 5, 9, 1, 2, 3}, 3), (Tokens{4, 5, 9}));
  EXPECT_EQ(look_up({1, 2, 3, 4, 5, 9, 1, 2, 3}, 1), (Tokens{4}));
  EXPECT_EQ(look_up({1, 2, 3, 4, 9, 1, 2, 3, 5, 1, 2, 3}, 1), (Tokens{5}));        // the latest
  EXPECT_EQ(look_up({7, 1, 2, 3, 4, 9, 1, 2, 3, 5, 7, 1, 2, 3}, 1), (Tokens{4}));  // the longest
  EXPECT_EQ(look_up({6, 6, 6, 6, 6}, 4), (Tokens{6}));                             // up to the end
  EXPECT_EQ(look_up({1, 2, 4, 1, 2}, 4), Tokens{});                                // two agree, not three
  EXPECT_EQ(look_up({}, 4), Tokens{});
  EXPECT_EQ(look_up({1, 2, 3}, 4), Tokens{});
}

}  // namespace
}  // namespace latente
