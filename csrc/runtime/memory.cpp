#include "runtime/memory.h"

#include "runtime/fork.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <unordered_map>
#include <vector>

#ifdef _WIN32
#include <malloc.h>
#include <windows.h>
#else
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace spiral {

namespace detail {
std::atomic<Segment*>* chunks = nullptr;
uintptr_t base = 0;
uint64_t span = 0;
std::atomic<uint64_t> epochs{1};

void not_spiral_memory(const void* address) {
  TORCH_CHECK(false, "Address ", address, " is not in the memory of a spiral device");
}
}  // namespace detail

namespace {

using c10::CachingAllocator::StatArray;
using c10::CachingAllocator::StatType;
using c10::CachingDeviceAllocator::DeviceStats;

constexpr uint64_t KiB = 1024, MiB = 1024 * KiB, GiB = 1024 * MiB;
constexpr uint64_t kChunk = uint64_t{1} << kChunkBits;
constexpr uint64_t kGuard = 4096;  // unused after each segment: one-past-the-end pointers stay in it, overruns don't reach the next

constexpr uint64_t kSmallRequest = 1 * MiB;   // up to here blocks come from small segments …
constexpr uint64_t kSmallSegment = 2 * MiB;
constexpr uint64_t kLargeRequest = 10 * MiB;  // … up to here from shared large ones, above from one of their own
constexpr uint64_t kLargeSegment = 20 * MiB;

// A huge segment is larger than what one kernel argument can see. It holds one block, since blocks that share a segment have to
// be reachable through one argument.
enum Pool { kSmall, kLarge, kHuge, kPools };

constexpr uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

// ---- addresses

class AddressSpace {
 public:
  static AddressSpace& get() {
    static auto* space = new AddressSpace;
    return *space;
  }

  // At a multiple of kChunk, with kGuard unused bytes after it.
  uintptr_t take(uint64_t size, Segment* segment) {
    size = round_up(size + kGuard, kChunk);
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto range = free_.begin(); range != free_.end(); ++range) {
      if (range->second < size) continue;
      const uintptr_t address = range->first;
      const uint64_t rest = range->second - size;
      free_.erase(range);
      if (rest) free_.emplace(address + size, rest);
      mark(address, size, segment);
      return address;
    }
    return 0;
  }

  void give_back(uintptr_t address, uint64_t size) {
    size = round_up(size + kGuard, kChunk);
    std::lock_guard<std::mutex> lock(mutex_);
    mark(address, size, nullptr);
    auto range = free_.emplace(address, size).first;
    if (auto after = std::next(range); after != free_.end() && address + size == after->first) {
      range->second += after->second;
      free_.erase(after);
    }
    if (range != free_.begin()) {
      if (auto before = std::prev(range); before->first + before->second == address) {
        before->second += range->second;
        free_.erase(range);
      }
    }
  }

 private:
  // Reserves what the process is allowed to (ulimit -v): 16 TiB, or half of it, or a quarter …
  AddressSpace() {
    for (uint64_t size = uint64_t{1} << 44; size >= 16 * kChunk; size /= 2) {
      void* range = reserve(size);
      if (!range) continue;
      auto* table = static_cast<std::atomic<Segment*>*>(std::calloc(size / kChunk, sizeof(std::atomic<Segment*>)));
      if (!table) {
        release(range, size);
        continue;
      }
      const uintptr_t start = reinterpret_cast<uintptr_t>(range);
      detail::base = round_up(start, kChunk);
      detail::chunks = table;
      detail::span = (start + size - detail::base) / kChunk * kChunk;
      free_.emplace(detail::base, detail::span);
      return;
    }
    TORCH_CHECK(false, "Cannot reserve a range of addresses for the spiral device (is `ulimit -v` very low?)");
  }

  static void* reserve(uint64_t size) {
#ifdef _WIN32
    return VirtualAlloc(nullptr, size, MEM_RESERVE, PAGE_NOACCESS);
#else
    void* range = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return range == MAP_FAILED ? nullptr : range;
#endif
  }

  static void release(void* range, uint64_t size) {
#ifdef _WIN32
    (void)size;
    VirtualFree(range, 0, MEM_RELEASE);
#else
    munmap(range, size);
#endif
  }

  void mark(uintptr_t address, uint64_t size, Segment* segment) {
    const uint64_t first = (address - detail::base) / kChunk;
    for (uint64_t i = 0; i < size / kChunk; ++i) detail::chunks[first + i].store(segment, std::memory_order_release);
  }

  std::mutex mutex_;
  std::map<uintptr_t, uint64_t> free_;
};

// ---- free blocks

// Free blocks by size: eight bins per power of two, and a bitmap of those that aren't empty.
class Bins {
 public:
  void insert(Block* block) {
    const int bin = index(block->size);
    block->bin_previous = nullptr;
    block->bin_next = bins_[bin];
    if (bins_[bin]) bins_[bin]->bin_previous = block;
    bins_[bin] = block;
    used_[bin / 64] |= uint64_t{1} << bin % 64;
  }

  void remove(Block* block) {
    const int bin = index(block->size);
    if (block->bin_next) block->bin_next->bin_previous = block->bin_previous;
    if (block->bin_previous) {
      block->bin_previous->bin_next = block->bin_next;
    } else {
      bins_[bin] = block->bin_next;
      if (!bins_[bin]) used_[bin / 64] &= ~(uint64_t{1} << bin % 64);
    }
  }

  // A free block of at least `size`: the best of a few in its own bin, else the first of the next bin.
  Block* find(uint64_t size) const {
    const int own = index(size);
    Block* best = nullptr;
    int looked_at = 0;
    for (Block* block = bins_[own]; block && looked_at < 16; block = block->bin_next, ++looked_at) {
      if (block->size == size) return block;
      if (block->size > size && (!best || block->size < best->size)) best = block;
    }
    if (best) return best;
    const int next = own + 1;
    for (int word = next / 64; word < kWords; ++word) {
      uint64_t bits = used_[word];
      if (word == next / 64) bits &= ~uint64_t{0} << next % 64;
      if (bits) return bins_[word * 64 + __builtin_ctzll(bits)];
    }
    return nullptr;
  }

  template <typename F>
  void for_each(F&& f) const {
    for (Block* block : bins_) {
      for (; block; block = block->bin_next) f(block);
    }
  }

 private:
  static constexpr int kBins = 320, kWords = kBins / 64;

  static int index(uint64_t size) {
    const uint64_t units = size / kBlockUnit;  // at least 1
    const int log = 63 - __builtin_clzll(units);
    const int eighth = static_cast<int>((log >= 3 ? units >> (log - 3) : units << (3 - log)) & 7);
    return std::min(log * 8 + eighth, kBins - 1);
  }

  std::array<Block*, kBins> bins_{};
  std::array<uint64_t, kWords> used_{};
};

// ---- one device

uint64_t physical_memory() {
#ifdef _WIN32
  MEMORYSTATUSEX status{sizeof(MEMORYSTATUSEX)};
  GlobalMemoryStatusEx(&status);
  uint64_t bytes = status.ullTotalPhys;
#else
  uint64_t bytes = static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<uint64_t>(sysconf(_SC_PAGE_SIZE));
#endif
  // A container's limit; "max" where there is none, which isn't a number.
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    std::ifstream file(path);
    if (uint64_t limit = 0; file >> limit) bytes = std::min(bytes, limit);
  }
  return bytes;
}

