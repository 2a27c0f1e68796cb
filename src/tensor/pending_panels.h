// Panels of weights that products read before they are laid out.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace latente {

// A matrix, or a stack of them, of a view with Layout::panels (View::pending). Somebody lays its matrices
// out, one after another, while others multiply with them: who reads a matrix looks whether it is there, and
// makes the panels that it needs for itself where it is not. They are the same bytes, so nothing else depends
// on it.
class PendingPanels {
 public:
  explicit PendingPanels(int64_t matrices) : matrices_(static_cast<size_t>(matrices)) {}
  virtual ~PendingPanels() = default;

  int64_t matrices() const { return static_cast<int64_t>(matrices_.size()); }
  // Matrix i where it is laid out, for good; null as long as it is not.
  const std::byte* at(int64_t i) const { return of(i).there.load(std::memory_order_acquire); }
  // The same, for a product: counts how often a matrix was missed.
  const std::byte* want(int64_t i) const {
    const std::byte* there = at(i);
    if (!there) of(i).missed.fetch_add(1, std::memory_order_relaxed);
    return there;
  }
  uint32_t missed(int64_t i) const { return of(i).missed.load(std::memory_order_relaxed); }

  // Panels [first, first + count) of matrix i, without what stands behind the last. May be called from
  // several threads at once. Error where what they are made of holds something that it must not.
  virtual void make(int64_t i, int64_t first, int64_t count, std::byte* to) const = 0;
  // Of floats: matrix i's rows, without gaps, which products then read as they lie.
  virtual const void* rows(int64_t /*i*/) const { return nullptr; }
  // Of FP8: matrix i's scales, which stand behind its panels.
  virtual const float* scales(int64_t /*i*/) const { return nullptr; }

  // Said by who has laid matrix i out.
  void set(int64_t i, const std::byte* panels) { of(i).there.store(panels, std::memory_order_release); }

 private:
  struct Matrix {
    std::atomic<const std::byte*> there{nullptr};
    mutable std::atomic<uint32_t> missed{0};
  };
  const Matrix& of(int64_t i) const { return matrices_[static_cast<size_t>(i)]; }
  Matrix& of(int64_t i) { return matrices_[static_cast<size_t>(i)]; }

  std::vector<Matrix> matrices_;
};

// One that is not laid out, or none.
struct PendingMatrix {
  const PendingPanels* panels = nullptr;
  int64_t index = 0;
  explicit operator bool() const { return panels != nullptr; }
};

}  // namespace latente
