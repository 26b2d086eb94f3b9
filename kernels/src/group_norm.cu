// Threads lie over channels. One kernel takes statistics of parts of the rows, a second does the rest; or one both.
#include "show1/group_norm.h"

#include <device.cuh>

#include <algorithm>

#include "arguments.h"
#include "warp.h"

namespace show1 {
namespace {

constexpr int kThreads = 320;     // channels of the networks are 160 k and 128 k: runs of 8 leave few threads idle
constexpr int kWarps = kThreads / 32;
constexpr int kTogether = 2;      // blocks of a multiprocessor, at least
constexpr int kMostWaves = 4;     // of the second kernel's blocks
constexpr int kBlockBytes = 128 * 1024;  // of x, for a block of the second kernel, while that gives no fewer blocks
constexpr int kSmallBytes = 64 * 1024;   // of shared memory, which every card has

template <class T>
using Bits = typename T::Bits;
using Args = show1_group_norm_args;

// Threads lie over runs of W channels; as many rows as fit are taken side by side.
struct Tiling {
    int channels, runs, across, down;

    template <int W>
    static Tiling of(int channels) {
        const int runs = channels / W, across = runs < kThreads ? runs : kThreads;
        return {channels, runs, across, kThreads / across};
    }
    int scratch() const { return 2 * down * channels; }  // floats that `statistics` needs
};

// W channels of a row, as they lie in memory until they are worked on.
template <class T, int W>
struct Run {
    uint4 piece;

