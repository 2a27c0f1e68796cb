// The whole model: embeddings, decoder layers, MTP modules, head. Recorded into a Plan by calling it.
#pragma once

#include <variant>

#include "model/attention.h"
#include "model/moe.h"

namespace latente {

struct Layer {
  Norm input_layernorm;
  std::variant<Mla, Gqa> self_attn;
  Norm post_attention_layernorm;
  std::variant<Mlp, Moe> mlp;
  FIELDS(input_layernorm, self_attn, post_attention_layernorm, mlp)

  Layer() = default;
  Layer(const Config& config, int64_t index, DType type);
  void operator()(Stream& stream, Step& at, const LayerCache* cache) const;
  Moe* moe() { return std::get_if<Moe>(&mlp); }
};

// A multi-token prediction module (report, section 2.2): one more layer that sees the embedding of a later
// token beside the hidden state, and shares embedding and head with the main model. Stored as
// layers[num_hidden_layers + k].
struct MtpModule {
  Norm enorm, hnorm;
  Linear eh_proj;  // [hidden, 2 · hidden]: columns of the embedding first, as released
  Layer layer;
  struct SharedHead {
    Norm norm;
    FIELDS(norm)
  } shared_head;

  template <class Self, class Visitor>
  static void visit_fields(Self& self, Visitor&& visitor) {
    visitor("enorm", self.enorm);
    visitor("hnorm", self.hnorm);
    visitor("eh_proj", self.eh_proj);
    Layer::visit_fields(self.layer, visitor);
    visitor("shared_head", self.shared_head);
  }

  MtpModule() = default;
  MtpModule(const Config& config, int64_t index, DType type);

  // hidden: of position i, after its level's final norm; embedded: of the token k + 1 places later, [T,
  // hidden]. Returns [T, hidden] after shared_head.norm: what the head and the next module read.
  Tensor operator()(const Tensor& hidden, const Tensor& embedded, Step& at, const LayerCache* cache) const;
};

struct Decoder {
  Embedding embed_tokens;
  std::vector<Layer> layers;
  Norm norm;
  FIELDS(embed_tokens, layers, norm)
};

class Transformer {
 public:
  // Parameters without storage: enough to count and to plan.
  Transformer(const Config& config, DType weights);

  const Config& config() const { return config_; }
  DType weights() const { return weights_; }
  Decoder model;
  Linear lm_head;  // null when tied
  std::vector<MtpModule> mtp;

  // ids [T] i32 → [T, hidden] after the final norm: what the head and the first MTP module read.
  Tensor hidden(const Tensor& ids, Step& at) const;
  // Module k on the hidden state of the module before (of the main model for k = 0) and the tokens k + 1
  // later.
  Tensor predict(int64_t k, const Tensor& hidden, const Tensor& later_ids, Step& at) const;
  const Tensor& head() const { return lm_head ? lm_head.weight : model.embed_tokens.weight; }
  Tensor logits(const Tensor& hidden) const { return linear_exact(hidden, head()); }

  // f(path, tensor) for every parameter, MTP modules as model.layers.{num_hidden_layers + k}.
  template <class F>
  void for_each(F&& f) {
    for_each_parameter(model, "model", f);
    for_each_parameter(lm_head, "lm_head", f);
    for (size_t k = 0; k < mtp.size(); ++k) for_each_parameter(mtp[k], mtp_path(static_cast<int64_t>(k)), f);
  }
  std::string mtp_path(int64_t k) const {
    return "model.layers." + std::to_string(config_.num_hidden_layers + k);
  }
  // Every router, MTP modules' included, with its path.
  std::vector<std::pair<std::string, Gate*>> gates();
  // The cache of every layer, MTP modules' included.
  std::vector<LayerCache> make_caches(Backend& backend, int64_t pages, int64_t page_size, DType type) const;
  int64_t cache_values_per_token() const;

 private:
  const LayerCache* cache_of(const Step& at, int64_t layer) const;
  Config config_;
  DType weights_;
};

}  // namespace latente
