// The model against every committed reference of transformers (tests/reference).
#include <gtest/gtest.h>

#include <filesystem>
#include <set>

#include "cpu/cpu_backend.h"
#include "model/weights.h"
#include "train/parity.h"

namespace latente {
namespace {

std::vector<std::string> cases() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(LATENTE_TEST_DATA "/reference")) {
    if (std::filesystem::exists(entry.path() / "reference.safetensors"))
      names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

class Reference : public testing::TestWithParam<std::string> {
 protected:
  Reference()
      : directory_(LATENTE_TEST_DATA "/reference/" + GetParam()),
        checkpoint_(directory_),
        reference_(directory_ + "/reference.safetensors") {}

  std::vector<ParityRow> compare(DType type, const ParityOptions& options, int threads = 1) {
    CpuBackend backend(threads);
    Transformer model(load_config(checkpoint_), type);
    load_parameters(model, checkpoint_);
    return compare_with_reference(backend, model, reference_, options);
  }
  static void expect_good(const std::vector<ParityRow>& rows) {
    for (const ParityRow& row : rows)
      EXPECT_TRUE(row.good()) << row.name << " is off by " << row.difference << ", allowed " << row.tolerance
                              << (row.note.empty() ? "" : "; " + row.note);
  }

  std::string directory_;
  Checkpoint checkpoint_;
  SafetensorsFile reference_;
};

TEST_P(Reference, Float32) {
  std::vector<ParityRow> rows = compare(DType::f32, {.tolerance = 1e-5, .gradient_tolerance = 1e-4});
  expect_good(rows);
  std::set<std::string> compared;
  for (const ParityRow& row : rows) compared.insert(row.name);

  Transformer model(load_config(checkpoint_), DType::f32);
  const Config& config = model.config();
  std::set<std::string> expected{"logits", "loss", "generated"};
  for (int64_t i = 0; i <= config.num_hidden_layers; ++i) expected.insert("hidden." + std::to_string(i));
  for (int64_t k = 1; k <= config.num_mtp_layers; ++k) {
    expected.insert("mtp." + std::to_string(k) + ".logits");
    expected.insert("mtp." + std::to_string(k) + ".loss");
  }
  bool with_gradients = false;
  for (const std::string& name : compared) with_gradients |= name.starts_with("grad.");
  if (with_gradients) {
    model.for_each([&](const std::string& path, Tensor& tensor) {
      if (!tensor.requires_grad()) return;
      std::string stack = path.substr(0, path.rfind('.') + 1);
      if (!is_expert_stack(path)) {
        expected.insert("grad." + path);
      } else if (compared.contains("grad." + stack + "gate_up_proj")) {
        expected.insert("grad." + stack + "gate_up_proj");
        expected.insert("grad." + stack + "down_proj");
      } else {
        for (int64_t e = 0; e < tensor[0]; ++e) expected.insert("grad." + expert_path(path, e));
      }
    });
  }
  EXPECT_EQ(compared, expected);
}

// The references are computed in float64 and stored as float32, whose rounding is what remains.
TEST_P(Reference, Float64) {
  expect_good(compare(DType::f64, {.tolerance = 3e-7, .gradient_tolerance = 3e-7}));
}

TEST_P(Reference, ThreadsDoNotChangeABit) {
  std::vector<ParityRow> one = compare(DType::f32, {}), three = compare(DType::f32, {}, 3);
  ASSERT_EQ(one.size(), three.size());
  for (size_t i = 0; i < one.size(); ++i) EXPECT_EQ(one[i].difference, three[i].difference) << one[i].name;
}

INSTANTIATE_TEST_SUITE_P(Cases, Reference, testing::ValuesIn(cases()), [](const auto& one) {
  std::string name = one.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

TEST(ReferenceCases, AreAllThere) { EXPECT_GE(cases().size(), 17u); }

// The comparison itself must notice: one weight moved by one part in a thousand.
TEST(ReferenceCases, NoticeAChangedWeight) {
  std::string directory = LATENTE_TEST_DATA "/reference/v3-mtp1";
  Checkpoint checkpoint(directory);
  SafetensorsFile reference(directory + "/reference.safetensors");
  CpuBackend backend(1);
  for (const char* moved :
       {"model.layers.0.self_attn.kv_b_proj.weight", "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.eh_proj.weight"}) {
    Transformer model(load_config(checkpoint), DType::f64);
    load_parameters(model, checkpoint);
    bool found = false;
    model.for_each([&](const std::string& path, Tensor& tensor) {
      if (path != moved) return;
      found = true;
      for (int64_t i = 0; i < tensor.count(); ++i) tensor.view().as<double>()[i] *= i == 0 ? -3 : 1.001;
    });
    ASSERT_TRUE(found) << moved;
    int64_t bad = 0;
    for (const ParityRow& row : compare_with_reference(backend, model, reference)) bad += row.good() ? 0 : 1;
    EXPECT_GT(bad, 0) << moved;
  }
}

}  // namespace
}  // namespace latente
