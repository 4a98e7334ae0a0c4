// Makes the plan of a call that has none: hands handles to the Python lowering and takes back what it recorded.
#pragma once

#include <memory>

#include "call.h"
#include "plan.h"

namespace spiral {

uint64_t stride_class(int64_t stride, int64_t dense);  // call.cpp

struct Recording {
  const Call& call;
  std::shared_ptr<Plan> record();

  // The class of a size in keys.
  static uint64_t size_class(int64_t n) { return Call::size_class(n, false); }
};

}  // namespace spiral
