// The whole model on a device: training beside the CPU's, and with itself; what it writes.
#include "cuda/backend.h"
#include "infer/engine.h"
#include "train/trainer_support.h"

namespace latente::test {
namespace {

class CudaModel : public TrainerTest {
 protected:
  // With its ops run one by one if `eager`.
  static Recorder run_on(Backend& backend, const TrainOptions& options, bool eager = false,
                         Trainer::Start how = Trainer::Start::fresh, int64_t stop_after = -1) {
    Recorder recorder;
    recorder.stop_after = stop_after;
    Trainer trainer(backend, options, recorder);
    if (eager) trainer.profile();
    trainer.start(how);
    EXPECT_EQ(trainer.run(), stop_after < 0);
    return recorder;
  }

  static void expect_near(const Recorder& got, const Recorder& want, double tolerance) {
    ASSERT_EQ(got.steps.size(), want.steps.size());
    for (const auto& [step, report] : want.steps) {
      const StepReport& other = got.steps.at(step);
      for (size_t depth = 0; depth < report.losses.depths.size(); ++depth) {
        const double loss = report.losses.depths[depth].mean();
        EXPECT_NEAR(other.losses.depths[depth].mean(), loss, tolerance * loss)
            << "step " << step << ", depth " << depth;
      }
      EXPECT_NEAR(other.gradient_norm, report.gradient_norm, 10 * tolerance * report.gradient_norm)
          << "step " << step;
      EXPECT_NEAR(other.losses.balance, report.losses.balance, 10 * tolerance * report.losses.balance + 1e-7);
    }
  }

  TrainOptions options(const std::string& out, const std::string& dtype = "f32") const {
    TrainOptions how = TrainerTest::options(out);
    how.steps = 12;
    how.model.dtype = dtype;
    how.validation.every = 6;
    how.balance.sequence_alpha = 0.01;
    return how;
  }

  // A model of sizes that FP8 takes, with products in it or in bfloat16.
  TrainOptions wide_options(const std::string& out, bool fp8) const {
    TrainOptions how = options(out, "bf16");
    nlohmann::json config = small_config();
    for (const auto& [key, value] : {std::pair{"hidden_size", 64},
                                     {"intermediate_size", 144},
                                     {"moe_intermediate_size", 48},
                                     {"kv_lora_rank", 32},
                                     {"q_lora_rank", 48},
                                     {"qk_nope_head_dim", 16},
                                     {"qk_rope_head_dim", 16},
                                     {"v_head_dim", 16}})
      config[key] = value;
    how.model.config = at("wide.json");
    write_text(how.model.config, config.dump());
    how.model.fp8 = fp8;
    return how;
  }
  bool has_fp8() const { return cuda_.multiplies_fp8(); }

