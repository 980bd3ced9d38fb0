// A chain of jobs for the thread pool alone, in which threads come late on purpose: what tests of threads.h run.
#include "pool_trial.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "threads.h"

namespace hob {
namespace {

uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  return (x ^ (x >> 15)) * 0x846ca68bu;
}

// What a piece makes of all values: any that is stale, missing or taken twice changes all that follow.
uint32_t digest(const std::vector<uint32_t>& values, int piece) {
  uint32_t sum = static_cast<uint32_t>(piece);
  for (const uint32_t value : values) sum = mix(sum + value);
  return sum;
}

struct Own {
  std::vector<uint32_t> values;
  uint32_t result = 0;
  std::atomic<int>* late = nullptr;         // how often a thread is to come late still
  std::atomic<bool>* is_one_late = nullptr;  // not two at a time: nobody would be there to help
};

// next[piece] = digest(all values), over and over. What a job prepares from may not be what it commits to.
class Trial : public Chain {
 public:
  Trial(int num_threads, int num_jobs, int num_pieces, int num_late)
      : values_(static_cast<size_t>(num_pieces)), next_(values_), num_jobs_(num_jobs), late_(num_late), pool_(num_threads),
        own_(static_cast<size_t>(num_threads)) {}

  Job next(int) override {
    values_.swap(next_);
    if (num_jobs_-- <= 0) return {};
    return {static_cast<int>(values_.size()), this, commit, prepare, compute};
  }

  TrialResult run() {
    pool_.run(*this);
    const int64_t num_repeated = pool_.num_repeated();
    pool_.settle();
    return {values_, num_repeated};
  }

 private:
  static void* prepare(void* context, int thread) {
    auto& trial = *static_cast<Trial*>(context);
    Own& own = trial.own_[static_cast<size_t>(thread)];
    own.values = trial.values_;
    own.late = &trial.late_;
    own.is_one_late = &trial.is_one_late_;
    return &own;
  }
  static void compute(void* prepared, int piece) {
    Own& own = *static_cast<Own*>(prepared);
    own.result = digest(own.values, piece);
    if (piece % 5 != 2 || own.late->load() <= 0 || own.is_one_late->exchange(true)) return;
    own.late->fetch_sub(1);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    own.is_one_late->store(false);
  }
  static void commit(void* context, int piece, int thread) {
    auto& trial = *static_cast<Trial*>(context);
    trial.next_[static_cast<size_t>(piece)] = trial.own_[static_cast<size_t>(thread)].result;
  }

  std::vector<uint32_t> values_, next_;
  int num_jobs_;
  std::atomic<int> late_;
  std::atomic<bool> is_one_late_{false};
  ThreadPool pool_;
  std::vector<Own> own_;
};

// Jobs that are over in no time.
class Short : public Chain {
 public:
  explicit Short(int num_jobs) : num_jobs_(num_jobs) {}
  Job next(int) override {
    if (num_jobs_-- <= 0) return {};
    return {4, nullptr, [](void*, int, int) {}};
  }

 private:
  int num_jobs_;
};

// One job, at which the caller stays away longer than the others need.
class Absent : public Chain {
 public:
  explicit Absent(int num_threads) : is_caller_(static_cast<size_t>(num_threads)) {}
  Job next(int) override {
    if (std::exchange(is_over_, true)) return {};
    return {64, this, [](void*, int, int) {}, prepare, compute};
  }

 private:
  static void* prepare(void* context, int thread) {
    char& is_caller = static_cast<Absent*>(context)->is_caller_[static_cast<size_t>(thread)];
    is_caller = thread == 0;
    return &is_caller;
  }
  static void compute(void* prepared, int) {
    if (*static_cast<char*>(prepared)) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }

  bool is_over_ = false;
  std::vector<char> is_caller_;
};

}  // namespace

int64_t pool_calls(int num_threads, int num_chains) {
  ThreadPool pool(num_threads);
  for (int i = 0; i < num_chains; ++i) {
    Absent chain(num_threads);
    pool.run(chain);
    pool.settle();
  }
  return pool.num_called();
}

int pool_attendance(int num_threads, int num_chains) {
  ThreadPool pool(num_threads);
  pool.late_once_in = 7;
  for (int i = 0; i < num_chains; ++i) {
    Short chain(1 + i % 4);
    pool.run(chain);
    std::this_thread::sleep_for(std::chrono::microseconds(20 * (i % 8)));  // some fall asleep, some are about to
  }
  pool.late_once_in = 0;
  std::atomic<uint64_t> there{0};
  const int64_t end = now_ns() + 5'000'000'000;
  const auto count = [&] { return __builtin_popcountll(there.load()); };
  auto meet = [&](int, int thread) {
    there.fetch_or(uint64_t{1} << thread);
    while (count() < num_threads && now_ns() < end) std::this_thread::yield();
  };
  pool.run(num_threads, meet);
  return count();
}

TrialResult pool_trial(int num_threads, int num_jobs, int num_pieces, int num_late) {
  return Trial(num_threads, num_jobs, num_pieces, num_late).run();
}

}  // namespace hob
