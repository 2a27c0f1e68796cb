#include "serve/engine_loop.h"

#include <gtest/gtest.h>

#include <future>

#include "infer/support.h"

namespace latente {
namespace {

using namespace test;

const Transformer& model() {
  static const Transformer one = made({}, 1);
  return one;
}

RunnerOptions options() {
  RunnerOptions how;
  how.context = 4000;
  how.sequences = 2;
  return how;
}

Request request(int64_t tokens) {
  Request one;
  one.prompt = {1, 2, 3};
  one.options.max_tokens = tokens;
  return one;
}

TEST(EngineLoop, KeepsCountOfRoom) {
  Engine engine(backend(), model(), options());
  EngineLoop loop(engine, 3);
  EXPECT_TRUE(loop.reserve(2));
  EXPECT_FALSE(loop.reserve(2));
  EXPECT_TRUE(loop.reserve(1));
  loop.release(3);
  EXPECT_TRUE(loop.reserve(3));
}

TEST(EngineLoop, RunsWhatIsPosted) {
  Engine engine(backend(), model(), options());
  EngineLoop loop(engine, 3);
  std::promise<int64_t> written;
  loop.post([&](EngineLoop& in) {
    Request one = request(20);
    one.on_finish = [&](const GenerationStats& stats) { written.set_value(stats.generated_tokens); };
    in.submit(std::move(one));
  });
  EXPECT_EQ(written.get_future().get(), 20);
}

TEST(EngineLoop, RunsTasksBehindTheStep) {
  Engine engine(backend(), model(), options());
  EngineLoop loop(engine, 3);
  std::promise<std::string> order;
  std::string so_far;
  loop.post([&](EngineLoop& in) {
    Request one = request(1);
    one.on_token = [&](const GeneratedToken&) {
      in.after_step([&](EngineLoop&) { order.set_value(so_far + "behind"); });
      so_far += "token ";
      return true;
    };
    one.on_finish = [&](const GenerationStats&) { so_far += "end "; };
    in.submit(std::move(one));
  });
  EXPECT_EQ(order.get_future().get(), "token end behind");
}

// A step that fails ends all that runs, and nothing else.
TEST(EngineLoop, OutlivesAStepThatFails) {
  Engine engine(backend(), model(), options());
  EngineLoop loop(engine, 3);
  std::promise<std::string> failure;
  loop.post([&](EngineLoop& in) {
    Request other = request(3000);
    other.on_finish = [&](const GenerationStats& stats) {
      try {
        std::rethrow_exception(stats.error);
      } catch (const std::exception& error) {
        failure.set_value(error.what());
      }
    };
    in.submit(std::move(other));
    Request breaks = request(3000);
    breaks.on_finish = [](const GenerationStats&) { fail("the disk is gone"); };
    in.engine().interrupt(in.submit(std::move(breaks)));
  });
  EXPECT_EQ(failure.get_future().get(), "the disk is gone");
  std::promise<int64_t> written;
  loop.post([&](EngineLoop& in) {
    Request one = request(5);
    one.on_finish = [&](const GenerationStats& stats) { written.set_value(stats.generated_tokens); };
    in.submit(std::move(one));
  });
  EXPECT_EQ(written.get_future().get(), 5);
}

}  // namespace
}  // namespace latente
