// A Plan that must fit in memory: which results of the forward pass are dropped after their last use there
// and made again for the backward pass (Chen et al. 2016, arXiv:1604.06174; which ones by their cost a byte,
// as Korthikanti et al. 2022, arXiv:2205.05198, choose). A node that runs again writes where it wrote before,
// so nothing else needs to know.
#include <algorithm>
#include <unordered_set>

#include "tensor/plan.h"

namespace latente {
namespace {

// Operations that take as long as moving a byte; of a GPU's order, and only a ranking rests on it.
constexpr double operations_a_byte = 200;

double product_operations(const std::vector<Tensor>& reads, const std::vector<Tensor>& writes) {
  double sum = 0;
  for (const Tensor& read : reads) {
    const int rank = read.shape().rank();
    if (!read.requires_grad() || read.plan() || rank < 2) continue;
    sum += 2.0 * static_cast<double>(writes.front()[0] * read[rank - 1] * read[rank - 2]);
  }
  return sum;
}

}  // namespace

class Plan::Recomputation {
 public:
  explicit Recomputation(Plan& plan) : plan_(plan) {
    for (const Tensor& tensor : plan.intermediates_) facts_[root_of(tensor)];
    note_uses();
    for (size_t i = 0; i < plan_.backward_begin_; ++i) repeatable_.push_back(is_repeatable(i));
    for (const Tensor& tensor : plan.intermediates_) {
      Facts& facts = facts_.at(root_of(tensor));
      facts.makeable = is_makeable(root_of(tensor), facts);
      if (facts.makeable && facts.read_in_backward) candidates_.push_back(root_of(tensor));
    }
    // Of equals the earliest, whose memory is free the longest.
    std::unordered_map<const Value*, double> rank;
    for (const Value* root : candidates_)
      rank[root] = cost_of(root) / static_cast<double>(plan_.lifetimes_.at(root).bytes);
    std::stable_sort(candidates_.begin(), candidates_.end(),
                     [&](const Value* a, const Value* b) { return rank[a] < rank[b]; });
  }

  size_t candidates() const { return candidates_.size(); }

  // The plan's steps when the first `count` candidates are dropped.
  std::vector<Step> steps(size_t count) {
    dropped_ = {candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(count)};
    present_.clear(), repeated_.clear(), steps_.clear();
    for (size_t i = 0; i < plan_.nodes_.size(); ++i) {
      const Node& node = plan_.nodes_[i];
      if (node.replaced) continue;
      if (i >= plan_.backward_begin_) {
        for (const Tensor& tensor : node.reads) provide(root_of(tensor));
      }
      steps_.push_back({&node, false, {}});
    }
    return std::move(steps_);
  }

  double share_of(const std::vector<Step>& steps) const {
    double again = 0, forward = 0;
    for (size_t i = 0; i < plan_.backward_begin_; ++i) {
      if (!plan_.nodes_[i].replaced) forward += cost({&plan_.nodes_[i], false, {}});
    }
    for (const Step& step : steps) again += step.again ? cost(step) : 0;
    return again / forward;
  }

 private:
  struct Facts {
    std::vector<size_t> writers;  // nodes
    bool read_in_backward = false;
    bool makeable = false;  // again, from what is there in the backward pass
  };

  void note_uses() {
    for (size_t i = 0; i < plan_.nodes_.size(); ++i) {
      const Node& node = plan_.nodes_[i];
      if (node.replaced) continue;
      for (const Tensor& tensor : node.writes) {
        auto found = facts_.find(root_of(tensor));
        if (found == facts_.end()) continue;
        std::vector<size_t>& writers = found->second.writers;
        if (writers.empty() || writers.back() != i) writers.push_back(i);
      }
      if (i < plan_.backward_begin_) continue;
      for (const Tensor& tensor : node.reads) {
        auto found = facts_.find(root_of(tensor));
        if (found != facts_.end()) found->second.read_in_backward = true;
      }
    }
  }

  // It changes nothing that persists; what it reads is not changed afterwards; and what it writes is not,
  // unless that is one value, all of whose writers then run again.
  bool is_repeatable(size_t index) const {
    const Node& node = plan_.nodes_[index];
    if (node.replaced) return false;
    std::unordered_set<const Value*> own;
    for (const Tensor& tensor : node.writes) {
      if (!facts_.contains(root_of(tensor))) return false;
      own.insert(root_of(tensor));
    }
    const auto changed_later = [&](const Value* root) { return facts_.at(root).writers.back() > index; };
    if (own.size() > 1 && std::any_of(own.begin(), own.end(), changed_later)) return false;
    const Step step{&node, true, {}};
    for (const Tensor& tensor : step.reads()) {
      auto found = facts_.find(root_of(tensor));
      if (found == facts_.end() || own.contains(root_of(tensor))) continue;
      const Gradients::Region region = Gradients::region_of(tensor);
      for (size_t writer : found->second.writers) {
        if (writer <= index) continue;
        for (const Tensor& written : plan_.nodes_[writer].writes) {
          if (root_of(written) == root_of(tensor) &&
              !Gradients::disjoint(Gradients::region_of(written), region))
            return false;
        }
      }
    }
    return true;
  }

