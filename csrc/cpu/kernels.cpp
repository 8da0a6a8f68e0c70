// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set, with MSDKERN_ISA as its name (baseline, avx2, avx512).
#ifndef MSDKERN_ISA
#define MSDKERN_ISA baseline
#endif
#define MSDKERN_JOIN(a, b) a##b
#define MSDKERN_NAME(a, b) MSDKERN_JOIN(a, b)
#define MSDKERN_NAMESPACE MSDKERN_NAME(msdkern_, MSDKERN_ISA)

#include "kernels.h"

#include "compact.h"
#include "gate.h"
#include "loss.h"
#include "softmax.h"

namespace MSDKERN_NAMESPACE {

// Calls f(storage type) for a dtype code.
template <class F>
static int with_dtype(int dtype, F f) {
    switch (dtype) {
        case MSDKERN_F32:
            return f(float());
        case MSDKERN_F16:
            return f(half());
        case MSDKERN_BF16:
            return f(bfloat());
        case MSDKERN_F64:
            return f(double());
        default:
            return MSDKERN_BAD_SIZE;
    }
}

static int any_loss(msdkern_loss *call, Form form) {
    if (call->exits < 1 || call->exits > MSDKERN_MAX_EXITS || call->teachers < 0 ||
        call->exits + call->teachers > MSDKERN_MAX_ROWS || call->rows < 0 || call->classes < 1)
        return MSDKERN_BAD_SIZE;
    if (!(call->temperature > 0 && call->temperature <= 1e300)) return MSDKERN_BAD_TEMPERATURE;
    return with_dtype(call->dtype, [&](auto s) { return run_loss<decltype(s)>(*call, form); });
}
static int loss(msdkern_loss *call) { return any_loss(call, Form::kScalar); }
static int row_losses(msdkern_loss *call) { return any_loss(call, Form::kRows); }
static int row_losses_backward(msdkern_loss *call) { return any_loss(call, Form::kRowsBackward); }

static int any_softmax(const msdkern_softmax *call, bool backward) {
    if (call->exits < 1 || call->exits > MSDKERN_MAX_EXITS || call->rows < 0 || call->classes < 1)
        return MSDKERN_BAD_SIZE;
    if (!(call->temperature > 0 && call->temperature <= 1e300)) return MSDKERN_BAD_TEMPERATURE;
    return with_dtype(call->dtype,
                      [&](auto s) { return run_softmax<decltype(s)>(*call, backward); });
}
static int softmax(const msdkern_softmax *call) { return any_softmax(call, false); }
static int softmax_backward(const msdkern_softmax *call) { return any_softmax(call, true); }

static int statistics(const msdkern_statistics *call) {
    if (call->exits < 1 || call->exits > MSDKERN_MAX_EXITS || call->rows < 0 || call->classes < 1)
        return MSDKERN_BAD_SIZE;
    return with_dtype(call->dtype, [&](auto s) { return run_statistics<decltype(s)>(*call); });
}

static int any_gate(const msdkern_gate *call, bool step) {
    if (call->exits < 1 || call->exits > (step ? 1 : MSDKERN_MAX_EXITS) || call->rows < 0 ||
        call->live < 0 || call->live > call->rows || call->classes < 1 ||
        call->measure < MSDKERN_CONFIDENCE || call->measure > MSDKERN_GIVEN)
        return MSDKERN_BAD_SIZE;
    for (int k = 0; k < call->exits; ++k) {
        if (!(call->temperature[k] > 0 && call->temperature[k] <= 1e300))
            return MSDKERN_BAD_TEMPERATURE;
        if (call->threshold[k] != call->threshold[k]) return MSDKERN_BAD_THRESHOLD;
    }
    return with_dtype(call->dtype, [&](auto s) {
        return step ? run_gate_step<decltype(s)>(*call) : run_exit_gate<decltype(s)>(*call);
    });
}
static int exit_gate(const msdkern_gate *call) { return any_gate(call, false); }
static int gate_step(const msdkern_gate *call) { return any_gate(call, true); }

static int any_copy(msdkern_copy *call, bool scatter) {
    if (call->tensors < 0 || call->tensors > MSDKERN_MAX_EXITS || call->count < 0 ||
        call->count > call->capacity)
        return MSDKERN_BAD_SIZE;
    return run_copy(*call, scatter);
}
static int gather_rows(msdkern_copy *call) { return any_copy(call, false); }
static int scatter_rows(msdkern_copy *call) { return any_copy(call, true); }

static int scale(const msdkern_scale *call) {
    if (call->tensors < 0 || call->tensors > MSDKERN_MAX_EXITS) return MSDKERN_BAD_SIZE;
    return with_dtype(call->dtype, [&](auto s) { return run_scale<decltype(s)>(*call); });
}

}  // namespace MSDKERN_NAMESPACE

extern const msdkern_kernels MSDKERN_NAME(msdkern_kernels_, MSDKERN_ISA);
const msdkern_kernels MSDKERN_NAME(msdkern_kernels_, MSDKERN_ISA) = {
    MSDKERN_NAMESPACE::loss,
    MSDKERN_NAMESPACE::row_losses,
    MSDKERN_NAMESPACE::row_losses_backward,
    MSDKERN_NAMESPACE::softmax,
    MSDKERN_NAMESPACE::softmax_backward,
    MSDKERN_NAMESPACE::statistics,
    MSDKERN_NAMESPACE::exit_gate,
    MSDKERN_NAMESPACE::gate_step,
    MSDKERN_NAMESPACE::gather_rows,
    MSDKERN_NAMESPACE::scatter_rows,
    MSDKERN_NAMESPACE::scale,
};
