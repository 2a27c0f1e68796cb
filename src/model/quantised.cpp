#include "model/quantised.h"

#include <algorithm>
#include <vector>

#include "base/random.h"
#include "base/threads.h"
#include "model/weights.h"
#include "tensor/quantise.h"

namespace latente {
namespace {

constexpr int64_t piece_elements = 4 << 20;  // quantised at once

int bits_of(DType type) { return type == DType::q8 ? 8 : 4; }

// Where codes come from. Names are a checkpoint's, one of an expert's own among them.
class Source {
 public:
  virtual ~Source() = default;
  // Rows [row, row + rows) of the matrix `name` [n, k].
  virtual void read(const std::string& name, int64_t n, int64_t k, int64_t row, int64_t rows, int bits,
                    int64_t group, int8_t* codes, float* scales) = 0;
  // Rows [first, first + k) of the matrix `name` of this shape, transposed: [shape[1], k].
  virtual void read_transposed(const std::string& name, const Shape& shape, int64_t first, int64_t k,
                               int bits, int64_t group, int8_t* codes, float* scales) = 0;
  // A parameter that is not quantised.
  virtual void keep(const std::string& path, const Tensor& tensor) = 0;
};

class CheckpointSource final : public Source {
 public:
  explicit CheckpointSource(const TensorSource& checkpoint) : checkpoint_(checkpoint) {}
  ~CheckpointSource() override { forget(); }
  CheckpointSource(const CheckpointSource&) = delete;
  CheckpointSource& operator=(const CheckpointSource&) = delete;

  void read(const std::string& name, int64_t n, int64_t k, int64_t row, int64_t rows, int bits, int64_t group,
            int8_t* codes, float* scales) override {
    open(name, {n, k});
    const int64_t groups = groups_of(k, group);
    pool_.parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
      thread_local std::vector<float> floats;
      floats.resize(static_cast<size_t>((end - begin) * k));
      const char* from = static_cast<const char*>(view_.data) + (row + begin) * k * size_of(view_.dtype);
      convert(view_.dtype, from, DType::f32, floats.data(), (end - begin) * k);
      quantise_rows(floats.data(), end - begin, k, bits, group, codes + begin * k, scales + begin * groups);
    });
  }

  void read_transposed(const std::string& name, const Shape& shape, int64_t first, int64_t k, int bits,
                       int64_t group, int8_t* codes, float* scales) override {
    open(name, shape);
    const int64_t n = shape[1];
    std::vector<float> rows(static_cast<size_t>(k * n)), columns(rows.size());
    convert(view_.dtype, static_cast<const char*>(view_.data) + first * n * size_of(view_.dtype), DType::f32,
            rows.data(), k * n);
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < n; ++j)
        columns[static_cast<size_t>(j * k + i)] = rows[static_cast<size_t>(i * n + j)];
    }
    quantise_rows(columns.data(), n, k, bits, group, codes, scales);
  }

  void keep(const std::string& path, const Tensor& tensor) override {
    load_parameter(path, tensor, checkpoint_, true);
  }

 private:
  // Lets view_ be the matrix: where it lies, or a copy of what has block scales.
  void open(const std::string& name, const Shape& shape) {
    if (name == name_) return;
    forget();
    mapped_ = checkpoint_.map(name);
    if (mapped_ && mapped_->view.shape == shape && is_floating(mapped_->view.dtype) &&
        !checkpoint_.scale_name(name)) {
      view_ = mapped_->view;
    } else {
      copy_.resize(static_cast<size_t>(shape.count()));
      view_ = View(copy_.data(), shape, DType::f32);
      checkpoint_.read(name, view_);
    }
    name_ = name;
  }

  void forget() {
    if (!name_.empty()) checkpoint_.release(name_);
    mapped_.reset();
  }

  const TensorSource& checkpoint_;
  ThreadPool pool_;
  std::string name_;
  std::optional<MappedTensor> mapped_;
  std::vector<float> copy_;
  View view_;
};

