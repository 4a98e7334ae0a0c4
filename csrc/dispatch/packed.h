// Packed forms of operands (weights in GEMM panels, say), kept between calls while their storage is not written.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>

namespace spiral {

struct Packed {
  void* data;   // null: not kept; make it in a temporary
  bool stale;   // its steps must run
};

// The packed form number `kind` of a tensor (data, sizes and strides in `layout`). It is kept from the second use of the
// same contents on, so what is used once, as activations are, costs no memory.
Packed find_packed(c10::DeviceIndex device, const void* data, const void* storage, c10::IntArrayRef layout, uint32_t kind, uint64_t bytes);

// From now on this thread's calls keep packed forms from their first use on, as this holder's; 0: nobody's. What a holder keeps is
// packed anew in place after a write.
void set_packing(uint32_t holder);

// Frees what a holder keeps.
void release_packed(uint32_t holder);

struct PackedStatistics {
  uint64_t entries, bytes;
};
// What is kept on a device: all of it, or one holder's.
PackedStatistics packed_statistics(c10::DeviceIndex device, uint32_t holder);

// Forgets packed forms: of storages that are gone or were written, or all of them.
void drop_packed(c10::DeviceIndex device, bool all);

}  // namespace spiral
