// Compiled kernels on disk. What is read back is believed only if its SHA-256 fits: a damaged entry counts as absent.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace spiral {

using Digest = std::array<uint8_t, 32>;

Digest sha256(std::string_view data);
std::string to_hex(const Digest& digest);

// A key for everything that decides what a kernel compiles to: engine, device, driver, options, source. The parts are
// delimited, so moving text from one to the next changes the key.
Digest cache_key(const std::vector<std::string_view>& parts);

// $SPIRAL_CACHE_DIR or ~/.cache/torch_spiral (Windows: %LOCALAPPDATA%\torch_spiral), created with mode 0700. Empty, after
// one warning, where it cannot be created or others may write to it.
const std::string& cache_directory();

// Neither throws. SPIRAL_CACHE=0 makes the first find nothing and the second do nothing.
std::optional<std::string> cache_load(const Digest& key);
void cache_store(const Digest& key, std::string_view payload);

// Writes what is needed to look into a kernel that did not compile. Returns the file's path, or an empty string.
std::string save_failed_kernel(const std::string& name, const std::string& device, const std::string& source,
                               const std::string& log);

}  // namespace spiral
