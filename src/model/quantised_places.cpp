#include "model/quantised_places.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "tensor/panels.h"
#include "tensor/quantise.h"

namespace latente {
namespace {

constexpr int64_t piece_elements = 32 << 20;
constexpr int64_t task_elements = 1 << 16;

// Whatever the form of the others.
bool is_kept(const std::string& path, const Tensor& tensor) {
  return tensor.shape().rank() < 2 || path.ends_with("mlp.gate.weight") || path.ends_with("eh_proj.weight") ||
         path.ends_with(".bias");
}

// Of a matrix or a stack in this type: panels, or rows of floats.
std::optional<Backend::Packed> form_of(const Backend& backend, const Shape& shape, DType type,
                                       int64_t group) {
  if (is_quantised(type)) return backend.quantised(shape, type, group);
  const View rows(nullptr, shape, type);
  return Backend::Packed{rows, rows.bytes()};
}

class Planning {
 public:
  Planning(Transformer& model, Backend& backend) : model_(model), backend_(backend) {}
  virtual ~Planning() = default;

  QuantisedPlaces plan() {
    model_.for_each([&](const std::string& path, Tensor& tensor) { plan_parameter(path, tensor); });
    const auto plan_halves = [&](Layer& layer, const std::string& path) {
      if (Mla* mla = std::get_if<Mla>(&layer.self_attn)) plan_absorbed(*mla, path + ".self_attn.");
    };
    for (size_t i = 0; i < model_.model.layers.size(); ++i)
      plan_halves(model_.model.layers[i], "model.layers." + std::to_string(i));
    for (size_t k = 0; k < model_.mtp.size(); ++k)
      plan_halves(model_.mtp[k].layer, model_.mtp_path(static_cast<int64_t>(k)));
    return std::move(result_);
  }

 protected:
  virtual void plan_parameter(const std::string& path, Tensor& tensor) = 0;
  virtual void plan_absorbed(Mla& mla, const std::string& path) = 0;

  bool in_module(const std::string& path) const {
    for (size_t k = 0; k < model_.mtp.size(); ++k) {
      if (path.starts_with(model_.mtp_path(static_cast<int64_t>(k)) + ".")) return true;
    }
    return false;
  }

  void keep(const std::string& path, const Tensor& tensor) { result_.kept.emplace_back(path, tensor); }

  void add(QuantisedPlace place, DType type, int64_t group) {
    // Short rows in short groups: what is beyond a row's end takes memory too.
    while (group > least_group && group / 2 >= place.tensor[-1]) group /= 2;
    const auto form = form_of(backend_, place.tensor.shape(), type, group);
    if (!form) fail("{} cannot run weights of type {}", backend_.name(), name_of(type));
    place.view = form->view;
    place.bytes = form->bytes;
    result_.places.push_back(std::move(place));
  }

  // The halves [heads, rank, nope] and [heads, v, rank], made of the rows of kv_b_proj.
  static QuantisedPlace key_half(Mla& mla, const std::string& path, DType type) {
    mla.w_uk = parameter({mla.heads, mla.kv_rank, mla.nope_dim}, type, false);
    return {.path = path + "w_uk",
            .source = path + "kv_b_proj.weight",
            .tensor = mla.w_uk,
            .view = {},
            .stride = mla.nope_dim + mla.v_dim,
            .transposed = true};
  }
  static QuantisedPlace value_half(Mla& mla, const std::string& path, DType type) {
    mla.w_uv = parameter({mla.heads, mla.v_dim, mla.kv_rank}, type, false);
    return {.path = path + "w_uv",
            .source = path + "kv_b_proj.weight",
            .tensor = mla.w_uv,
            .view = {},
            .first = mla.nope_dim,
            .stride = mla.nope_dim + mla.v_dim};
  }

