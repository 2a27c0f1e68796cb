#include "model/gguf.h"

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "checkpoint/copy.h"
#include "checkpoint/json.h"
#include "model/gguf_names.h"
#include "model/moe.h"

namespace latente {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view extension = ".gguf";

// "x-00001-of-00003.gguf", 2 → "x-00002-of-00003.gguf"; Error unless the path is that of the first of
// `count`.
std::string path_of_split(const std::string& first, int64_t index, int64_t count) {
  std::string end = fmt::format("-{:05}-of-{:05}{}", 1, count, extension);
  if (!first.ends_with(end))
    fail("{}: expected a name that ends in {}, as the first of {} files has", first, end, count);
  return first.substr(0, first.size() - end.size()) +
         fmt::format("-{:05}-of-{:05}{}", index + 1, count, extension);
}

std::optional<DType> dtype_of_type(GgmlType type) {
  if (type == GgmlType::f32) return DType::f32;
  if (type == GgmlType::f16) return DType::f16;
  if (type == GgmlType::bf16) return DType::bf16;
  return std::nullopt;
}

// Files leave out outer axes of one element.
bool same_but_ones(const Shape& a, const Shape& b) {
  auto significant = [](const Shape& shape) {
    int axis = 0;
    while (axis + 1 < shape.rank() && shape[axis] == 1) ++axis;
    return axis;
  };
  int i = significant(a), j = significant(b);
  if (a.rank() - i != b.rank() - j) return false;
  for (; i < a.rank(); ++i, ++j) {
    if (a[i] != b[j]) return false;
  }
  return true;
}

}  // namespace

bool is_gguf(const std::string& path) {
  std::error_code error;
  if (!fs::is_regular_file(path, error)) return false;
  if (path.ends_with(extension)) return true;
  std::ifstream file(path, std::ios::binary);
  char magic[4] = {};
  file.read(magic, sizeof(magic));
  return std::string_view(magic, sizeof(magic)) == "GGUF";
}

GgufCheckpoint::GgufCheckpoint(const std::string& path) {
  files_.push_back(std::make_shared<GgufFile>(path));
  open_others();
  read_descriptions();
}

GgufCheckpoint::GgufCheckpoint(GgufFile file) {
  files_.push_back(std::make_shared<GgufFile>(std::move(file)));
  read_descriptions();
}

void GgufCheckpoint::open_others() {
  const std::string& path = file().path();
  const int64_t count = file().integer("split.count").value_or(1),
                number = file().integer("split.no").value_or(0);
  if (number != 0) fail("{}: split.no: expected 0, of the first file, found {}", path, number);
  if (count < 1 || count > 99999) fail("{}: split.count: expected 1 to 99999, found {}", path, count);
  for (int64_t i = 1; i < count; ++i) {
    files_.push_back(std::make_shared<GgufFile>(path_of_split(path, i, count)));
    const int64_t found = files_.back()->integer_at("split.no");
    if (found != i) fail("{}: split.no: expected {}, found {}", files_.back()->path(), i, found);
  }
}

void GgufCheckpoint::read_descriptions() {
  for (size_t i = 0; i < files_.size(); ++i) {
    for (const GgufTensor& tensor : files_[i]->tensors()) {
      if (!stored_.emplace(tensor.name, Stored{&tensor, i}).second)
        fail("{}: tensor {} is also in another of the files", files_[i]->path(), printable(tensor.name));
    }
  }
  const int64_t tensors = static_cast<int64_t>(stored_.size());
  const int64_t expected = file().integer("split.tensors.count").value_or(tensors);
  if (expected != tensors)
    fail("{}: split.tensors.count: expected the {} tensors of all {} files, found {}", file().path(), tensors,
         files_.size(), expected);
  config_ = gguf_config(file(), [this](std::string_view name) { return find(name); });
  name_parts();
}

const GgufTensor* GgufCheckpoint::find(std::string_view gguf) const {
  auto found = stored_.find(gguf);
  return found == stored_.end() ? nullptr : found->second.tensor;
}