    __device__ void load(const Bits<T>* from) {
        if constexpr (W == 8)
            piece = *reinterpret_cast<const uint4*>(from);
        else
            piece.x = *from;
    }
    __device__ void unpacked(float (&values)[W]) const {
        if constexpr (W == 8) {
            const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 both = unpack(T(), words[i]);
                values[2 * i] = both.x;
                values[2 * i + 1] = both.y;
            }
        } else {
            values[0] = to_float(T(), static_cast<Bits<T>>(piece.x));
        }
    }
};

template <class T, int W>
__device__ void store_run(Bits<T>* to, const float (&values)[W]) {
    if constexpr (W == 8) {
        uint4 piece;
        piece.x = pack(T(), values[0], values[1]);
        piece.y = pack(T(), values[2], values[3]);
        piece.z = pack(T(), values[4], values[5]);
        piece.w = pack(T(), values[6], values[7]);
        *reinterpret_cast<uint4*>(to) = piece;
    } else {
        *to = from_float(T(), values[0]);
    }
}

template <class T>
__device__ const Bits<T>* row_of(const void* data, int64_t row) {
    return static_cast<const Bits<T>*>(data) + row;
}

// `work(row, run)` for every `step`-th row from `begin` on, with the loads of `Ahead` rows under way.
template <class T, int W, int Ahead, class Work>
__device__ void rows_of(const Bits<T>* x, int channels, int begin, int end, int step, Work work) {
    int row = begin;
    for (; row + (Ahead - 1) * step < end; row += Ahead * step) {
        Run<T, W> ahead[Ahead];
#pragma unroll
        for (int i = 0; i < Ahead; ++i) ahead[i].load(x + (row + i * step) * channels);
#pragma unroll
        for (int i = 0; i < Ahead; ++i) work(row + i * step, ahead[i]);
    }
    for (; row < end; row += step) {
        Run<T, W> run;
        run.load(x + row * channels);
        work(row, run);
    }
}

// Mean and sum of squared distances from it, of every group of `size` channels from x's first on, over rows
// [begin, end): `take(group, mean, squares)` in one thread each. `seen(row, run, loaded)` is told of every load. Sums
// are of distances from the first value that a thread sees (Chan et al. 1983 on how they join). `scratch` is shared.
template <class T, int W, class Seen, class Take>
__device__ void statistics(const Args& a, const Tiling& tiling, const Bits<T>* x, const Bits<T>* add, int begin,
                           int end, float* scratch, Seen seen, Take take) {
    const int size = a.channels / a.groups, column = threadIdx.x % tiling.across, down = threadIdx.x / tiling.across;
    float* const means = scratch;  // [down, channels]
    float* const squares = scratch + tiling.down * tiling.channels;
    for (int run = column; down < tiling.down && run < tiling.runs; run += tiling.across) {
        const int first = run * W;
        float origin[W], sum[W], square[W];
        if (begin + down < end) {
            Run<T, W> top;
            top.load(x + (begin + down) * a.channels + first);
            top.unpacked(origin);
        }
#pragma unroll
        for (int i = 0; i < W; ++i) sum[i] = square[i] = 0;
        int count = 0;
        rows_of<T, W, 4>(x + first, a.channels, begin + down, end, tiling.down, [&](int row, const Run<T, W>& loaded) {
            float values[W];
            loaded.unpacked(values);
            seen(row, run, loaded);
            ++count;
#pragma unroll
            for (int i = 0; i < W; ++i) {
                const float distance = values[i] - origin[i];
                sum[i] += distance;
                square[i] += distance * distance;
            }
        });
        const float share = count ? __fdividef(1.0f, static_cast<float>(count)) : 0.0f;
#pragma unroll
        for (int i = 0; i < W; ++i) {
            const int at = down * tiling.channels + first + i;
            means[at] = count ? origin[i] + sum[i] * share : 0.0f;
            squares[at] = square[i] - sum[i] * sum[i] * share;
        }
    }
    __syncthreads();
    // Rows that lay side by side, channel by channel, into the first of them.
    const int rows = end - begin, whole = rows / tiling.down, rest = rows % tiling.down;
    for (int c = threadIdx.x; c < tiling.channels; c += kThreads) {
        const float origin = means[c];
        float sum = 0, square = 0;
        for (int r = 0; r < tiling.down && r < rows; ++r) {
            const float count = static_cast<float>(whole + (r < rest));
            const float distance = means[r * tiling.channels + c] - origin;
            sum += count * distance;
            square += squares[r * tiling.channels + c] + count * distance * distance;
        }
        const float share = __fdividef(sum, static_cast<float>(rows));
        means[c] = origin + share + (add ? to_float(T(), add[c]) : 0.0f);
        squares[c] = square - sum * share;
    }
    __syncthreads();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int g = warp; g < tiling.channels / size; g += kWarps) {
        float sum = 0, square = 0;
        for (int i = lane; i < size; i += 32) sum += means[g * size + i];
        const float mean = __fdividef(sum_over_warp(sum), static_cast<float>(size));
        for (int i = lane; i < size; i += 32) {
            const float distance = means[g * size + i] - mean;
            square += squares[g * size + i] + static_cast<float>(rows) * distance * distance;
        }
        square = sum_over_warp(square);
        if (lane == 0) take(g, mean, square);
    }
}

// y * erfc(-y / sqrt(2)) / 2 by Abramowitz & Stegun 1964, 7.1.26, to 3e-7 of y: a fraction of erff's instructions.
__device__ inline float gelu(float y) {
    const float x = 0.70710678f * fabsf(y), t = __fdividef(1.0f, 1 + 0.3275911f * x);
    const float tail = -0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f));
    // Half of erfc(x): nothing cancels where y is below 0.
    const float beyond = 0.5f * t * (0.254829592f + t * tail) * exp2_fast(x * x * -1.44269504f);
    return y * (y < 0 ? beyond : 1 - beyond);
}

template <int kActivation>
__device__ float activated(float y) {
    if (kActivation == SHOW1_ACTIVATION_SILU) return __fdividef(y, 1 + exp2_fast(y * -1.44269504f));
    return kActivation == SHOW1_ACTIVATION_GELU ? gelu(y) : y;
}

// What a run of channels is multiplied by and what is added then: all but the activation in one multiply-add.
template <class T, int W>
struct Affine {
    Run<T, W> weight, bias, add, scale, shift;
    bool adds, modulates;