// "3G", "512M", "1048576", or a share of the device's memory: "50%".
std::optional<uint64_t> parse_budget(const char* text, uint64_t total) {
  char* end = nullptr;
  const double number = std::strtod(text, &end);
  double unit = 1;
  switch (*end) {
    case '\0': break;
    case 'K': case 'k': unit = KiB; ++end; break;
    case 'M': case 'm': unit = MiB; ++end; break;
    case 'G': case 'g': unit = GiB; ++end; break;
    case 'T': case 't': unit = 1024.0 * GiB; ++end; break;
    case '%': unit = static_cast<double>(total) / 100; ++end; break;
    default: return std::nullopt;
  }
  if (end == text || !(number > 0)) return std::nullopt;
  if (*end == 'B' || *end == 'b') ++end;
  if (*end) return std::nullopt;
  return static_cast<uint64_t>(number * unit);
}

uint64_t total_memory(c10::DeviceIndex index) {
  const DeviceProperties& p = device_properties(index);
  const bool shares_ram = p.type == DeviceType::CPU || p.type == DeviceType::Software;
  const uint64_t reported = p.total_memory > 0 ? static_cast<uint64_t>(p.total_memory) : physical_memory();
  return shares_ram ? std::min(reported, physical_memory()) : reported;
}

uint64_t default_budget(c10::DeviceIndex index) {
  const uint64_t total = total_memory(index);
  if (const char* text = std::getenv("SPIRAL_MEMORY_BUDGET")) {
    const auto bytes = parse_budget(text, total);
    TORCH_CHECK(bytes, "SPIRAL_MEMORY_BUDGET=", text, " is not a size such as 3G, 512M or 50%");
    return *bytes;
  }
  const DeviceType type = device_properties(index).type;
  // A driver refuses what a GPU doesn't have. A CPU's hands out more than there is, and the process dies when it is touched.
  return type == DeviceType::DiscreteGPU ? total : total / 5 * 4;
}

