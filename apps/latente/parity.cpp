// latente parity: the model against recorded outputs of another implementation.
#include "train/parity.h"

#include <fmt/format.h>

#include "commands.h"
#include "device.h"
#include "model/converted_source.h"
#include "model/weights.h"
#include "session.h"

namespace latente {
namespace {

struct Options {
  std::string model, reference, dtype = "f32", device = "cpu";
  ParityOptions tolerances;
  ThreadOptions threads;
};

bool run(const Options& options) {
  std::optional<DType> type = dtype_from_name(options.dtype);
  if (type != DType::f32 && type != DType::f64 && type != DType::bf16)
    fail("--dtype: expected f32, f64 or bf16, found {}", options.dtype);
  CpuBackend decoder(options.threads);
  ModelSource source = open_decoded(options.model, decoder);
  Device device(options.device, options.threads);
  Transformer model(source.config, *type);
  LoadOptions how;
  how.device = &device.backend();
  load_parameters(model, *source.tensors, how);
  SafetensorsFile reference(options.reference);
  std::vector<ParityRow> rows =
      compare_with_reference(device.backend(), model, reference, options.tolerances);

  int64_t failed = 0;
  fmt::print("{:<64} {:>12} {:>10}\n", "tensor", "|a-b|/|b|", "tolerance");
  for (const ParityRow& row : rows) {
    failed += row.good() ? 0 : 1;
    fmt::print("{:<64} {:>12.3e} {:>10.1e}{}{}\n", row.name, row.difference, row.tolerance,
               row.good() ? "" : "  FAIL", row.note.empty() ? "" : "  " + row.note);
  }
  fmt::print("{} tensors compared, {} over tolerance\n", rows.size(), failed);
  return failed == 0;
}

}  // namespace

void add_parity(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("parity", "Compare the model with recorded outputs of another implementation");
  command
      ->add_option("model", options->model,
                   "Model directory or GGUF file; of a converted one, what its codes say")
      ->required()
      ->check(CLI::ExistingPath);
  command
      ->add_option("reference", options->reference,
                   "Safetensors file with input_ids and any of hidden.<k>, logits, loss, mtp.<k>.logits, "
                   "mtp.<k>.loss, "
                   "grad.<parameter>, generated")
      ->required()
      ->check(CLI::ExistingFile);
  command->add_option("--tolerance", options->tolerances.tolerance, "Largest |a-b|/|b| of outputs")
      ->capture_default_str();
  command
      ->add_option("--gradient-tolerance", options->tolerances.gradient_tolerance,
                   "Largest |a-b|/|b| of gradients")
      ->capture_default_str();
  command->add_option("--dtype", options->dtype, "f32, f64 or bf16: of weights, and on a GPU of activations")
      ->capture_default_str();
  add_device_option(*command, options->device);
  add_threads_option(*command, options->threads);
  command->callback([options] {
    if (!run(*options)) throw CLI::RuntimeError(1);
  });
}

}  // namespace latente
