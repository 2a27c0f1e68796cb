#include "checkpoint/training_state.h"

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint.h"
#include "checkpoint/checksum.h"
#include "checkpoint/support.h"

namespace latente {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

// A state whose every part tells its step.
void save(const std::string& directory, int64_t step, int keep_last) {
  std::vector<float> moment(3000, static_cast<float>(step)), weight(5000, static_cast<float>(-step));
  std::vector<int64_t> counter = {step};
  TrainingStateWriter writer(directory, step);
  writer.tensor("exp_avg.w", view_of(moment, {30, 100}));
  writer.tensor("counter", view_of(counter, {1}));
  writer.json({{"position", step * 1000},
               {"random", {{"counter", ~static_cast<uint64_t>(step)}}},
               {"lr", 1.0 / 3.0 / (1 + step)}});
  writer.model([&](const std::string& path) {
    CheckpointOptions options;
    options.max_shard_bytes = 10'000;
    CheckpointWriter model(path, {{"w", DType::f32, {50, 100}}, {"v", DType::bf16, {100, 50}}}, options);
    model.write("w", view_of(weight, {50, 100}));
    model.write("v", view_of(weight, {100, 50}));
    model.write_file("config.json", "{}");
    model.commit();
  });
  writer.commit(keep_last);
}

// Everything in it belongs to one step.
void expect_consistent(const std::string& directory, int64_t step) {
  TrainingState state(directory);
  EXPECT_EQ(state.step(), step);
  EXPECT_EQ(state.json()["step"], step);
  EXPECT_EQ(state.json()["position"], step * 1000);
  EXPECT_EQ(state.json()["random"]["counter"], ~static_cast<uint64_t>(step));
  EXPECT_EQ(state.json()["lr"].get<double>(), 1.0 / 3.0 / static_cast<double>(1 + step));
  std::vector<float> moment(3000), weight(5000);
  std::vector<int64_t> counter(1);
  state.tensors().read("exp_avg.w", view_of(moment, {30, 100}));
  state.tensors().read("counter", view_of(counter, {1}));
  EXPECT_EQ(moment, std::vector<float>(3000, static_cast<float>(step)));
  EXPECT_EQ(counter[0], step);
  Checkpoint model(state.model_directory());
  model.read("w", view_of(weight, {50, 100}));
  EXPECT_EQ(weight, std::vector<float>(5000, static_cast<float>(-step)));
  model.read("v", view_of(weight, {100, 50}));
  EXPECT_EQ(weight, std::vector<float>(5000, static_cast<float>(bf16(static_cast<float>(-step)))));
}

std::string name_of_step(int64_t step) { return fmt::format("step-{:06}", step); }

// From the specification's reference program.
TEST(Checksum, KnownValues) {
  auto hash = [](std::string_view text, uint64_t seed) {
    return xxh64(std::as_bytes(std::span(text.data(), text.size())), seed);
  };
  EXPECT_EQ(hash("", 0), 0xef46db3751d8e999u);
  EXPECT_EQ(hash("a", 0), 0xd24ec4f1a98c6e5bu);
  EXPECT_EQ(hash("abc", 0), 0x44bc2cf5ad770999u);
  // Bytes 7, 138, 13, ...: i * 131 + 7, by the python-xxhash package.
  struct Row {
    size_t size;
    uint64_t seed, expected;
  };
  for (const Row& row : std::initializer_list<Row>{{3, 1u, 0x95ba63f005e6e6cau},
                                                   {4, 0u, 0xfa212ae44b3bb23du},
                                                   {7, 5u, 0xd9177e418dfa6cecu},
                                                   {8, 0u, 0x994b676b71ce94ddu},
                                                   {12, 0u, 0xb92f588ce720786eu},
                                                   {31, 0u, 0x6711d55e306b5d8fu},
                                                   {32, 0u, 0x07f7b8e3bc5d6e25u},
                                                   {33, 2654435761u, 0x3d805e8712cb4890u},
                                                   {63, 0u, 0xb7c9968c066cb6a5u},
                                                   {64, 9u, 0x3561e0d0689e04d5u},
                                                   {100, 0u, 0x9ddada11d3dc2d8fu},
                                                   {1000, 18446744073709551615u, 0x2ebd51d295f7ea0bu}}) {
    std::string text(row.size, '\0');
    for (size_t i = 0; i < row.size; ++i) text[i] = static_cast<char>(i * 131 + 7);
    EXPECT_EQ(hash(text, row.seed), row.expected) << row.size;
  }
}

TEST(TrainingState, SavesAndLoads) {
  TemporaryDirectory directory;
  std::string run = directory.at("runs/x");
  EXPECT_FALSE(latest_good(run).directory);
  save(run, 7, 0);
  LatestGood latest = latest_good(run);
  ASSERT_TRUE(latest.directory);
  EXPECT_EQ(*latest.directory, run + "/step-000007");
  EXPECT_EQ(latest.step, 7);
  EXPECT_TRUE(latest.skipped.empty());
  expect_consistent(*latest.directory, 7);
  EXPECT_EQ(list_directory(*latest.directory),
            (std::vector<std::string>{"manifest.json", "model", "optimizer.safetensors", "state.json"}));
  EXPECT_EQ(TrainingState(*latest.directory, TrainingState::Verify::sizes).step(), 7);
  expect_has(message_of([&] { TrainingState state(run + "/step-000008"); }), "step-000008/manifest.json");
}

TEST(TrainingState, KeepsTheLastSaved) {
  TemporaryDirectory directory;
  for (int64_t step : {10, 20, 30, 40}) save(directory.path(), step, 2);
  EXPECT_EQ(list_directory(directory.path()), (std::vector<std::string>{"step-000030", "step-000040"}));
  // The run goes back to 30 and goes on from there: what it saves now is newer than step 40.
  save(directory.path(), 35, 3);
  EXPECT_EQ(latest_good(directory.path()).step, 35);
  save(directory.path(), 36, 2);
  EXPECT_EQ(list_directory(directory.path()), (std::vector<std::string>{"step-000035", "step-000036"}));
  // Saving a step again replaces it.
  save(directory.path(), 35, 2);
  EXPECT_EQ(latest_good(directory.path()).step, 35);
  expect_consistent(directory.at("step-000035"), 35);
  // Nothing that is not a state is removed.
  directory.put("step-000001/notes.txt", "mine");
  directory.put("step-x/notes.txt", "mine");
  directory.put("log.txt", "mine");
  save(directory.path(), 1'234'567, 1);
  EXPECT_EQ(list_directory(directory.path()),
            (std::vector<std::string>{"log.txt", "step-000001", "step-1234567", "step-x"}));
  EXPECT_EQ(latest_good(directory.path()).step, 1'234'567);
}

TEST(TrainingState, AbandonedSaveLeavesNothing) {
  TemporaryDirectory directory;
  save(directory.path(), 1, 0);
  {
    TrainingStateWriter writer(directory.path(), 2);
    writer.json({{"a", 1}});
    EXPECT_THROW(writer.model([](const std::string&) { throw std::runtime_error("stop"); }),
                 std::runtime_error);
  }
  EXPECT_EQ(list_directory(directory.path()), std::vector<std::string>{"step-000001"});
  TrainingStateWriter writer(directory.path(), 2);
  expect_has(message_of([&] { writer.json({{"loss", {1.0, std::nan("")}}}); }), "/loss/1 is nan");
}

// Each file of the newest state, truncated, emptied, removed, or with one bit changed anywhere: named and
// skipped.
TEST(TrainingState, DamageIsFoundAndNamed) {
  std::mt19937 generator = seeded();
  TemporaryDirectory directory;
  save(directory.path(), 1, 0);
  save(directory.path(), 2, 0);
  std::vector<std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(directory.at("step-000002")))
    if (entry.is_regular_file()) files.push_back(entry.path().string());
  ASSERT_EQ(files.size(), 7u);
  for (const std::string& file : files) {
    const std::string good = read_file(file);
    std::vector<std::optional<std::string>> damages = {std::nullopt, "", good.substr(0, good.size() - 1),
                                                       good + "x", good.substr(0, generator() % good.size())};
    for (int flip = 0; flip < 20; ++flip) {
      std::string flipped = good;
      size_t at = generator() % good.size();
      // A space or a line more or less does not change what JSON says.
      if (file.ends_with("manifest.json") && std::isspace(static_cast<unsigned char>(good[at]))) continue;
      flipped[at] = static_cast<char>(flipped[at] ^ (1 << generator() % 8));
      damages.push_back(flipped);
    }
    for (const std::optional<std::string>& damage : damages) {
      fs::remove(file);
      if (damage) std::ofstream(file, std::ios::binary) << *damage;
      if (damage == good) continue;
      LatestGood latest = latest_good(directory.path());
      if (file.ends_with("manifest.json") && latest.step == 2) {
        ASSERT_EQ(Json::parse(*damage), Json::parse(good));  // the same manifest in other bytes
        continue;
      }
      ASSERT_EQ(latest.step, 1) << file << (damage ? " changed" : " removed");
      ASSERT_EQ(latest.skipped.size(), 1u);
      expect_has(latest.skipped[0], file);
      EXPECT_THROW(TrainingState state(directory.at("step-000002")), Error);
      expect_consistent(*latest.directory, 1);
    }
    std::ofstream(file, std::ios::binary) << good;
  }
  EXPECT_EQ(latest_good(directory.path()).step, 2);
  fs::remove_all(directory.at("step-000001"));
  fs::resize_file(files[0], 3);
  EXPECT_FALSE(latest_good(directory.path()).directory);
  EXPECT_EQ(latest_good(directory.path()).skipped.size(), 1u);
}

