// The tokenizer.json that training starts from and ends with.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "tokenizer/train_bpe.h"

namespace latente {

// tokenizer.json with this vocabulary. Error if options.pre_tokenizer is unknown.
nlohmann::ordered_json tokenizer_file(const TrainedBpe& trained);

}  // namespace latente
