#include "model/square_weights.h"

#include <algorithm>
#include <cstring>

#include "base/memory.h"
#include "base/random.h"
#include "model/moe.h"
#include "model/weights.h"
#include "tensor/device.h"
#include "tensor/panels.h"

namespace latente {
namespace {

using quantised::square;

bool may_be_squares(const std::string& path, const Tensor& tensor) {
  if (tensor.shape().rank() < 2) return false;
  for (const char* kept : {"embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "eh_proj.weight",
                           "kv_b_proj.weight", ".bias"}) {
    if (path.ends_with(kept)) return false;
  }
  return true;
}

Shape squares_of(const Tensor& tensor) {
  return {(tensor[-2] + square - 1) / square, (tensor[-1] + square - 1) / square};
}

bool is_stored_so(const std::string& path, const Tensor& tensor, const TensorSource& checkpoint) {
  for (int64_t i = 0; i < matrices_of(tensor); ++i) {
    const std::string name = matrix_path(path, i);
    const auto scales = checkpoint.contains(name) ? checkpoint.scale_name(name) : std::nullopt;
    if (!scales) return false;
    const auto codes = checkpoint.map(name), stored = checkpoint.map(*scales);
    if (!codes || codes->view.shape != Shape{tensor[-2], tensor[-1]}) return false;
    if (!stored || stored->view.shape != squares_of(tensor)) return false;
  }
  return true;
}

// make(i, matrix): matrix i in the host's memory; by all threads.
template <class Make>
void hold_as_squares(const Tensor& tensor, Backend& backend, ThreadPool& pool, const Make& make) {
  const auto form = backend.quantised(tensor.shape(), DType::f8e4m3, square);
  LATENTE_ASSERT(form);
  const int64_t matrices = matrices_of(tensor);
  const std::shared_ptr<void> host = aligned_memory(form->bytes);
  pool.parallel_for(matrices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      make(i, static_cast<std::byte*>(host.get()) + i * (form->bytes / matrices));
  });
  View view = form->view;
  std::shared_ptr<void> memory = backend.take_panels(host.get(), view);
  bind_view(tensor, view, std::move(memory));
}

}  // namespace

bool keeps_squares(const Backend& backend) {
  return backend.quantised({square, square}, DType::f8e4m3, square).has_value();
}

void load_with_squares(Transformer& model, const TensorSource& checkpoint, Backend& backend,
                       const SquareOptions& options) {
  LATENTE_ASSERT(model.weights() == DType::bf16);
  const int64_t total = check_names(model, checkpoint);
  int64_t done = 0, bytes = 0;
  const auto step = [&] {
    ++done;
    if (options.progress) options.progress(done, total);
  };
  const auto held = [&](const std::string& path, const Tensor& tensor) {
    return may_be_squares(path, tensor) && (options.quantise || is_stored_so(path, tensor, checkpoint));
  };
  model.for_each([&](const std::string& path, Tensor& tensor) {
    bytes += held(path, tensor) ? backend.quantised(tensor.shape(), DType::f8e4m3, square)->bytes
                                : tensor.count() * size_of(tensor.dtype());
  });
  if (bytes > options.memory) {
    fail("memory: expected at least {} for these weights on {}, found {}",
         bytes_text(static_cast<double>(bytes)), backend.name(),
         bytes_text(static_cast<double>(options.memory)));
  }
  ThreadPool pool;
  model.for_each([&](const std::string& path, Tensor& tensor) {
    if (!held(path, tensor)) {
      load_parameter(path, tensor, checkpoint, true, pool, step);
      return move_to(backend, tensor);
    }
    const int64_t n = tensor[-2], k = tensor[-1];
    const bool stored = is_stored_so(path, tensor, checkpoint);
    hold_as_squares(tensor, backend, pool, [&](int64_t i, std::byte* matrix) {
      const std::string name = matrix_path(path, i);
      if (stored) {
        checkpoint.read(*checkpoint.scale_name(name), View(matrix, squares_of(tensor), DType::f32));
        std::memcpy(matrix + quantised::square_scale_bytes(n, k), checkpoint.map(name)->view.data,
                    static_cast<size_t>(n * k));
      } else {
        std::vector<float> values(static_cast<size_t>(n * k));
        checkpoint.read(name, View(values.data(), {n, k}, DType::f32));
        if (!quantised::quantise_squares(values.data(), n, k, matrix))
          fail("{}: {}: expected finite values", checkpoint.file_of(name), name);
      }
      checkpoint.release(name);
    });
    for (int64_t i = 0; i < matrices_of(tensor); ++i) step();
  });
  for (auto& [path, gate] : model.gates()) allocate(backend, gate->load);
}

void initialise_with_squares(Transformer& model, uint64_t seed, Backend& backend) {
  // Some codes, drawn once and used again and again, from another place each time.
  constexpr int64_t drawn = 1 << 20, piece = 1 << 14;
  constexpr double spread = 100;
  std::vector<f8e4m3> codes(drawn);
  Random random(seed);
  for (f8e4m3& code : codes) code = f8e4m3(static_cast<float>(random.normal() * spread));
  const double deviation = model.config().initializer_range;
  ThreadPool pool;
  uint64_t place = 0;
  model.for_each([&](const std::string& path, Tensor& tensor) {
    if (!may_be_squares(path, tensor)) {
      allocate(tensor);
      initialise_parameter(path, tensor, deviation, seed);
      return move_to(backend, tensor);
    }
    ++place;
    const int64_t n = tensor[-2], k = tensor[-1];
    hold_as_squares(tensor, backend, pool, [&](int64_t i, std::byte* matrix) {
      auto* scales = reinterpret_cast<float*>(matrix);
      std::fill_n(scales, squares_of(tensor).count(), static_cast<float>(deviation / spread));
      std::byte* to = matrix + quantised::square_scale_bytes(n, k);
      Random own(seed, place);
      own.seek(static_cast<uint64_t>(i) << 32);
      for (int64_t at = 0; at < n * k; at += piece) {
        const auto from = static_cast<int64_t>(own.below(drawn - piece));
        std::memcpy(to + at, codes.data() + from, static_cast<size_t>(std::min(piece, n * k - at)));
      }
    });
  });
  for (auto& [path, gate] : model.gates()) allocate(backend, gate->load);
}

}  // namespace latente
