// Memory of large results that are gone, kept for the next ones.
//
// The C library hands such memory back to the system, and what comes from there costs a fault at the first
// write to each page: for one pass over memory, such as an activation's, as long as the pass itself takes.
// So up to KEPT bytes wait here instead; what has waited longest goes first. Blocks are whole huge pages.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace torchzoo {

constexpr size_t HUGE_PAGE = 2 << 20;

// Huge pages, where the system has them, need 512 times fewer faults, and fewer entries in the tables that
// translate addresses.
inline void in_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t last = (start + bytes) / HUGE_PAGE * HUGE_PAGE;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // if it can
#endif
}

class Pool {
 public:
  static constexpr size_t LEAST = 2 * HUGE_PAGE;  // of a result that gets such a block
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t KEPT = 0;  // so that what is gone is known to be
#else
  static constexpr size_t KEPT = size_t(512) << 20;
#endif

  static size_t block_size(size_t bytes) { return (bytes + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE; }

  // A block of `size` bytes, null where there is no more memory. One that waits may be up to an eighth larger
  // than was asked for: `size` is then set to that.
  void* take(size_t* size) {
    if (enter()) {
      auto best = spare_.end();
      for (auto at = spare_.begin(); at != spare_.end(); ++at)
        if (at->size >= *size && at->size - *size <= *size / 8 && (best == spare_.end() || at->size < best->size))
          best = at;
      void* found = best == spare_.end() ? nullptr : best->data;
      if (found) {
        *size = best->size;
        waiting_ -= best->size;
        spare_.erase(best);
      }
      leave();
      if (found) return found;
    }
    void* made = std::aligned_alloc(HUGE_PAGE, *size);
    if (made) in_huge_pages(made, *size);
    return made;
  }

  void give(void* data, size_t size) {
    if (size > KEPT || !enter()) return std::free(data);
    spare_.push_back({data, size});
    waiting_ += size;
    trim(KEPT);
    leave();
  }

  // Returns how many bytes were waiting.
  size_t release() {
    if (!enter()) return 0;
    const size_t before = waiting_;
    trim(0);
    leave();
    return before;
  }

 private:
  struct Block {
    void* data;
    size_t size;
  };

  void trim(size_t most) {
    auto end = spare_.begin();
    for (; waiting_ > most; ++end) {
      waiting_ -= end->size;
      std::free(end->data);
    }
    spare_.erase(spare_.begin(), end);
  }

  // Nobody waits to enter: a process that forked while another thread was inside would wait for ever.
  bool enter() { return !busy_.test_and_set(std::memory_order_acquire); }
  void leave() { busy_.clear(std::memory_order_release); }

  std::atomic_flag busy_;
  std::vector<Block> spare_;  // in the order in which they came
  size_t waiting_ = 0;
};

// Never destroyed: results may outlive everything else.
inline Pool& pool() {
  static Pool* const one = new Pool;
  return *one;
}

}  // namespace torchzoo
