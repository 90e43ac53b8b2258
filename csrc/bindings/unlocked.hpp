#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

namespace spmoe {

/// Gives the GIL up while it lives, as `py::gil_scoped_release`, but survives the end of the
/// interpreter: CPython up to 3.13 then unwinds a daemon thread that asks for the GIL, which ends
/// the process in a destructor. Here such a thread sleeps for ever instead, as from 3.14 on.
class Unlocked {
 public:
  Unlocked() : state_{PyEval_SaveThread()} {}
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() { take_gil(); }

  /// Calls `call` with the GIL, on the thread that gave it up.
  template <class Call>
  void with_gil(const Call& call) {
    take_gil();
    struct GiveUp {
      PyThreadState*& state;
      ~GiveUp() { state = PyEval_SaveThread(); }
    } const again{state_};
    call();
  }

 private:
  void take_gil() noexcept {
#ifdef __GLIBCXX__
    try {
      PyEval_RestoreThread(state_);
    } catch (const abi::__forced_unwind&) {
      while (true) ::pause();
    }
#else
    PyEval_RestoreThread(state_);
#endif
  }

  PyThreadState* state_;
};

}  // namespace spmoe
