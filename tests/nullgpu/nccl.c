/* NCCL of the null GPU. Ranks are processes of one machine, which meet in POSIX shared memory.
 *
 * Every collective waits until all ranks have called it, and fails if they called different ones. That is stricter than
 * NCCL, which would hang or mix data up. Messages of at most SLOT_BYTES really move, so that integers, flags and sums that
 * decide what a rank does next are right. Larger ones (weights, gradients: noise here anyway) stay as they are. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <nccl.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "nullgpu.h"

#define MAX_RANKS 16
#define SLOT_BYTES ((size_t)1 << 20)
#define WAIT_SECONDS 1800

enum operation { ALL_REDUCE = 1, BROADCAST, ALL_GATHER, REDUCE_SCATTER };
static const char *OPERATION_NAMES[] = {"", "all_reduce", "broadcast", "all_gather", "reduce_scatter"};

struct call {
    enum operation operation;
    ncclDataType_t type;
    int detail; /* the reduction, or the root */
    size_t count;
};

struct meeting {
    atomic_int arrived, round;
    struct call calls[MAX_RANKS];
    char slots[MAX_RANKS][SLOT_BYTES];
};

struct ncclComm {
    int rank, n_ranks;
    struct meeting *meeting;
};

/* Waits until all ranks are here. Returns false when one of them does not come. */
static bool meet(ncclComm_t comm) {
    struct meeting *meeting = comm->meeting;
    int round = atomic_load(&meeting->round);
    if (atomic_fetch_add(&meeting->arrived, 1) + 1 == comm->n_ranks) {
        atomic_store(&meeting->arrived, 0);
        atomic_fetch_add(&meeting->round, 1);
        return true;
    }
    time_t start = time(NULL);
    while (atomic_load(&meeting->round) == round) {
        if (time(NULL) - start > WAIT_SECONDS) return false;
        usleep(50);
    }
    return true;
}

/* ---- communicators ---- */

ncclResult_t ncclGetVersion(int *version) {
    *version = NCCL_VERSION_CODE;
    return ncclSuccess;
}

const char *ncclGetErrorString(ncclResult_t result) {
    return result == ncclInvalidUsage ? "ranks called different collectives" : "an error of the null GPU";
}

const char *ncclGetLastError(ncclComm_t comm) { return "see stderr"; }

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) {
    *error = ncclSuccess;
    return ncclSuccess;
}

/* The id is the name of the shared memory. */
ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    static atomic_int n;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/nullgpu-%d-%ld-%d", getpid(), (long)time(NULL), n++);
    return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t *made, int n_ranks, ncclUniqueId id, int rank, ncclConfig_t *config) {
    if (n_ranks > MAX_RANKS) return ncclInvalidArgument;
    null_open_context();
    int file = shm_open(id.internal, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, sizeof(struct meeting)) != 0) return ncclSystemError;
    void *address = mmap(NULL, sizeof(struct meeting), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (address == MAP_FAILED) return ncclSystemError;
    ncclComm_t comm = malloc(sizeof *comm);
    *comm = (struct ncclComm){rank, n_ranks, address};
    if (!meet(comm)) return ncclSystemError;
    if (rank == 0) shm_unlink(id.internal); /* all have opened it, and it goes when they end */
    *made = comm;
    return ncclSuccess;
}

ncclResult_t ncclCommInitRank(ncclComm_t *made, int n_ranks, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(made, n_ranks, id, rank, NULL);
}

ncclResult_t ncclCommInitRankScalable(ncclComm_t *made, int n_ranks, int rank, int n_ids, ncclUniqueId *ids,
                                      ncclConfig_t *config) {
    return ncclCommInitRankConfig(made, n_ranks, ids[0], rank, config);
}

ncclResult_t ncclCommCount(const ncclComm_t comm, int *n_ranks) {
    *n_ranks = comm->n_ranks;
    return ncclSuccess;
}

ncclResult_t ncclCommUserRank(const ncclComm_t comm, int *rank) {
    *rank = comm->rank;
    return ncclSuccess;
}

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    munmap(comm->meeting, sizeof(struct meeting));
    free(comm);
    return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) { return ncclSuccess; } /* another thread may still be in a meeting */

/* ---- collectives ---- */

static size_t size_of(ncclDataType_t type) {
    switch (type) {
        case ncclInt8: case ncclUint8: case ncclFloat8e4m3: case ncclFloat8e5m2: return 1;
        case ncclFloat16: case ncclBfloat16: return 2;
        case ncclInt32: case ncclUint32: case ncclFloat32: return 4;
        default: return 8;
    }
}

