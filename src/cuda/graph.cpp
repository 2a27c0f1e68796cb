#include "cuda/graph.h"

#include "cuda/runtime.h"

namespace latente::cuda {

Graph::Graph(StreamHandle stream, const std::function<void()>& work) {
  // Thread-local: calls that would break the capture are errors in this thread only, so that other threads
  // may allocate meanwhile.
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "graph capture");
  cudaGraph_t graph = nullptr;
  try {
    work();
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    throw;
  }
  check(cudaStreamEndCapture(stream, &graph), "graph capture");
  cudaError_t error = cudaGraphGetNodes(graph, nullptr, &node_count_);
  if (error == cudaSuccess)
    error = cudaGraphInstantiate(&executable_, graph, cudaGraphInstantiateFlagUseNodePriority);
  cudaGraphDestroy(graph);
  check(error, "graph instantiation");
}

Graph::~Graph() { cudaGraphExecDestroy(executable_); }

void Graph::launch(StreamHandle stream) const { check(cudaGraphLaunch(executable_, stream), "graph launch"); }

}  // namespace latente::cuda
