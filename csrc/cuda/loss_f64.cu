// SPDX-License-Identifier: Apache-2.0
#include "loss_run.cuh"

namespace msdkern {

cudaError_t loss_f64(const msdkern_loss &call, Form form) { return run_loss<double>(call, form); }

}  // namespace msdkern
