// The pool of threads.h.
#include "threads.h"

#include <sched.h>

#include <algorithm>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hob {
namespace {

constexpr uint64_t kCountBits = 20;
constexpr uint64_t kCountMask = (uint64_t{1} << kCountBits) - 1;
constexpr int kMost = static_cast<int>(kCountMask);  // pieces of a job that threads share
constexpr int kMaxClaims = 1 << 13;                  // pieces of a repeatable one
constexpr int kLineClaims = 8;                       // in a line of the cache
constexpr int64_t kSpinNs = 50'000;
constexpr int64_t kLeastPatienceNs = 3'000, kMostPatienceNs = 200'000;

uint64_t make_ticket(uint64_t turn, uint64_t next, uint64_t end) {
  return turn << (2 * kCountBits) | next << kCountBits | end;
}
uint64_t turn_of(uint64_t ticket) { return ticket >> (2 * kCountBits); }
uint64_t next_of(uint64_t ticket) { return ticket >> kCountBits & kCountMask; }
uint64_t end_of(uint64_t ticket) { return ticket & kCountMask; }

// The low two bits of a turn. Over: the chain has no more jobs. Closed: the next job is being made.
enum State : uint64_t { kOver = 0, kOpen = 1, kClosed = 2 };
uint64_t make_turn(uint64_t number, State state) { return number * 4 + state; }
uint64_t number_of(uint64_t turn) { return turn / 4; }
State state_of(uint64_t turn) { return static_cast<State>(turn % 4); }

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins until `is_over()` or the time is up; returns whether it is over.
template <class F>
bool spin_until(int64_t end_ns, F&& is_over) {
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (is_over()) return true;
      relax();
    }
    if (now_ns() >= end_ns) return false;
  }
}

// The cores this process may use, if there are `count` of them; else none.
std::vector<int> find_cores(int count) {
  cpu_set_t allowed;
  std::vector<int> cores;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) != count) return cores;
  for (int core = 0; std::ssize(cores) < count; ++core)
    if (CPU_ISSET(core, &allowed)) cores.push_back(core);
  return cores;
}

bool keep_to(pthread_t thread, int core) {
  cpu_set_t own;
  CPU_ZERO(&own);
  CPU_SET(core, &own);
  return pthread_setaffinity_np(thread, sizeof own, &own) == 0;
}

class OneJob : public Chain {
 public:
  explicit OneJob(const Job& job) : job_(job) {}
  Job next(int) override { return std::exchange(job_, Job{}); }

 private:
  Job job_;
};

// By one thread: a single piece, or more than could be shared out.
void run_alone(const Job& job, int thread) {
  void* prepared = job.prepare ? job.prepare(job.context, thread) : nullptr;
  for (int piece = 0; piece < job.num_pieces; ++piece) {
    if (job.prepare) job.compute(prepared, piece);
    job.work(job.context, piece, thread);
  }
}

}  // namespace

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(num_threads),
      cores_(num_threads > 1 ? find_cores(num_threads) : std::vector<int>()),
      ranges_(static_cast<size_t>(num_threads)),
      lanes_(static_cast<size_t>(num_threads)),
      claimed_(num_threads > 1 ? static_cast<size_t>(kMaxClaims + num_threads * kLineClaims) : 0) {
  for (size_t i = 0; i < cores_.size(); ++i) lanes_[i].core = cores_[i];
  for (int i = 1; i < num_threads; ++i) {
    threads_.emplace_back([this, i] { loop(i); });
    Lane& lane = lanes_[static_cast<size_t>(i)];
    lane.handle = threads_.back().native_handle();
    if (!cores_.empty()) keep_to(lane.handle, lane.core);
  }
}

ThreadPool::~ThreadPool() {
  is_ending_.store(true, std::memory_order_seq_cst);
  change_turn(make_turn(number_of(turn_.load()) + 1, kOver));
  for (auto& thread : threads_) thread.join();
}

