// SPDX-License-Identifier: Apache-2.0
// The C ABI: plain data and pointers, no framework. One prototype per op and phase.
//
// Tensors are rows of `classes` consecutive elements; strides are in elements, not bytes.
// Inputs are never written to. Reductions have a fixed order: results do not depend on the
// number of threads. README.md beside this file is the contract in prose.
#pragma once

#include <stdint.h>

#define MSDKERN_ABI_VERSION 4
#define MSDKERN_MAX_EXITS 32
#define MSDKERN_MAX_ROWS 64  // exits and external teachers of one sample

#ifdef __cplusplus
extern "C" {
#endif

enum msdkern_dtype { MSDKERN_F32 = 0, MSDKERN_F16 = 1, MSDKERN_BF16 = 2, MSDKERN_F64 = 3 };

enum msdkern_pairs {
    MSDKERN_PAIRS_NONE = 0,
    MSDKERN_PAIRS_MUTUAL = 1,
    MSDKERN_PAIRS_LAST = 2,
    MSDKERN_PAIRS_DEEPER = 3,
    MSDKERN_PAIRS_NEXT = 4,
    MSDKERN_PAIRS_DENSE = 5
};

enum msdkern_divergence {
    MSDKERN_FORWARD_KL = 0,
    MSDKERN_REVERSE_KL = 1,
    MSDKERN_JSD = 2,
    MSDKERN_SOFT_CE = 3
};

enum msdkern_status {
    MSDKERN_OK = 0,
    MSDKERN_BAD_LABEL = 1,        // `bad_label` holds it
    MSDKERN_BAD_TEMPERATURE = 2,  // not positive, or NaN
    MSDKERN_NO_MEMORY = 3,
    MSDKERN_BAD_SIZE = 4,
    MSDKERN_BAD_INDEX = 5,      // `bad_index` holds it
    MSDKERN_BAD_THRESHOLD = 6,  // NaN
    MSDKERN_CUDA_ERROR = 7      // msdkern_cuda_error() has the runtime's words
};

// The score of a gate. It fires at or above the threshold, the entropies at or below it.
enum msdkern_measure {
    MSDKERN_CONFIDENCE = 0,
    MSDKERN_MARGIN = 1,
    MSDKERN_ENTROPY = 2,
    MSDKERN_NORMALIZED_ENTROPY = 3,
    MSDKERN_MAX_LOGIT = 4,
    MSDKERN_PATIENCE = 5,  // exits in a row that agree with the one before
    MSDKERN_GIVEN = 6      // a score that the caller brings
};

// "Real" below is float, or double for MSDKERN_F64.

// Where a call runs. The CPU kernels look at `threads` alone, the CUDA kernels at the rest.
typedef struct msdkern_place {
    int32_t threads;
    int32_t device;
    void *stream;
    // msdkern_cuda_workspace() bytes on the device: zeros before the first call that uses them.
    // Calls leave them as they found them, and may share them when a stream puts them in order.
    void *workspace;
} msdkern_place;

// Numbers that may change from step to step are given by value, or (`..._at` is not null) by their
// address in device memory, which the host never reads: Real, or int64 for counts.
typedef struct msdkern_loss {
    msdkern_place place;
    int32_t dtype, exits, teachers;
    int64_t rows, classes;
    const void *logits[MSDKERN_MAX_ROWS];  // exits first, then external teachers: [N, C]
    int64_t stride[MSDKERN_MAX_ROWS];      // from row to row
    void *gradient[MSDKERN_MAX_EXITS];     // contiguous [N, C], or null where none is wanted

    const int64_t *label;      // [N], or null
    const void *target;        // Real [N, C] class probabilities, or null
    const void *exit_weight;   // Real [K] or [K, N], or null for ones
    const void *pair_weight;   // Real [K, K + E] or [K, K + E, N], for MSDKERN_PAIRS_DENSE
    const void *class_weight;  // Real [C], or null
    int32_t exit_weight_per_row, pair_weight_per_row;

    int32_t pairs, divergence, temperature_squared, detach_teacher, mean;
    double pair_scale, temperature, beta, label_smoothing;
    double normalizer;  // 0 for none
    const void *temperature_at, *pair_scale_at, *normalizer_at;
    int64_t ignore_index;

    // Scalar form. `pair_divergence` may be null.
    void *loss;             // Real, 0-d
    void *cross_entropy;    // Real [K]
    void *divergence_mean;  // Real [K]
    void *pair_divergence;  // Real [K, K + E]
    int64_t *prediction;    // [K, N]
    void *confidence;       // Real [K, N]

    // Row form: outputs of the forward, and upstream gradients of the backward.
    void *row_cross_entropy;             // Real [K, N]
    void *row_divergence;                // Real [K, N]
    const void *upstream_cross_entropy;  // Real [K, N]
    const void *upstream_divergence;     // Real [K, N]

    // A label out of range: the CPU kernels return MSDKERN_BAD_LABEL, having written nothing. The
    // CUDA kernels make the row's terms and gradient NaN.
    int64_t bad_label;
} msdkern_loss;

typedef struct msdkern_softmax {
    msdkern_place place;
    int32_t dtype, exits, log;
    int64_t rows, classes;
    double temperature;
    const void *temperature_at;
    const void *input[MSDKERN_MAX_EXITS];  // logits, or the saved outputs in backward
    int64_t stride[MSDKERN_MAX_EXITS];     // of input
    const void *upstream[MSDKERN_MAX_EXITS];
    int64_t upstream_stride[MSDKERN_MAX_EXITS];
    void *output[MSDKERN_MAX_EXITS];  // contiguous [N, C]: probabilities, or gradients
} msdkern_softmax;

typedef struct msdkern_statistics {
    msdkern_place place;
    int32_t dtype, exits;
    int64_t rows, classes;
    const void *logits[MSDKERN_MAX_EXITS];
    int64_t stride[MSDKERN_MAX_EXITS];
    void *lse, *confidence, *margin, *entropy, *sum_squares;  // Real [K, N]
    int64_t *prediction;                                      // [K, N]
} msdkern_statistics;

typedef struct msdkern_gate {
    msdkern_place place;
    int32_t dtype, exits, measure;
    int64_t rows, live, classes;  // rows from `live` on are not read
    const void *logits[MSDKERN_MAX_EXITS];
    int64_t stride[MSDKERN_MAX_EXITS];
    double temperature[MSDKERN_MAX_EXITS];
    double threshold[MSDKERN_MAX_EXITS];        // rounded to Real before it is compared
    const void *temperature_at, *threshold_at;  // Real [exits] where `..._per_exit`, else one
    const int64_t *live_at;
    int32_t temperature_per_exit, threshold_per_exit;
    const void *given;    // Real [K, N], for MSDKERN_GIVEN
    int64_t *prediction;  // [N]
    void *score;          // Real [N]

    int64_t *exit_index;  // [N]: the first exit that fires; the last always does

    // One exit, which need not fire. Null for MSDKERN_PATIENCE at the first exit.
    const int64_t *previous_prediction;  // [N]
    const void *previous_score;          // Real [N]
    int64_t *stay;                       // [N]: the rows that stay in order, then the others
    int64_t *count;                      // how many stay
} msdkern_gate;

// Rows of several tensors of any dtype, copied by an index.
typedef struct msdkern_copy {
    msdkern_place place;
    int32_t tensors;
    int64_t count, capacity, limit;  // 0 <= index < limit for the first `count`
    const int64_t *index, *count_at;
    const void *source[MSDKERN_MAX_EXITS];
    void *target[MSDKERN_MAX_EXITS];
    int64_t source_stride[MSDKERN_MAX_EXITS];  // in bytes, as the following two
    int64_t target_stride[MSDKERN_MAX_EXITS];
    int64_t bytes[MSDKERN_MAX_EXITS];  // of one row

    // An index out of range: the CPU kernels return MSDKERN_BAD_INDEX, having written nothing. The
    // CUDA kernels gather zeros for it and scatter nothing.
    int64_t bad_index;
} msdkern_copy;

typedef struct msdkern_scale {
    msdkern_place place;
    int32_t dtype, tensors;
    double factor;
    const void *factor_at;
    void *data[MSDKERN_MAX_EXITS];  // contiguous
    int64_t size[MSDKERN_MAX_EXITS];
} msdkern_scale;

// (3) the scalar loss, with its gradient where `gradient` is not null.
int msdkern_cpu_loss(msdkern_loss *call);
// (3) the terms per exit and row; then the gradient for upstream gradients per exit and row.
int msdkern_cpu_row_losses(msdkern_loss *call);
int msdkern_cpu_row_losses_backward(msdkern_loss *call);
int msdkern_cpu_softmax(const msdkern_softmax *call);
int msdkern_cpu_softmax_backward(const msdkern_softmax *call);
// (7)
int msdkern_cpu_statistics(const msdkern_statistics *call);
// (10) which exit answers each row; (11) which rows stay at one exit.
int msdkern_cpu_exit_gate(const msdkern_gate *call);
int msdkern_cpu_gate_step(const msdkern_gate *call);
// (12) target[i] = source[index[i]] for i < count, zeros up to capacity; and target[index[i]] =
// source[i] for i < count.
int msdkern_cpu_gather_rows(msdkern_copy *call);
int msdkern_cpu_scatter_rows(msdkern_copy *call);
// data *= factor in place; returns at once when the factor is 1.
int msdkern_cpu_scale(const msdkern_scale *call);

// The same on a CUDA device, in the order of the call's stream and without waiting for it. Softmax,
// statistics and exit_gate need no workspace.
int msdkern_cuda_loss(msdkern_loss *call);
int msdkern_cuda_row_losses(msdkern_loss *call);
int msdkern_cuda_row_losses_backward(msdkern_loss *call);
int msdkern_cuda_softmax(const msdkern_softmax *call);
int msdkern_cuda_softmax_backward(const msdkern_softmax *call);
int msdkern_cuda_statistics(const msdkern_statistics *call);
int msdkern_cuda_exit_gate(const msdkern_gate *call);
int msdkern_cuda_gate_step(const msdkern_gate *call);
int msdkern_cuda_gather_rows(msdkern_copy *call);
int msdkern_cuda_scatter_rows(msdkern_copy *call);
int msdkern_cuda_scale(const msdkern_scale *call);
// Bytes of workspace that any call of this many exits and teachers needs on this device.
int64_t msdkern_cuda_workspace(int32_t device, int32_t exits, int32_t teachers);
// What the runtime said of this thread's last call that ended in MSDKERN_CUDA_ERROR.
const char *msdkern_cuda_error(void);

// The instruction sets that this binary holds and this processor runs, best first, as one
// comma-separated string; and the choice among them (null: the best). Nonzero: no such name.
const char *msdkern_cpu_isas(void);
int msdkern_cpu_use_isa(const char *name);

#ifdef __cplusplus
}
#endif
