#include "checkpoint/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>

#include "checkpoint/copy.h"
#include "checkpoint/json.h"
#include "checkpoint/safetensors_header.h"

namespace latente {

static_assert(std::endian::native == std::endian::little, "safetensors data is little-endian");

namespace {

// Bytes of a tensor, or nothing when the product overflows. Zero extents do not hide an overflow of the
// others, which strides would meet.
std::optional<int64_t> checked_bytes(const std::vector<int64_t>& extents, int64_t bits) {
  int64_t product = bits;
  bool empty = false;
  for (int64_t extent : extents) {
    empty = empty || extent == 0;
    if (__builtin_mul_overflow(product, std::max<int64_t>(extent, 1), &product)) return std::nullopt;
  }
  if (empty) return 0;
  if (product % 8 != 0) return std::nullopt;
  return product / 8;
}

// A tensor's name or the metadata as JSON.
std::string quoted(const nlohmann::json& value, const std::string& path) {
  try {
    return value.dump();
  } catch (const nlohmann::json::type_error&) {
    fail("{}: a tensor name or metadata is not UTF-8", path);
  }
}

}  // namespace

Shape SafetensorsEntry::shape() const {
  if (extents.empty()) return Shape{1};
  if (extents.size() > max_rank)
    fail("{}: expected at most {} axes, found {}", name, max_rank, extents.size());
  return Shape(std::span<const int64_t>(extents));
}

void check_shape(const SafetensorsEntry& entry, const Shape& expected, const std::string& file) {
  if (entry.extents.size() <= max_rank && entry.shape() == expected) return;
  fail("{}: expected {}, found [{}] in {}", entry.name, expected.str(), fmt::join(entry.extents, ", "), file);
}

SafetensorsFile::SafetensorsFile(const std::string& path) : label_(path), file_(path) {
  parse(file_.bytes());
}

SafetensorsFile::SafetensorsFile(std::span<const std::byte> bytes, std::string label)
    : label_(std::move(label)) {
  parse(bytes);
}

void SafetensorsFile::parse(std::span<const std::byte> bytes) {
  if (bytes.size() < 8) fail("{}: expected at least 8 bytes, found {}", label_, bytes.size());
  uint64_t header_bytes;
  std::memcpy(&header_bytes, bytes.data(), 8);
  if (header_bytes > max_safetensors_header)
    fail("{}: expected a header of at most {} bytes, found a length of {}", label_, max_safetensors_header,
         header_bytes);
  if (header_bytes > bytes.size() - 8)
    fail("{}: expected a header of {} bytes, found {} bytes after its length", label_, header_bytes,
         bytes.size() - 8);

  std::string_view text(reinterpret_cast<const char*>(bytes.data()) + 8, header_bytes);
  SafetensorsHeader header = parse_safetensors_header(text, label_);
  metadata_ = std::move(header.metadata);

  std::span<const std::byte> data = bytes.subspan(8 + header_bytes);
  std::vector<SafetensorsHeader::Tensor>& tensors = header.tensors;
  std::stable_sort(tensors.begin(), tensors.end(),
                   [](const auto& a, const auto& b) { return a.offsets < b.offsets; });
  int64_t covered = 0, size = static_cast<int64_t>(data.size());
  entries_.reserve(tensors.size());
  index_.reserve(tensors.size());
  for (SafetensorsHeader::Tensor& each : tensors) {
    SafetensorsEntry& entry = each.entry;
    int64_t begin = each.offsets[0], end = each.offsets[1];
    std::optional<int64_t> expected = checked_bytes(each.entry.extents, each.bits);
    if (!expected)
      fail("{}: tensor {}: [{}] of {} is not a size in bytes", label_, printable(entry.name),
           fmt::join(entry.extents, ", "), entry.dtype_name);
    if (begin > end || end > size)
      fail("{}: tensor {}: expected offsets within {} bytes of data, found {} to {}", label_,
           printable(entry.name), size, begin, end);
    if (end - begin != *expected)
      fail("{}: tensor {}: expected {} bytes for [{}] of {}, found {}", label_, printable(entry.name),
           *expected, fmt::join(entry.extents, ", "), entry.dtype_name, end - begin);
    if (begin != covered)
      fail("{}: tensor {}: expected data from byte {} on, found {} ({})", label_, printable(entry.name),
           covered, begin, begin < covered ? "an overlap" : "a gap");
    covered = end;
    entry.data = data.data() + begin;
    entry.bytes = end - begin;
    entries_.push_back(std::move(entry));
    if (!index_.emplace(entries_.back().name, entries_.size() - 1).second)
      fail("{}: duplicate tensor {}", label_, printable(entries_.back().name));
  }
  if (covered != size) fail("{}: expected {} bytes of data, found {}", label_, covered, size);
}

const SafetensorsEntry* SafetensorsFile::find(std::string_view name) const {
  auto found = index_.find(name);
  return found == index_.end() ? nullptr : &entries_[found->second];
}

const SafetensorsEntry& SafetensorsFile::at(std::string_view name) const {
  const SafetensorsEntry* entry = find(name);
  if (!entry) fail("{}: no tensor {}", label_, printable(name));
  return *entry;
}

std::optional<View> SafetensorsFile::try_view(const SafetensorsEntry& entry) const {
  if (!entry.dtype || entry.extents.size() > max_rank) return std::nullopt;
  if (reinterpret_cast<uintptr_t>(entry.data) % static_cast<size_t>(size_of(*entry.dtype)) != 0)
    return std::nullopt;
  return View(const_cast<std::byte*>(entry.data), entry.shape(), *entry.dtype);
}

View SafetensorsFile::view(std::string_view name) const {
  const SafetensorsEntry& entry = at(name);
  std::optional<View> view = try_view(entry);
  if (view) return *view;
  if (!entry.dtype) fail("{}: {}: cannot use elements of type {}", label_, entry.name, entry.dtype_name);
  entry.shape();
  fail("{}: {}: the data is not aligned to {} bytes", label_, entry.name, size_of(*entry.dtype));
}

void SafetensorsFile::read(std::string_view name, const View& target) const {
  const SafetensorsEntry& entry = at(name);
  if (!entry.dtype) fail("{}: {}: cannot use elements of type {}", label_, entry.name, entry.dtype_name);
  check_shape(entry, target.shape, label_);
  copy_into(*entry.dtype, entry.data, target, entry.name);
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<TensorSpec> specs,
                                     const Metadata& metadata, SafetensorsOrder layout)
    : specs_(std::move(specs)), file_(path), remaining_(specs_.size()) {
  std::vector<size_t> order(specs_.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  if (layout == SafetensorsOrder::by_element)
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return size_of(specs_[a].dtype) > size_of(specs_[b].dtype); });

