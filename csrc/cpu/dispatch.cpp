// SPDX-License-Identifier: Apache-2.0
// Chooses the kernels of the best instruction set that this processor runs, and is the C ABI.
#include <string.h>

#include <atomic>
#include <string>

#include "kernels.h"

extern const msdkern_kernels msdkern_kernels_baseline;
#if defined(__x86_64__)
extern const msdkern_kernels msdkern_kernels_avx2;
extern const msdkern_kernels msdkern_kernels_avx512;
#endif

namespace {

struct Isa {
    const char *name;
    const msdkern_kernels *kernels;
    bool (*usable)();
};

// Best first.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", &msdkern_kernels_avx512,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
                __builtin_cpu_supports("fma") != 0;
     }},
    {"avx2", &msdkern_kernels_avx2,
     [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
                __builtin_cpu_supports("fma") != 0;
     }},
#endif
    {"baseline", &msdkern_kernels_baseline, [] { return true; }},
};

const msdkern_kernels *best() {
    for (const Isa &isa : kIsas)
        if (isa.usable()) return isa.kernels;
    return nullptr;
}

std::atomic<const msdkern_kernels *> chosen{nullptr};

const msdkern_kernels &kernels() {
    const msdkern_kernels *now = chosen.load(std::memory_order_relaxed);
    if (!now) chosen.store(now = best(), std::memory_order_relaxed);
    return *now;
}

}  // namespace

extern "C" {

int msdkern_cpu_loss(msdkern_loss *call) { return kernels().loss(call); }
int msdkern_cpu_row_losses(msdkern_loss *call) { return kernels().row_losses(call); }
int msdkern_cpu_row_losses_backward(msdkern_loss *call) {
    return kernels().row_losses_backward(call);
}
int msdkern_cpu_softmax(const msdkern_softmax *call) { return kernels().softmax(call); }
int msdkern_cpu_softmax_backward(const msdkern_softmax *call) {
    return kernels().softmax_backward(call);
}
int msdkern_cpu_statistics(const msdkern_statistics *call) { return kernels().statistics(call); }
int msdkern_cpu_exit_gate(const msdkern_gate *call) { return kernels().exit_gate(call); }
int msdkern_cpu_gate_step(const msdkern_gate *call) { return kernels().gate_step(call); }
int msdkern_cpu_gather_rows(msdkern_copy *call) { return kernels().gather_rows(call); }
int msdkern_cpu_scatter_rows(msdkern_copy *call) { return kernels().scatter_rows(call); }
int msdkern_cpu_scale(const msdkern_scale *call) { return kernels().scale(call); }

const char *msdkern_cpu_isas(void) {
    static const std::string names = [] {
        std::string all;
        for (const Isa &isa : kIsas)
            if (isa.usable()) all += (all.empty() ? "" : ",") + std::string(isa.name);
        return all;
    }();
    return names.c_str();
}

int msdkern_cpu_use_isa(const char *name) {
    for (const Isa &isa : kIsas)
        if (isa.usable() && (!name || !strcmp(name, isa.name))) {
            chosen.store(isa.kernels, std::memory_order_relaxed);
            return MSDKERN_OK;
        }
    return MSDKERN_BAD_SIZE;
}

}  // extern "C"
