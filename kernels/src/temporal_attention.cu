// Three kernels, one meaning. Which one runs is decided at the bottom, by shape and alignment alone.
//
//   tensor cores  head_dim 64 (sr2), any frames: a warp per pixel and head, everything in registers
//   rows          5 or 8 frames (base, interp, sr1), 8 k heads of up to 32 channels side by side: a block stages 32
//                 heads of one pixel in shared memory as whole rows, then a thread works on one head
//   any           everything else
//
// README.md has the arithmetic behind this division.
#include "show1/temporal_attention.h"

#include <algorithm>
#include <device.cuh>
#include <type_traits>

#include "arguments.h"

namespace show1 {
namespace {

// A tensor of half-precision elements, addressed as show1_heads is.
struct Heads {
    uint16_t* data;
    int64_t batch, frame, pixel, head;

    explicit Heads(const show1_heads& x)
        : data(static_cast<uint16_t*>(x.data)), batch(x.batch), frame(x.frame), pixel(x.pixel), head(x.head) {}

    __device__ uint16_t* at(int b, int p, int h) const { return data + b * batch + p * pixel + h * head; }

    // Whether the first head lies on 16 bytes in every batch item, frame and pixel.
    bool aligned() const {
        return reinterpret_cast<uintptr_t>(data) % 16 == 0 && batch % 8 == 0 && frame % 8 == 0 && pixel % 8 == 0;
    }
};

struct Problem {
    Heads q, k, v, out;
    int batch, frames, pixels, heads, head_dim;
    float scale_log2;  // scale * log2(e): the softmax is taken to base 2
};

// ---- Tensor cores, head_dim 64. Frames are padded to 16 * M with zeros, which the softmax masks.
//
// A warp loads each operand of the mma straight from global memory in 16-byte pieces, because the order of the summed
// channels, and which channel is which column of the result, are free as long as both sides agree:
//   q, k  lane (g, t) loads channels 32 s + 8 t .. + 8 of frame g: rows of 64 bytes, the operands of two mma
//   v     lane (g, t) loads channels 8 g .. + 8 of frames 2 t, 2 t + 1, + 8, + 9: rows of 128 bytes. Channel 8 g + i is
//         column g of the i-th mma, so its result gives lane (g, t) channels 16 t .. + 16 of frame g: whole 16-byte
//         pieces again.

constexpr int kTensorCoreHeadDim = 64;
constexpr int kWarpsPerBlock = 4;

__device__ uint4 load16(const uint16_t* row, bool inside) {
    return inside ? *reinterpret_cast<const uint4*>(row) : uint4{0, 0, 0, 0};
}

// The i-th of the 8 elements in each of two registers, side by side.
__device__ uint32_t pair(const uint4& low, const uint4& high, int i) {
    const uint32_t* const a = &low.x;
    const uint32_t* const b = &high.x;
    return __byte_perm(a[i / 2], b[i / 2], i % 2 ? 0x7632 : 0x5410);
}

template <class T, int M>
__global__ void __launch_bounds__(32 * kWarpsPerBlock) tensor_core_kernel(Problem x) {
    const int item = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (item >= x.batch * x.pixels * x.heads) return;
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int h = item % x.heads, p = item / x.heads % x.pixels, b = item / x.heads / x.pixels;
    const uint16_t* const q = x.q.at(b, p, h) + 8 * t;
    const uint16_t* const k = x.k.at(b, p, h) + 8 * t;
    const uint16_t* const v = x.v.at(b, p, h) + 8 * g;
    uint16_t* const out = x.out.at(b, p, h) + 16 * t;

    uint4 keys[2 * M][2];
#pragma unroll
    for (int n = 0; n < 2 * M; ++n)
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const int frame = 8 * n + g;
            keys[n][s] = load16(k + frame * x.k.frame + 32 * s, frame < x.frames);
        }
    uint32_t values[M][8][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
        uint4 rows[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int frame = 16 * m + 2 * t + r % 2 + r / 2 * 8;
            rows[r] = load16(v + frame * x.v.frame, frame < x.frames);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            values[m][i][0] = pair(rows[0], rows[1], i);
            values[m][i][1] = pair(rows[2], rows[3], i);
        }
    }

