// What the server counts, as Prometheus reads it (text format 0.0.4).
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "infer/generation.h"
#include "infer/runner.h"

namespace latente {

// Of seconds, in buckets that grow about twofold.
class Histogram {
 public:
  Histogram();
  void observe(double seconds);
  void write(std::string& out, const std::string& name, const std::string& help) const;

 private:
  std::vector<int64_t> counts_;  // by bucket, and those beyond
  double sum_ = 0;
  int64_t count_ = 0;
};

class Metrics {
 public:
  void request(const std::string& path, int status);
  // Since the request came, and since the token (or tokens of one pass) before.
  void first_token(double seconds);
  void next_token(double seconds);
  void finished(const GenerationStats& stats);

  // What the engine holds right now.
  struct Gauges {
    int64_t running = 0, waiting = 0, places = 0;
    int64_t pages = 0, pages_free = 0, pages_remembered = 0, page_tokens = 0;
    int64_t connections = 0, plans = 0, plans_recorded = 0;
  };
  // Of each layer's experts how uneven their load is; with `each_expert` also a counter for every one of
  // them.
  std::string text(const Gauges& gauges, const std::vector<Runner::ExpertLoad>& experts = {},
                   bool each_expert = false) const;

 private:
  mutable std::mutex mutex_;
  std::map<std::pair<std::string, int>, int64_t> requests_;  // by path and status
  Histogram first_token_, next_token_, waiting_;
  int64_t sequences_ = 0, failed_ = 0, prompt_tokens_ = 0, cached_tokens_ = 0, generated_tokens_ = 0,
          passes_ = 0, drafted_ = 0, accepted_ = 0;
};

}  // namespace latente
