#include "show1/frames_to_uint8.h"

#include <device.cuh>

#include "arguments.h"

namespace show1 {
namespace {

constexpr int kThreads = 256;

// One thread per pixel: reads are coalesced per channel, and the C bytes of neighbouring pixels are adjacent.
template <class T, int C>
__global__ void __launch_bounds__(kThreads)
    frames_kernel(const typename T::Bits* clip, int64_t channel, int64_t frame, uint8_t* out, int pixels) {
    const int blocks_per_frame = (pixels + kThreads - 1) / kThreads;
    const int f = blockIdx.x / blocks_per_frame, p = blockIdx.x % blocks_per_frame * kThreads + threadIdx.x;
    if (p >= pixels) return;
#pragma unroll
    for (int c = 0; c < C; ++c) {
        const float unit = to_float(T(), clip[c * channel + f * frame + p]) * 0.5f + 0.5f;
        // fmaxf turns NaN into 0.
        out[(static_cast<int64_t>(f) * pixels + p) * C + c] =
            static_cast<uint8_t>(fminf(fmaxf(unit, 0.0f), 1.0f) * 255.0f);
    }
}

template <class T>
cudaError_t run(const show1_planes& clip, uint8_t* out, int channels, int frames, int pixels, cudaStream_t stream) {
    void (*const kernels[])(const typename T::Bits*, int64_t, int64_t, uint8_t*, int) = {
        frames_kernel<T, 1>, frames_kernel<T, 2>, frames_kernel<T, 3>, frames_kernel<T, 4>};
    return launch(kernels[channels - 1], frames * ((pixels + kThreads - 1) / kThreads), kThreads, 0, stream,
                  static_cast<const typename T::Bits*>(clip.data), clip.channel, clip.frame, out, pixels);
}

}  // namespace
}  // namespace show1

int show1_frames_to_uint8(int dtype, const show1_planes* clip, uint8_t* frames_out, int channels, int frames,
                          int pixels, show1_stream stream) {
    using namespace show1;
    if (!frames_to_uint8_accepts(dtype, clip, frames_out, channels, frames, pixels)) return SHOW1_INVALID;
    const auto run_as = dtype == SHOW1_FLOAT16 ? run<Float16> : dtype == SHOW1_BFLOAT16 ? run<BFloat16> : run<Float32>;
    return run_as(*clip, frames_out, channels, frames, pixels, stream);
}