  bool is_makeable(const Value* root, const Facts& facts) const {
    const Lifetime& lifetime = plan_.lifetimes_.at(root);
    return !lifetime.kept && !lifetime.checkpoint && !facts.writers.empty() &&
           std::all_of(facts.writers.begin(), facts.writers.end(), [&](size_t i) {
             if (i >= plan_.backward_begin_ || !repeatable_[i]) return false;
             const Node::Again& again = plan_.nodes_[i].again;
             return !again.run || std::any_of(again.writes.begin(), again.writes.end(),
                                              [&](const Tensor& tensor) { return root_of(tensor) == root; });
           });
  }

  // Bytes touched, and operations as bytes.
  static double cost(const Step& step) {
    double sum = product_operations(step.reads(), step.writes()) / operations_a_byte;
    for (const auto* tensors : {&step.reads(), &step.writes()}) {
      for (const Tensor& tensor : *tensors)
        sum += static_cast<double>(tensor.count() * size_of(tensor.dtype()));
    }
    return sum;
  }

  // With that of what has to be made for it.
  double cost_of(const Value* root) {
    auto [found, is_new] = costs_.try_emplace(root, 0);
    if (!is_new) return found->second;
    double sum = 0;
    for (size_t writer : facts_.at(root).writers) {
      const Step step{&plan_.nodes_[writer], true, {}};
      sum += cost(step);
      for (const Tensor& tensor : step.reads()) {
        auto read = facts_.find(root_of(tensor));
        if (read != facts_.end() && read->second.makeable && !read->second.read_in_backward)
          sum += cost_of(read->first);
      }
    }
    return costs_[root] = sum;
  }

  // Sees to it that the value is there for the node that comes next.
  void provide(const Value* root) {
    auto found = facts_.find(root);
    if (found == facts_.end() || !found->second.makeable || !present_.insert(root).second) return;
    if (found->second.read_in_backward && !dropped_.contains(root)) return;
    for (size_t writer : found->second.writers) repeat(writer);
  }

  void repeat(size_t index) {
    if (!repeated_.insert(index).second) return;
    Step step{&plan_.nodes_[index], true, {}};
    for (const Tensor& tensor : step.reads()) {
      const bool own = std::any_of(step.writes().begin(), step.writes().end(), [&](const Tensor& written) {
        return root_of(written) == root_of(tensor);
      });
      if (!own) provide(root_of(tensor));
    }
    std::vector<const Value*> unfinished;
    for (const Tensor& tensor : step.writes()) {
      const Value* root = root_of(tensor);
      const Facts& facts = facts_.at(root);
      if (facts.writers.front() == index && facts.makeable &&
          (dropped_.contains(root) || !facts.read_in_backward))
        step.anew.push_back(root);
      if (present_.insert(root).second) unfinished.push_back(root);
    }
    steps_.push_back(std::move(step));
    for (const Value* root : unfinished) {
      for (size_t writer : facts_.at(root).writers) repeat(writer);
    }
  }

  Plan& plan_;
  std::unordered_map<const Value*, Facts> facts_;
  std::vector<bool> repeatable_;
  std::vector<const Value*> candidates_;
  std::unordered_map<const Value*, double> costs_;
  // Of steps() at work:
  std::unordered_set<const Value*> dropped_, present_;
  std::unordered_set<size_t> repeated_;
  std::vector<Step> steps_;
};

// The fewest dropped that fit; where nothing fits, the best found.
void Plan::drop_what_is_cheap() {
  Recomputation recomputation(*this);
  size_t best = 0;
  int64_t best_bytes = arena_bytes_;
  auto bytes_without = [&](size_t count) {
    steps_ = recomputation.steps(count);
    place_steps();
    if (best_bytes > options_.memory ? arena_bytes_ < best_bytes
                                     : arena_bytes_ <= options_.memory && count < best)
      best = count, best_bytes = arena_bytes_;
    return arena_bytes_;
  };
  size_t low = 0, high = recomputation.candidates();
  bytes_without(high);
  while (high - low > 1) {
    const size_t middle = (low + high) / 2;
    (bytes_without(middle) <= options_.memory ? high : low) = middle;
  }
  bytes_without(best);
  recomputed_share_ = recomputation.share_of(steps_);
}

}  // namespace latente
