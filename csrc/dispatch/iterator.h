// Running a lowering over a TensorIterator: the body of almost every DispatchStub.
#pragma once

#include <ATen/TensorIterator.h>
#include <c10/util/FunctionRef.h>

#include "call.h"

namespace spiral {

// Calls `op` with the operands of `iter`, then with what `extras` appends, once for each part of the iterator that fits
// 32-bit indexing; not at all where the iterator is empty. Dtypes, overlap and devices are what ATen left them: kernels
// convert. A reduction that had to be split over a reduced dimension is refused.
void run_iterator(OpId op, at::TensorIteratorBase& iter, c10::function_ref<void(Call&)> extras);

inline void run_iterator(OpId op, at::TensorIteratorBase& iter) {
  run_iterator(op, iter, [](Call&) {});
}

}  // namespace spiral