class DeviceMemory {
 public:
  explicit DeviceMemory(c10::DeviceIndex index) : index_(index), budget_(default_budget(index)) {
    AddressSpace::get();
    const DeviceProperties& p = device_properties(index);
    max_binding_ = p.max_binding > 0 ? static_cast<uint64_t>(p.max_binding) : UINT64_MAX;
    max_allocation_ = p.max_allocation > 0 ? static_cast<uint64_t>(p.max_allocation) : UINT64_MAX;
  }

  Block* allocate(uint64_t requested) {
    const uint64_t unit = exact_ ? 8 : kBlockUnit;
    const uint64_t size = std::max(round_up(requested, unit), unit);
    if (C10_UNLIKELY(size > max_allocation_ || size < requested)) refuse(requested);
    const Pool pool = size > max_binding_ || exact_ ? kHuge : size <= kSmallRequest ? kSmall : kLarge;
    if (!exact_) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (Block* block = take(pool, size, requested)) return block;
    }
    return allocate_segment(pool, size, requested);
  }

  void free(Block* block) noexcept {
    std::lock_guard<std::mutex> lock(mutex_);
    Segment* segment = block->segment;
    block->allocated = false;
    const bool small = segment->pool == kSmall;
    decrease(stats_.allocation, small, 1);
    decrease(stats_.active, small, 1);
    decrease(stats_.allocated_bytes, small, block->size);
    decrease(stats_.active_bytes, small, block->size);
    decrease(stats_.requested_bytes, small, block->requested);
    Bins& bins = bins_[segment->pool];
    // A free block next to another is one block.
    if (Block* next = block->next; next && !next->allocated) absorb(bins, block, next, small);
    if (Block* previous = block->previous; previous && !previous->allocated) {
      bins.remove(previous);
      count_inactive(previous, small, false);
      block->offset = previous->offset;
      block->size += previous->size;
      block->previous = previous->previous;
      if (block->previous) block->previous->next = block;
      forget(segment, previous);
      segment->blocks[block->offset / kBlockUnit] = block;
    }
    bins.insert(block);
    count_inactive(block, small, true);
  }

  void empty_cache() {
    std::vector<Block*> unused;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (Bins& bins : bins_) {
        const size_t first = unused.size();
        bins.for_each([&](Block* block) {
          if (!block->previous && !block->next) unused.push_back(block);
        });
        for (size_t i = first; i < unused.size(); ++i) bins.remove(unused[i]);
      }
      for (Block* block : unused) {
        const Segment* segment = block->segment;
        const bool small = segment->pool == kSmall;
        decrease(stats_.segment, small, 1);
        decrease(stats_.reserved_bytes, small, segment->size);
        reserved_ -= segment->size;
        ++stats_.num_device_free;
      }
    }
    if (unused.empty()) return;
    Device& owner = device(index_);
    DeviceLock lock(owner.mutex);
    for (Block* block : unused) {
      Segment* segment = block->segment;
      AddressSpace::get().give_back(segment->address, segment->size);
      owner.engine->free(segment->memory);
      std::free(segment->blocks);
      delete segment;
      delete block;
    }
  }

  uint64_t budget() {
    std::lock_guard<std::mutex> lock(mutex_);
    return budget_;
  }
  void set_budget(uint64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    budget_ = bytes;
  }
  uint64_t reserved() {
    std::lock_guard<std::mutex> lock(mutex_);
    return reserved_;
  }
  uint64_t allocated() {
    std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<uint64_t>(stats_.allocated_bytes[0].current);
  }
  DeviceStats stats() {
    std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }

  template <typename F>
  void for_each_stat(F&& f) {
    std::lock_guard<std::mutex> lock(mutex_);
    for (StatArray* array :
         {&stats_.allocation, &stats_.segment, &stats_.active, &stats_.inactive_split, &stats_.allocated_bytes,
          &stats_.reserved_bytes, &stats_.active_bytes, &stats_.inactive_split_bytes, &stats_.requested_bytes}) {
      for (auto& stat : *array) f(stat);
    }
    f(stats_.oversize_allocations);
    f(stats_.oversize_segments);
  }
  void reset_counts() {
    std::lock_guard<std::mutex> lock(mutex_);
    stats_.num_alloc_retries = stats_.num_ooms = stats_.num_sync_all_streams = stats_.num_device_alloc =
        stats_.num_device_free = 0;
  }

 private:
  static void increase(StatArray& stat, bool small, uint64_t amount) {
    stat[static_cast<size_t>(StatType::AGGREGATE)].increase(amount);
    stat[static_cast<size_t>(small ? StatType::SMALL_POOL : StatType::LARGE_POOL)].increase(amount);
  }
  static void decrease(StatArray& stat, bool small, uint64_t amount) {
    stat[static_cast<size_t>(StatType::AGGREGATE)].decrease(amount);
    stat[static_cast<size_t>(small ? StatType::SMALL_POOL : StatType::LARGE_POOL)].decrease(amount);
  }

  // A free part of a segment that is in use otherwise.
  void count_inactive(const Block* block, bool small, bool appears) {
    if (!block->previous && !block->next) return;
    if (appears) {
      increase(stats_.inactive_split, small, 1);
      increase(stats_.inactive_split_bytes, small, block->size);
    } else {
      decrease(stats_.inactive_split, small, 1);
      decrease(stats_.inactive_split_bytes, small, block->size);
    }
  }

  Block* new_block(Segment* segment, uint64_t offset, uint64_t size) {
    Block* block;
    if (spare_.empty()) {
      block = new Block;
    } else {
      block = spare_.back();
      spare_.pop_back();
      block->previous = block->next = nullptr;
    }
    block->segment = segment;
    block->offset = offset;
    block->size = size;
    block->allocated = false;
    segment->blocks[offset / kBlockUnit] = block;
    return block;
  }

  void forget(Segment* segment, Block* block) {
    segment->blocks[block->offset / kBlockUnit] = nullptr;
    spare_.push_back(block);
  }

  // `next` is free and follows `block`, which isn't in a bin.
  void absorb(Bins& bins, Block* block, Block* next, bool small) {
    bins.remove(next);
    count_inactive(next, small, false);
    block->size += next->size;
    block->next = next->next;
    if (block->next) block->next->previous = block;
    forget(block->segment, next);
  }

  Block* take(Pool pool, uint64_t size, uint64_t requested) {
    Block* block = bins_[pool].find(size);
    if (!block) return nullptr;
    // A huge block isn't split, so a much larger one would be wasted.
    if (pool == kHuge && block->size > size + size / 8) return nullptr;
    bins_[pool].remove(block);
    count_inactive(block, pool == kSmall, false);
    hand_out(block, pool, size, requested);
    return block;
  }

  // `block` is in no bin and counted nowhere.
  void hand_out(Block* block, Pool pool, uint64_t size, uint64_t requested) {
    const bool small = pool == kSmall;
    const uint64_t rest = block->size - size;
    if (small ? rest >= kBlockUnit : pool == kLarge && rest > kSmallRequest) {
      Block* remainder = new_block(block->segment, block->offset + size, rest);
      remainder->previous = block;
      remainder->next = block->next;
      if (block->next) block->next->previous = remainder;
      block->next = remainder;
      block->size = size;
      bins_[pool].insert(remainder);
      count_inactive(remainder, small, true);
    }
    block->allocated = true;
    block->requested = requested;
    block->epoch.store(detail::epochs.fetch_add(1, std::memory_order_relaxed), std::memory_order_relaxed);
    increase(stats_.allocation, small, 1);
    increase(stats_.active, small, 1);
    increase(stats_.allocated_bytes, small, block->size);
    increase(stats_.active_bytes, small, block->size);
    increase(stats_.requested_bytes, small, requested);
  }

  uint64_t segment_size(Pool pool, uint64_t size) const {
    if (exact_) return size;
    uint64_t segment = pool == kSmall           ? kSmallSegment
                       : size < kLargeRequest && pool == kLarge ? kLargeSegment
                                                : round_up(size, kChunk);
    const uint64_t limit = pool == kHuge ? max_allocation_ : std::min(max_allocation_, max_binding_);
    return std::max(size, std::min(segment, limit / kBlockUnit * kBlockUnit));
  }

  bool reserve(uint64_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (reserved_ + size > budget_) return false;
    reserved_ += size;
    return true;
  }
  void unreserve(uint64_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    reserved_ -= size;
  }

  Memory* try_allocate(Device& owner, uint64_t size) {
    if (!reserve(size)) return nullptr;
    try {
      DeviceLock lock(owner.mutex);
      return owner.engine->allocate(size);
    } catch (const c10::OutOfMemoryError&) {
      unreserve(size);
      return nullptr;
    } catch (...) {
      unreserve(size);
      throw;
    }
  }

  Block* allocate_segment(Pool pool, uint64_t size, uint64_t requested) {
    Device& owner = device(index_);
    uint64_t bytes = segment_size(pool, size);
    Memory* memory = try_allocate(owner, bytes);
    if (!memory) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        ++stats_.num_alloc_retries;
      }
      // Give back what is unused; the engine frees it after the work queued so far.
      empty_cache();
      synchronize(owner);
      memory = try_allocate(owner, bytes);
      if (!memory && bytes > size) {
        bytes = size;
        memory = try_allocate(owner, bytes);
      }
    }
    if (!memory) {
      {
        // Another thread, or the tensors that were waiting to die, may have freed a block meanwhile.
        std::lock_guard<std::mutex> lock(mutex_);
        if (Block* block = exact_ ? nullptr : take(pool, size, requested)) return block;
      }
      out_of_memory(requested);
    }

    auto* segment = new Segment{memory, 0, bytes, owner.index, pool, nullptr};
    segment->blocks = static_cast<Block**>(std::calloc(bytes / kBlockUnit + 1, sizeof(Block*)));
    segment->address = segment->blocks ? AddressSpace::get().take(bytes, segment) : 0;
    if (!segment->address) {
      std::free(segment->blocks);
      delete segment;
      {
        DeviceLock lock(owner.mutex);
        owner.engine->free(memory);
      }
      unreserve(bytes);
      out_of_memory(requested);
    }

    std::lock_guard<std::mutex> lock(mutex_);
    const bool small = pool == kSmall;
    increase(stats_.segment, small, 1);
    increase(stats_.reserved_bytes, small, bytes);
    ++stats_.num_device_alloc;
    Block* block = new_block(segment, 0, bytes / kBlockUnit * kBlockUnit);
    hand_out(block, pool, size, requested);
    return block;
  }

  [[noreturn]] void refuse(uint64_t requested) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, "spiral:", static_cast<int>(index_), " (", device_properties(index_).name,
                     ") cannot hold a tensor of ", format_bytes(requested), ": its largest buffer has ",
                     format_bytes(max_allocation_), ".");
  }

  [[noreturn]] void out_of_memory(uint64_t requested) {
    uint64_t allocated, reserved, budget;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++stats_.num_ooms;
      allocated = static_cast<uint64_t>(stats_.allocated_bytes[0].current);
      reserved = reserved_;
      budget = budget_;
    }
    const DeviceProperties& p = device_properties(index_);
    TORCH_CHECK_WITH(OutOfMemoryError, false, "spiral:", static_cast<int>(index_), " (", p.name,
                     ") is out of memory. Tried to allocate ", format_bytes(requested), ". The device has ",
                     format_bytes(total_memory(index_)), ", of which this process may use ", format_bytes(budget), "; ",
                     format_bytes(allocated), " are allocated by tensors, and ", format_bytes(reserved - std::min(reserved, allocated)),
                     " are reserved but unused. If reserved but unused memory is large, it is fragmented. The limit "
                     "is set by torch.spiral.set_per_process_memory_fraction() or SPIRAL_MEMORY_BUDGET (such as 12G or 90%).");
  }

  const c10::DeviceIndex index_;
  std::mutex mutex_;  // a leaf: held for bookkeeping only
  std::array<Bins, kPools> bins_;
  std::vector<Block*> spare_;
  DeviceStats stats_;
  uint64_t budget_;
  uint64_t reserved_ = 0;
  uint64_t max_binding_, max_allocation_;
  // For memory checkers: every tensor is memory of its own, as large as asked for and never used twice, so that they see overruns.
  const bool exact_ = std::getenv("SPIRAL_MEMORY_EXACT") != nullptr;
};

