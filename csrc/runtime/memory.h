// Device memory behind tensors: addresses, the caching allocator, statistics and write epochs.
//
// A spiral data_ptr is an address in a reserved range that nobody may read or write, so pointer arithmetic works and a
// stray access by the host faults. Memory comes in segments (one engine Memory each), cut into blocks of 512 bytes or more.
// A freed block is reused at once: there is one in-order queue per device.
#pragma once

#include "device.h"

#include <c10/core/CachingDeviceAllocator.h>

#include <atomic>
#include <cstdint>
#include <memory>

namespace spiral {

struct Block;

struct Segment {
  Memory* memory;
  uintptr_t address;
  uint64_t size;
  int device;
  int pool;
  Block** blocks;         // by offset / kBlockUnit: the block that starts there
};

// A part of a segment: allocated or free.
struct Block {
  Segment* segment;
  uint64_t offset, size;
  uint64_t requested = 0;
  Block *previous = nullptr, *next = nullptr;            // neighbours in the segment
  Block *bin_previous = nullptr, *bin_next = nullptr;    // other free blocks of about this size
  std::atomic<uint64_t> epoch{0};
  bool allocated = false;
};

constexpr uint64_t kBlockUnit = 512;    // blocks start and end at multiples of it
constexpr int kChunkBits = 21;          // segments start at multiples of 2 MiB

namespace detail {
// From address to segment: one entry per 2 MiB of the reserved range.
extern std::atomic<Segment*>* chunks;
extern uintptr_t base;
extern uint64_t span;
extern std::atomic<uint64_t> epochs;
[[noreturn]] void not_spiral_memory(const void* address);

inline Segment& segment_of(const void* address) {
  const uint64_t distance = reinterpret_cast<uintptr_t>(address) - base;
  Segment* segment = distance < span ? chunks[distance >> kChunkBits].load(std::memory_order_acquire) : nullptr;
  if (C10_UNLIKELY(segment == nullptr)) not_spiral_memory(address);
  return *segment;
}

inline Block* block_at(const void* storage_base) {
  Segment& segment = segment_of(storage_base);
  return segment.blocks[(reinterpret_cast<uintptr_t>(storage_base) - segment.address) / kBlockUnit];
}
}  // namespace detail

// Where a data_ptr lies. Bytes.
struct Location {
  Memory* memory;
  uint64_t offset;
  uint64_t memory_size;
  int device;
};

// Throws c10::Error for an address that isn't in a live segment (null included).
inline Location locate(const void* data_ptr) {
  const Segment& segment = detail::segment_of(data_ptr);
  return {segment.memory, reinterpret_cast<uintptr_t>(data_ptr) - segment.address, segment.size, segment.device};
}

inline bool is_spiral_address(const void* address) noexcept {
  const uint64_t distance = reinterpret_cast<uintptr_t>(address) - detail::base;
  return distance < detail::span && detail::chunks[distance >> kChunkBits].load(std::memory_order_acquire);
}

// Counts the writes to a storage, to tell whether something derived from its contents (packed weights) is still valid. An
// epoch is never given out twice, so a block that was freed and reused has another one. `storage_base` is
// tensor.storage().data(); null and 0-byte storages are fine.
inline uint64_t write_epoch(const void* storage_base) {
  return storage_base ? detail::block_at(storage_base)->epoch.load(std::memory_order_relaxed) : 0;
}

// Every write by us calls this: copies, fills, and each output of a plan's launches.
inline void bump_epoch(const void* storage_base) {
  if (storage_base) {
    detail::block_at(storage_base)
        ->epoch.store(detail::epochs.fetch_add(1, std::memory_order_relaxed), std::memory_order_relaxed);
  }
}

// The allocator of PrivateUse1. Its allocate(n) is on the current device.
c10::DeviceAllocator* allocator();

// Throws c10::OutOfMemoryError. Distinct live allocations have distinct addresses, those of 0 bytes too.
c10::DataPtr allocate(c10::DeviceIndex device, uint64_t size);

// Memory of the device that someone else owns (CUDA/HIP addresses), as that of a storage, which keeps `owner` alive.
c10::DataPtr adopt(c10::DeviceIndex device, uint64_t address, uint64_t size, std::shared_ptr<void> owner);

// Gives unused segments back to the device.
void empty_cache(c10::DeviceIndex device);

// Called when a tensor doesn't fit, before that is an error: gives back what is kept for speed only (packed weights). No lock is
// held. allocate() above doesn't call it, since the keeper allocates by that.
void set_reclaimer(void (*reclaim)(c10::DeviceIndex));

// The bytes that segments of a device may take together.
uint64_t memory_budget(c10::DeviceIndex device);
void set_memory_budget(c10::DeviceIndex device, uint64_t bytes);

uint64_t memory_reserved(c10::DeviceIndex device);
uint64_t memory_allocated(c10::DeviceIndex device);

// "PyTorch-like" numbers of an out-of-memory text and of memory_summary: 1.50 GiB, 20.00 MiB.
std::string format_bytes(uint64_t bytes);

// Host memory that isPinnedPtr knows and that a non_blocking copy may fill later.
c10::Allocator* pinned_allocator();
bool is_pinned(const void* data);
// An asynchronous read into pinned memory was queued: its block stays allocated until the device is next synchronized.
void pin_until_synchronized(const void* data, Device&);
void release_pinned(Device&) noexcept;  // called by synchronize()

}  // namespace spiral
