// What `latente convert` writes, and loading it: a Hugging Face directory whose large matrices are stored as
// products read them, so that starting is mapping.
//
// config.json has quantization_config: {"quant_method": "latente", "version": 1, "bits": 8 or 4,
// "mtp_bits": 8 or 4 (of MTP modules), "group_size": 64}. Groups are shorter in rows that are shorter
// (QuantisedOptions).
//
// A quantised matrix NAME [N, K] is the tensor NAME.panels, U8 [⌈N/16⌉, bytes of a panel]: the panels of
// tensor/panels.h, one after another. The experts of a layer are one tensor, as they are one in memory:
// model.layers.1.mlp.experts.gate_proj.panels [E, ⌈N/16⌉, bytes]. kv_b_proj is there once more in its two
// halves as absorbed attention reads them, head by head: self_attn.w_uk.panels (transposed) and w_uv.panels.
// What is not quantised has the name and the type that the model runs with. An MTP module's embedding and
// head, which are the main model's, are left out.
//
// Why not rows of codes and, beside them, scales: every start would have to lay them out anew, moving the
// whole model through memory twice, and a model larger than memory could not run from the disk at all. With
// panels the file is the memory, shared by all processes that run it. The price is that other readers need
// that description, and that another device's backend lays them out as it needs them.
#pragma once

#include <limits>

#include "model/quantised.h"

namespace latente {

inline constexpr std::string_view panels_suffix = ".panels";

// The options that the config's conversion had; its `converted` must be true.
QuantisedOptions options_of(const ConvertedConfig& converted);

// A place's panels as they are stored: their shape, and where they lie. Error when they are not there, or
// others.
struct QuantisedPlace;
struct QuantisedPlaces;
Shape stored_shape(const QuantisedPlace& place, Backend& backend);
MappedTensor mapped_panels(const QuantisedPlace& place, const TensorSource& checkpoint, Backend& backend);
// Error when the checkpoint has a tensor that does not belong to them.
void check_converted_names(const QuantisedPlaces& places, const TensorSource& checkpoint);

// Loads a converted checkpoint of the model's config. The model runs from the mapped files at once, and their
// pages become large ones meanwhile (base/large_pages.h); when weights would take more than `memory`, routed
// experts stay on the disk and are read when they are chosen (model/experts_on_demand.h). Another device than
// the host has all of them. Error where load_parameters has one, for tensors that are not the panels expected
// here, and when even that takes more memory.
struct ConvertedOptions {
  int64_t memory = std::numeric_limits<int64_t>::max();
  // Everything is in large pages before the call returns.
  bool copied = false;
  // Instead of the last of these errors: everything is used where it lies in the file, at the disk's speed.
  bool else_mapped = false;
  std::function<void(int64_t done, int64_t total)> progress{};
};
void load_converted(Transformer& model, const TensorSource& checkpoint, Backend& backend,
                    const ConvertedOptions& options = {});

}  // namespace latente
