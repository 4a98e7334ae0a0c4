// The part of OpenCL 1.2 that opencl.cpp uses, so that building needs no SDK. Names and values are Khronos'.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef _WIN32
#define SPIRAL_CL_CALL __stdcall
#else
#define SPIRAL_CL_CALL
#endif

namespace spiral::cl {

using cl_int = int32_t;
using cl_uint = uint32_t;
using cl_ulong = uint64_t;
using cl_bool = cl_uint;
using cl_bitfield = cl_ulong;

using cl_platform_id = struct _cl_platform_id*;
using cl_device_id = struct _cl_device_id*;
using cl_context = struct _cl_context*;
using cl_command_queue = struct _cl_command_queue*;
using cl_mem = struct _cl_mem*;
using cl_program = struct _cl_program*;
using cl_kernel = struct _cl_kernel*;
using cl_event = struct _cl_event*;

enum : cl_int {
  CL_SUCCESS = 0,
  CL_DEVICE_NOT_FOUND = -1,
  CL_MEM_OBJECT_ALLOCATION_FAILURE = -4,
  CL_OUT_OF_RESOURCES = -5,
  CL_OUT_OF_HOST_MEMORY = -6,
  CL_INVALID_BUFFER_SIZE = -61,
  CL_PLATFORM_NOT_FOUND_KHR = -1001,
};

enum : cl_uint {
  CL_PLATFORM_VERSION = 0x0901,
  CL_PLATFORM_NAME = 0x0902,

  CL_DEVICE_TYPE = 0x1000,
  CL_DEVICE_MAX_COMPUTE_UNITS = 0x1002,
  CL_DEVICE_MAX_WORK_GROUP_SIZE = 0x1004,
  CL_DEVICE_MAX_MEM_ALLOC_SIZE = 0x1010,
  CL_DEVICE_MAX_PARAMETER_SIZE = 0x1017,
  CL_DEVICE_SINGLE_FP_CONFIG = 0x101B,
  CL_DEVICE_GLOBAL_MEM_SIZE = 0x101F,
  CL_DEVICE_LOCAL_MEM_SIZE = 0x1023,
  CL_DEVICE_ENDIAN_LITTLE = 0x1026,
  CL_DEVICE_AVAILABLE = 0x1027,
  CL_DEVICE_COMPILER_AVAILABLE = 0x1028,
  CL_DEVICE_QUEUE_PROPERTIES = 0x102A,
  CL_DEVICE_NAME = 0x102B,
  CL_DEVICE_VENDOR = 0x102C,
  CL_DRIVER_VERSION = 0x102D,
  CL_DEVICE_PROFILE = 0x102E,
  CL_DEVICE_VERSION = 0x102F,
  CL_DEVICE_EXTENSIONS = 0x1030,
  CL_DEVICE_DOUBLE_FP_CONFIG = 0x1032,
  CL_DEVICE_HOST_UNIFIED_MEMORY = 0x1035,
  CL_DEVICE_SUB_GROUP_SIZES_INTEL = 0x4108,

  CL_PROGRAM_BINARY_SIZES = 0x1165,
  CL_PROGRAM_BINARIES = 0x1166,
  CL_PROGRAM_BUILD_LOG = 0x1183,
  CL_KERNEL_NUM_ARGS = 0x1191,
  CL_KERNEL_PROGRAM = 0x1194,
  CL_KERNEL_WORK_GROUP_SIZE = 0x11B0,

