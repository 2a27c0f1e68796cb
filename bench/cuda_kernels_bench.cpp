// Kernels of the CUDA backend that memory bounds: microseconds, and the bytes that have to be read and
// written as a share of what a copy moves. Shapes as in training: --tokens, --hidden, --experts, --top-k,
// --inner.
#include <fmt/format.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <vector>

#include "base/random.h"
#include "cuda/backend.h"
#include "tensor/device.h"

namespace latente {
namespace {

struct Sizes {
  int64_t tokens = 16384, hidden = 2048, experts = 64, top_k = 6, inner = 1024, heads = 16,
          vocabulary = 32768;
};

class Bench {
 public:
  explicit Bench(const Sizes& sizes) : at_(sizes) {}

  void run() {
    fmt::print("{}: T {}, hidden {}, {} of {} experts of {}, {} heads, V {}\n", device_.name(), at_.tokens,
               at_.hidden, at_.top_k, at_.experts, at_.inner, at_.heads, at_.vocabulary);
    fmt::print("{:<34} {:>10} {:>10} {:>8}\n", "", "us", "GB/s", "of copy");
    copies();
    norms();
    elementwise();
    tokens();
    experts();
    optimizer();
  }

 private:
  static constexpr DType narrow = DType::bf16, exact = DType::f32;

  View make(Shape shape, DType type) {
    Tensor tensor = buffer(device_, shape, type);
    kept_.push_back(tensor);
    if (is_floating(type)) {
      std::vector<float> values(static_cast<size_t>(shape.count()));
      Random random(kept_.size());
      // One row in every place: drawing them all would take longer than everything else.
      const size_t period = std::min<size_t>(values.size(), 65537);
      for (size_t i = 0; i < period; ++i) values[i] = static_cast<float>(0.5 * random.normal());
      for (size_t i = period; i < values.size(); ++i) values[i] = values[i - period];
      HostWriter writer(device_, tensor.view());
      convert(DType::f32, values.data(), type, writer.view().data, shape.count());
      writer.finish();
    }
    return tensor.view();
  }
  View indices(Shape shape, int64_t below) {
    View view = make(shape, DType::i32);
    std::vector<int32_t> values(static_cast<size_t>(shape.count()));
    Random random(7);
    for (int32_t& value : values) value = static_cast<int32_t>(random.below(static_cast<uint64_t>(below)));
    device_.upload(values.data(), view);
    return view;
  }
  static double bytes_of(std::initializer_list<View> views) {
    double sum = 0;
    for (const View& view : views) sum += static_cast<double>(view.bytes());
    return sum;
  }

  void show(const char* name, double bytes, const std::function<void()>& work) {
    using Clock = std::chrono::steady_clock;
    constexpr int calls = 20;
    work();
    const auto replay = device_.record([&] {
      for (int i = 0; i < calls; ++i) work();
    });
    std::vector<double> seconds;
    for (int i = 0; i < 8; ++i) {
      device_.synchronize();
      const Clock::time_point start = Clock::now();
      replay->launch();
      device_.synchronize();
      if (i > 0) seconds.push_back(std::chrono::duration<double>(Clock::now() - start).count() / calls);
    }
    std::sort(seconds.begin(), seconds.end());
    const double median = seconds[seconds.size() / 2], rate = bytes / median;
    if (copy_rate_ == 0) copy_rate_ = rate;
    fmt::print("{:<34} {:>10.1f} {:>10.0f} {:>6.0f} %\n", name, median * 1e6, rate / 1e9,
               100 * rate / copy_rate_);
  }

  void copies() {
    const View a = make({1 << 15, 1 << 14}, narrow), b = make({1 << 15, 1 << 14}, narrow);
    show("copy, 1 GB", bytes_of({a, b}), [&] { device_.copy(a, {b, false}); });
    const View wide = make({at_.tokens, at_.hidden}, exact), x = make({at_.tokens, at_.hidden}, narrow);
    show("copy bf16 to f32", bytes_of({x, wide}), [&] { device_.copy(x, {wide, false}); });
    show("copy f32 onto bf16", bytes_of({x, x, wide}), [&] { device_.copy(wide, {x, true}); });
    kept_.clear();
  }

