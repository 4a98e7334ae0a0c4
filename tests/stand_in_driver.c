// A stand-in for the drivers of NVIDIA and AMD (-DHIP), where there is no GPU: memory is the host's, work is done at once, and a launch
// calls back into Python, which runs the kernel by Triton's interpreter (stand_in_gpu.py). It is strict where drivers are undefined.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifdef HIP
#define NAME(cuda, hip) hip
enum { kThreads = 56, kUnits = 63, kShared = 74, kIntegrated = 16, kMajor = 23, kMinor = 61 };
static void* const kEnd = (void*)3;
#else
#define NAME(cuda, hip) cuda
enum { kThreads = 1, kUnits = 16, kShared = 97, kIntegrated = 18, kMajor = 75, kMinor = 76 };
static void* const kEnd = NULL;
#endif
enum { kInvalid = 1, kOutOfMemory = 2, kNoContext = 201 };

typedef void* P;
typedef struct { P function; unsigned grid[3], block[3], shared; void **params, **extra; P kernel, context; } KernelNode;
typedef struct { KernelNode launch; size_t size; char block[4096]; int edges, early; } Node;
typedef struct { unsigned char from_port, to_port, type, reserved[5]; } EdgeData;
typedef struct { int count; Node* nodes[4096]; } Graph;

// ---- what tests ask for

static int (*run)(int kernel, const unsigned* grid, const void* params);
static size_t allowed = (size_t)2 << 30, used;
static char failing[64];
static int failing_code, failing_after;
static char waiting[1 << 16];  // kernels that wait for those ahead of them
static long launches, graphs_made, graphs_alive, nodes_alive, graph_launches, early_edges, mistakes;

void stand_in_run(int (*callback)(int, const unsigned*, const void*)) { run = callback; }
void stand_in_memory(size_t bytes) { allowed = bytes; }
void stand_in_waits(int kernel) { waiting[kernel] = 1; }
void stand_in_fail(const char* function, int code, int after) {  // the call after so many
  strncpy(failing, function, sizeof failing - 1), failing_code = code, failing_after = after;
}
long stand_in_count(const char* what) {
  if (!strcmp(what, "memory")) return (long)used;
  if (!strcmp(what, "launches")) return launches;
  if (!strcmp(what, "graphs made")) return graphs_made;
  if (!strcmp(what, "graphs alive")) return graphs_alive;
  if (!strcmp(what, "nodes alive")) return nodes_alive;
  if (!strcmp(what, "graph launches")) return graph_launches;
  if (!strcmp(what, "early edges")) return early_edges;
  return mistakes;
}

static int fault(const char* function) {
  if (strcmp(failing, function) || failing_after-- > 0) return 0;
  failing[0] = 0;
  return failing_code;
}
static int mistake(const char* text) {
  fprintf(stderr, "stand-in driver: %s\n", text);
  mistakes++;
  return kInvalid;
}

static __thread P contexts[16];
static __thread int depth;
#define BEGIN do { int code_ = fault(__func__); if (code_) return code_; } while (0)
#define BEGIN_IN_CONTEXT do { if (!depth) return mistake(__func__), kNoContext; BEGIN; } while (0)

// ---- devices and contexts

int NAME(cuInit, hipInit)(unsigned flags) { BEGIN; return 0; }
int NAME(cuDriverGetVersion, hipDriverGetVersion)(int* version) { *version = 13000; return 0; }
int NAME(cuDeviceGetCount, hipGetDeviceCount)(int* count) { BEGIN; *count = 1; return 0; }
int NAME(cuDeviceGet, hipDeviceGet)(int* device, int index) { *device = index; return 0; }
int NAME(cuDeviceGetName, hipDeviceGetName)(char* name, int size, int device) { strncpy(name, "Triton's interpreter", size); return 0; }
int NAME(cuDeviceTotalMem_v2, hipDeviceTotalMem)(size_t* bytes, int device) { *bytes = allowed; return 0; }
int NAME(cuDeviceGetAttribute, hipDeviceGetAttribute)(int* value, int what, int device) {
  *value = what == kThreads ? 1024 : what == kUnits ? 8 : what == kShared ? 232448 : what == kMajor ? 9 : 0;
  return 0;
}
#ifdef HIP
int hipGetDevicePropertiesR0600(char* properties, int device) { strcpy(properties + 1160, "gfx942:sramecc+:xnack-"); return 0; }
#endif
int NAME(cuDevicePrimaryCtxRetain, hipDevicePrimaryCtxRetain)(P* context, int device) { BEGIN; *context = (P)1; return 0; }
int NAME(cuDevicePrimaryCtxRelease_v2, hipDevicePrimaryCtxRelease)(int device) { return 0; }
int NAME(cuCtxGetCurrent, hipCtxGetCurrent)(P* context) { *context = depth ? contexts[depth - 1] : NULL; return 0; }
int NAME(cuCtxPushCurrent_v2, hipCtxPushCurrent)(P context) {
  if (depth == 16) return mistake("contexts pile up");
  contexts[depth++] = context;
  return 0;
}
int NAME(cuCtxPopCurrent_v2, hipCtxPopCurrent)(P* context) {
  if (!depth) return mistake("no context to pop"), kNoContext;
  *context = contexts[--depth];
  return 0;
}

