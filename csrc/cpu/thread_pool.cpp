#include "cpu/thread_pool.h"

#include <pthread.h>

#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mima {
namespace {

// About 10 microseconds: shorter than the wake-up it saves between two operators of one step, and
// too short to take a core from anything else.
constexpr int kSpins = 256;

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void run(int threads, void (*body)(void*, int), void* context) {
    std::lock_guard<std::mutex> turn(turn_);
    while (started_ < threads - 1) {
      std::thread(&Pool::work, this, started_ + 1, generation_.load()).detach();
      ++started_;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      context_ = context;
      threads_ = threads;
      remaining_.store(threads - 1, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    body(context, 0);
    for (int spin = 0; spin < kSpins && remaining_.load(std::memory_order_acquire) > 0; ++spin)
      pause_briefly();
    if (remaining_.load(std::memory_order_acquire) > 0) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [&] { return remaining_.load(std::memory_order_acquire) == 0; });
    }
  }

  void before_fork() { turn_.lock(); }
  void after_fork_in_parent() { turn_.unlock(); }

 private:
  void work(int thread, uint64_t seen) {
    for (;;) {
      for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen;
           ++spin)
        pause_briefly();
      void (*body)(void*, int);
      void* context;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_acquire) != seen; });
        seen = generation_.load(std::memory_order_acquire);
        // not one of this job's threads: the next job waits for the others only
        if (thread >= threads_) continue;
        body = body_;
        context = context_;
      }
      body(context, thread);
      if (remaining_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        // taking the lock closes the gap between the caller's check and its wait
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  std::mutex turn_;   // held for the length of a job
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> remaining_{0};
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int threads_ = 0;
  int started_ = 0;
};

// Never destroyed: its threads are detached and may outlive static destructors.
alignas(Pool) unsigned char storage[sizeof(Pool)];

Pool& pool() {
  static Pool* const instance = [] {
    Pool* created = new (storage) Pool;
    pthread_atfork([] { pool().before_fork(); }, [] { pool().after_fork_in_parent(); },
                   // only the forking thread lives on in the child: start from nothing
                   [] { new (storage) Pool; });
    return created;
  }();
  return *instance;
}

}  // namespace

void run_on_threads(int threads, void (*body)(void*, int), void* context) {
  if (threads <= 1) {
    body(context, 0);
    return;
  }
  pool().run(threads, body, context);
}

}  // namespace mima
