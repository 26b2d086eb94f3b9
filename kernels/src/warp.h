// What the lanes of a warp do together. To be included after device.cuh.
#pragma once

namespace show1 {

// The same sum in every lane.
template <class T>
__device__ T sum_over_warp(T value) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kWholeWarp, value, distance);
    return value;
}

}  // namespace show1
