// Where reading can stand: all at once, in a form that is compared, shared and bounded.
//
// A configuration is a set of (state of the automaton, node). A node is the set of frames to which the rule
// that is being read may return: (state, count of a repetition, node below). This is the graph-structured
// stack of generalised parsing (Tomita 1985; Scott and Johnstone, "GLL parsing", 2010), with two changes.
// Frames hold no positions, and nodes and configurations are kept once each (hash-consing): what continues in
// the same way is the same number, at whatever place of the text. And a configuration has one node a state:
// where two meet, their frames are united. So alternatives that come together are merged, a call at the end
// of a rule passes the frames on instead of growing a stack, and of repetitions beyond their lower bound only
// the one with the most turns left is kept.
//
// Transitions are remembered: the grammar becomes a deterministic automaton as far as texts need it. All
// memory is bounded: when it is full, what no holder needs is dropped.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <set>
#include <span>
#include <vector>

#include "grammar/automaton.h"
#include "grammar/intern_table.h"

namespace latente::grammar {

struct Frame {
  uint32_t state, count, parent;
  auto operator<=>(const Frame&) const = default;
};

struct Item {
  uint32_t state, node;
  auto operator<=>(const Item&) const = default;
};

class Configurations {
 public:
  static constexpr uint32_t none = 0xFFFFFFFF;  // no configuration: nothing can be read

  struct Limits {
    uint32_t depth = 2048;              // frames above each other; deeper nesting is not admitted
    uint64_t step = uint64_t{1} << 16;  // frames and states that one byte may touch
    size_t configurations = size_t{1} << 15, nodes = size_t{1} << 17;
    size_t frames = size_t{1} << 20;  // of all nodes
    size_t items = size_t{1} << 19;   // of all configurations
  };

  // horizon: the longest text that is looked at from one configuration (canonical()), in bytes.
  Configurations(std::shared_ptr<const Automaton> automaton, size_t horizon, const Limits& limits);
  Configurations(std::shared_ptr<const Automaton> automaton, size_t horizon)
      : Configurations(std::move(automaton), horizon, Limits{}) {}

  uint32_t start();
  // Error when the grammar is so ambiguous here that the limits do not suffice.
  uint32_t step(uint32_t configuration, uint8_t byte) {
    const uint32_t byte_class = automaton_->class_of(byte);
    const uint32_t known = transitions_[size_t{configuration} * automaton_->classes() + byte_class];
    return known == unknown ? compute_step(configuration, byte_class) : known;
  }
  bool can_end(uint32_t configuration) const { return configurations_[configuration].can_end; }
  std::span<const Item> items(uint32_t configuration) const;

  // A configuration with the same continuations of up to `horizon` bytes, equal for many of those that differ
  // in the counts of repetitions only.
  uint32_t canonical(uint32_t configuration);

  // Looking at the top of a stack alone. beginning(): an item's state and, on top of `below`, the frames of
  // repetitions that it is in and `more` others; what lies under them is unknown, and returning there is
  // `leaves`. It ends above where a node has several frames.
  struct Beginning {
    std::vector<uint32_t> key;  // equal keys, equal beginnings
    uint32_t below;             // node
    // The same with repetitions whose bounds are never met: for texts of up to this many bytes there is no
    // difference.
    std::vector<uint32_t> free_key;
    size_t same_until;
  };
  Beginning beginning(const Item& item, int more = 0) const;
  uint32_t of_beginning(std::span<const uint32_t> key);
  bool leaves(uint32_t configuration) const { return configurations_[configuration].leaves; }
  // What follows when a rule with this node is left.
  uint32_t after(uint32_t node);

  // A number that stays what it is while memory is cleared, for as long as the holder lives.
  class Holder {
   public:
    explicit Holder(std::shared_ptr<Configurations> home, uint32_t configuration);
    Holder(const Holder& other) : Holder(other.home_, other.configuration_) {}
    Holder& operator=(const Holder& other);
    ~Holder();
    uint32_t get() const { return configuration_; }
    void set(uint32_t configuration) { configuration_ = configuration; }
    Configurations& home() const { return *home_; }