    __device__ void load(const Args& a, int n, int channel) {
        adds = a.add, modulates = a.scale;
        weight.load(row_of<T>(a.weight, channel));
        bias.load(row_of<T>(a.bias, channel));
        if (adds) add.load(row_of<T>(a.add, n / a.repeat * a.add_row + channel));
        if (modulates) {
            scale.load(row_of<T>(a.scale, n / a.repeat * a.modulation_row + channel));
            shift.load(row_of<T>(a.shift, n / a.repeat * a.modulation_row + channel));
        }
    }
    // The run begins at channel `first` of those whose groups, of `size` channels, have these `means` and `factors`.
    __device__ void resolve(const float* means, const float* factors, int first, int size, float (&factor)[W],
                            float (&offset)[W]) const {
        float values[W];
        weight.unpacked(factor);
        bias.unpacked(offset);
        if (adds) add.unpacked(values);
#pragma unroll
        for (int i = 0; i < W; ++i) {
            const int g = (first + i) / size;
            factor[i] *= factors[g];
            offset[i] += ((adds ? values[i] : 0.0f) - means[g]) * factor[i];
        }
        if (!modulates) return;
        scale.unpacked(values);
#pragma unroll
        for (int i = 0; i < W; ++i) {
            factor[i] *= 1 + values[i];
            offset[i] *= 1 + values[i];
        }
        shift.unpacked(values);
#pragma unroll
        for (int i = 0; i < W; ++i) offset[i] += values[i];
    }
};

template <class T, int W, int kActivation>
__device__ void write_run(Bits<T>* to, const Run<T, W>& run, const float (&factor)[W], const float (&offset)[W]) {
    float values[W];
    run.unpacked(values);
#pragma unroll
    for (int i = 0; i < W; ++i) values[i] = activated<kActivation>(values[i] * factor[i] + offset[i]);
    store_run<T, W>(to, values);
}

__device__ inline float inverse_deviation(float squares, float count, float eps) {
    return __fdiv_rn(1.0f, __fsqrt_rn(__fdividef(squares, count) + eps));
}

// First of two kernels: statistics of one part of the rows of one batch row, by group.
template <class T, int W>
__global__ void __launch_bounds__(kThreads, kTogether) parts_kernel(Args a, Tiling tiling, int parts, int per_part) {
    const int n = blockIdx.x / parts, part = blockIdx.x % parts;
    const int begin = part * per_part;
    const Bits<T>* const x = row_of<T>(a.x, static_cast<int64_t>(n) * a.rows * a.channels);
    const Bits<T>* const add = a.add ? row_of<T>(a.add, n / a.repeat * a.add_row) : nullptr;
    float* const to = a.partials + (static_cast<int64_t>(n) * parts + part) * a.groups * 2;
    statistics<T, W>(
        a, tiling, x, add, begin, min(begin + per_part, a.rows), shared_memory<float>(),
        [](int, int, const Run<T, W>&) {},
        [&](int g, float mean, float squares) {
            to[2 * g] = mean;
            to[2 * g + 1] = squares;
        });
}

