#pragma once

#include <cstddef>
#include <utility>
#include <vector>

namespace spmoe {

/// First-in first-out queue in one block of memory. Doubles when full, never shrinks, so a queue
/// that has seen its longest state allocates nothing more. One thread.
template <class T>
class Ring {
 public:
  [[nodiscard]] bool empty() const noexcept { return size_ == 0; }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }

  /// The i-th oldest element; `i < size()`.
  [[nodiscard]] T& operator[](std::size_t i) { return items_[(head_ + i) % items_.size()]; }
  [[nodiscard]] T& front() { return (*this)[0]; }

  void push(T item) {
    if (size_ == items_.size()) grow();
    ++size_;
    (*this)[size_ - 1] = std::move(item);
  }

  T pop() {
    T item = std::move(front());
    head_ = (head_ + 1) % items_.size();
    --size_;
    return item;
  }

 private:
  void grow() {
    std::vector<T> larger(items_.empty() ? 16 : 2 * items_.size());
    for (std::size_t i = 0; i < size_; ++i) larger[i] = std::move((*this)[i]);
    items_ = std::move(larger);
    head_ = 0;
  }

  std::vector<T> items_;
  std::size_t head_ = 0;
  std::size_t size_ = 0;
};

}  // namespace spmoe
