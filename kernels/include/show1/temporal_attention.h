// Self-attention of each pixel over the frames: out = softmax(q k^T * scale) v for every pixel and head
// (Vaswani et al. 2017, eq. 1), read and written where the neighbouring layers keep their tensors, so that nothing is
// permuted before or after.
//
//   in   q, k, v   float16 or bfloat16, element (b, f, p, h, c) at data[b*batch + f*frame + p*pixel + h*head + c]
//   out  out       the same dtype, addressed the same way with its own strides
//
// The `head_dim` channels of a head are adjacent; all other strides are free (counted in elements, negative or 0 too),
// so [B, F, H*W, C], [B*H*W, F, C] and a packed [.., 3C] are read in place. `out` may be q with q's strides; no other
// overlap is allowed, and elements of `out` may not overlap one another.
//
// Products, sums and the softmax are float32; between softmax and v the tensor-core kernel rounds the weights to the
// dtype, as plain half-precision attention does. Error against float64: at most twice that of plain half precision.
//
// Memory bound: 8 * batch * frames * pixels * heads * head_dim bytes (q, k, v read, out written) for frames / 4
// multiply-adds per byte. kernels/README.md says which of three kernels runs when, and where arithmetic takes over.
#ifndef SHOW1_TEMPORAL_ATTENTION_H
#define SHOW1_TEMPORAL_ATTENTION_H

#include "show1/types.h"

enum {
    SHOW1_MAX_FRAMES = 64,
    SHOW1_MAX_HEAD_DIM = 128,
};

// Where the heads of a [batch, frame, pixel, head, channel] tensor begin. Strides count elements.
typedef struct {
    void* data;
    int64_t batch, frame, pixel, head;
} show1_heads;

// SHOW1_INVALID unless the data pointers are set and aligned to 2 bytes, 1 <= frames <= 64, 1 <= head_dim <= 128, the
// other sizes are at least 1, their product fits 31 bits, 0 < scale < infinity (usually head_dim^-0.5), and dtype is
// float16 or bfloat16.
SHOW1_API int show1_temporal_attention(int dtype, const show1_heads* q, const show1_heads* k, const show1_heads* v,
                                       const show1_heads* out, int batch, int frames, int pixels, int heads,
                                       int head_dim, float scale, show1_stream stream);

SHOW1_API int show1_temporal_attention_ref(int dtype, const show1_heads* q, const show1_heads* k, const show1_heads* v,
                                           const show1_heads* out, int batch, int frames, int pixels, int heads,
                                           int head_dim, float scale, show1_stream stream);

#endif
