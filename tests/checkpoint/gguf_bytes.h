// GGUF bytes put together by hand, right or wrong.
#pragma once

#include "checkpoint/support.h"

namespace latente {

template <class T>
std::string number_bytes(T value) {
  return bytes_of(&value, sizeof(T));
}

inline std::string text_bytes(std::string_view text) {
  return number_bytes<uint64_t>(text.size()) + std::string(text);
}

// Value types by their numbers in the file.
constexpr uint32_t gguf_u8 = 0, gguf_u32 = 4, gguf_i32 = 5, gguf_f32 = 6, gguf_bool = 7, gguf_string = 8,
                   gguf_array = 9, gguf_u64 = 10;

class GgufBytes {
 public:
  uint32_t version = 3;
  uint64_t alignment = 32;  // of the data; key("general.alignment", ...) tells the reader

  // A key with any type number and any bytes behind it.
  GgufBytes& raw(std::string_view key, uint32_t type, const std::string& value) {
    keys_.emplace_back(key, text_bytes(key) + number_bytes(type) + value);
    return *this;
  }
  // For override_with().
  GgufBytes& leave_out(std::string_view key) { return keys_.emplace_back(key, ""), *this; }
  // The other's keys in place of those of the same name, and besides.
  GgufBytes& override_with(const GgufBytes& other) {
    for (const auto& [name, bytes] : other.keys_) {
      std::erase_if(keys_, [&, &key = name](const auto& own) { return own.first == key; });
      if (!bytes.empty()) keys_.emplace_back(name, bytes);
    }
    return *this;
  }
  GgufBytes& set(std::string_view key, std::string_view value) {
    return raw(key, gguf_string, text_bytes(value));
  }
  GgufBytes& set(std::string_view key, uint32_t value) { return raw(key, gguf_u32, number_bytes(value)); }
  GgufBytes& set(std::string_view key, float value) { return raw(key, gguf_f32, number_bytes(value)); }
  GgufBytes& set(std::string_view key, bool value) { return raw(key, gguf_bool, number_bytes(value)); }
  GgufBytes& set(std::string_view key, const char* value) { return set(key, std::string_view(value)); }
  GgufBytes& set(std::string_view key, const std::vector<std::string>& values) {
    std::string all = number_bytes(gguf_string) + number_bytes<uint64_t>(values.size());
    for (const std::string& value : values) all += text_bytes(value);
    return raw(key, gguf_array, all);
  }
  GgufBytes& set(std::string_view key, const std::vector<int32_t>& values) {
    return raw(key, gguf_array,
               number_bytes(gguf_i32) + number_bytes<uint64_t>(values.size()) + bytes_of(values));
  }

  // A tensor's description; extents innermost first.
  GgufBytes& describe(std::string_view name, const std::vector<uint64_t>& extents, uint32_t type,
                      uint64_t offset) {
    tensors_ += text_bytes(name) + number_bytes(static_cast<uint32_t>(extents.size())) + bytes_of(extents) +
                number_bytes(type) + number_bytes(offset);
    ++tensor_count;
    return *this;
  }
  // A description with its data, at the next place.
  GgufBytes& tensor(std::string_view name, const std::vector<uint64_t>& extents, uint32_t type,
                    const std::string& bytes) {
    pad(data);
    describe(name, extents, type, data.size());
    data += bytes;
    return *this;
  }
  GgufBytes& floats(std::string_view name, const std::vector<uint64_t>& extents,
                    const std::vector<float>& values) {
    return tensor(name, extents, 0, bytes_of(values));
  }

  std::string bytes() const {
    std::string all =
        "GGUF" + number_bytes(version) + number_bytes(tensor_count) + number_bytes<uint64_t>(keys_.size());
    for (const auto& [name, bytes] : keys_) all += bytes;
    all += tensors_;
    pad(all);
    return all + data;
  }

  uint64_t tensor_count = 0;
  std::string data;

 private:
  void pad(std::string& text) const { text.resize((text.size() + alignment - 1) / alignment * alignment); }

  std::vector<std::pair<std::string, std::string>> keys_;  // with their bytes
  std::string tensors_;
};

}  // namespace latente
