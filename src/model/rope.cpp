#include <algorithm>
#include <cmath>
#include <numbers>

#include "model/layers.h"
#include "tensor/device.h"

namespace latente {
namespace {

// YaRN (Peng et al. 2023): frequencies that turn fewer than beta_slow times over the original context are
// divided by the factor, those that turn more than beta_fast times are kept, with a linear ramp over
// dimensions between.
void yarn_frequencies(const RopeConfig& rope, int64_t dim, std::vector<double>& frequencies) {
  double log_base = std::log(rope.theta);
  auto dimension_of = [&](double rotations) {
    double context = static_cast<double>(rope.original_max_position_embeddings);
    return static_cast<double>(dim) * std::log(context / (rotations * 2 * std::numbers::pi)) / (2 * log_base);
  };
  double low = std::max(std::floor(dimension_of(rope.beta_fast)), 0.0);
  double high = std::min(std::ceil(dimension_of(rope.beta_slow)), static_cast<double>(dim - 1));
  if (low == high) high += 0.001;
  for (size_t i = 0; i < frequencies.size(); ++i) {
    double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    frequencies[i] = frequencies[i] / rope.factor * ramp + frequencies[i] * (1 - ramp);
  }
}

// Llama 3: wavelengths beyond the original context are stretched by the factor, short ones kept, smoothly
// between.
void llama3_frequencies(const RopeConfig& rope, std::vector<double>& frequencies) {
  double context = static_cast<double>(rope.original_max_position_embeddings);
  for (double& frequency : frequencies) {
    double wavelength = 2 * std::numbers::pi / frequency;
    if (wavelength > context / rope.low_freq_factor) {
      frequency /= rope.factor;
    } else if (wavelength >= context / rope.high_freq_factor) {
      double smooth =
          (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
      frequency = (1 - smooth) * frequency / rope.factor + smooth * frequency;
    }
  }
}

// YaRN's attention temperature as deployed: the cosines carry the ratio of the two mscales (1 for the
// released models), the softmax scale carries mscale_all_dim (Config::softmax_scale).
double attention_factor(const RopeConfig& rope) {
  if (rope.type != "yarn") return 1.0;
  if (rope.attention_factor != 0) return rope.attention_factor;
  auto mscale = [&](double factor) {
    return rope.factor <= 1 ? 1.0 : 0.1 * factor * std::log(rope.factor) + 1.0;
  };
  if (rope.mscale != 0 && rope.mscale_all_dim != 0) return mscale(rope.mscale) / mscale(rope.mscale_all_dim);
  return mscale(1.0);
}

}  // namespace

Tensor make_rope_table(Backend& backend, const Config& config, int64_t positions) {
  const RopeConfig& rope = config.rope;
  int64_t dim = config.rope_dim(), half = dim / 2;
  std::vector<double> frequencies(static_cast<size_t>(half));
  for (int64_t i = 0; i < half; ++i) {
    frequencies[static_cast<size_t>(i)] =
        std::pow(rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
  }
  if (rope.type == "linear") {
    for (double& frequency : frequencies) frequency /= rope.factor;
  } else if (rope.type == "yarn") {
    yarn_frequencies(rope, dim, frequencies);
  } else if (rope.type == "llama3") {
    llama3_frequencies(rope, frequencies);
  }
  double factor = attention_factor(rope);
  Tensor table = buffer(backend, {positions, dim}, DType::f32, "rope table");
  HostWriter writer(backend, table.view());
  float* row = writer.view().as<float>();
  for (int64_t position = 0; position < positions; ++position, row += dim) {
    for (int64_t i = 0; i < half; ++i) {
      double angle = static_cast<double>(position) * frequencies[static_cast<size_t>(i)];
      row[i] = static_cast<float>(std::cos(angle) * factor);
      row[half + i] = static_cast<float>(std::sin(angle) * factor);
    }
  }
  writer.finish();
  return table;
}

}  // namespace latente