 private:
  Transformer& model_;
  Backend& backend_;
  QuantisedPlaces result_;
};

class PlanningByOptions final : public Planning {
 public:
  PlanningByOptions(Transformer& model, Backend& backend, const QuantisedOptions& options)
      : Planning(model, backend), options_(options) {
    if (!is_quantised(options.type) || !is_quantised(options.mtp) || options.group % 32 != 0 ||
        options.group < least_group || options.group > most_group) {
      fail(
          "quantised weights: expected q8 or q4 and a group of 32, 64, ... 256 elements, found {}, {} and {}",
          name_of(options.type), name_of(options.mtp), options.group);
    }
  }

 private:
  DType type_of(const std::string& path) const {
    // Drafts of 4 bits are hardly ever right, and 8 gain nothing on a model of 8.
    return options_.type == DType::q8 ? DType::q8 : in_module(path) ? options_.mtp : options_.type;
  }

  void plan_parameter(const std::string& path, Tensor& tensor) override {
    if (is_kept(path, tensor) || path.ends_with("embed_tokens.weight")) return keep(path, tensor);
    add({.path = path, .source = path, .tensor = tensor, .view = {}}, type_of(path), options_.group);
  }

  void plan_absorbed(Mla& mla, const std::string& path) override {
    const DType type = type_of(path);
    add(key_half(mla, path, type), type, options_.group);
    add(value_half(mla, path, type), type, options_.group);
  }

  const QuantisedOptions& options_;
};

// Nothing for types of floats.
std::optional<DType> exact_type(GgmlType type) {
  const CodeForm form = code_form(type);
  if (form.bits == 0) return std::nullopt;
  return form.bits == 8 ? DType::q8 : form.offsets ? DType::q4m : DType::q4;
}

bool is_float(GgmlType type) { return block_of(type).values == 1; }

class PlanningAsStored final : public Planning {
 public:
  PlanningAsStored(Transformer& model, Backend& backend, const TensorSource& source)
      : Planning(model, backend), source_(source) {}

 private:
  static constexpr int64_t group = 32;  // of every type of blocks that has an exact form

  // The released models are bfloat16, which float16 holds but for the smallest numbers.
  static DType float_type(GgmlType type) { return type == GgmlType::f32 ? DType::f32 : DType::bf16; }
  static DType held_type(GgmlType type) {
    return is_float(type) ? float_type(type) : exact_type(type).value_or(DType::q8);
  }
  // What adds an error far below the type's own along another axis than that of its blocks.
  static DType turned_type(GgmlType type) {
    return is_float(type) || type == GgmlType::q8_0 ? float_type(type) : DType::q8;
  }

  std::optional<GgmlType> type_in_file(const std::string& name) const {
    const auto blocks = source_.blocks(name);
    return blocks ? std::optional(blocks->type) : std::nullopt;
  }

  // Of an attention's up-projection: of kv_b_proj, or of its parts.
  struct Latent {
    GgmlType keys, values;
    bool split;
  };
  std::optional<Latent> latent(const std::string& path) const {
    if (const auto whole = type_in_file(path + "kv_b_proj.weight")) return Latent{*whole, *whole, false};
    const auto keys = type_in_file(path + "k_b_proj.weight"), values = type_in_file(path + "v_b_proj.weight");
    if (!keys || !values) return std::nullopt;
    return Latent{*keys, *values, true};
  }

  void hold(DType type, const std::string& path, Tensor& tensor) {
    tensor.value().dtype = type;
    if (!is_quantised(type)) return keep(path, tensor);
    add({.path = path, .source = path, .tensor = tensor, .view = {}}, type, group);
  }

  void plan_parameter(const std::string& path, Tensor& tensor) override {
    constexpr std::string_view up = "kv_b_proj.weight";
    if (path.ends_with(up)) {
      const auto found = latent(path.substr(0, path.size() - up.size()));
      if (!found) return keep(path, tensor);
      if (!found->split) return hold(held_type(found->keys), path, tensor);
      const DType keys = turned_type(found->keys), values = turned_type(found->values);
      const bool wide = keys == DType::f32 || values == DType::f32;
      return hold(wide ? DType::f32 : keys == values ? keys : DType::bf16, path, tensor);
    }
    const auto type = type_in_file(is_expert_stack(path) ? expert_path(path, 0) : path);
    const bool of_model =
        tensor.shape().rank() < 2 || path.ends_with(".bias") || path.ends_with("gate.weight");
    if (!type || of_model) return keep(path, tensor);
    hold(is_kept(path, tensor) ? float_type(*type) : held_type(*type), path, tensor);
  }

