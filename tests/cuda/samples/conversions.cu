// SPDX-License-Identifier: Apache-2.0
// Roundings of the 16-bit types, for comparison with NumPy's.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../planted/planted.h"

namespace planted::conversions {

__global__ void round_all(const float *in, __half *half, __nv_bfloat16 *bfloat, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    half[i] = __float2half_rn(in[i]);
    bfloat[i] = __float2bfloat16_rn(in[i]);
}

__global__ void widen_all(const __half *half, const __nv_bfloat16 *bfloat, float2 *out, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) out[i] = make_float2(__half2float(half[i]), __bfloat162float(bfloat[i]));
}

}  // namespace planted::conversions

extern "C" __attribute__((visibility("default"))) int round_floats(const float *in, void *half,
                                                                   void *bfloat, int n) {
    return planted::launch({unsigned(n + 255) / 256, 256}, planted::conversions::round_all, in,
                           static_cast<__half *>(half), static_cast<__nv_bfloat16 *>(bfloat), n);
}
extern "C" __attribute__((visibility("default"))) int widen(const void *half, const void *bfloat,
                                                            void *out, int n) {
    return planted::launch({unsigned(n + 255) / 256, 256}, planted::conversions::widen_all,
                           static_cast<const __half *>(half),
                           static_cast<const __nv_bfloat16 *>(bfloat), static_cast<float2 *>(out),
                           n);
}
