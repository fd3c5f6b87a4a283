/* The CUDA runtime of the null GPU: devices, memory, copies, streams, events, stream capture and launches.
 *
 * Memory of the device is memory of the host, so allocations, copies and fills are real. Kernels do nothing. */
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "nullgpu.h"

struct counters null_counters;

/* ---- devices ---- */

static __thread int current_device;

int null_device_count(void) {
    const char *text = getenv("NULL_GPUS");
    int count = text ? atoi(text) : 1;
    return count < MAX_DEVICES ? count : MAX_DEVICES;
}

int null_current_device(void) { return current_device; }

void null_open_context(void) { __atomic_or_fetch(&null_counters.devices_touched, 1ll << current_device, __ATOMIC_RELAXED); }

int null_device_attribute(int attribute) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: return 9;
        case cudaDevAttrComputeCapabilityMinor: return 0;
        case cudaDevAttrMultiProcessorCount: return MULTIPROCESSORS;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxThreadsPerBlock: return 1024;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
        case cudaDevAttrMaxBlockDimX: return 1024;
        case cudaDevAttrMaxBlockDimY: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMaxGridDimX: return MAX_GRID_X;
        case cudaDevAttrMaxGridDimY: return MAX_GRID_YZ;
        case cudaDevAttrMaxGridDimZ: return MAX_GRID_YZ;
        case cudaDevAttrMaxRegistersPerBlock: return 65536;
        case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return SHARED_BYTES_OF_BLOCK;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
        case cudaDevAttrL2CacheSize: return 50 << 20;
        case cudaDevAttrClockRate: return 1980000;
        case cudaDevAttrMemoryClockRate: return 2619000;
        case cudaDevAttrGlobalMemoryBusWidth: return 5120;
        default: return 1; /* most of the others ask whether the device can do something */
    }
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    *value = null_device_attribute(attribute);
    return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    *properties = (struct cudaDeviceProp){
        .name = DEVICE_NAME,
        .major = 9,
        .totalGlobalMem = TOTAL_BYTES,
        .multiProcessorCount = MULTIPROCESSORS,
        .warpSize = 32,
        .maxThreadsPerBlock = 1024,
        .maxThreadsPerMultiProcessor = 2048,
        .maxBlocksPerMultiProcessor = 32,
        .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {MAX_GRID_X, MAX_GRID_YZ, MAX_GRID_YZ},
        .regsPerBlock = 65536,
        .regsPerMultiprocessor = 65536,
        .sharedMemPerBlock = 49152,
        .sharedMemPerBlockOptin = SHARED_BYTES_OF_BLOCK,
        .sharedMemPerMultiprocessor = 233472,
        .l2CacheSize = 50 << 20,
        .memoryBusWidth = 5120,
        .unifiedAddressing = 1,
        .cooperativeLaunch = 1,
        .concurrentKernels = 1,
        .asyncEngineCount = 3,
        .pciBusID = device + 1,
    };
    return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int *count) {
    *count = null_device_count();
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= null_device_count()) return cudaErrorInvalidDevice;
    current_device = device;
    null_open_context(); /* since CUDA 12, selecting a device opens its context */
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDA_VERSION_SHOWN;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDA_VERSION_SHOWN;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int device) {
    snprintf(text, length, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0;
    return cudaSuccess;
}

/* ---- memory ---- */

#define MAX_BLOCKS (1 << 16)
#define COPIED_WITHIN_DEVICE ((size_t)1 << 20) /* larger copies within a device are left out */

struct block {
    char *start;
    size_t bytes;
    int device; /* -1: pinned host memory */
};
static struct block blocks[MAX_BLOCKS];
static int n_blocks;
static size_t used_bytes[MAX_DEVICES];
static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;

/* Address space without memory behind it: pages exist once they are written, so that 80 GB fit any machine. */
static void *map(size_t bytes) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *address = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE, flags, -1, 0);
    return address == MAP_FAILED ? NULL : address;
}

static struct block *find_block(const void *address) {
    for (int i = 0; i < n_blocks; i++) {
        const char *start = blocks[i].start;
        if ((const char *)address >= start && (const char *)address < start + blocks[i].bytes) return &blocks[i];
    }
    return NULL;
}

static void *new_block(void *start, size_t bytes, int device) {
    pthread_mutex_lock(&memory_lock);
    bool fits = device < 0 || used_bytes[device] + bytes + CONTEXT_BYTES <= TOTAL_BYTES;
    if (fits && start == NULL) start = map(bytes);
    if (!fits || start == NULL || n_blocks == MAX_BLOCKS) {
        start = NULL;
    } else {
        blocks[n_blocks++] = (struct block){start, bytes, device};
        if (device >= 0) used_bytes[device] += bytes;
    }
    pthread_mutex_unlock(&memory_lock);
    return start;
}