  void plan_absorbed(Mla& mla, const std::string& path) override {
    const auto found = latent(path);
    if (!found || (is_float(found->keys) && is_float(found->values))) return;
    const DType values = held_type(found->values);
    if (!found->split) {
      const DType keys = turned_type(found->keys);
      add(key_half(mla, path, keys), keys, group);
      return add(value_half(mla, path, values), values, group);
    }
    const DType keys = held_type(found->keys);
    QuantisedPlace half = key_half(mla, path, keys);
    half.source = path + "k_b_proj.weight", half.stride = mla.kv_rank, half.transposed = false;
    add(std::move(half), keys, group);
    half = value_half(mla, path, values);
    half.source = path + "v_b_proj.weight", half.stride = mla.v_dim, half.first = 0;
    add(std::move(half), values, group);
  }

  const TensorSource& source_;
};

[[noreturn]] void refuse(const std::string& file, const std::string& name) {
  fail("{}: {}: expected finite values that 8 or 4 bits can hold", file, name);
}

constexpr int64_t block_group = 32;  // of all types that have codes

// Whether panels like `to` hold a matrix of `rows` rows as its blocks do.
bool is_exact(const MappedBlocks& stored, const View& to, int64_t rows) {
  return exact_type(stored.type) == to.dtype && to.group == block_group && stored.shape[-1] == to[-1] &&
         stored.shape.count() == rows * to[-1];
}

// Rows [first, first + rows) of exact blocks, to be rows of matrix `index` of `to` from `to_row` on. False
// when a scale is not finite.
bool pack_blocks(const MappedBlocks& stored, int64_t first, int64_t rows, Backend& backend, const View& to,
                 int64_t index, int64_t to_row) {
  constexpr float beyond_half = 65520.0f;  // what float16 rounds to infinity
  thread_local std::vector<int8_t> codes;
  thread_local std::vector<float> scales;
  const int64_t k = to[-1];
  const GgmlBlock& block = block_of(stored.type);
  const std::byte* from = stored.bytes.data() + first * (k / block.values * block.bytes);
  const bool quick =
      stored.type == GgmlType::q8_0 || stored.type == GgmlType::q4_0 || stored.type == GgmlType::q4_k;
  if (quick && backend.pack_blocks(from, to, index, to_row, rows)) return true;
  codes.resize(static_cast<size_t>(rows * k));
  scales.resize(codes.size() / block_group * (to.dtype == DType::q4m ? 2 : 1));
  decode_codes(stored.type, from, rows * k, codes.data(), scales.data());
  for (size_t i = 0; i < scales.size(); ++i) {
    if (!(std::abs(scales[i]) < beyond_half)) return false;
    if (to.dtype != DType::q8 || i * block_group >= codes.size()) continue;  // of 4 bits, or an offset
    int8_t* of_group = codes.data() + i * block_group;
    if (*std::min_element(of_group, of_group + block_group) > -128) continue;
    // Quantisers hardly write it, and products do not take it.
    std::array<float, block_group> again;
    std::transform(of_group, of_group + block_group, again.begin(),
                   [&](int8_t code) { return scales[i] * code; });
    quantise_rows(again.data(), 1, block_group, 8, block_group, of_group, &scales[i]);
    if (!(std::abs(scales[i]) < beyond_half)) return false;
  }
  backend.pack_quantised(codes.data(), scales.data(), to, index, to_row, rows);
  return true;
}

class MatricesInBlocks final : public MatricesInFile {
 public:
  struct Matrix {
    std::string name, file;
    MappedBlocks blocks;
  };

