// SPDX-License-Identifier: Apache-2.0
// The C ABI of the loss on CUDA devices, and what all families' calls share on the host.
#include "launch.h"
#include "loss.cuh"

namespace msdkern {

cudaError_t loss_f32(const msdkern_loss &call, Form form);
cudaError_t loss_f16(const msdkern_loss &call, Form form);
cudaError_t loss_bf16(const msdkern_loss &call, Form form);
cudaError_t loss_f64(const msdkern_loss &call, Form form);

namespace {

thread_local std::string words;

// Whether code for processors of 9.0 and newer, of which there is PTX if of anything, knows
// clusters.
bool has_clusters() {
#ifdef __CUDA_ARCH_LIST__
    for (const int arch : {__CUDA_ARCH_LIST__})
        if (arch >= 900) return true;
    return false;
#else
    return true;
#endif
}

Machine ask(int device) {
    Machine m = {0, 0, false};
    int major = 0;
    cudaDeviceGetAttribute(&m.processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&m.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    m.clusters = major >= 9 && has_clusters();
    return m;
}

int run(msdkern_loss *call, Form form) {
    // By dtype code.
    cudaError_t (*const table[])(const msdkern_loss &, Form) = {loss_f32, loss_f16, loss_bf16,
                                                                loss_f64};
    const msdkern_loss &c = *call;
    if (c.exits < 1 || c.exits > MSDKERN_MAX_EXITS || c.teachers < 0 ||
        c.exits + c.teachers > MSDKERN_MAX_ROWS || c.rows < 0 || c.classes < 1 ||
        c.classes > kMostClasses || c.dtype < 0 || c.dtype > 3)
        return MSDKERN_BAD_SIZE;
    if (!c.temperature_at && !(c.temperature > 0 && c.temperature <= 1e300))
        return MSDKERN_BAD_TEMPERATURE;
    if (form != Form::kScalar && c.rows == 0) return MSDKERN_OK;
    const DeviceGuard guard(c.place.device);
    return status_of(guard.error != cudaSuccess ? guard.error : table[c.dtype](c, form));
}

}  // namespace

const Machine &machine(int device) {
    static std::mutex mutex;
    static std::map<int, Machine> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = known.find(device);
    return (found != known.end() ? found : known.emplace(device, ask(device)).first)->second;
}

int status_of(cudaError_t error) {
    if (error == cudaSuccess) return MSDKERN_OK;
    words = cudaGetErrorString(error);
    cudaGetLastError();  // the next caller must not find our error
    return MSDKERN_CUDA_ERROR;
}

}  // namespace msdkern

extern "C" {

int msdkern_cuda_loss(msdkern_loss *call) { return msdkern::run(call, msdkern::Form::kScalar); }
int msdkern_cuda_row_losses(msdkern_loss *call) { return msdkern::run(call, msdkern::Form::kRows); }
int msdkern_cuda_row_losses_backward(msdkern_loss *call) {
    return msdkern::run(call, msdkern::Form::kRowsBackward);
}
const char *msdkern_cuda_error(void) { return msdkern::words.c_str(); }

int64_t msdkern_cuda_workspace(int32_t device, int32_t exits, int32_t teachers) {
    const int64_t fields = int64_t(exits) * (3 + exits + teachers);
    const int64_t blocks = int64_t(msdkern::machine(device).processors) * msdkern::most_resident();
    const int64_t sums = blocks * fields * int64_t(sizeof(double));
    const int64_t counts = msdkern::most_gate_blocks(device) * int64_t(sizeof(int));
    return msdkern::kTallyBytes + (sums > counts ? sums : counts);
}

}  // extern "C"
