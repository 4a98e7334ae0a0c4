#include "runtime/kernel_cache.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <system_error>

#ifdef _WIN32
#include <process.h>
#define getpid _getpid
#else
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace spiral {
namespace {

namespace fs = std::filesystem;

uint32_t rotate_right(uint32_t x, int n) { return x >> n | x << (32 - n); }

// FIPS 180-4, 4.2.2: the first 32 bits of the fractional parts of the cube roots of the first 64 primes.
constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

void sha256_block(uint32_t state[8], const uint8_t* block) {
  uint32_t w[64];
  for (int i = 0; i < 16; i++) {
    w[i] = uint32_t(block[4 * i]) << 24 | uint32_t(block[4 * i + 1]) << 16 | uint32_t(block[4 * i + 2]) << 8 |
           uint32_t(block[4 * i + 3]);
  }
  for (int i = 16; i < 64; i++) {
    const uint32_t a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + w[i - 7] + (rotate_right(a, 7) ^ rotate_right(a, 18) ^ a >> 3) +
           (rotate_right(b, 17) ^ rotate_right(b, 19) ^ b >> 10);
  }
  uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
  uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
  for (int i = 0; i < 64; i++) {
    const uint32_t t1 = h + (rotate_right(e, 6) ^ rotate_right(e, 11) ^ rotate_right(e, 25)) + ((e & f) ^ (~e & g)) +
                        kRound[i] + w[i];
    const uint32_t t2 =
        (rotate_right(a, 2) ^ rotate_right(a, 13) ^ rotate_right(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
  }
  state[0] += a, state[1] += b, state[2] += c, state[3] += d;
  state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

// An entry is this header and then the payload, nothing else. The key is repeated so that a renamed file is not believed.
struct Header {
  char magic[8];
  Digest key;
  Digest payload_digest;
  uint64_t payload_size;
};
static_assert(sizeof(Header) == 80);
constexpr char kMagic[8] = {'S', 'P', 'I', 'R', 'A', 'L', 'K', '1'};

bool enabled() {
  const char* value = std::getenv("SPIRAL_CACHE");
  return value == nullptr || std::string_view(value) != "0";
}

fs::path wanted_directory() {
  if (const char* chosen = std::getenv("SPIRAL_CACHE_DIR"); chosen && *chosen) return chosen;
#ifdef _WIN32
  const char* home = std::getenv("LOCALAPPDATA");
  return home && *home ? fs::path(home) / "torch_spiral" : fs::path();
#else
  const char* home = std::getenv("HOME");
  return home && *home ? fs::path(home) / ".cache" / "torch_spiral" : fs::path();
#endif
}

std::string make_directory() {
  const fs::path path = wanted_directory();
  if (path.empty()) return "";
  std::error_code error;
  fs::create_directories(path.parent_path(), error);
#ifdef _WIN32
  fs::create_directory(path, error);
  const bool usable = fs::is_directory(path, error);
#else
  ::mkdir(path.c_str(), 0700);
  struct stat status;
  // A kernel is code: a directory that another user may write to is not used.
  const bool usable = ::stat(path.c_str(), &status) == 0 && S_ISDIR(status.st_mode) && status.st_uid == ::geteuid() &&
                      (status.st_mode & (S_IWGRP | S_IWOTH)) == 0 && ::access(path.c_str(), R_OK | W_OK | X_OK) == 0;
#endif
  if (usable) return path.string();
  TORCH_WARN("torch_spiral does not cache compiled kernels: ", path.string(),
             " is not a directory that this user alone may write to. Set SPIRAL_CACHE_DIR to one.");
  return "";
}

fs::path entry_path(const Digest& key) {
  const std::string hex = to_hex(key);
  return fs::path(cache_directory()) / hex.substr(0, 2) / (hex.substr(2) + ".kernel");
}

bool write_file(const fs::path& path, std::initializer_list<std::string_view> parts) {
  // Readers see the whole file or none: written beside it under a name of this process's own, then renamed.
  static std::atomic<uint64_t> counter{0};
  fs::path scratch = path;
  scratch += "." + std::to_string(getpid()) + "." + std::to_string(counter++) + ".tmp";
  std::error_code error;
  fs::create_directories(path.parent_path(), error);
  std::ofstream file(scratch, std::ios::binary | std::ios::trunc);
  for (std::string_view part : parts) file.write(part.data(), std::streamsize(part.size()));
  file.close();
  if (file) fs::rename(scratch, path, error);
  if (!file || error) {
    fs::remove(scratch, error);
    return false;
  }
  return true;
}

}  // namespace

Digest sha256(std::string_view data) {
  uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  const auto* bytes = reinterpret_cast<const uint8_t*>(data.data());
  size_t left = data.size();
  for (; left >= 64; bytes += 64, left -= 64) sha256_block(state, bytes);
  // The rest, one 1 bit, zeros, and the length in bits: one block or two.
  uint8_t tail[128] = {};
  if (left) std::memcpy(tail, bytes, left);
  tail[left] = 0x80;
  const size_t end = left < 56 ? 64 : 128;
  const uint64_t bits = uint64_t(data.size()) * 8;
  for (int i = 0; i < 8; i++) tail[end - 1 - i] = uint8_t(bits >> 8 * i);
  for (size_t at = 0; at < end; at += 64) sha256_block(state, tail + at);
  Digest digest;
  for (int i = 0; i < 32; i++) digest[i] = uint8_t(state[i / 4] >> (24 - 8 * (i % 4)));
  return digest;
}

std::string to_hex(const Digest& digest) {
  std::string text;
  for (uint8_t byte : digest) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

Digest cache_key(const std::vector<std::string_view>& parts) {
  std::string text;
  for (std::string_view part : parts) {
    text += std::to_string(part.size());
    text += ':';
    text += part;
  }
  return sha256(text);
}

const std::string& cache_directory() {
  static const std::string directory = make_directory();
  return directory;
}

std::optional<std::string> cache_load(const Digest& key) {
  if (!enabled() || cache_directory().empty()) return std::nullopt;
  try {
    std::ifstream file(entry_path(key), std::ios::binary);
    if (!file) return std::nullopt;
    std::stringstream buffer;
    buffer << file.rdbuf();
    std::string entry = buffer.str();
    Header header;
    if (entry.size() < sizeof(header)) return std::nullopt;
    std::memcpy(&header, entry.data(), sizeof(header));
    entry.erase(0, sizeof(header));
    if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0 || header.key != key ||
        header.payload_size != entry.size() || header.payload_digest != sha256(entry)) {
      return std::nullopt;
    }
    return entry;
  } catch (const std::exception&) {
    return std::nullopt;
  }
}

void cache_store(const Digest& key, std::string_view payload) {
  if (!enabled() || cache_directory().empty()) return;
  try {
    Header header;
    std::memcpy(header.magic, kMagic, sizeof(kMagic));
    header.key = key;
    header.payload_digest = sha256(payload);
    header.payload_size = payload.size();
    write_file(entry_path(key), {std::string_view(reinterpret_cast<const char*>(&header), sizeof(header)), payload});
  } catch (const std::exception&) {
    // A full or vanished disk costs a recompilation, no more.
  }
}

std::string save_failed_kernel(const std::string& name, const std::string& device, const std::string& source,
                               const std::string& log) {
  if (cache_directory().empty()) return "";
  try {
    std::string file_name;
    for (char c : name.substr(0, 100)) file_name += std::isalnum(static_cast<unsigned char>(c)) || c == '-' ? c : '_';
    file_name += "-" + to_hex(sha256(source)).substr(0, 8) + ".txt";
    const fs::path path = fs::path(cache_directory()) / "failed" / file_name;
    const bool written = write_file(
        path, {"kernel: ", name, "\ndevice: ", device, "\n\n---- build log ----\n", log, "\n\n---- source ----\n", source});
    return written ? path.string() : "";
  } catch (const std::exception&) {
    return "";
  }
}

}  // namespace spiral
