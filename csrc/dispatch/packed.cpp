#include "packed.h"

#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <list>
#include <mutex>
#include <unordered_map>

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
      dropped.push_back(std::move(c.entries.back().block));
      c.by_key.erase(c.entries.back().key);
      c.entries.pop_back();
    }
    c.entries.push_front({key, storage, epoch, {}});
    c.by_key.emplace(key, c.entries.begin());
    return {nullptr, true};
  }
  c.entries.splice(c.entries.begin(), c.entries, it->second);
  Entry& e = *it->second;
  if (e.epoch != epoch) {
    e.epoch = epoch;
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
  std::lock_guard lock(c.mutex);
  for (auto it = c.entries.begin(); it != c.entries.end();) {
    auto next = std::next(it);
    if (it->key[0] == device && (all || !live(*it))) {
      c.by_key.erase(it->key);
      dropped.splice(dropped.begin(), c.entries, it);
    }
    it = next;
  }
}

}  // namespace spiral