void GgufCheckpoint::wrong_shape(const Stored& stored, const std::string& expected) const {
  fail("{}: {}: expected {}, found {}", files_[stored.file]->path(), stored.tensor->name, expected,
       stored.tensor->shape.str());
}

void GgufCheckpoint::name_parts() {
  for (size_t i = 0; i < files_.size(); ++i) {
    for (const GgufTensor& tensor : files_[i]->tensors()) {
      if (tensor.shape.count() == 0)
        fail("{}: tensor {} is empty", files_[i]->path(), printable(tensor.name));
      name_part({&tensor, i});
    }
  }
}

void GgufCheckpoint::name_part(const Stored& stored) {
  const std::string& gguf = stored.tensor->name;
  const std::optional<std::string> known = name_of_gguf(gguf);
  if (!known)
    fail("{}: tensor {}: the architecture deepseek2 has none of this name", files_[stored.file]->path(),
         printable(gguf));
  const std::string& name = *known;
  if (is_expert_stack(name)) return name_experts(name, stored);
  constexpr std::string_view keys = "self_attn.k_b_proj.weight", values = "self_attn.v_b_proj.weight";
  if (!name.ends_with(keys) && !name.ends_with(values)) {
    return add(name, {stored, {}, 0, stored.tensor->shape});
  }
  const std::string layer = name.substr(0, name.size() - keys.size()),
                    both = layer + "self_attn.kv_b_proj.weight";
  if (find(gguf_name_of(both))) return;
  const std::string other = gguf_name_of(layer + std::string(name.ends_with(keys) ? values : keys));
  if (!find(other)) fail("{}: no tensor {} beside {}", files_[stored.file]->path(), other, gguf);
  if (name.ends_with(keys)) name_latent_parts(both, stored, stored_.at(other));
}

void GgufCheckpoint::add(const std::string& name, const Part& part) {
  if (!parts_.emplace(name, part).second)
    fail("{}: {}: holds {}, which another tensor holds too", files_[part.stored.file]->path(),
         part.stored.tensor->name, name);
}

// The rows of [experts, rows, columns], expert by expert; of a stack of gates and ups, gates come first in
// each.
void GgufCheckpoint::name_experts(const std::string& stack, const Stored& stored) {
  const GgufTensor& tensor = *stored.tensor;
  int64_t experts = config_.n_routed_experts;
  size_t fused = stack.find("gate_up_proj");
  int64_t kinds = fused == stack.npos ? 1 : 2;
  if (experts == 0 || tensor.shape != Shape{experts, tensor.rows() / experts, tensor.columns()}) {
    bool one = experts == 1 && tensor.shape.rank() == 2;  // whose axis is left out
    if (!one) wrong_shape(stored, fmt::format("a stack of {} experts", experts));
  }
  int64_t rows = tensor.rows() / experts / kinds;
  if (rows * kinds * experts != tensor.rows()) wrong_shape(stored, "gates and ups of the same height");
  for (int64_t e = 0; e < experts; ++e) {
    for (int64_t kind = 0; kind < kinds; ++kind) {
      std::string path = stack;
      if (kinds == 2) path.replace(fused, 12, kind == 0 ? "gate_proj" : "up_proj");
      int64_t first = (e * kinds + kind) * rows;
      add(expert_path(path, e), {stored, {}, first, Shape{rows, tensor.columns()}});
    }
  }
}

// attn_k_b [heads, kv_lora_rank, nope] and attn_v_b [heads, v, kv_lora_rank] as [heads · (nope + v),
// kv_lora_rank].
void GgufCheckpoint::name_latent_parts(const std::string& name, const Stored& keys, const Stored& values) {
  int64_t heads = config_.num_attention_heads, rank = config_.kv_lora_rank;
  auto check = [&](const Stored& stored, const Shape& shape) {
    // Some converters fold heads and rows into one axis.
    if (stored.tensor->columns() != shape[2] || stored.tensor->rows() != shape[0] * shape[1])
      wrong_shape(stored, shape.str());
  };
  check(keys, {heads, rank, config_.qk_nope_head_dim});
  check(values, {heads, config_.v_head_dim, rank});
  Shape shape{heads * (config_.qk_nope_head_dim + config_.v_head_dim), rank};
  add(name, {keys, values, 0, shape});
  for (const Stored& half : {keys, values})
    halves_.emplace(*name_of_gguf(half.tensor->name),
                    Part{half, {}, 0, Shape{half.tensor->rows(), half.tensor->columns()}});
}