static void remove_block(void *address, bool unmap) {
    pthread_mutex_lock(&memory_lock);
    struct block *block = find_block(address);
    if (block != NULL) {
        if (block->device >= 0) used_bytes[block->device] -= block->bytes;
        if (unmap) munmap(block->start, block->bytes);
        *block = blocks[--n_blocks];
    }
    pthread_mutex_unlock(&memory_lock);
}

void *null_allocate(size_t bytes) {
    null_open_context();
    return new_block(NULL, bytes, current_device);
}

void null_free(void *address) { remove_block(address, true); }

static bool is_known(const void *address, int *device) {
    pthread_mutex_lock(&memory_lock);
    struct block *block = find_block(address);
    if (block != NULL) *device = block->device;
    pthread_mutex_unlock(&memory_lock);
    return block != NULL;
}

int null_device_of(const void *address) {
    int device = -1;
    is_known(address, &device);
    return device;
}

void null_copy(void *to, const void *from, size_t n) {
    bool within_device = null_device_of(to) >= 0 && null_device_of(from) >= 0;
    if (!within_device || n <= COPIED_WITHIN_DEVICE) memmove(to, from, n);
}

/* Whole pages of zeros are given back to the system, which is faster than to write them and takes no memory. */
void null_fill(void *to, int byte, size_t n) {
    size_t page = sysconf(_SC_PAGESIZE);
    char *first = (char *)(((uintptr_t)to + page - 1) / page * page);
    char *last = (char *)(((uintptr_t)to + n) / page * page);
    if (byte != 0 || first >= last || null_device_of(to) < 0) {
        if (n <= COPIED_WITHIN_DEVICE) memset(to, byte, n);
        return;
    }
    memset(to, 0, first - (char *)to);
    madvise(first, last - first, MADV_DONTNEED);
    memset(last, 0, (char *)to + n - last);
}

cudaError_t cudaMalloc(void **address, size_t bytes) {
    *address = null_allocate(bytes);
    return *address == NULL ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFree(void *address) {
    null_free(address);
    return cudaSuccess;
}

cudaError_t cudaMallocAsync(void **address, size_t bytes, cudaStream_t stream) { return cudaMalloc(address, bytes); }

cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) { return cudaFree(address); }

cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
    null_open_context();
    *address = new_block(NULL, bytes ? bytes : 1, -1);
    return *address == NULL ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaMallocHost(void **address, size_t bytes) { return cudaHostAlloc(address, bytes, 0); }

cudaError_t cudaFreeHost(void *address) { return cudaFree(address); }

cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags) {
    new_block(address, bytes, -1);
    return cudaSuccess;
}

cudaError_t cudaHostUnregister(void *address) {
    remove_block(address, false);
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    null_open_context();
    *total = TOTAL_BYTES;
    *free = TOTAL_BYTES - CONTEXT_BYTES - used_bytes[current_device];
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
    int device = -1;
    bool known = is_known(address, &device);
    *attributes = (struct cudaPointerAttributes){
        .type = !known ? cudaMemoryTypeUnregistered : device < 0 ? cudaMemoryTypeHost : cudaMemoryTypeDevice,
        .device = device < 0 ? current_device : device,
        .devicePointer = known ? (void *)address : NULL,
        .hostPointer = device < 0 ? (void *)address : NULL,
    };
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) { return cudaMalloc(address, 1 << 20); }

/* ---- copies ---- */

static void copy(void *to, const void *from, size_t n) {
    int ignored;
    null_open_context();
    bool to_device = null_device_of(to) >= 0, from_device = null_device_of(from) >= 0;
    if (to_device && !from_device) {
        __atomic_add_fetch(&null_counters.to_device, 1, __ATOMIC_RELAXED);
        if (!is_known(from, &ignored)) __atomic_add_fetch(&null_counters.pageable, 1, __ATOMIC_RELAXED);
    }
    if (from_device && !to_device) __atomic_add_fetch(&null_counters.to_host, 1, __ATOMIC_RELAXED);
    null_copy(to, from, n);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t stream) {
    if (n) copy(to, from, n);
    return cudaSuccess;
}

cudaError_t cudaMemcpyPeerAsync(void *to, int target, const void *from, int source, size_t n, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, n, cudaMemcpyDeviceToDevice, stream);
}

cudaError_t cudaMemsetAsync(void *to, int byte, size_t n, cudaStream_t stream) {
    null_fill(to, byte, n);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *to, int byte, size_t n) { return cudaMemsetAsync(to, byte, n, NULL); }

/* ---- waits ---- */

static __thread bool capturing;
static __thread cudaStream_t captured;   /* the stream of the capture */
static __thread size_t captured_kernels; /* of the capture, or the one before */
static __thread enum cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

bool null_is_capturing(void) { return capturing; }

/* Within a capture the host may wait for another stream, if it has relaxed its mode. torch does so for random numbers. */
static bool may_wait(bool for_all, cudaStream_t stream) {
    if (!capturing) return true;
    return !for_all && stream != captured && capture_mode == cudaStreamCaptureModeRelaxed;
}

