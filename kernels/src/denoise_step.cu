// Two kernels: one pass for all limits that look at a single value, and one block per frame for the quantile.
//
// NumPy rounds every operation to float32, and so does this file: the __f*_rn functions are never fused.
#include "show1/denoise_step.h"

#include <cfloat>
#include <device.cuh>

#include "arguments.h"
#include "warp.h"

namespace show1 {
namespace {

using Args = show1_denoise_args;

__device__ float clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }  // NaN stays

__device__ int64_t plane(const show1_planes& x, int b, int c, int f) {
    return b * x.batch + c * x.channel + f * x.frame;
}

template <class T>
__device__ float load(const show1_planes& x, int64_t at) {
    return to_float(T(), static_cast<const typename T::Bits*>(x.data)[at]);
}

// One (b, c, f) plane of every tensor, in elements from where the tensor begins.
struct Plane {
    int64_t sample, negative, positive, variance, noise, input[2];

    __device__ Plane(const Args& a, int b, int c, int f)
        : sample(((static_cast<int64_t>(b) * a.channels + c) * a.frames + f) * a.pixels),
          negative(plane(a.noise_pred, b, c, f)),
          positive(plane(a.noise_pred, b + a.batch, c, f)),
          variance(plane(a.variance_frac, b, c, f)),
          noise(plane(a.noise, b, c, f)),
          input{plane(a.network_input, b, c, f), plane(a.network_input, b + a.batch, c, f)} {}
};

// What one element reads.
struct Element {
    float sample, negative, positive;
    float previous_x0, variance, noise;

    template <class T>
    __device__ void load_prediction(const Args& a, const Plane& at, int p) {
        sample = a.sample[at.sample + p];
        negative = load<T>(a.noise_pred, at.negative + p);
        if (a.guided) positive = load<T>(a.noise_pred, at.positive + p);
    }

    template <class T>
    __device__ void load_rest(const Args& a, const show1_step& s, const Plane& at, int p) {
        // Before the first step the history holds nothing yet: it may be NaN.
        if (s.previous_x0_weight != 0) previous_x0 = a.x0[at.sample + p];
        if (!adds_noise(a, s)) return;
        noise = load<Float32>(a.noise, at.noise + p);
        if (a.variance != SHOW1_VARIANCE_FIXED) variance = load<T>(a.variance_frac, at.variance + p);
    }

    __device__ static bool adds_noise(const Args& a, const show1_step& s) {
        return a.noise.data && s.max_log_var > -INFINITY;
    }

    __device__ float x0(const Args& a, const show1_step& s) const {
        const float towards = __fmul_rn(__fsub_rn(positive, negative), s.guidance_scale);
        const float pred = a.guided ? __fadd_rn(towards, negative) : negative;
        return __fdiv_rn(__fsub_rn(sample, __fmul_rn(pred, s.pred_weight)), s.divisor);
    }

    __device__ float noise_std(const Args& a, const show1_step& s) const {
        if (a.variance == SHOW1_VARIANCE_FIXED) return expf(s.min_log_var / 2);
        if (a.variance == SHOW1_VARIANCE_LEARNED) return __fsqrt_rn(variance);
        const float frac = __fadd_rn(variance, 1) / 2;
        return expf(__fadd_rn(__fmul_rn(frac, s.max_log_var), __fmul_rn(__fsub_rn(1, frac), s.min_log_var)) / 2);
    }