DeviceMemory& memory_of(c10::DeviceIndex index) {
  static auto* all = [] {
    auto* memories = new std::vector<std::unique_ptr<DeviceMemory>>;
    for (int i = 0; i < device_count(); ++i) memories->push_back(std::make_unique<DeviceMemory>(i));
    return memories;
  }();
  if (C10_UNLIKELY(index < 0 || index >= static_cast<int>(all->size()))) device_properties(index);  // throws
  return *(*all)[index];
}

void delete_block(void* context) {
  auto* block = static_cast<Block*>(context);
  if (in_bad_fork()) return;  // the parent's memory, and perhaps a lock that nobody will release
  const int index = block->segment->device;
  if (C10_UNLIKELY(c10::memoryProfilingEnabled())) {
    auto* address = reinterpret_cast<void*>(block->segment->address + block->offset);
    const auto size = static_cast<int64_t>(block->size);
    memory_of(index).free(block);
    c10::reportMemoryUsageToProfiler(address, -size, memory_allocated(index), memory_reserved(index),
                                     c10::Device(c10::DeviceType::PrivateUse1, index));
    return;
  }
  memory_of(index).free(block);
}

// A segment and its only block, in memory that is not ours.
struct Adopted {
  Segment segment;
  Block block;
  Block* blocks[1];
  std::shared_ptr<void> keeper;
};

