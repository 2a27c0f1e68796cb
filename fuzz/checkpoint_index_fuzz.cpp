// model.safetensors.index.json: refused with Error, or every shard name stays inside the directory; and the
// strict JSON parser agrees with nlohmann's own on everything it accepts.
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/json.h"
#include "support.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    nlohmann::json strict = latente::parse_json(text, "input");
    require(strict == nlohmann::json::parse(text));
  } catch (const latente::Error& error) {
    require(std::strchr(error.what(), '\n') == nullptr);
  }
  try {
    std::map<std::string, std::string> index = latente::parse_checkpoint_index(text, "input");
    require(!index.empty());
    for (const auto& [name, shard] : index) {
      require(shard.find('/') == shard.npos && shard.find('\0') == shard.npos &&
              shard.ends_with(".safetensors"));
    }
  } catch (const latente::Error& error) {
    require(std::strchr(error.what(), '\n') == nullptr);
  }
  return 0;
}
