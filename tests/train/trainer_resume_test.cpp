// Saved states: a run that was interrupted, by request or by a kill, is the run that was not.
#include <signal.h>
#include <sys/wait.h>

#include <algorithm>
#include <thread>

#include "train/trainer_support.h"

namespace latente::test {
namespace {

struct Case {
  const char* name;
  const char* dtype;
  int64_t per_step, sequences;
  bool masked;
  const char* moments = "f32";
};
void PrintTo(const Case& one, std::ostream* out) { *out << one.name; }

class Resume : public TrainerTest, public testing::WithParamInterface<Case> {};

TEST_P(Resume, IsTheRunThatWasNotInterrupted) {
  auto configured = [&](const std::string& name) {
    TrainOptions how = options(name);
    how.steps = 7;
    how.model.dtype = GetParam().dtype;
    how.optimizer.moments = GetParam().moments;
    how.batch.tokens = GetParam().per_step * how.batch.length;
    how.batch.sequences = GetParam().sequences;
    how.batch.document_mask = GetParam().masked;
    how.batch.fim_rate = GetParam().masked ? 0.5 : 0;
    how.schedule.kind = ScheduleKind::cosine;
    how.schedule.warmup_steps = 2;
    how.validation.every = 2;
    return how;
  };
  TrainOptions whole = configured("whole"), parts = configured("parts");
  Recorder straight = run(whole);
  EXPECT_EQ(straight.saved, std::vector<int64_t>{7});

  Recorder resumed;
  for (int64_t stop : {3, 5}) {
    resumed.stop_after = stop;
    EXPECT_FALSE(run(parts, resumed, Trainer::Start::resume));
    EXPECT_EQ(Saved(parts).step(), stop);
    EXPECT_FALSE(fs::exists(parts.out + "/model"));
  }
  resumed.stop_after = -1;
  EXPECT_TRUE(run(parts, resumed, Trainer::Start::resume));
  EXPECT_EQ(resumed.first_step, 5);
  EXPECT_EQ(resumed.saved, (std::vector<int64_t>{3, 5, 7}));

  expect_same_state(Saved(whole), Saved(parts));
  ASSERT_EQ(straight.steps.size(), 7u);
  ASSERT_EQ(resumed.steps.size(), 7u);
  for (const auto& [step, report] : straight.steps) {
    const StepReport& other = resumed.steps.at(step);
    expect_same_losses(report.losses, other.losses);
    EXPECT_EQ(report.gradient_norm, other.gradient_norm);
    EXPECT_EQ(report.max_violation, other.max_violation);
    EXPECT_EQ(report.epoch, other.epoch);
  }
  ASSERT_EQ(straight.validations.size(), resumed.validations.size());
  for (size_t i = 0; i < straight.validations.size(); ++i) {
    expect_same_losses(straight.validations[i].losses, resumed.validations[i].losses);
  }
  if (GetParam().per_step == 32) {
    EXPECT_GT(straight.steps.at(7).epoch, 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Trainer, Resume,
                         testing::Values(Case{"f32", "f32", 8, 8, false},
                                         Case{"f32_accumulated", "f32", 32, 8, true},
                                         Case{"bf16", "bf16", 8, 8, true},
                                         Case{"bf16_moments", "bf16", 8, 8, true, "bf16"},
                                         Case{"f32_bf16_moments", "f32", 8, 8, false, "bf16"},
                                         Case{"bf16_accumulated", "bf16", 32, 16, false}),
                         [](const auto& of) { return of.param.name; });

TEST_F(TrainerTest, MixedPrecisionKeepsWhatBfloat16CannotHold) {
  TrainOptions how = options("run");
  how.model.dtype = "bf16";
  how.schedule.lr = 1e-5;  // too little to change most bfloat16 weights
  run(how);
  Saved saved(how);
  std::vector<float> master = saved.read("master.lm_head.weight"), weight = saved.read("lm_head.weight");
  EXPECT_NE(master, weight);
  for (size_t i = 0; i < master.size(); ++i) {
    ASSERT_LE(std::abs(master[i] - weight[i]), std::abs(master[i]) / 256 + 1e-30f);
  }
}

// The child saves after every step and is killed about when a save begins; what is there afterwards is the
// state of some step, and going on from it is as if nothing had happened.
TEST_F(TrainerTest, KilledWhileSavingLosesNothingThatWasSaved) {
  auto configured = [&](const std::string& name) {
    TrainOptions how = options(name);
    how.steps = 1000;
    how.threads = 1;
    how.data.threads = 1;
    how.save.every = 1;
    return how;
  };
  TrainOptions killed = configured("killed");
  std::string states = killed.out + "/checkpoints";
  auto partial = [&] {
    if (!fs::exists(states)) return false;
    std::vector<std::string> names = list_directory(states);
    return std::any_of(names.begin(), names.end(),
                       [](const std::string& name) { return name.find(".partial-") != name.npos; });
  };
  Random random(3);
  int interrupted = 0;
  int64_t reached = 0;
  for (int attempt = 0; attempt < 8; ++attempt) {
    pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      try {
        Recorder recorder;
        run(killed, recorder, Trainer::Start::resume);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "child: %s\n", error.what());
      }
      ::_exit(1);
    }
    auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    auto patient = [&] {
      return std::chrono::steady_clock::now() < deadline && ::waitpid(child, nullptr, WNOHANG) == 0;
    };
    auto saved_more = [&] {
      std::string last = fmt::format("step-{:06}", reached);
      if (!fs::exists(states)) return false;
      std::vector<std::string> names = list_directory(states);
      return std::any_of(names.begin(), names.end(),
                         [&](const std::string& name) { return name.size() == last.size() && name > last; });
    };
    // The first save removes what the killed child before this one left.
    while (!saved_more() && patient()) std::this_thread::sleep_for(std::chrono::microseconds(50));
    while (!partial() && patient()) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::microseconds(random.below(attempt % 2 == 0 ? 500 : 20000)));
    ::kill(child, SIGKILL);
    int status = 0;
    ::waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status)) << "the child ended by itself";
    interrupted += partial() ? 1 : 0;
    LatestGood latest = latest_good(states);
    ASSERT_TRUE(latest.directory);
    EXPECT_EQ(latest.skipped, std::vector<std::string>{});
    EXPECT_GT(latest.step, reached);
    reached = latest.step;
  }
  EXPECT_GT(interrupted, 0) << "no kill came during a save";

  TrainOptions whole = configured("whole");
  whole.save.every = 0;
  for (const TrainOptions& how : {killed, whole}) {
    Recorder recorder;
    recorder.stop_after = reached + 2;
    EXPECT_FALSE(run(how, recorder, Trainer::Start::resume));
  }
  expect_same_state(Saved(killed), Saved(whole));
  EXPECT_FALSE(partial());
}

