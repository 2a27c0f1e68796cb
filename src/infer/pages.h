// Who holds which page of the latent cache: sequences that run, and a tree of prefixes that have run before
// (as SGLang's radix tree, Zheng et al. 2024, by pages). Host only; the pages themselves are the runner's.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <vector>

namespace latente {

class PagePool {
 public:
  // `ahead`: tokens after a position that its entries depend on too: the number of MTP modules, of which
  // module k has read k + 1 further.
  PagePool(int64_t pages, int64_t page_size, int64_t ahead = 0);

  // What is known of a sequence that begins with some tokens: the entries of its first `positions` positions.
  // They lie in whole pages, which can be shared, and at the beginning of one more, which can be copied.
  struct Match {
    int64_t positions = 0;
    std::vector<int32_t> pages;
    int32_t partial = -1;
  };
  // The longest known prefix that the first `modules` MTP modules have run too.
  Match match(std::span<const int32_t> tokens, int64_t modules);

  // A free page, held once; of prefixes nobody uses, the one not used for longest gives way. Nothing when
  // every page is held.
  std::optional<int32_t> take();
  void hold(int32_t page) { ++holders_[static_cast<size_t>(page)]; }
  void release(int32_t page);
  // Pages that take() could give.
  int64_t available() const;

  // Keeps the prefix `tokens`, whose entries lie in `pages` (tokens beyond these are what modules have read
  // ahead), for later sequences; what is known already stays where it is. `modules` MTP modules have run
  // there, too. The caller goes on holding its pages.
  void remember(std::span<const int32_t> tokens, std::span<const int32_t> pages, int64_t modules);

  int64_t page_size() const { return page_size_; }
  int64_t pages() const { return static_cast<int64_t>(holders_.size()); }
  // Pages of remembered prefixes.
  int64_t remembered() const { return remembered_; }

 private:
  struct Node {
    Node* parent = nullptr;
    std::vector<int32_t> tokens;  // of the page and `ahead` more; fewer only without children
    int32_t page = -1;
    int64_t modules = 0;
    uint64_t used = 0;
    std::multimap<int32_t, std::unique_ptr<Node>> children;  // by first token
  };
  // The child that shares most tokens, and how many.
  std::pair<Node*, int64_t> closest(Node& node, std::span<const int32_t> tokens, int64_t modules) const;
  bool evict();
  void oldest(Node& node, bool only_idle, Node*& found) const;
  void remove(Node& node);
  void keep(Node& node, int32_t page);
  void drop(Node& node);

  int64_t page_size_, ahead_;
  std::vector<int32_t> holders_;  // by page: sequences, and nodes of the tree
  std::vector<int32_t> kept_;     // by page: nodes of the tree alone
  std::vector<int32_t> free_;
  Node root_;
  int64_t remembered_ = 0;
  uint64_t clock_ = 0;
};

}  // namespace latente