void ThreadPool::run_one(const Job& job) {
  OneJob chain(job);
  run_jobs(chain);
}

void ThreadPool::run(Chain& chain) {
  if (cores_.empty()) return run_jobs(chain);
  lanes_[0].handle = pthread_self();
  leave_core_to_caller();
  caller_.store(kInChain, std::memory_order_release);
  run_jobs(chain);
  uint32_t seen = kInChain;
  if (!caller_.compare_exchange_strong(seen, kBack, std::memory_order_acq_rel)) caller_.wait(kCalled, std::memory_order_acquire);
}

void ThreadPool::run_jobs(Chain& chain) {
  if (num_threads_ == 1) {
    for (Job job = chain.next(0); job.num_pieces > 0; job = chain.next(0)) run_alone(job, 0);
    return;
  }
  chain_ = &chain;
  open_next(turn_.load(std::memory_order_relaxed), 0);
  for (;;) {
    const uint64_t seen = turn_.load(std::memory_order_acquire);
    if (state_of(seen) == kOver) return;
    if (state_of(seen) == kOpen) take_part(seen, 0);
    wait_for_change(seen, 0);
  }
}

void ThreadPool::loop(int thread) {
  for (;;) {
    const uint64_t seen = turn_.load(std::memory_order_seq_cst);
    if (is_ending_.load(std::memory_order_seq_cst)) return;
    if (state_of(seen) == kOpen) take_part(seen, thread);
    wait_for_change(seen, thread);
  }
}

void ThreadPool::settle() {
  for (const Lane& lane : lanes_)
    while (lane.is_computing.load(std::memory_order_acquire)) std::this_thread::yield();
}

// ---- pieces ----

void ThreadPool::take_part(uint64_t turn, int thread) {
  Share share{turn};
  for (int piece = take(turn, thread); piece >= 0; piece = take(turn, thread)) {
    if (!share.is_joined && !join(share, thread)) break;
    do_piece(share, piece, thread);
  }
  if (share.is_joined) help(share, thread);
  lanes_[static_cast<size_t>(thread)].is_computing.store(false, std::memory_order_release);
}

// Takes one piece, from `thread`'s own range or else from another's. -1: none is left, or the turn is over.
int ThreadPool::take(uint64_t turn, int thread) {
  for (int i = 0; i < num_threads_; ++i) {
    auto& ticket = ranges_[static_cast<size_t>((thread + i) % num_threads_)].ticket;
    uint64_t seen = ticket.load(std::memory_order_acquire);
    while (turn_of(seen) == turn_of(make_ticket(turn, 0, 0)) && next_of(seen) < end_of(seen))
      if (ticket.compare_exchange_weak(seen, seen + (uint64_t{1} << kCountBits), std::memory_order_acq_rel))
        return static_cast<int>(next_of(seen));
  }
  return -1;
}

// Reads the job and prepares for it, with a piece of it taken. False: the turn is over, others have done that piece.
bool ThreadPool::join(Share& share, int thread) {
  Lane& lane = lanes_[static_cast<size_t>(thread)];
  lane.reading.store(share.turn, std::memory_order_seq_cst);
  share.is_joined = turn_.load(std::memory_order_seq_cst) == share.turn;
  if (share.is_joined) {
    share.job = job_;
    lane.is_computing.store(job_.prepare != nullptr, std::memory_order_relaxed);
    if (job_.prepare) share.prepared = job_.prepare(job_.context, thread);
  }
  lane.reading.store(0, std::memory_order_seq_cst);
  if (turn_.load(std::memory_order_seq_cst) != share.turn) lane.reading.notify_all();
  return share.is_joined;
}

void ThreadPool::do_piece(const Share& share, int piece, int thread) {
  if (share.job.prepare) {
    share.job.compute(share.prepared, piece);
    if (!claim(claimed(share.job, piece), share.turn)) return;
  }
  // From here on the turn cannot end without this thread.
  share.job.work(share.job.context, piece, thread);
  if (num_unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) advance(share.turn, thread);
}

