// The names of kernels/src/cuda/device.cuh for a plain C++ compiler: it runs the kernels' own code on the CPU, to test
// their indexing, masking and barriers where there is no GPU. It says nothing about speed.
//
// The threads of a block are coroutines that run from one synchronisation to the next, in an order shuffled anew for
// every block; shared memory begins as NaN between guard zones, and asynchronous copies land as late as allowed. So a
// missing barrier, a barrier that not all threads reach, a read of shared memory nobody wrote and a write beside it
// show as wrong results or as an error from `launch`.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "reference.h"

#define __device__
#define __host__
#define __global__
#define __launch_bounds__(...)

using cudaStream_t = show1_stream;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorIllegalAddress = 700,
                      cudaErrorLaunchFailure = 719;

struct float2 {
    float x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace show1 {
namespace emulated {

struct Barrier {
    int arrived = 0, generation = 0;
};

struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(128 * 1024);
    bool done;
    std::vector<std::pair<void*, const void*>> copies;  // under way: to, from
};

struct Warp {
    Barrier barrier;
    uint32_t shared[32][6];  // what lanes show one another
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barrier;
    std::vector<uint4> shared;
    ucontext_t scheduler;
    bool progress;  // in this round over the threads
    std::function<void()> body;
};
inline Block block;

inline Thread& self() { return block.threads[threadIdx.x]; }
inline Warp& warp() { return block.warps[threadIdx.x / 32]; }

inline void wait(Barrier& barrier, int expected) {
    block.progress = true;
    const int generation = barrier.generation;
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    const unsigned own = threadIdx.x;
    while (barrier.generation == generation) {
        swapcontext(&self().context, &block.scheduler);
        threadIdx.x = own;
    }
}

inline void warp_barrier() { wait(warp().barrier, 32); }

inline void run_thread() {
    block.body();
    self().done = true;
    block.progress = true;
}

inline bool run_block() {
    const unsigned count = blockDim.x;
    std::vector<unsigned> order(count);
    for (unsigned i = 0; i < count; ++i) {
        order[i] = i;
        Thread& thread = block.threads[i];
        thread.done = false;
        thread.copies.clear();
        getcontext(&thread.context);
        thread.context.uc_stack = {thread.stack.data(), 0, thread.stack.size()};
        thread.context.uc_link = &block.scheduler;
        makecontext(&thread.context, run_thread, 0);
    }
    block.warps.assign((count + 31) / 32, {});
    block.barrier = {};
    std::shuffle(order.begin(), order.end(), std::minstd_rand(blockIdx.x + 1));
    for (bool running = true; running;) {
        running = block.progress = false;
        for (unsigned i : order) {
            if (block.threads[i].done) continue;
            running = true;
            threadIdx.x = i;
            swapcontext(&block.scheduler, &block.threads[i].context);
        }
        if (running && !block.progress) return false;  // a barrier that some threads never reach
    }
    return true;
}

}  // namespace emulated

constexpr unsigned kWholeWarp = 0xffffffffu;

struct Float16 {
    using Bits = uint16_t;
};
struct BFloat16 {
    using Bits = uint16_t;
};
struct Float32 {
    using Bits = float;
};

inline float to_float(Float16, uint16_t bits) { return half_to_float(bits); }
inline float to_float(BFloat16, uint16_t bits) { return bfloat_to_float(bits); }
inline float to_float(Float32, float value) { return value; }
inline uint16_t from_float(Float16, float x) { return float_to_half(x); }
inline uint16_t from_float(BFloat16, float x) { return float_to_bfloat(x); }
inline float from_float(Float32, float x) { return x; }

template <class T>
float2 unpack(T, uint32_t word) {
    return {to_float(T(), static_cast<uint16_t>(word)), to_float(T(), static_cast<uint16_t>(word >> 16))};
}
template <class T>
uint32_t pack(T, float x, float y) {
    return from_float(T(), x) | static_cast<uint32_t>(from_float(T(), y)) << 16;
}

inline float exp2_fast(float x) { return std::exp2(x); }

inline void copy16(void* shared, const void* global) {
    if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16) std::abort();
    emulated::self().copies.emplace_back(shared, global);
}
inline void copies_landed() {
    for (const auto& copy : emulated::self().copies) std::memcpy(copy.first, copy.second, 16);
    emulated::self().copies.clear();
}

