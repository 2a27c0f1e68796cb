// Plan: ops recorded once for one shape, then replayed.
//
//   Plan plan(backend, {.training = true});
//   Tensor ids = plan.input("ids", {tokens}, DType::i32);
//   Tensor loss = model(ids, ...);  // each op records a node
//   plan.backward({loss});          // appends gradient nodes, which add to each parameter's `grad`
//   plan.compile();                 // liveness: every intermediate gets an offset in one arena
//   plan.allocate();                // arena_bytes() of memory
//   plan.run();                     // a loop over the nodes, or its replay
//
// Whatever varies between runs is a tensor, never a host branch, so that a device can record a run and replay
// it (Backend::record): the second run of a plan is recorded, the first may still set kernels up.
#pragma once

#include <functional>
#include <map>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "tensor/backend.h"
#include "tensor/tensor.h"

namespace latente {

class Gradients;

struct PlanOptions {
  bool training = false;  // record what gradients need
  // Gradients of parameters are written over what is there, instead of added to it.
  bool fresh_gradients = false;
  // Linear layers and experts multiply in FP8, with gradients alone, where Backend::multiplies_fp8. A step's
  // first plan, that with fresh gradients, quantises the weights (Value::fp8) for those that follow.
  bool fp8 = false;
  // Gradients of parameters are made beside the rest of the backward pass where Backend::runs_beside, which
  // takes more memory; not together with `memory`.
  bool beside = false;
  // Bytes that intermediates should fit in, if not 0: results of the forward pass are then dropped and made
  // again for the backward pass, cheapest a byte first, until they do, or as far as it helps.
  int64_t memory = 0;
  // false records each op by itself even without gradients: for whoever looks between them
  bool fuse = true;
  // false gives every intermediate its own memory: the oracle of the liveness tests
  bool reuse_memory = true;
};

// The tensors of an Fp8Operand.
struct Fp8Tensors {
  Tensor codes, scales, across_codes, across_scales;

  explicit operator bool() const { return static_cast<bool>(codes); }
  Fp8Matrix along() const { return {codes.view(), scales.view()}; }
  Fp8Matrix across() const { return {across_codes.view(), across_scales.view()}; }
  Fp8Operand view() const { return {along(), across()}; }
};

class Plan {
 public:
  using Run = std::function<void(Backend&)>;
  using Gradient = std::function<void(Gradients&)>;

  explicit Plan(Backend& backend, PlanOptions options = {}) : backend_(&backend), options_(options) {}
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // A persistent tensor that the host fills before run().
  Tensor input(std::string name, Shape shape, DType dtype);
  // The result of the node recorded next; memory comes with compile().
  Tensor intermediate(Shape shape, DType dtype);
  // The same memory as `x` after an op changed it in place; `x` itself must not be read by later nodes,
  // gradients among them: compile() throws if one does.
  Tensor updated(const Tensor& x);

  // Appends a node. `reads` and `writes` must name every tensor the closure touches: liveness rests on them.
  void record(const char* op, std::vector<Tensor> reads, std::vector<Tensor> writes, Run run,
              Gradient gradient = {});
  // How the node recorded last can make some of its results again without all that it read. Where nothing is
  // said, it runs as the first time.
  void record_again(std::vector<Tensor> reads, std::vector<Tensor> writes, Run run);
  // Never drops the tensor to make it again: what stands before a layer, or costs more than it holds.
  void checkpoint(const Tensor& tensor);

  // Appends the gradient of the sum of `losses` (scalars) with respect to every parameter that requires it.
  void backward(const std::vector<Tensor>& losses);

  // Keeps an intermediate's memory from being reused, so that it can be read after run().
  void keep(const Tensor& tensor);

  void compile();
  // Memory for inputs and intermediates. Plans that never run at the same time may share one arena of at
  // least arena_bytes(); a plan may be moved to another arena between runs. Parameters must stay where they
  // are from the first run on.
  void allocate(std::shared_ptr<void> arena = nullptr);
  void run();
  // A loop over the nodes, whatever was recorded.
  void run_eagerly();
  // As run(), but throws Error naming the first op whose result is not finite, and the parameters it read.
  void run_checked();
  // As run(), calling `observe` before each op with its name and what it reads.
  using Observer = std::function<void(std::string_view op, std::span<const Tensor> reads)>;
  void run_observed(const Observer& observe);
  // As run(), adding each op's wall time to `seconds` under its name and those of the parameters it reads,
  // layers together: "linear q_proj".
  void run_profiled(std::map<std::string, double>& seconds);

  Backend& backend() const { return *backend_; }
  bool training() const { return options_.training; }
  // Whether ops are recorded as the backend's fused calls where there are such.
  bool fuses() const { return !options_.training && options_.fuse && backend_->fuses(); }
  // Whether gates and what they gate are recorded as one node: not where parts of it may have to be made
  // again for want of memory.
  bool fuses_gates() const { return options_.training ? options_.memory == 0 : fuses(); }
  bool multiplies_fp8() const { return options_.training && options_.fp8; }
  bool fresh_gradients() const { return options_.fresh_gradients; }
  // x in FP8, empty until somebody quantises it: one of several ops that read it.
  Fp8Tensors& fp8_of(const Tensor& x);
  int64_t arena_bytes() const { return arena_bytes_; }
  // The sum over intermediates: what one buffer per value would need.
  int64_t unplanned_bytes() const { return unplanned_bytes_; }
  int64_t input_bytes() const;
  size_t node_count() const { return nodes_.size(); }
  // The work done again in the backward pass, as a share of the forward pass's (see PlanOptions::memory).
  double recomputed_share() const { return recomputed_share_; }
  // One line per node: op, where it was recorded, shapes.
  std::string describe() const;

