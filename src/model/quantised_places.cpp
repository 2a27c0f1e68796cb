#include "model/quantised_places.h"

#include <algorithm>

#include "tensor/panels.h"
#include "tensor/quantise.h"

namespace latente {
namespace {

constexpr int64_t piece_elements = 32 << 20;
constexpr int64_t task_elements = 1 << 16;

bool is_kept(const std::string& path, const Tensor& tensor) {
  return tensor.shape().rank() < 2 || path.ends_with("embed_tokens.weight") ||
         path.ends_with("mlp.gate.weight") || path.ends_with("eh_proj.weight") || path.ends_with(".bias");
}

class Planning {
 public:
  Planning(Transformer& model, Backend& backend, const QuantisedOptions& options)
      : model_(model), backend_(backend), options_(options) {
    if (!is_quantised(options.type) || !is_quantised(options.mtp) || options.group % 32 != 0 ||
        options.group < least_group || options.group > most_group) {
      fail(
          "quantised weights: expected q8 or q4 and a group of 32, 64, ... 256 elements, found {}, {} and {}",
          name_of(options.type), name_of(options.mtp), options.group);
    }
  }

  QuantisedPlaces plan() {
    model_.for_each([&](const std::string& path, Tensor& tensor) { plan(path, tensor); });
    for (size_t i = 0; i < model_.model.layers.size(); ++i)
      plan_absorbed(model_.model.layers[i], "model.layers." + std::to_string(i), options_.type);
    for (size_t k = 0; k < model_.mtp.size(); ++k)
      plan_absorbed(model_.mtp[k].layer, model_.mtp_path(static_cast<int64_t>(k)), mtp_type());
    return std::move(result_);
  }

 private:
  // Drafts of 4 bits are hardly ever right, and 8 gain nothing on a model of 8.
  DType mtp_type() const { return options_.type == DType::q8 ? DType::q8 : options_.mtp; }

  void plan(const std::string& path, Tensor& tensor) {
    if (is_kept(path, tensor)) {
      result_.kept.emplace_back(path, tensor);
      return;
    }
    bool in_module = false;
    for (size_t k = 0; k < model_.mtp.size(); ++k)
      in_module |= path.starts_with(model_.mtp_path(static_cast<int64_t>(k)) + ".");
    add({.path = path, .source = path, .tensor = tensor, .view = {}}, in_module ? mtp_type() : options_.type);
  }

  void plan_absorbed(Layer& layer, const std::string& path, DType type) {
    Mla* mla = std::get_if<Mla>(&layer.self_attn);
    if (!mla) return;
    const int64_t stride = mla->nope_dim + mla->v_dim;
    mla->w_uk = parameter({mla->heads, mla->kv_rank, mla->nope_dim}, type, false);
    mla->w_uv = parameter({mla->heads, mla->v_dim, mla->kv_rank}, type, false);
    const std::string source = path + ".self_attn.kv_b_proj.weight";
    add({.path = path + ".self_attn.w_uk",
         .source = source,
         .tensor = mla->w_uk,
         .view = {},
         .stride = stride,
         .transposed = true},
        type);
    add({.path = path + ".self_attn.w_uv",
         .source = source,
         .tensor = mla->w_uv,
         .view = {},
         .first = mla->nope_dim,
         .stride = stride},
        type);
  }

  void add(QuantisedPlace place, DType type) {
    // Short rows in short groups: what is beyond a row's end takes memory too.
    int64_t group = options_.group;
    while (group > least_group && group / 2 >= place.tensor[-1]) group /= 2;
    const auto form = backend_.quantised(place.tensor.shape(), type, group);
    if (!form) fail("{} cannot run weights of type {}", backend_.name(), name_of(type));
    place.view = form->view;
    place.bytes = form->bytes;
    result_.places.push_back(std::move(place));
  }

  Transformer& model_;
  Backend& backend_;
  const QuantisedOptions& options_;
  QuantisedPlaces result_;
};

}  // namespace

std::string QuantisedPlace::source_of(int64_t i) const {
  return is_expert_stack(source) ? expert_path(source, i) : source;
}

QuantisedPlaces quantised_places(Transformer& model, Backend& backend, const QuantisedOptions& options) {
  return Planning(model, backend, options).plan();
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
  return backend_.quantised({piece.matrices, piece.rows, view[-1]}, view.dtype, view.group)->bytes;
}

void QuantisedPanels::make(const QuantisedPlace& place, const QuantisedPiece& piece, void* panels) {
  const View& view = place.view;
  const int64_t k = place.columns();
  View to = backend_.quantised({piece.matrices, piece.rows, k}, view.dtype, view.group)->view;
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
  const std::vector<float>* columns = nullptr;
  if (importance_ && !place.transposed) {  // whose columns are another product's
    const auto found = importance_->find(name);
    if (found != importance_->end()) columns = &found->second;
    LATENTE_ASSERT(!columns || static_cast<int64_t>(columns->size()) == k);
  }
  if (!backend().quantise(place.transposed ? turned.data() : values.data(),
                          columns ? columns->data() : nullptr, to, index, to_row, rows))
    fail("{}: {}: expected finite values that 8 or 4 bits can hold", checkpoint_.file_of(name), name);
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