TEST(TrainingState, HostileManifests) {
  TemporaryDirectory directory;
  save(directory.path(), 1, 0);
  std::string path = directory.at("step-000001/manifest.json");
  const Json good = Json::parse(read_file(path));
  auto with = [&](auto change) {
    Json json = good;
    json.erase("xxh64");
    change(json);
    std::string text = json.dump();
    json["xxh64"] = fmt::format("{:016x}", xxh64(std::as_bytes(std::span(text.data(), text.size()))));
    std::ofstream(path) << json.dump();
    return message_of([&] { TrainingState state(directory.at("step-000001")); });
  };
  EXPECT_EQ(with([](Json&) {}), "no error");
  Json record = {{"bytes", 0}, {"xxh64", ""}};
  expect_has(with([&](Json& json) { json["files"]["../../x"] = record; }), "inside the directory");
  expect_has(with([&](Json& json) { json["files"]["/etc/passwd"] = record; }), "inside the directory");
  expect_has(with([](Json& json) { json["files"].erase("state.json"); }), "no state.json");
  expect_has(with([](Json& json) { json["files"] = 3; }), "manifest");
  expect_has(with([](Json& json) { json["files"]["state.json"] = "x"; }), "mistyped");
  expect_has(with([](Json& json) { json["version"] = 2; }), "another version");
  expect_has(with([](Json& json) { json["step"] = "x"; }), "mistyped");
  expect_has(with([](Json& json) { json.erase("serial"); }), "missing");
  std::ofstream(path) << "[]";
  expect_has(message_of([&] { TrainingState state(directory.at("step-000001")); }), "other JSON");
}

