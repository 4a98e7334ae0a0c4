// A launch plan: what one call signature of an op does, as data that C++ replays without Python.
#pragma once

#include <c10/core/ScalarType.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../runtime/engine.h"

namespace spiral {

// Expressions over the values of a call: its slots, then the plan's constants, then earlier expressions.
// Integers are int64, floats are doubles by their bits. The order is that of CODES in torch_spiral/lowering.py.
enum class Code : uint8_t {
  Add, Sub, Mul, FloorDiv, Mod, CeilDiv, Min, Max, Neg, Eq, Lt, Le, And, Or, Not, Select,
  FAdd, FSub, FMul, FDiv, FPow, FMin, FMax, FNeg, FEq, FLt, FLe, FSqrt, FExp, FLog, FFloor, ToFloat, ToInt,
  PhiloxSeed, PhiloxOffset
};

struct Expr {
  Code code;
  uint32_t a, b, c;
};

struct Check {
  uint32_t condition;
  std::string exception;  // the Python exception's name
  std::string text;       // "{}" stands for the next of args
  std::vector<std::pair<uint32_t, bool>> args;  // value, is_float
};

// Where a launch's buffer is: an operand of the call, one of the plan's allocations after them, or the error buffer.
constexpr uint32_t kErrorBuffer = UINT32_MAX;
constexpr uint32_t kNone = UINT32_MAX;

struct Allocation {
  bool output;               // a tensor that the op returns; otherwise bytes for the time of the call
  c10::ScalarType dtype;
  std::vector<uint32_t> sizes, strides;  // values; no strides: contiguous
  uint32_t bytes;            // value; of a temporary
  uint32_t windows;          // bindings that a kernel was built to see it through
  uint32_t packed_operand;   // kNone, or: a packed form of this operand, kept while its storage is not written
  uint32_t packed_kind;
};

struct Buffer {
  uint32_t operand;
  uint32_t offset;  // value, in elements; or kNone
  uint32_t windows;
  uint32_t element_size;
};

enum class WordKind : uint8_t { Offset64, Offset32, Pointer, I64, F64, I32, U32, F32 };

struct Word {
  WordKind kind;
  uint32_t index;  // of a buffer, or of a value
};

struct Step {
  enum class Kind : uint8_t { Launch, Fill, Copy } kind;
  uint32_t when;  // kNone, or the allocation whose packed form this step makes
  std::vector<uint32_t> first, last;  // temporaries (numbers of allocations) that no earlier, no later step uses
  // Launch
  Kernel* kernel = nullptr;
  std::vector<Buffer> buffers;
  std::vector<Word> words;
  uint32_t params_size = 0;
  uint32_t groups[3] = {0, 0, 0};
  uint32_t flops = kNone;  // value, computed only while someone traces
  std::string note;        // which schedule it has and why
  // Fill: buffers[0]; Copy: buffers[0] from buffers[1]. Offsets in elements, bytes is a value.
  uint32_t bytes = 0;
  uint8_t fill_value = 0;
};

struct Plan {
  std::vector<int64_t> constants;
  std::vector<Expr> exprs;
  std::vector<Check> checks;
  std::vector<Allocation> allocations;
  std::vector<Step> steps;
  std::vector<uint32_t> returned;  // allocations, by operand number; kNone for None
  uint32_t operands = 0, slots = 0;
  mutable std::unique_ptr<Sequence> sequence;  // where the engine has one for it; used under the device's lock
  size_t needed = 0;     // the first expressions; what follows is for traces
  uint64_t expires = 0;  // replays until it is recorded anew; 0: never
  std::atomic<uint64_t> uses{0};
  std::atomic<uint64_t> last_used{0};
};

struct PlanStatistics {
  uint64_t hits, misses, plans, evicted, launches;
};
PlanStatistics plan_statistics();
void clear_plans();

// Plans of this thread's calls are looked up and recorded under this number, beside those of others: how the tuner runs one call
// with several schedules. 0: everybody's.
void set_plan_variant(uint32_t variant);

}  // namespace spiral
