// How ops are tested: a small graph is recorded through a Plan, from parameters to outputs, and
// - its outputs are compared with plain loops over the same numbers (each test brings its own),
// - its gradients with central finite differences in float64,
// - float32 with float64, shared memory with a buffer a value, one thread with three.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/random.h"
#include "cpu/cpu_backend.h"
#include "ops/ops.h"

namespace latente::test {

using Numbers = std::vector<double>;

inline CpuBackend& backend(int threads = 1) {
  static CpuBackend one(1), three(3);
  return threads == 1 ? one : three;
}

inline Numbers normal(int64_t count, uint64_t seed, double scale = 1.0) {
  Random random(seed);
  Numbers numbers(static_cast<size_t>(count));
  for (double& x : numbers) x = scale * random.normal();
  return numbers;
}

inline Numbers read(const View& view) {
  LATENTE_ASSERT(view.contiguous());
  Numbers numbers(static_cast<size_t>(view.count()));
  for (size_t i = 0; i < numbers.size(); ++i) {
    switch (view.dtype) {
      case DType::f64:
        numbers[i] = view.as<double>()[i];
        break;
      case DType::f32:
        numbers[i] = static_cast<double>(view.as<float>()[i]);
        break;
      default:
        numbers[i] = view.as<int32_t>()[i];
    }
  }
  return numbers;
}

inline void write(const View& view, const Numbers& numbers) {
  LATENTE_ASSERT(view.contiguous() && view.count() == static_cast<int64_t>(numbers.size()));
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (view.dtype == DType::f64) {
      view.as<double>()[i] = numbers[i];
    } else {
      view.as<float>()[i] = static_cast<float>(numbers[i]);
    }
  }
}

// Index input of a plan, filled at once.
inline Tensor indices(Plan& plan, Shape shape, const std::vector<int32_t>& values) {
  Tensor tensor = plan.input("indices", shape, DType::i32);
  allocate(tensor);
  std::copy(values.begin(), values.end(), tensor.view().as<int32_t>());
  return tensor;
}

// Input of activations without gradient.
inline Tensor constant(Plan& plan, Shape shape, DType dtype, const Numbers& values) {
  Tensor tensor = plan.input("constant", shape, dtype);
  allocate(tensor);
  write(tensor.view(), values);
  return tensor;
}

// A parameter as a value of the plan: what ops take as activations.
inline Tensor leaf(Plan& plan, const Tensor& parameter) {
  Tensor out = plan.intermediate(parameter.shape(), parameter.dtype());
  plan.record(
      "leaf", {parameter}, {out},
      [=](Backend& b) {
        b.copy(parameter.view(), {out.view(), false});
      },
      [=](Gradients& g) { g.share(parameter, g.of(out)); });
  return out;
}

// The scalar sum_i c_i x_i with random c: makes any value part of a loss.
inline Tensor probe(Plan& plan, const Tensor& x, uint64_t seed) {
  Tensor factors = constant(plan, x.shape(), x.dtype(), normal(x.count(), seed));
  Tensor loss = plan.intermediate({1}, x.dtype());
  plan.record(
      "probe", {x, factors}, {loss},
      [=](Backend&) {
        View view = x.view();
        Numbers c = read(factors.view());
        double sum = 0;
        for (int64_t i = 0; i < x.count(); ++i) {
          int64_t at = 0, rest = i;
          for (int axis = view.shape.rank() - 1; axis >= 0; rest /= view.shape[axis--]) {
            at += rest % view.shape[axis] * view.stride(axis);
          }
          sum +=
              c[static_cast<size_t>(i)] *
              (view.dtype == DType::f64 ? view.as<double>()[at] : static_cast<double>(view.as<float>()[at]));
        }
        write(loss.view(), {sum});
      },
      [=](Gradients& g) {
        auto d_x = g.slot(x);
        g.plan().record("probe_backward", {factors}, {d_x.tensor},
                        [=](Backend& b) { b.copy(factors.view(), d_x.view()); });
      });
  return loss;
}

struct Input {
  Shape shape;
  Numbers values;
};
inline Input random_input(Shape shape, uint64_t seed, double scale = 1.0) {
  return {shape, normal(shape.count(), seed, scale)};
}

struct Graph {
  std::vector<Tensor> outputs;  // each probed, and read by the oracle
  std::vector<Tensor> losses;   // further terms of the loss
};
// From the parameters made of the inputs.
using Build = std::function<Graph(Plan&, const std::vector<Tensor>&)>;

struct Setting {
  DType dtype = DType::f64;
  bool reuse_memory = true;
  int threads = 1;
};

class Program {
 public:
  Program(const std::vector<Input>& inputs, const Build& build, Setting setting)
      : plan_(backend(setting.threads), {.training = true, .reuse_memory = setting.reuse_memory}) {
    for (const Input& input : inputs) {
      Tensor tensor = parameter(input.shape, setting.dtype);
      tensor.value().name = "input " + std::to_string(parameters_.size());
      allocate(tensor);
      write(tensor.view(), input.values);
      parameters_.push_back(tensor);
    }
    Graph graph = build(plan_, parameters_);
    std::vector<Tensor> losses = graph.losses;
    for (size_t i = 0; i < graph.outputs.size(); ++i)
      losses.push_back(probe(plan_, graph.outputs[i], 1000 + i));
    for (const Tensor& output : graph.outputs) plan_.keep(output);
    losses_ = losses;
    outputs_ = graph.outputs;
    plan_.backward(losses);
    for (const Tensor& tensor : parameters_) {
      if (tensor.value().grad) allocate(Tensor(tensor.value().grad));
    }
    plan_.compile();
    plan_.allocate();
  }