TEST_F(TrainerTest, KeepsSoManyStates) {
  TrainOptions how = options("run");
  how.save.every = 1;
  how.save.keep = 2;
  Recorder recorder = run(how);
  EXPECT_EQ(recorder.saved, (std::vector<int64_t>{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(list_directory(how.out + "/checkpoints"),
            (std::vector<std::string>{"step-000005", "step-000006"}));
}

TEST_F(TrainerTest, GoesOnFromTheStateBeforeADamagedOne) {
  TrainOptions how = options("run"), whole = options("whole");
  how.save.every = 2;
  run(how);
  run(whole);
  fs::resize_file(how.out + "/checkpoints/step-000006/optimizer.safetensors", 1000);
  CpuBackend backend(how.threads);
  Recorder recorder;
  Trainer trainer(backend, how, recorder);
  trainer.start(Trainer::Start::resume);
  EXPECT_EQ(trainer.step(), 4);
  ASSERT_EQ(trainer.facts().notes.size(), 1u);
  EXPECT_NE(trainer.facts().notes[0].find("step-000006"), std::string::npos);
  EXPECT_TRUE(trainer.run());
  expect_same_state(Saved(how), Saved(whole));
}

TEST_F(TrainerTest, FreshStartsRefuseAndOverwritingForgets) {
  TrainOptions how = options("run"), whole = options("whole");
  run(how);
  EXPECT_NE(error_of(how).find("holds a run that was saved at step 6"), std::string::npos) << error_of(how);
  how.schedule.lr = whole.schedule.lr = 1e-3;
  run(how, Trainer::Start::overwrite);
  run(whole);
  expect_same_state(Saved(how), Saved(whole));
  // A finished run has nothing left to do, and a longer one goes on.
  Recorder nothing = run(how, Trainer::Start::resume);
  EXPECT_TRUE(nothing.steps.empty());
  how.steps = 8;
  EXPECT_EQ(run(how, Trainer::Start::resume).steps.size(), 2u);
}

TEST_F(TrainerTest, ResumingWithWhatDoesNotFitIsRefused) {
  TrainOptions how = options("run");
  run(how);
  TrainOptions other = how;
  other.batch.length = 16;
  other.batch.sequences = 16;
  EXPECT_NE(error_of(other, Trainer::Start::resume).find("was trained on other data"), std::string::npos);
  other = how;
  other.model.dtype = "bf16";
  EXPECT_NE(error_of(other, Trainer::Start::resume).find("model.dtype"), std::string::npos);
  nlohmann::json wider = small_config();
  wider["moe_intermediate_size"] = 16;
  write_text(at("wider.json"), wider.dump());
  other = how;
  other.model.config = at("wider.json");
  EXPECT_NE(error_of(other, Trainer::Start::resume).find("experts.0.gate_proj.weight"), std::string::npos);
}

}  // namespace
}  // namespace latente::test
