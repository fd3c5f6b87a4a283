/* cuBLAS, cuBLASLt and cuDNN of the null GPU: handles are made, algorithms are found, products do nothing. */
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cudnn.h>
#include <stdlib.h>
#include <string.h>

#include "nullgpu.h"

/* ---- cuBLAS ---- */

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    *handle = null_new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetVersion_v2(cublasHandle_t handle, int *version) {
    *version = CUBLAS_VERSION;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
    *mode = CUBLAS_DEFAULT_MATH;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasGetStream_v2(cublasHandle_t handle, cudaStream_t *stream) {
    *stream = NULL;
    return CUBLAS_STATUS_SUCCESS;
}

const char *cublasGetStatusString(cublasStatus_t status) { return "an error of the null GPU"; }

const char *cublasGetStatusName(cublasStatus_t status) { return "an error of the null GPU"; }

/* ---- cuBLASLt ---- */

size_t cublasLtGetVersion(void) { return CUBLAS_VERSION; }

cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    *handle = null_new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *desc, cublasComputeType_t compute, cudaDataType_t scale) {
    *desc = null_new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t stride) {
    *layout = null_new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
    *preference = null_new_handle();
    return CUBLAS_STATUS_SUCCESS;
}

/* One algorithm, without a workspace. */
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference,
                                              int n_wanted, cublasLtMatmulHeuristicResult_t results[], int *n_found) {
    memset(results, 0, sizeof results[0]);
    *n_found = 1;
    return CUBLAS_STATUS_SUCCESS;
}

/* ---- cuDNN: the backend that its graph API, and with it torch's attention, is built on ---- */

struct null_descriptor {
    cudnnBackendDescriptorType_t type;
};

size_t cudnnGetVersion(void) { return CUDNN_VERSION; }

size_t cudnnGetCudartVersion(void) { return CUDA_VERSION_SHOWN; }

const char *cudnnGetErrorString(cudnnStatus_t status) { return "an error of the null GPU"; }

void cudnnGetLastErrorString(char *message, size_t n) {
    if (n) message[0] = 0;
}

cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) {
    *handle = null_new_handle();
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t *stream) {
    *stream = NULL;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *descriptor) {
    struct null_descriptor *made = malloc(sizeof *made);
    made->type = type;
    *descriptor = made;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
    free(descriptor);
    return CUDNN_STATUS_SUCCESS;
}

/* There is one engine, number 0, without knobs, notes, workspace and shared memory; heuristics find it for every graph. Where elements
 * are descriptors, the caller has made them, and they stay as they are. */
cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t const descriptor, cudnnBackendAttributeName_t name,
                                       cudnnBackendAttributeType_t type, int64_t n_wanted, int64_t *n_found,
                                       void *elements) {
    bool has_one = name == CUDNN_ATTR_ENGINEHEUR_RESULTS || name == CUDNN_ATTR_ENGINECFG_ENGINE ||
                   name == CUDNN_ATTR_ENGINE_GLOBAL_INDEX || name == CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE;
    if (n_found) *n_found = has_one;
    if (type == CUDNN_TYPE_INT64 && elements && n_wanted) *(int64_t *)elements = 0;
    if (type == CUDNN_TYPE_INT32 && elements && n_wanted) *(int32_t *)elements = 0;
    return CUDNN_STATUS_SUCCESS;
}

cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan, cudnnBackendDescriptor_t pack) {
    null_launch(1, 1, 1, 0);
    return CUDNN_STATUS_SUCCESS;
}