    uint4 queries[2][2];  // of 16 queries: frames 16 m + g and + 8 in this lane
    const auto load_queries = [&](int m) {
#pragma unroll
        for (int row = 0; row < 2; ++row)
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                const int frame = 16 * m + 8 * row + g;
                queries[row][s] = load16(q + frame * x.q.frame + 32 * s, frame < x.frames);
            }
    };
    constexpr bool kAhead = M < 4;  // the next tile's queries under way while this one is computed; else no room
    if (kAhead) load_queries(0);

#pragma unroll
    for (int m = 0; m < M; ++m) {
        if (!kAhead) load_queries(m);
        float scores[2 * M][4] = {};
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const uint4 first = queries[0][s], second = queries[1][s];
#pragma unroll
            for (int n = 0; n < 2 * M; ++n) {
                mma(T(), scores[n], {first.x, second.x, first.y, second.y}, {keys[n][s].x, keys[n][s].y});
                mma(T(), scores[n], {first.z, second.z, first.w, second.w}, {keys[n][s].z, keys[n][s].w});
            }
        }

        if (kAhead && m + 1 < M) load_queries(m + 1);

        float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll
        for (int n = 0; n < 2 * M; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (8 * n + 2 * t + i % 2 >= x.frames) scores[n][i] = -INFINITY;
                largest[i / 2] = fmaxf(largest[i / 2], scores[n][i]);
            }
#pragma unroll
        for (int row = 0; row < 2; ++row) {  // a row of scores lies in the 4 lanes of equal g
            largest[row] = fmaxf(largest[row], __shfl_xor_sync(kWholeWarp, largest[row], 1));
            largest[row] = fmaxf(largest[row], __shfl_xor_sync(kWholeWarp, largest[row], 2));
        }
        uint32_t weights[2 * M][2];
#pragma unroll
        for (int n = 0; n < 2 * M; ++n)
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                const float first = exp2_fast((scores[n][2 * row] - largest[row]) * x.scale_log2);
                const float second = exp2_fast((scores[n][2 * row + 1] - largest[row]) * x.scale_log2);
                sum[row] += first + second;
                weights[n][row] = pack(T(), first, second);
            }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            sum[row] += __shfl_xor_sync(kWholeWarp, sum[row], 1);
            sum[row] += __shfl_xor_sync(kWholeWarp, sum[row], 2);
        }

        float result[8][4] = {};
#pragma unroll
        for (int n = 0; n < M; ++n)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const auto &low = weights[2 * n], &high = weights[2 * n + 1];
                mma(T(), result[i], {low[0], low[1], high[0], high[1]}, values[n][i]);
            }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int frame = 16 * m + 8 * row + g;
            if (frame >= x.frames) continue;
            const float share = __fdividef(1, sum[row]);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t words[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int at = 2 * row + half;
                    words[i] = pack(T(), result[2 * i][at] * share, result[2 * i + 1][at] * share);
                }
                const uint4 piece = {words[0], words[1], words[2], words[3]};
                *reinterpret_cast<uint4*>(out + frame * x.out.frame + 8 * half) = piece;
            }
        }
    }
}

// ---- Rows. Shared memory holds 3 * F rows (q, k, v of each frame) of 32 heads side by side as they lie in global
// memory. A thread has one head and F / G queries; the results replace its q and leave as whole rows again.
//
// It goes through the channels two at a time, as one 32-bit word per row: registers hold scores or weights only, so
// head_dim is free. Two arrangements of the words:
//   odd head_dim     every second head begins inside a word, whose other half belongs to a neighbour: masked out
//   head_dim % 4 = 0 (12, 20) heads h and h + 16 would meet in one bank: the upper half warp swaps neighbouring words

constexpr int kHeadsPerBlock = 32;
constexpr int kRowsMaxHeadDim = 32;

__host__ __device__ constexpr int row_bytes(int head_dim) { return kHeadsPerBlock * head_dim * 2; }