std::atomic<uint64_t>& ThreadPool::claimed(const Job& job, int piece) {
  const int range = static_cast<int>((int64_t{piece + 1} * num_threads_ - 1) / job.num_pieces);
  const int first = static_cast<int>(int64_t{job.num_pieces} * range / num_threads_);
  const int stretch = kMaxClaims / num_threads_ / kLineClaims * kLineClaims + kLineClaims;
  return claimed_[static_cast<size_t>(range * stretch + piece - first)];
}

// A turn does not end before all its pieces are claimed in it, so one that is not claimed yet belongs to it.
bool ThreadPool::claim(std::atomic<uint64_t>& claimed, uint64_t turn) {
  uint64_t seen = claimed.load(std::memory_order_relaxed);
  return seen < turn && claimed.compare_exchange_strong(seen, turn, std::memory_order_acq_rel);
}

// Nothing is left to take: computes what others took and have not finished, after giving them time.
void ThreadPool::help(const Share& share, int thread) {
  const auto is_over = [&] { return turn_.load(std::memory_order_acquire) != share.turn; };
  if (is_over() || !share.job.prepare) return;
  const int64_t now = now_ns(), taken = now - share.job.start_ns;
  if (spin_until(now + std::clamp(taken, kLeastPatienceNs, kMostPatienceNs), is_over)) return;
  const int count = share.job.num_pieces, first = static_cast<int>(int64_t{count} * thread / num_threads_);
  for (int i = 0; i < count && !is_over(); ++i) {
    const int piece = (first + i) % count;
    if (claimed(share.job, piece).load(std::memory_order_relaxed) >= share.turn) continue;
    num_repeated_.fetch_add(1, std::memory_order_relaxed);
    helped_turn_.store(share.turn, std::memory_order_relaxed);
    do_piece(share, piece, thread);
  }
}

// ---- turns ----

// All pieces are done: opens the next turn. Whoever took a piece has then prepared and is done with the job, unless
// somebody helped: the one who was late may be about to prepare, and finds the turn closed or is waited for.
void ThreadPool::advance(uint64_t turn, int thread) {
  if (helped_turn_.load(std::memory_order_relaxed) == turn) {
    turn_.store(make_turn(number_of(turn), kClosed), std::memory_order_seq_cst);
    for (Lane& lane : lanes_) {
      const auto has_left = [&] { return lane.reading.load(std::memory_order_seq_cst) != turn; };
      while (!has_left() && !spin_until(now_ns() + kSpinNs, has_left)) lane.reading.wait(turn, std::memory_order_seq_cst);
    }
  }
  open_next(turn, thread);
}

void ThreadPool::open_next(uint64_t turn, int thread) {
  const auto is_for_one = [](const Job& job) {
    return job.num_pieces == 1 || job.num_pieces > (job.prepare ? kMaxClaims : kMost);
  };
  for (job_ = chain_->next(thread); is_for_one(job_); job_ = chain_->next(thread)) run_alone(job_, thread);
  const uint64_t number = number_of(turn) + 1;
  if (job_.num_pieces == 0) {
    // Only the caller waits for this.
    if (thread == 0) return turn_.store(make_turn(number, kOver), std::memory_order_seq_cst);
    change_turn(make_turn(number, kOver));
    return call_over(make_turn(number, kOver), thread);
  }
  const uint64_t next = make_turn(number, kOpen);
  num_unfinished_.store(job_.num_pieces, std::memory_order_relaxed);
  for (int i = 0; i < num_threads_; ++i) {
    const auto first = static_cast<uint64_t>(int64_t{job_.num_pieces} * i / num_threads_);
    const auto end = static_cast<uint64_t>(int64_t{job_.num_pieces} * (i + 1) / num_threads_);
    ranges_[static_cast<size_t>(i)].ticket.store(make_ticket(next, first, end), std::memory_order_release);
  }
  change_turn(next);
}

