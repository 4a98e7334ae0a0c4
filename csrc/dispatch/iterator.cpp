#include "iterator.h"

namespace spiral {

void run_iterator(OpId op, at::TensorIteratorBase& iter, c10::function_ref<void(Call&)> extras) {
  if (iter.numel() == 0) {
    // Of all reductions only these reach their stub for an empty input. Those without an identity were refused before.
    static const OpId norm = op_id("norm_stub"), powsum = op_id("powsum_stub");
    if (op == norm || op == powsum) {
      iter.tensor(0).zero_();
    }
    return;
  }
  if (!iter.can_use_32bit_indexing()) {
    for (auto& part : iter.with_32bit_indexing()) {
      // A part of a reduction would have to add to what another part stored.
      TORCH_CHECK_NOT_IMPLEMENTED(
          !part.should_accumulate() && part.is_final_output(),
          "spiral: a reduction over more than 2^31 bytes that are not consecutive outputs is not supported");
      run_iterator(op, part, extras);
    }
    return;
  }
  Call call(op, iter.device(0).index());
  call.iterator(iter);
  extras(call);
  call.run();
}

}  // namespace spiral
