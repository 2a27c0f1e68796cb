#include "checkpoint/safetensors_header.h"

#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "checkpoint/json.h"

namespace latente {

namespace {

constexpr size_t max_stored_rank = 8;

struct StoredType {
  std::string_view name;
  int64_t bits;
  std::optional<DType> type;
};

constexpr StoredType stored_types[] = {
    {"F64", 64, DType::f64},          {"F32", 32, DType::f32},       {"BF16", 16, DType::bf16},
    {"F16", 16, DType::f16},          {"F8_E4M3", 8, DType::f8e4m3}, {"I64", 64, DType::i64},
    {"I32", 32, DType::i32},          {"U8", 8, DType::u8},          {"BOOL", 8, DType::u8},
    {"I8", 8, std::nullopt},          {"I16", 16, std::nullopt},     {"U16", 16, std::nullopt},
    {"U32", 32, std::nullopt},        {"U64", 64, std::nullopt},     {"C64", 64, std::nullopt},
    {"F8_E5M2", 8, std::nullopt},     {"F8_E8M0", 8, std::nullopt},  {"F8_E4M3FNUZ", 8, std::nullopt},
    {"F8_E5M2FNUZ", 8, std::nullopt}, {"F6_E2M3", 6, std::nullopt},  {"F6_E3M2", 6, std::nullopt},
    {"F4", 4, std::nullopt},
};

const StoredType* stored_type(std::string_view name) {
  for (const StoredType& type : stored_types) {
    if (type.name == name) return &type;
  }
  return nullptr;
}

// Builds the entries as the parser meets them. Every value is only accepted where the format has it, so
// nesting is bounded and nothing is kept that is not needed.
class HeaderReader final : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderReader(const std::string& label) : label_(label) {}

  SafetensorsHeader take() { return std::move(header_); }