template <class T, int F, int G, bool kOdd>
__global__ void __launch_bounds__(32 * G) rows_kernel(Problem x) {
    constexpr int kQueries = F / G;
    uint32_t* const shared = shared_memory<uint32_t>();
    const int row_words = row_bytes(x.head_dim) / 4;
    const int groups = (x.heads + kHeadsPerBlock - 1) / kHeadsPerBlock;
    const int first_head = blockIdx.x % groups * kHeadsPerBlock;
    const int p = blockIdx.x / groups % x.pixels, b = blockIdx.x / groups / x.pixels;
    const int heads = min(kHeadsPerBlock, x.heads - first_head);
    const int pieces = heads * x.head_dim / 8;  // of 16 bytes, in one row

    const uint16_t* const inputs[3] = {x.q.at(b, p, first_head), x.k.at(b, p, first_head), x.v.at(b, p, first_head)};
    const int64_t frames[3] = {x.q.frame, x.k.frame, x.v.frame};
#pragma unroll 1
    for (int i = threadIdx.x; i < pieces; i += 32 * G)
#pragma unroll
        for (int r = 0; r < 3 * F; ++r)
            copy16(shared + r * row_words + 4 * i, inputs[r / F] + r % F * frames[r / F] + 8 * i);
    copies_landed();
    __syncthreads();

    const int head = threadIdx.x % 32;
    if (head < heads) {
        const int begin = head * x.head_dim, end = begin + x.head_dim;  // in elements of a row
        const int first_word = begin / 2, words = (end + 1) / 2 - first_word;
        const int swap = !kOdd && x.head_dim % 4 == 0 && head >= 16;
        uint32_t* const queries = shared + threadIdx.x / 32 * kQueries * row_words + first_word;
        const uint32_t* const keys = shared + F * row_words + first_word;
        const uint32_t* const values = keys + F * row_words;
        const auto own = [&](int word) -> uint32_t {  // which halves of a word are this head's
            if (!kOdd) return 0xffffffffu;
            const int low = 2 * (first_word + word);
            return (low >= begin ? 0xffffu : 0) | (low + 1 < end ? 0xffff0000u : 0);
        };

        float weights[kQueries][F] = {};
        for (int w = 0; w < words; ++w) {
            const int word = w ^ swap;
            float2 query[kQueries];
#pragma unroll
            for (int i = 0; i < kQueries; ++i) query[i] = unpack(T(), queries[i * row_words + word] & own(word));
#pragma unroll
            for (int j = 0; j < F; ++j) {
                const float2 key = unpack(T(), keys[j * row_words + word] & own(word));
#pragma unroll
                for (int i = 0; i < kQueries; ++i)
                    weights[i][j] = fmaf(query[i].y, key.y, fmaf(query[i].x, key.x, weights[i][j]));
            }
        }
#pragma unroll
        for (int i = 0; i < kQueries; ++i) {
            float largest = weights[i][0], sum = 0;
#pragma unroll
            for (int j = 1; j < F; ++j) largest = fmaxf(largest, weights[i][j]);
#pragma unroll
            for (int j = 0; j < F; ++j)
                sum += weights[i][j] = exp2_fast((weights[i][j] - largest) * x.scale_log2);
            const float share = __fdividef(1, sum);
#pragma unroll
            for (int j = 0; j < F; ++j) weights[i][j] *= share;
        }
        for (int w = 0; w < words; ++w) {
            const int word = w ^ swap;
            float2 value[F];
#pragma unroll
            for (int j = 0; j < F; ++j) value[j] = unpack(T(), values[j * row_words + word]);
            uint32_t packed[kQueries];
#pragma unroll
            for (int i = 0; i < kQueries; ++i) {
                float2 result = {0, 0};
#pragma unroll
                for (int j = 0; j < F; ++j) {
                    result.x = fmaf(weights[i][j], value[j].x, result.x);
                    result.y = fmaf(weights[i][j], value[j].y, result.y);
                }
                packed[i] = pack(T(), result.x, result.y);
            }
            uint32_t* const place = queries + word;
            if (own(word) == 0xffffffffu) {
#pragma unroll
                for (int i = 0; i < kQueries; ++i) place[i * row_words] = packed[i];
            } else {  // the other half is a neighbour's, who may be writing it now
                const int half = own(word) != 0xffffu;
#pragma unroll
                for (int i = 0; i < kQueries; ++i)
                    reinterpret_cast<uint16_t*>(place + i * row_words)[half] =
                        static_cast<uint16_t>(packed[i] >> 16 * half);
            }
        }
    }

    __syncthreads();
    uint16_t* const row = x.out.at(b, p, first_head);
#pragma unroll 1
    for (int i = threadIdx.x; i < pieces; i += 32 * G)
#pragma unroll
        for (int f = 0; f < F; ++f)
            *reinterpret_cast<uint4*>(row + f * x.out.frame + 8 * i) =
                *reinterpret_cast<const uint4*>(shared + f * row_words + 4 * i);
}

