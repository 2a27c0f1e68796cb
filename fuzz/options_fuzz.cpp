// TOML options and "key=value" overrides: filled or refused with an Error; what was filled survives being
// written.
#include <cmath>
#include <cstdlib>
#include <string>

#include "base/options.h"
#include "support.h"
#include "train/train_options.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string_view text(reinterpret_cast<const char*>(data), size);
  latente::TrainOptions options;
  try {
    latente::parse_options(options, text, "input");
    std::string written = latente::write_options(options);
    latente::TrainOptions again;
    latente::parse_options(again, written, "written");
    require(latente::write_options(again) == written);
  } catch (const latente::Error&) {
  }
  try {
    latente::override_option(options, text);
  } catch (const latente::Error&) {
  }
  return 0;
}