  std::string text = "{";
  if (!metadata.empty())
    text += fmt::format("\"{}\":{}", safetensors_metadata_key, quoted(nlohmann::json(metadata), path));
  int64_t offset = 0;
  for (size_t i : order) {
    const TensorSpec& spec = specs_[i];
    LATENTE_ASSERT(spec.shape.rank() > 0);
    if (has_control_character(spec.name))
      fail("{}: tensor name {} has a control character", path, printable(spec.name));
    if (spec.name == safetensors_metadata_key)
      fail("{}: {} cannot name a tensor", path, safetensors_metadata_key);
    if (!slots_.emplace(spec.name, Slot{offset, i, spec.bytes(), false}).second)
      fail("{}: duplicate tensor {}", path, spec.name);
    std::string extents;
    for (int axis = 0; axis < spec.shape.rank(); ++axis)
      extents += fmt::format("{}{}", axis ? "," : "", spec.shape[axis]);
    text += fmt::format("{}{}:{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}",
                        text.size() > 1 ? "," : "", quoted(nlohmann::json(spec.name), path),
                        safetensors_name(spec.dtype), extents, offset, offset + spec.bytes());
    offset += spec.bytes();
  }
  text += "}";
  text.append((64 - (8 + text.size()) % 64) % 64, ' ');
  if (text.size() > max_safetensors_header)
    fail("{}: expected a header of at most {} bytes, found {}", path, max_safetensors_header, text.size());

  int64_t begin = 8 + static_cast<int64_t>(text.size());
  for (auto& [name, slot] : slots_) slot.offset += begin;
  file_.reserve(begin + offset);
  uint64_t length = text.size();
  file_.write(std::as_bytes(std::span(&length, 1)));
  file_.write(text);
}

SafetensorsWriter::Slot& SafetensorsWriter::slot_of(const std::string& name) {
  auto found = slots_.find(name);
  if (found == slots_.end()) fail("{}: tensor {} was not declared", file_.path(), printable(name));
  if (found->second.written) fail("{}: tensor {} is written twice", file_.path(), name);
  return found->second;
}

void SafetensorsWriter::write(const std::string& name, const View& view) {
  Slot& slot = slot_of(name);
  const TensorSpec& spec = specs_[slot.spec];
  if (view.shape != spec.shape)
    fail("{}: {}: expected {}, found {}", file_.path(), name, spec.shape.str(), view.shape.str());
  int64_t offset = slot.offset;
  copy_out(view, spec.dtype, name, [&](std::span<const std::byte> bytes) {
    file_.write_at(offset, bytes);
    offset += static_cast<int64_t>(bytes.size());
  });
  slot.written = true;
  --remaining_;
}

void SafetensorsWriter::write_part(const std::string& name, int64_t offset,
                                   std::span<const std::byte> bytes) {
  Slot& slot = slot_of(name);
  const int64_t size = static_cast<int64_t>(bytes.size()), all = specs_[slot.spec].bytes();
  if (offset < 0 || size > slot.missing || offset > all - size)
    fail("{}: {}: expected {} bytes in all, found {} at byte {} with {} missing", file_.path(), name, all,
         size, offset, slot.missing);
  file_.write_at(slot.offset + offset, bytes);
  slot.missing -= size;
  if (slot.missing > 0) return;
  slot.written = true;
  --remaining_;
}

bool SafetensorsWriter::written(const std::string& name) const {
  auto found = slots_.find(name);
  return found != slots_.end() && found->second.written;
}

void SafetensorsWriter::commit() {
  for (const TensorSpec& spec : specs_) {
    if (!written(spec.name)) fail("{}: tensor {} was declared but not written", file_.path(), spec.name);
  }
  file_.commit();
}

}  // namespace latente