class RandomSource final : public Source {
 public:
  RandomSource(const Transformer& model, uint64_t seed)
      : seed_(seed), deviation_(model.config().initializer_range), random_(seed), codes_(1 << 16) {
    for (int8_t& code : codes_) code = static_cast<int8_t>(std::clamp(random_.normal() * 40, -127.0, 127.0));
  }

  void read(const std::string&, int64_t, int64_t k, int64_t, int64_t rows, int bits, int64_t group,
            int8_t* codes, float* scales) override {
    fill(rows, k, bits, group, codes, scales);
  }
  void read_transposed(const std::string&, const Shape& shape, int64_t, int64_t k, int bits, int64_t group,
                       int8_t* codes, float* scales) override {
    fill(shape[1], k, bits, group, codes, scales);
  }
  void keep(const std::string& path, const Tensor& tensor) override {
    allocate(tensor);
    initialise_parameter(path, tensor, deviation_, seed_);
  }

 private:
  // The same codes again and again, from another place each time.
  void fill(int64_t rows, int64_t k, int bits, int64_t group, int8_t* codes, float* scales) {
    const int64_t count = rows * k;
    for (int64_t at = 0; at < count;) {
      const int64_t begin = static_cast<int64_t>(random_.uniform() * 1024);
      const int64_t piece = std::min<int64_t>(count - at, static_cast<int64_t>(codes_.size()) - begin);
      for (int64_t i = 0; i < piece; ++i) {
        const int8_t code = codes_[static_cast<size_t>(begin + i)];
        codes[at + i] = bits == 8 ? code : static_cast<int8_t>(code / 16);
      }
      at += piece;
    }
    const double step = deviation_ / 40 * (bits == 8 ? 1 : 16);
    std::fill_n(scales, rows * groups_of(k, group), static_cast<float>(step));
  }

  uint64_t seed_;
  double deviation_;
  Random random_;
  std::vector<int8_t> codes_;
};

bool is_kept(const std::string& path, const Tensor& tensor) {
  return tensor.shape().rank() < 2 || path.ends_with("embed_tokens.weight") ||
         path.ends_with("mlp.gate.weight") || path.ends_with("eh_proj.weight") || path.ends_with(".bias");
}

class Loading {
 public:
  Loading(Transformer& model, Source& source, Backend& backend, const QuantisedOptions& options)
      : model_(model), source_(source), backend_(backend), options_(options) {
    if (!is_quantised(options.type) || options.group % 32 != 0 || options.group < least_group ||
        options.group > most_group) {
      fail("quantised weights: expected q8 or q4 and a group of 32, 64, ... 256 elements, found {} and {}",
           name_of(options.type), options.group);
    }
  }

  void run() {
    model_.for_each([&](const std::string& path, Tensor& tensor) { plan(path, tensor); });
    for (Layer& layer : model_.model.layers) plan_absorbed(layer, options_.type);
    for (MtpModule& module : model_.mtp) plan_absorbed(module.layer, DType::q8);
    memory_ = backend_.allocate(bytes_);
    for (Place& place : places_) {
      place.view.data = static_cast<char*>(memory_.get()) + place.offset;
      fill(place);
      bind_view(place.tensor, place.view, memory_);
      step();
    }
    for (auto& [path, tensor] : kept_) {
      source_.keep(path, tensor);
      step();
    }
    for (auto& [path, gate] : model_.gates()) allocate(gate->load);
    pack_weights(model_, backend_);
  }

 private:
  struct Place {
    std::string name;
    Tensor tensor;
    View view;
    int64_t offset = 0;
    // Of a head's rows in the matrix `name`: for the absorbed form.
    int64_t first = 0, stride = 0;
    bool transposed = false;
  };

  void plan(const std::string& path, Tensor& tensor) {
    if (is_kept(path, tensor)) {
      kept_.emplace_back(path, tensor);
      return;
    }
    bool in_module = false;
    for (size_t k = 0; k < model_.mtp.size(); ++k)
      in_module |= path.starts_with(model_.mtp_path(static_cast<int64_t>(k)) + ".");
    add({.name = path, .tensor = tensor, .view = {}}, in_module ? DType::q8 : options_.type);
  }