void delete_adopted(void* context) {
  auto* adopted = static_cast<Adopted*>(context);
  if (in_bad_fork()) return;
  AddressSpace::get().give_back(adopted->segment.address, adopted->segment.size);
  {
    Device& owner = device(static_cast<c10::DeviceIndex>(adopted->segment.device));
    DeviceLock lock(owner.mutex);
    owner.engine->free(adopted->segment.memory);
  }
  delete adopted;
}

std::atomic<void (*)(c10::DeviceIndex)> reclaimer{nullptr};

class Allocator final : public c10::DeviceAllocator {
 public:
  c10::DataPtr allocate(size_t size) override {
    const c10::DeviceIndex index = current_device();
    const auto reclaim = reclaimer.load();
    if (!reclaim) return spiral::allocate(index, size);
    try {
      return spiral::allocate(index, size);
    } catch (const c10::OutOfMemoryError&) {
      reclaim(index);
    }
    return spiral::allocate(index, size);
  }

  // The context is the block, so a pointer alone cannot be freed.
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  bool is_simple_data_ptr(const c10::DataPtr& pointer) const override { return pointer.get_deleter() == &delete_block; }

  void copy_data(void* destination, const void* source, size_t count) const override {
    if (count == 0) return;
    const Location to = locate(destination), from = locate(source);
    TORCH_INTERNAL_ASSERT(to.device == from.device);
    Device& owner = device(static_cast<c10::DeviceIndex>(to.device));
    DeviceLock lock(owner.mutex);
    owner.engine->copy(from.memory, from.offset, to.memory, to.offset, count);
  }