// Second: joins the parts and writes a piece of the rows.
template <class T, int W, int kActivation>
__global__ void __launch_bounds__(kThreads, kTogether)
    out_kernel(Args a, Tiling tiling, int parts, int per_part, int blocks, int per_block) {
    const int n = blockIdx.x / blocks, begin = blockIdx.x % blocks * per_block, end = min(begin + per_block, a.rows);
    const int size = a.channels / a.groups;
    const int column = threadIdx.x % tiling.across, down = threadIdx.x / tiling.across;
    Affine<T, W> affine;
    affine.load(a, n, column * W);  // under way while the parts are joined
    float* const means = shared_memory<float>();
    float* const factors = means + a.groups;
    float* const sums = factors + a.groups;  // [kWarps, groups]
    float* const squares = sums + kWarps * a.groups;
    const float* const from = a.partials + static_cast<int64_t>(n) * parts * a.groups * 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int g = lane; g < a.groups; g += 32) {
        const float origin = from[2 * g];
        float sum = 0, square = 0;
#pragma unroll 2
        for (int part = warp; part < parts; part += kWarps) {
            const float* const one = from + (part * a.groups + g) * 2;
            const float count = static_cast<float>(min(per_part, a.rows - part * per_part)) * size;
            const float distance = one[0] - origin;
            sum += count * distance;
            square += one[1] + count * distance * distance;
        }
        sums[warp * a.groups + g] = sum;
        squares[warp * a.groups + g] = square;
    }
    __syncthreads();
    for (int g = threadIdx.x; g < a.groups; g += kThreads) {
        float sum = 0, square = 0;
        for (int w = 0; w < kWarps; ++w) {
            sum += sums[w * a.groups + g];
            square += squares[w * a.groups + g];
        }
        const float count = static_cast<float>(a.rows) * size, share = __fdividef(sum, count);
        means[g] = from[2 * g] + share;
        factors[g] = inverse_deviation(fmaxf(square - sum * share, 0.0f), count, a.eps);
    }
    __syncthreads();
    if (down >= tiling.down) return;
    const int64_t row = static_cast<int64_t>(n) * a.rows * a.channels;
    const Bits<T>* const x = row_of<T>(a.x, row);
    Bits<T>* const out = static_cast<Bits<T>*>(a.out) + row;
    constexpr int kAhead = kActivation == SHOW1_ACTIVATION_GELU ? 2 : 4;  // as many as registers allow
    for (int run = column; run < tiling.runs; run += tiling.across) {
        const int first = run * W;
        float factor[W], offset[W];
        if (run != column) affine.load(a, n, first);
        affine.resolve(means, factors, first, size, factor, offset);
        const auto write = [&](int r, const Run<T, W>& loaded) {
            write_run<T, W, kActivation>(out + r * a.channels + first, loaded, factor, offset);
        };
        rows_of<T, W, kAhead>(x + first, a.channels, begin + down, end, tiling.down, write);
    }
}

// Both in one where the rows of some groups fit into shared memory: x is read once.
template <class T, int W, int kActivation>
__global__ void __launch_bounds__(kThreads, kTogether) small_kernel(Args a, Tiling tiling, int slices) {
    const int n = blockIdx.x / slices, slice = blockIdx.x % slices, begin = slice * tiling.channels;
    const int size = a.channels / a.groups, groups = tiling.channels / size;
    const int column = threadIdx.x % tiling.across, down = threadIdx.x / tiling.across;
    Affine<T, W> affine;
    affine.load(a, n, begin + column * W);
    uint4* const kept = shared_memory<uint4>();  // [rows, runs]
    float* const means = reinterpret_cast<float*>(kept + a.rows * tiling.runs);
    float* const factors = means + groups;
    const int64_t row = static_cast<int64_t>(n) * a.rows * a.channels + begin;
    const Bits<T>* const add = a.add ? row_of<T>(a.add, n / a.repeat * a.add_row + begin) : nullptr;
    statistics<T, W>(
        a, tiling, row_of<T>(a.x, row), add, 0, a.rows, factors + groups,
        [&](int r, int run, const Run<T, W>& loaded) { kept[r * tiling.runs + run] = loaded.piece; },
        [&](int g, float mean, float squares) {
            means[g] = mean;
            factors[g] = inverse_deviation(fmaxf(squares, 0.0f), static_cast<float>(a.rows) * size, a.eps);
        });
    __syncthreads();
    if (down >= tiling.down) return;
    float factor[W], offset[W];
    affine.resolve(means, factors, column * W, size, factor, offset);
    Bits<T>* const out = static_cast<Bits<T>*>(a.out) + row + column * W;
    for (int r = down; r < a.rows; r += tiling.down)
        write_run<T, W, kActivation>(out + r * a.channels, Run<T, W>{kept[r * tiling.runs + column]}, factor, offset);
}

inline int pieces(int count, int size) { return (count + size - 1) / size; }