  bool null() override { unexpected("null"); }
  bool boolean(bool) override { unexpected("a boolean"); }
  bool number_integer(number_integer_t value) override { unexpected(fmt::format("{}", value)); }
  bool number_float(number_float_t, const string_t& text) override { unexpected(printable(text)); }
  bool binary(binary_t&) override { unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (at_ != At::shape && at_ != At::offsets) unexpected(fmt::format("{}", value));
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max()))
      fail("{}: tensor {}: {} is too large", label_, name(), value);
    std::vector<int64_t>& list = at_ == At::shape ? current().entry.extents : current().offsets;
    size_t limit = at_ == At::shape ? max_stored_rank : 2;
    if (list.size() == limit)
      fail("{}: tensor {}: expected {} {}, found more", label_, name(), limit,
           at_ == At::shape ? "extents at most" : "offsets");
    list.push_back(static_cast<int64_t>(value));
    return true;
  }

  bool string(string_t& value) override {
    if (at_ == At::metadata_value) {
      metadata_slot_->swap(value);
      at_ = At::metadata;
      return true;
    }
    if (at_ != At::dtype) unexpected(printable(value));
    const StoredType* type = stored_type(value);
    if (!type) fail("{}: tensor {}: unknown dtype {}", label_, name(), printable(value));
    current().entry.dtype_name = type->name;
    current().entry.dtype = type->type;
    current().bits = type->bits;
    at_ = At::tensor;
    return true;
  }

  bool start_object(std::size_t) override {
    switch (at_) {
      case At::start:
        at_ = At::file;
        return true;
      case At::metadata_object:
        at_ = At::metadata;
        return true;
      case At::tensor_object:
        at_ = At::tensor;
        return true;
      default:
        unexpected("an object");
    }
  }

  bool end_object() override {
    if (at_ == At::tensor) {
      const SafetensorsHeader::Tensor& entry = current();
      if (!entry.has_dtype || !entry.has_shape || !entry.has_offsets)
        fail("{}: tensor {}: no {}", label_, name(),
             !entry.has_dtype ? "dtype" : (!entry.has_shape ? "shape" : "data_offsets"));
    }
    at_ = at_ == At::file ? At::end : At::file;
    return true;
  }

  bool start_array(std::size_t) override {
    if (at_ != At::shape_array && at_ != At::offsets_array) unexpected("an array");
    at_ = at_ == At::shape_array ? At::shape : At::offsets;
    return true;
  }

  bool end_array() override {
    if (at_ == At::offsets && current().offsets.size() != 2)
      fail("{}: tensor {}: expected 2 data_offsets, found {}", label_, name(), current().offsets.size());
    at_ = At::tensor;
    return true;
  }

  bool key(string_t& text) override {
    if (at_ == At::file) {
      if (text == safetensors_metadata_key) {
        if (std::exchange(has_metadata_, true))
          fail("{}: duplicate key {}", label_, safetensors_metadata_key);
        at_ = At::metadata_object;
        return true;
      }
      if (has_control_character(text))
        fail("{}: tensor name {} has a control character", label_, printable(text));
      header_.tensors.emplace_back();
      header_.tensors.back().entry.name.swap(text);
      at_ = At::tensor_object;
      return true;
    }
    if (at_ == At::metadata) {
      auto [place, added] = header_.metadata.emplace(std::move(text), std::string());
      if (!added)
        fail("{}: duplicate key {} in {}", label_, printable(place->first), safetensors_metadata_key);
      metadata_slot_ = &place->second;
      at_ = At::metadata_value;
      return true;
    }
    SafetensorsHeader::Tensor& entry = current();
    bool* seen = nullptr;
    if (text == "dtype") {
      seen = &entry.has_dtype;
      at_ = At::dtype;
    } else if (text == "shape") {
      seen = &entry.has_shape;
      at_ = At::shape_array;
    } else if (text == "data_offsets") {
      seen = &entry.has_offsets;
      at_ = At::offsets_array;
    } else {
      fail("{}: tensor {}: unknown key {}", label_, name(), printable(text));
    }
    if (std::exchange(*seen, true)) fail("{}: tensor {}: duplicate key {}", label_, name(), printable(text));
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::json::exception& error) override {
    bool encoding = std::string_view(error.what()).find("UTF-8") != std::string_view::npos;
    fail("{}: the header is not {} at its byte {}", label_, encoding ? "UTF-8" : "valid JSON", position);
  }

 private:
  enum class At {
    start,
    file,             // between the entries
    metadata_object,  // before "{"
    metadata,
    metadata_value,
    tensor_object,  // before "{"
    tensor,
    dtype,
    shape_array,  // before "["
    shape,
    offsets_array,  // before "["
    offsets,
    end
  };

  [[noreturn]] void unexpected(const std::string& what) const {
    static constexpr std::string_view expected[] = {"an object",
                                                    "a key",
                                                    "an object",
                                                    "a key",
                                                    "a string",
                                                    "an object",
                                                    "a key",
                                                    "a dtype string",
                                                    "an array of extents",
                                                    "an unsigned extent",
                                                    "an array of 2 offsets",
                                                    "an unsigned offset",
                                                    "the end"};
    std::string where;
    if (at_ == At::metadata_object || at_ == At::metadata_value) {
      where = fmt::format("{}: ", safetensors_metadata_key);
    } else if (!header_.tensors.empty()) {
      where = fmt::format("tensor {}: ", name());
    }
    fail("{}: {}expected {}, found {}", label_, where, expected[static_cast<int>(at_)], what);
  }

  SafetensorsHeader::Tensor& current() { return header_.tensors.back(); }
  std::string name() const { return printable(header_.tensors.back().entry.name); }

  const std::string& label_;
  SafetensorsHeader header_;
  At at_ = At::start;
  bool has_metadata_ = false;
  std::string* metadata_slot_ = nullptr;
};

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view text, const std::string& label) {
  if (!text.starts_with('{')) fail("{}: expected a header that starts with '{{'", label);
  // The JSON parser takes a NUL byte for the end of its input.
  if (size_t nul = text.find('\0'); nul != text.npos)
    fail("{}: the header is not valid JSON at its byte {}: a NUL byte", label, nul);
  HeaderReader reader(label);
  nlohmann::json::sax_parse(text.begin(), text.end(), &reader);
  return reader.take();
}

std::string_view safetensors_name(DType type) {
  for (const StoredType& stored : stored_types) {
    if (stored.type == type) return stored.name;
  }
  return {};
}

}  // namespace latente
