#include "block.hpp"

#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace spmoe::emulated {
namespace {

constexpr unsigned warp_threads = 32;
constexpr std::size_t stack_bytes = 256 * 1024;

struct Fibre {
  jmp_buf place{};
  std::vector<char> stack = std::vector<char>(stack_bytes);
  void* fake_stack = nullptr;
  Index thread;
  bool started = false;
  bool done = true;
  bool waits_for_block = false;
  bool any = false;  // what the block agreed on when it last met
};

struct Warp {
  const void* handed[2][warp_threads] = {};
  unsigned arrived = 0;
  unsigned meeting = 0;
};

// One grid runs at a time, and its fibres find it here.
std::vector<Fibre> fibres;
std::vector<Warp> warps;
jmp_buf scheduler;
void* scheduler_stack = nullptr;
const void* scheduler_bottom = nullptr;
std::size_t scheduler_bytes = 0;
Fibre* running = nullptr;
Index running_block;
const std::function<void()>* running_body = nullptr;

// The address sanitizer follows a change of stacks only if it is told.
void leave(void** keep, const void* bottom, std::size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(keep, bottom, bytes);
#else
  static_cast<void>(keep), static_cast<void>(bottom), static_cast<void>(bytes);
#endif
}
void arrived(void* kept, const void** bottom, std::size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(kept, bottom, bytes);
#else
  static_cast<void>(kept), static_cast<void>(bottom), static_cast<void>(bytes);
#endif
}

void run_body() {
  arrived(nullptr, &scheduler_bottom, &scheduler_bytes);
  (*running_body)();
  running->done = true;
  leave(nullptr, scheduler_bottom, scheduler_bytes);
  _longjmp(scheduler, 1);
}

// Contexts give a fibre its stack; jumps then change between stacks without asking the kernel.
void enter(Fibre& fibre) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibre.stack.data();
  context.uc_stack.ss_size = fibre.stack.size();
  context.uc_link = nullptr;
  makecontext(&context, run_body, 0);
  fibre.started = true;
  setcontext(&context);
}

void resume(Fibre& fibre) {
  running = &fibre;
  leave(&scheduler_stack, fibre.stack.data(), fibre.stack.size());
  if (_setjmp(scheduler) == 0) {
    if (fibre.started) _longjmp(fibre.place, 1);
    enter(fibre);
  }
  arrived(scheduler_stack, nullptr, nullptr);
  running = nullptr;
}

void yield() {
  leave(&running->fake_stack, scheduler_bottom, scheduler_bytes);
  if (_setjmp(running->place) == 0) _longjmp(scheduler, 1);
  arrived(running->fake_stack, &scheduler_bottom, &scheduler_bytes);
}

void start(Fibre& fibre, unsigned thread) {
  fibre.thread = {thread, 0, 0};
  fibre.started = fibre.done = fibre.waits_for_block = fibre.any = false;
}

// Runs a warp until each of its lanes has ended or waits for the block.
void run_warp(unsigned warp, unsigned threads) {
  const unsigned first = warp * warp_threads;
  const unsigned last = std::min(first + warp_threads, threads);
  for (unsigned rounds = 0;; ++rounds) {
    bool idle = true;
    const unsigned meeting = warps[warp].meeting;
    for (unsigned t = first; t < last; ++t) {
      if (fibres[t].done || fibres[t].waits_for_block) continue;
      resume(fibres[t]);
      idle = false;
    }
    if (idle) return;
    if (rounds > 2 && meeting == warps[warp].meeting && warps[warp].arrived != 0) {
      std::fputs("a warp waits for lanes that do not come\n", stderr);
      std::abort();
    }
  }
}

void run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) start(fibres[t], t);
  for (;;) {
    for (unsigned warp = 0; warp < warps.size(); ++warp) run_warp(warp, threads);
    unsigned waiting = 0;
    bool any = false;
    for (const Fibre& fibre : fibres) {
      waiting += fibre.waits_for_block ? 1U : 0U;
      any = any || (fibre.waits_for_block && fibre.any);
    }
    if (waiting == 0) return;
    if (waiting != threads) {
      std::fputs("a block waits for threads that have ended\n", stderr);
      std::abort();
    }
    for (Fibre& fibre : fibres) {
      fibre.waits_for_block = false;
      fibre.any = any;
    }
  }
}

}  // namespace

void run_grid(Index grid, unsigned threads, const std::function<void()>& body) {
  fibres.resize(threads);
  warps.assign((threads + warp_threads - 1) / warp_threads, {});
  running_body = &body;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        running_block = {x, y, z};
        run_block(threads);
      }
    }
  }
}

const Index& thread_index() noexcept { return running->thread; }
const Index& block_index() noexcept { return running_block; }

bool any_of_block(bool value) {
  Fibre& fibre = *running;
  fibre.waits_for_block = true;
  fibre.any = value;
  yield();
  return fibre.any;
}

const void* const* exchange_in_warp(const void* own) {
  const unsigned thread = running->thread.x;
  Warp& warp = warps[thread / warp_threads];
  const unsigned meeting = warp.meeting;
  const void** handed = warp.handed[meeting % 2];
  handed[thread % warp_threads] = own;
  if (++warp.arrived == warp_threads) {
    warp.arrived = 0;
    ++warp.meeting;
  } else {
    while (warp.meeting == meeting) yield();
  }
  return handed;
}

}  // namespace spmoe::emulated
