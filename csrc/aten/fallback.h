// Operators without a kernel: refused, or run on the CPU, counted and said once. SPIRAL_FALLBACK=warn|error|silent.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace spiral {

enum class FallbackMode { Warn, Error, Silent };

FallbackMode fallback_mode();
void set_fallback_mode(FallbackMode);
FallbackMode parse_fallback_mode(const std::string&);  // throws c10::ValueError

// Operators that ran on the CPU and how often, in order of first use.
std::vector<std::pair<std::string, int64_t>> fallbacks();
void reset_fallbacks();

// An operator that is declared to run on the CPU ("_linalg_svd.U"): tensors are copied there and back.
struct HostOp {
  std::string name;
  int64_t calls, bytes;  // bytes: copied in both directions
};
void register_host(const std::string& name);  // an overload of aten without a kernel for spiral
std::vector<HostOp> host_ops();

// Says where in the user's program we are ("train.py:12"), or nothing. May take the GIL.
void set_caller_finder(std::string (*)());

}  // namespace spiral