std::vector<std::string> GgufCheckpoint::names() const {
  std::vector<std::string> names;
  names.reserve(parts_.size());
  for (const auto& [name, part] : parts_) names.push_back(name);
  std::sort(names.begin(), names.end());
  return names;
}

const GgufCheckpoint::Part& GgufCheckpoint::part(std::string_view name) const {
  for (const auto* parts : {&parts_, &halves_}) {
    auto found = parts->find(std::string(name));
    if (found != parts->end()) return found->second;
  }
  std::string gguf = gguf_name_of(name);
  fail("{}: no tensor {}{}", file().path(), gguf.empty() ? printable(name) : gguf,
       gguf.empty() ? "" : fmt::format(" for {}", name));
}

const std::string& GgufCheckpoint::file_of(std::string_view name) const {
  return files_[part(name).stored.file]->path();
}

std::optional<DType> GgufCheckpoint::dtype_in_file(std::string_view name) const {
  return dtype_of_type(part(name).stored.tensor->type);
}

std::optional<MappedBlocks> GgufCheckpoint::blocks(std::string_view name) const {
  if (!contains(name) && !halves_.contains(std::string(name))) return std::nullopt;
  const Part& found = part(name);
  const GgufTensor& tensor = *found.stored.tensor;
  if (found.values.tensor || !can_decode(tensor.type)) return std::nullopt;
  int64_t rows = found.shape.count() / std::max<int64_t>(found.shape[-1], 1);
  std::span<const std::byte> bytes =
      tensor.data.subspan(static_cast<size_t>(found.first_row * tensor.row_bytes()),
                          static_cast<size_t>(rows * tensor.row_bytes()));
  const std::shared_ptr<GgufFile>& file = files_[found.stored.file];
  return MappedBlocks{tensor.type, found.shape, bytes, file, &file->file()};
}

std::optional<MappedTensor> GgufCheckpoint::map(std::string_view name) const {
  std::optional<MappedBlocks> found = blocks(name);
  if (!found) return std::nullopt;
  std::optional<DType> type = dtype_of_type(found->type);
  if (!type || reinterpret_cast<uintptr_t>(found->bytes.data()) % static_cast<size_t>(size_of(*type)) != 0)
    return std::nullopt;
  return MappedTensor{View(const_cast<std::byte*>(found->bytes.data()), found->shape, *type), found->owner,
                      nullptr};
}

void GgufCheckpoint::release(std::string_view name) const {
  const Part& found = part(name);
  const auto give_back = [&](const Stored& stored, int64_t first_row, int64_t rows) {
    const MappedFile& file = files_[stored.file]->file();
    const GgufTensor& tensor = *stored.tensor;
    if (file.size() == 0) return;  // bytes of the caller's
    file.advise(
        MappedFile::Advice::dont_need,
        static_cast<size_t>(tensor.data.data() - file.bytes().data() + first_row * tensor.row_bytes()),
        static_cast<size_t>(rows * tensor.row_bytes()));
  };
  if (!found.values.tensor)
    return give_back(found.stored, found.first_row, found.shape.count() / found.stored.tensor->columns());
  give_back(found.stored, 0, found.stored.tensor->rows());
  give_back(found.values, 0, found.values.tensor->rows());
}