// ---- memory

int NAME(cuMemAlloc_v2, hipMalloc)(uintptr_t* address, size_t size) {
  BEGIN_IN_CONTEXT;
  if (size > allowed || used > allowed - size) return kOutOfMemory;
  char* memory = aligned_alloc(512, (size + 1023) / 512 * 512);
  if (!memory) return kOutOfMemory;
  *(size_t*)memory = size;
  memset(memory + 512, 0x7f, size);  // huge numbers in every dtype: what is read before it is written shows
  used += size;
  *address = (uintptr_t)memory + 512;
  return 0;
}
int NAME(cuMemFree_v2, hipFree)(uintptr_t address) {
  if (!depth) return mistake("free without a context"), kNoContext;
  char* memory = (char*)address - 512;
  used -= *(size_t*)memory;
  memset(memory + 512, 0x7e, *(size_t*)memory);
  free(memory);
  return 0;
}
int NAME(cuMemHostAlloc, hipHostMalloc)(void** data, size_t size, unsigned flags) { BEGIN_IN_CONTEXT; *data = malloc(size); return 0; }
int NAME(cuMemFreeHost, hipHostFree)(void* data) { free(data); return 0; }
int NAME(cuMemcpyHtoDAsync_v2, hipMemcpyHtoDAsync)(uintptr_t to, const void* from, size_t size, P stream) {
  BEGIN_IN_CONTEXT;
  memcpy((void*)to, from, size);
  return 0;
}
int NAME(cuMemcpyDtoHAsync_v2, hipMemcpyDtoHAsync)(void* to, uintptr_t from, size_t size, P stream) {
  BEGIN_IN_CONTEXT;
  memcpy(to, (void*)from, size);
  return 0;
}
int NAME(cuMemcpyDtoDAsync_v2, hipMemcpyDtoDAsync)(uintptr_t to, uintptr_t from, size_t size, P stream) {
  BEGIN_IN_CONTEXT;
  memmove((void*)to, (void*)from, size);
  return 0;
}
int NAME(cuMemsetD8Async, hipMemsetD8Async)(uintptr_t at, unsigned char value, size_t count, P stream) {
  BEGIN_IN_CONTEXT;
  memset((void*)at, value, count);
  return 0;
}

// ---- streams and events

static int make(P* object) { return (*object = calloc(1, 16)) ? 0 : kOutOfMemory; }
int NAME(cuStreamCreate, hipStreamCreateWithFlags)(P* stream, unsigned flags) { BEGIN_IN_CONTEXT; return make(stream); }
int NAME(cuStreamDestroy_v2, hipStreamDestroy)(P stream) { free(stream); return 0; }
int NAME(cuStreamSynchronize, hipStreamSynchronize)(P stream) { BEGIN_IN_CONTEXT; return 0; }
int NAME(cuStreamWaitEvent, hipStreamWaitEvent)(P stream, P event, unsigned flags) { BEGIN_IN_CONTEXT; return 0; }
int NAME(cuEventCreate, hipEventCreateWithFlags)(P* event, unsigned flags) { BEGIN_IN_CONTEXT; return make(event); }
int NAME(cuEventDestroy_v2, hipEventDestroy)(P event) { free(event); return 0; }
int NAME(cuEventRecord, hipEventRecord)(P event, P stream) {
  BEGIN_IN_CONTEXT;
  clock_gettime(CLOCK_MONOTONIC, (struct timespec*)event);
  return 0;
}
int NAME(cuEventQuery, hipEventQuery)(P event) { BEGIN_IN_CONTEXT; return 0; }
int NAME(cuEventSynchronize, hipEventSynchronize)(P event) { BEGIN_IN_CONTEXT; return 0; }
int NAME(cuEventElapsedTime, hipEventElapsedTime)(float* ms, P start, P end) {
  const struct timespec *a = start, *b = end;
  *ms = (float)((b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) * 1e-6) + 1e-4f;
  return 0;
}
int NAME(cuGetErrorName, hipDrvGetErrorName)(int code, const char** text) { *text = "STAND_IN_ERROR"; return 0; }
int NAME(cuGetErrorString, hipDrvGetErrorString)(int code, const char** text) { *text = "as a test asked for"; return 0; }