// Wakes those that sleep through an earlier turn, each once. Whoever comes here late, its core taken away behind the
// store, leaves those alone that sleep through a later one: waking them would bring nothing, and they would be left out
// when that one ends.
void ThreadPool::change_turn(uint64_t turn) {
  turn_.store(turn, std::memory_order_seq_cst);
  if (const int once_in = late_once_in.load(std::memory_order_relaxed); once_in > 0) come_late(once_in);
  if (num_sleeping_.load(std::memory_order_seq_cst) == 0) return;
  bool is_one_asleep = false;
  for (Lane& lane : lanes_) {
    uint64_t through = lane.sleeps_through.load(std::memory_order_seq_cst);
    if (through < turn && lane.sleeps_through.compare_exchange_strong(through, kAwake, std::memory_order_seq_cst))
      is_one_asleep = true;
  }
  if (is_one_asleep) turn_.notify_all();
}

void ThreadPool::come_late(int once_in) {
  if (num_changes_.fetch_add(1, std::memory_order_relaxed) % once_in == 0)
    std::this_thread::sleep_for(std::chrono::nanoseconds(6 * kSpinNs));
}

void ThreadPool::wait_for_change(uint64_t seen, int thread) {
  Lane& lane = lanes_[static_cast<size_t>(thread)];
  const bool is_in_the_way = std::exchange(lane.has_called, false);
  const auto has_changed = [&] { return turn_.load(std::memory_order_acquire) != seen; };
  if (has_changed() || (!is_in_the_way && spin_until(now_ns() + kSpinNs, has_changed))) return;
  auto& sleeps_through = lane.sleeps_through;
  num_sleeping_.fetch_add(1, std::memory_order_seq_cst);
  sleeps_through.store(seen, std::memory_order_seq_cst);
  turn_.wait(seen, std::memory_order_seq_cst);
  sleeps_through.store(kAwake, std::memory_order_seq_cst);
  num_sleeping_.fetch_sub(1, std::memory_order_seq_cst);
}

// ---- cores ----

// Whoever keeps to the core that the caller is on gets the one that the caller was on before.
void ThreadPool::leave_core_to_caller() {
  const int here = sched_getcpu();
  for (Lane& lane : lanes_) {
    if (lane.core != here) continue;
    if (&lane != &lanes_[0] && keep_to(lane.handle, lanes_[0].core)) std::swap(lane.core, lanes_[0].core);
    return;
  }
}

// `thread` has ended a chain and has a core. A caller that does not come has none: it is moved to this one, and may then
// run anywhere as before. Should the next chain begin right now, the caller is moved in the middle of it: no harm.
void ThreadPool::call_over(uint64_t turn, int thread) {
  if (cores_.empty()) return;
  const auto is_back = [&] { return caller_.load(std::memory_order_acquire) == kBack || turn_.load(std::memory_order_acquire) != turn; };
  uint32_t seen = kInChain;
  if (spin_until(now_ns() + kSpinNs, is_back) || !caller_.compare_exchange_strong(seen, kCalled, std::memory_order_acq_rel)) return;
  Lane& own = lanes_[static_cast<size_t>(thread)];
  cpu_set_t allowed;
  const pthread_t caller = lanes_[0].handle;
  if (pthread_getaffinity_np(caller, sizeof allowed, &allowed) == 0 && CPU_ISSET(own.core, &allowed) && keep_to(caller, own.core)) {
    pthread_setaffinity_np(caller, sizeof allowed, &allowed);
    own.has_called = true;
    num_called_.fetch_add(1, std::memory_order_relaxed);
  }
  caller_.store(kBack, std::memory_order_release);
  caller_.notify_one();
}

}  // namespace hob
