// Random numbers: Philox4x32-10. The key is the generator's seed; the counter starts at its offset.
#pragma once

#include <ATen/core/Generator.h>

#include <cstdint>
#include <optional>
#include <utility>

namespace spiral {

// Reserves `calls` values of the counter, four 32-bit words each, and returns {seed, first counter}. Without a generator, from
// the default one of the device. Throws c10::Error for a generator of another device.
std::pair<int64_t, int64_t> philox_reserve(const std::optional<at::Generator>& generator, c10::DeviceIndex device,
                                           int64_t calls);

const at::Generator& default_generator(c10::DeviceIndex device);
// Seeds the default generators, now or when they are made. Looks for no devices.
void manual_seed_all(uint64_t seed);

at::Generator new_generator(c10::DeviceIndex device);

}  // namespace spiral