// ---- Any shape. A block has some heads of one pixel: k and v stay in shared memory, queries pass in tiles.

constexpr int kAnyThreads = 128;
constexpr int kQueryTile = 16;

// Shared memory of one head; rows of k have one word more than they need, against bank conflicts.
__host__ __device__ constexpr int any_row(int head_dim) { return (head_dim + 1) / 2 * 2 + 2; }
__host__ __device__ constexpr int any_bytes(int frames, int head_dim) {
    const int tile = frames < kQueryTile ? frames : kQueryTile;
    return 4 * tile * frames + 2 * (2 * frames + tile) * any_row(head_dim);
}

template <class T>
__global__ void __launch_bounds__(kAnyThreads) any_kernel(Problem x, int heads_per_block) {
    const int frames = x.frames, dim = x.head_dim, row = any_row(dim);
    const int groups = (x.heads + heads_per_block - 1) / heads_per_block;
    const int first_head = blockIdx.x % groups * heads_per_block;
    const int p = blockIdx.x / groups % x.pixels, b = blockIdx.x / groups / x.pixels;
    const int heads = min(heads_per_block, x.heads - first_head);
    const int tile = min(frames, kQueryTile);
    float* const scores = shared_memory<float>();                                              // [head, query, key]
    uint16_t* const keys = reinterpret_cast<uint16_t*>(scores + heads_per_block * tile * frames);  // [head, key, row]
    uint16_t* const values = keys + heads_per_block * frames * row;
    uint16_t* const queries = values + heads_per_block * frames * row;  // [head, query, row]

    // `count` frames of one tensor into rows; channels vary fastest, then heads, as in memory.
    const auto stage = [&](uint16_t* rows, const Heads& from, int first_frame, int count) {
        for (int i = threadIdx.x; i < heads * count * dim; i += kAnyThreads) {
            const int c = i % dim, h = i / dim % heads, f = i / dim / heads;
            rows[(h * count + f) * row + c] = from.at(b, p, first_head + h)[(first_frame + f) * from.frame + c];
        }
    };
    stage(keys, x.k, 0, frames);
    stage(values, x.v, 0, frames);
    for (int first = 0; first < frames; first += tile) {
        const int count = min(tile, frames - first);
        stage(queries, x.q, first, count);
        __syncthreads();
        for (int i = threadIdx.x; i < heads * count * frames; i += kAnyThreads) {
            const int h = i / frames / count;
            const uint16_t* const query = queries + i / frames * row;
            const uint16_t* const key = keys + (h * frames + i % frames) * row;
            float score = 0;
            for (int c = 0; c < dim; ++c) score = fmaf(to_float(T(), query[c]), to_float(T(), key[c]), score);
            scores[i] = score;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < heads * count; i += kAnyThreads) {
            float* const score = scores + i * frames;
            float largest = -INFINITY, sum = 0;
            for (int j = 0; j < frames; ++j) largest = fmaxf(largest, score[j]);
            for (int j = 0; j < frames; ++j) sum += score[j] = exp2_fast((score[j] - largest) * x.scale_log2);
            const float share = __fdividef(1, sum);
            for (int j = 0; j < frames; ++j) score[j] *= share;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < heads * count * dim; i += kAnyThreads) {
            const int c = i % dim, h = i / dim % heads, f = i / dim / heads;
            const float* const weight = scores + (h * count + f) * frames;
            float result = 0;
            for (int j = 0; j < frames; ++j)
                result = fmaf(weight[j], to_float(T(), values[(h * frames + j) * row + c]), result);
            x.out.at(b, p, first_head + h)[(first + f) * x.out.frame + c] = from_float(T(), result);
        }
        // The next tile's queries go where no one reads now; its scores wait for the barrier after them.
    }
}