  void plan_absorbed(Layer& layer, DType type) {
    Mla* mla = std::get_if<Mla>(&layer.self_attn);
    if (!mla) return;
    const int64_t stride = mla->nope_dim + mla->v_dim;
    mla->w_uk = parameter({mla->heads, mla->kv_rank, mla->nope_dim}, type, false);
    mla->w_uv = parameter({mla->heads, mla->v_dim, mla->kv_rank}, type, false);
    const std::string& name = mla->kv_b_proj.weight.name();
    add({.name = name, .tensor = mla->w_uk, .view = {}, .stride = stride, .transposed = true}, type);
    add({.name = name, .tensor = mla->w_uv, .view = {}, .first = mla->nope_dim, .stride = stride}, type);
  }

  void add(Place place, DType type) {
    // Short rows in short groups: what is beyond a row's end takes memory too.
    int64_t group = options_.group;
    while (group > least_group && group / 2 >= place.tensor[-1]) group /= 2;
    const auto form = backend_.quantised(place.tensor.shape(), type, group);
    if (!form) fail("{} cannot run weights of type {}", backend_.name(), name_of(type));
    place.view = form->view;
    place.offset = bytes_;
    bytes_ += (form->bytes + 63) / 64 * 64;
    places_.push_back(std::move(place));
  }

  void fill(const Place& place) {
    const View& to = place.view;
    const int64_t n = to[-2], k = to[-1], matrices = to.shape.rank() == 3 ? to[0] : 1;
    const int64_t piece = std::clamp<int64_t>(piece_elements / k / 64 * 64, 64, (n + 63) / 64 * 64);
    codes_.resize(static_cast<size_t>(std::min(piece, n) * k));
    scales_.resize(static_cast<size_t>(std::min(piece, n) * groups_of(k, to.group)));
    const int bits = bits_of(to.dtype);
    for (int64_t i = 0; i < matrices; ++i) {
      if (place.transposed) {
        codes_.resize(static_cast<size_t>(n * k));
        scales_.resize(static_cast<size_t>(n * groups_of(k, to.group)));
        source_.read_transposed(place.name, {matrices * place.stride, n}, i * place.stride, k, bits, to.group,
                                codes_.data(), scales_.data());
        backend_.pack_quantised(codes_.data(), scales_.data(), to, i, 0, n);
        continue;
      }
      const bool of_head = place.stride > 0;
      const std::string name = is_expert_stack(place.name) ? expert_path(place.name, i) : place.name;
      const int64_t rows_in_all = of_head ? matrices * place.stride : n;
      const int64_t start = of_head ? i * place.stride + place.first : 0;
      for (int64_t row = 0; row < n; row += piece) {
        const int64_t rows = std::min(piece, n - row);
        source_.read(name, rows_in_all, k, start + row, rows, bits, to.group, codes_.data(), scales_.data());
        backend_.pack_quantised(codes_.data(), scales_.data(), to, i, row, rows);
      }
    }
  }

  void step() {
    ++done_;
    if (options_.progress) options_.progress(done_, static_cast<int64_t>(places_.size() + kept_.size()));
  }

  Transformer& model_;
  Source& source_;
  Backend& backend_;
  const QuantisedOptions& options_;
  std::vector<Place> places_;
  std::vector<std::pair<std::string, Tensor>> kept_;
  int64_t bytes_ = 0, done_ = 0;
  std::shared_ptr<void> memory_;
  std::vector<int8_t> codes_;
  std::vector<float> scales_;
};

}  // namespace

void load_quantised(Transformer& model, const TensorSource& checkpoint, Backend& backend,
                    const QuantisedOptions& options) {
  check_names(model, checkpoint);
  CheckpointSource source(checkpoint);
  Loading(model, source, backend, options).run();
}

void initialise_quantised(Transformer& model, uint64_t seed, Backend& backend,
                          const QuantisedOptions& options) {
  RandomSource source(model, seed);
  Loading(model, source, backend, options).run();
}

}  // namespace latente
