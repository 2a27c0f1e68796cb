// What ends a run, and what keeps one from beginning.
#include <cmath>
#include <limits>

#include "train/trainer_support.h"

namespace latente::test {
namespace {

class TrainerErrors : public TrainerTest {
 protected:
  // The run ends with a message that has all of `parts` before it takes a step or makes its directory.
  void expect_refused(const TrainOptions& how, std::initializer_list<std::string> parts) {
    std::string message = error_of(how);
    for (const std::string& part : parts) EXPECT_NE(message.find(part), std::string::npos) << message;
    EXPECT_FALSE(fs::exists(how.out));
  }
  // A model directory, changed.
  void write_model(const std::string& directory, const std::string& parameter, float value) const {
    Transformer model(Config::from_file(at("config.json")), DType::f32);
    allocate_parameters(model);
    initialise(model, 1);
    model.for_each([&](const std::string& path, Tensor& tensor) {
      if (path == parameter) tensor.view().as<float>()[tensor.count() / 2] = value;
    });
    SaveOptions how;
    for (const char* name : {"tokenizer.json", "tokenizer_config.json"}) {
      how.files.emplace_back(name, read_file(at("tokenizer") + "/" + name));
    }
    save_model(model, directory, how);
  }
};

TEST_F(TrainerErrors, NanIsTracedToTheParameter) {
  for (std::string parameter :
       {"model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.experts.down_proj", "model.layers.2.eh_proj.weight", "lm_head.weight"}) {
    write_model(at("poisoned"), parameter, std::numeric_limits<float>::quiet_NaN());
    TrainOptions how = options("run");
    how.model.config.clear();
    how.model.from = at("poisoned");
    how.model.tokenizer.clear();
    std::string message = error_of(how);
    for (const std::string& part :
         {std::string("step 1: not finite: first in op "), "parameter " + parameter}) {
      EXPECT_NE(message.find(part), std::string::npos) << message;
    }
    EXPECT_FALSE(latest_good(how.out + "/checkpoints").directory);
  }
}

TEST_F(TrainerErrors, DivergenceStopsAndLeavesTheLastState) {
  TrainOptions how = options("run");
  how.steps = 10;
  Recorder recorder;
  recorder.stop_after = 3;
  EXPECT_FALSE(run(how, recorder));
  Saved good(how);
  std::string optimizer = read_file(good.directory() + "/optimizer.safetensors");
  std::string weights = read_file(good.directory() + "/model/model.safetensors");
  TrainOptions wild = how;
  wild.schedule.lr = 1e30;
  std::string message = error_of(wild, Trainer::Start::resume);
  EXPECT_NE(message.find("step 5: not finite: first in op "), std::string::npos) << message;
  EXPECT_NE(message.find(" with parameter "), std::string::npos) << message;
  EXPECT_NE(message.find("the last saved state is unharmed"), std::string::npos) << message;
  EXPECT_FALSE(fs::exists(how.out + "/model"));
  Saved after(how);
  EXPECT_EQ(after.step(), 3);
  EXPECT_EQ(read_file(after.directory() + "/optimizer.safetensors"), optimizer);
  EXPECT_EQ(read_file(after.directory() + "/model/model.safetensors"), weights);
  recorder.stop_after = -1;
  EXPECT_TRUE(run(how, recorder, Trainer::Start::resume));
}

TEST_F(TrainerErrors, TooLittleMemory) {
  nlohmann::json config = small_config();
  config["hidden_size"] = 65536;
  config["intermediate_size"] = 1 << 20;
  config["num_hidden_layers"] = 100;
  config["first_k_dense_replace"] = 100;
  config["num_nextn_predict_layers"] = 0;
  write_text(at("giant.json"), config.dump());
  TrainOptions how = options("run");
  how.model.config = at("giant.json");
  expect_refused(how, {"the run needs ", " TiB of memory, and ", "batch.sequences"});
  how.batch.sequences = 0;
  expect_refused(how, {"the run needs "});
}

TEST_F(TrainerErrors, MissingFiles) {
  TrainOptions how = options("run");
  how.data.files = {at("missing.txt")};
  expect_refused(how, {at("missing.txt")});
  how = options("run");
  how.model.config = at("missing.json");
  expect_refused(how, {at("missing.json")});
  how = options("run");
  how.model.tokenizer = at("missing");
  expect_refused(how, {at("missing")});
  how = options("run");
  how.model.config.clear();
  how.model.from = at("missing");
  expect_refused(how, {at("missing")});
}

TEST_F(TrainerErrors, CorporaThatCannotBe) {
  write_text(at("empty.txt"), "");
  TrainOptions how = options("run");
  how.data.files = {at("empty.txt")};
  expect_refused(how, {at("empty.txt")});
  write_text(at("short.txt"), "The old fox.\n");
  how.data.files = {at("short.txt")};
  how.data.validation_share = 0;
  expect_refused(how, {"length", "at least 33 tokens"});
}

TEST_F(TrainerErrors, ModelsThatDoNotFit) {
  nlohmann::json config = small_config();
  config["vocab_size"] = 280;
  write_text(at("narrow.json"), config.dump());
  TrainOptions how = options("run");
  how.model.config = at("narrow.json");
  expect_refused(how, {at("narrow.json"), "vocab_size 280", "300"});
  how = options("run");
  how.batch.length = 256;
  how.batch.sequences = 1;
  expect_refused(how, {"batch.length", "max_position_embeddings, 128"});
  how = options("run");
  how.balance.devices = 3;
  expect_refused(how, {"balance.devices", "8 routed experts", "3"});
}

TEST_F(TrainerErrors, OptionsThatCannotBe) {
  auto refused = [&](const char* assignment, std::initializer_list<std::string> parts) {
    TrainOptions how = options("run");
    override_option(how, assignment);
    expect_refused(how, parts);
  };
  refused("batch.tokens=250", {"batch.tokens", "multiple of batch.length = 32", "250"});
  refused("batch.sequences=3", {"batch.sequences", "divisor of the 8", "3"});
  refused("batch.length=1", {"batch.length", "1"});
  refused("tokens=1000", {"either steps or tokens"});
  refused("steps=0", {"either steps or tokens"});
  refused("model.dtype=fp8", {"model.dtype", "fp8"});
  refused("optimizer.moments=f16", {"optimizer.moments", "f32 or bf16", "f16"});
  refused("model.fp8=true", {"model.fp8", "model.dtype bf16", "f32"});
  TrainOptions fp8 = options("run");
  fp8.model.dtype = "bf16", fp8.model.fp8 = true;
  expect_refused(fp8, {"model.fp8", "compute capability 9.0", "cpu"});
  refused("model.from=x", {"either config", "from"});
  refused("optimizer.beta2=1", {"optimizer.beta2", "1"});
  refused("optimizer.epsilon=0", {"optimizer.epsilon"});
  refused("optimizer.clip=-1", {"optimizer.clip", "-1"});
  refused("schedule.lr=-1", {"lr"});
  refused("schedule.warmup_steps=7", {"warmup_steps", "7"});
  refused("mtp.lambda=-0.1", {"mtp.lambda"});
  refused("balance.communication_alpha=-1", {"balance.communication_alpha"});
  refused("balance.devices_per_token=2", {"balance.devices_per_token", "balance.devices = 1"});
  refused("save.keep=0", {"save.keep"});
  refused("batch.fim_rate=1.5", {"batch.fim_rate"});
  TrainOptions marks = options("run");
  marks.batch.fim_rate = 0.5;
  marks.batch.fim_hole = "<hole>";
  expect_refused(marks, {"batch.fim_hole", "<hole>"});
  TrainOptions how;
  EXPECT_THROW(parse_options(how, "[batch]\nlenght = 3\n", "run.toml"), Error);
  try {
    parse_options(how, "[batch]\nlenght = 3\n", "run.toml");
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("run.toml:2"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("length"), std::string::npos) << error.what();
  }
}

TEST_F(TrainerErrors, ADirectoryTakesOneRunAtATime) {
  TrainOptions how = options("run");
  CpuBackend backend(how.threads);
  Recorder recorder;
  {
    Trainer first(backend, how, recorder);
    for (Trainer::Start start : {Trainer::Start::fresh, Trainer::Start::resume, Trainer::Start::overwrite}) {
      EXPECT_EQ(error_of(how, start),
                fmt::format("{}: another process works in this directory (pid {})", how.out, ::getpid()));
    }
    EXPECT_EQ(error_of(options("other")), "no error");
    first.start(Trainer::Start::fresh);
    EXPECT_TRUE(first.run());
  }
  EXPECT_FALSE(fs::exists(how.out + "/lock"));
  EXPECT_EQ(error_of(how, Trainer::Start::resume), "no error");
}

}  // namespace
}  // namespace latente::test
