// A pool of threads that works through numbered pieces. The caller is one of them.
//
// Each thread has its own range of pieces and takes from it first, so that it streams neighbouring weights; when that
// is empty it takes from the others'. `run` returns when all pieces are done, not when all threads have arrived: a
// core that the system takes away holds up the one piece it was at, and a sleeping thread holds up nothing.
// Idle threads spin for about 50 us (a step's phases follow each other faster) and then sleep on a futex.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace hob {

class ThreadPool {
 public:
  using Work = void (*)(void* context, int piece, int thread);

  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Calls work(context, piece, thread) once for each piece in 0 .. num_pieces; thread in 0 .. num_threads.
  // One caller at a time. `work` may not throw.
  void run(int num_pieces, Work work, void* context);

  template <class F>
  void run(int num_pieces, F& f) {
    run(num_pieces, [](void* context, int piece, int thread) { (*static_cast<F*>(context))(piece, thread); }, &f);
  }

 private:
  // One range of pieces: epoch (24 bits), next piece (20), end (20). A successful exchange of the ticket proves that the
  // job fields below belong to that epoch: they change only after all pieces are done, and the one just taken is not.
  struct alignas(64) Range {
    std::atomic<uint64_t> ticket{0};
  };

  bool take_and_run(int thread);
  void loop(int thread);

  const int num_threads_;
  std::vector<Range> ranges_;
  alignas(64) std::atomic<Work> work_{nullptr};
  std::atomic<void*> context_{nullptr};
  alignas(64) std::atomic<int> num_unfinished_{0};
  alignas(64) std::atomic<uint32_t> signal_{0};  // bumped when there is work; the futex of idle threads
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> is_closing_{false};
  uint64_t epoch_ = 0;
  std::vector<std::thread> threads_;
};

}  // namespace hob
