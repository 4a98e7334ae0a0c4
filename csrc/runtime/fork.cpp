#include "runtime/fork.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <mutex>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace spiral {
namespace {

std::atomic<bool> forked{false};

}  // namespace

void watch_fork() {
#ifndef _WIN32
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); }); });
#endif
}

bool is_forked() noexcept { return forked.load(std::memory_order_relaxed); }

void check_not_forked() {
  TORCH_CHECK(
      !is_forked(),
      "The spiral device cannot be used in a forked child of a process that has used it already. "
      "Use the 'spawn' start method: torch.multiprocessing.set_start_method('spawn').");
}

}  // namespace spiral
