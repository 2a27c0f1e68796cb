// GGUF models in the precision that their blocks are stored in: codes to the bit, the others near, in every
// layout.
#include <gtest/gtest.h>

#include <fstream>
#include <limits>
#include <map>
#include <set>

#include "checkpoint/support.h"
#include "cpu/quantised.h"
#include "infer/support.h"
#include "model/gguf.h"
#include "model/gguf_writer.h"
#include "model/quantised.h"
#include "model/run_weights.h"

namespace latente {
namespace {

using namespace test;

using TypeOf = std::function<GgmlType(const std::string& name)>;

std::string half_bytes(double value) { return number_bytes(f16(static_cast<float>(value)).bits); }

// Random codes, and scales that make values of some 0.1, in some blocks negative.
std::string random_block(GgmlType type, Random& random) {
  std::string block;
  for (int64_t i = 0; i < block_of(type).bytes; ++i) block += static_cast<char>(random.below(256));
  const auto put = [&](size_t at, double value) { block.replace(at, 2, half_bytes(value)); };
  const double size = 0.1 * random.uniform(0.5, 1.5) * (random.chance(0.2) ? -1 : 1);
  switch (type) {
    case GgmlType::q8_0:
      put(0, size / 64);
      for (char& c : block) c = c == -128 ? 127 : c;
      break;
    case GgmlType::q4_0:
      put(0, size / 4);
      break;
    case GgmlType::q5_0:
      put(0, size / 8);
      break;
    case GgmlType::iq4_nl:
      put(0, size / 64);
      break;
    case GgmlType::q4_1:
      put(0, size / 4), put(2, -size * 2);
      break;
    case GgmlType::q4_k:
      put(0, size / 128), put(2, size / 16);
      break;
    case GgmlType::q5_k:
      put(0, size / 256), put(2, size / 16);
      break;
    case GgmlType::q6_k:
      put(208, size / 1024);
      break;
    default:
      ADD_FAILURE() << name_of(type);
  }
  return block;
}

struct Shapes {
  bool compressed = true, tied = false;
  int64_t mtp = 0;
};

class Stored : public testing::Test {
 protected:
  // A file whose matrices have these types, or where their rows are no whole blocks of one, Q5_0.
  void write(const TypeOf& type_of, const GgufLayout& layout = {}, const Shapes& shapes = {}) {
    Tiny tiny;
    tiny.compressed = shapes.compressed, tiny.tied = shapes.tied, tiny.mtp = shapes.mtp;
    Config config = tiny_config(tiny);
    config.hidden_size = 256, config.intermediate_size = 288, config.kv_lora_rank = 64;
    config.qk_nope_head_dim = 32, config.v_head_dim = 32, config.moe_intermediate_size = 32;
    if (shapes.compressed) config.q_lora_rank = 32;
    Transformer model(config, DType::f32);
    randomise(model, 3);
    save_model(model, place_.at("original"), {});
    Random random(7);
    GgufBytes file;
    write_keys(file, config, layout);
    const TensorSink sink = [&](const std::string& name, std::vector<int64_t> shape,
                                const std::vector<float>& values) {
      const std::vector<uint64_t> extents(shape.rbegin(), shape.rend());
      GgmlType type =
          shape.size() < 2 || name.ends_with("ffn_gate_inp.weight") ? GgmlType::f32 : type_of(name);
      if (shape.back() % block_of(type).values != 0) type = GgmlType::q5_0;
      std::string bytes;
      if (block_of(type).values == 1) {
        for (float value : values) {
          bytes += type == GgmlType::f32   ? number_bytes(value)
                   : type == GgmlType::f16 ? half_bytes(value)
                                           : number_bytes(bf16(value).bits);
        }
      } else {
        for (size_t i = 0; i < values.size(); i += static_cast<size_t>(block_of(type).values))
          bytes += random_block(type, random);
      }
      file.tensor(name, extents, static_cast<uint32_t>(type), bytes);
    };
    GgufTensors(config, Checkpoint(place_.at("original")), layout, sink).write();
    place_.put("model.gguf", file.bytes());
  }

