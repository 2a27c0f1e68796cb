// Device memory.
#pragma once

#include <cstdint>
#include <memory>

#include "cuda/stream.h"
#include "tensor/view.h"

namespace latente::cuda {

// Zeroed memory of the current device, freed with the last owner. Errors name the size.
std::shared_ptr<void> allocate(int64_t bytes);

// In the stream's order; `device` must be contiguous. `host` may be reused, or read, on return.
void upload(const void* host, View device, StreamHandle stream);
void download(View device, void* host, StreamHandle stream);

}  // namespace latente::cuda
