// Work on a stream, captured once and replayed with one call: what Plan::run() becomes on a GPU.
#pragma once

#include <cstddef>
#include <functional>

#include "cuda/stream.h"

struct CUgraphExec_st;

namespace latente::cuda {

// A graph keeps every kernel's arguments as they were at capture: pointers, shapes and grids. What the
// kernels read from memory may differ at each launch. The memory must outlive the graph; a plan moved to
// another arena is captured again.
class Graph {
 public:
  // Calls `work` once, which queues kernels on `stream` (or on streams forked from it by events and joined
  // again); they are recorded and do not run. Throws Error when `work` allocates, waits for the host, or
  // throws; the stream is usable afterwards.
  Graph(StreamHandle stream, const std::function<void()>& work);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  // Queues the whole graph and returns without waiting.
  void launch(StreamHandle stream) const;
  // Kernels, copies and fills.
  size_t node_count() const { return node_count_; }

 private:
  CUgraphExec_st* executable_ = nullptr;
  size_t node_count_ = 0;
};

}  // namespace latente::cuda
