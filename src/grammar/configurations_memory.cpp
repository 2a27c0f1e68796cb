// Who needs which configurations, and dropping the others.
#include <algorithm>

#include "grammar/configurations.h"
#include "grammar/work.h"

namespace latente::grammar {

Configurations::Holder::Holder(std::shared_ptr<Configurations> home, uint32_t configuration)
    : home_(std::move(home)), configuration_(configuration) {
  home_->holders_.insert(this);
}

Configurations::Holder& Configurations::Holder::operator=(const Holder& other) {
  if (this == &other) return *this;
  if (home_ != other.home_) {
    home_->holders_.erase(this);
    home_ = other.home_;
    home_->holders_.insert(this);
  }
  configuration_ = other.configuration_;
  return *this;
}

Configurations::Holder::~Holder() { home_->holders_.erase(this); }

bool Configurations::full() const {
  return configurations_.size() > limits_.configurations || nodes_.size() > limits_.nodes ||
         frames_.size() > limits_.frames || items_.size() > limits_.items;
}

void Configurations::collect(std::span<uint32_t> others) {
  ++collections_;
  std::vector<uint32_t*> roots;
  for (Holder* holder : holders_) roots.push_back(&holder->configuration_);
  for (uint32_t& other : others) roots.push_back(&other);
  std::erase_if(roots, [](const uint32_t* root) { return *root == none; });

  std::vector<Node> nodes;
  std::vector<Frame> frames;
  std::vector<Configuration> configurations;
  std::vector<Item> items;
  nodes.swap(nodes_);
  frames.swap(frames_);
  configurations.swap(configurations_);
  items.swap(items_);
  transitions_.clear();
  node_table_.clear();
  configuration_table_.clear();
  add_fixed_nodes();

  // A node's parents have lower numbers.
  std::vector<bool> needed(nodes.size(), false);
  for (const uint32_t* root : roots) {
    const Configuration& configuration = configurations[*root];
    for (uint32_t i = 0; i < configuration.size; ++i) needed[items[configuration.first + i].node] = true;
  }
  for (size_t node = nodes.size(); node-- > 0;) {
    if (!needed[node]) continue;
    for (uint32_t i = 0; i < nodes[node].size; ++i) needed[frames[nodes[node].first + i].parent] = true;
  }
  std::vector<uint32_t> number(nodes.size(), none);
  std::vector<Frame> moved;
  for (size_t node = 0; node < nodes.size(); ++node) {
    if (!needed[node]) continue;
    moved.clear();
    for (uint32_t i = 0; i < nodes[node].size; ++i) {
      Frame frame = frames[nodes[node].first + i];
      if (frame.state < end_frame) frame.parent = number[frame.parent];
      moved.push_back(frame);
    }
    number[node] = node_of(moved);
  }
  std::vector<Item> moved_items;
  for (uint32_t* root : roots) {
    const Configuration& configuration = configurations[*root];
    moved_items.clear();
    for (uint32_t i = 0; i < configuration.size; ++i) {
      const Item item = items[configuration.first + i];
      moved_items.push_back({item.state, number[item.node]});
    }
    step_end_ = work_ + limits_.step;
    *root = configuration_of(moved_items, configuration.can_end, configuration.leaves);
  }
  if (configurations_.size() > limits_.configurations / 2 || nodes_.size() > limits_.nodes / 2 ||
      frames_.size() > limits_.frames / 2 || items_.size() > limits_.items / 2) {
    throw TooMuch(fmt::format("the grammar needs too much memory here: {} places in {} nodes of {} frames",
                              configurations_.size(), nodes_.size(), frames_.size()));
  }
}

size_t Configurations::memory_bytes() const {
  return nodes_.capacity() * sizeof(Node) + frames_.capacity() * sizeof(Frame) +
         configurations_.capacity() * sizeof(Configuration) + items_.capacity() * sizeof(Item) +
         transitions_.capacity() * sizeof(uint32_t) + node_table_.memory_bytes() +
         configuration_table_.memory_bytes();
}

}  // namespace latente::grammar
