// The one thread that owns the engine. Others leave it tasks; it steps as long as there is something to do.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "infer/engine.h"
#include "serve/metrics.h"

namespace latente {

class EngineLoop {
 public:
  // most: sequences that may run and wait at a time. The engine must outlive the loop, and is the loop's
  // alone while it lives.
  EngineLoop(Engine& engine, int64_t most);
  ~EngineLoop();  // what runs is left where it is
  EngineLoop(const EngineLoop&) = delete;
  EngineLoop& operator=(const EngineLoop&) = delete;

  // Room for `count` sequences more, to be given back one by one; false if there is none.
  bool reserve(int64_t count);
  void release(int64_t count) { reserved_ -= count; }

  // Runs before the next step, in the engine's thread. Tasks do not throw.
  using Task = std::function<void(EngineLoop&)>;
  void post(Task task);

  // -- For tasks

  // As Engine::submit; on_finish is also called, with Finish::failed, when a step itself fails.
  uint64_t submit(Request request);
  void cancel(uint64_t id);
  // Runs behind the step that is under way, or comes next.
  void after_step(Task task) { behind_step_.push_back(std::move(task)); }
  Engine& engine() { return engine_; }

  // From any thread: as of the last step, and of at most half a second before it.
  Metrics::Gauges gauges() const;
  std::vector<Runner::ExpertLoad> expert_loads() const;

 private:
  void run();
  void fail_all();
  void look();
  void count_experts();

  Engine& engine_;
  const int64_t most_;
  std::atomic<int64_t> reserved_ = 0;
  std::map<uint64_t, std::function<void(const GenerationStats&)>> alive_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Task> tasks_;
  std::vector<Task> behind_step_;
  Metrics::Gauges gauges_;
  std::vector<Runner::ExpertLoad> expert_loads_;
  bool stopping_ = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace latente
