// Runner: forward passes of one sequence over a paged latent cache. It keeps a plan per (module, tokens,
// mode), all in one arena, and knows nothing of sampling. Positions are absolute; running a position again
// overwrites its entries, so rejected drafts need no undoing.
#pragma once

#include <map>
#include <memory>

#include "model/transformer.h"

namespace latente {

struct RunnerOptions {
  int64_t context = 4096;  // tokens the cache can hold
  int64_t page_size = 64;
  int64_t chunk = 512;            // longest piece of a prompt in one pass
  DType cache_type = DType::f32;  // f32 or bf16; float64 models keep float64
};

class Runner {
 public:
  Runner(Backend& backend, const Transformer& model, const RunnerOptions& options);

  // The main model on `tokens` at positions first, first + 1, ...; everything before `first` must have been
  // run. Returns the logits of the last `wanted` tokens, [wanted, vocabulary], valid until the next call.
  // wanted <= 8.
  std::span<float> forward(std::span<const int32_t> tokens, int64_t first, int64_t wanted);

  // MTP module k at positions first, first + 1, ...: later[i] is the token k + 1 places after position first
  // + i. Reads the hidden states that level `k` left at those positions (level 0 = main model, k = module k -
  // 1) and leaves its own at level k + 1. Returns the logits of the last position.
  std::span<float> predict(int64_t k, std::span<const int32_t> later, int64_t first);
  // The last module once more, beyond the number of modules: at `position`, on its own hidden state of
  // position - 1.
  std::span<float> predict_again(int32_t later, int64_t position);

  int64_t context() const { return options_.context; }
  int64_t chunk() const { return options_.chunk; }
  int64_t modules() const { return static_cast<int64_t>(model_->mtp.size()); }
  // Records ahead of time what decoding with `drafts` tokens a pass runs.
  void prepare(int64_t drafts);
  size_t plans() const { return plans_.size(); }  // recorded so far
  int64_t cache_bytes_per_token() const;
  // Arena and caches; weights are the model's.
  int64_t memory_bytes() const;

 private:
  struct Key {
    int64_t module;  // -1 = main model
    int64_t level;   // of the hidden states read
    int64_t tokens;
    bool expanded;
    auto operator<=>(const Key&) const = default;
  };
  struct Recorded {
    std::unique_ptr<Plan> plan;
    Tensor ids, positions, starts, slots, sequence, sources, history_slots, rows, logits;
  };
  Recorded& recorded(const Key& key);
  std::span<float> run(const Key& key, std::span<const int32_t> ids, int64_t first, int64_t source_shift,
                       int64_t wanted);
  int64_t ring_slot(int64_t position) const { return position % ring_; }

  Backend* backend_;
  const Transformer* model_;
  RunnerOptions options_;
  Tensor rope_table_, block_table_;
  std::vector<LayerCache> caches_;
  std::vector<Tensor> history_;  // by level: [1, ring, hidden]
  int64_t ring_ = 0;
  std::map<Key, Recorded> plans_;
  std::shared_ptr<void> arena_;
  int64_t arena_bytes_ = 0;
  std::vector<float> logits_;
  std::vector<double> wide_logits_;
};

}  // namespace latente
