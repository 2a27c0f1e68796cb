#include "grammar/configurations.h"

#include <algorithm>
#include <limits>
#include <tuple>

#include "grammar/work.h"

namespace latente::grammar {
namespace {

// Frames of repetitions that a beginning takes in.
constexpr int most_repetitions = 3;

template <class T>
void sort_unique(std::vector<T>& all) {
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
}

}  // namespace

Configurations::Configurations(std::shared_ptr<const Automaton> automaton, size_t horizon,
                               const Limits& limits)
    : automaton_(std::move(automaton)),
      horizon_(horizon),
      limits_(limits),
      pending_of_(automaton_->rules().size(), none) {
  add_fixed_nodes();
}

void Configurations::add_fixed_nodes() {
  const Frame end{end_frame, 0, 0}, leave{leave_frame, 0, 0};
  const uint32_t first = find_or_add_node(std::span(&end, 1)),
                 second = find_or_add_node(std::span(&leave, 1));
  LATENTE_ASSERT(first == bottom && second == unknown_below);
}

std::span<const Item> Configurations::items(uint32_t configuration) const {
  return {items_.data() + configurations_[configuration].first, configurations_[configuration].size};
}

void Configurations::spend(uint64_t work) {
  work_ += work;
  if (work_ > step_end_) {
    throw TooMuch(fmt::format(
        "the grammar is too ambiguous: more than {} ways to go on at one place of the text", limits_.step));
  }
}

void Configurations::too_ambiguous() {
  throw TooMuch("the grammar is too ambiguous: too many steps to find the tokens that may come next");
}

// Nodes

// The count that stands for all that continue alike within the horizon. A turn reads at least a byte.
uint32_t Configurations::canonical_count(const Frame& frame) const {
  if (frame.state >= end_frame) return frame.count;
  const Automaton::Repetition* repetition = automaton_->repetition(frame.state);
  if (repetition == nullptr || frame.count >= unreached) return frame.count;
  if (frame.count < repetition->min) return repetition->min - frame.count > horizon_ ? 0 : frame.count;
  return repetition->max - frame.count > horizon_ ? repetition->min : frame.count;
}

// Sorts the frames and leaves out what others cover.
uint32_t Configurations::node_of(std::vector<Frame>& frames) {
  std::sort(frames.begin(), frames.end(), [](const Frame& a, const Frame& b) {
    return std::tie(a.state, a.parent, a.count) < std::tie(b.state, b.parent, b.count);
  });
  size_t kept = 0;
  bool covered = false;  // by a frame of the same state and parent that has reached the lower bound
  for (size_t i = 0; i < frames.size(); ++i) {
    const Frame frame = frames[i];
    if (i == 0 || frame.state != frames[kept - 1].state || frame.parent != frames[kept - 1].parent) {
      covered = false;
    } else if (covered || frame.count == frames[kept - 1].count) {
      continue;
    }
    if (frame.state < end_frame) {
      const Automaton::Repetition* repetition = automaton_->repetition(frame.state);
      covered = repetition != nullptr && may_leave(*repetition, frame.count);
    }
    frames[kept++] = frame;
  }
  frames.resize(kept);
  return find_or_add_node(frames);
}

uint32_t Configurations::find_or_add_node(std::span<const Frame> frames) {
  uint64_t hash = frames.size();
  for (const Frame& frame : frames) hash = mix(mix(mix(hash, frame.state), frame.count), frame.parent);
  bool is_new = false;
  const uint32_t found = node_table_.find(
      hash,
      [&](uint32_t node) {
        return std::equal(frames.begin(), frames.end(), this->frames(node).begin(), this->frames(node).end());
      },
      [&] {
        is_new = true;
        Node node{static_cast<uint32_t>(frames_.size()), static_cast<uint32_t>(frames.size()), 0, none};
        for (const Frame& frame : frames) {
          if (frame.state < end_frame) node.depth = std::max(node.depth, nodes_[frame.parent].depth + 1);
        }
        frames_.insert(frames_.end(), frames.begin(), frames.end());
        nodes_.push_back(node);
        return static_cast<uint32_t>(nodes_.size() - 1);
      });
  if (!is_new) return found;
  // Nodes below have theirs; at most one node is added here.
  std::vector<Frame> canonical(this->frames(found).begin(), this->frames(found).end());
  bool same = true;
  for (Frame& frame : canonical) {
    const uint32_t count = canonical_count(frame);
    const uint32_t parent = frame.state < end_frame ? nodes_[frame.parent].canonical : frame.parent;
    same = same && count == frame.count && parent == frame.parent;
    frame.count = count;
    frame.parent = parent;
  }
  nodes_[found].canonical = found;
  if (!same) {
    const uint32_t number = node_of(canonical);
    nodes_[found].canonical = number;
  }
  return found;
}

// Configurations

uint32_t Configurations::configuration_of(std::vector<Item>& items, bool can_end, bool leaves) {
  sort_unique(items);
  // One node a state.
  size_t kept = 0;
  for (size_t i = 0; i < items.size();) {
    size_t end = i + 1;
    while (end < items.size() && items[end].state == items[i].state) ++end;
    Item item = items[i];
    if (end - i > 1) {
      scratch_.clear();
      for (size_t j = i; j < end; ++j) {
        const std::span<const Frame> more = frames(items[j].node);
        spend(more.size());
        scratch_.insert(scratch_.end(), more.begin(), more.end());
      }
      item.node = node_of(scratch_);
    }
    items[kept++] = item;
    i = end;
  }
  items.resize(kept);

  uint64_t hash = items.size() * 4 + (can_end ? 2 : 0) + (leaves ? 1 : 0);
  for (const Item& item : items) hash = mix(mix(hash, item.state), item.node);
  return configuration_table_.find(
      hash,
      [&](uint32_t number) {
        const Configuration& other = configurations_[number];
        return other.can_end == can_end && other.leaves == leaves && other.size == items.size() &&
               std::equal(items.begin(), items.end(), items_.begin() + other.first);
      },
      [&] {
        configurations_.push_back({static_cast<uint32_t>(items_.size()), static_cast<uint32_t>(items.size()),
                                   unknown, can_end, leaves});
        items_.insert(items_.end(), items.begin(), items.end());
        transitions_.resize(transitions_.size() + automaton_->classes(), unknown);
        return static_cast<uint32_t>(configurations_.size() - 1);
      });
}

uint32_t Configurations::start() {
  const Automaton::Rule& root = automaton_->rules()[automaton_->root()];
  begin_closing();
  reach(root.start, 0, bottom);
  return finish_closing();
}

uint32_t Configurations::compute_step(uint32_t configuration, uint32_t byte_class) {
  const uint8_t byte = automaton_->representative(byte_class);
  begin_closing();
  bool any = false;
  const Configuration from = configurations_[configuration];
  for (uint32_t i = from.first; i < from.first + from.size; ++i) {
    const Item item = items_[i];
    const auto edges = automaton_->edges(item.state);
    spend(edges.size());
    for (const Automaton::Edge& edge : edges) {
      if (byte < edge.low || byte > edge.high) continue;
      any = true;
      reach(edge.target, 0, item.node);
    }
  }
  const uint32_t target = any ? finish_closing() : none;
  transitions_[size_t{configuration} * automaton_->classes() + byte_class] = target;
  return target;
}

uint32_t Configurations::canonical(uint32_t configuration) {
  if (configurations_[configuration].canonical != unknown) return configurations_[configuration].canonical;
  const Configuration from = configurations_[configuration];
  std::vector<Item> other(items_.begin() + from.first, items_.begin() + from.first + from.size);
  for (Item& item : other) item.node = nodes_[item.node].canonical;
  step_end_ = work_ + limits_.step;
  const uint32_t number = configuration_of(other, from.can_end, from.leaves);
  configurations_[configuration].canonical = number;
  configurations_[number].canonical = number;
  return number;
}

Configurations::Beginning Configurations::beginning(const Item& item, int more) const {
  Beginning out{{item.state}, item.node, {item.state}, std::numeric_limits<size_t>::max()};
  for (int repetitions = most_repetitions;;) {
    const std::span<const Frame> only = frames(out.below);
    if (only.size() != 1 || only[0].state >= end_frame) break;
    const Frame& frame = only[0];
    const Automaton::Repetition* repetition = automaton_->repetition(frame.state);
    if (--(repetition != nullptr ? repetitions : more) < 0) break;
    uint32_t free_count = frame.count;
    if (repetition != nullptr && repetition->max != Expression::unlimited) {
      // `count` turns will have been taken when this one ends, and each takes a byte.
      const bool low = frame.count < repetition->min;
      free_count = low ? unreached : unbounded;
      out.same_until =
          std::min<size_t>(out.same_until, (low ? repetition->min : repetition->max) - frame.count);
    }
    for (auto* key : {&out.key, &out.free_key}) key->push_back(frame.state);
    out.key.push_back(frame.count);
    out.free_key.push_back(free_count);
    out.below = frame.parent;
  }
  return out;
}

uint32_t Configurations::of_beginning(std::span<const uint32_t> key) {
  uint32_t node = unknown_below;
  for (size_t i = key.size(); i > 1; i -= 2) {
    scratch_.assign(1, {key[i - 2], key[i - 1], node});
    node = node_of(scratch_);
  }
  std::vector<Item> items{{key[0], node}};
  return configuration_of(items, false, false);
}

uint32_t Configurations::after(uint32_t node) {
  begin_closing();
  for (const Frame& frame : frames(node)) todo_.push_back(frame);
  for (const Frame& frame : todo_) seen_.insert(frame.state, frame.count, frame.parent);
  return finish_closing();
}

// Closing. Each (state, count, node) is passed once. Nodes of the rules that are called here are known when
// all is passed: until then they are pending, one a rule, whoever calls it.

void Configurations::begin_closing() {
  step_end_ = work_ + limits_.step;
  todo_.clear();
  seen_.clear();
  found_.clear();
  found_end_ = found_leave_ = false;
  for (size_t i = 0; i < open_; ++i) pending_of_[pending_[i].rule] = none;  // also after an Error
  open_ = 0;
}

void Configurations::reach(uint32_t state, uint32_t count, uint32_t node) {
  if (seen_.insert(state, count, node)) todo_.push_back({state, count, node});
}

void Configurations::pass(const Frame& at) {
  const auto [state, count, node] = at;
  spend(1);
  if (state == end_frame) {
    found_end_ = true;
    return;
  }
  if (state == leave_frame) {
    found_leave_ = true;
    return;
  }
  if (!automaton_->edges(state).empty()) found_.push_back({state, node});
  // A rule that was called here and ends here has read nothing: its caller went on without it.
  if (automaton_->final(state) && (node & pending_bit) == 0) {
    const std::span<const Frame> back = frames(node);
    spend(back.size());
    for (const Frame& frame : back) reach(frame.state, frame.count, frame.parent);
  }
  for (uint32_t to : automaton_->empties(state)) reach(to, 0, node);
  for (const Automaton::Call& to : automaton_->calls(state)) {
    call(to.rule, {to.next, 0, node}, node);
    if (automaton_->rules()[to.rule].nullable) reach(to.next, 0, node);
  }
  if (const Automaton::Repetition* repetition = automaton_->repetition(state)) {
    if (count >= unreached || count < repetition->max) {
      uint32_t next = count >= unreached ? count : count + 1;
      // Without an upper bound, all counts from the lower one on are alike.
      if (repetition->max == Expression::unlimited) next = std::min(next, repetition->min);
      const bool done = next == repetition->max && next != unbounded;
      call(repetition->rule, done ? Frame{repetition->next, 0, node} : Frame{state, next, node}, node);
    }
    if (may_leave(*repetition, count)) reach(repetition->next, 0, node);
  }
}

void Configurations::call(uint32_t rule, Frame frame, uint32_t node) {
  spend(1);
  if (pending_of_[rule] == none) {
    pending_of_[rule] = static_cast<uint32_t>(open_);
    if (open_ == pending_.size()) pending_.emplace_back();
    Pending& fresh = pending_[open_++];
    fresh.rule = rule;
    fresh.frames.clear();
    fresh.callers.clear();
    fresh.node = none;
    reach(automaton_->rules()[rule].start, 0, pending_bit | rule);
  }
  Pending& called = pending_[pending_of_[rule]];
  if (!automaton_->last(frame.state)) {
    called.frames.push_back(frame);
  } else if ((node & pending_bit) != 0) {
    called.callers.push_back(node & ~pending_bit);
  } else {
    const std::span<const Frame> back = frames(node);
    spend(back.size());
    called.frames.insert(called.frames.end(), back.begin(), back.end());
  }
}

uint32_t Configurations::resolved(uint32_t node) const {
  return (node & pending_bit) == 0 ? node : pending_[pending_of_[node & ~pending_bit]].node;
}

uint32_t Configurations::finish_closing() {
  while (!todo_.empty()) {
    const Frame at = todo_.back();
    todo_.pop_back();
    pass(at);
  }
  // Callers before what they call.
  std::vector<uint32_t> order(open_);
  for (size_t i = 0; i < open_; ++i) order[i] = static_cast<uint32_t>(i);
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    return automaton_->rules()[pending_[a].rule].rank < automaton_->rules()[pending_[b].rule].rank;
  });
  for (uint32_t i : order) {
    Pending& called = pending_[i];
    for (uint32_t caller : called.callers) {
      const uint32_t node = pending_[pending_of_[caller]].node;
      if (node == none) continue;
      const std::span<const Frame> back = frames(node);
      spend(back.size());
      called.frames.insert(called.frames.end(), back.begin(), back.end());
    }
    for (Frame& frame : called.frames) {
      if (frame.state < end_frame) frame.parent = resolved(frame.parent);
    }
    std::erase_if(called.frames, [&](const Frame& frame) {
      return frame.parent == none || (frame.state < end_frame && nodes_[frame.parent].depth >= limits_.depth);
    });
    called.node = called.frames.empty() ? none : node_of(called.frames);
  }
  for (Item& item : found_) item.node = resolved(item.node);
  std::erase_if(found_, [](const Item& item) { return item.node == none; });
  return configuration_of(found_, found_end_, found_leave_);
}

}  // namespace latente::grammar
