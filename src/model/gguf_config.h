// The Config that a GGUF file of llama.cpp's architecture deepseek2 describes: DeepSeek V2, V3, R1 and models
// of their kind.
#pragma once

#include <functional>

#include "checkpoint/gguf.h"
#include "model/config.h"

namespace latente {

// `find` looks a tensor up by its name in the file, or in all files of a split model: whether the head is
// tied, attention has biases, routing has a bias and MTP modules are there is not in the keys. Errors name
// the file and the key. From what the keys leave open:
// - The files say neither V2 nor V3: sigmoid gates or a routing bias make deepseek_v3, else it is
// deepseek_v2.
// - Older converters wrote no groups of experts, although DeepSeek V2, V3 and R1 have them; as in llama.cpp
//   there are none then. V2's groups are compared by their best expert, as in the original.
// - yarn_log_multiplier is 0.1 · mscale_all_dim, and mscale is the same.
Config gguf_config(const GgufFile& file, const std::function<const GgufTensor*(std::string_view)>& find);

}  // namespace latente