  // Names where nodes are recorded: "model.layers.3.mlp". Nests.
  class Scope {
   public:
    Scope(Plan* plan, std::string_view name);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Plan* plan_;
    size_t length_ = 0;
  };

 private:
  friend class Gradients;

  struct Node {
    const char* op;
    std::string scope;
    std::vector<Tensor> reads, writes;
    Run run;
    Gradient gradient;
    bool replaced = false;
    struct Again {
      std::vector<Tensor> reads, writes;
      Run run;
    } again;
  };
  // One op of a run. In its second run a node may be asked for less (Node::again).
  struct Step {
    const Node* node;
    bool again = false;              // for the backward pass
    std::vector<const Value*> anew;  // results whose earlier life has ended
    int beside = -1;                 // which of the parts that run beside the others it is
    int after = -1;                  // the part, counted with earlier ones, that it waits for
    bool partly() const { return again && node->again.run; }
    const std::vector<Tensor>& reads() const { return partly() ? node->again.reads : node->reads; }
    const std::vector<Tensor>& writes() const { return partly() ? node->again.writes : node->writes; }
    const Run& run() const { return partly() ? node->again.run : node->run; }
  };
  struct Lifetime {
    struct Span {
      int first, last;  // steps
    };
    std::vector<Span> spans;  // one, or before and after it was dropped
    int64_t bytes = 0, offset = 0;
    bool kept = false, checkpoint = false;
    bool overlaps(const Lifetime& other) const;
  };

  Lifetime& lifetime_of(const Tensor& tensor);
  void check_order() const;
  void put_beside();
  void place_steps();
  void drop_what_is_cheap();
  class Recomputation;

  Backend* backend_;
  PlanOptions options_;
  std::string scope_;
  std::vector<Node> nodes_;
  size_t backward_begin_ = 0;  // the first node of the backward pass; 0 = there is none
  std::vector<Step> steps_;    // what run() does, once compiled
  int parts_beside_ = 0;       // steps that run beside the others
  double recomputed_share_ = 0;
  std::vector<Tensor> inputs_;
  std::vector<Tensor> intermediates_;  // roots only
  std::unordered_map<const Value*, Lifetime> lifetimes_;
  struct Fp8Entry {
    Tensor of;  // kept, so that the key remains its own
    Fp8Tensors tensors;
  };
  std::unordered_map<const Value*, Fp8Entry> fp8_;
  int64_t arena_bytes_ = 0, unplanned_bytes_ = 0;
  std::shared_ptr<void> arena_;
  RepeatedWork repeated_;
  bool compiled_ = false;
};

// What an op's gradient function works with, while plan.backward() walks the nodes in reverse.
class Gradients {
 public:
  explicit Gradients(Plan& plan) : plan_(plan) {}

  Plan& plan() const { return plan_; }
  // True when an op gave y a gradient or y is a loss: otherwise the op contributes nothing.
  bool reached(const Tensor& y) const;
  // The complete gradient arriving at y, shaped as y; what nobody wrote is zeroed first, a loss gets its one.
  Tensor of(const Tensor& y);

  // As of(), for an op that changes the gradient in place (an in-place op's own gradient).
  Tensor updatable(const Tensor& y);

  // Where an op puts its contribution to x's gradient: the first contribution writes, later ones add. A null
  // destination means that x needs no gradient.
  struct Slot {
    Tensor tensor;
    bool accumulate = false;
    explicit operator bool() const { return static_cast<bool>(tensor); }
    Grad view() const { return {tensor.view(), accumulate}; }
  };
  Slot slot(const Tensor& x);

  // x's contribution equals `gradient` itself: no copy is made when it is the first one.
  void share(const Tensor& x, const Tensor& gradient);

  // The op computes its result while computing gradients (a fused loss): its forward node is dropped.
  void replace_forward() { plan_.nodes_[node_].replaced = true; }

 private:
  friend class Plan;
  // A run of columns of a root seen as rows of `period` elements; the whole root is {0, 0, 0}.
  struct Region {
    int64_t period = 0, begin = 0, end = 0;
    bool operator==(const Region&) const = default;
  };
  static constexpr Region irregular{-1, 0, 0};  // any other part: some columns of some rows
  struct Entry {
    Tensor buffer;                // shaped as the root
    std::vector<Region> written;  // disjoint, of one period, never irregular
    bool loss = false;
  };
  static Region region_of(const Tensor& x);
  static bool disjoint(const Region& a, const Region& b);
  static bool covers(const Entry& entry, const Region& region);
  Tensor region_view(const Tensor& buffer, const Tensor& x) const;
  Entry& entry_of(const Value* root);
  void fill(const Tensor& tensor, double value);
  void complete(const Value* root, Entry& entry);
  void complete_parameters();
  void make_private(const Value* root, Entry& entry);

  Plan& plan_;
  size_t node_ = 0;
  std::unordered_map<const Value*, Entry> entries_;
};

}  // namespace latente