  bool initialized() override { return device_count() > 0; }

  void emptyCache(c10::MempoolId_t = {0, 0}) override {
    for (int i = 0; i < device_count(); ++i) {
      if (device_is_open(static_cast<c10::DeviceIndex>(i))) empty_cache(static_cast<c10::DeviceIndex>(i));
    }
  }

  // All streams of a device share its in-order queue: work that is queued later cannot overtake what uses a freed block.
  void recordStream(const c10::DataPtr&, c10::Stream) override {}

  DeviceStats getDeviceStats(c10::DeviceIndex index) override { return memory_of(index).stats(); }
  void resetAccumulatedStats(c10::DeviceIndex index) override {
    memory_of(index).for_each_stat([](auto& stat) { stat.reset_accumulated(); });
    memory_of(index).reset_counts();
  }
  void resetPeakStats(c10::DeviceIndex index) override {
    memory_of(index).for_each_stat([](auto& stat) { stat.reset_peak(); });
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    DeviceMemory& memory = memory_of(index);
    const uint64_t budget = memory.budget(), reserved = memory.reserved();
    return {budget - std::min(budget, reserved), total_memory(index)};
  }
};

Allocator& the_allocator() {
  static auto* instance = new Allocator;
  return *instance;
}

// ---- pinned memory: host memory that survives until the reads into it are done

struct PinnedBlock {
  uint64_t size = 0;
  int pending = 0;     // devices that may still write to it
  bool freed = false;  // by its owner
};

class PinnedAllocator final : public at::HostAllocator {
 public:
  static PinnedAllocator& get() {
    static auto* instance = new PinnedAllocator;
    return *instance;
  }