  MatricesInBlocks(const View& view, std::vector<MappedBytes> bytes, std::vector<Matrix> matrices,
                   Backend& backend)
      : MatricesInFile(std::move(bytes), (view[-2] + quantised::panel_rows - 1) / quantised::panel_rows,
                       quantised::panel_bytes(quantised::form_of(view.dtype, view.group), view[-1])),
        view_(quantised::view_of({quantised::panel_rows, view[-1]}, view.dtype, view.group)),
        rows_(view[-2]),
        matrices_(std::move(matrices)),
        backend_(backend) {}

  // A panel at a time: the backend's threads are at work elsewhere.
  void make(int64_t i, int64_t first, int64_t count, std::byte* to) const override {
    const Matrix& matrix = matrices_[static_cast<size_t>(i)];
    View panel = view_;
    for (int64_t row = first * quantised::panel_rows; count > 0;
         --count, row += quantised::panel_rows, to += panel_bytes()) {
      panel.data = to;
      if (!pack_blocks(matrix.blocks, row, std::min(quantised::panel_rows, rows_ - row), backend_, panel, 0,
                       0))
        refuse(matrix.file, matrix.name);
    }
  }

 private:
  View view_;  // of a panel
  int64_t rows_;
  std::vector<Matrix> matrices_;
  Backend& backend_;
};

}  // namespace

std::string QuantisedPlace::source_of(int64_t i) const { return matrix_path(source, i); }

QuantisedPlaces quantised_places(Transformer& model, Backend& backend, const QuantisedOptions& options) {
  return PlanningByOptions(model, backend, options).plan();
}

QuantisedPlaces stored_places(Transformer& model, Backend& backend, const TensorSource& source) {
  return PlanningAsStored(model, backend, source).plan();
}

int64_t QuantisedPlaces::bytes() const {
  int64_t bytes = 0;
  for (const QuantisedPlace& place : places) bytes += place.bytes;
  for (const auto& [path, tensor] : kept) bytes += tensor.count() * size_of(tensor.dtype());
  return bytes;
}

std::unique_ptr<MatricesInFile> matrices_in_blocks(const QuantisedPlace& place, const TensorSource& source,
                                                   Backend& backend) {
  if (place.stride > 0 || place.transposed || !is_quantised(place.view.dtype)) return nullptr;
  std::vector<MatricesInBlocks::Matrix> matrices;
  std::vector<MappedBytes> bytes;
  for (int64_t i = 0; i < place.matrices(); ++i) {
    const std::string name = place.source_of(i);
    std::optional<MappedBlocks> stored = source.blocks(name);
    if (!stored || !is_exact(*stored, place.view, place.rows())) return nullptr;
    bytes.push_back({stored->bytes, stored->owner, stored->file});
    matrices.push_back({name, source.file_of(name), std::move(*stored)});
  }
  return std::make_unique<MatricesInBlocks>(place.view, std::move(bytes), std::move(matrices), backend);
}

void take_panels(const QuantisedPlace& place, const void* panels, Backend& device) {
  View view = place.view;
  std::shared_ptr<void> memory = device.take_panels(panels, view);
  bind_view(place.tensor, view, std::move(memory));
}

std::vector<QuantisedPiece> pieces_of(const QuantisedPlace& place) {
  std::vector<QuantisedPiece> pieces;
  const int64_t n = place.rows(), matrix = n * place.columns();
  if (matrix <= piece_elements || place.transposed) {
    const int64_t at_once = std::max<int64_t>(piece_elements / std::max<int64_t>(matrix, 1), 1);
    for (int64_t i = 0; i < place.matrices(); i += at_once)
      pieces.push_back({i, std::min(at_once, place.matrices() - i), 0, n});
    return pieces;
  }
  const int64_t at_once =
      std::max<int64_t>(piece_elements / place.columns() / quantised::panel_rows * quantised::panel_rows,
                        quantised::panel_rows);
  for (int64_t i = 0; i < place.matrices(); ++i) {
    for (int64_t row = 0; row < n; row += at_once) pieces.push_back({i, 1, row, std::min(at_once, n - row)});
  }
  return pieces;
}

int64_t QuantisedPanels::bytes(const QuantisedPlace& place, const QuantisedPiece& piece) const {
  const View& view = place.view;
  return form_of(backend_, {piece.matrices, piece.rows, view[-1]}, view.dtype, view.group)->bytes;
}

void QuantisedPanels::make(const QuantisedPlace& place, const QuantisedPiece& piece, void* panels) {
  const View& view = place.view;
  const int64_t k = place.columns();
  View to = form_of(backend_, {piece.matrices, piece.rows, k}, view.dtype, view.group)->view;
  to.data = panels;
  // What is read transposed is read a head at a time.
  const int64_t at_once = place.transposed ? piece.rows
                                           : std::max<int64_t>(task_elements / k / quantised::panel_rows, 1) *
                                                 quantised::panel_rows;
  const int64_t tasks = (piece.rows + at_once - 1) / at_once;
  pool_.parallel_for(piece.matrices * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t index = task / tasks, row = task % tasks * at_once;
      make_rows(place, piece.matrix + index, piece.row + row, std::min(at_once, piece.rows - row), to, index,
                row);
    }
  });
  made(place, piece);
}

