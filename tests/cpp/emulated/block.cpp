#include "emulated/block.hpp"

#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdlib>
#include <iostream>
#include <mutex>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace spmoe::emulated {
namespace {

constexpr unsigned warp_threads = 32;
constexpr std::size_t stack_bytes = 256 * 1024;

struct Place {
  ucontext_t context{};
  jmp_buf jump{};
  bool started = true;
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  std::size_t bytes = 0;
};

struct Fibre {
  Place place;
  std::vector<char> stack = std::vector<char>(stack_bytes);
  Index thread;
  bool done = true;
  bool waits_for_block = false;
  bool any = false;  // what the block agreed on when it last met
};

struct Warp {
  Operands handed[2][warp_threads] = {};  // of this meeting and of the one before
  unsigned arrived = 0;
  unsigned meeting = 0;
};

// One grid runs at a time, and its fibres find it here.
std::vector<Fibre> fibres;
std::vector<Warp> warps;
Place scheduler;
Fibre* running = nullptr;
Index running_block;
const std::function<void()>* running_body = nullptr;

// A place in a fibre or the scheduler to come back to. Jumps change stacks without asking the
// kernel, but the address sanitizer knows contexts alone, and must be reported of each change.
#ifdef __SANITIZE_ADDRESS__
void leave_for(Place& here, Place& there) {
  __sanitizer_start_switch_fiber(&here.fake_stack, there.bottom, there.bytes);
  swapcontext(&here.context, &there.context);
  __sanitizer_finish_switch_fiber(here.fake_stack, nullptr, nullptr);
}
#else
void leave_for(Place& here, Place& there) {
  if (_setjmp(here.jump) != 0) return;
  if (there.started) _longjmp(there.jump, 1);
  there.started = true;
  setcontext(&there.context);
}
#endif

void run_body() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.bytes);
#endif
  (*running_body)();
  running->done = true;
  leave_for(running->place, scheduler);
}

void resume(Fibre& fibre) {
  running = &fibre;
  leave_for(scheduler, fibre.place);
  running = nullptr;
}

void yield() { leave_for(running->place, scheduler); }

void start(Fibre& fibre, unsigned thread) {
  fibre.thread = {thread, 0, 0};
  fibre.done = fibre.waits_for_block = fibre.any = false;
  fibre.place.started = false;
  fibre.place.bottom = fibre.stack.data();
  fibre.place.bytes = fibre.stack.size();
  ucontext_t& context = fibre.place.context;
  getcontext(&context);
  context.uc_stack.ss_sp = fibre.stack.data();
  context.uc_stack.ss_size = fibre.stack.size();
  context.uc_link = nullptr;
  makecontext(&context, run_body, 0);
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
      std::cerr << "a warp waits for lanes that do not come\n";
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
      std::cerr << "a block waits for threads that have ended\n";
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
  static std::mutex one_at_a_time;
  const std::scoped_lock lock{one_at_a_time};
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

const Operands* exchange_in_warp(const Operands& own) {
  const unsigned thread = running->thread.x;
  Warp& warp = warps[thread / warp_threads];
  const unsigned meeting = warp.meeting;
  Operands* handed = warp.handed[meeting % 2];
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