// A Turing card's memory, with the compute capability that SHOW1_EMULATED_CAPABILITY names.
struct Device {
    int compute_capability = 0, shared_bytes = 64 * 1024, multiprocessors = 68;

    cudaError_t query() {
        const char* const asked = std::getenv("SHOW1_EMULATED_CAPABILITY");
        compute_capability = asked ? std::atoi(asked) : 90;
        return cudaSuccess;
    }
};

template <class T>
void mma(T, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    Device device;
    device.query();
    if (std::is_same<T, BFloat16>() && device.compute_capability < 80) std::abort();  // a card traps
    auto& shown = emulated::warp().shared;
    const int lane = threadIdx.x % 32;
    std::copy_n(a, 4, shown[lane]);
    std::copy_n(b, 2, shown[lane] + 4);
    emulated::warp_barrier();
    const auto element = [&](int lane_of, int slot, int half) {
        const float2 both = unpack(T(), shown[lane_of][slot]);
        return half ? both.y : both.x;
    };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k)
            c[i] += element(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2) *
                    element(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    }
    emulated::warp_barrier();
}

constexpr int kGuard = 4;  // in units of 16 bytes, on either side of shared memory

template <class T>
T* shared_memory() {
    return reinterpret_cast<T*>(emulated::block.shared.data() + kGuard);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes, cudaStream_t,
                   const Arguments&... arguments) {
    if (blocks < 1 || threads % 32 || threads > 1024 || shared_bytes > Device().shared_bytes)
        return cudaErrorInvalidValue;
    auto& block = emulated::block;
    if (block.threads.size() < static_cast<size_t>(threads)) block.threads.resize(threads);
    block.body = [&] { kernel(static_cast<Parameters>(arguments)...); };
    gridDim.x = blocks;
    blockDim.x = threads;
    const uint4 poison = {~0u, ~0u, ~0u, ~0u};
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
        block.shared.assign((shared_bytes + 15) / 16 + 2 * kGuard, poison);
        if (!emulated::run_block()) return cudaErrorLaunchFailure;
        const char* const inside = shared_memory<char>();
        const char* const end = reinterpret_cast<const char*>(block.shared.data() + block.shared.size());
        const auto poisoned = [](char byte) { return byte == '\xff'; };
        if (!std::all_of(reinterpret_cast<const char*>(block.shared.data()), inside, poisoned) ||
            !std::all_of(inside + shared_bytes, end, poisoned))
            return cudaErrorIllegalAddress;
    }
    return cudaSuccess;
}

}  // namespace show1

inline void __syncthreads() { show1::emulated::wait(show1::emulated::block.barrier, blockDim.x); }
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    auto& shown = show1::emulated::warp().shared;
    std::memcpy(shown[threadIdx.x % 32], &value, sizeof value);
    show1::emulated::warp_barrier();
    std::memcpy(&value, shown[threadIdx.x % 32 ^ mask], sizeof value);
    show1::emulated::warp_barrier();
    return value;
}

inline uint32_t atomicAdd(uint32_t* to, uint32_t value) { return std::exchange(*to, *to + value); }
inline uint32_t atomicMin(uint32_t* to, uint32_t value) { return std::exchange(*to, std::min(*to, value)); }

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) result |= (bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

inline int min(int x, int y) { return std::min(x, y); }
inline float __uint_as_float(uint32_t bits) { return show1::from_bits(bits); }
inline uint32_t __float_as_uint(float x) { return show1::to_bits(x); }
inline float __int_as_float(int bits) { return show1::from_bits(static_cast<uint32_t>(bits)); }
inline int __float_as_int(float x) { return static_cast<int>(show1::to_bits(x)); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
