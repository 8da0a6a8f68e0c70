// SPDX-License-Identifier: Apache-2.0
#include "loss_run.cuh"

namespace msdkern {

cudaError_t loss_f16(const msdkern_loss &call, Form form) { return run_loss<__half>(call, form); }

}  // namespace msdkern