  void norms() {
    const Shape shape{at_.tokens, at_.hidden};
    const View h = make(shape, narrow), x = make(shape, narrow), sum = make(shape, narrow);
    const View out = make(shape, narrow), weight = make({at_.hidden}, narrow),
               rstd = make({at_.tokens}, exact);
    const View d_weight = make({at_.hidden}, exact);
    show("rms_norm", bytes_of({x, out}), [&] { device_.rms_norm(x, weight, 1e-6, out, rstd); });
    show("rms_norm_add", bytes_of({h, x, sum, out}),
         [&] { device_.rms_norm_add(h, x, weight, 1e-6, sum, out, rstd); });
    show("rms_norm_backward", bytes_of({out, sum, h}), [&] {
      device_.rms_norm_backward(out, sum, weight, rstd, {h, false}, {d_weight, true});
    });
    show("rms_norm_backward onto", bytes_of({out, sum, h, h}), [&] {
      device_.rms_norm_backward(out, sum, weight, rstd, {h, true}, {d_weight, true});
    });
    const View latent = make({at_.tokens, 576}, narrow), small = make({at_.tokens, 512}, narrow);
    View columns = latent;
    columns.shape = {at_.tokens, 512};
    const View w = make({512}, narrow), d_w = make({512}, exact);
    show("rms_norm of 512 in 576 columns", bytes_of({small, small}),
         [&] { device_.rms_norm(columns, w, 1e-6, small, rstd); });
    show("rms_norm_backward of these", bytes_of({small, small, small}), [&] {
      device_.rms_norm_backward(small, columns, w, rstd, {columns, false}, {d_w, true});
    });
    kept_.clear();
  }

  void elementwise() {
    const Shape shape{at_.tokens * at_.top_k, at_.inner};
    const View gate = make(shape, narrow), up = make(shape, narrow), out = make(shape, narrow);
    const View d_gate = make(shape, narrow), d_up = make(shape, narrow);
    show("swiglu", bytes_of({gate, up, out}), [&] { device_.swiglu(gate, up, out); });
    show("swiglu_backward", bytes_of({gate, up, out, d_gate, d_up}), [&] {
      device_.swiglu_backward(out, gate, up, {d_gate, false}, {d_up, false});
    });
    kept_.clear();
    const View a = make({at_.tokens, at_.hidden}, narrow), b = make({at_.tokens, at_.hidden}, narrow);
    show("add", bytes_of({a, a, b}), [&] { device_.add(a, b, a); });
    kept_.clear();
  }

  void tokens() {
    const int64_t rope = 64, width = 192;
    const View q = make({at_.tokens, at_.heads, width}, narrow), table = make({at_.tokens, rope}, exact);
    View rotary = q;
    rotary.data = static_cast<char*>(q.data) + (width - rope) * 2;
    rotary.shape = {at_.tokens, at_.heads, rope};
    const View positions = indices({at_.tokens}, at_.tokens);
    for (bool interleaved : {true, false}) {
      show(interleaved ? "rope, interleaved" : "rope, halves",
           static_cast<double>(rotary.count()) * 4 + static_cast<double>(table.bytes()),
           [&] { device_.rope(rotary, positions, table, interleaved, false); });
    }
    kept_.clear();
    const View ids = indices({at_.tokens}, at_.vocabulary);
    const View embeddings = make({at_.vocabulary, at_.hidden}, narrow);
    const View x = make({at_.tokens, at_.hidden}, narrow), d = make({at_.vocabulary, at_.hidden}, exact);
    show("embedding", bytes_of({x, x}), [&] { device_.embedding(ids, embeddings, x); });
    show("embedding_backward", bytes_of({x}) + 2 * static_cast<double>(at_.tokens * at_.hidden * 4), [&] {
      device_.embedding_backward(ids, x, {d, true});
    });
    kept_.clear();
  }

