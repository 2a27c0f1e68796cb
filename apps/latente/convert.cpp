// latente convert: a model in 8 or 4 bits on disk.
#include "model/convert.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/file.h"
#include "commands.h"
#include "cpu/cpu_backend.h"
#include "infer/calibration.h"
#include "model/run_weights.h"
#include "session.h"
#include "status_line.h"

namespace latente {
namespace {

struct Options {
  std::string model, out, weights, mtp_weights = "int8", calibration;
  int64_t shard_bytes = ConvertOptions().max_shard_bytes;
  int64_t group = default_group, calibration_tokens = 16384;
  ThreadOptions threads;
};

DType type_named(const std::string& name) { return name == "int8" ? DType::q8 : DType::q4; }

// As --shard-size counts: in thousands.
std::string size_text(int64_t bytes) {
  const double size = static_cast<double>(bytes);
  return size < 1e9 ? fmt::format("{:.1f} MB", size / 1e6) : fmt::format("{:.2f} GB", size / 1e9);
}

// Runs the model as it is stored over the text.
Importance calibrated(const Options& options, CpuBackend& backend) {
  const ModelSource source = open_model(options.model);
  const Tokenizer tokenizer = load_tokenizer(options.model);
  std::vector<int32_t> tokens = tokenizer.encode(read_file(options.calibration), {.add_special = false});
  tokens.resize(std::min(tokens.size(), static_cast<size_t>(options.calibration_tokens)));
  for (int32_t id : tokens) {
    if (id >= source.config.vocab_size)
      fail("{}: token {} lies outside the model's vocabulary of {}", options.calibration, id,
           source.config.vocab_size);
  }
  const auto model = load_for_running(source, {.copied = true}, backend);  // there is much to read
  StatusLine line;
  const Pace pace;
  CalibrationOptions how;
  how.progress = [&](int64_t done, int64_t total) {
    const double share = static_cast<double>(done) / static_cast<double>(total);
    line.show(fmt::format("calibrating  {} of {} tokens  {} left", done, total, time_text(pace.left(share))),
              done == total);
  };
  Importance importance = calibrate(backend, *model, tokens, how);
  line.end();
  return importance;
}

void convert(const Options& options) {
  ConvertOptions how;
  how.max_shard_bytes = options.shard_bytes;
  CpuBackend backend(options.threads);
  Importance importance;
  if (!options.calibration.empty()) importance = calibrated(options, backend);
  how.weights = {
      .type = type_named(options.weights), .group = options.group, .mtp = type_named(options.mtp_weights)};
  if (!options.calibration.empty()) how.importance = &importance;
  StatusLine line;
  const Pace pace;
  how.progress = [&](const ConvertProgress& progress) {
    const bool checking = progress.stage == ConvertProgress::Stage::checking;
    const double share = static_cast<double>(progress.bytes - progress.resumed_bytes) /
                         static_cast<double>(progress.total_bytes - progress.resumed_bytes);
    line.show(
        fmt::format("{} {:.1f} %  {} of {}  {} left", checking ? "checking" : "converting", 100 * share,
                    size_text(progress.bytes), size_text(progress.total_bytes), time_text(pace.left(share))),
        progress.bytes == progress.total_bytes);
  };
  const ConvertReport report = convert_model(options.model, options.out, backend, how);
  line.end();
  fmt::print(
      "{}: {} in {} file{}, {:.2f} bits a weight, {}{}\n", options.out, size_text(report.bytes),
      report.shards, report.shards == 1 ? "" : "s",
      8 * static_cast<double>(report.bytes) / static_cast<double>(report.parameters),
      time_text(pace.seconds()),
      report.resumed_bytes > 0 ? fmt::format(" ({} from before)", size_text(report.resumed_bytes)) : "");
}

}  // namespace

void add_convert(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "convert",
      "Write a model in 8 or 4 bits, which starts at once; run again, it goes on where it was killed");
  command->add_option("model", options->model, "Model directory (Hugging Face layout) or GGUF file")
      ->required()
      ->check(CLI::ExistingPath);
  command->add_option("out", options->out, "Directory to write")->required();
  command->add_option("--weights", options->weights, "int8 or int4")
      ->required()
      ->check(CLI::IsMember({"int8", "int4"}));
  command->add_option("--group", options->group, "Elements that share a scale: 32, 64, 128 or 256")
      ->capture_default_str()
      ->check(CLI::IsMember({32, 64, 128, 256}));
  command
      ->add_option("--mtp-weights", options->mtp_weights,
                   "Of MTP modules, with int4: drafts of 4 bits are hardly ever right")
      ->capture_default_str()
      ->check(CLI::IsMember({"int8", "int4"}));
  command
      ->add_option("--calibrate", options->calibration,
                   "A text to run the model over first: weights that meet large activations are then kept "
                   "closer, with int4")
      ->check(CLI::ExistingFile);
  command->add_option("--calibration-tokens", options->calibration_tokens, "Tokens of it to read at most")
      ->capture_default_str()
      ->check(CLI::Range(512, 1 << 24));
  add_bytes_option(*command, "--shard-size", options->shard_bytes,
                   "Bytes a file at most, such as 500MB or 4GiB [5GB]");
  add_threads_option(*command, options->threads);
  command->callback([options] { convert(*options); });
}

}  // namespace latente
