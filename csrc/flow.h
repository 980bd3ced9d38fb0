// Straight-line code that runs on whichever thread is there: a coroutine that stops where it has posted a job and goes on,
// on the thread that finished the job's last piece, when all pieces are done.
#pragma once

#include <coroutine>
#include <exception>
#include <utility>

namespace hob {

class Flow {
 public:
  struct promise_type {
    Flow get_return_object() { return Flow(std::coroutine_handle<promise_type>::from_promise(*this)); }
    std::suspend_always initial_suspend() noexcept { return {}; }
    std::suspend_always final_suspend() noexcept { return {}; }
    void return_void() {}
    void unhandled_exception() { std::terminate(); }
  };

  Flow(Flow&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Flow& operator=(Flow&&) = delete;
  ~Flow() {
    if (handle_) handle_.destroy();
  }

  bool is_over() const { return handle_.done(); }
  void go_on() { handle_.resume(); }

 private:
  explicit Flow(std::coroutine_handle<promise_type> handle) : handle_(handle) {}
  std::coroutine_handle<promise_type> handle_;
};

}  // namespace hob
