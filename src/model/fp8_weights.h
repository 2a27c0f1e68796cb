// A model for running alone, its weights in FP8 as DeepSeek-V3's report has them (section 3.3.2): e4m3 with a
// scale for each 128 rows and 128 columns.
#pragma once

#include "checkpoint/tensor_source.h"
#include "model/background_layout.h"
#include "model/transformer.h"

namespace latente {

// Whether the source holds such weights and the backend multiplies them as they are.
bool runs_fp8(const TensorSource& source, const Backend& backend);

// Matrices that are so stored, and that only products read, are packed for these, code for code; the others
// have the model's type. The latent's up-projection is among those, since absorbed attention reads it head by
// head. Error where load_parameters has one, and when a code or a scale is not a number or too large.
// Where there is `later`, not yet started, it is left the codes; one that is not a number is then an Error of
// the product that meets it.
void load_fp8(Transformer& model, const TensorSource& source, Backend& backend,
              BackgroundLayout* later = nullptr);
// Bytes that load_fp8 takes.
int64_t fp8_bytes(Transformer& model, const TensorSource& source, const Backend& backend);

// Random weights of this form, to see how fast a model of this shape would be. Error where the backend has
// none.
void initialise_fp8(Transformer& model, uint64_t seed, Backend& backend);

}  // namespace latente