  c10::DataPtr allocate(size_t requested) override {
    // Powers of two: there are few sizes (batches), and they repeat.
    uint64_t size = 4096;
    while (size < requested) size *= 2;
    const c10::Device cpu(c10::DeviceType::CPU);
    std::lock_guard<std::mutex> lock(mutex_);
    auto& cached = cache_[size];
    void* data;
    if (!cached.empty()) {
      data = cached.back();
      cached.pop_back();
    } else {
#ifdef _WIN32
      data = _aligned_malloc(size, 4096);
#else
      if (posix_memalign(&data, 4096, size) != 0) data = nullptr;
#endif
      TORCH_CHECK_WITH(OutOfMemoryError, data, "Cannot allocate ", format_bytes(size), " of pinned host memory");
      stats_.allocations.increase(1);
      stats_.allocated_bytes.increase(size);
      ++stats_.num_host_alloc;
    }
    blocks_[reinterpret_cast<uintptr_t>(data)] = PinnedBlock{size};
    stats_.active_requests.increase(1);
    stats_.active_bytes.increase(size);
    return {data, data, &deleter, cpu};
  }

  // Reads into a block are known here without being told (hold()).
  bool record_event(void*, void*, c10::Stream) override { return true; }

  void empty_cache() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [size, blocks] : cache_) {
      for (void* data : blocks) {
#ifdef _WIN32
        _aligned_free(data);
#else
        std::free(data);
#endif
        stats_.allocations.decrease(1);
        stats_.allocated_bytes.decrease(size);
        ++stats_.num_host_free;
      }
      blocks.clear();
    }
  }

  at::HostStats get_stats() override {
    std::lock_guard<std::mutex> lock(mutex_);
    return stats_;
  }
  void reset_accumulated_stats() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto* stat : {&stats_.active_requests, &stats_.active_bytes, &stats_.allocations, &stats_.allocated_bytes}) {
      stat->reset_accumulated();
    }
    stats_.num_host_alloc = stats_.num_host_free = 0;
  }
  void reset_peak_stats() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto* stat : {&stats_.active_requests, &stats_.active_bytes, &stats_.allocations, &stats_.allocated_bytes}) {
      stat->reset_peak();
    }
  }

  c10::DeleterFnPtr raw_deleter() const override { return &deleter; }
  void copy_data(void* destination, const void* source, size_t count) const override {
    default_copy_data(destination, source, count);
  }

  bool contains(const void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = find(data);
    return found != blocks_.end() && !found->second.freed;
  }

  void hold(const void* data, Device& device) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = find(data);
    TORCH_INTERNAL_ASSERT(found != blocks_.end());
    ++found->second.pending;
    waiting_[device.index].push_back(found->first);
    any_waiting_.store(true, std::memory_order_relaxed);
  }

  void release(const Device& device) {
    if (!any_waiting_.load(std::memory_order_relaxed)) return;
    std::lock_guard<std::mutex> lock(mutex_);
    auto waiting = waiting_.find(device.index);
    if (waiting == waiting_.end()) return;
    for (uintptr_t address : waiting->second) {
      auto found = blocks_.find(address);
      if (--found->second.pending == 0 && found->second.freed) recycle(found);
    }
    waiting_.erase(waiting);
    any_waiting_.store(!waiting_.empty(), std::memory_order_relaxed);
  }

 private:
  using Blocks = std::map<uintptr_t, PinnedBlock>;

  static void deleter(void* data) {
    PinnedAllocator& self = get();
    if (in_bad_fork()) return;
    std::lock_guard<std::mutex> lock(self.mutex_);
    auto found = self.blocks_.find(reinterpret_cast<uintptr_t>(data));
    if (found == self.blocks_.end()) return;
    found->second.freed = true;
    if (found->second.pending == 0) self.recycle(found);
  }

  Blocks::iterator find(const void* data) {
    const auto address = reinterpret_cast<uintptr_t>(data);
    auto found = blocks_.upper_bound(address);
    if (found == blocks_.begin()) return blocks_.end();
    --found;
    return address < found->first + found->second.size ? found : blocks_.end();
  }

  void recycle(Blocks::iterator block) {
    stats_.active_requests.decrease(1);
    stats_.active_bytes.decrease(block->second.size);
    cache_[block->second.size].push_back(reinterpret_cast<void*>(block->first));
    blocks_.erase(block);
  }

  std::mutex mutex_;
  Blocks blocks_;
  std::unordered_map<uint64_t, std::vector<void*>> cache_;
  std::unordered_map<int, std::vector<uintptr_t>> waiting_;  // by device
  std::atomic<bool> any_waiting_{false};
  at::HostStats stats_;
};

}  // namespace

