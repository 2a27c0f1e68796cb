// The JSON header of a safetensors file, as far as it can be checked without the data.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/safetensors.h"

namespace latente {

inline constexpr uint64_t max_safetensors_header =
    100'000'000;  // bytes, the reference implementation's limit
inline constexpr std::string_view safetensors_metadata_key = "__metadata__";

struct SafetensorsHeader {
  struct Tensor {
    SafetensorsEntry entry;  // without data
    int64_t bits = 0;        // an element's
    std::vector<int64_t> offsets;
    bool has_dtype = false, has_shape = false, has_offsets = false;
  };
  std::vector<Tensor> tensors;  // in the order of the text; names may repeat
  std::map<std::string, std::string> metadata;
};

SafetensorsHeader parse_safetensors_header(std::string_view text, const std::string& label);

// "BF16" for DType::bf16.
std::string_view safetensors_name(DType type);

}  // namespace latente
