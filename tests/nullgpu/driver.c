/* The CUDA driver of the null GPU, which Triton and torch's lazily loaded parts call. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "nullgpu.h"

static CUcontext context(void) { return (CUcontext)(uintptr_t)(0x100 + null_current_device()); }

CUresult cuDriverGetVersion(int *version) {
    *version = CUDA_VERSION_SHOWN;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
    *count = null_device_count();
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    snprintf(name, length, "%s", DEVICE_NAME);
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) {
    *bytes = TOTAL_BYTES;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = null_device_attribute(attribute);
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *current) {
    *current = context();
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
    *device = null_current_device();
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *retained, CUdevice device) {
    *retained = (CUcontext)(uintptr_t)(0x100 + device);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = null_counters.devices_touched >> device & 1;
    return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream stream, CUcontext *of_stream) {
    *of_stream = context();
    return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    *status = null_is_capturing() ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

/* ---- memory ---- */

CUresult cuMemAlloc(CUdeviceptr *address, size_t bytes) {
    *address = (CUdeviceptr)null_allocate(bytes);
    return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

CUresult cuMemFree(CUdeviceptr address) {
    null_free((void *)address);
    return CUDA_SUCCESS;
}

static void answer_about(const void *address, CUpointer_attribute attribute, void *answer) {
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)answer = (CUdeviceptr)address; return;
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            *(unsigned *)answer = null_device_of(address) < 0 ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
            return;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)answer = null_device_of(address); return;
        default: *(int *)answer = 0;
    }
}

CUresult cuPointerGetAttribute(void *answer, CUpointer_attribute attribute, CUdeviceptr address) {
    answer_about((void *)address, attribute, answer);
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute *attributes, void **answers, CUdeviceptr address) {
    for (unsigned i = 0; i < n; i++) answer_about((void *)address, attributes[i], answers[i]);
    return CUDA_SUCCESS;
}

/* ---- kernels ---- */

static CUresult new_handle(void *handle) {
    *(void **)handle = null_new_handle();
    return CUDA_SUCCESS;
}

CUresult cuModuleLoad(CUmodule *module, const char *path) { return new_handle(module); }

CUresult cuModuleLoadData(CUmodule *module, const void *image) { return new_handle(module); }

CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned n, CUjit_option *options, void **values) {
    return new_handle(module);
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) { return new_handle(function); }

CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *jit_options, void **jit_values,
                           unsigned n_jit, CUlibraryOption *options, void **values, unsigned n) {
    return new_handle(library);
}

CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) { return new_handle(kernel); }

CUresult cuLibraryGetModule(CUmodule *module, CUlibrary library) {
    *module = (CUmodule)library;
    return CUDA_SUCCESS;
}

CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel) {
    *function = (CUfunction)kernel;
    return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    switch (attribute) {
        case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
        case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = 100; break;
        default: *value = 0;
    }
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared_bytes, CUstream stream, void **arguments, void **extra) {
    return null_launch(x, y, z, shared_bytes) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
    bool valid = null_launch(config->gridDimX, config->gridDimY, config->gridDimZ, config->sharedMemBytes);
    return valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction function, int block_size, size_t bytes) {
    *n = 1;
    return CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *n, CUfunction function, const CUlaunchConfig *config) {
    *n = 64;
    return CUDA_SUCCESS;
}

/* ---- errors, and functions by name ---- */

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "an error of the null GPU";
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **name) { return cuGetErrorString(error, name); }

CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *result) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (result) *result = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

#undef cuGetProcAddress /* the header renames it to cuGetProcAddress_v2; the first version exists beside it */
CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