   private:
    friend class Configurations;
    std::shared_ptr<Configurations> home_;
    uint32_t configuration_;
  };
  bool full() const;
  // Drops everything but what holders and `others` need, whose numbers change. Error when that is too much.
  void collect(std::span<uint32_t> others = {});
  uint64_t collections() const { return collections_; }
  // Frames and states touched so far, and what was counted.
  uint64_t work() const { return work_; }
  // From now on, count() is an error once there is more than this.
  void limit_work(uint64_t most) { work_limit_ = work_ + most; }
  void count(uint64_t work) {
    work_ += work;
    if (work_ > work_limit_) too_ambiguous();
  }
  size_t memory_bytes() const;

 private:
  static constexpr uint32_t unknown = 0xFFFFFFFE;
  static constexpr uint32_t pending_bit = 0x80000000;  // of a node that is still being made: | its rule
  static constexpr uint32_t end_frame = 0xFFFFFFF0, leave_frame = 0xFFFFFFF1;  // states of bottom frames
  // Counts of repetitions in a free_key: that never reach the upper bound, or not even the lower one.
  static constexpr uint32_t unbounded = 0xFFFFFFFF, unreached = 0xFFFFFFFE;
  static constexpr uint32_t bottom = 0, unknown_below = 1;  // nodes

  struct Node {
    uint32_t first, size;  // frames
    uint32_t depth, canonical;
  };
  struct Configuration {
    uint32_t first, size;  // items
    uint32_t canonical = unknown;
    bool can_end = false, leaves = false;
  };
  struct Pending {  // a rule that is called from here
    uint32_t rule = 0;
    std::vector<Frame> frames;
    std::vector<uint32_t> callers;  // pending rules whose frames are this one's too
    uint32_t node = none;
  };

  std::span<const Frame> frames(uint32_t node) const {
    return {frames_.data() + nodes_[node].first, nodes_[node].size};
  }
  void add_fixed_nodes();
  uint32_t node_of(std::vector<Frame>& frames);
  uint32_t find_or_add_node(std::span<const Frame> frames);
  static bool may_leave(const Automaton::Repetition& repetition, uint32_t count) {
    return count == unbounded || (count != unreached && count >= repetition.min);
  }
  uint32_t canonical_count(const Frame& frame) const;
  uint32_t configuration_of(std::vector<Item>& items, bool can_end, bool leaves);
  uint32_t compute_step(uint32_t configuration, uint32_t byte_class);

  // Closing: from states just reached to those that read a byte.
  void begin_closing();
  void reach(uint32_t state, uint32_t count, uint32_t node);
  void pass(const Frame& at);
  void call(uint32_t rule, Frame frame, uint32_t node);
  uint32_t finish_closing();
  uint32_t resolved(uint32_t node) const;
  void spend(uint64_t work);
  [[noreturn]] static void too_ambiguous();

  std::shared_ptr<const Automaton> automaton_;
  size_t horizon_;
  Limits limits_;

  std::vector<Node> nodes_;
  std::vector<Frame> frames_;
  std::vector<Configuration> configurations_;
  std::vector<Item> items_;
  std::vector<uint32_t> transitions_;  // [configuration, class]
  InternTable node_table_, configuration_table_;
  std::set<Holder*> holders_;
  uint64_t collections_ = 0, work_ = 0, step_end_ = 0;
  uint64_t work_limit_ = std::numeric_limits<uint64_t>::max();

  // Of the closing that is going on.
  std::vector<Frame> todo_;  // (state, count, node)
  FrameSet seen_;
  std::vector<Item> found_;
  bool found_end_ = false, found_leave_ = false;
  std::vector<Pending> pending_;  // the first open_ are in use
  size_t open_ = 0;
  std::vector<uint32_t> pending_of_;  // by rule
  std::vector<Frame> scratch_;
};

}  // namespace latente::grammar
