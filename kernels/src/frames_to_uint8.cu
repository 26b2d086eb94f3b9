#include "show1/frames_to_uint8.h"

#include <device.cuh>

#include "arguments.h"

namespace show1 {
namespace {

constexpr int kThreads = 256;
constexpr int kRun = 8;                 // adjacent pixels of a thread: 16 bytes of half precision
constexpr int kTile = kRun * kThreads;  // of a block

template <class T>
using Bits = typename T::Bits;

template <class T>
__device__ uint8_t to_byte(Bits<T> bits) {
    const float unit = to_float(T(), bits) * 0.5f + 0.5f;
    return static_cast<uint8_t>(fminf(fmaxf(unit, 0.0f), 1.0f) * 255.0f);  // fmaxf turns NaN into 0
}

// Whole pieces of 16 bytes in and out. The C bytes of a thread's pixels are put together in shared memory, whence they
// leave in the order of addresses.
template <class T, int C>
__global__ void __launch_bounds__(kThreads)
    tiles_kernel(const Bits<T>* clip, int64_t channel, int64_t frame, uint8_t* out, int pixels) {
    constexpr int kPieces = kRun * sizeof(Bits<T>) / 16;  // of a channel
    constexpr int kWords = kRun * C / 4;
    uint32_t* const tile = shared_memory<uint32_t>();
    const int tiles = (pixels - 1) / kTile + 1;
    const int f = blockIdx.x / tiles, first = blockIdx.x % tiles * kTile;
    const int count = min(kTile, pixels - first);
    if (kRun * threadIdx.x < static_cast<unsigned>(count)) {
        uint4 pieces[C][kPieces];
        const Bits<T>* const from = clip + f * frame + first + kRun * threadIdx.x;
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int i = 0; i < kPieces; ++i) pieces[c][i] = reinterpret_cast<const uint4*>(from + c * channel)[i];
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            uint32_t word = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int c = (4 * w + i) % C, p = (4 * w + i) / C;
                word |= static_cast<uint32_t>(to_byte<T>(reinterpret_cast<const Bits<T>*>(pieces[c])[p])) << 8 * i;
            }
            tile[kWords * threadIdx.x + w] = word;
        }
    }
    __syncthreads();
    uint4* const row = reinterpret_cast<uint4*>(out + (static_cast<int64_t>(f) * pixels + first) * C);
    for (int i = threadIdx.x; i < count * C / 16; i += kThreads) row[i] = reinterpret_cast<const uint4*>(tile)[i];
}

// Any size and stride: a pixel per thread, reads are coalesced per channel.
template <class T, int C>
__global__ void __launch_bounds__(kThreads)
    pixels_kernel(const Bits<T>* clip, int64_t channel, int64_t frame, uint8_t* out, int pixels) {
    const int blocks_per_frame = (pixels - 1) / kThreads + 1;
    const int f = blockIdx.x / blocks_per_frame, p = blockIdx.x % blocks_per_frame * kThreads + threadIdx.x;
    if (p >= pixels) return;
#pragma unroll
    for (int c = 0; c < C; ++c)
        out[(static_cast<int64_t>(f) * pixels + p) * C + c] = to_byte<T>(clip[c * channel + f * frame + p]);
}

template <class T, int C>
cudaError_t run_as(const show1_planes& clip, uint8_t* out, int frames, int pixels, cudaStream_t stream) {
    constexpr int kPerPiece = 16 / sizeof(Bits<T>);
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    const bool tiled = aligned(clip.data) && aligned(out) && pixels % 16 == 0 && clip.channel % kPerPiece == 0 &&
                       clip.frame % kPerPiece == 0;
    const int of_block = tiled ? kTile : kThreads;
    return launch(tiled ? tiles_kernel<T, C> : pixels_kernel<T, C>, frames * ((pixels - 1) / of_block + 1),
                  kThreads, tiled ? kTile * C : 0, stream, static_cast<const Bits<T>*>(clip.data), clip.channel,
                  clip.frame, out, pixels);
}

template <class T>
cudaError_t run(const show1_planes& clip, uint8_t* out, int channels, int frames, int pixels, cudaStream_t stream) {
    cudaError_t (*const of_channels[])(const show1_planes&, uint8_t*, int, int, cudaStream_t) = {
        run_as<T, 1>, run_as<T, 2>, run_as<T, 3>, run_as<T, 4>};
    return of_channels[channels - 1](clip, out, frames, pixels, stream);
}

}  // namespace
}  // namespace show1

int show1_frames_to_uint8(int dtype, const show1_planes* clip, uint8_t* frames_out, int channels, int frames,
                          int pixels, show1_stream stream) {
    using namespace show1;
    if (!frames_to_uint8_accepts(dtype, clip, frames_out, channels, frames, pixels)) return SHOW1_INVALID;
    const auto convert = dtype == SHOW1_FLOAT16 ? run<Float16> : dtype == SHOW1_BFLOAT16 ? run<BFloat16> : run<Float32>;
    return convert(*clip, frames_out, channels, frames, pixels, stream);
}