  void experts() {
    Routing routing;
    routing.top_k = static_cast<int>(at_.top_k);
    const View logits = make({at_.tokens, at_.experts}, exact),
               scores = make({at_.tokens, at_.experts}, exact);
    const View bias = make({at_.experts}, exact), load = make({at_.experts}, exact), loss = make({1}, exact);
    const View weights = make({at_.tokens, at_.top_k}, exact),
               d_weights = make({at_.tokens, at_.top_k}, exact);
    const View chosen = indices({at_.tokens, at_.top_k}, at_.experts);
    const double bytes = bytes_of({logits, scores, weights, chosen});
    show("route", bytes, [&] { device_.route(logits, bias, {}, routing, scores, weights, chosen, {}, {}); });
    show("route with loads", bytes,
         [&] { device_.route(logits, bias, {}, routing, scores, weights, chosen, load, {}); });
    routing.balance.alpha = 1e-4;
    routing.balance.sequence_length = std::min<int64_t>(at_.tokens, 1024);
    show("route with loads and balance", bytes,
         [&] { device_.route(logits, bias, {}, routing, scores, weights, chosen, load, loss); });
    show("route_backward with balance", bytes_of({scores, weights, d_weights, chosen, logits}), [&] {
      device_.route_backward(d_weights, scores, weights, chosen, {}, routing, {logits, false});
    });
    const int64_t choices = at_.tokens * at_.top_k;
    const View offsets = make({at_.experts + 1}, DType::i32), rows = make({choices}, DType::i32);
    const View slots = make({at_.tokens, at_.top_k}, DType::i32);
    show("expert_order", bytes_of({chosen, rows, slots}),
         [&] { device_.expert_order(chosen, offsets, rows, slots); });
    const View y = make({choices, at_.hidden}, narrow), d_y = make({choices, at_.hidden}, narrow);
    const View out = make({at_.tokens, at_.hidden}, narrow);
    show("combine", bytes_of({y, out}), [&] { device_.combine(y, weights, slots, {out, false}); });
    show("combine onto", bytes_of({y, out, out}), [&] { device_.combine(y, weights, slots, {out, true}); });
    show("combine_backward", bytes_of({y, d_y, out}), [&] {
      device_.combine_backward(out, y, weights, slots, {d_y, false}, {d_weights, false});
    });
    kept_.clear();
  }

  void optimizer() {
    const Shape shape{at_.experts, at_.inner, at_.hidden};
    const View parameter = make(shape, narrow), master = make(shape, exact), gradient = make(shape, exact);
    const View m = make(shape, exact), v = make(shape, exact), scalars = make({4}, DType::f64);
    const View norm = make({1}, DType::f64);
    const double four[4] = {1e-3, 0.5, 0.1, 0.05};
    device_.upload(four, scalars);
    show("adamw, bf16 with masters", bytes_of({parameter, master, master, gradient, m, m, v, v}),
         [&] { device_.adamw(parameter, master, gradient, m, v, scalars, {}); });
    show("add_sum_of_squares", bytes_of({gradient}), [&] { device_.add_sum_of_squares(gradient, norm); });
    const View small = make({1024, 64}, exact);
    show("add_sum_of_squares of 256 KB", bytes_of({small}), [&] { device_.add_sum_of_squares(small, norm); });
    kept_.clear();
  }

  Sizes at_;
  cuda::CudaBackend device_;
  std::vector<Tensor> kept_;
  double copy_rate_ = 0;
};

Sizes read_sizes(int argc, char** argv) {
  Sizes sizes;
  const std::map<std::string, int64_t*> names = {
      {"--tokens", &sizes.tokens},        {"--hidden", &sizes.hidden}, {"--experts", &sizes.experts},
      {"--top-k", &sizes.top_k},          {"--inner", &sizes.inner},   {"--heads", &sizes.heads},
      {"--vocabulary", &sizes.vocabulary}};
  for (int i = 1; i + 1 < argc; i += 2) {
    const auto found = names.find(argv[i]);
    if (found == names.end()) fail("expected one of --tokens, --hidden, ..., found {}", argv[i]);
    *found->second = std::atoll(argv[i + 1]);
  }
  return sizes;
}

}  // namespace
}  // namespace latente

int main(int argc, char** argv) {
  try {
    latente::Bench(latente::read_sizes(argc, argv)).run();
  } catch (const std::exception& error) {
    fmt::print(stderr, "bench_cuda_kernels: {}\n", error.what());
    return 1;
  }
}
