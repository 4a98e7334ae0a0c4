#include "packed.h"

#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <list>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "../runtime/device.h"
#include "../runtime/memory.h"

namespace spiral {
namespace {

using Key = c10::SmallVector<int64_t, 16>;

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t h = 0;
    for (int64_t word : key) h = (h ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15ull, h ^= h >> 29;
    return static_cast<size_t>(h);
  }
};

struct Entry {
  Key key;
  const void* storage;
  uint64_t epoch;
  c10::DataPtr block;  // null until the second use
  uint64_t bytes = 0;
  uint32_t holder = 0;
};

struct Cache {
  std::mutex mutex;
  std::list<Entry> entries;  // the last used first
  std::unordered_map<Key, std::list<Entry>::iterator, Hash> by_key;
};

constexpr size_t kMaxEntries = 4096;

Cache& cache() {
  static Cache* c = new Cache;
  return *c;
}

thread_local uint32_t packing = 0;

bool live(const Entry& e) {
  return is_spiral_address(e.storage) && detail::block_at(e.storage) != nullptr && write_epoch(e.storage) == e.epoch;
}

}  // namespace

Packed find_packed(c10::DeviceIndex device, const void* data, const void* storage, c10::IntArrayRef layout, uint32_t kind, uint64_t bytes) {
  if (data == nullptr || bytes == 0) return {nullptr, true};
  Key key{device, static_cast<int64_t>(kind), reinterpret_cast<int64_t>(data), static_cast<int64_t>(bytes)};
  key.append(layout.begin(), layout.end());
  Cache& c = cache();
  const uint64_t epoch = write_epoch(storage);
  c10::SmallVector<c10::DataPtr, 4> dropped;  // freed after the lock
  std::lock_guard lock(c.mutex);
  auto it = c.by_key.find(key);
  if (it == c.by_key.end()) {
    if (c.entries.size() >= kMaxEntries) {
      auto oldest = std::find_if(c.entries.rbegin(), c.entries.rend(), [](const Entry& e) { return e.holder == 0; });
      if (oldest != c.entries.rend()) {
        dropped.push_back(std::move(oldest->block));
        c.by_key.erase(oldest->key);
        c.entries.erase(std::next(oldest).base());
      }
    }
    c.entries.push_front({key, storage, epoch, {}, bytes, packing});
    it = c.by_key.emplace(key, c.entries.begin()).first;
    if (!packing) return {nullptr, true};
  }
  c.entries.splice(c.entries.begin(), c.entries, it->second);
  Entry& e = *it->second;
  if (packing) e.holder = packing;
  if (e.epoch != epoch) {
    e.epoch = epoch;
    if (e.holder && e.block) return {e.block.get(), true};
    dropped.push_back(std::move(e.block));
    e.block = {};
    return {nullptr, true};
  }
  if (e.block) return {e.block.get(), false};
  try {
    e.block = allocate(device, bytes);
  } catch (const c10::OutOfMemoryError&) {
    return {nullptr, true};
  }
  return {e.block.get(), true};
}

void drop_packed(c10::DeviceIndex device, bool all) {
  Cache& c = cache();
  std::list<Entry> dropped;
  std::vector<c10::DataPtr> freed;
  std::lock_guard lock(c.mutex);
  for (auto it = c.entries.begin(); it != c.entries.end();) {
    auto next = std::next(it);
    if (it->key[0] == device && all && it->holder && live(*it)) {  // made again at the next use
      freed.push_back(std::move(it->block));
      it->block = {};
    } else if (it->key[0] == device && (all || !live(*it))) {
      c.by_key.erase(it->key);
      dropped.splice(dropped.begin(), c.entries, it);
    }
    it = next;
  }
}

void set_packing(uint32_t holder) { packing = holder; }

void release_packed(uint32_t holder) {
  Cache& c = cache();
  std::list<Entry> dropped;
  std::lock_guard lock(c.mutex);
  for (auto it = c.entries.begin(); it != c.entries.end();) {
    auto next = std::next(it);
    if (it->holder == holder) {
      c.by_key.erase(it->key);
      dropped.splice(dropped.begin(), c.entries, it);
    }
    it = next;
  }
}

PackedStatistics packed_statistics(c10::DeviceIndex device, uint32_t holder) {
  Cache& c = cache();
  std::lock_guard lock(c.mutex);
  PackedStatistics s{0, 0};
  for (const Entry& e : c.entries) {
    if (e.key[0] != device || !e.block || (holder && e.holder != holder)) continue;
    ++s.entries;
    s.bytes += e.bytes;
  }
  return s;
}

}  // namespace spiral