    // The solver's update from the limited x0, and the network's next input.
    template <class T>
    __device__ void advance(const Args& a, const show1_step& s, const Plane& at, int p, float x0) const {
        float next = __fadd_rn(__fmul_rn(sample, s.sample_weight), __fmul_rn(x0, s.x0_weight));
        if (s.previous_x0_weight != 0) next = __fadd_rn(next, __fmul_rn(previous_x0, s.previous_x0_weight));
        if (adds_noise(a, s)) next = __fadd_rn(next, __fmul_rn(noise_std(a, s), noise));
        a.sample[at.sample + p] = next;
        if (a.x0) a.x0[at.sample + p] = x0;
        if (a.network_input.data) {
            auto* const input = static_cast<typename T::Bits*>(a.network_input.data);
            input[at.input[0] + p] = from_float(T(), next);
            if (a.guided) input[at.input[1] + p] = from_float(T(), next);
        }
    }
};

// The last block to finish moves on to the next step: by then every block has read the counter.
__device__ void finish(const Args& a, int step) {
    __syncthreads();
    if (threadIdx.x != 0) return;
    __threadfence();
    if (atomicAdd(&a.counter->finished_blocks, 1u) != gridDim.x - 1) return;
    a.counter->finished_blocks = 0;
    a.counter->step = step + 1;
    if (a.timesteps && step + 1 < a.counter->steps)
        for (int item = 0; item < (a.guided ? 2 : 1) * a.batch; ++item) a.timesteps[item] = a.table[step + 1].timestep;
}

__device__ bool is_over(const Args& a, int step) { return step < 0 || step >= a.counter->steps; }

// ---- One pass. limit_max is infinite where nothing is limited.

constexpr int kPointThreads = 256;
constexpr int kPointsPerThread = 4;  // loads in flight
constexpr int kSpan = kPointThreads * kPointsPerThread;

__host__ __device__ constexpr int spans_of(int pixels) { return (pixels - 1) / kSpan + 1; }

template <class T>
__global__ void __launch_bounds__(kPointThreads) pointwise_kernel(Args a) {
    const int step = a.counter->step;
    if (is_over(a, step)) return;
    const show1_step s = a.table[step];
    const int spans = spans_of(a.pixels);
    const int f = blockIdx.x / spans % a.frames, c = blockIdx.x / spans / a.frames % a.channels;
    const Plane at(a, blockIdx.x / spans / a.frames / a.channels, c, f);
    const int first = blockIdx.x % spans * kSpan + threadIdx.x;
    Element elements[kPointsPerThread];
#pragma unroll
    for (int i = 0; i < kPointsPerThread; ++i) {
        const int p = first + i * kPointThreads;
        if (p >= a.pixels) break;
        elements[i].load_prediction<T>(a, at, p);
        elements[i].load_rest<T>(a, s, at, p);
    }
#pragma unroll
    for (int i = 0; i < kPointsPerThread; ++i) {
        const int p = first + i * kPointThreads;
        if (p >= a.pixels) break;
        elements[i].advance<T>(a, s, at, p, clip(elements[i].x0(a, s), -a.limit_max, a.limit_max));
    }
    finish(a, step);
}

// ---- Dynamic threshold: a block per batch item and frame.

constexpr int kFrameThreads = 512;

// What all threads of the block together make of the shared `slot` with `combine`, beginning with `initial`.
template <class Combine>
__device__ uint32_t block_reduce(uint32_t* slot, uint32_t initial, const Combine& combine) {
    if (threadIdx.x == 0) *slot = initial;
    __syncthreads();
    combine();
    __syncthreads();
    const uint32_t result = *slot;
    __syncthreads();
    return result;
}

// clip(quantile(values), 1, most), where for_each(f) calls f(|value|) for all of the frame's values that are this
// thread's. The order statistics are found by bisection over the bits of a float, which are ordered as it is.
template <class ForEach>
__device__ float threshold(const ForEach& for_each, QuantileRank rank, float most, uint32_t* slot) {
    const auto count_up_to = [&](float bound) {
        uint32_t count = 0;
        for_each([&](float magnitude) { count += magnitude <= bound; });
        count = sum_over_warp(count);
        return static_cast<int>(block_reduce(slot, 0u, [&] {
            if (threadIdx.x % 32 == 0) atomicAdd(slot, count);
        }));
    };
    const int needed = rank.lower + 1;  // values up to and with the lower neighbour
    const int below_one = count_up_to(1);
    if (below_one >= needed + (rank.fraction > 0)) return 1;  // late in a run nearly always
    if (count_up_to(most) < needed) return fminf(most, FLT_MAX);  // early in a run often
    int too_small = below_one < needed ? __float_as_int(1.0f) : -1;
    int enough = below_one < needed ? __float_as_int(most) : __float_as_int(1.0f);
    while (enough - too_small > 1) {
        const int middle = too_small + (enough - too_small) / 2;
        (count_up_to(__int_as_float(middle)) < needed ? too_small : enough) = middle;
    }
    // Infinity would interpolate to NaN.
    const float low = fminf(__int_as_float(enough), FLT_MAX);
    float high = low;
    if (count_up_to(low) < needed + 1) {
        float next = FLT_MAX;
        for_each([&](float magnitude) {
            if (magnitude > low) next = fminf(next, magnitude);
        });
        high = __uint_as_float(
            block_reduce(slot, __float_as_uint(FLT_MAX), [&] { atomicMin(slot, __float_as_uint(next)); }));
    }
    return clip(__fadd_rn(low, __fmul_rn(__fsub_rn(high, low), rank.fraction)), 1, most);
}

template <class T>
__global__ void __launch_bounds__(kFrameThreads, 1) frame_kernel(Args a, QuantileRank rank, bool keep) {
    const int step = a.counter->step;
    if (is_over(a, step)) return;
    const show1_step s = a.table[step];
    const int b = blockIdx.x / a.frames, f = blockIdx.x % a.frames;
    float* const kept = shared_memory<float>() + 1;  // [C, H*W] x0; not used if it does not fit
    const auto for_each_element = [&](const auto& visit) {
        for (int c = 0; c < a.channels; ++c) {
            const Plane at(a, b, c, f);
            for (int p = threadIdx.x; p < a.pixels; p += kFrameThreads) visit(c, at, p);
        }
    };
    const auto predict = [&](const Plane& at, int p) {
        Element element;
        element.load_prediction<T>(a, at, p);
        return element.x0(a, s);
    };
    if (keep) for_each_element([&](int c, const Plane& at, int p) { kept[c * a.pixels + p] = predict(at, p); });
    const auto x0 = [&](int c, const Plane& at, int p) { return keep ? kept[c * a.pixels + p] : predict(at, p); };
    const auto for_each_magnitude = [&](const auto& visit) {
        for_each_element([&](int c, const Plane& at, int p) { visit(fabsf(x0(c, at, p))); });
    };
    const float bound = threshold(for_each_magnitude, rank, a.limit_max, shared_memory<uint32_t>());
    for_each_element([&](int c, const Plane& at, int p) {
        Element element;
        element.load_prediction<T>(a, at, p);
        element.load_rest<T>(a, s, at, p);
        element.advance<T>(a, s, at, p, __fdiv_rn(clip(x0(c, at, p), -bound, bound), bound));
    });
    finish(a, step);
}

template <class T>
cudaError_t run(Args a, cudaStream_t stream) {
    if (a.limit == SHOW1_LIMIT_DYNAMIC && a.limit_max > 1) {
        Device device;
        const cudaError_t error = device.query();
        if (error != cudaSuccess) return error;
        const int values = a.channels * a.pixels;
        const int64_t bytes = 4 * (static_cast<int64_t>(values) + 1);
        const bool keep = bytes <= device.shared_bytes;
        return launch(frame_kernel<T>, a.batch * a.frames, kFrameThreads, static_cast<int>(keep ? bytes : 4), stream, a,
                      QuantileRank(a.limit_ratio, values), keep);
    }
    if (a.limit == SHOW1_LIMIT_NONE) a.limit_max = INFINITY;
    const int blocks = a.batch * a.channels * a.frames * spans_of(a.pixels);
    return launch(pointwise_kernel<T>, blocks, kPointThreads, 0, stream, a);
}

}  // namespace
}  // namespace show1

int show1_denoise_step(const show1_denoise_args* args, show1_stream stream) {
    using namespace show1;
    if (!denoise_step_accepts(args)) return SHOW1_INVALID;
    const auto run_as =
        args->dtype == SHOW1_FLOAT16 ? run<Float16> : args->dtype == SHOW1_BFLOAT16 ? run<BFloat16> : run<Float32>;
    return run_as(*args, stream);
}
