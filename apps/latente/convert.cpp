// latente convert: a model in 8 or 4 bits on disk.
#include "model/convert.h"

#include <fmt/format.h>

#include "base/memory.h"
#include "commands.h"
#include "cpu/cpu_backend.h"
#include "status_line.h"

namespace latente {
namespace {

struct Options {
  std::string model, out, weights, mtp_weights = "int8";
  uint64_t shard_bytes = 5'000'000'000;
  int64_t group = default_group;
  int threads = 0;
};

DType type_named(const std::string& name) { return name == "int8" ? DType::q8 : DType::q4; }

// As --shard-size counts: in thousands.
std::string size_text(int64_t bytes) {
  const double size = static_cast<double>(bytes);
  return size < 1e9 ? fmt::format("{:.1f} MB", size / 1e6) : fmt::format("{:.2f} GB", size / 1e9);
}

void convert(const Options& options) {
  CpuBackend backend(options.threads);
  ConvertOptions how;
  how.weights = {
      .type = type_named(options.weights), .group = options.group, .mtp = type_named(options.mtp_weights)};
  how.max_shard_bytes = static_cast<int64_t>(options.shard_bytes);
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
  command->add_option("--shard-size", options->shard_bytes, "Bytes a file at most: 5GB, 500MB [5GB]")
      ->transform(CLI::AsSizeValue(true))
      ->check(CLI::Range(uint64_t{1}, uint64_t{1} << 62));
  command->add_option("--threads", options->threads, "0 = all cores")->capture_default_str();
  command->callback([options] { convert(*options); });
}

}  // namespace latente
