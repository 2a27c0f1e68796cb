// A GGUF file as a model and a tokenizer: refused with Error, or every parameter can be read in the shape it
// has and the tokenizer's files are what the tokenizer reads. Begin from small models: the keys are many.
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>

#include "checkpoint/gguf_tokenizer.h"
#include "model/gguf.h"
#include "model/gguf_names.h"
#include "support.h"
#include "tokenizer/tokenizer.h"

namespace {

latente::GgufFile open(std::span<const std::byte> bytes) { return latente::GgufFile(bytes, "input"); }

void read_model(std::span<const std::byte> bytes) {
  latente::GgufCheckpoint model(open(bytes));
  const latente::Config& config = model.config();
  require(config.is_mla() && std::isfinite(config.softmax_scale()));
  require(latente::Config::from_json(config.to_json(latente::DType::f32), "again").hidden_size ==
          config.hidden_size);
  for (const std::string& name : model.names()) {
    require(model.contains(name) && !latente::gguf_name_of(name).empty());
    std::optional<latente::MappedBlocks> blocks = model.blocks(name);
    latente::Shape shape{config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim),
                         config.kv_lora_rank};
    if (blocks) shape = blocks->shape;
    if (!blocks && !name.ends_with("kv_b_proj.weight")) continue;
    if (shape.count() > (1 << 20)) continue;
    std::vector<float> values(static_cast<size_t>(shape.count()));
    try {
      model.read(name, latente::View(values.data(), shape, latente::DType::f32));
    } catch (const latente::Error&) {
      require(!blocks);  // only types of elements are refused this late
    }
  }
}

void read_tokenizer(std::span<const std::byte> bytes) {
  latente::GgufTokenizer texts = latente::gguf_tokenizer(open(bytes));
  require(nlohmann::json::parse(texts.tokenizer_json).is_object());
  latente::Tokenizer tokenizer =
      latente::Tokenizer::from_json(texts.tokenizer_json, texts.config_json, "input");
  tokenizer.decode(tokenizer.encode("a 1\n<"));
}

template <class F>
void one_line(F f) {
  try {
    f();
  } catch (const latente::Error& error) {
    require(std::strchr(error.what(), '\n') == nullptr);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::span<const std::byte> bytes(reinterpret_cast<const std::byte*>(data), size);
  one_line([&] { read_model(bytes); });
  one_line([&] { read_tokenizer(bytes); });
  return 0;
}
