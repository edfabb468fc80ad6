// A persistent pool of threads that is cheap to enter and survives fork().
#pragma once

#include <atomic>
#include <cstdint>

namespace mima {

// Runs body(context, thread) on the caller, as thread 0, and on up to threads - 1 others, those
// that wake up while the caller's own call lasts, each with another number below `threads`. Returns
// when all of them have. The body must not throw. Callers from several Python threads take turns.
void run_on_threads(int threads, void (*body)(void* context, int thread), void* context);

// Calls f(item, thread) for each item in [0, items), on at most `threads` threads. Each thread has
// a stretch of the items, the same in each call, so that a loop over the same memory finds in a
// core's caches what that core left there; a thread that is done goes on with the others' items.
// Make each large enough (tens of microseconds) and let results depend on the item only, never on
// the thread, so that they are the same for any number of threads.
template <class F>
void parallel_for(int64_t items, int threads, const F& f) {
  if (items <= 0) return;
  if (threads > items) threads = static_cast<int>(items);
  if (threads <= 1) {
    for (int64_t item = 0; item < items; ++item) f(item, 0);
    return;
  }
  constexpr int kMaxStretches = 64;
  struct alignas(64) Stretch {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Shared {
    const F& f;
    int stretches;
    Stretch stretch[kMaxStretches];
  } shared{f, threads < kMaxStretches ? threads : kMaxStretches, {}};
  for (int i = 0; i < shared.stretches; ++i) {
    shared.stretch[i].next.store(items * i / shared.stretches, std::memory_order_relaxed);
    shared.stretch[i].end = items * (i + 1) / shared.stretches;
  }
  run_on_threads(
      threads,
      [](void* context, int thread) {
        auto& job = *static_cast<Shared*>(context);
        for (int i = 0; i < job.stretches; ++i) {
          Stretch& stretch = job.stretch[(thread + i) % job.stretches];
          for (int64_t item;
               (item = stretch.next.fetch_add(1, std::memory_order_relaxed)) < stretch.end;)
            job.f(item, thread);
        }
      },
      &shared);
}

}  // namespace mima
