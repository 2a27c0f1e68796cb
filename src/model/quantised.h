// A model for running alone, its weights in 8 or 4 bits (tensor/quantise.h).
#pragma once

#include <functional>

#include "checkpoint/tensor_source.h"
#include "model/background_layout.h"
#include "model/transformer.h"
#include "tensor/quantise.h"

namespace latente {

// Matrices that products read are quantised as they are read, a piece at a time: memory holds the result and
// some megabytes. MTP modules keep 8 bits, since drafts of 4 are hardly ever right. The up-projection of the
// latent is laid down twice, as expanded and as absorbed attention read it. Embeddings, norms, routers and an
// MTP module's eh_proj keep the model's type.
struct QuantisedOptions {
  DType type = DType::q8;         // or q4
  int64_t group = default_group;  // elements of a row that share a scale: a multiple of 32, at most 256
  DType mtp = DType::q8;          // of MTP modules where type is q4
  // Called after each matrix with the number done and the total; may be empty.
  std::function<void(int64_t done, int64_t total)> progress{};
};

// Error where load_parameters has one, when a value is not finite, or when the backend does not know the
// form.
void load_quantised(Transformer& model, const TensorSource& checkpoint, Backend& backend,
                    const QuantisedOptions& options = {});

// From blocks of quantised values (TensorSource::blocks), each matrix in the precision it is stored in: Q8_0,
// Q4_0, Q5_0 and IQ4_NL to the bit, in groups of 32, and Q4_K and Q4_1 but for the rounding of scales and
// offsets to float16; other types rounded to 8 bits in groups of 32. Floats stay as they are, but for
// float16, which is held as bfloat16. The model's type must be float32: norms, biases and routers are; an MTP
// module's eh_proj is bfloat16. What the latent's up-projection needs along
// the other axis than it is stored in (stored_places) is bfloat16 if it is Q8_0, else rounded to 8 bits.
// Packing floats for products takes `most_bytes` at most. Matrices with an exact form are left to `later`
// where there is one, not yet started; a scale that is not finite is then an Error of the product that meets
// it. Errors as above.
void load_as_stored(Transformer& model, const TensorSource& checkpoint, Backend& backend, int64_t most_bytes,
                    BackgroundLayout* later = nullptr,
                    const std::function<void(int64_t done, int64_t total)>& progress = {});

// Random weights, to see how fast a model of this shape would be.
void initialise_quantised(Transformer& model, uint64_t seed, Backend& backend,
                          const QuantisedOptions& options = {});

}  // namespace latente
