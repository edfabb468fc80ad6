#include "cpu/thread_pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <condition_variable>
#include <cstdlib>
#include <cstring>
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

// A job is open while its caller works on it. Threads that wake up in time join and take items; the
// caller then waits for those that joined, never for those still asleep: on a machine whose cores
// are busy with something else, a job takes no longer than on one thread.
class Pool {
 public:
  void run(int threads, void (*body)(void*, int), void* context) {
    std::lock_guard<std::mutex> turn(turn_);
    while (started_ < threads - 1) {
      std::thread(&Pool::work, this, generation_.load()).detach();
      ++started_;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      context_ = context;
      joined_ = 0;
      may_join_ = threads - 1;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    body(context, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    may_join_ = 0;
    if (active_.load() == 0) return;
    lock.unlock();
    for (int spin = 0; spin < kSpins && active_.load(std::memory_order_acquire) > 0; ++spin)
      pause_briefly();
    lock.lock();
    done_.wait(lock, [&] { return active_.load() == 0; });
  }

  void before_fork() { turn_.lock(); }
  void after_fork_in_parent() { turn_.unlock(); }

 private:
  void work(uint64_t seen) {
    for (;;) {
      for (int spin = 0; spin < kSpins && generation_.load(std::memory_order_acquire) == seen;
           ++spin)
        pause_briefly();
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return generation_.load() != seen; });
      seen = generation_.load();
      if (joined_ >= may_join_) continue;
      const int thread = ++joined_;
      active_.fetch_add(1);
      void (*const body)(void*, int) = body_;
      void* const context = context_;
      lock.unlock();
      body(context, thread);
      lock.lock();
      if (active_.fetch_sub(1) == 1) done_.notify_one();
    }
  }

  std::mutex turn_;   // held for the length of a job
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, done_;
  // atomic only so that they can be watched without the lock
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> active_{0};
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int joined_ = 0;
  int may_join_ = 0;
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

// The threads that PyTorch's own operators run on, where it has brought libgomp (or LLVM's runtime,
// which answers to the same names) into the process. They spin for milliseconds after each
// operator: threads of our own would have to share their cores with them.
struct Team {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_num)();

  void run(int threads, void (*body)(void*, int), void* context) const {
    struct Data {
      void (*body)(void*, int);
      void* context;
      int (*thread_num)();
    } data{body, context, thread_num};
    parallel(
        [](void* raw) {
          auto& job = *static_cast<Data*>(raw);
          job.body(job.context, job.thread_num());
        },
        &data, static_cast<unsigned>(threads), 0);
  }
};

// libgomp hangs in a forked child that runs a parallel region after its parent has, be it one of
// PyTorch's: registered when the module is loaded.
std::atomic<bool> forked{false};
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

const Team& host_team() {
  static const Team team = [] {
    Team found{};
    found.parallel =
        reinterpret_cast<decltype(found.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    found.thread_num =
        reinterpret_cast<decltype(found.thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
    if (found.thread_num == nullptr) found.parallel = nullptr;
    // =own keeps to the pool above, for tests and comparisons
    const char* choice = std::getenv("MIMA_CPU_POOL");
    if (choice != nullptr && std::strcmp(choice, "own") == 0) found.parallel = nullptr;
    return found;
  }();
  return team;
}

}  // namespace

void run_on_threads(int threads, void (*body)(void*, int), void* context) {
  if (threads <= 1) {
    body(context, 0);
    return;
  }
  const Team& team = host_team();
  if (team.parallel != nullptr && !forked.load(std::memory_order_relaxed)) {
    team.run(threads, body, context);
    return;
  }
  pool().run(threads, body, context);
}

}  // namespace mima