  double loss() {
    plan_.run();
    double sum = 0;
    for (const Tensor& loss : losses_) sum += read(loss.view())[0];
    return sum;
  }
  const Plan& plan() const { return plan_; }
  const std::vector<Tensor>& parameters() const { return parameters_; }
  Numbers output(size_t i) const {
    View view = outputs_[i].view();
    return view.contiguous() ? read(view) : Numbers{};
  }
  size_t output_count() const { return outputs_.size(); }
  Numbers gradient(size_t i) const {
    const auto& grad = parameters_[i].value().grad;
    return grad ? read(Tensor(grad).view()) : Numbers(static_cast<size_t>(parameters_[i].count()), 0.0);
  }

 private:
  std::vector<Tensor> parameters_, losses_, outputs_;
  Plan plan_;
};

inline double magnitude(const Numbers& numbers) {
  double largest = 0;
  for (double x : numbers) largest = std::max(largest, std::abs(x));
  return largest;
}

// Elements differ by at most `tolerance` of the largest.
inline void expect_close(const Numbers& got, const Numbers& want, double tolerance, const std::string& what) {
  ASSERT_EQ(got.size(), want.size()) << what;
  double scale = std::max(magnitude(want), 1e-3);
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_LE(std::abs(got[i] - want[i]), tolerance * scale)
        << what << ", element " << i << ": " << got[i] << " for " << want[i];
  }
}

// Everything above; returns the outputs in float64 for the test's own oracle.
inline std::vector<Numbers> check(const std::vector<Input>& inputs, const Build& build,
                                  double tolerance = 1e-7, double narrow_tolerance = 2e-5) {
  Program program(inputs, build, {});
  double loss = program.loss();
  std::vector<Numbers> outputs, gradients;
  for (size_t i = 0; i < program.output_count(); ++i) outputs.push_back(program.output(i));
  for (size_t i = 0; i < inputs.size(); ++i) gradients.push_back(program.gradient(i));

  for (Setting setting : {Setting{DType::f64, false, 1}, Setting{DType::f64, true, 3}}) {
    Program other(inputs, build, setting);
    EXPECT_EQ(other.loss(), loss) << (setting.threads == 1 ? "a buffer a value" : "three threads");
    for (size_t i = 0; i < inputs.size(); ++i) EXPECT_EQ(other.gradient(i), gradients[i]) << "input " << i;
    if (setting.threads == 1) {
      EXPECT_LE(program.plan().arena_bytes(), other.plan().arena_bytes());
      EXPECT_EQ(other.plan().arena_bytes(), other.plan().unplanned_bytes());
    }
  }
  // A second run finds the first one's gradients and adds the same again.
  Program twice(inputs, build, {});
  twice.loss();
  EXPECT_EQ(twice.loss(), loss) << "the second run";
  for (size_t i = 0; i < inputs.size(); ++i) {
    Numbers doubled = gradients[i];
    for (double& x : doubled) x *= 2;
    expect_close(twice.gradient(i), doubled, 1e-13, "accumulated gradient of input " + std::to_string(i));
  }

  for (size_t i = 0; i < inputs.size(); ++i) {
    Numbers values = inputs[i].values, differences(values.size());
    const double step = 1e-5;
    for (size_t j = 0; j < values.size(); ++j) {
      const double at = values[j];
      values[j] = at + step;
      write(program.parameters()[i].view(), values);
      const double above = program.loss();
      values[j] = at - step;
      write(program.parameters()[i].view(), values);
      const double below = program.loss();
      values[j] = at;
      differences[j] = (above - below) / (2 * step);
    }
    write(program.parameters()[i].view(), values);
    expect_close(gradients[i], differences, tolerance, "gradient of input " + std::to_string(i));
  }

  Program narrow(inputs, build, {DType::f32, true, 1});
  narrow.loss();
  for (size_t i = 0; i < outputs.size(); ++i)
    expect_close(narrow.output(i), outputs[i], narrow_tolerance, "float32 output " + std::to_string(i));
  for (size_t i = 0; i < inputs.size(); ++i) {
    expect_close(narrow.gradient(i), gradients[i], narrow_tolerance,
                 "float32 gradient of input " + std::to_string(i));
  }
  return outputs;
}

// out[t, n] = sum_k x[t, k] w[n, k]
inline Numbers product(const Numbers& x, const Numbers& w, int64_t rows, int64_t n, int64_t k) {
  Numbers out(static_cast<size_t>(rows * n), 0.0);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t i = 0; i < k; ++i)
        out[static_cast<size_t>(t * n + j)] +=
            x[static_cast<size_t>(t * k + i)] * w[static_cast<size_t>(j * k + i)];
    }
  }
  return out;
}

}  // namespace latente::test
