// SPDX-License-Identifier: Apache-2.0
// The kernels of one instruction set, as a table. kernels.cpp is compiled once per instruction set
// and fills one; dispatch.cpp chooses among them.
#pragma once

#include "../msdkern.h"

struct msdkern_kernels {
    int (*loss)(msdkern_loss *);
    int (*row_losses)(msdkern_loss *);
    int (*row_losses_backward)(msdkern_loss *);
    int (*softmax)(const msdkern_softmax *);
    int (*softmax_backward)(const msdkern_softmax *);
    int (*statistics)(const msdkern_statistics *);
    int (*exit_gate)(const msdkern_gate *);
    int (*gate_step)(const msdkern_gate *);
    int (*gather_rows)(msdkern_copy *);
    int (*scatter_rows)(msdkern_copy *);
    int (*scale)(const msdkern_scale *);
};