TEST(TrainingState, FindsAStatePutAsideByAnInterruptedReplacement) {
  TemporaryDirectory directory;
  save(directory.path(), 1, 0);
  save(directory.path(), 2, 0);
  std::string aside = directory.at("step-000002.replaced-0123456789abcdef");
  fs::rename(directory.at("step-000002"), aside);
  LatestGood latest = latest_good(directory.path());
  EXPECT_EQ(latest.directory, aside);
  expect_consistent(aside, 2);
  save(directory.path(), 3, 0);
  EXPECT_EQ(list_directory(directory.path()),
            (std::vector<std::string>{"step-000001", "step-000002", "step-000003"}));
}

// A child saves again and again, and is killed at a random moment. Whatever it reported as saved is there (or
// something newer), whole and of one piece, and the next save clears away what the kill left.
TEST(TrainingState, SurvivesKill) {
  std::mt19937 generator = seeded();
  TemporaryDirectory directory;
  constexpr int kills = 100;
  int64_t last = 0, total = 0;
  save(directory.path(), last, 2);
  for (int kill = 0; kill < kills; ++kill) {
    int reports[2];
    ASSERT_EQ(::pipe(reports), 0);
    pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      ::close(reports[0]);
      try {
        // Every third child saves the same step again, the others go on.
        for (int64_t step = last + 1;; step += kill % 3 == 0 ? 0 : 1) {
          save(directory.path(), step, 2);
          if (::write(reports[1], &step, sizeof(step)) != sizeof(step)) ::_exit(2);
        }
      } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        ::_exit(1);
      }
    }
    ::close(reports[1]);
    ::usleep(generator() % 40'000);
    ::kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFSIGNALED(status)) << "the child failed by itself: " << status;
    for (int64_t step; ::read(reports[0], &step, sizeof(step)) == sizeof(step); ++total) last = step;
    ::close(reports[0]);

    LatestGood latest = latest_good(directory.path());
    ASSERT_TRUE(latest.directory);
    EXPECT_TRUE(latest.skipped.empty()) << latest.skipped[0];
    EXPECT_GE(latest.step, last);
    EXPECT_LE(latest.step, last + 1);
    expect_consistent(*latest.directory, latest.step);
    ASSERT_FALSE(HasFailure()) << "kill " << kill;
    last = latest.step;
  }
  std::printf("%d kills, %ld saves\n", kills, static_cast<long>(total));
  save(directory.path(), last + 1, 2);
  std::vector<std::string> names = list_directory(directory.path());
  EXPECT_EQ(names.size(), 2u) << fmt::format("{}", fmt::join(names, " "));
  EXPECT_EQ(names.back(), name_of_step(last + 1));
}

}  // namespace
}  // namespace latente
