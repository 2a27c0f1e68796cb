#include "checkpoint/checkpoint.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "base/file.h"
#include "checkpoint/support.h"

namespace latente {
namespace {

namespace fs = std::filesystem;

// One tensor of four bytes a name.
std::string shard_with(std::vector<std::string> names) {
  std::string header = "{";
  for (size_t i = 0; i < names.size(); ++i) {
    header += fmt::format(R"({}"{}":{{"dtype":"F32","shape":[1],"data_offsets":[{},{}]}})", i ? "," : "",
                          names[i], 4 * i, 4 * i + 4);
  }
  return safetensors_bytes(header + "}", std::string(4 * names.size(), '\0'));
}

std::string index_of(const std::string& weight_map) {
  return "{\"metadata\":{\"total_size\":8},\"weight_map\":" + weight_map + "}";
}

TEST(CheckpointIndex, HostileIndexes) {
  struct Case {
    const char* what;
    std::string text;
    const char* message;
  };
  auto named = [](const std::string& shard) { return index_of("{\"a\":\"" + shard + "\"}"); };
  const Case cases[] = {
      {"empty", "", "not valid JSON"},
      {"array", "[]", "expected an object, found array"},
      {"no map", "{}", "no weight_map"},
      {"map is a list", index_of("[]"), "weight_map: expected an object, found array"},
      {"map is null", index_of("null"), "weight_map: expected an object, found null"},
      {"map is empty", index_of("{}"), "weight_map is empty"},
      {"shard is a number", index_of("{\"a\":1}"), "expected a file name, found number"},
      {"same tensor twice", index_of(R"({"a":"x.safetensors","a":"y.safetensors"})"), "duplicate key \"a\""},
      {"map twice", R"({"weight_map":{"a":"x.safetensors"},"weight_map":{"b":"x.safetensors"}})",
       "duplicate key"},
      {"parent", named("../x.safetensors"), "beside it, found \"../x.safetensors\""},
      {"deeper parent", named("sub/../../x.safetensors"), "beside it"},
      {"absolute", named("/etc/x.safetensors"), "beside it"},
      {"in a folder", named("sub/x.safetensors"), "beside it"},
      {"backslash", named("..\\\\x.safetensors"), "beside it"},
      {"NUL", named("x\\u0000.safetensors"), "beside it"},
      {"newline", named("x\\n.safetensors"), "beside it"},
      {"empty name", named(""), "beside it"},
      {"dots", named(".."), "beside it"},
      {"not safetensors", named("config.json"), "beside it"},
      {"deep", std::string(100'000, '['), "nested levels"},
      {"cut off", R"({"weight_map":{"a":)", "not valid JSON"},
  };
  TemporaryDirectory directory;
  directory.put("x.safetensors", shard_with({"a"}));
  for (const Case& each : cases) {
    SCOPED_TRACE(each.what);
    expect_has(message_of([&] { parse_checkpoint_index(each.text, "index"); }), each.message);
    directory.put("model.safetensors.index.json", each.text);
    std::string text = message_of([&] { Checkpoint checkpoint(directory.path()); });
    expect_has(text, each.message);
    expect_has(text, "model.safetensors.index.json");
  }
}

TEST(CheckpointIndex, MustAgreeWithShards) {
  TemporaryDirectory directory;
  auto opened_with = [&](const std::string& weight_map) {
    directory.put("model.safetensors.index.json", index_of(weight_map));
    return message_of([&] { Checkpoint checkpoint(directory.path()); });
  };
  directory.put("x.safetensors", shard_with({"a", "b"}));
  directory.put("y.safetensors", shard_with({"c"}));
  EXPECT_EQ(opened_with(R"({"a":"x.safetensors","b":"x.safetensors","c":"y.safetensors"})"), "no error");
  expect_has(opened_with(R"({"a":"x.safetensors","b":"x.safetensors","c":"z.safetensors"})"),
             "z.safetensors is missing, which model.safetensors.index.json names for \"c\"");
  expect_has(
      opened_with(R"({"a":"x.safetensors","b":"x.safetensors","c":"y.safetensors","d":"y.safetensors"})"),
      "y.safetensors: no tensor \"d\"");
  expect_has(opened_with(R"({"a":"x.safetensors","c":"y.safetensors"})"),
             "x.safetensors: tensor \"b\" is not in");
  directory.put("y.safetensors", shard_with({"c", "a"}));
  expect_has(opened_with(R"({"a":"x.safetensors","b":"x.safetensors","c":"y.safetensors"})"),
             "tensor \"a\" should be in x.safetensors");
  directory.put("y.safetensors", "broken");
  expect_has(opened_with(R"({"a":"x.safetensors","b":"x.safetensors","c":"y.safetensors"})"),
             "y.safetensors: expected");
}

TEST(Checkpoint, DirectoryErrors) {
  TemporaryDirectory directory;
  expect_has(message_of([&] { Checkpoint c(directory.at("none")); }), "expected a checkpoint directory");
  expect_has(message_of([&] { Checkpoint c(directory.path()); }),
             "expected model.safetensors or model.safetensors.index.json");
  directory.put("model.safetensors", shard_with({"a"}));
  Checkpoint checkpoint(directory.path());
  EXPECT_TRUE(checkpoint.contains("a"));
  EXPECT_FALSE(checkpoint.contains("b"));
  std::vector<float> value(1);
  expect_has(message_of([&] { checkpoint.read("b", view_of(value, {1})); }),
             directory.path() + ": no tensor \"b\"");
  expect_has(message_of([&] { checkpoint.map("b"); }), "no tensor");
  for (const char* config :
       {"[]", "{\"quantization_config\":3}", "{\"quantization_config\":{\"weight_block_size\":128}}",
        "{\"quantization_config\":{\"weight_block_size\":[0,128]}}",
        "{\"quantization_config\":{\"weight_block_size\":[-1,128]}}",
        "{\"quantization_config\":{\"weight_block_size\":[128]}}",
        "{\"quantization_config\":{\"weight_block_size\":[1e99,128]}}",
        "{\"quantization_config\":{\"weight_block_size\":\"128\"}}", "{\"a\":1,\"a\":2}", "{"}) {
    directory.put("config.json", config);
    expect_has(message_of([&] { Checkpoint c(directory.path()); }), "config.json: ");
  }
  directory.put("config.json", R"({"quantization_config":null})");
  Checkpoint unquantized(directory.path());
}

TEST(Checkpoint, ShapeMismatchNamesBoth) {
  TemporaryDirectory directory;
  std::vector<float> values(6);
  CheckpointWriter writer(directory.at("m"), {{"model.layers.3.mlp.gate.weight", DType::f32, {2, 3}}});
  writer.write("model.layers.3.mlp.gate.weight", view_of(values, {2, 3}));
  writer.commit();
  Checkpoint checkpoint(directory.at("m"));
  EXPECT_EQ(message_of([&] {
              checkpoint.read("model.layers.3.mlp.gate.weight", view_of(values, {3, 2}));
            }),
            "model.layers.3.mlp.gate.weight: expected [3, 2], found [2, 3] in " +
                directory.at("m/model.safetensors"));
}

// FP8: value = code × scale of its block, computed here in double.
void check_fp8(std::mt19937& generator, int64_t rows, int64_t columns, int64_t block_rows,
               int64_t block_columns, bool bf16_scales) {
  SCOPED_TRACE(fmt::format("[{}, {}] in blocks of [{}, {}]", rows, columns, block_rows, block_columns));
  TemporaryDirectory directory;
  Shape blocks{(rows + block_rows - 1) / block_rows, (columns + block_columns - 1) / block_columns};
  std::vector<f8e4m3> codes(static_cast<size_t>(rows * columns));
  for (f8e4m3& code : codes) {
    do {
      code.bits = static_cast<uint8_t>(generator());
    } while ((code.bits & 0x7f) == 0x7f);
  }
  std::vector<float> scales = random_floats(generator, blocks.count());
  DType scale_type = bf16_scales ? DType::bf16 : DType::f32;
  std::vector<TensorSpec> specs = {{"l.weight", DType::f8e4m3, {rows, columns}},
                                   {"l.weight_scale_inv", scale_type, blocks}};
  CheckpointWriter writer(directory.at("m"), specs);
  writer.write("l.weight", view_of(codes, {rows, columns}));
  writer.write("l.weight_scale_inv", view_of(scales, blocks));
  writer.write_file(
      "config.json",
      fmt::format(R"({{"quantization_config":{{"quant_method":"fp8","weight_block_size":[{},{}]}}}})",
                  block_rows, block_columns));
  writer.commit();

  Checkpoint checkpoint(directory.at("m"));
  EXPECT_EQ(checkpoint.names(), std::vector<std::string>{"l.weight"});
  EXPECT_EQ(checkpoint.scale_name("l.weight"), "l.weight_scale_inv");
  EXPECT_EQ(checkpoint.block_size(), std::pair(block_rows, block_columns));
  std::vector<float> f32(codes.size());
  std::vector<double> f64(codes.size());
  std::vector<bf16> narrow(codes.size());
  checkpoint.read("l.weight", view_of(f32, {rows, columns}));
  checkpoint.read("l.weight", view_of(f64, {rows, columns}));
  checkpoint.read("l.weight", view_of(narrow, {rows, columns}));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      size_t i = static_cast<size_t>(r * columns + c);
      float scale = scales[static_cast<size_t>(r / block_rows * blocks[1] + c / block_columns)];
      if (bf16_scales) scale = static_cast<float>(bf16(scale));
      float expected = static_cast<float>(static_cast<double>(static_cast<float>(codes[i])) * scale);
      ASSERT_EQ(f32[i], expected) << r << ", " << c;
      ASSERT_EQ(f64[i], expected);
      ASSERT_EQ(narrow[i].bits, bf16(expected).bits);
    }
  }
  for (int round = 0; round < 4; ++round) {
    const int64_t first = static_cast<int64_t>(generator() % static_cast<uint64_t>(rows));
    const int64_t count = 1 + static_cast<int64_t>(generator() % static_cast<uint64_t>(rows - first));
    std::vector<float> some(static_cast<size_t>(count * columns));
    checkpoint.read_rows("l.weight", rows, first, view_of(some, {count, columns}));
    ASSERT_TRUE(std::equal(some.begin(), some.end(), f32.begin() + first * columns))
        << first << ", " << count;
  }
  expect_has(message_of([&] {
               checkpoint.read_rows("l.weight", rows + 1, 0, View(f32.data(), {1, columns}, DType::f32));
             }),
             "l.weight: expected [");
  std::optional<MappedTensor> mapped = checkpoint.map("l.weight");
  ASSERT_TRUE(mapped);
  EXPECT_EQ(std::memcmp(mapped->view.data, codes.data(), codes.size()), 0);
}

TEST(CheckpointFp8, BlockScales) {
  std::mt19937 generator = seeded();
  check_fp8(generator, 256, 384, 128, 128, false);
  check_fp8(generator, 576, 200, 128, 128, false);  // kv_a_proj_with_mqa: 512 + 64 rows
  check_fp8(generator, 1, 1, 128, 128, true);
  for (int round = 0; round < 20; ++round) {
    auto extent = [&](int64_t most) {
      return 1 + static_cast<int64_t>(generator() % static_cast<uint64_t>(most));
    };
    check_fp8(generator, extent(300), extent(300), extent(140), extent(140), round % 2 == 1);
  }
}

TEST(CheckpointFp8, Errors) {
  TemporaryDirectory directory;
  std::vector<f8e4m3> codes(200 * 130);
  std::vector<float> target(codes.size());
  View view = view_of(target, {200, 130});
  auto save = [&](const std::string& config, std::optional<TensorSpec> scales) {
    std::vector<TensorSpec> specs = {{"l.weight", DType::f8e4m3, {200, 130}}};
    if (scales) specs.push_back(*scales);
    CheckpointWriter writer(directory.at("m"), specs);
    writer.write("l.weight", view_of(codes, {200, 130}));
    std::vector<double> zeros(1000);
    if (scales) writer.write(scales->name, View(zeros.data(), scales->shape, scales->dtype));
    writer.write_file("config.json", config);
    writer.commit();
  };
  auto read = [&](const View& into) {
    return message_of([&] { Checkpoint(directory.at("m")).read("l.weight", into); });
  };
  const std::string config = R"({"quantization_config":{"weight_block_size":[128,128]}})";
  save(config, TensorSpec{"l.weight_scale_inv", DType::f32, {2, 2}});
  EXPECT_EQ(read(view), "no error");
  expect_has(read(view_of(target, {130, 200})), "l.weight: expected [130, 200], found [200, 130]");
  expect_has(read(view_of(codes, {200, 130})), "cannot multiply out FP8");
  for (Shape wrong : {Shape{2, 1}, Shape{1, 2}, Shape{3, 2}, Shape{4}, Shape{200, 2}}) {
    save(config, TensorSpec{"l.weight_scale_inv", DType::f32, wrong});
    expect_has(read(view), "l.weight_scale_inv: expected [2, 2], found " + wrong.str());
  }
  save(config, TensorSpec{"l.weight_scale_inv", DType::f16, {2, 2}});
  expect_has(read(view), "expected scales in F32 or BF16, found F16");
  save(config, std::nullopt);
  expect_has(read(view), "no l.weight_scale_inv");
  save("{}", TensorSpec{"l.weight_scale_inv", DType::f32, {2, 2}});
  expect_has(read(view), "config.json: expected quantization_config.weight_block_size");
  save("{}", TensorSpec{"l.weight_scale", DType::f32, {1}});
  expect_has(read(view), "FP8 with l.weight_scale is not supported");
  save("{}", std::nullopt);
  EXPECT_EQ(read(view), "no error");  // plain FP8
}

TEST(Checkpoint, RowsAreThoseOfTheWhole) {
  TemporaryDirectory directory;
  std::mt19937 generator = seeded();
  constexpr int64_t rows = 37, columns = 11;
  const std::vector<float> values = random_floats(generator, rows * columns);
  for (DType stored : {DType::f64, DType::f32, DType::bf16, DType::f16}) {
    std::vector<float> source = values, whole(values.size());
    CheckpointWriter writer(directory.at("m"), {{"w", stored, {rows, columns}}, {"odd", DType::u8, {3}}});
    std::vector<uint8_t> odd(3);
    writer.write("w", view_of(source, {rows, columns}));
    writer.write("odd", View(odd.data(), {3}, DType::u8));
    writer.commit();
    const Checkpoint checkpoint(directory.at("m"));
    checkpoint.read("w", view_of(whole, {rows, columns}));
    for (int64_t first = 0; first < rows; first += 5) {
      const int64_t count = std::min<int64_t>(5, rows - first);
      std::vector<bf16> narrow(static_cast<size_t>(count * columns));
      std::vector<float> some(narrow.size());
      checkpoint.read_rows("w", rows, first, view_of(some, {count, columns}));
      checkpoint.read_rows("w", rows, first, view_of(narrow, {count, columns}));
      for (size_t i = 0; i < some.size(); ++i) {
        ASSERT_EQ(some[i], whole[static_cast<size_t>(first * columns) + i]);
        ASSERT_EQ(narrow[i].bits, bf16(some[i]).bits);
      }
    }
    std::vector<float> row(columns);
    expect_has(message_of([&] {
                 checkpoint.read_rows("w", rows - 1, 0, view_of(row, {1, columns}));
               }),
               "w: expected [36, 11], found [37, 11]");
    expect_has(message_of([&] {
                 checkpoint.read_rows("v", rows, 0, view_of(row, {1, columns}));
               }),
               "no tensor");
  }
}

TEST(CheckpointWriter, RandomShardsRoundTrip) {
  std::mt19937 generator = seeded();
  TemporaryDirectory directory;
  for (int round = 0; round < 30; ++round) {
    std::vector<TensorSpec> specs;
    std::vector<std::vector<float>> data;
    int64_t largest = 0, total = 0;
    DType stored = std::array{DType::f32, DType::bf16, DType::f16, DType::f64}[generator() % 4];
    for (int i = 0, n = 1 + static_cast<int>(generator() % 20); i < n; ++i) {
      Shape shape{static_cast<int64_t>(generator() % 40), 1 + static_cast<int64_t>(generator() % 40)};
      specs.push_back({fmt::format("model.layers.{}.w", i), DType::f32, shape});
      data.push_back(random_floats(generator, shape.count()));
      largest = std::max(largest, shape.count() * size_of(stored));
      total += shape.count() * size_of(stored);
    }
    CheckpointOptions options;
    options.dtype = stored;
    options.max_shard_bytes = 1 + static_cast<int64_t>(generator() % 20'000);
    std::string path = directory.at("m");
    CheckpointWriter writer(path, specs, options);
    std::vector<size_t> order(specs.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), generator);
    for (size_t i : order) writer.write(specs[i].name, view_of(data[i], specs[i].shape));
    writer.commit();

    Checkpoint checkpoint(path);
    EXPECT_EQ(checkpoint.bytes(), total);
    EXPECT_EQ(checkpoint.names().size(), specs.size());
    std::set<std::string> files;
    for (size_t i = 0; i < specs.size(); ++i) {
      EXPECT_EQ(checkpoint.entry(specs[i].name).dtype, stored);
      files.insert(checkpoint.file_of(specs[i].name));
      std::vector<float> back(data[i].size()), expected(data[i].size());
      std::vector<double> rounded(data[i].size());
      checkpoint.read(specs[i].name, view_of(back, specs[i].shape));
      convert(DType::f32, data[i].data(), stored, rounded.data(), specs[i].shape.count());
      convert(stored, rounded.data(), DType::f32, expected.data(), specs[i].shape.count());
      ASSERT_EQ(back, expected);
      std::optional<MappedTensor> mapped = checkpoint.map(specs[i].name);
      ASSERT_TRUE(mapped);
      const auto bytes = static_cast<size_t>(mapped->view.bytes());
      EXPECT_TRUE(bytes == 0 || std::memcmp(mapped->view.data, rounded.data(), bytes) == 0);
    }
    for (const std::string& file : files) {
      int64_t bytes = 0;
      SafetensorsFile shard(file);
      for (const SafetensorsEntry& entry : shard.entries()) bytes += entry.bytes;
      EXPECT_LE(bytes, std::max(options.max_shard_bytes, largest));
    }
    if (fs::exists(path + "/model.safetensors.index.json")) {
      nlohmann::json index = nlohmann::json::parse(read_file(path + "/model.safetensors.index.json"));
      EXPECT_EQ(index["metadata"]["total_size"], total);
      EXPECT_EQ(index["weight_map"].size(), specs.size());
      EXPECT_EQ(list_directory(path).size(), files.size() + 1);
    } else {
      EXPECT_EQ(list_directory(path), std::vector<std::string>{"model.safetensors"});
    }
  }
}

TEST(CheckpointWriter, MapOutlivesTheCheckpoint) {
  TemporaryDirectory directory;
  std::vector<float> values = {1, 2, 3, 4};
  CheckpointWriter writer(directory.at("m"), {{"a", DType::f32, {4}}});
  writer.write("a", view_of(values, {4}));
  writer.commit();
  std::optional<MappedTensor> mapped;
  {
    Checkpoint checkpoint(directory.at("m"));
    Checkpoint moved(std::move(checkpoint));
    mapped = moved.map("a");
  }
  fs::remove_all(directory.at("m"));
  EXPECT_EQ(mapped->view.as<float>()[3], 4.0f);
}

TEST(CheckpointWriter, ReplacesWeightsAndKeepsOtherFiles) {
  TemporaryDirectory directory;
  std::string path = directory.at("m");
  std::vector<float> values = {1, 2, 3, 4};
  CheckpointOptions tiny;
  tiny.max_shard_bytes = 1;
  for (int round = 0; round < 2; ++round) {
    CheckpointWriter writer(path, {{"a", DType::f32, {4}}, {"b", DType::f32, {4}}},
                            round == 0 ? tiny : CheckpointOptions{});
    writer.write("a", view_of(values, {4}));
    if (round == 0) {
      expect_has(message_of([&] { writer.commit(); }), "tensor b was declared but not written");
    }
    writer.write("b", view_of(values, {4}));
    expect_has(message_of([&] { writer.write("b", view_of(values, {4})); }), "written twice");
    expect_has(message_of([&] { writer.write("c", view_of(values, {4})); }), "not declared");
    writer.write_file("config.json", std::to_string(round) + " is not read here");
    writer.commit();
    directory.put("m/tokenizer.json", "kept");
    directory.put("m/figures/a.txt", "kept too");
  }
  EXPECT_EQ(list_directory(path),
            (std::vector<std::string>{"config.json", "figures", "model.safetensors", "tokenizer.json"}));
  EXPECT_EQ(read_file(path + "/figures/a.txt"), "kept too");
  EXPECT_EQ(read_file(path + "/config.json"), "1 is not read here");
  {
    CheckpointWriter abandoned(path, {{"a", DType::f32, {4}}});
    abandoned.write("a", view_of(values, {4}));
  }
  EXPECT_EQ(list_directory(directory.path()), std::vector<std::string>{"m"});
  EXPECT_EQ(SafetensorsFile(path + "/model.safetensors").entries().size(), 2u);
  expect_has(message_of([&] { CheckpointWriter w(path, {}); }), "at least one tensor");
  expect_has(message_of([&] {
               CheckpointWriter w(path, {{"a", DType::f32, {1}}, {"a", DType::f32, {1}}});
             }),
             "duplicate");
}

TEST(Checkpoint, ReadsFromSeveralThreads) {
  std::mt19937 generator = seeded();
  TemporaryDirectory directory;
  std::vector<float> values = random_floats(generator, 50'000);
  CheckpointWriter writer(directory.at("m"), {{"a", DType::bf16, {500, 100}}});
  writer.write("a", view_of(values, {500, 100}));
  writer.commit();
  Checkpoint checkpoint(directory.at("m"));
  std::vector<std::vector<float>> results(4, std::vector<float>(values.size()));
  std::vector<std::thread> threads;
  for (std::vector<float>& result : results)
    threads.emplace_back([&] { checkpoint.read("a", view_of(result, {500, 100})); });
  for (std::thread& thread : threads) thread.join();
  for (const std::vector<float>& result : results) EXPECT_EQ(result, results[0]);
  EXPECT_EQ(results[0][7], static_cast<float>(bf16(values[7])));
}

}  // namespace
}  // namespace latente
