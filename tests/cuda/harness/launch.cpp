// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime's functions, and the limits of a launch.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "shims/cuda_runtime_api.h"

namespace {

using simt::Shape;

constexpr std::size_t kSharedDefault = 48 << 10, kSharedMost = 227 << 10;
constexpr int kClusterPortable = 8, kClusterMost = 16;
// Few, so that grids that are as large as the GPU go round their loops more than once.
constexpr int kProcessors = 3;

struct Function {
    std::size_t most_shared = kSharedDefault;
    bool large_clusters = false;
};
std::map<const void *, Function> functions;
cudaError_t last = cudaSuccess;
char refusal[512] = "";

cudaError_t remember(cudaError_t error) {
    if (error != cudaSuccess) last = error;
    return error;
}

struct Name {
    cudaError_t error;
    const char *name, *words;
};
const Name kNames[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", refusal},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
};

const Name &named(cudaError_t error) {
    static const Name unknown = {error, "cudaErrorUnknown", "unknown error"};
    static const Name failed = {error, "cudaErrorLaunchFailure", simt::failure()};
    if (error == cudaErrorLaunchFailure) return failed;
    for (const Name &name : kNames)
        if (name.error == error) return name;
    return unknown;
}

Shape shape(const dim3 &d) { return {d.x, d.y, d.z}; }

// The first rule that a launch breaks, as "rule; got value"; false when there is none.
bool broken(const simt::Launch &l, const Function &f, char (&text)[512]) {
    const Shape &g = l.grid, &b = l.block, &c = l.cluster;
    const struct {
        bool broken;
        const char *rule;
        unsigned long long value;
    } rules[] = {
        {!g.count() || g.x > 0x7fffffffu, "the grid's x must be in 1..2^31-1", g.x},
        {g.y > 65535 || g.z > 65535, "the grid's y and z must be in 1..65535",
         g.y > g.z ? g.y : g.z},
        {!b.count() || b.count() > 1024, "threads per block must be in 1..1024", b.count()},
        {b.z > 64, "the block's z must be at most 64", b.z},
        {l.shared > kSharedMost, "dynamic shared memory must be at most 232448 bytes", l.shared},
        {l.shared > f.most_shared,
         "dynamic shared memory must be at most what "
         "cudaFuncSetAttribute allowed",
         l.shared},
        {!c.count() || c.count() > unsigned(kClusterMost), "a cluster must have 1..16 blocks",
         c.count()},
        {c.count() > unsigned(kClusterPortable) && !f.large_clusters,
         "a cluster of more than 8 "
         "blocks must be allowed by cudaFuncSetAttribute",
         c.count()},
        {c.count() && (g.x % c.x || g.y % c.y || g.z % c.z), "the grid must be whole clusters",
         g.x},
        {l.cooperative && c.count() > 1, "a cooperative launch must be without clusters",
         c.count()},
        {l.cooperative && g.count() > unsigned(kProcessors) * 2,
         "a cooperative launch must be "
         "resident at once (6 blocks here)",
         g.count()},
    };
    for (const auto &rule : rules) {
        if (!rule.broken) continue;
        snprintf(text, sizeof text, "launch: %s; got %llu", rule.rule, rule.value);
        return true;
    }
    return false;
}

}  // namespace

namespace simt {

cudaError_t launch(const cudaLaunchConfig_t &config, const void *kernel, void (*call)(void *),
                   void *arguments) {
    Launch l;
    l.grid = shape(config.gridDim);
    l.block = shape(config.blockDim);
    l.shared = config.dynamicSmemBytes;
    l.kernel = kernel;
    l.call = call;
    l.arguments = arguments;
    for (unsigned i = 0; i < config.numAttrs; ++i) {
        const cudaLaunchAttribute &a = config.attrs[i];
        if (a.id == cudaLaunchAttributeClusterDimension)
            l.cluster = {a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z};
        else if (a.id == cudaLaunchAttributeCooperative)
            l.cooperative = a.val.cooperative;
        else if (a.id != cudaLaunchAttributeIgnore &&
                 a.id != cudaLaunchAttributeProgrammaticStreamSerialization)
            return remember(cudaErrorNotSupported);
    }
    if (broken(l, functions[kernel], refusal)) {
        fprintf(stderr, "simt: %s\n", refusal);
        return remember(cudaErrorInvalidConfiguration);
    }
    return run(l) ? cudaSuccess : remember(cudaErrorLaunchFailure);
}

cudaError_t set_attribute(const void *kernel, cudaFuncAttribute attribute, int value) {
    Function &f = functions[kernel];
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        if (value < 0 || std::size_t(value) > kSharedMost) return remember(cudaErrorInvalidValue);
        f.most_shared = value;
    } else if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
        f.large_clusters = value;
    }
    return cudaSuccess;
}

