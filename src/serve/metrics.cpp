#include "serve/metrics.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <numeric>

namespace latente {
namespace {

constexpr std::array bounds = {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
                               0.25,   0.5,   1.0,    2.5,   5.0,  10.0,  30.0, 60.0};

void write_head(std::string& out, const std::string& name, const char* type, const std::string& help) {
  fmt::format_to(std::back_inserter(out), "# HELP {} {}\n# TYPE {} {}\n", name, help, name, type);
}

void write_one(std::string& out, const std::string& name, const char* type, const std::string& help,
               int64_t value) {
  write_head(out, name, type, help);
  fmt::format_to(std::back_inserter(out), "{} {}\n", name, value);
}

void write_experts(std::string& out, const std::vector<Runner::ExpertLoad>& experts, bool each) {
  const auto at = std::back_inserter(out);
  write_head(out, "latente_expert_imbalance", "gauge",
             "Tokens of a layer's busiest routed expert over the mean of all, since the server started.");
  for (const auto& [layer, tokens] : experts) {
    const int64_t sum = std::accumulate(tokens.begin(), tokens.end(), int64_t{0});
    const auto most = static_cast<double>(*std::max_element(tokens.begin(), tokens.end()));
    fmt::format_to(at, "latente_expert_imbalance{{layer=\"{}\"}} {:.4g}\n", layer,
                   sum > 0 ? most * static_cast<double>(tokens.size()) / static_cast<double>(sum) : 1.0);
  }
  write_head(out, "latente_experts_idle", "gauge",
             "Routed experts of a layer without a token since the server started.");
  for (const auto& [layer, tokens] : experts)
    fmt::format_to(at, "latente_experts_idle{{layer=\"{}\"}} {}\n", layer,
                   std::count(tokens.begin(), tokens.end(), 0));
  if (!each) return;
  write_head(out, "latente_expert_tokens_total", "counter", "Tokens that a routed expert was chosen for.");
  for (const auto& [layer, tokens] : experts) {
    for (size_t e = 0; e < tokens.size(); ++e)
      fmt::format_to(at, "latente_expert_tokens_total{{layer=\"{}\",expert=\"{}\"}} {}\n", layer, e,
                     tokens[e]);
  }
}

}  // namespace

Histogram::Histogram() : counts_(bounds.size() + 1) {}

void Histogram::observe(double seconds) {
  ++counts_[static_cast<size_t>(std::lower_bound(bounds.begin(), bounds.end(), seconds) - bounds.begin())];
  sum_ += seconds;
  ++count_;
}

void Histogram::write(std::string& out, const std::string& name, const std::string& help) const {
  write_head(out, name, "histogram", help);
  const auto at = std::back_inserter(out);
  int64_t below = 0;
  for (size_t i = 0; i < bounds.size(); ++i) {
    below += counts_[i];
    fmt::format_to(at, "{}_bucket{{le=\"{}\"}} {}\n", name, bounds[i], below);
  }
  fmt::format_to(at, "{}_bucket{{le=\"+Inf\"}} {}\n{}_sum {}\n{}_count {}\n", name, count_, name, sum_, name,
                 count_);
}

void Metrics::request(const std::string& path, int status) {
  const std::lock_guard lock(mutex_);
  ++requests_[{path, status}];
}

void Metrics::first_token(double seconds) {
  const std::lock_guard lock(mutex_);
  first_token_.observe(seconds);
}

void Metrics::next_token(double seconds) {
  const std::lock_guard lock(mutex_);
  next_token_.observe(seconds);
}

void Metrics::finished(const GenerationStats& stats) {
  const std::lock_guard lock(mutex_);
  ++sequences_;
  failed_ += stats.finish == Finish::failed ? 1 : 0;
  waiting_.observe(stats.waiting_seconds);
  prompt_tokens_ += stats.prompt_tokens;
  cached_tokens_ += stats.reused_tokens;
  generated_tokens_ += stats.generated_tokens;
  passes_ += stats.passes;
  drafted_ += stats.drafted;
  accepted_ += stats.accepted;
}

std::string Metrics::text(const Gauges& gauges, const std::vector<Runner::ExpertLoad>& experts,
                          bool each_expert) const {
  const std::lock_guard lock(mutex_);
  std::string out;
  write_head(out, "latente_requests_total", "counter",
             "Requests by path and status (0: the client left first).");
  for (const auto& [key, count] : requests_)
    fmt::format_to(std::back_inserter(out), "latente_requests_total{{path=\"{}\",status=\"{}\"}} {}\n",
                   key.first, key.second, count);
  write_one(out, "latente_connections", "gauge", "Open connections.", gauges.connections);
  write_one(out, "latente_sequences_running", "gauge", "Sequences in the engine.", gauges.running);
  write_one(out, "latente_sequences_waiting", "gauge", "Sequences that wait for a place.", gauges.waiting);
  write_one(out, "latente_sequences_places", "gauge", "Sequences that can run at a time.", gauges.places);
  write_one(out, "latente_cache_pages", "gauge", "Pages of the latent cache.", gauges.pages);
  write_one(out, "latente_cache_pages_available", "gauge", "Pages that no running sequence holds.",
            gauges.pages_free);
  write_one(out, "latente_cache_pages_remembered", "gauge", "Pages of prefixes kept for later requests.",
            gauges.pages_remembered);
  write_one(out, "latente_cache_page_tokens", "gauge", "Tokens a page.", gauges.page_tokens);
  write_one(out, "latente_plans", "gauge", "Plans of passes kept, one a shape.", gauges.plans);
  write_one(out, "latente_plans_recorded_total", "counter", "Plans made, those included that were dropped.",
            gauges.plans_recorded);
  write_one(out, "latente_sequences_total", "counter", "Sequences that ended.", sequences_);
  write_one(out, "latente_sequences_failed_total", "counter", "Of them, those that an error ended.", failed_);
  write_one(out, "latente_prompt_tokens_total", "counter", "Tokens of prompts.", prompt_tokens_);
  write_one(out, "latente_cached_tokens_total", "counter", "Of them, those that the cache held.",
            cached_tokens_);
  write_one(out, "latente_generated_tokens_total", "counter", "Tokens written.", generated_tokens_);
  write_one(out, "latente_decode_passes_total", "counter", "Passes of sequences behind the prompt.", passes_);
  write_one(out, "latente_drafted_tokens_total", "counter", "Tokens drafted.", drafted_);
  write_one(out, "latente_accepted_tokens_total", "counter", "Of them, those accepted.", accepted_);
  first_token_.write(out, "latente_first_token_seconds", "From a request to its first token.");
  next_token_.write(out, "latente_next_token_seconds", "From a token to the next one.");
  waiting_.write(out, "latente_waiting_seconds", "From a request to its place in the engine.");
  if (!experts.empty()) write_experts(out, experts, each_expert);
  return out;
}

}  // namespace latente
