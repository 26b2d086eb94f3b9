// All that the kernels use of CUDA beyond its C++ dialect. tests/cuda_on_cpu/device.cuh defines the same names for a
// plain C++ compiler, so that the kernels' own code is tested where there is no GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace show1 {

constexpr unsigned kWholeWarp = 0xffffffffu;

// ---- Element types. `Bits` is how one element lies in memory; two of half precision make a 32-bit word.

struct Float16 {
    using Bits = uint16_t;
};
struct BFloat16 {
    using Bits = uint16_t;
};
struct Float32 {
    using Bits = float;
};

__device__ inline float to_float(Float16, uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline float to_float(BFloat16, uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
__device__ inline float to_float(Float32, float value) { return value; }

__device__ inline uint16_t from_float(Float16, float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ inline uint16_t from_float(BFloat16, float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline float from_float(Float32, float x) { return x; }

__device__ inline float2 unpack(Float16, uint32_t word) { return __half22float2(reinterpret_cast<__half2&>(word)); }
__device__ inline float2 unpack(BFloat16, uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}

__device__ inline uint32_t pack(Float16, float x, float y) {
    const __half2 pair = __floats2half2_rn(x, y);
    return reinterpret_cast<const uint32_t&>(pair);
}
__device__ inline uint32_t pack(BFloat16, float x, float y) {  // before sm_80 cuda_bf16.h does this in software
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return reinterpret_cast<const uint32_t&>(pair);
}

// ---- Instructions

// 2^x to 2 ulp, denormal results flushed: what a softmax needs.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Start a copy of 16 bytes, both sides aligned, into shared memory. `copies_landed` waits for the calling thread's own.
__device__ inline void copy16(void* shared, const void* global) {
#if __CUDA_ARCH__ >= 800
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
#else
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#endif
}

__device__ inline void copies_landed() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// c[16, 8] += a[16, 16] * b[16, 8] by one warp (PTX ISA, mma.m16n8k16). With g = lane / 4 and t = lane % 4 a lane holds
//   a[0..3]  (row g, k 2t..), (row g + 8, k 2t..), (row g, k 2t + 8..), (row g + 8, k 2t + 8..), two elements each
//   b[0..1]  (k 2t.., column g), (k 2t + 8.., column g), two elements each
//   c[0..3]  (row g, columns 2t, 2t + 1), (row g + 8, columns 2t, 2t + 1)
__device__ inline void mma(Float16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; ++half)  // Turing has half the depth
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}

__device__ inline void mma(BFloat16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();  // Turing has none; the launchers choose other kernels there
#endif
}

// Dynamic shared memory of the block, 16-byte aligned.
template <class T>
__device__ T* shared_memory() {
    extern __shared__ uint4 block_memory[];
    return reinterpret_cast<T*>(block_memory);
}

// ---- Launching

// What a launcher asks about the current device.
struct Device {
    int compute_capability = 0;  // 75, 80, ..
    int shared_bytes = 0;        // most that one block may have
    int multiprocessors = 0;

    cudaError_t query() {
        int device = 0, major = 0, minor = 0;
        cudaError_t error = cudaGetDevice(&device);
        if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
        if (!error) error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
        if (!error) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
        compute_capability = 10 * major + minor;
        return error;
    }
};

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
    if (shared_bytes > 48 * 1024) {  // more than every card gives unasked
        Device device;  // its limit, always the same: a thread that needs less must not lower another's
        cudaError_t error = device.query();
        if (!error)
            error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes);
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace show1
