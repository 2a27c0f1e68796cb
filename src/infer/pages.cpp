#include "infer/pages.h"

#include <algorithm>

#include "base/error.h"

namespace latente {
namespace {

int64_t common(std::span<const int32_t> a, std::span<const int32_t> b) {
  return std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
}

}  // namespace

PagePool::PagePool(int64_t pages, int64_t page_size, int64_t ahead)
    : page_size_(page_size),
      ahead_(ahead),
      holders_(static_cast<size_t>(pages), 0),
      kept_(static_cast<size_t>(pages), 0) {
  for (int64_t page = pages; page-- > 0;) free_.push_back(static_cast<int32_t>(page));
}

std::pair<PagePool::Node*, int64_t> PagePool::closest(Node& node, std::span<const int32_t> tokens,
                                                      int64_t modules) const {
  Node* best = nullptr;
  int64_t most = 0;
  if (tokens.empty()) return {best, most};
  for (auto [at, end] = node.children.equal_range(tokens[0]); at != end; ++at) {
    if (at->second->modules < modules) continue;
    const int64_t same = common(at->second->tokens, tokens);
    if (same > most) best = at->second.get(), most = same;
  }
  return {best, most};
}

PagePool::Match PagePool::match(std::span<const int32_t> tokens, int64_t modules) {
  LATENTE_ASSERT(modules <= ahead_);
  Match match;
  ++clock_;
  for (Node* node = &root_;;) {
    auto [child, same] = closest(*node, tokens.subspan(static_cast<size_t>(match.positions)), modules);
    const int64_t right = std::clamp<int64_t>(same - modules, 0, page_size_);
    if (right == 0) return match;
    child->used = clock_;
    match.positions += right;
    if (right < page_size_) {
      match.partial = child->page;
      return match;
    }
    match.pages.push_back(child->page);
    if (same < page_size_ + ahead_) return match;
    node = child;
  }
}

void PagePool::release(int32_t page) {
  int32_t& holders = holders_[static_cast<size_t>(page)];
  LATENTE_ASSERT(holders > 0);
  if (--holders == 0) free_.push_back(page);
}

int64_t PagePool::available() const {
  int64_t count = 0;
  for (size_t page = 0; page < holders_.size(); ++page) count += holders_[page] == kept_[page] ? 1 : 0;
  return count;
}

void PagePool::keep(Node& node, int32_t page) {
  hold(page);
  ++kept_[static_cast<size_t>(page)];
  ++remembered_;
  node.page = page;
}

void PagePool::drop(Node& node) {
  --kept_[static_cast<size_t>(node.page)];
  --remembered_;
  release(node.page);
}

std::optional<int32_t> PagePool::take() {
  while (free_.empty()) {
    if (!evict()) return std::nullopt;
  }
  const int32_t page = free_.back();
  free_.pop_back();
  holders_[static_cast<size_t>(page)] = 1;
  return page;
}

void PagePool::oldest(Node& node, bool only_idle, Node*& found) const {
  for (auto& [token, child] : node.children) {
    const size_t page = static_cast<size_t>(child->page);
    if (!child->children.empty()) {
      oldest(*child, only_idle, found);
    } else if ((!only_idle || holders_[page] == kept_[page]) && (!found || child->used < found->used)) {
      found = child.get();
    }
  }
}

// Forgets an end of a prefix; false if nothing is remembered.
bool PagePool::evict() {
  Node* found = nullptr;
  oldest(root_, true, found);
  // Pages that sequences hold may lie below idle ones in the tree; to forget them costs nobody a page.
  if (!found) oldest(root_, false, found);
  if (found) remove(*found);
  return found != nullptr;
}

void PagePool::remove(Node& node) {
  drop(node);
  auto& siblings = node.parent->children;
  for (auto [at, end] = siblings.equal_range(node.tokens[0]); at != end; ++at) {
    if (at->second.get() == &node) {
      siblings.erase(at);
      return;
    }
  }
}

void PagePool::remember(std::span<const int32_t> tokens, std::span<const int32_t> pages, int64_t modules) {
  ++clock_;
  Node* node = &root_;
  for (size_t i = 0; !tokens.empty() && i < pages.size(); ++i) {
    const auto piece = tokens.first(std::min(tokens.size(), static_cast<size_t>(page_size_ + ahead_)));
    tokens = tokens.subspan(std::min(tokens.size(), static_cast<size_t>(page_size_)));
    auto [child, same] = closest(*node, piece, 0);
    const bool covered = child && same == static_cast<int64_t>(piece.size());
    if (covered && child->modules >= modules) {
      child->used = clock_;
    } else if (child && child->children.empty() && same == static_cast<int64_t>(child->tokens.size())) {
      // The same with fewer tokens, or without as many modules: this page is better.
      hold(pages[i]);  // it may be the same page
      drop(*child);
      keep(*child, pages[i]);
      release(pages[i]);
      child->tokens.assign(piece.begin(), piece.end());
      child->modules = modules;
      child->used = clock_;
    } else if (covered) {
      // With pages of others below it: it stays as it is, and what follows is of no more use.
      child->used = clock_;
      modules = child->modules;
    } else {
      auto made = std::make_unique<Node>();
      made->parent = node;
      made->tokens.assign(piece.begin(), piece.end());
      made->modules = modules;
      made->used = clock_;
      keep(*made, pages[i]);
      child = node->children.emplace(piece[0], std::move(made))->second.get();
    }
    if (static_cast<int64_t>(piece.size()) < page_size_ + ahead_) return;
    node = child;
  }
}

}  // namespace latente