  CL_EVENT_COMMAND_EXECUTION_STATUS = 0x11D3,
  CL_PROFILING_COMMAND_END = 0x1283,
};

constexpr cl_int CL_COMPLETE = 0;
constexpr intptr_t CL_CONTEXT_PLATFORM = 0x1084;

constexpr cl_bitfield CL_DEVICE_TYPE_CPU = 1 << 1;
constexpr cl_bitfield CL_DEVICE_TYPE_GPU = 1 << 2;
constexpr cl_bitfield CL_DEVICE_TYPE_ALL = 0xFFFFFFFF;
constexpr cl_bitfield CL_FP_CORRECTLY_ROUNDED_DIVIDE_SQRT = 1 << 7;
constexpr cl_bitfield CL_QUEUE_PROFILING_ENABLE = 1 << 1;
constexpr cl_bitfield CL_MEM_READ_WRITE = 1 << 0;
constexpr cl_bitfield CL_MEM_ALLOC_HOST_PTR = 1 << 4;
constexpr cl_bitfield CL_MAP_WRITE = 1 << 1;
constexpr cl_bitfield CL_MIGRATE_MEM_OBJECT_CONTENT_UNDEFINED = 1 << 1;

// X(result, name, parameters)
#define SPIRAL_CL_FUNCTIONS(X)                                                                                         \
  X(cl_int, clGetPlatformIDs, (cl_uint, cl_platform_id*, cl_uint*))                                                    \
  X(cl_int, clGetPlatformInfo, (cl_platform_id, cl_uint, size_t, void*, size_t*))                                      \
  X(cl_int, clGetDeviceIDs, (cl_platform_id, cl_bitfield, cl_uint, cl_device_id*, cl_uint*))                           \
  X(cl_int, clGetDeviceInfo, (cl_device_id, cl_uint, size_t, void*, size_t*))                                          \
  X(cl_context, clCreateContext,                                                                                       \
    (const intptr_t*, cl_uint, const cl_device_id*, void(SPIRAL_CL_CALL*)(const char*, const void*, size_t, void*),    \
     void*, cl_int*))                                                                                                  \
  X(cl_int, clReleaseContext, (cl_context))                                                                            \
  X(cl_command_queue, clCreateCommandQueue, (cl_context, cl_device_id, cl_bitfield, cl_int*))                          \
  X(cl_int, clReleaseCommandQueue, (cl_command_queue))                                                                 \
  X(cl_mem, clCreateBuffer, (cl_context, cl_bitfield, size_t, void*, cl_int*))                                         \
  X(cl_int, clReleaseMemObject, (cl_mem))                                                                              \
  X(cl_program, clCreateProgramWithSource, (cl_context, cl_uint, const char**, const size_t*, cl_int*))                \
  X(cl_program, clCreateProgramWithBinary,                                                                             \
    (cl_context, cl_uint, const cl_device_id*, const size_t*, const unsigned char**, cl_int*, cl_int*))                \
  X(cl_int, clBuildProgram,                                                                                            \
    (cl_program, cl_uint, const cl_device_id*, const char*, void(SPIRAL_CL_CALL*)(cl_program, void*), void*))          \
  X(cl_int, clGetProgramInfo, (cl_program, cl_uint, size_t, void*, size_t*))                                           \
  X(cl_int, clGetProgramBuildInfo, (cl_program, cl_device_id, cl_uint, size_t, void*, size_t*))                        \
  X(cl_int, clReleaseProgram, (cl_program))                                                                            \
  X(cl_kernel, clCreateKernel, (cl_program, const char*, cl_int*))                                                     \
  X(cl_int, clReleaseKernel, (cl_kernel))                                                                              \
  X(cl_int, clSetKernelArg, (cl_kernel, cl_uint, size_t, const void*))                                                 \
  X(cl_int, clGetKernelInfo, (cl_kernel, cl_uint, size_t, void*, size_t*))                                             \
  X(cl_int, clGetKernelWorkGroupInfo, (cl_kernel, cl_device_id, cl_uint, size_t, void*, size_t*))                      \
  X(cl_int, clEnqueueNDRangeKernel,                                                                                    \
    (cl_command_queue, cl_kernel, cl_uint, const size_t*, const size_t*, const size_t*, cl_uint, const cl_event*,      \
     cl_event*))                                                                                                       \
  X(cl_int, clEnqueueReadBuffer,                                                                                       \
    (cl_command_queue, cl_mem, cl_bool, size_t, size_t, void*, cl_uint, const cl_event*, cl_event*))                   \
  X(cl_int, clEnqueueWriteBuffer,                                                                                      \
    (cl_command_queue, cl_mem, cl_bool, size_t, size_t, const void*, cl_uint, const cl_event*, cl_event*))             \
  X(cl_int, clEnqueueCopyBuffer,                                                                                       \
    (cl_command_queue, cl_mem, cl_mem, size_t, size_t, size_t, cl_uint, const cl_event*, cl_event*))                   \
  X(cl_int, clEnqueueFillBuffer,                                                                                       \
    (cl_command_queue, cl_mem, const void*, size_t, size_t, size_t, cl_uint, const cl_event*, cl_event*))              \
  X(cl_int, clEnqueueMigrateMemObjects,                                                                                \
    (cl_command_queue, cl_uint, const cl_mem*, cl_bitfield, cl_uint, const cl_event*, cl_event*))                      \
  X(void*, clEnqueueMapBuffer,                                                                                         \
    (cl_command_queue, cl_mem, cl_bool, cl_bitfield, size_t, size_t, cl_uint, const cl_event*, cl_event*, cl_int*))    \
  X(cl_int, clEnqueueUnmapMemObject, (cl_command_queue, cl_mem, void*, cl_uint, const cl_event*, cl_event*))           \
  X(cl_int, clEnqueueMarkerWithWaitList, (cl_command_queue, cl_uint, const cl_event*, cl_event*))                      \
  X(cl_int, clGetEventInfo, (cl_event, cl_uint, size_t, void*, size_t*))                                               \
  X(cl_int, clGetEventProfilingInfo, (cl_event, cl_uint, size_t, void*, size_t*))                                      \
  X(cl_int, clWaitForEvents, (cl_uint, const cl_event*))                                                               \
  X(cl_int, clReleaseEvent, (cl_event))                                                                                \
  X(cl_int, clFlush, (cl_command_queue))                                                                               \
  X(cl_int, clFinish, (cl_command_queue))

// The functions of one OpenCL library.
struct Api {
#define SPIRAL_CL_DECLARE(result, name, parameters) result(SPIRAL_CL_CALL* name) parameters = nullptr;
  SPIRAL_CL_FUNCTIONS(SPIRAL_CL_DECLARE)
#undef SPIRAL_CL_DECLARE
};

}  // namespace spiral::cl