cudaError_t attributes(cudaFuncAttributes *found, const void *kernel) {
    *found = {};
    found->binaryVersion = 90;
    found->maxThreadsPerBlock = 1024;
    found->numRegs = 32;
    found->maxDynamicSharedSizeBytes = int(functions[kernel].most_shared);
    return cudaSuccess;
}

cudaError_t active_blocks(int *count, const void *kernel, int threads, std::size_t shared) {
    Launch l;
    l.block.x = unsigned(threads);
    l.shared = shared;
    *count = broken(l, functions[kernel], refusal) ? 0 : 2;
    return cudaSuccess;
}

cudaError_t active_clusters(int *count, const void *kernel, const cudaLaunchConfig_t *config) {
    Launch l;
    l.grid = shape(config->gridDim);
    l.block = shape(config->blockDim);
    l.shared = config->dynamicSmemBytes;
    for (unsigned i = 0; i < config->numAttrs; ++i)
        if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) {
            const auto &c = config->attrs[i].val.clusterDim;
            l.cluster = {c.x, c.y, c.z};
        }
    *count = broken(l, functions[kernel], refusal) ? 0 : 1;
    return cudaSuccess;
}

}  // namespace simt

const char *cudaGetErrorString(cudaError_t error) { return named(error).words; }
const char *cudaGetErrorName(cudaError_t error) { return named(error).name; }
cudaError_t cudaPeekAtLastError() { return last; }
cudaError_t cudaGetLastError() {
    const cudaError_t error = last;
    last = cudaSuccess;
    return error;
}
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceCount(int *count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
    return remember(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int device) {
    *p = {};
    snprintf(p->name, sizeof p->name, "CPU harness");
    p->major = 9;
    p->multiProcessorCount = kProcessors;
    p->sharedMemPerBlockOptin = kSharedMost;
    p->totalGlobalMem = 1 << 30;
    return cudaSetDevice(device);
}
// A smaller device than the launches here would allow: SIMT_SHARED, in bytes.
static int shared_optin() {
    const char *given = getenv("SIMT_SHARED");
    return given ? atoi(given) : int(kSharedMost);
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device) {
    static const std::map<cudaDeviceAttr, int> values = {
        {cudaDevAttrMaxThreadsPerBlock, 1024},
        {cudaDevAttrMaxSharedMemoryPerBlock, int(kSharedDefault)},
        {cudaDevAttrWarpSize, 32},
        {cudaDevAttrMultiProcessorCount, kProcessors},
        {cudaDevAttrL2CacheSize, 50 << 20},
        {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
        {cudaDevAttrComputeCapabilityMajor, 9},
        {cudaDevAttrComputeCapabilityMinor, 0},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10},
        {cudaDevAttrCooperativeLaunch, 1},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, shared_optin()},
        {cudaDevAttrMaxBlocksPerMultiprocessor, 32},
        {cudaDevAttrReservedSharedMemoryPerBlock, 1024},
        {cudaDevAttrClusterLaunch, 1},
    };
    const auto found = values.find(attribute);
    if (found == values.end()) return remember(cudaErrorInvalidValue);
    *value = found->second;
    return cudaSetDevice(device);
}
cudaError_t cudaDeviceSynchronize() { return cudaPeekAtLastError(); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaPeekAtLastError(); }
cudaError_t cudaMalloc(void **memory, std::size_t bytes) {
    *memory = bytes ? std::malloc(bytes) : nullptr;
    return remember(*memory || !bytes ? cudaSuccess : cudaErrorMemoryAllocation);
}
cudaError_t cudaMallocAsync(void **memory, std::size_t bytes, cudaStream_t) {
    return cudaMalloc(memory, bytes);
}
cudaError_t cudaFree(void *memory) { return std::free(memory), cudaSuccess; }
cudaError_t cudaFreeAsync(void *memory, cudaStream_t) { return cudaFree(memory); }
cudaError_t cudaMemset(void *to, int value, std::size_t bytes) {
    if (bytes) std::memset(to, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, std::size_t bytes, cudaStream_t) {
    return cudaMemset(to, value, bytes);
}
cudaError_t cudaMemcpy(void *to, const void *from, std::size_t bytes, cudaMemcpyKind) {
    if (bytes) std::memcpy(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t) {
    return cudaMemcpy(to, from, bytes, kind);
}