const GgufCheckpoint::Part& GgufCheckpoint::part_of_shape(const std::string& name, const Shape& shape) const {
  const Part& found = part(name);
  const std::string& path = files_[found.stored.file]->path();
  if (!same_but_ones(found.shape, shape))
    fail("{}: expected {}, found {} in {} ({})", name, shape.str(), found.shape.str(), path,
         found.stored.tensor->name);
  for (const Stored& stored : {found.stored, found.values}) {
    if (stored.tensor && !can_decode(stored.tensor->type))
      fail("{}: {}: cannot decode elements of type {}", path, stored.tensor->name,
           name_of(stored.tensor->type));
  }
  return found;
}

void GgufCheckpoint::read(const std::string& name, const View& target) const {
  const Part& found = part_of_shape(name, target.shape);
  if (found.values.tensor) return decode_latent(found, 0, target);
  decode_rows(found, 0, target, name);
}

void GgufCheckpoint::read_rows(const std::string& name, int64_t rows, int64_t first,
                               const View& target) const {
  LATENTE_ASSERT(target.shape.rank() == 2 && first >= 0 && first + target[0] <= rows);
  const Part& found = part_of_shape(name, {rows, target[1]});
  if (found.values.tensor) return decode_latent(found, first, target);
  decode_rows(found, first, target, name);
}

void GgufCheckpoint::decode_rows(const Part& found, int64_t first, const View& target,
                                 const std::string& name) const {
  constexpr int64_t piece = 1 << 16;  // values decoded at a time
  const GgufTensor& tensor = *found.stored.tensor;
  const int64_t columns = tensor.columns();
  if (target.count() == 0) return;
  const int64_t rows = target.count() / columns, at_once = std::clamp<int64_t>(piece / columns, 1, rows);
  const std::byte* from = tensor.data.data() + (found.first_row + first) * tensor.row_bytes();
  if (target.dtype == DType::f32 && target.contiguous())
    return decode(tensor.type, from, target.count(), target.as<float>());
  std::vector<float> values(static_cast<size_t>(at_once * columns));
  const int64_t row_axis = target.shape.rank() - 2;  // -1: a vector
  LATENTE_ASSERT(row_axis < 1 || target.contiguous());
  for (int64_t row = 0; row < rows; row += at_once) {
    const int64_t count = std::min(at_once, rows - row);
    decode(tensor.type, from + row * tensor.row_bytes(), count * columns, values.data());
    const int64_t stride = row_axis == 0 ? target.stride(0) : columns;
    View to(static_cast<std::byte*>(target.data) + row * stride * size_of(target.dtype),
            Shape{count, columns}, target.dtype);
    to.strides = {stride, target.stride(-1)};
    copy_into(DType::f32, reinterpret_cast<const std::byte*>(values.data()), to, name);
  }
}

// Head by head: of those that the rows touch.
void GgufCheckpoint::decode_latent(const Part& found, int64_t first, const View& target) const {
  const int64_t rank = config_.kv_lora_rank, nope = config_.qk_nope_head_dim, v = config_.v_head_dim;
  const int64_t height = nope + v, last = first + target[0];
  const GgufTensor &keys = *found.stored.tensor, &values = *found.values.tensor;
  std::vector<float> transposed(static_cast<size_t>(rank * nope)), both(static_cast<size_t>(height * rank));
  for (int64_t h = first / height; h * height < last; ++h) {
    decode(keys.type, keys.data.data() + h * rank * keys.row_bytes(), rank * nope, transposed.data());
    for (int64_t i = 0; i < nope; ++i) {
      for (int64_t c = 0; c < rank; ++c)
        both[static_cast<size_t>(i * rank + c)] = transposed[static_cast<size_t>(c * nope + i)];
    }
    decode(values.type, values.data.data() + h * v * values.row_bytes(), v * rank, both.data() + nope * rank);
    const int64_t begin = std::max(first, h * height), end = std::min(last, (h + 1) * height);
    View to(static_cast<std::byte*>(target.data) + (begin - first) * target.stride(0) * size_of(target.dtype),
            Shape{end - begin, rank}, target.dtype);
    to.strides = {target.stride(0), target.stride(1)};
    copy_into(DType::f32, reinterpret_cast<const std::byte*>(both.data() + (begin - h * height) * rank), to,
              keys.name);
  }
}

}  // namespace latente