  std::unique_ptr<Transformer> load(const std::string& type = "auto", CpuBackend& on = backend()) const {
    RunWeights weights;
    weights.type = type;
    weights.copied = true;
    return load_for_running(open_model(path()), weights, on);
  }
  // Of which `later` has yet to lay out what it can.
  std::unique_ptr<Transformer> load(BackgroundLayout& later, CpuBackend& on = backend()) const {
    const ModelSource source = open_model(path());
    auto model = std::make_unique<Transformer>(source.config, DType::f32);
    load_as_stored(*model, *source.tensors, on, std::numeric_limits<int64_t>::max(), &later);
    return model;
  }
  std::string path() const { return place_.at("model.gguf"); }

  TemporaryDirectory place_;
};

std::vector<float> values_of(const Tensor& tensor, int64_t matrix) {
  const View view = tensor.view();
  const int64_t n = view[-2], k = view[-1];
  std::vector<float> values(static_cast<size_t>(n * k));
  if (is_quantised(view.dtype)) {
    const quantised::Form form = quantised::form_of(view);
    quantised::unpack(form, static_cast<const std::byte*>(view.data) + matrix * quantised::bytes(form, n, k),
                      k, 0, n, values.data());
  } else {
    EXPECT_EQ(view.layout, Layout::rows);
    const auto* data = static_cast<const char*>(view.data) + matrix * n * k * size_of(view.dtype);
    convert(view.dtype, data, DType::f32, values.data(), n * k);
  }
  return values;
}

// f(path, held values, stored values, type) of every matrix that is not packed floats, halves included.
template <class F>
void compare(Transformer& model, const GgufCheckpoint& file, const F& f) {
  const auto matrix = [&](const std::string& path, const Tensor& tensor, int64_t i,
                          const std::vector<float>& stored) {
    f(path, values_of(tensor, i), stored, tensor.dtype());
  };
  model.for_each([&](const std::string& path, Tensor& tensor) {
    if (tensor.shape().rank() < 2 ||
        (tensor.view().layout == Layout::panels && !is_quantised(tensor.dtype())))
      return;
    for (int64_t i = 0; i < (tensor.shape().rank() == 3 ? tensor[0] : 1); ++i) {
      const View view = tensor.view();
      std::vector<float> stored(static_cast<size_t>(view[-2] * view[-1]));
      file.read(is_expert_stack(path) ? expert_path(path, i) : path,
                View(stored.data(), {view[-2], view[-1]}, DType::f32));
      matrix(path, tensor, i, stored);
    }
  });
  for (int64_t l = 0; l < model.config().num_hidden_layers; ++l) {
    const std::string path = "model.layers." + std::to_string(l) + ".self_attn.";
    const Mla& mla = std::get<Mla>(model.model.layers[static_cast<size_t>(l)].self_attn);
    if (!mla.w_uk) continue;
    const int64_t height = mla.nope_dim + mla.v_dim, rank = mla.kv_rank;
    std::vector<float> both(static_cast<size_t>(mla.heads * height * rank));
    file.read(path + "kv_b_proj.weight", View(both.data(), {mla.heads * height, rank}, DType::f32));
    for (int64_t h = 0; h < mla.heads; ++h) {
      const float* head = both.data() + h * height * rank;
      std::vector<float> keys;
      for (int64_t c = 0; c < rank; ++c) {
        for (int64_t i = 0; i < mla.nope_dim; ++i) keys.push_back(head[i * rank + c]);
      }
      matrix(path + "w_uk", mla.w_uk, h, keys);
      matrix(path + "w_uv", mla.w_uv, h, {head + mla.nope_dim * rank, head + height * rank});
    }
  }
}

double largest_of(const std::vector<float>& values) {
  double largest = 0;
  for (float value : values) largest = std::max(largest, std::abs(static_cast<double>(value)));
  return largest;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i)
    largest = std::max(largest, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  return largest;
}

// Straight into panels, and by way of codes and scales.
TEST(StoredBlocks, ArePanelsEitherWay) {
  constexpr int64_t n = 37, k = 512;
  Random random(8);
  for (const auto& [type, held] :
       {std::pair{GgmlType::q8_0, DType::q8}, {GgmlType::q4_0, DType::q4}, {GgmlType::q4_k, DType::q4m}}) {
    std::string blocks;
    for (int64_t i = 0; i < n * k; i += block_of(type).values) blocks += random_block(type, random);
    const auto* bytes = reinterpret_cast<const std::byte*>(blocks.data());
    std::vector<int8_t> codes(n * k);
    std::vector<float> scales(n * k / 16);
    decode_codes(type, bytes, n * k, codes.data(), scales.data());
    const auto form = *backend().quantised({n, k}, held, 32);
    View expected = form.view, found = form.view;
    const auto a = backend().allocate(form.bytes), b = backend().allocate(form.bytes);
    expected.data = a.get(), found.data = b.get();
    backend().pack_quantised(codes.data(), scales.data(), expected, 0, 0, n);
    if (!backend().pack_blocks(bytes, found, 0, 0, n)) GTEST_SKIP() << "no vectors";
    EXPECT_EQ(std::memcmp(a.get(), b.get(), static_cast<size_t>(form.bytes)), 0) << name_of(type);
    // A scale that is no number, in the last block.
    blocks.replace(blocks.size() - static_cast<size_t>(block_of(type).bytes), 2, half_bytes(INFINITY));
    EXPECT_FALSE(backend().pack_blocks(reinterpret_cast<const std::byte*>(blocks.data()), found, 0, 0, n));
  }
}

const GgufLayout layouts[] = {
    {}, {.split_latent = false, .whole_latent = true}, {.folded = true}, {.fused = true}, {.trimmed = true}};

// Only the half of the latent's up-projection that is read along the other axis is rounded again.
TEST_F(Stored, CodesAreKeptToTheBit) {
  for (GgmlType type : {GgmlType::q8_0, GgmlType::q4_0, GgmlType::q5_0, GgmlType::iq4_nl}) {
    for (const GgufLayout& layout : layouts) {
      write([&](const std::string&) { return type; }, layout, {.tied = layout.fused});
      const auto model = load();
      EXPECT_EQ(type_text(*model).substr(0, 4), type == GgmlType::q4_0 ? "int4" : "int8");
      const std::string turned = layout.split_latent ? "kv_b_proj.weight" : "w_uk";
      int exact = 0, near = 0;
      compare(*model, GgufCheckpoint(path()),
              [&](const std::string& path, const auto& held, const auto& stored, DType held_as) {
                if (path.ends_with(turned)) {
                  ++near;
                  EXPECT_EQ(held_as, type == GgmlType::q8_0 ? DType::bf16 : DType::q8) << path;
                  EXPECT_LE(largest_difference(held, stored), largest_of(stored) / 250) << path;
                  return;
                }
                if (path.ends_with("mlp.gate.weight")) return;
                ++exact;
                EXPECT_EQ(held_as, type == GgmlType::q4_0 ? DType::q4 : DType::q8) << path;
                EXPECT_EQ(std::memcmp(held.data(), stored.data(), stored.size() * sizeof(float)), 0) << path;
              });
      EXPECT_GT(exact, 40);
      EXPECT_GE(near, 2);
    }
  }
}

TEST_F(Stored, EachMatrixHasItsOwnForm) {
  const std::map<std::string, GgmlType> types = {
      {"token_embd", GgmlType::q6_k},     {"output.", GgmlType::q5_k},
      {"attn_q_a.", GgmlType::f32},       {"attn_q_b.", GgmlType::q4_0},
      {"attn_kv_a_mqa.", GgmlType::bf16}, {"attn_k_b.", GgmlType::q8_0},
      {"attn_v_b.", GgmlType::q4_1},      {"attn_output.", GgmlType::f16},
      {"ffn_gate_exps", GgmlType::q4_0},  {"ffn_up_exps", GgmlType::q4_k},
      {"ffn_down_exps", GgmlType::q8_0},  {"ffn_gate.", GgmlType::q4_1},
      {"ffn_gate_shexp", GgmlType::f32},  {"nextn.eh_proj", GgmlType::q4_0}};
  const std::map<std::string, DType> held = {{"embed_tokens.weight", DType::q8},
                                             {"lm_head.weight", DType::q8},
                                             {"q_a_proj.weight", DType::f32},
                                             {"q_b_proj.weight", DType::q4},
                                             {"kv_a_proj_with_mqa.weight", DType::bf16},
                                             {"kv_b_proj.weight", DType::bf16},
                                             {"w_uk", DType::q8},
                                             {"w_uv", DType::q4m},
                                             {"o_proj.weight", DType::bf16},
                                             {"experts.gate_proj", DType::q4},
                                             {"experts.up_proj", DType::q4m},
                                             {"experts.down_proj", DType::q8},
                                             {"mlp.gate_proj.weight", DType::q4m},
                                             {"shared_experts.gate_proj.weight", DType::f32},
                                             {"eh_proj.weight", DType::bf16},
                                             {"mlp.gate.weight", DType::f32},
                                             {"layernorm.weight", DType::f32}};
  write(
      [&](const std::string& name) {
        for (const auto& [part, type] : types) {
          if (name.find(part) != name.npos) return type;
        }
        return GgmlType::q8_0;
      },
      {}, {.mtp = 1});
  const auto model = load();
  std::set<std::string> seen;
  const auto check = [&](const std::string& path, DType type) {
    for (const auto& [end, expected] : held) {
      if (!path.ends_with(end)) continue;
      EXPECT_EQ(type, expected) << path;
      seen.insert(end);
    }
  };
  model->for_each([&](const std::string& path, Tensor& tensor) { check(path, tensor.dtype()); });
  const GgufCheckpoint file(path());
  compare(*model, file, [&](const std::string& path, const auto& values, const auto& stored, DType type) {
    check(path, type);
    // What is rounded is rounded to 8 bits.
    EXPECT_LE(largest_difference(values, stored), largest_of(stored) / 250) << path;
  });
  for (const auto& [end, type] : held) EXPECT_TRUE(seen.contains(end)) << end;
}

// -128 is not a code of our products: its group is rounded again, and the others stay.
TEST_F(Stored, ALeastCodeIsRoundedAgain) {
  write([](const std::string&) { return GgmlType::q8_0; });
  std::string bytes = read_file(path());
  const GgufCheckpoint original(path());
  const auto blocks = *original.blocks("lm_head.weight");
  const size_t at = static_cast<size_t>(blocks.bytes.data() - original.file().file().bytes().data());
  for (size_t i : {5, 9}) bytes[at + 34 * 3 + 2 + i] = -128;
  place_.put("model.gguf", bytes);
  const GgufCheckpoint changed(path());
  const auto model = load();
  int64_t differ = 0;
  compare(*model, changed, [&](const std::string& path, const auto& held, const auto& stored, DType) {
    if (path != "lm_head.weight") return;
    EXPECT_LE(largest_difference(held, stored), largest_of(stored) / 250);
    for (size_t i = 0; i < stored.size(); ++i) {
      if (held[i] == stored[i]) continue;
      EXPECT_EQ(i / 32, 3u);
      ++differ;
    }
  });
  EXPECT_GT(differ, 0);
}

// All types that have an exact form, and some that have none.
GgmlType any_type(const std::string& name) {
  const GgmlType types[] = {GgmlType::q8_0, GgmlType::q4_0,   GgmlType::q4_k, GgmlType::q4_1,
                            GgmlType::q5_0, GgmlType::iq4_nl, GgmlType::q6_k, GgmlType::bf16};
  return types[std::hash<std::string>()(name) % std::size(types)];
}

// What a model computes: logits of a prompt read at once and token by token, and a text with drafts.
struct Computed {
  std::vector<std::vector<float>> logits;
  Text text;
  bool operator==(const Computed&) const = default;
};

Computed computed(const Transformer& model, CpuBackend& on) {
  Random random(13);
  const auto prompt = random_tokens(random, 21, 64);
  RunnerOptions how;
  how.context = 64;
  Computed all;
  for (int64_t at_once : {int64_t{21}, int64_t{3}, int64_t{1}}) {
    SequenceRunner runner(on, model, how);
    for (int64_t t = 0; t < 21; t += at_once) {
      const std::span tokens(&prompt[static_cast<size_t>(t)], static_cast<size_t>(at_once));
      all.logits.push_back(copy_of(runner.forward(tokens, t, at_once)));
    }
  }
  GenerationOptions options;
  options.max_tokens = 20;
  Engine engine(on, model, how);
  all.text = generated(engine, prompt, options);
  return all;
}

void expect_laid_out(Transformer& model, Transformer& expected) {
  std::map<std::string, View> views;
  expected.for_each([&](const std::string& path, Tensor& tensor) { views[path] = tensor.view(); });
  model.for_each([&](const std::string& path, Tensor& tensor) {
    const View view = tensor.view(), &same = views[path];
    ASSERT_EQ(view.layout, same.layout) << path;
    if (!view.pending) return;
    const int64_t matrices = view.shape.rank() == 3 ? view[0] : 1;
    EXPECT_EQ(view.pending->at(matrices - 1),
              static_cast<std::byte*>(view.data) + (matrices - 1) * view.stride(0));
    EXPECT_EQ(std::memcmp(view.data, same.data, static_cast<size_t>(quantised::bytes_of(view))), 0) << path;
  });
}

int64_t pending_matrices(Transformer& model) {
  int64_t count = 0;
  model.for_each([&](const std::string&, Tensor& tensor) {
    const PendingPanels* pending = tensor.view().pending;
    for (int64_t i = 0; pending && i < pending->matrices(); ++i) count += pending->at(i) == nullptr;
  });
  return count;
}

TEST_F(Stored, ScalesThatAreNotFiniteAreErrors) {
  for (GgmlType type : {GgmlType::q8_0, GgmlType::q6_k}) {
    write([&](const std::string&) { return type; });
    std::string bytes = read_file(path());
    const GgufCheckpoint original(path());
    const auto blocks = *original.blocks("lm_head.weight");
    const size_t at = static_cast<size_t>(blocks.bytes.data() - original.file().file().bytes().data());
    bytes.replace(at + (type == GgmlType::q8_0 ? 0 : 208), 2, half_bytes(INFINITY));
    place_.put("model.gguf", bytes);
    expect_has(message_of([&] { load(); }), "model.gguf: lm_head.weight: expected finite values");
    // Where it is not laid out before, who needs it finds out, also after the thread has been there.
    if (type != GgmlType::q8_0) continue;
    for (bool started : {false, true}) {
      const auto later = std::make_shared<BackgroundLayout>();
      const auto model = load(*later);
      if (started) later->start(), later->wait();
      EXPECT_EQ(pending_matrices(*model) == 1, started);
      expect_has(message_of([&] { computed(*model, backend()); }),
                 "model.gguf: lm_head.weight: expected finite values");
    }
  }
}

// As near to the decoded weights' logits as activations of 8 bits allow, with keys and values expanded and
// absorbed; but for tokens that another expert is chosen for.
TEST_F(Stored, LogitsAreNearThoseOfTheDecodedWeights) {
  Random random(5);
  for (GgmlType type :
       {GgmlType::q8_0, GgmlType::q4_0, GgmlType::q4_k, GgmlType::q6_k, GgmlType::f16, GgmlType::f32}) {
    std::vector<double> expanded, absorbed;
    for (const GgufLayout& layout : layouts) {
      write([&](const std::string& name) { return name.find("ffn_up") == name.npos ? type : GgmlType::q5_k; },
            layout, {.compressed = random.chance(0.5), .tied = random.chance(0.5)});
      const auto model = load(), decoded = load("f32");
      const auto ids = random_tokens(random, 20, 64);
      const auto want = uncached(*decoded, ids), got = uncached(*model, ids);
      RunnerOptions how;
      how.context = 32;
      SequenceRunner runner(backend(), *model, how);
      for (size_t t = 0; t < ids.size(); ++t) {
        absorbed.push_back(
            distance(runner.forward(std::span(&ids[t], 1), static_cast<int64_t>(t), 1), want[t]));
        expanded.push_back(distance(std::vector<float>(got[t].begin(), got[t].end()), want[t]));
      }
    }
    for (std::vector<double>* distances : {&expanded, &absorbed}) {
      std::sort(distances->begin(), distances->end());
      EXPECT_LT((*distances)[distances->size() / 2], 0.05) << name_of(type);
    }
  }
}

TEST_F(Stored, TextDoesNotDependOnThreads) {
  const GgmlType types[] = {GgmlType::q8_0, GgmlType::q4_0, GgmlType::q6_k, GgmlType::bf16};
  write([&](const std::string& name) { return types[std::hash<std::string>()(name) % 4]; }, {}, {.mtp = 1});
  Random random(11);
  const auto prompt = random_tokens(random, 9, 64);
  RunnerOptions how;
  how.context = 64;
  GenerationOptions options;
  options.max_tokens = 30;
  std::optional<Text> first;
  for (int threads : {1, 2, 3}) {
    CpuBackend on(threads);
    const auto model = load("auto", on);
    Engine engine(on, *model, how);
    const Text text = generated(engine, prompt, options);
    if (!first) first = text;
    EXPECT_EQ(text, *first) << threads;
  }
  EXPECT_GT(std::set<int32_t>(first->tokens.begin(), first->tokens.end()).size(), 1u);
}

TEST_F(Stored, NothingDependsOnHowMuchIsLaidOut) {
  for (const GgufLayout& layout : layouts) {
    write(any_type, layout, {.mtp = 1});
    const auto expected = load();
    const Computed want = computed(*expected, backend());
    for (int threads : {1, 3}) {
      CpuBackend on(threads);
      const auto later = std::make_shared<BackgroundLayout>();
      const auto model = load(*later, on);
      const int64_t all = pending_matrices(*model);
      EXPECT_GT(all, 20);
      for (int64_t left = all; left > 0; --left) {
        EXPECT_EQ(pending_matrices(*model), left);
        if (left == all || left % 7 == 3) {
          EXPECT_EQ(computed(*model, on), want) << left << " of " << all;
        }
        EXPECT_TRUE(later->step());
      }
      EXPECT_EQ(pending_matrices(*model), 0);
      EXPECT_FALSE(later->step());
      EXPECT_EQ(computed(*model, on), want);
      expect_laid_out(*model, *expected);
    }
  }
}

TEST_F(Stored, IsLaidOutWhileItRuns) {
  write(any_type, {}, {.mtp = 1});
  const auto expected = load();
  const Computed want = computed(*expected, backend());
  CpuBackend on(2);
  for (int round = 0; round < 3; ++round) {
    const auto later = std::make_shared<BackgroundLayout>();
    const auto model = load(*later, on);
    later->start();
    EXPECT_EQ(computed(*model, on), want);
    if (round == 2) break;  // ended in the middle, or not
    later->wait();
    EXPECT_EQ(pending_matrices(*model), 0);
    EXPECT_EQ(computed(*model, on), want);
    expect_laid_out(*model, *expected);
  }
  // And as programs load it.
  const auto model = load_for_running(open_model(path()), {}, on);
  EXPECT_EQ(computed(*model, on), want);
}

// Of this process's memory, what is the file's.
int64_t resident_of(const std::string& path) {
  std::ifstream maps("/proc/self/smaps");
  int64_t bytes = 0;
  bool inside = false;
  for (std::string line; std::getline(maps, line);) {
    if (line.find('-') < line.find(' ')) inside = line.ends_with(path);
    if (inside && line.starts_with("Rss:")) bytes += 1024 * std::stoll(line.substr(4));
  }
  return bytes;
}

TEST_F(Stored, TheFileLeavesMemory) {
  write([](const std::string&) { return GgmlType::q8_0; });
  const auto later = std::make_shared<BackgroundLayout>();
  const auto model = load(*later);
  computed(*model, backend());
  const int64_t before = resident_of(path());
  later->start();
  later->wait();
  EXPECT_LT(resident_of(path()), before / 2);
}

TEST_F(Stored, OtherTypesAreWhatTheySay) {
  write([](const std::string&) { return GgmlType::q4_0; });
  for (const char* type : {"int8", "int4", "bf16", "f32"}) EXPECT_EQ(type_text(*load(type)), type);
  EXPECT_EQ(type_text(*load()), "int4, int8");  // of kv_b_proj
  write([](const std::string&) { return GgmlType::f32; });
  EXPECT_EQ(type_text(*load()), "f32");
}

}  // namespace
}  // namespace latente