// ---- kernels: an image is the number that Python knows the kernel by

int NAME(cuModuleLoadData, hipModuleLoadData)(P* module, const void* image) {
  BEGIN_IN_CONTEXT;
  *module = (P)(intptr_t)(atoi(image) + 1);
  return 0;
}
int NAME(cuModuleUnload, hipModuleUnload)(P module) { return 0; }
int NAME(cuModuleGetFunction, hipModuleGetFunction)(P* function, P module, const char* name) { BEGIN_IN_CONTEXT; *function = module; return 0; }
int NAME(cuFuncSetAttribute, hipFuncSetAttribute)(P function, int what, int value) { BEGIN_IN_CONTEXT; return 0; }

static int start(P function, const unsigned* grid, unsigned threads, unsigned shared, const void* params) {
  if (!grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535) return mistake("a grid that no GPU takes");
  if (!threads || threads > 1024 || shared > 232448) return mistake("a workgroup that no GPU takes");
  launches++;
  return run((int)(intptr_t)function - 1, grid, params);
}
static const void* block_of(void** extra, size_t* size) {
  if (extra[0] != (void*)1 || extra[2] != (void*)2 || extra[4] != kEnd) return NULL;
  *size = *(size_t*)extra[3];
  return *size <= 4096 ? extra[1] : NULL;
}
int NAME(cuLaunchKernel, hipModuleLaunchKernel)(P function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned one,
    unsigned one_more, unsigned shared, P stream, void** params, void** extra) {
  BEGIN_IN_CONTEXT;
  size_t size;
  const void* block = block_of(extra, &size);
  if (!block || one != 1 || one_more != 1 || params) return mistake("bad parameters");
  return start(function, (unsigned[]){x, y, z}, threads, shared, block);
}

#ifndef HIP
static int take(Node* node, const KernelNode* launch) {
  const void* block = block_of(launch->extra, &node->size);
  if (!block || launch->block[1] != 1 || launch->block[2] != 1 || launch->context != (P)1 || launch->kernel) return mistake("a bad node");
  if (node->early && !waiting[(int)(intptr_t)launch->function - 1]) return mistake("a kernel starts early and does not wait");
  node->launch = *launch;
  memcpy(node->block, block, node->size);
  return 0;
}
int cuGraphCreate(P* graph, unsigned flags) { BEGIN; *graph = calloc(1, sizeof(Graph)); return 0; }
int cuGraphAddKernelNode_v2(P* added, P graph, const P* after, size_t count, const KernelNode* launch) {
  BEGIN;
  Graph* g = graph;
  if (count && (!g->count || *after != g->nodes[g->count - 1])) return mistake("nodes out of order");
  Node* node = g->nodes[g->count++] = calloc(1, sizeof(Node));
  node->edges = (int)count;
  *added = node;
  return take(node, launch);
}
#ifndef NO_EDGE_DATA
int cuGraphAddDependencies_v2(P graph, const P* from, const P* to, const EdgeData* data, size_t count) {
  BEGIN;
  Graph* g = graph;
  if (count != 1 || g->count < 2 || *from != g->nodes[g->count - 2] || *to != g->nodes[g->count - 1]) return mistake("a bad edge");
  if (memcmp(data, &(EdgeData){1, 0, 1, {0}}, sizeof *data)) return mistake("bad data of an edge");
  Node* node = *to;
  node->edges++, node->early = 1, early_edges++;
  return take(node, &node->launch);
}
#endif
int cuGraphInstantiateWithFlags(P* exec, P graph, unsigned long long flags) {
  BEGIN;
  const Graph* g = graph;
  for (int i = 0; i < g->count; i++) {
    if (g->nodes[i]->edges != (i > 0)) return mistake("launches without order");
  }
  *exec = graph;
  graphs_made++, graphs_alive++, nodes_alive += ((Graph*)graph)->count;
  return 0;
}
int cuGraphExecDestroy(P exec) { graphs_alive--, nodes_alive -= ((Graph*)exec)->count; return 0; }
int cuGraphDestroy(P graph) {
  Graph* g = graph;
  for (int i = 0; i < g->count; i++) free(g->nodes[i]);
  free(g);
  return 0;
}
int cuGraphExecKernelNodeSetParams_v2(P exec, P node, const KernelNode* launch) { BEGIN; return take(node, launch); }
int cuGraphLaunch(P exec, P stream) {
  BEGIN_IN_CONTEXT;
  Graph* g = exec;
  graph_launches++;
  for (int i = 0; i < g->count; i++) {
    const Node* n = g->nodes[i];
    const int code = start(n->launch.function, n->launch.grid, n->launch.block[0], n->launch.shared, n->block);
    if (code) return code;
  }
  return 0;
}
#endif
