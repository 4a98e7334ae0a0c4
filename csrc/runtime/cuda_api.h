// The part of CUDA's driver API and of HIP's that cuda.cpp uses, so that building needs no SDK. HIP mirrors the driver API:
// one table holds the functions of either, and `Dialect` what differs. Names and values are NVIDIA's and AMD's.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#define SPIRAL_CUDA_CALL __stdcall
#else
#define SPIRAL_CUDA_CALL
#endif

namespace spiral::cuda {

using Result = int;
using DeviceHandle = int;
using Address = uintptr_t;  // CUdeviceptr, hipDeviceptr_t
using Context = struct OpaqueContext*;
using Stream = struct OpaqueStream*;
using Event = struct OpaqueEvent*;
using Module = struct OpaqueModule*;
using Function = struct OpaqueFunction*;
using Graph = struct OpaqueGraph*;
using GraphNode = struct OpaqueGraphNode*;
using GraphExec = struct OpaqueGraphExec*;

// CUDA_KERNEL_NODE_PARAMS_v2
struct KernelNode {
  Function function;
  unsigned grid[3], block[3], shared;
  void** params;
  void** extra;
  void* kernel;
  Context context;
};

// CUgraphEdgeData
struct GraphEdge {
  unsigned char from_port, to_port, type, reserved[5];
};
// The kernel behind the edge starts when every workgroup of the one before has allowed it (griddepcontrol.launch_dependents) or ended.
constexpr GraphEdge kProgrammaticEdge = {1, 0, 1, {}};

constexpr Result kSuccess = 0, kOutOfMemory = 2, kNoDevice = 100, kNotReady = 600;  // the same in both
constexpr unsigned kStreamNonBlocking = 1, kEventDefault = 0, kEventDisableTiming = 2;
constexpr int kFunctionMaxDynamicSharedMemory = 8;
inline void* const kParamBufferPointer = reinterpret_cast<void*>(1);
inline void* const kParamBufferSize = reinterpret_cast<void*>(2);

// X(member, parameters, name in CUDA, name in HIP)
#define SPIRAL_CUDA_FUNCTIONS(X)                                                                                              \
  X(init, (unsigned flags), "cuInit", "hipInit")                                                                              \
  X(driver_version, (int* version), "cuDriverGetVersion", "hipDriverGetVersion")                                              \
  X(device_count, (int* count), "cuDeviceGetCount", "hipGetDeviceCount")                                                      \
  X(device_get, (DeviceHandle * device, int index), "cuDeviceGet", "hipDeviceGet")                                            \
  X(device_name, (char* name, int size, DeviceHandle device), "cuDeviceGetName", "hipDeviceGetName")                          \
  X(device_memory, (size_t* bytes, DeviceHandle device), "cuDeviceTotalMem_v2", "hipDeviceTotalMem")                          \
  X(device_attribute, (int* value, int attribute, DeviceHandle device), "cuDeviceGetAttribute", "hipDeviceGetAttribute")      \
  X(context_retain, (Context * context, DeviceHandle device), "cuDevicePrimaryCtxRetain", "hipDevicePrimaryCtxRetain")        \
  X(context_release, (DeviceHandle device), "cuDevicePrimaryCtxRelease_v2", "hipDevicePrimaryCtxRelease")                     \
  X(context_current, (Context * context), "cuCtxGetCurrent", "hipCtxGetCurrent")                                              \
  X(context_push, (Context context), "cuCtxPushCurrent_v2", "hipCtxPushCurrent")                                              \
  X(context_pop, (Context * context), "cuCtxPopCurrent_v2", "hipCtxPopCurrent")                                               \
  X(stream_create, (Stream * stream, unsigned flags), "cuStreamCreate", "hipStreamCreateWithFlags")                           \
  X(stream_destroy, (Stream stream), "cuStreamDestroy_v2", "hipStreamDestroy")                                                \
  X(stream_synchronize, (Stream stream), "cuStreamSynchronize", "hipStreamSynchronize")                                       \
  X(stream_wait_event, (Stream stream, Event event, unsigned flags), "cuStreamWaitEvent", "hipStreamWaitEvent")               \
  X(allocate, (Address * address, size_t size), "cuMemAlloc_v2", "hipMalloc")                                                 \
  X(free, (Address address), "cuMemFree_v2", "hipFree")                                                                       \
  X(host_allocate, (void** data, size_t size, unsigned flags), "cuMemHostAlloc", "hipHostMalloc")                             \
  X(host_free, (void* data), "cuMemFreeHost", "hipHostFree")                                                                  \
  X(copy_to_device, (Address to, const void* from, size_t size, Stream), "cuMemcpyHtoDAsync_v2", "hipMemcpyHtoDAsync")        \
  X(copy_to_host, (void* to, Address from, size_t size, Stream), "cuMemcpyDtoHAsync_v2", "hipMemcpyDtoHAsync")                \
  X(copy, (Address to, Address from, size_t size, Stream), "cuMemcpyDtoDAsync_v2", "hipMemcpyDtoDAsync")                      \
  X(fill_bytes, (Address at, unsigned char value, size_t count, Stream), "cuMemsetD8Async", "hipMemsetD8Async")               \
  X(module_load, (Module * module, const void* image), "cuModuleLoadData", "hipModuleLoadData")                               \
  X(module_unload, (Module module), "cuModuleUnload", "hipModuleUnload")                                                      \
  X(module_function, (Function * function, Module module, const char* name), "cuModuleGetFunction", "hipModuleGetFunction")   \
  X(function_set, (Function function, int attribute, int value), "cuFuncSetAttribute", "hipFuncSetAttribute")                 \
  X(launch, (Function function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,        \
             unsigned block_z, unsigned shared, Stream stream, void** params, void** extra),                                  \
    "cuLaunchKernel", "hipModuleLaunchKernel")                                                                                \
  X(event_create, (Event * event, unsigned flags), "cuEventCreate", "hipEventCreateWithFlags")                                \
  X(event_destroy, (Event event), "cuEventDestroy_v2", "hipEventDestroy")                                                     \
  X(event_record, (Event event, Stream stream), "cuEventRecord", "hipEventRecord")                                            \
  X(event_query, (Event event), "cuEventQuery", "hipEventQuery")                                                              \
  X(event_synchronize, (Event event), "cuEventSynchronize", "hipEventSynchronize")                                            \
  X(event_elapsed, (float* milliseconds, Event start, Event end), "cuEventElapsedTime", "hipEventElapsedTime")                \
  X(error_name, (Result code, const char** text), "cuGetErrorName", "hipDrvGetErrorName")                                     \
  X(error_text, (Result code, const char** text), "cuGetErrorString", "hipDrvGetErrorString")

// X(member, parameters, name in CUDA)
#define SPIRAL_CUDA_OPTIONAL_FUNCTIONS(X)                                                                                     \
  X(function_param, (Function function, size_t index, size_t* offset, size_t* size), "cuFuncGetParamInfo")                   \
  X(graph_create, (Graph * graph, unsigned flags), "cuGraphCreate")                                                           \
  X(graph_destroy, (Graph graph), "cuGraphDestroy")                                                                           \
  X(graph_add_kernel, (GraphNode * node, Graph graph, const GraphNode* after, size_t count, const KernelNode* launch),        \
    "cuGraphAddKernelNode_v2")                                                                                                \
  X(graph_add_edges, (Graph graph, const GraphNode* from, const GraphNode* to, const GraphEdge* edges, size_t count),         \
    "cuGraphAddDependencies_v2")                                                                                              \
  X(graph_instantiate, (GraphExec * exec, Graph graph, unsigned long long flags), "cuGraphInstantiateWithFlags")              \
  X(graph_exec_destroy, (GraphExec exec), "cuGraphExecDestroy")                                                               \
  X(graph_exec_set_kernel, (GraphExec exec, GraphNode node, const KernelNode* launch), "cuGraphExecKernelNodeSetParams_v2")   \
  X(graph_launch, (GraphExec exec, Stream stream), "cuGraphLaunch")

// hipDeviceProp_tR0600: its size, and where gcnArchName is.
constexpr size_t kHipPropertiesSize = 1472, kHipArchitecture = 1160;

// What the two APIs number or call differently.
struct Dialect {
  const char* engine;   // as in DeviceProperties::engine
  const char* label;    // in messages
  const char* vendor;
  const char* libraries[3];
  bool hip;
  int max_threads, multiprocessors, shared_memory, integrated, capability_major, capability_minor;  // device attributes
  void* param_end;
};

inline const Dialect kCuda = {
    "cuda", "CUDA", "NVIDIA",
#ifdef _WIN32
    {"nvcuda.dll", nullptr, nullptr},
#else
    {"libcuda.so.1", "libcuda.so", nullptr},
#endif
    false, 1, 16, 97, 18, 75, 76, nullptr};

inline const Dialect kHip = {
    "hip", "HIP", "AMD",
#ifdef _WIN32
    {"amdhip64_7.dll", "amdhip64_6.dll", "amdhip64.dll"},
#else
    {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"},
#endif
    true, 56, 63, 74, 16, 23, 61, reinterpret_cast<void*>(3)};

struct Api {
#define SPIRAL_CUDA_MEMBER(member, parameters, cuda_name, hip_name) Result(SPIRAL_CUDA_CALL* member) parameters = nullptr;
  SPIRAL_CUDA_FUNCTIONS(SPIRAL_CUDA_MEMBER)
#undef SPIRAL_CUDA_MEMBER
  // CUDA's alone. Null where the driver is older than the function: 12.4, and 12.0 for graphs.
#define SPIRAL_CUDA_MEMBER(member, parameters, name) Result(SPIRAL_CUDA_CALL* member) parameters = nullptr;
  SPIRAL_CUDA_OPTIONAL_FUNCTIONS(SPIRAL_CUDA_MEMBER)
#undef SPIRAL_CUDA_MEMBER
  Result(SPIRAL_CUDA_CALL* properties)(void* properties, int device) = nullptr;  // HIP's alone
  const Dialect* dialect = nullptr;
};

}  // namespace spiral::cuda
