// How ops are tested: a small graph is recorded through a Plan, from parameters to outputs, and
// - its outputs are compared with plain loops over the same numbers (each test brings its own),
// - its gradients with central finite differences in float64,
// - float32 with float64, shared memory with a buffer a value, one thread with three.
// Built with LATENTE_TEST_CUDA, the same tests compare the CUDA backend's float32 and bfloat16 with the CPU's
// float64; tests without check() run on the device alone.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/random.h"
#include "cpu/cpu_backend.h"
#ifdef LATENTE_TEST_CUDA
#include "cuda/backend.h"
#endif
#include "ops/ops.h"
#include "tensor/device.h"

namespace latente::test {

using Numbers = std::vector<double>;

inline CpuBackend& cpu(int threads = 1) {
  static CpuBackend one(1), three(3);
  return threads == 1 ? one : three;
}

#ifdef LATENTE_TEST_CUDA
constexpr bool on_cuda = true;
inline Backend& backend(int /*threads*/ = 1) {
  static cuda::CudaBackend device;
  return device;
}
inline std::vector<DType> dtypes() { return {DType::f32, DType::bf16}; }
#else
constexpr bool on_cuda = false;
inline CpuBackend& backend(int threads = 1) { return cpu(threads); }
inline std::vector<DType> dtypes() { return {DType::f64, DType::f32}; }
#endif

inline double tolerance_of(DType dtype, double f64, double f32, double bf16 = 2e-2) {
  return dtype == DType::f64 ? f64 : dtype == DType::f32 ? f32 : bf16;
}

// Where bfloat16 is compared, all types see the same numbers.
inline double as_tested(double x) {
  return on_cuda ? static_cast<double>(static_cast<float>(bf16(static_cast<float>(x)))) : x;
}

inline Numbers normal(int64_t count, uint64_t seed, double scale = 1.0) {
  Random random(seed);
  Numbers numbers(static_cast<size_t>(count));
  for (double& x : numbers) x = as_tested(scale * random.normal());
  return numbers;
}

inline Numbers read(const View& view, Backend& from = backend()) {
  const HostCopy copy = on_host(from, view);
  Numbers numbers(static_cast<size_t>(view.count()));
  if (view.dtype == DType::i32) return {copy.view.as<int32_t>(), copy.view.as<int32_t>() + view.count()};
  convert(view.dtype, copy.view.data, DType::f64, numbers.data(), view.count());
  return numbers;
}

inline void write(const View& view, const Numbers& numbers, Backend& to = backend()) {
  LATENTE_ASSERT(view.contiguous() && view.count() == static_cast<int64_t>(numbers.size()));
  HostWriter writer(to, view);
  convert(DType::f64, numbers.data(), view.dtype, writer.view().data, view.count());
  writer.finish();
}

// A tensor of a test, where the plan's device can read it.
inline Tensor on_device(const Plan& plan, const Tensor& host) {
  if (plan.backend().is_host()) return host;
  Tensor copy = buffer(plan.backend(), host.shape(), host.dtype());
  plan.backend().upload(host.view().data, copy.view());
  return copy;
}

// Index input of a plan, filled at once.
inline Tensor indices(Plan& plan, Shape shape, const std::vector<int32_t>& values) {
  Tensor tensor = plan.input("indices", shape, DType::i32);
  allocate(plan.backend(), tensor);
  plan.backend().upload(values.data(), tensor.view());
  return tensor;
}

// Input of activations without gradient.
inline Tensor constant(Plan& plan, Shape shape, DType dtype, const Numbers& values) {
  Tensor tensor = plan.input("constant", shape, dtype);
  allocate(plan.backend(), tensor);
  write(tensor.view(), values, plan.backend());
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

// The scalar sum_i c_i x_i with random c: makes any value part of a loss. A host's sum: elsewhere only its
// gradient is.
inline Tensor probe(Plan& plan, const Tensor& x, uint64_t seed) {
  Tensor factors = constant(plan, x.shape(), x.dtype(), normal(x.count(), seed));
  Tensor loss = plan.intermediate({1}, exact_type(x.dtype()));
  plan.record(
      "probe", {x, factors}, {loss},
      [=](Backend& b) {
        if (!b.is_host()) return;
        View view = x.view();
        Numbers c = read(factors.view(), b);
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
        write(loss.view(), {sum}, b);
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
  bool exact = false;  // of the exact type, whatever type is tested: what routers and biases are made of
};
inline Input random_input(Shape shape, uint64_t seed, double scale = 1.0) {
  return {shape, normal(shape.count(), seed, scale)};
}
inline Input exact_input(Shape shape, uint64_t seed) { return {shape, normal(shape.count(), seed), true}; }

struct Graph {
  std::vector<Tensor> outputs;  // each probed, and read by the oracle
  std::vector<Tensor> losses;   // further terms of the loss
};
// From the parameters made of the inputs.
using Build = std::function<Graph(Plan&, const std::vector<Tensor>&)>;

struct Setting {
  DType dtype = DType::f64;
  bool reuse_memory = true;
  Backend* where = &cpu();
  int64_t memory = 0;  // PlanOptions::memory
  bool fresh = false;  // PlanOptions::fresh_gradients
  bool beside = false;
};

class Program {
 public:
  Program(const std::vector<Input>& inputs, const Build& build, Setting setting)
      : plan_(*setting.where, {.training = true,
                               .fresh_gradients = setting.fresh,
                               .beside = setting.beside,
                               .memory = setting.memory,
                               .reuse_memory = setting.reuse_memory}) {
    for (const Input& input : inputs) {
      Tensor tensor = parameter(input.shape, input.exact ? exact_type(setting.dtype) : setting.dtype);
      tensor.value().name = "input " + std::to_string(parameters_.size());
      allocate(where(), tensor);
      write(tensor.view(), input.values, where());
      parameters_.push_back(tensor);
    }
    Graph graph = build(plan_, parameters_);
    losses_ = graph.losses;
    for (size_t i = 0; i < graph.outputs.size(); ++i)
      losses_.push_back(probe(plan_, graph.outputs[i], 1000 + i));
    for (const Tensor& output : graph.outputs) plan_.keep(output);
    outputs_ = graph.outputs;
    further_losses_ = graph.losses;
    plan_.backward(losses_);
    for (const Tensor& tensor : parameters_) {
      if (tensor.value().grad) allocate(where(), Tensor(tensor.value().grad));
    }
    plan_.compile();
    plan_.allocate();
  }

  double loss() {
    plan_.run();
    double sum = 0;
    for (const Tensor& loss : losses_) sum += read(loss.view(), where())[0];
    return sum;
  }
  const Plan& plan() const { return plan_; }
  const std::vector<Tensor>& parameters() const { return parameters_; }
  Numbers output(size_t i) const {
    View view = outputs_[i].view();
    return view.contiguous() ? read(view, where()) : Numbers{};
  }
  size_t output_count() const { return outputs_.size(); }
  Numbers gradient(size_t i) const {
    const auto& grad = parameters_[i].value().grad;
    return grad ? read(Tensor(grad).view(), where())
                : Numbers(static_cast<size_t>(parameters_[i].count()), 0.0);
  }
  // Outputs, losses other than probes, and gradients.
  std::vector<Numbers> results() const {
    std::vector<Numbers> all;
    for (size_t i = 0; i < outputs_.size(); ++i) all.push_back(output(i));
    for (const Tensor& loss : further_losses_) all.push_back(read(loss.view(), where()));
    for (size_t i = 0; i < parameters_.size(); ++i) all.push_back(gradient(i));
    return all;
  }
  void fill_gradients(double value) {
    for (const Tensor& tensor : parameters_) {
      if (tensor.value().grad) where().fill(Tensor(tensor.value().grad).view(), value);
    }
  }

 private:
  Backend& where() const { return plan_.backend(); }

  std::vector<Tensor> parameters_, losses_, further_losses_, outputs_;
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
inline std::vector<Numbers> check_cpu(const std::vector<Input>& inputs, const Build& build, double tolerance,
                                      double narrow_tolerance) {
  Program program(inputs, build, {});
  double loss = program.loss();
  std::vector<Numbers> outputs, gradients;
  for (size_t i = 0; i < program.output_count(); ++i) outputs.push_back(program.output(i));
  for (size_t i = 0; i < inputs.size(); ++i) gradients.push_back(program.gradient(i));

  for (Setting setting : {Setting{DType::f64, false}, Setting{DType::f64, true, &cpu(3)},
                          Setting{DType::f64, true, &cpu(), 1}}) {
    Program other(inputs, build, setting);
    EXPECT_EQ(other.loss(), loss) << (setting.memory         ? "made again"
                                      : setting.reuse_memory ? "three threads"
                                                             : "a buffer a value");
    for (size_t i = 0; i < inputs.size(); ++i) EXPECT_EQ(other.gradient(i), gradients[i]) << "input " << i;
    if (!setting.reuse_memory) {
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
  Program fresh(inputs, build, {.fresh = true});
  fresh.fill_gradients(std::nan(""));
  EXPECT_EQ(fresh.loss(), loss) << "gradients written";
  for (size_t i = 0; i < inputs.size(); ++i) EXPECT_EQ(fresh.gradient(i), gradients[i]) << "input " << i;

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

  Program narrow(inputs, build, {DType::f32});
  narrow.loss();
  for (size_t i = 0; i < outputs.size(); ++i)
    expect_close(narrow.output(i), outputs[i], narrow_tolerance, "float32 output " + std::to_string(i));
  for (size_t i = 0; i < inputs.size(); ++i) {
    expect_close(narrow.gradient(i), gradients[i], narrow_tolerance,
                 "float32 gradient of input " + std::to_string(i));
  }
  return outputs;
}

// The CPU's float64 against the device's types, run by run: kernel by kernel, recorded, and in a plan of its
// own.
inline std::vector<Numbers> check_cuda(const std::vector<Input>& inputs, const Build& build,
                                       double narrow_tolerance, double bf16_tolerance) {
  Program reference(inputs, build, {});
  reference.loss();
  const std::vector<Numbers> want = reference.results();
  for (DType dtype : dtypes()) {
    const double tolerance = dtype == DType::f32 ? narrow_tolerance : bf16_tolerance;
    if (tolerance == 0) continue;
    Program program(inputs, build, {dtype, true, &backend()});
    program.loss();
    const std::vector<Numbers> got = program.results();
    for (size_t i = 0; i < want.size(); ++i) {
      expect_close(got[i], want[i], tolerance,
                   std::string(name_of(dtype)) + " result " + std::to_string(i) + " of " +
                       std::to_string(want.size() - inputs.size()) + " outputs, then gradients");
    }
    program.fill_gradients(0);
    program.loss();
    EXPECT_EQ(program.results(), got) << name_of(dtype) << ", recorded";
    Program apart(inputs, build, {dtype, false, &backend()});
    apart.loss();
    EXPECT_EQ(apart.results(), got) << name_of(dtype) << ", a buffer a value";
    Program tight(inputs, build, {dtype, true, &backend(), 1});
    tight.loss();
    EXPECT_EQ(tight.results(), got) << name_of(dtype) << ", made again";
    Program fresh(inputs, build, {.dtype = dtype, .where = &backend(), .fresh = true});
    fresh.fill_gradients(std::nan(""));
    fresh.loss();
    EXPECT_EQ(fresh.results(), got) << name_of(dtype) << ", gradients written";
    Program beside(inputs, build, {.dtype = dtype, .where = &backend(), .fresh = true, .beside = true});
    for (const char* how : {"kernel by kernel", "recorded", "again"}) {
      beside.fill_gradients(std::nan(""));
      beside.loss();
      EXPECT_EQ(beside.results(), got) << name_of(dtype) << ", weights' gradients beside, " << how;
    }
  }
  std::vector<Numbers> outputs;
  for (size_t i = 0; i < reference.output_count(); ++i) outputs.push_back(reference.output(i));
  return outputs;
}

// bf16_tolerance 0: not compared.
inline std::vector<Numbers> check(const std::vector<Input>& inputs, const Build& build,
                                  double tolerance = 1e-7, double narrow_tolerance = 2e-5,
                                  double bf16_tolerance = 2e-2) {
  return on_cuda ? check_cuda(inputs, build, narrow_tolerance, bf16_tolerance)
                 : check_cpu(inputs, build, tolerance, narrow_tolerance);
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
