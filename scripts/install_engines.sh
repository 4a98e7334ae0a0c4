#!/bin/sh
# Gives a machine without a usable GPU driver the two software engines: PoCL (OpenCL) and lavapipe (Vulkan).
# Usage: scripts/install_engines.sh [--dev]     --dev adds oclgrind, the OpenCL memory checker.
#
# Installs on Debian and Ubuntu as root, and only what is missing. Elsewhere it says what to install and succeeds: other
# engines may already work, and `python -m torch_spiral` lists them.
set -eu

dev=0
for arg in "$@"; do
  case $arg in
    --dev) dev=1 ;;
    *) echo "usage: $0 [--dev]" >&2; exit 2 ;;
  esac
done

say() { echo "engines: $*"; }

# 0 where an OpenCL platform answers.
have_opencl() {
  python3 - <<'PY'
import ctypes, sys
try:
    n = ctypes.c_uint32()
    status = ctypes.CDLL("libOpenCL.so.1").clGetPlatformIDs(0, None, ctypes.byref(n))
except OSError:
    sys.exit(1)
sys.exit(0 if status == 0 and n.value else 1)
PY
}

# 0 where a Vulkan device answers that computes right. Software devices of Mesa before 24 don't count: Debian 12's 22.3
# stops an invocation after 65,535 loop iterations without an error.
have_vulkan() {
  python3 - <<'PY'
import ctypes, re, struct, sys
try:
    vk = ctypes.CDLL("libvulkan.so.1")
except OSError:
    sys.exit(1)
vulkan11 = struct.pack("QQQQQII", 0, 0, 0, 0, 0, 0, 1 << 22 | 1 << 12)  # VkApplicationInfo
application = ctypes.create_string_buffer(vulkan11)
info = (ctypes.c_uint64 * 8)(1, 0, 0, ctypes.addressof(application))  # VkInstanceCreateInfo
instance, count = ctypes.c_void_p(), ctypes.c_uint32(64)
if vk.vkCreateInstance(info, None, ctypes.byref(instance)) != 0:
    sys.exit(1)
devices = (ctypes.c_void_p * 64)()
if vk.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), devices) < 0:
    sys.exit(1)
for device in devices[: count.value]:
    driver = ctypes.create_string_buffer(4096)  # VkPhysicalDeviceDriverProperties
    struct.pack_into("Q", driver, 0, 1000196000)
    properties = ctypes.create_string_buffer(4096)  # VkPhysicalDeviceProperties2
    struct.pack_into("QQ", properties, 0, 1000059001, ctypes.addressof(driver))
    vk.vkGetPhysicalDeviceProperties2(ctypes.c_void_p(device), properties)
    text = driver.raw[276:532].split(b"\0")[0].decode()  # driverInfo: "Mesa 25.0.7 (LLVM 15.0.6)"
    mesa = re.match(r"Mesa (\d+)", text)
    software = struct.unpack_from("I", properties, 32)[0] == 4  # deviceType: VK_PHYSICAL_DEVICE_TYPE_CPU
    if not software or (mesa and int(mesa[1]) >= 24):
        sys.exit(0)
sys.exit(1)
PY
}

packages=
have_opencl && say "OpenCL: found" || { say "OpenCL: none, wanted: PoCL"; packages="ocl-icd-libopencl1 pocl-opencl-icd"; }
need_vulkan=0
have_vulkan && say "Vulkan: found" || { say "Vulkan: none new enough, wanted: Mesa's lavapipe"; need_vulkan=1; }
[ $dev = 0 ] || command -v oclgrind >/dev/null || { say "oclgrind: none"; packages="$packages oclgrind"; }
[ -n "$packages" ] || [ $need_vulkan = 1 ] || exit 0

if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
  say "not installed: this needs apt-get and root. By hand:"
  say "  Debian, Ubuntu: sudo $0"
  say "  Fedora: sudo dnf install pocl mesa-vulkan-drivers vulkan-loader    Arch: sudo pacman -S pocl vulkan-swrast"
  say "  macOS needs nothing (Metal); Windows needs its GPU driver only (DX12)"
  exit 0
fi

. /etc/os-release
export DEBIAN_FRONTEND=noninteractive
apt_get() { apt-get -q -o Dpkg::Use-Pty=0 -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300 "$@"; }

# Debian 12's backports carry a fixed Mesa. The suite is not enabled on a plain machine: its entry is the machine's own one
# for Debian itself (not for security updates) under another suite, so that mirrors and proxies stay the user's choice.
backports=
if [ $need_vulkan = 1 ] && [ "$ID" = debian ] && [ "${VERSION_ID:-}" = 12 ]; then
  backports=bookworm-backports
  if ! grep -rqs "^[^#]*$backports" /etc/apt/sources.list /etc/apt/sources.list.d; then
    if [ -f /etc/apt/sources.list.d/debian.sources ]; then
      entry=/etc/apt/sources.list.d/torch-spiral-backports.sources
      awk -v RS= -v ORS='\n\n' '/(^|\n)Suites:[^\n]*[ \t]bookworm([ \t\n]|$)/ { print; exit }' \
        /etc/apt/sources.list.d/debian.sources | sed "s/^Suites:.*/Suites: $backports/" > "$entry"
    else
      entry=/etc/apt/sources.list.d/torch-spiral-backports.list
      awk -v to="$backports" '$1 == "deb" { for (i = 3; i <= NF; ++i) if ($i == "bookworm") { $i = to; print; exit } }' \
        /etc/apt/sources.list > "$entry"
    fi
    if [ ! -s "$entry" ]; then
      rm -f "$entry"
      say "no apt source for Debian 12 itself found, so none for $backports could be derived."
      say "Enable $backports by hand, then run $0 again. Without it there is no software Vulkan device here."
      need_vulkan=0
    fi
  fi
fi

say "apt-get update"
apt_get update
if [ -n "$packages" ]; then
  say "installing $packages"
  # shellcheck disable=SC2086  (a list of package names)
  apt_get install -y --no-install-recommends $packages
fi
if [ $need_vulkan = 1 ]; then
  say "installing libvulkan1 and mesa-vulkan-drivers${backports:+ from $backports}"
  apt_get install -y --no-install-recommends ${backports:+-t "$backports"} libvulkan1 mesa-vulkan-drivers
  have_vulkan || say "Vulkan: still no device new enough (Mesa 24 or later). The wgpu engine will not offer it."
fi
have_opencl || say "OpenCL: still no platform."
say "done"
