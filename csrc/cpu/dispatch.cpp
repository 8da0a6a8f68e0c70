// SPDX-License-Identifier: Apache-2.0
// Chooses the kernels of the best instruction set that this processor runs, and is the C ABI.
#include <stdlib.h>
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
    const char *name, *capability;  // capability: PyTorch's word for it
    const msdkern_kernels *kernels;
    bool (*usable)();
};

// Best first.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", "avx512", &msdkern_kernels_avx512,
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
                __builtin_cpu_supports("fma") != 0;
     }},
    {"avx2", "avx2", &msdkern_kernels_avx2,
     [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
                __builtin_cpu_supports("fma") != 0;
     }},
#endif
    {"baseline", "default", &msdkern_kernels_baseline, [] { return true; }},
};

// The best that is usable, and none beyond what PyTorch is held to.
const Isa &best() {
    const Isa *from = kIsas;
    if (const char *bound = getenv("ATEN_CPU_CAPABILITY"))
        for (const Isa &isa : kIsas)
            if (!strcmp(bound, isa.capability)) from = &isa;
    while (!from->usable()) ++from;  // the last one is
    return *from;
}

std::atomic<const Isa *> chosen{nullptr};

const Isa &current() {
    const Isa *now = chosen.load(std::memory_order_relaxed);
    if (!now) chosen.store(now = &best(), std::memory_order_relaxed);
    return *now;
}
const msdkern_kernels &kernels() { return *current().kernels; }

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
    static thread_local std::string names;
    names = current().name;
    for (const Isa &isa : kIsas)
        if (&isa != &current() && isa.usable()) names += "," + std::string(isa.name);
    return names.c_str();
}

int msdkern_cpu_use_isa(const char *name) {
    for (const Isa &isa : kIsas)
        if (name && !strcmp(name, isa.name) && isa.usable()) {
            chosen.store(&isa, std::memory_order_relaxed);
            return MSDKERN_OK;
        }
    if (!name) chosen.store(&best(), std::memory_order_relaxed);
    return name ? MSDKERN_BAD_SIZE : MSDKERN_OK;
}

}  // extern "C"
