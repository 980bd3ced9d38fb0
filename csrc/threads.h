// A pool of threads that works through chains of jobs. A job is a number of pieces that may all run at once; the next job
// of a chain begins when the last piece is done. The caller is one of the threads.
//
//   job n       pieces taken by whoever is there        each thread has a range of its own and takes from it first, so
//               |                                       that it streams neighbouring weights, then from the others'
//               last piece done -> that thread asks the chain for job n + 1 and opens it
//
// The system takes cores away, for longer than a whole step takes. So nothing waits for a certain thread: a chain goes on
// with whoever runs (also past the caller), and the pieces of a repeatable job are in three parts:
//
//   prepare   once per thread and job: takes what it needs of memory that other jobs write (not this one's commits, which
//             run meanwhile) into memory of its own
//   compute   reads that and what never changes, writes memory of its own. May be done twice, or long after its job is over
//   commit    puts the result where others see it. Once per piece: whoever claims the piece does it
//
// A thread that has done its part computes again what others have not finished, after waiting as long as the job has
// taken so far; the thread that was late finds its piece claimed and drops what it has. Only prepare and commit, which
// are short, hold up the others if the core is taken away in them. Pieces of a job that is not repeatable are run once,
// where they are taken.
//
// Where there are as many threads as cores, each has a core of its own: the system shares out time by group, and to it two
// threads of one program on one core are as fair as one on each. The caller stays where it is, because a thread that
// changes its own affinity gives up its turn on a core that others want too; the others keep to the cores it is not on.
//
// A chain often ends while the caller's core is taken away. Whoever ended it has a core at that moment: it calls the
// caller over and sleeps. At the next chain it gets the core that the caller has left.
//
// Threads with nothing to do spin for about 50 us (jobs follow each other faster) and then sleep on a futex, so that the
// system finds the core idle and brings over a thread that waits for another core.
#pragma once

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

namespace hob {

// By the steady clock.
inline int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct Job {
  int num_pieces = 0;
  void* context = nullptr;
  void (*work)(void* context, int piece, int thread) = nullptr;  // runs a piece; of a repeatable job: commits it
  void* (*prepare)(void* context, int thread) = nullptr;         // repeatable jobs only; the result goes to compute
  void (*compute)(void* prepared, int piece) = nullptr;
  int64_t start_ns = 0;  // of a repeatable job: when it began, by now_ns()
};

class Chain {
 public:
  virtual ~Chain() = default;
  // The next job, or one without pieces when the chain is over. Called by one thread at a time, when all pieces of the
  // last job are done and nobody prepares for it. May not throw, and neither may the parts of its jobs.
  virtual Job next(int thread) = 0;
};

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Runs a chain to its end. One caller at a time. Others may be computing still for jobs that are over.
  void run(Chain& chain);

  // Calls f(piece, thread) once for each piece in 0 .. num_pieces; thread in 0 .. num_threads.
  template <class F>
  void run(int num_pieces, F& f) {
    const auto work = [](void* context, int piece, int thread) { (*static_cast<F*>(context))(piece, thread); };
    run_one({num_pieces, &f, work});
  }

  // Waits until no thread computes for a job that is over: before memory goes that `compute` reads. Not during a run.
  void settle();

  // For tests: once in so many changes of turn the thread that makes it loses its core for a while right behind it. 0: never.
  std::atomic<int> late_once_in{0};

  // Pieces computed for others so far.
  int64_t num_repeated() const { return num_repeated_.load(std::memory_order_relaxed); }
  // How often the caller was called over to another core.
  int64_t num_called() const { return num_called_.load(std::memory_order_relaxed); }

 private:
  // One range of pieces: turn (24 bits), next piece (20), end (20).
  struct alignas(64) Range {
    std::atomic<uint64_t> ticket{0};
  };
  static constexpr uint64_t kAwake = ~uint64_t{0};
  // A thread writes here for which turn it reads the job and prepares, and which turn it sleeps through.
  struct alignas(64) Lane {
    std::atomic<uint64_t> reading{0};
    std::atomic<bool> is_computing{false};
    std::atomic<uint64_t> sleeps_through{kAwake};
    pthread_t handle{};       // of lane 0: the caller's
    int core = -1;            // written between chains. -1: it keeps to none
    bool has_called = false;  // its own: the caller waits for this core
  };
  // Where the caller is, for who ends a chain. Called: it may be moved at this moment.
  enum Caller : uint32_t { kBack, kInChain, kCalled };
  // What a thread knows of the job it is at.
  struct Share {
    uint64_t turn = 0;
    Job job;
    void* prepared = nullptr;
    bool is_joined = false;
  };

  void run_jobs(Chain& chain);
  void run_one(const Job& job);
  void loop(int thread);
  void take_part(uint64_t turn, int thread);
  int take(uint64_t turn, int thread);
  bool join(Share& share, int thread);
  void do_piece(const Share& share, int piece, int thread);
  void help(const Share& share, int thread);
  std::atomic<uint64_t>& claimed(const Job& job, int piece);
  static bool claim(std::atomic<uint64_t>& claimed, uint64_t turn);
  void advance(uint64_t turn, int thread);
  void open_next(uint64_t turn, int thread);
  void change_turn(uint64_t turn);
  void come_late(int once_in);
  void leave_core_to_caller();
  void call_over(uint64_t turn, int thread);
  void wait_for_change(uint64_t seen, int thread);

  const int num_threads_;
  const std::vector<int> cores_;  // one for each thread; empty: they keep to none
  std::vector<Range> ranges_;
  std::vector<Lane> lanes_;
  // Per piece, the last turn in which it was claimed. Each range has a stretch of its own, so that lines of the cache
  // keep to the core that works on them.
  std::vector<std::atomic<uint64_t>> claimed_;
  // The job at work. Written between two turns, when nobody reads it.
  alignas(64) Chain* chain_ = nullptr;
  Job job_;
  alignas(64) std::atomic<int> num_unfinished_{0};
  std::atomic<uint64_t> helped_turn_{0};  // the last in which a piece was computed again
  // Which job, times four, and how it stands: over, open, closed. Only ever goes up. The futex of idle threads.
  alignas(64) std::atomic<uint64_t> turn_{0};
  std::atomic<int> num_sleeping_{0};
  std::atomic<uint32_t> caller_{kBack};
  std::atomic<bool> is_ending_{false};
  std::atomic<int64_t> num_repeated_{0}, num_called_{0};
  std::atomic<int> num_changes_{0};  // counted where `late_once_in` asks for it
  std::vector<std::thread> threads_;
};

}  // namespace hob
