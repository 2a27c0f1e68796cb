#include "checkpoint/resumable.h"

#include "checkpoint/checkpoint.h"
#include "checkpoint/hostile.h"

namespace latente {
namespace {

namespace fs = std::filesystem;

const std::vector<TensorSpec> specs = {{"a", DType::f32, {10, 3}},
                                       {"wide", DType::u8, {2, 64}},
                                       {"b", DType::bf16, {7}},
                                       {"c", DType::f32, {5}}};

void fill(ResumableCheckpoint& checkpoint, size_t shard) {
  SafetensorsWriter writer = checkpoint.open(shard);
  for (const TensorSpec& spec : checkpoint.shards()[shard].specs) {
    const std::vector<std::byte> bytes(static_cast<size_t>(spec.bytes()), std::byte{3});
    writer.write_part(spec.name, 0, bytes);
  }
  checkpoint.finish(shard, std::move(writer));
}

TEST(Resumable, ShardsFillUpAndThenTheCheckpointAppears) {
  const TemporaryDirectory directory;
  const std::string out = directory.at("new/out");
  {
    ResumableCheckpoint checkpoint(out, {{"x", 1}}, specs, 250);
    ASSERT_EQ(checkpoint.shards().size(), 2u);
    EXPECT_EQ(checkpoint.shards()[0].bytes(), 120 + 128);
    // Panels first, so that they are aligned.
    EXPECT_EQ(checkpoint.shards()[0].specs[0].name, "wide");
    fill(checkpoint, 1);
    expect_has(message_of([&] { checkpoint.commit("{}"); }),
               "model-00001-of-00002.safetensors is not written");
    expect_has(message_of([&] {
                 ResumableCheckpoint second(out, {{"x", 1}}, specs, 250);
               }),
               "another process works in this directory");
    expect_has(message_of([&] { Checkpoint unfinished(out); }), "a conversion that is not finished");
  }
  {
    ResumableCheckpoint checkpoint(out, {{"x", 1}}, specs, 250);
    EXPECT_FALSE(checkpoint.shards()[0].done);
    EXPECT_TRUE(checkpoint.shards()[1].done);
    fill(checkpoint, 0);
    checkpoint.commit("{\"model_type\":\"x\"}");
  }
  const Checkpoint checkpoint(out);
  EXPECT_EQ(checkpoint.names(), (std::vector<std::string>{"a", "b", "c", "wide"}));
  EXPECT_EQ(list_directory(out),
            (std::vector<std::string>{"config.json", "model-00001-of-00002.safetensors",
                                      "model-00002-of-00002.safetensors", "model.safetensors.index.json"}));
  expect_has(message_of([&] {
               ResumableCheckpoint again(out, {{"x", 1}}, specs, 250);
             }),
             "expected a new or empty directory");
}

TEST(Resumable, DifferencesAreNamed) {
  const TemporaryDirectory directory;
  const std::string out = directory.at("out");
  { ResumableCheckpoint checkpoint(out, {{"options", {{"bits", 4}, {"old", true}}}}, specs, 250); }
  const auto refused = [&](const nlohmann::json& identity, int64_t shard = 250) {
    return message_of([&] { ResumableCheckpoint checkpoint(out, identity, specs, shard); });
  };
  expect_has(refused({{"options", {{"bits", 8}, {"old", true}}}}), "\"options/bits\" = 4, now it is 8");
  expect_has(refused({{"options", {{"bits", 4}}}}), "\"options/old\" = true, now it is nothing");
  expect_has(refused({{"options", {{"bits", 4}, {"old", true}, {"new", "x"}}}}),
             "\"options/new\" = nothing, now it is \"x\"");
  expect_has(refused({{"options", {{"bits", 4}, {"old", true}}}}, 100), "with other tensors");
  EXPECT_EQ(refused({{"options", {{"bits", 4}, {"old", true}}}}), "no error");
}

TEST(Resumable, TooLittleSpaceIsForeseen) {
  const TemporaryDirectory directory;
  const std::vector<TensorSpec> huge = {{"a", DType::u8, {int64_t{1} << 50}}};
  expect_has(message_of([&] { ResumableCheckpoint checkpoint(directory.at("out"), {}, huge, 1 << 20); }),
             "needs 1024.0 TiB more, and the disk has");
  EXPECT_FALSE(fs::exists(directory.at("out")));
}

TEST(Resumable, PartsMustAddUp) {
  const TemporaryDirectory directory;
  SafetensorsWriter writer(directory.at("x"), {{"a", DType::f32, {4}}});
  const std::vector<std::byte> bytes(12);
  writer.write_part("a", 4, bytes);
  EXPECT_FALSE(writer.complete());
  EXPECT_THROW(writer.write_part("a", 0, bytes), Error);  // more than is missing
  EXPECT_THROW(writer.write_part("a", -4, std::span(bytes).first(4)), Error);
  EXPECT_THROW(writer.write_part("a", 16, std::span(bytes).first(4)), Error);
  EXPECT_THROW(writer.commit(), Error);
  writer.write_part("a", 0, std::span(bytes).first(4));
  EXPECT_TRUE(writer.complete());
  EXPECT_THROW(writer.write_part("a", 0, {}), Error);
  writer.commit();
}

}  // namespace
}  // namespace latente
