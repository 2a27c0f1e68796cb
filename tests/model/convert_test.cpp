// Converted models against quantising on load, to the bit; kills, other options, damaged results.
#include "model/convert.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>

#include "checkpoint/support.h"
#include "cpu/cpu_backend.h"
#include "model/converted.h"
#include "model/converted_source.h"
#include "model/run_weights.h"
#include "model/support.h"

namespace latente {
namespace {

namespace fs = std::filesystem;

const std::string references = LATENTE_TEST_DATA "/reference/";

CpuBackend& backend() {
  static CpuBackend one(2);
  return one;
}

std::string contents(const std::string& path) { return read_file(path); }

// Every parameter's bytes, packed ones as they lie, and the absorbed halves.
std::map<std::string, std::string> bytes_of_model(Transformer& model) {
  std::map<std::string, std::string> all;
  const auto add = [&](const std::string& path, const Tensor& tensor) {
    const View view = tensor.view();
    std::string text = fmt::format("{} {} {}", name_of(view.dtype), view.shape.str(), view.group);
    if (is_quantised(view.dtype)) {
      const auto form = backend().quantised(view.shape, view.dtype, view.group);
      text.append(static_cast<const char*>(view.data), static_cast<size_t>(form->bytes));
    } else if (view.layout == Layout::rows) {
      text.append(static_cast<const char*>(view.data), static_cast<size_t>(view.bytes()));
    }
    all[path] = text;
  };
  model.for_each([&](const std::string& path, Tensor& tensor) { add(path, tensor); });
  const auto add_halves = [&](Layer& layer, const std::string& path) {
    if (Mla* mla = std::get_if<Mla>(&layer.self_attn); mla && mla->w_uk)
      add(path + ".w_uk", mla->w_uk), add(path + ".w_uv", mla->w_uv);
  };
  for (size_t i = 0; i < model.model.layers.size(); ++i) add_halves(model.model.layers[i], std::to_string(i));
  for (size_t k = 0; k < model.mtp.size(); ++k) add_halves(model.mtp[k].layer, "mtp" + std::to_string(k));
  return all;
}

void expect_equal(Transformer& found, Transformer& expected) {
  const auto a = bytes_of_model(found), b = bytes_of_model(expected);
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [path, bytes] : b) {
    ASSERT_TRUE(a.contains(path)) << path;
    EXPECT_TRUE(a.at(path) == bytes) << path;
  }
}

ConvertOptions options_for(DType type, int64_t group = 64) {
  ConvertOptions options;
  options.weights.type = type;
  options.weights.group = group;
  return options;
}

std::vector<std::string> sources() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(references)) {
    if (fs::exists(entry.path() / "config.json")) names.push_back(entry.path().filename().string());
  }
  for (const auto& entry : fs::directory_iterator(references + "gguf")) {
    if (entry.path().extension() == ".gguf") names.push_back("gguf/" + entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

class Converting : public testing::TestWithParam<std::string> {};

TEST_P(Converting, LoadsAsWhatIsQuantisedOnLoad) {
  const std::string original = references + GetParam();
  for (DType type : {DType::q8, DType::q4}) {
    for (int64_t group : {32, 64}) {
      const TemporaryDirectory directory;
      const std::string out = directory.at("out");
      const ConvertReport report = convert_model(original, out, backend(), options_for(type, group));
      EXPECT_GT(report.bytes, 0);
      EXPECT_EQ(report.resumed_bytes, 0);
      EXPECT_FALSE(fs::exists(out + "/conversion.json"));
      EXPECT_FALSE(fs::exists(out + "/lock"));

      RunWeights asked;
      asked.type = type == DType::q8 ? "int8" : "int4";
      asked.group = group;
      const auto expected = load_for_running(open_model(original), asked, backend());
      const ModelSource source = open_model(out);
      EXPECT_EQ(quantised_type(source, {}), type);
      expect_equal(*load_for_running(source, {}, backend()), *expected);
      expect_equal(*load_for_running(source, asked, backend()), *expected);

      for (int64_t memory : {int64_t{0}, int64_t{1} << 40}) {
        Transformer model(source.config, base_type(source, {}));
        load_converted(model, *source.tensors, backend(), {.memory = memory, .else_mapped = true});
        expect_equal(model, *expected);
      }
      asked.copied = true;
      expect_equal(*load_for_running(source, asked, backend()), *expected);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Sources, Converting, testing::ValuesIn(sources()), [](const auto& test) {
  std::string name = test.param;
  for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return name;
});
TEST(ConvertingSources, AreThere) { EXPECT_GE(sources().size(), 18u); }

// What parity reads: scale · code, near the original's values.
TEST_P(Converting, DecodesToWhatWasQuantised) {
  const std::string original = references + GetParam();
  const ModelSource source = open_model(original);
  for (DType type : {DType::q8, DType::q4}) {
    const TemporaryDirectory directory;
    convert_model(original, directory.at("out"), backend(), options_for(type, 32));
    const ModelSource decoded = open_decoded(directory.at("out"), backend());
    EXPECT_FALSE(decoded.config.converted);
    Transformer expected(source.config, DType::f32), found(decoded.config, DType::f32);
    load_parameters(expected, *source.tensors);
    load_parameters(found, *decoded.tensors);
    std::map<std::string, View> views;
    expected.for_each([&](const std::string& path, Tensor& tensor) { views[path] = tensor.view(); });
    found.for_each([&](const std::string& path, Tensor& tensor) {
      const View a = tensor.view(), b = views.at(path);
      const int64_t k = a[-1];
      for (int64_t row = 0; row < a.count() / k; ++row) {
        for (int64_t at = 0; at < k; at += 32) {
          const int64_t count = std::min<int64_t>(32, k - at);
          const float *x = a.as<float>() + row * k + at, *y = b.as<float>() + row * k + at;
          float extent = 0, worst = 0;
          for (int64_t i = 0; i < count; ++i) {
            extent = std::max(extent, std::abs(y[i]));
            worst = std::max(worst, std::abs(x[i] - y[i]));
          }
          // Half a step, and float16's rounding of the scale.
          ASSERT_LE(worst, extent * (type == DType::q8 ? 0.5f / 127 + 1e-3f : 0.3f))
              << path << " row " << row;
        }
      }
    });
  }
}

TEST(Convert, ModulesKeepEightBitsUnlessAsked) {
  const TemporaryDirectory directory;
  ConvertOptions options = options_for(DType::q4);
  for (DType mtp : {DType::q8, DType::q4}) {
    options.weights.mtp = mtp;
    const std::string out = directory.at(std::string(name_of(mtp)));
    convert_model(references + "v3-mtp2", out, backend(), options);
    const auto model = load_for_running(open_model(out), {}, backend());
    ASSERT_EQ(model->mtp.size(), 2u);
    EXPECT_EQ(std::get<Mla>(model->mtp[1].layer.self_attn).o_proj.weight.dtype(), mtp);
    EXPECT_EQ(std::get<Mla>(model->mtp[1].layer.self_attn).w_uk.dtype(), mtp);
    EXPECT_EQ(std::get<Mla>(model->model.layers[0].self_attn).o_proj.weight.dtype(), DType::q4);
  }
}

TEST(Convert, ImportanceChangesCodesAndIsPartOfTheIdentity) {
  const TemporaryDirectory directory;
  ConvertOptions options = options_for(DType::q4, 32);
  convert_model(references + "v3", directory.at("alike"), backend(), options);
  const std::string name = "model.layers.0.self_attn.kv_b_proj.weight";
  Importance importance;
  const ModelSource source = open_model(references + "v3");
  std::vector<float>& columns = importance[name];
  for (int64_t i = 0; i < source.config.kv_lora_rank; ++i) columns.push_back(i % 5 == 0 ? 100.0f : 0.01f);
  options.importance = &importance;
  const std::string out = directory.at("weighted");
  ConvertOptions stopping = options;
  stopping.progress = [](const ConvertProgress&) { throw 1; };
  EXPECT_THROW(convert_model(references + "v3", out, backend(), stopping), int);
  columns[0] = 50;
  expect_has(message_of([&] { convert_model(references + "v3", out, backend(), options); }),
             "options/importance");
  columns[0] = 100;
  convert_model(references + "v3", out, backend(), options);
  const Checkpoint alike(directory.at("alike")), weighted(out);
  for (const std::string& each : alike.names()) {
    const MappedTensor a = *alike.map(each), b = *weighted.map(each);
    const bool same = std::memcmp(a.view.data, b.view.data, static_cast<size_t>(a.view.bytes())) == 0;
    // w_uv has the rows of kv_b_proj; w_uk's columns are others.
    const bool changed = each == name + ".panels" || each == "model.layers.0.self_attn.w_uv.panels";
    EXPECT_EQ(same, !changed) << each;
  }
}

TEST(Convert, TokenizerAndDefaultsComeAlong) {
  const TemporaryDirectory directory;
  fs::copy(references + "v3", directory.at("model"));
  directory.put("model/tokenizer.json", "{\"a\":1}");
  directory.put("model/generation_config.json", "{\"temperature\":0.6}");
  directory.put("model/pytorch_model.bin", "no");
  convert_model(directory.at("model"), directory.at("out"), backend(), options_for(DType::q8));
  EXPECT_EQ(contents(directory.at("out/tokenizer.json")), "{\"a\":1}");
  EXPECT_EQ(contents(directory.at("out/generation_config.json")), "{\"temperature\":0.6}");
  EXPECT_FALSE(fs::exists(directory.at("out/pytorch_model.bin")));
  EXPECT_FALSE(fs::exists(directory.at("out/reference.safetensors")));
}

// The names and contents of a directory's files.
std::map<std::string, std::string> files_of(const std::string& path) {
  std::map<std::string, std::string> files;
  for (const std::string& name : list_directory(path)) files[name] = contents(path + "/" + name);
  return files;
}

struct Killed {};

// Converts in a process of its own, which is killed when it writes on after `shards` whole shards.
void convert_and_die(const std::string& out, ConvertOptions options, int shards) {
  const pid_t child = fork();
  if (child == 0) {
    options.progress = [&](const ConvertProgress& progress) {
      int whole = 0;
      for (const std::string& name : list_directory(out)) whole += name.ends_with(".safetensors");
      if (whole == shards && progress.stage == ConvertProgress::Stage::writing) std::raise(SIGKILL);
    };
    CpuBackend own(1);
    convert_model(references + "v3-mtp1", out, own, options);
    _exit(0);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << shards;
}

TEST(Convert, GoesOnAfterAKillInEachShard) {
  ConvertOptions options = options_for(DType::q4);
  options.max_shard_bytes = 30'000;
  const TemporaryDirectory directory;
  const ConvertReport whole =
      convert_model(references + "v3-mtp1", directory.at("whole"), backend(), options);
  ASSERT_GE(whole.shards, 3);
  const auto expected = files_of(directory.at("whole"));
  for (int shards = 0; shards < whole.shards; ++shards) {
    const std::string out = directory.at(fmt::format("killed-{}", shards));
    convert_and_die(out, options, shards);
    expect_has(message_of([&] { open_model(out); }), "a conversion that is not finished");
    expect_has(message_of([&] { config_of_model(out); }), "a conversion that is not finished");
    const ConvertReport report = convert_model(references + "v3-mtp1", out, backend(), options);
    EXPECT_EQ(report.resumed_bytes > 0, shards > 0);
    EXPECT_EQ(report.bytes, whole.bytes);
    EXPECT_TRUE(files_of(out) == expected) << shards;
  }
  // Killed again and again.
  const std::string out = directory.at("again");
  for (int shards = 0; shards < whole.shards; ++shards) convert_and_die(out, options, shards);
  convert_model(references + "v3-mtp1", out, backend(), options);
  EXPECT_TRUE(files_of(out) == expected);
}

// A conversion that stopped before its third shard.
class Stopped : public testing::Test {
 protected:
  Stopped() {
    options_.max_shard_bytes = 30'000;
    ConvertOptions stopping = options_;
    stopping.progress = [&](const ConvertProgress&) {
      if (fs::exists(shard(2))) throw Killed();
    };
    EXPECT_THROW(convert_model(model_, out_, backend(), stopping), Killed);
  }
  std::string shard(int number) const {
    for (const std::string& name : list_directory(out_)) {
      if (name.starts_with(fmt::format("model-{:05}", number)) && name.ends_with(".safetensors"))
        return out_ + "/" + name;
    }
    return out_ + "/none";
  }
  std::string refused(const ConvertOptions& options, const std::string& model) const {
    return message_of([&] { convert_model(model, out_, backend(), options); });
  }

  ConvertOptions options_ = options_for(DType::q8);
  const TemporaryDirectory directory_;
  const std::string model_ = references + "v3-mtp1", out_ = directory_.at("out");
};

TEST_F(Stopped, DamagedShardsAreMadeAgain) {
  convert_model(model_, directory_.at("whole"), backend(), options_);
  const auto expected = files_of(directory_.at("whole"));
  const std::string good = contents(shard(1));
  std::string flipped = good;
  flipped[flipped.size() - 5] ^= 1;
  for (const std::string& bytes : {good.substr(0, good.size() / 2), good.substr(0, good.size() - 1), flipped,
                                   std::string(), good + "x"}) {
    const TemporaryDirectory again;
    fs::copy(out_, again.at("out"), fs::copy_options::recursive);
    again.put("out/" + fs::path(shard(1)).filename().string(), bytes);
    const ConvertReport report = convert_model(model_, again.at("out"), backend(), options_);
    EXPECT_GT(report.resumed_bytes, 0);  // the second
    EXPECT_TRUE(files_of(again.at("out")) == expected);
  }
}

TEST_F(Stopped, OtherOptionsAndSourcesAreRefused) {
  ConvertOptions other = options_;
  other.weights.group = 32;
  expect_has(refused(other, model_), "options/group_size\" = 64, now it is 32");
  other = options_, other.weights.type = DType::q4;
  expect_has(refused(other, model_), "options/bits\" = 8, now it is 4");
  other = options_, other.max_shard_bytes = 40'000;
  expect_has(refused(other, model_), "options/max_shard_bytes\" = 30000, now it is 40000");
  expect_has(refused(options_, references + "v3-mtp2"), "was begun with");
  // One weight of the source changed.
  const TemporaryDirectory changed;
  fs::copy(model_, changed.at("model"));
  std::string bytes = contents(changed.at("model/model.safetensors"));
  bytes[bytes.size() / 2] ^= 1;
  changed.put("model/model.safetensors", bytes);
  expect_has(refused(options_, changed.at("model")), "source/model.safetensors/sample");
  EXPECT_EQ(refused(options_, model_), "no error");
}

TEST_F(Stopped, ADamagedRecordIsAnError) {
  const std::string record = contents(out_ + "/conversion.json");
  for (size_t size = 0; size + 2 < record.size(); size += 7) {
    directory_.put("out/conversion.json", record.substr(0, size));
    expect_has(refused(options_, model_), "conversion.json: ");
  }
  for (const char* text : {"{}", "[]", R"({"identity":3})", R"({"identity":{},"shards":{}})", "null"}) {
    directory_.put("out/conversion.json", text);
    EXPECT_NE(refused(options_, model_), "no error") << text;
  }
}

TEST(Convert, OnlyNewDirectoriesAreWritten) {
  const TemporaryDirectory directory;
  directory.put("out/notes.txt", "mine");
  expect_has(message_of([&] {
               convert_model(references + "v3", directory.at("out"), backend(), options_for(DType::q8));
             }),
             "expected a new or empty directory");
  fs::copy(references + "v3", directory.at("model"));
  expect_has(message_of([&] {
               convert_model(directory.at("model"), directory.at("model"), backend(), options_for(DType::q8));
             }),
             "expected another directory");
  EXPECT_TRUE(fs::exists(directory.at("model/model.safetensors")));
}

TEST(Convert, ValuesThatAreNotFiniteAreErrors) {
  Transformer model(test::tiny_config({}), DType::f32);
  test::randomise(model, 1);
  std::get<Mla>(model.model.layers[1].self_attn).o_proj.weight.view().as<float>()[70] = NAN;
  const TemporaryDirectory directory;
  save_model(model, directory.at("model"), {});
  for (DType type : {DType::q8, DType::q4}) {
    expect_has(message_of([&] {
                 convert_model(directory.at("model"), directory.at("out"), backend(), options_for(type));
               }),
               "model.layers.1.self_attn.o_proj.weight: expected finite values");
    fs::remove_all(directory.at("out"));
  }
}

// A finished conversion with something changed.
class Finished : public testing::Test {
 protected:
  Finished() { convert_model(references + "v3-mtp1", out_, backend(), options_for(DType::q4)); }

  std::string loaded(const RunWeights& weights = {}) const {
    return message_of([&] { load_for_running(open_model(out_), weights, backend()); });
  }
  std::string file() const { return "out/model-00001-of-00001.safetensors"; }
  // The tensors again, changed by f(specs, bytes by name).
  template <class F>
  void rewrite(F&& f) {
    std::vector<TensorSpec> specs;
    std::map<std::string, std::string> bytes;
    {
      const SafetensorsFile stored(directory_.at(file()));
      for (const SafetensorsEntry& entry : stored.entries()) {
        specs.push_back({entry.name, *entry.dtype, entry.shape()});
        bytes[entry.name] =
            std::string(reinterpret_cast<const char*>(entry.data), static_cast<size_t>(entry.bytes));
      }
    }
    f(specs, bytes);
    SafetensorsWriter writer(directory_.at("out/model.safetensors"), specs);
    for (const TensorSpec& spec : specs) {
      std::string& data = bytes[spec.name];
      data.resize(static_cast<size_t>(spec.bytes()));
      writer.write_part(spec.name, 0, std::as_bytes(std::span(data)));
    }
    writer.commit();
  }
  void configure(const char* key, const nlohmann::json& value) {
    nlohmann::json json = nlohmann::json::parse(contents(out_ + "/config.json"));
    json["quantization_config"][key] = value;
    directory_.put("out/config.json", json.dump());
  }

  const TemporaryDirectory directory_;
  const std::string out_ = directory_.at("out");
};

TEST_F(Finished, OtherTypesAndGroupsAreRefused) {
  for (const char* type : {"f32", "bf16", "int8"}) {
    RunWeights weights;
    weights.type = type;
    expect_has(loaded(weights), fmt::format("converted to int4 and cannot be run as {}", type));
  }
  expect_has(loaded({.type = "auto", .group = 32}), "groups of 64, and 32 are asked for");
  EXPECT_EQ(loaded({.type = "int4", .group = 64}), "no error");
  const ModelSource source = open_model(out_);
  Transformer model(source.config, DType::f32);
  expect_has(message_of([&] { load_parameters(model, *source.tensors); }),
             "4 bits can be run, and nothing else");
  expect_has(
      message_of([&] { convert_model(out_, directory_.at("two"), backend(), options_for(DType::q8)); }),
      "is converted already");
}

TEST_F(Finished, AnotherFileLayoutIsReadToo) {
  const auto expected = load_for_running(open_model(out_), {}, backend());
  rewrite([](auto& specs, auto&) { std::reverse(specs.begin(), specs.end()); });
  expect_equal(*load_for_running(open_model(out_), {}, backend()), *expected);
}

TEST_F(Finished, HostileTensorsAreErrors) {
  const std::string name = "model.layers.0.mlp.down_proj.weight.panels";
  const auto spec_of = [&](std::vector<TensorSpec>& specs) {
    return std::find_if(specs.begin(), specs.end(),
                        [&](const TensorSpec& spec) { return spec.name == name; });
  };
  rewrite([&](auto& specs, auto&) {
    auto spec = spec_of(specs);
    spec->shape = {spec->shape[0], spec->shape[1] - 64};
  });
  expect_has(loaded(), name + ": expected U8 [");
  rewrite([&](auto& specs, auto&) { spec_of(specs)->shape = {1 << 20}; });
  expect_has(loaded(), name + ": expected U8 [");
  rewrite([&](auto& specs, auto&) { spec_of(specs)->dtype = DType::f16; });
  expect_has(loaded(), "found f16");
  rewrite([&](auto& specs, auto&) { specs.erase(spec_of(specs)); });
  expect_has(loaded(), "no tensor \"" + name);
  rewrite([&](auto& specs, auto&) { specs.push_back({"more.panels", DType::u8, {64}}); });
  expect_has(loaded(), "has no tensor more.panels");
  rewrite([&](auto& specs, auto&) {
    specs.push_back({"model.layers.0.mlp.down_proj.weight", DType::f32, {64}});
  });
  expect_has(loaded(), "has no tensor model.layers.0.mlp.down_proj.weight");
}

TEST_F(Finished, HostileConfigsAreErrors) {
  for (const nlohmann::json& bad : std::vector<nlohmann::json>{0, -64, 48, 512, "64", 64.0}) {
    configure("group_size", bad);
    expect_has(loaded(), "group_size: ");
  }
  configure("group_size", nullptr);
  expect_has(loaded(), "missing key group_size");
  configure("group_size", 64);
  configure("bits", 8);
  expect_has(loaded(), "expected U8 [");
  for (const nlohmann::json& bad : std::vector<nlohmann::json>{0, 5, "4"}) {
    configure("bits", bad);
    expect_has(loaded(), "bits: ");
  }
  configure("bits", 4);
  configure("mtp_bits", 3);
  expect_has(loaded(), "mtp_bits: expected 8 or 4, found 3");
  configure("mtp_bits", 8);
  configure("version", 2);
  expect_has(loaded(), "version: expected 1");
  configure("version", 1);
  EXPECT_EQ(loaded(), "no error");
}

}  // namespace
}  // namespace latente