  CpuBackend cpu_;
  cuda::CudaBackend cuda_;
};

TEST_F(CudaModel, TrainsAsOnTheCpu) {
  const Recorder want = run_on(cpu_, options("cpu")), got = run_on(cuda_, options("cuda"));
  expect_near(got, want, 1e-4);
  ASSERT_EQ(got.validations.size(), want.validations.size());
  for (size_t i = 0; i < want.validations.size(); ++i) {
    const double loss = want.validations[i].losses.depths[0].mean();
    EXPECT_NEAR(got.validations[i].losses.depths[0].mean(), loss, 1e-4 * loss);
  }
}

TEST_F(CudaModel, TrainsInBfloat16NearFloat32) {
  const Recorder want = run_on(cpu_, options("cpu")), got = run_on(cuda_, options("cuda", "bf16"));
  expect_near(got, want, 2e-2);
}

TEST_F(CudaModel, TrainsInFp8NearBfloat16) {
  if (!has_fp8()) GTEST_SKIP() << "needs compute capability 9.0";
  TrainOptions in_fp8 = wide_options("fp8", true), in_bf16 = wide_options("bf16", false);
  in_fp8.steps = in_bf16.steps = 40;
  const Recorder want = run_on(cuda_, in_bf16), got = run_on(cuda_, in_fp8);
  const double first = want.steps.at(1).losses.depths[0].mean(),
               last = want.steps.at(40).losses.depths[0].mean();
  EXPECT_LT(last, 0.6 * first);
  for (const auto& [step, report] : want.steps) {
    const double loss = report.losses.depths[0].mean();
    EXPECT_NEAR(got.steps.at(step).losses.depths[0].mean(), loss, 0.03 * first) << "step " << step;
  }
  EXPECT_NE(got.steps.at(1).losses.depths[0].mean(), first);
}

// In two micro-batches, the second of which finds the weights quantised.
TEST_F(CudaModel, Fp8IsRepeatableAndResumable) {
  if (!has_fp8()) GTEST_SKIP() << "needs compute capability 9.0";
  const auto options_of = [&](const std::string& name) {
    TrainOptions how = wide_options(name, true);
    how.batch.sequences = 4;
    return how;
  };
  run_on(cuda_, options_of("once"));
  run_on(cuda_, options_of("again"));
  expect_same_state(Saved(options_of("once")), Saved(options_of("again")));
  run_on(cuda_, options_of("eager"), true);
  expect_same_state(Saved(options_of("once")), Saved(options_of("eager")));
  run_on(cuda_, options_of("parts"), false, Trainer::Start::fresh, 5);
  run_on(cuda_, options_of("parts"), false, Trainer::Start::resume);
  expect_same_state(Saved(options_of("once")), Saved(options_of("parts")));
}

TEST_F(CudaModel, ARepeatedRunHasTheSameBits) {
  for (const char* dtype : {"f32", "bf16"}) {
    SCOPED_TRACE(dtype);
    const std::string name = dtype;
    run_on(cuda_, options(name + "-once", dtype));
    run_on(cuda_, options(name + "-again", dtype));
    expect_same_state(Saved(options(name + "-once")), Saved(options(name + "-again")));
    run_on(cuda_, options(name + "-eager", dtype), true);
    expect_same_state(Saved(options(name + "-once")), Saved(options(name + "-eager")));
  }
}

TEST_F(CudaModel, AResumedRunIsTheUninterruptedOne) {
  for (const char* dtype : {"f32", "bf16", "bf16 and its moments"}) {
    SCOPED_TRACE(dtype);
    const std::string name = dtype;
    const auto options_of = [&](const std::string& part) {
      TrainOptions how = options(name + part, name.substr(0, name.find(' ')));
      if (name.ends_with("moments")) how.optimizer.moments = "bf16";
      return how;
    };
    run_on(cuda_, options_of("-whole"));
    run_on(cuda_, options_of("-parts"), false, Trainer::Start::fresh, 5);
    run_on(cuda_, options_of("-parts"), false, Trainer::Start::resume);
    expect_same_state(Saved(options_of("-whole")), Saved(options_of("-parts")));
  }
}

TEST_F(CudaModel, WritesTheSameGreedyText) {
  TrainOptions how = options("run");
  how.steps = 60;
  run_on(cpu_, how);
  const Checkpoint checkpoint(how.out + "/model");
  const std::vector<int32_t> prompt = {5, 80, 120, 17, 200, 9, 41};
  std::map<std::string, std::vector<int32_t>> written;
  for (Backend* backend : std::initializer_list<Backend*>{&cpu_, &cuda_}) {
    for (int64_t drafts : {0, 2}) {
      Transformer model(load_config(checkpoint), DType::f32);
      LoadOptions to_device;
      to_device.device = backend;
      load_parameters(model, checkpoint, to_device);
      RunnerOptions runner;
      runner.context = 100;
      Engine engine(*backend, model, runner);
      GenerationOptions generation;
      generation.max_tokens = 80;
      generation.draft = drafts;
      std::vector<int32_t>& ids = written[backend->name() + std::to_string(drafts)];
      engine.generate(prompt, generation,
                      [&](GeneratedToken token) { return ids.push_back(token.id), true; });
      EXPECT_EQ(ids.size(), 80u);
      EXPECT_EQ(ids, written.begin()->second) << backend->name() << ", " << drafts << " drafts";
    }
  }
}

}  // namespace
}  // namespace latente::test
