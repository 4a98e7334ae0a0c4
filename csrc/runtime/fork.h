// A GPU API does not survive fork(): the child of a process that has used an engine would hang in its driver.
#pragma once

namespace spiral {

// From now on a fork()ed child is one that must not use an engine. Called by engines when they are opened.
void watch_fork();

// True in such a child. One relaxed load.
bool is_forked() noexcept;

// Throws c10::Error there.
void check_not_forked();

}  // namespace spiral
