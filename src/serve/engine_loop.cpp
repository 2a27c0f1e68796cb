#include "serve/engine_loop.h"

#include <chrono>
#include <utility>

namespace latente {

EngineLoop::EngineLoop(Engine& engine, int64_t most) : engine_(engine), most_(most) {
  look();
  count_experts();
  thread_ = std::thread([this] { run(); });
}

EngineLoop::~EngineLoop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_one();
  thread_.join();
  for (const auto& [id, finish] : alive_) engine_.cancel(id);
}

bool EngineLoop::reserve(int64_t count) {
  if (reserved_.fetch_add(count) + count <= most_) return true;
  reserved_ -= count;
  return false;
}

void EngineLoop::post(Task task) {
  {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
  }
  changed_.notify_one();
}

uint64_t EngineLoop::submit(Request request) {
  const auto finish = request.on_finish;
  const auto id = std::make_shared<uint64_t>(0);
  request.on_finish = [this, finish, id](const GenerationStats& stats) {
    alive_.erase(*id);
    if (finish) finish(stats);
  };
  *id = engine_.submit(std::move(request));
  alive_.emplace(*id, finish);
  return *id;
}

void EngineLoop::cancel(uint64_t id) {
  alive_.erase(id);
  engine_.cancel(id);
}

void EngineLoop::run() {
  bool busy = false;
  std::chrono::steady_clock::time_point looked, counted;
  for (;;) {
    std::vector<Task> tasks;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return busy || stopping_ || !tasks_.empty(); });
      if (stopping_) return;
      tasks = std::exchange(tasks_, {});
    }
    for (const Task& task : tasks) task(*this);
    try {
      busy = engine_.step();
    } catch (...) {
      fail_all();
      busy = true;
    }
    for (const Task& task : std::exchange(behind_step_, {})) task(*this);
    const auto now = std::chrono::steady_clock::now();
    // Counting pages takes time in proportion to them, fetching experts' counts a copy from the device a
    // layer.
    if (!busy || now - looked >= std::chrono::milliseconds(20)) {
      look();
      looked = now;
    }
    if (!busy || now - counted >= std::chrono::milliseconds(500)) {
      count_experts();
      counted = now;
    }
  }
}

// What a step cannot do for anybody, such as reading experts from a disk that fails.
void EngineLoop::fail_all() {
  GenerationStats stats;
  stats.finish = Finish::failed;
  stats.error = std::current_exception();
  for (const auto& [id, finish] : std::exchange(alive_, {})) {
    engine_.cancel(id);
    if (finish) finish(stats);
  }
}

void EngineLoop::look() {
  const PagePool& pool = engine_.pages();
  Metrics::Gauges gauges;
  gauges.running = static_cast<int64_t>(engine_.running());
  gauges.waiting = static_cast<int64_t>(engine_.waiting());
  gauges.places = engine_.runner().options().sequences;
  gauges.pages = pool.pages();
  gauges.pages_free = pool.available();
  gauges.pages_remembered = pool.remembered();
  gauges.page_tokens = pool.page_size();
  gauges.plans = static_cast<int64_t>(engine_.runner().plans());
  gauges.plans_recorded = engine_.runner().recorded();
  const std::lock_guard lock(mutex_);
  gauges_ = gauges;
}

void EngineLoop::count_experts() {
  const std::vector<Runner::ExpertLoad>& loads = engine_.expert_loads();
  const std::lock_guard lock(mutex_);
  expert_loads_ = loads;
}

std::vector<Runner::ExpertLoad> EngineLoop::expert_loads() const {
  const std::lock_guard lock(mutex_);
  return expert_loads_;
}

Metrics::Gauges EngineLoop::gauges() const {
  const std::lock_guard lock(mutex_);
  return gauges_;
}

}  // namespace latente