/* Puts this rank's message into its slot. Returns an error where the ranks called different collectives. */
static ncclResult_t bring(ncclComm_t comm, struct call call, const void *message, bool moves) {
    struct meeting *meeting = comm->meeting;
    __atomic_add_fetch(&null_counters.collectives, 1, __ATOMIC_RELAXED);
    meeting->calls[comm->rank] = call;
    if (moves) memcpy(meeting->slots[comm->rank], message, call.count * size_of(call.type));
    if (!meet(comm)) return ncclSystemError;
    struct call other = meeting->calls[0];
    bool same = call.operation == other.operation && call.type == other.type && call.detail == other.detail &&
                call.count == other.count;
    if (same) return ncclSuccess;
    fprintf(stderr, "null GPU: rank %d called %s of %zu, rank 0 %s of %zu\n", comm->rank, OPERATION_NAMES[call.operation],
            call.count, OPERATION_NAMES[other.operation], other.count);
    return ncclInvalidUsage;
}

/* No rank may change its slot before all have read it. */
static ncclResult_t leave(ncclComm_t comm) { return meet(comm) ? ncclSuccess : ncclSystemError; }

#define REDUCE(TYPE)                                                                             \
    for (size_t i = 0; i < count; i++) {                                                         \
        TYPE *into = (TYPE *)sum + i, value = ((const TYPE *)message)[i];                        \
        if (operation == ncclMin) *into = value < *into ? value : *into;                         \
        else if (operation == ncclMax) *into = value > *into ? value : *into;                    \
        else if (operation == ncclProd) *into *= value;                                          \
        else *into += value; /* the mean divides at the end */                                   \
    }

/* Adds a message to the sum. The half precisions are not summed. */
static void reduce(void *sum, const void *message, size_t count, ncclDataType_t type, ncclRedOp_t operation) {
    switch (type) {
        case ncclFloat32: REDUCE(float) break;
        case ncclFloat64: REDUCE(double) break;
        case ncclInt8: REDUCE(int8_t) break;
        case ncclUint8: REDUCE(uint8_t) break;
        case ncclInt32: REDUCE(int32_t) break;
        case ncclUint32: REDUCE(uint32_t) break;
        case ncclInt64: REDUCE(int64_t) break;
        case ncclUint64: REDUCE(uint64_t) break;
        default: break;
    }
}

static void divide(void *sum, size_t count, ncclDataType_t type, int n) {
    for (size_t i = 0; i < count && type == ncclFloat32; i++) ((float *)sum)[i] /= n;
    for (size_t i = 0; i < count && type == ncclFloat64; i++) ((double *)sum)[i] /= n;
}

/* Reduces `count` elements from `offset` on, over the slots of all ranks. */
static void reduce_slots(ncclComm_t comm, void *out, size_t offset, size_t count, struct call call) {
    size_t width = size_of(call.type);
    memcpy(out, comm->meeting->slots[0] + offset * width, count * width);
    for (int rank = 1; rank < comm->n_ranks; rank++)
        reduce(out, comm->meeting->slots[rank] + offset * width, count, call.type, call.detail);
    if (call.detail == ncclAvg) divide(out, count, call.type, comm->n_ranks);
}

ncclResult_t ncclAllReduce(const void *send, void *receive, size_t count, ncclDataType_t type, ncclRedOp_t reduction,
                           ncclComm_t comm, cudaStream_t stream) {
    struct call call = {ALL_REDUCE, type, reduction, count};
    bool moves = count * size_of(type) <= SLOT_BYTES;
    ncclResult_t result = bring(comm, call, send, moves);
    if (result != ncclSuccess) return result;
    if (moves) reduce_slots(comm, receive, 0, count, call);
    return leave(comm);
}

ncclResult_t ncclReduceScatter(const void *send, void *receive, size_t part, ncclDataType_t type, ncclRedOp_t reduction,
                               ncclComm_t comm, cudaStream_t stream) {
    struct call call = {REDUCE_SCATTER, type, reduction, part * comm->n_ranks};
    bool moves = call.count * size_of(type) <= SLOT_BYTES;
    ncclResult_t result = bring(comm, call, send, moves);
    if (result != ncclSuccess) return result;
    if (moves) reduce_slots(comm, receive, part * comm->rank, part, call);
    return leave(comm);
}

ncclResult_t ncclBroadcast(const void *send, void *receive, size_t count, ncclDataType_t type, int root, ncclComm_t comm,
                           cudaStream_t stream) {
    struct call call = {BROADCAST, type, root, count};
    bool moves = count * size_of(type) <= SLOT_BYTES;
    ncclResult_t result = bring(comm, call, send, moves);
    if (result != ncclSuccess) return result;
    if (moves) memcpy(receive, comm->meeting->slots[root], count * size_of(type));
    return leave(comm);
}

ncclResult_t ncclBcast(void *data, size_t count, ncclDataType_t type, int root, ncclComm_t comm, cudaStream_t stream) {
    return ncclBroadcast(data, data, count, type, root, comm, stream);
}

ncclResult_t ncclAllGather(const void *send, void *receive, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
    size_t bytes = count * size_of(type);
    bool moves = bytes <= SLOT_BYTES;
    ncclResult_t result = bring(comm, (struct call){ALL_GATHER, type, 0, count}, send, moves);
    if (result != ncclSuccess) return result;
    for (int rank = 0; rank < comm->n_ranks && moves; rank++)
        memcpy((char *)receive + rank * bytes, comm->meeting->slots[rank], bytes);
    return leave(comm);
}
