// Kernels of the tests: what makes one replay differ from the next, all of it in device memory. `step` [1]
// i32 counts the replays.
#pragma once

#include "cuda/stream.h"
#include "tensor/view.h"

namespace latente {

// experts [T, K]: the highest of logits[step] [S, T, E] f32, lower index first among equals; weights [T, K]:
// their sigmoids divided by the sum of the chosen.
void choose(View step, View logits, View weights, View experts, cuda::StreamHandle stream);
// results[step] = out, for results [S, T, D].
void keep_result(View step, View out, View results, cuda::StreamHandle stream);
void advance(View step, cuda::StreamHandle stream);

}  // namespace latente
