#include "train_display.h"

#include <fmt/format.h>

#include "base/memory.h"

namespace latente {
namespace {

std::string count_text(double count) {
  const char* units[] = {"", "K", "M", "G", "T"};
  int unit = 0;
  while (count >= 1000 && unit < 4) count /= 1000, ++unit;
  return fmt::format("{:.{}f}{}", count, unit > 0 && count < 100 ? 1 : 0, units[unit]);
}

std::string losses_text(const LossSums& losses) {
  std::string text = fmt::format("loss {:.4f}", losses.depths[0].mean());
  for (size_t k = 1; k < losses.depths.size(); ++k)
    text += fmt::format("  mtp {:.4f}", losses.depths[k].mean());
  if (losses.bytes > 0) text += fmt::format("  {:.4f} bits/byte", losses.bits_per_byte());
  return text;
}

}  // namespace

void TrainDisplay::note(const std::string& text) { line_.note(text); }

void TrainDisplay::corpus(const CorpusProgress& progress) {
  bool last = progress.bytes >= progress.total_bytes;
  const char* what = progress.stage == CorpusProgress::Stage::checking ? "checking" : "tokenising";
  line_.show(fmt::format("{} {} of {}, {} documents, {} tokens", what,
                         bytes_text(static_cast<double>(progress.bytes)),
                         bytes_text(static_cast<double>(progress.total_bytes)), progress.documents,
                         count_text(static_cast<double>(progress.tokens))),
             last);
}

void TrainDisplay::facts(const RunFacts& facts, const TrainOptions& options) {
  for (const std::string& text : facts.notes) note("note        " + text);
  note(fmt::format("model       {} parameters, {} active{}; {} a token forward and backward",
                   count_text(static_cast<double>(facts.parameters)),
                   count_text(static_cast<double>(facts.active)),
                   facts.mtp > 0 ? ", and " + count_text(static_cast<double>(facts.mtp)) + " of MTP" : "",
                   count_text(facts.flops_per_token) + "FLOP"));
  note(fmt::format(
      "data        {} tokens ({}) to train on, {} to validate; a sequence of {} tokens {} times an epoch",
      count_text(static_cast<double>(facts.train_tokens)), bytes_text(static_cast<double>(facts.train_bytes)),
      count_text(static_cast<double>(facts.validation_tokens)), facts.length, facts.windows));
  note(fmt::format("run         {} steps of {} tokens = {} × {} sequences; {} tokens in all; in {}",
                   facts.steps, options.batch.tokens, facts.accumulation, facts.sequences,
                   count_text(static_cast<double>(facts.steps * options.batch.tokens)), options.out));
  const MemoryEstimate& memory = facts.memory;
  auto size = [](int64_t bytes) { return bytes_text(static_cast<double>(bytes)); };
  note(fmt::format("memory      {} = weights {} + gradients {} + optimizer {} + activations {}; {} available",
                   size(memory.total()), size(memory.weights), size(memory.gradients), size(memory.optimizer),
                   size(memory.activations + memory.inputs), size(facts.available_memory)));
  if (facts.recomputed_share > 0) {
    note(fmt::format(
        "recompute   {:.0f} % of the forward pass, again in the backward pass: for want of memory",
        100 * facts.recomputed_share));
  }
}

void TrainDisplay::step(const StepReport& report, int64_t steps) {
  std::string text = fmt::format("{}/{}  {}", report.step, steps, losses_text(report.losses));
  text += fmt::format("  lr {:.2e}  |g| {:.2f}  {} tok/s", report.learning_rate, report.gradient_norm,
                      count_text(report.tokens_per_second));
  if (peak_flops_ > 0)
    text += fmt::format(" ({} of peak)", share_text(report.flops_per_second / peak_flops_));
  if (report.routers > 0) {
    text += fmt::format("  MaxVio {:.2f}", report.max_violation);
    if (report.dead_experts > 0) text += fmt::format(" ({} idle)", report.dead_experts);
  }
  if (report.losses.compared > 0) text += fmt::format("  accept {:.0f} %", 100 * report.losses.acceptance());
  text += "  " + time_text(report.seconds_left) + " left";
  line_.show(text, report.step == steps);
  if (report.step == steps) line_.end();
}

void TrainDisplay::validation(const ValidationReport& report) {
  std::string text = fmt::format("validation  step {}: {}", report.step, losses_text(report.losses));
  if (report.losses.compared > 0) text += fmt::format("  accept {:.1f} %", 100 * report.losses.acceptance());
  note(text);
}

void TrainDisplay::sample(const SampleReport& report) {
  std::string text = report.text;
  for (char& c : text) c = c == '\n' ? ' ' : c;
  note(fmt::format("sample      {}│{}", report.prompt, text));
}

}  // namespace latente
