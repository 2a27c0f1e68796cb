#include "device.h"

#include <fmt/format.h>

#include <chrono>
#include <functional>

#include "base/memory.h"
#include "cpu/peak.h"
#include "tensor/device.h"
#ifdef LATENTE_CUDA
#include "cuda/backend.h"
#endif

namespace latente {
namespace {

#ifdef LATENTE_CUDA
int gpu_count() { return cuda::device_count(); }
std::unique_ptr<Backend> open_gpu(int index) { return std::make_unique<cuda::CudaBackend>(index); }
#else
int gpu_count() { return 0; }
std::unique_ptr<Backend> open_gpu(int) {
  fail("--device: this build has no CUDA (configure with -DLATENTE_CUDA=ON, which needs nvcc)");
}
#endif

// "cuda" or "cuda:N".
int gpu_index(const std::string& name) {
  if (name == "cuda") return 0;
  const std::string digits = name.starts_with("cuda:") ? name.substr(5) : "";
  if (digits.empty() || digits.size() > 3 || digits.find_first_not_of("0123456789") != digits.npos)
    fail("--device: expected cpu, cuda, cuda:N or auto, found {}", name);
  return std::stoi(digits);
}

// The shortest of a few times, in seconds.
double time(Backend& backend, const std::function<void()>& work) {
  using Clock = std::chrono::steady_clock;
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    backend.synchronize();
    const Clock::time_point start = Clock::now();
    work();
    backend.synchronize();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (i == 1 || seconds < best) best = seconds;  // the first sets things up
  }
  return best;
}

}  // namespace

Device::Device(const std::string& name, ThreadOptions threads) {
  if (name == "cpu" || (name == "auto" && gpu_count() == 0)) {
    auto cpu = std::make_unique<CpuBackend>(threads);
    cpu_ = cpu.get();
    backend_ = std::move(cpu);
  } else {
    backend_ = open_gpu(name == "auto" ? 0 : gpu_index(name));
    free_at_first_ = backend_->available_memory();
  }
}

std::string Device::describe() const {
  return cpu_ ? fmt::format("{} threads", cpu_->threads().size()) : backend_->name();
}

int64_t Device::used_memory() const {
  return cpu_ ? resident_memory() : free_at_first_ - backend_->available_memory();
}

double Device::measure_bandwidth() {
  if (cpu_) return measure_read_bandwidth(cpu_->threads());
  const Shape shape{int64_t{1} << 28};
  const Tensor from = buffer(*backend_, shape, DType::f32), to = buffer(*backend_, shape, DType::f32);
  const double seconds = time(*backend_, [&] { backend_->copy(from.view(), {to.view(), false}); });
  return 2 * static_cast<double>(from.view().bytes()) / seconds;
}

double Device::measure_peak(DType weights) {
  if (cpu_)
    return is_quantised(weights) ? measure_peak_of_bytes(cpu_->threads())
                                 : measure_peak_flops(cpu_->threads());
  constexpr int64_t size = 8192;
  const Shape shape{size, size};
  const Tensor x = buffer(*backend_, shape, weights), w = buffer(*backend_, shape, weights);
  const Tensor out = buffer(*backend_, shape, weights);
  // Not of zeros, whose products take less power: a half in every place.
  backend_->fill(x.view(), 0.5), backend_->fill(w.view(), -0.5);
  const double seconds = time(*backend_, [&] {
    backend_->linear(x.view(), w.view(), {}, {out.view(), false});
  });
  return 2 * static_cast<double>(size) * static_cast<double>(size) * static_cast<double>(size) / seconds;
}

void add_device_option(CLI::App& command, std::string& device) {
  command
      .add_option("--device", device, "cpu, cuda, cuda:N (the N-th GPU) or auto: a GPU where there is one")
      ->capture_default_str();
}

std::string version_text() {
  std::string text = "latente " LATENTE_VERSION;
#ifdef LATENTE_CUDA
  text += fmt::format("\ndevices: cpu, cuda ({} here)", gpu_count());
#else
  text += "\ndevices: cpu";
#endif
  return text;
}

}  // namespace latente