void QuantisedPanels::make(const QuantisedPlace& place, void* panels) {
  auto* at = static_cast<std::byte*>(panels);
  for (const QuantisedPiece& piece : pieces_of(place)) {
    make(place, piece, at);
    at += bytes(place, piece);
  }
}

void CheckpointPanels::make_rows(const QuantisedPlace& place, int64_t matrix, int64_t row, int64_t rows,
                                 const View& to, int64_t index, int64_t to_row) {
  thread_local std::vector<float> values, turned;
  const int64_t k = place.columns();
  const std::string name = place.source_of(matrix);
  const int64_t first = (place.stride > 0 ? matrix * place.stride : 0) + place.first;
  if (!place.transposed && take_codes(place, name, first + row, rows, to, index, to_row)) return;
  values.resize(static_cast<size_t>(rows * k));
  if (place.transposed) {
    LATENTE_ASSERT(row == 0 && rows == place.rows());
    checkpoint_.read_rows(name, place.source_rows(), first, View(values.data(), {k, rows}, DType::f32));
    turned.resize(values.size());
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < k; ++j)
        turned[static_cast<size_t>(i * k + j)] = values[static_cast<size_t>(j * rows + i)];
    }
  } else {
    checkpoint_.read_rows(name, place.source_rows(), first + row, View(values.data(), {rows, k}, DType::f32));
  }
  const float* read = place.transposed ? turned.data() : values.data();
  if (!is_quantised(to.dtype)) {
    const int64_t at = (index * to[-2] + to_row) * k * size_of(to.dtype);
    return convert(DType::f32, read, to.dtype, static_cast<char*>(to.data) + at, rows * k);
  }
  const std::vector<float>* columns = nullptr;
  if (importance_ && !place.transposed) {  // whose columns are another product's
    const auto found = importance_->find(name);
    if (found != importance_->end()) columns = &found->second;
    LATENTE_ASSERT(!columns || static_cast<int64_t>(columns->size()) == k);
  }
  if (!backend().quantise(read, columns ? columns->data() : nullptr, to, index, to_row, rows))
    refuse(checkpoint_.file_of(name), name);
}

bool CheckpointPanels::take_codes(const QuantisedPlace& place, const std::string& name, int64_t first,
                                  int64_t rows, const View& to, int64_t index, int64_t to_row) {
  const std::optional<MappedBlocks> stored = checkpoint_.blocks(name);
  if (!stored || !is_exact(*stored, to, place.source_rows())) return false;
  if (!pack_blocks(*stored, first, rows, backend(), to, index, to_row))
    refuse(checkpoint_.file_of(name), name);
  return true;
}

void CheckpointPanels::made(const QuantisedPlace& place, const QuantisedPiece& piece) {
  if (place.stride > 0) {
    if (piece.matrix + piece.matrices == place.matrices()) checkpoint_.release(place.source);
    return;
  }
  if (piece.row + piece.rows < place.rows()) return;
  for (int64_t i = 0; i < piece.matrices; ++i) checkpoint_.release(place.source_of(piece.matrix + i));
}

}  // namespace latente
