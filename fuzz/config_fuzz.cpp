// config.json: whatever the bytes, a valid Config or an Error of one line; a valid one survives being written
// and read, and its figures can be computed unless it is absurdly large.
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>

#include "checkpoint/json.h"
#include "model/figures.h"
#include "support.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    nlohmann::json json = latente::parse_json(text, "input");
    latente::Config config = latente::Config::from_json(json, "input");
    nlohmann::json written = config.to_json(latente::DType::f32);
    latente::Config again = latente::Config::from_json(written, "written");
    require(again.to_json(latente::DType::f32) == written);
    if (config.num_hidden_layers + config.num_mtp_layers <= 64) {
      require(latente::count_parameters(config).total >= 0);
      require(latente::cache_figures(config).own >= 0);
    }
  } catch (const latente::Error& error) {
    require(std::strchr(error.what(), '\n') == nullptr);
  }
  return 0;
}