c10::DeviceAllocator* allocator() { return &the_allocator(); }

c10::DataPtr allocate(c10::DeviceIndex index, uint64_t size) {
  check_not_forked();
  Block* block = memory_of(index).allocate(size);
  auto* address = reinterpret_cast<void*>(block->segment->address + block->offset);
  const c10::Device owner(c10::DeviceType::PrivateUse1, index);
  if (C10_UNLIKELY(c10::memoryProfilingEnabled())) {
    c10::reportMemoryUsageToProfiler(address, static_cast<int64_t>(block->size), memory_allocated(index),
                                     memory_reserved(index), owner);
  }
  return {address, block, &delete_block, owner};
}

c10::DataPtr adopt(c10::DeviceIndex index, uint64_t address, uint64_t size, std::shared_ptr<void> keeper) {
  check_not_forked();
  memory_of(index);  // the range of addresses exists
  Device& owner = device(index);
  // As aligned as it is: segments start at multiples of 2 MiB.
  const uint64_t lead = address % kBlockUnit;
  auto adopted = std::make_unique<Adopted>();
  {
    DeviceLock lock(owner.mutex);
    adopted->segment.memory = owner.engine->adopt(address - lead, size + lead);
  }
  TORCH_CHECK(adopted->segment.memory, "spiral:", static_cast<int>(index), " cannot use memory that others allocated");
  adopted->segment.size = size + lead;
  adopted->segment.device = index;
  adopted->segment.blocks = adopted->blocks;
  adopted->blocks[0] = &adopted->block;
  adopted->block.segment = &adopted->segment;
  adopted->block.size = size + lead;
  adopted->block.epoch.store(detail::epochs.fetch_add(1, std::memory_order_relaxed), std::memory_order_relaxed);
  adopted->keeper = std::move(keeper);
  adopted->segment.address = AddressSpace::get().take(size + lead, &adopted->segment);
  TORCH_CHECK(adopted->segment.address, "No addresses are left for ", format_bytes(size));
  auto* data = reinterpret_cast<void*>(adopted->segment.address + lead);
  return {data, adopted.release(), &delete_adopted, c10::Device(c10::DeviceType::PrivateUse1, index)};
}

void set_reclaimer(void (*reclaim)(c10::DeviceIndex)) { reclaimer.store(reclaim); }

void empty_cache(c10::DeviceIndex index) { memory_of(index).empty_cache(); }
uint64_t memory_budget(c10::DeviceIndex index) { return memory_of(index).budget(); }
void set_memory_budget(c10::DeviceIndex index, uint64_t bytes) { memory_of(index).set_budget(bytes); }
uint64_t memory_reserved(c10::DeviceIndex index) { return memory_of(index).reserved(); }
uint64_t memory_allocated(c10::DeviceIndex index) { return memory_of(index).allocated(); }

std::string format_bytes(uint64_t bytes) {
  char text[32];
  if (bytes >= GiB) {
    std::snprintf(text, sizeof text, "%.2f GiB", static_cast<double>(bytes) / GiB);
  } else if (bytes >= MiB) {
    std::snprintf(text, sizeof text, "%.2f MiB", static_cast<double>(bytes) / MiB);
  } else if (bytes >= KiB) {
    std::snprintf(text, sizeof text, "%.2f KiB", static_cast<double>(bytes) / KiB);
  } else {
    std::snprintf(text, sizeof text, "%d bytes", static_cast<int>(bytes));
  }
  return text;
}

c10::Allocator* pinned_allocator() { return &PinnedAllocator::get(); }
bool is_pinned(const void* data) { return PinnedAllocator::get().contains(data); }
void pin_until_synchronized(const void* data, Device& device) { PinnedAllocator::get().hold(data, device); }
void release_pinned(Device& device) noexcept { PinnedAllocator::get().release(device); }

}  // namespace spiral

namespace c10 {
REGISTER_ALLOCATOR(DeviceType::PrivateUse1, spiral::allocator());
}  // namespace c10

namespace at {
REGISTER_HOST_ALLOCATOR(at::kPrivateUse1, static_cast<at::HostAllocator*>(spiral::pinned_allocator()))
}
