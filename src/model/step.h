// Step: what a forward call needs beside the activations. One definition of the model serves training,
// prefill, decode and drafting; a Step says which.
#pragma once

#include <vector>

#include "ops/ops.h"

namespace latente {

// One layer's cache, paged. MLA: `keys` holds c_kv (after its norm) and the rotated k_rope side by side,
// [pages, page, 1, kv_lora_rank + qk_rope_head_dim]; `values` is null. MHA, GQA, MQA: [pages, page, G,
// head_dim] each.
struct LayerCache {
  Tensor keys, values;
};

struct Step {
  Tensor positions;   // [T] i32: for RoPE
  Tensor rope_table;  // [P, rope dimension] f32: cosines, then sines

  // Attention within the call: token t attends to starts[t]..t.
  int64_t longest = 0;  // no token attends to more; 0: nobody knows
  Tensor starts;        // [T] i32; null = attend over the cache instead (absorbed, for MLA)

  // The cache; null slots = none.
  Tensor slots;  // [T] i32: where each token's entry is stored, page · page size + offset; negative = nowhere
  PageTensors pages;
  bool expand_cache = false;       // MLA: expand the latents to keys and values rather than absorb
  std::vector<LayerCache> caches;  // by layer; MTP modules follow the main layers

  // Training.
  Tensor token_mask;        // [T] 0 = padding, or null
  Balance balance{};        // auxiliary losses of every router
  bool count_load = false;  // add to the routers' expert loads

  // Filled while the model is recorded.
  std::vector<Tensor> balance_losses;
  std::vector<Tensor> residuals;  // the residual stream before each layer, and after the last
};

}  // namespace latente
