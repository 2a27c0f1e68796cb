// What the tests of inference share: models whose modules often agree with them, and plain decoding to
// compare with.
#pragma once

#include <algorithm>
#include <numeric>

#include "cpu/cpu_backend.h"
#include "infer/engine.h"
#include "infer/sequence_runner.h"
#include "model/support.h"

namespace latente::test {

inline CpuBackend& backend() {
  static CpuBackend one(1);
  return one;
}

// Random weights. With `quiet` below 1 the blocks say less beside the embedding, and the modules read that of
// the later token: model and modules then follow nearly the same chain, so that drafts are accepted now and
// then.
inline Transformer made(const Tiny& tiny, uint64_t seed, double quiet = 1.0, DType type = DType::f32) {
  Transformer model(tiny_config(tiny), type);
  randomise(model, seed);
  if (quiet >= 1) return model;
  std::string modules = "model.layers." + std::to_string(tiny.layers);
  model.for_each([&](const std::string& path, Tensor& tensor) {
    View view = tensor.view();
    auto change = [&](auto&& value_of) {
      for (int64_t i = 0; i < view.count(); ++i) {
        char* at = static_cast<char*>(view.data) + i * size_of(view.dtype);
        double value = 0;
        convert(view.dtype, at, DType::f64, &value, 1);
        value = value_of(i, value);
        convert(DType::f64, &value, view.dtype, at, 1);
      }
    };
    if (path.find("o_proj") != path.npos || path.find("down_proj") != path.npos)
      change([&](int64_t, double x) { return quiet * x; });
    if (path.ends_with("eh_proj.weight")) {
      int64_t width = view[1];
      change([&](int64_t i, double x) { return i / width == i % width ? 1.0 : 0.1 * quiet * x; });
    }
    if (path.ends_with("shared_head.norm.weight") || path == "model.norm.weight" ||
        path.ends_with("enorm.weight"))
      change([](int64_t, double) { return 1.0; });
  });
  return model;
}

inline std::vector<int32_t> random_tokens(Random& random, int64_t count, int64_t vocabulary) {
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = static_cast<int32_t>(random.below(static_cast<uint64_t>(vocabulary)));
  return tokens;
}

inline std::vector<float> copy_of(std::span<const float> row) { return {row.begin(), row.end()}; }

// The logits of every position, all tokens at once without a cache: keys and values expanded. level -1: the
// main model; k >= 0: module k, for the positions that have a token k + 1 places later. From position
// `modules_from` on, modules attend to nothing before it.
inline std::vector<std::vector<double>> uncached(const Transformer& model, std::span<const int32_t> ids,
                                                 int64_t level = -1, int64_t modules_from = 0) {
  int64_t count = static_cast<int64_t>(ids.size()) - std::max<int64_t>(level + 1, 0);
  Plan plan(backend());
  Step at;
  at.positions = plan.input("positions", {count}, DType::i32);
  at.starts = plan.input("starts", {count}, DType::i32);
  at.rope_table = make_rope_table(backend(), model.config(), count);
  std::vector<Tensor> tokens{plan.input("ids", {count}, DType::i32)};
  Tensor state = model.hidden(tokens[0], at);
  const Tensor starts = at.starts;
  at.starts = plan.input("starts of modules", {count}, DType::i32);
  for (int64_t k = 0; k <= level; ++k) {
    tokens.push_back(plan.input("later ids", {count}, DType::i32));
    state = model.predict(k, state, tokens.back(), at);
  }
  Tensor logits = model.logits(state);
  plan.keep(logits);
  plan.compile();
  plan.allocate();
  for (size_t k = 0; k < tokens.size(); ++k)
    std::copy_n(ids.begin() + static_cast<ptrdiff_t>(k), count, tokens[k].view().as<int32_t>());
  std::iota(at.positions.view().as<int32_t>(), at.positions.view().as<int32_t>() + count, 0);
  std::fill_n(starts.view().as<int32_t>(), count, 0);
  for (int64_t t = 0; t < count; ++t)
    at.starts.view().as<int32_t>()[t] = t < modules_from ? 0 : static_cast<int32_t>(modules_from);
  plan.run();
  std::vector<std::vector<double>> rows;
  View view = logits.view();
  for (int64_t t = 0; t < count; ++t) {
    std::vector<double> row(static_cast<size_t>(view[1]));
    const char* from = static_cast<const char*>(view.data) + t * view[1] * size_of(view.dtype);
    convert(view.dtype, from, DType::f64, row.data(), view[1]);
    rows.push_back(std::move(row));
  }
  return rows;
}

inline double distance(std::span<const float> ours, const std::vector<double>& theirs) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < theirs.size(); ++i) {
    double d = static_cast<double>(ours[i]) - theirs[i];
    difference += d * d, norm += theirs[i] * theirs[i];
  }
  return std::sqrt(difference / norm);
}

struct Text {
  std::vector<int32_t> tokens;
  Finish finish = Finish::length;
  bool operator==(const Text&) const = default;
};

// One token a pass and nothing else: no drafts, no reuse.
inline Text plain(const Transformer& model, const RunnerOptions& how, std::span<const int32_t> prompt,
                  const GenerationOptions& options) {
  SequenceRunner runner(backend(), model, how);
  std::vector<int32_t> sequence(prompt.begin(), prompt.end());
  std::vector<float> logits;
  int64_t count = static_cast<int64_t>(prompt.size());
  for (int64_t first = 0; first < count; first += how.chunk) {
    int64_t piece = std::min(how.chunk, count - first);
    logits = copy_of(
        runner.forward(prompt.subspan(static_cast<size_t>(first), static_cast<size_t>(piece)), first, 1));
  }
  Text text;
  for (;;) {
    int32_t next = distribution_of(logits, {sequence, prompt.size()}, options.sampling).front().id;
    if (std::count(options.stop_tokens.begin(), options.stop_tokens.end(), next) > 0) {
      text.finish = Finish::stop_token;
      return text;
    }
    text.tokens.push_back(next);
    sequence.push_back(next);
    if (static_cast<int64_t>(text.tokens.size()) == options.max_tokens) return text;
    if (static_cast<int64_t>(sequence.size()) == how.context) {
      text.finish = Finish::context_full;
      return text;
    }
    logits =
        copy_of(runner.forward(std::span(&sequence.back(), 1), static_cast<int64_t>(sequence.size()) - 1, 1));
  }
}

inline Text generated(Engine& engine, std::span<const int32_t> prompt, const GenerationOptions& options,
                      GenerationStats* stats = nullptr) {
  Text text;
  GenerationStats result = engine.generate(prompt, options, [&](GeneratedToken token) {
    text.tokens.push_back(token.id);
    return true;
  });
  text.finish = result.finish;
  if (stats) *stats = result;
  return text;
}

}  // namespace latente::test
