/* What the parts of the null GPU share: the device that is shown, its memory, and the counters. README.md has the whole. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MAX_DEVICES 16
#define DEVICE_NAME "NVIDIA H100 80GB HBM3"
#define TOTAL_BYTES ((size_t)81559 << 20)
#define CONTEXT_BYTES ((size_t)600 << 20) /* what a CUDA context takes of a device, by estimate */
#define CUDA_VERSION_SHOWN 13000
#define MULTIPROCESSORS 132
#define SHARED_BYTES_OF_BLOCK 232448 /* with the opt-in for more than 48 KiB */
#define MAX_GRID_X 2147483647u
#define MAX_GRID_YZ 65535u

/* Counted since the process began. counters.py reads this struct, so keep the two alike. */
struct counters {
    int64_t host_waits;      /* the host waited for the device: synchronize of a stream, event or device, or cudaMemcpy */
    int64_t capture_waits;   /* of these, within a stream capture, where CUDA fails */
    int64_t to_device;       /* copies from the host to the device */
    int64_t pageable;        /* of these, from memory that is not pinned, which CUDA stages */
    int64_t to_host;         /* copies from the device to the host */
    int64_t launches;        /* of kernels, Triton's included */
    int64_t bad_launches;    /* launches that a real device refuses: grid or shared memory too large */
    int64_t graph_launches;  /* replays of CUDA graphs */
    int64_t graph_kernels;   /* kernels recorded into CUDA graphs */
    int64_t collectives;     /* NCCL calls that move data between ranks */
    int64_t devices_touched; /* bit d: this process has a context on device d */
};
extern struct counters null_counters;

/* Counts a launch. Returns false for a grid or an amount of shared memory that the device does not have. */
bool null_launch(unsigned x, unsigned y, unsigned z, size_t shared_bytes);

/* Memory on the current device, or NULL where it is full. It is host memory, and zero when new. */
void *null_allocate(size_t bytes);
void null_free(void *address);

/* The device that holds an address, or -1 for the host's memory. */
int null_device_of(const void *address);

/* Copies n bytes. Large copies within a device are left out: see README.md. */
void null_copy(void *to, const void *from, size_t n);
void null_fill(void *to, int byte, size_t n);

/* The current device. Asking for it by any call that needs a context opens one on it. */
int null_device_count(void);
int null_current_device(void);
void null_open_context(void);

bool null_is_capturing(void);

/* A handle that no other object has. */
void *null_new_handle(void);

/* The value of a device attribute. cudaDeviceAttr and CUdevice_attribute have the same numbers. */
int null_device_attribute(int attribute);