// ---- Choice

template <class T>
cudaError_t tensor_cores(const Problem& x, cudaStream_t stream) {
    void (*const kernels[])(Problem) = {tensor_core_kernel<T, 1>, tensor_core_kernel<T, 2>, tensor_core_kernel<T, 3>,
                                        tensor_core_kernel<T, 4>};
    const int items = x.batch * x.pixels * x.heads;
    const int blocks = (items + kWarpsPerBlock - 1) / kWarpsPerBlock;
    return launch(kernels[(x.frames - 1) / 16], blocks, 32 * kWarpsPerBlock, 0, stream, x);
}

// G: with 4 queries per thread, 8 frames need two warps' worth of threads; 5 frames are few enough for one.
template <class T, int F, int G>
cudaError_t rows(const Problem& x, cudaStream_t stream) {
    const int blocks = x.batch * x.pixels * ((x.heads + kHeadsPerBlock - 1) / kHeadsPerBlock);
    const int shared_bytes = 3 * F * row_bytes(x.head_dim);
    return launch(x.head_dim % 2 ? rows_kernel<T, F, G, true> : rows_kernel<T, F, G, false>, blocks, 32 * G,
                  shared_bytes, stream, x);
}

template <class T>
cudaError_t any(const Problem& x, cudaStream_t stream) {
    const int bytes = any_bytes(x.frames, x.head_dim);
    const int heads = std::min(x.heads, std::max(1, 16 * 1024 / bytes));
    const int blocks = x.batch * x.pixels * ((x.heads + heads - 1) / heads);
    return launch(any_kernel<T>, blocks, kAnyThreads, heads * bytes, stream, x, heads);
}

template <class T>
cudaError_t run(const Problem& x, cudaStream_t stream) {
    const auto all = [&](auto condition) {
        return condition(x.q) && condition(x.k) && condition(x.v) && condition(x.out);
    };
    Device device;
    const cudaError_t error = device.query();
    if (error != cudaSuccess) return error;

    const bool has_mma = device.compute_capability >= 80 || std::is_same<T, Float16>();
    const bool heads_aligned = all([](const Heads& y) { return y.aligned() && y.head % 8 == 0; });
    if (x.head_dim == kTensorCoreHeadDim && heads_aligned && has_mma) return tensor_cores<T>(x, stream);

    const bool rows_aligned = all([&](const Heads& y) { return y.aligned() && y.head == x.head_dim; });
    if (rows_aligned && x.heads % 8 == 0 && x.head_dim <= kRowsMaxHeadDim) {
        if (x.frames == 5) return rows<T, 5, 1>(x, stream);
        if (x.frames == 8) return rows<T, 8, 2>(x, stream);
    }
    return any<T>(x, stream);
}

}  // namespace
}  // namespace show1

int show1_temporal_attention(int dtype, const show1_heads* q, const show1_heads* k, const show1_heads* v,
                             const show1_heads* out, int batch, int frames, int pixels, int heads, int head_dim,
                             float scale, show1_stream stream) {
    using namespace show1;
    if (!temporal_attention_accepts(dtype, {q, k, v, out}, batch, frames, pixels, heads, head_dim, scale))
        return SHOW1_INVALID;
    constexpr float kLog2E = 1.44269504f;
    const Problem problem{Heads(*q), Heads(*k), Heads(*v), Heads(*out), batch,          frames,
                          pixels,    heads,     head_dim,  scale * kLog2E};
    return dtype == SHOW1_FLOAT16 ? run<Float16>(problem, stream) : run<BFloat16>(problem, stream);
}