static cudaError_t wait(bool for_all, cudaStream_t stream) {
    bool allowed = may_wait(for_all, stream);
    __atomic_add_fetch(&null_counters.host_waits, 1, __ATOMIC_RELAXED);
    if (!allowed) __atomic_add_fetch(&null_counters.capture_waits, 1, __ATOMIC_RELAXED);
    if (getenv("NULL_TRACE")) raise(SIGUSR2);
    return allowed ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait(false, stream); }

cudaError_t cudaDeviceSynchronize(void) { return wait(true, NULL); }

cudaError_t cudaEventSynchronize(cudaEvent_t event) { return wait(true, NULL); }

cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
    cudaError_t error = wait(true, NULL);
    return error == cudaSuccess ? cudaMemcpyAsync(to, from, n, kind, NULL) : error;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

/* ---- streams, events, capture ---- */

void *null_new_handle(void) {
    static uintptr_t last = 0x1000;
    return (void *)__atomic_add_fetch(&last, 16, __ATOMIC_RELAXED);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0, *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    null_open_context();
    *stream = null_new_handle();
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = 0;
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    null_open_context();
    *event = null_new_handle();
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = 1;
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    capturing = true;
    captured = stream;
    captured_kernels = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    capturing = false;
    *graph = null_new_handle();
    return cudaSuccess;
}

static enum cudaStreamCaptureStatus capture_status(void) {
    return capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = capture_status();
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *n_dependencies) {
    *status = capture_status();
    if (id) *id = 1;
    if (graph) *graph = NULL;
    if (dependencies) *dependencies = NULL;
    if (edges) *edges = NULL;
    if (n_dependencies) *n_dependencies = 0;
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *n) {
    if (nodes == NULL) *n = captured_kernels;
    return cudaSuccess;
}

static cudaError_t instantiate(cudaGraphExec_t *executable) {
    *executable = null_new_handle();
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    return instantiate(executable);
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    return instantiate(executable);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    __atomic_add_fetch(&null_counters.graph_launches, 1, __ATOMIC_RELAXED);
    return cudaSuccess;
}

/* ---- launches ---- */

bool null_launch(unsigned x, unsigned y, unsigned z, size_t shared_bytes) {
    null_open_context();
    __atomic_add_fetch(&null_counters.launches, 1, __ATOMIC_RELAXED);
    if (capturing) {
        captured_kernels++;
        __atomic_add_fetch(&null_counters.graph_kernels, 1, __ATOMIC_RELAXED);
    }
    bool nonempty = x > 0 && y > 0 && z > 0;
    bool fits = x <= MAX_GRID_X && y <= MAX_GRID_YZ && z <= MAX_GRID_YZ && shared_bytes <= SHARED_BYTES_OF_BLOCK;
    if (nonempty && fits) return true;
    __atomic_add_fetch(&null_counters.bad_launches, 1, __ATOMIC_RELAXED);
    fprintf(stderr, "null GPU: refused a launch: grid (%u, %u, %u), %zu bytes of shared memory\n", x, y, z, shared_bytes);
    return false;
}

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared_bytes,
                             cudaStream_t stream) {
    return null_launch(grid.x, grid.y, grid.z, shared_bytes) ? cudaSuccess : cudaErrorInvalidConfiguration;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared_bytes,
                               cudaStream_t stream) {
    return cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
    return cudaLaunchKernel(kernel, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
    *attributes = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024, .numRegs = 64, .binaryVersion = 90, .ptxVersion = 90};
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *kernel, int block_size,
                                                                   size_t shared_bytes, unsigned flags) {
    *n = 2;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *kernel, int block_size,
                                                          size_t shared_bytes) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, kernel, block_size, shared_bytes, 0);
}

/* Functions that nvcc's code calls: kernel<<<grid, block>>>() pushes its configuration, and the kernel's stub pops it. */

static __thread struct cudaLaunchConfig_st pushed;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, struct CUstream_st *stream) {
    pushed = (struct cudaLaunchConfig_st){grid, block, shared_bytes, stream};
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes, void *stream) {
    *grid = pushed.gridDim, *block = pushed.blockDim, *shared_bytes = pushed.dynamicSmemBytes;
    *(cudaStream_t *)stream = pushed.stream;
    return cudaSuccess;
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *modules[4];
    return modules;
}

char __cudaInitModule(void **module) { return 1; }

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

cudaError_t cudaGetFuncBySymbol(cudaFunction_t *function, const void *symbol) {
    *function = (cudaFunction_t)symbol;
    return cudaSuccess;
}

static cudaError_t driver_function(const char *name, void **function, enum cudaDriverEntryPointQueryResult *result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                    enum cudaDriverEntryPointQueryResult *result) {
    return driver_function(name, function, result);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
    return driver_function(name, function, result);
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        default: return "an error of the null GPU";
    }
}

const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
