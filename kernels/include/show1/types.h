// What the kernels' headers share. C and C++; no CUDA header is needed to include them.
//
// Every function exists twice under one signature: `show1_<name>` runs on the GPU (device pointers, asynchronous on
// `stream`, can be captured into a CUDA graph) and `show1_<name>_ref` is its plain C++ reference on the CPU (host
// pointers). Both return SHOW1_OK or a cudaError_t; after an error nothing has been written.
#ifndef SHOW1_TYPES_H
#define SHOW1_TYPES_H

#include <stdint.h>

#ifdef __cplusplus
#define SHOW1_C extern "C"
#else
#define SHOW1_C
#endif
#ifdef _WIN32
#define SHOW1_API SHOW1_C __declspec(dllexport)
#else
#define SHOW1_API SHOW1_C __attribute__((visibility("default")))
#endif

// Raised when a signature or structure in these headers changes, here and in runtime/kernels.py.
#define SHOW1_ABI 2

// The SHOW1_ABI that a library was built with, whichever of the libraries it is.
SHOW1_API int show1_abi(void);

enum {
    SHOW1_OK = 0,
    SHOW1_INVALID = 1,  // cudaErrorInvalidValue: a null pointer, or a size, mode or dtype outside what is documented
};

// How a tensor stores its elements.
enum {
    SHOW1_FLOAT16 = 0,
    SHOW1_BFLOAT16 = 1,
    SHOW1_FLOAT32 = 2,
};

// cudaStream_t by its real name; null is the default stream.
typedef struct CUstream_st* show1_stream;

// Planes of adjacent pixels (H*W of them), e.g. a clip [B, C, F, H, W] or frames [B*F, C, H, W]: where plane
// (b, c, f) begins. Strides count elements.
typedef struct {
    void* data;
    int64_t batch, channel, frame;
} show1_planes;

#endif