// Channels of a block of the small kernel, whole groups; 0 where it does not fit, or would keep less than a quarter of
// the card busy.
inline int slice_channels(const Args& a, int multiprocessors) {
    const int size = a.channels / a.groups;
    for (int groups = 1; groups <= a.groups; groups *= 2) {
        if (a.groups % groups || groups * size % 8) continue;
        const Tiling tiling = Tiling::of<8>(groups * size);
        if (tiling.runs > kThreads) return 0;
        const int64_t bytes = 2LL * a.rows * tiling.channels + sizeof(float) * (2LL * groups + tiling.scratch());
        const int64_t blocks = int64_t{a.batch} * (a.groups / groups);
        return bytes <= kSmallBytes && blocks >= multiprocessors / 4 ? tiling.channels : 0;
    }
    return 0;
}

template <class T, int W, int kActivation>
cudaError_t run_as(const Args& a, cudaStream_t stream) {
    Device device;
    cudaError_t error = device.query();
    if (error != cudaSuccess) return error;
    if constexpr (W == 8) {
        if (const int channels = slice_channels(a, device.multiprocessors)) {
            const Tiling tiling = Tiling::of<W>(channels);
            const int groups = channels / (a.channels / a.groups), slices = a.groups / groups;
            const int bytes = 2 * a.rows * channels + static_cast<int>(sizeof(float)) * (2 * groups + tiling.scratch());
            return launch(small_kernel<T, W, kActivation>, a.batch * slices, kThreads, bytes, stream, a, tiling,
                          slices);
        }
    }
    const Tiling tiling = Tiling::of<W>(a.channels);
    // As many parts as keep the card busy and give every thread some rows; none is empty, and the blocks are no more
    // than a whole number of waves: one more would run alone.
    const int64_t wave = kTogether * device.multiprocessors;
    const auto split = [&](int64_t blocks, int64_t at_most) {
        const int64_t wanted = std::min<int64_t>(blocks / a.batch, pieces(a.rows, 2 * tiling.down));
        return pieces(a.rows, static_cast<int>(std::min(std::max<int64_t>(wanted, 1), at_most)));
    };
    const int per_part = split(2 * wave, SHOW1_NORM_PARTS), parts = pieces(a.rows, per_part);
    const int bytes = static_cast<int>(sizeof(float)) * tiling.scratch();
    error = launch(parts_kernel<T, W>, a.batch * parts, kThreads, bytes, stream, a, tiling, parts, per_part);
    if (error != cudaSuccess) return error;
    const int64_t by_size = 2LL * a.batch * a.rows * a.channels / kBlockBytes / wave * wave, most = kMostWaves * wave;
    const int per_block = split(std::min(std::max(by_size, wave), most), most), blocks = pieces(a.rows, per_block);
    const int joined = static_cast<int>(sizeof(float)) * (2 + 2 * kWarps) * a.groups;
    return launch(out_kernel<T, W, kActivation>, a.batch * blocks, kThreads, joined, stream, a, tiling, parts, per_part,
                  blocks, per_block);
}

template <class T, int W>
cudaError_t run(const Args& a, cudaStream_t stream) {
    switch (a.activation) {
        case SHOW1_ACTIVATION_SILU: return run_as<T, W, SHOW1_ACTIVATION_SILU>(a, stream);
        case SHOW1_ACTIVATION_GELU: return run_as<T, W, SHOW1_ACTIVATION_GELU>(a, stream);
        default: return run_as<T, W, SHOW1_ACTIVATION_NONE>(a, stream);
    }
}

template <class T>
cudaError_t run_by_width(const Args& a, cudaStream_t stream) {
    const bool wide =
        group_norm_aligned(a, 16) && a.channels % 8 == 0 && a.add_row % 8 == 0 && a.modulation_row % 8 == 0;
    return wide ? run<T, 8>(a, stream) : run<T, 1>(a, stream);
}

}  // namespace
}  // namespace show1

int show1_group_norm(const show1_group_norm_args* args, show1_stream stream) {
    using namespace show1;
    if (!group_norm_accepts(args)) return SHOW1_INVALID;
    return args->dtype == SHOW1_FLOAT16 ? run_by_width<Float16>(*args, stream) : run_by_width<BFloat16>(*args, stream);
}
