// The pool of threads.h.
#include "threads.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hob {
namespace {

constexpr uint64_t kCountBits = 20;
constexpr uint64_t kCountMask = (uint64_t{1} << kCountBits) - 1;
constexpr auto kSpin = std::chrono::microseconds(50);

uint64_t make_ticket(uint64_t epoch, uint64_t next, uint64_t end) {
  return epoch << (2 * kCountBits) | next << kCountBits | end;
}
uint64_t next_of(uint64_t ticket) { return ticket >> kCountBits & kCountMask; }
uint64_t end_of(uint64_t ticket) { return ticket & kCountMask; }

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `is_over()` or the spinning time is up; returns whether it is over.
template <class F>
bool spin_until(F&& is_over) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (is_over()) return true;
      relax();
    }
    if (std::chrono::steady_clock::now() >= deadline) return false;
  }
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads), ranges_(static_cast<size_t>(num_threads)) {
  for (int i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { loop(i); });
}

ThreadPool::~ThreadPool() {
  is_closing_.store(true, std::memory_order_seq_cst);
  signal_.fetch_add(1, std::memory_order_seq_cst);
  signal_.notify_all();
  for (auto& thread : threads_) thread.join();
}

// Takes one piece, from `thread`'s own range or else from another's, and runs it. False: none was left.
bool ThreadPool::take_and_run(int thread) {
  for (int i = 0; i < num_threads_; ++i) {
    auto& ticket = ranges_[static_cast<size_t>((thread + i) % num_threads_)].ticket;
    uint64_t seen = ticket.load(std::memory_order_acquire);
    while (next_of(seen) < end_of(seen)) {
      if (!ticket.compare_exchange_weak(seen, seen + (uint64_t{1} << kCountBits), std::memory_order_acq_rel)) continue;
      work_.load(std::memory_order_relaxed)(context_.load(std::memory_order_relaxed), static_cast<int>(next_of(seen)), thread);
      if (num_unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) num_unfinished_.notify_one();
      return true;
    }
  }
  return false;
}

void ThreadPool::run(int num_pieces, Work work, void* context) {
  constexpr int kMost = static_cast<int>(kCountMask);
  if (num_threads_ == 1 || num_pieces <= 1 || num_pieces > kMost) {
    for (int piece = 0; piece < num_pieces; ++piece) work(context, piece, 0);
    return;
  }
  work_.store(work, std::memory_order_relaxed);
  context_.store(context, std::memory_order_relaxed);
  num_unfinished_.store(num_pieces, std::memory_order_relaxed);
  epoch_ = (epoch_ + 1) & ((uint64_t{1} << 24) - 1);
  for (int i = 0; i < num_threads_; ++i) {
    const auto first = static_cast<uint64_t>(int64_t{num_pieces} * i / num_threads_);
    const auto end = static_cast<uint64_t>(int64_t{num_pieces} * (i + 1) / num_threads_);
    ranges_[static_cast<size_t>(i)].ticket.store(make_ticket(epoch_, first, end), std::memory_order_release);
  }
  signal_.fetch_add(1, std::memory_order_seq_cst);
  if (num_sleeping_.load(std::memory_order_seq_cst) > 0) signal_.notify_all();
  while (take_and_run(0)) {
  }
  const auto is_done = [this] { return num_unfinished_.load(std::memory_order_acquire) == 0; };
  while (!spin_until(is_done)) {
    const int left = num_unfinished_.load(std::memory_order_acquire);
    if (left == 0) break;
    num_unfinished_.wait(left, std::memory_order_acquire);
  }
}

void ThreadPool::loop(int thread) {
  for (;;) {
    const uint32_t seen = signal_.load(std::memory_order_seq_cst);
    while (take_and_run(thread)) {
    }
    if (is_closing_.load(std::memory_order_seq_cst)) return;
    if (spin_until([&] { return signal_.load(std::memory_order_acquire) != seen; })) continue;
    num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
    signal_.wait(seen, std::memory_order_seq_cst);
    num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
  }
}

}  // namespace hob
