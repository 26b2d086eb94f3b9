// Group normalisation (Wu & He 2018) where channels are innermost, with what stands around it in the UNets' blocks:
//
//   x'  = x + add                                                 a convolution's bias, with the time embedding or not
//   y   = (x' - mean) / sqrt(var + eps) * weight + bias           over the rows and the channels of a group
//   out = activation(y * (1 + scale) + shift)
//
//   in      x             float16 or bfloat16 [batch, rows, channels] contiguous: what one row of statistics spans is
//                         H*W pixels of a frame, or F*H*W of a clip
//   out     out           the same dtype and shape; may overlap none of the others
//   in      weight, bias  the same dtype [channels]
//   in      add           the same dtype; null: none
//   in      scale, shift  the same dtype; null: none, both or neither
//   in/out  partials      float32 [batch, SHOW1_NORM_PARTS, groups, 2], what one kernel tells the next; not kept
//
// Row n of the batch reads row n / repeat of add, scale and shift, whose rows of adjacent channels are `add_row` and
// `modulation_row` elements apart: frames share those of their clip, and with add_row 0 all share one.
//
// Sums and arithmetic are float32 without intermediate rounding; sums of squares are of distances from a value of the
// same channel, so a mean far from 0 costs the statistics no digits (what is folded into one multiply-add keeps
// |mean| / deviation units of float32). They are added in the same order in every run. Error against float64: at most
// twice that of a norm that rounds each of its steps, but where a group is nearly constant.
//
// Memory bound. Two kernels: x is read twice and out written once, 6 B per element, of which L2 can serve the second
// read of what fits; or one that reads x once, where the rows of some groups fit into shared memory. In pieces of 16
// bytes where channels, add_row and modulation_row are multiples of 8 and all pointers to tensors are so aligned.
#ifndef SHOW1_GROUP_NORM_H
#define SHOW1_GROUP_NORM_H

#include "show1/types.h"

enum {
    SHOW1_NORM_PARTS = 64,  // that the rows of a batch row are summed in, at most
    SHOW1_MAX_NORM_CHANNELS = 4096,
    SHOW1_MAX_NORM_GROUPS = 512,
};

enum {
    SHOW1_ACTIVATION_NONE = 0,
    SHOW1_ACTIVATION_SILU = 1,
    SHOW1_ACTIVATION_GELU = 2,  // of the error function, not of tanh
};

typedef struct {
    int dtype;
    int batch, rows, channels, groups;
    int repeat;
    int activation;
    float eps;
    const void* x;
    void* out;
    const void *weight, *bias;
    const void* add;
    const void *scale, *shift;
    int64_t add_row, modulation_row;
    float* partials;
} show1_group_norm_args;

// SHOW1_INVALID where a pointer that is needed is null or not aligned to its elements, a size or repeat is below 1,
// 2 * rows * channels, batch * groups or batch * SHOW1_NORM_PARTS does not fit 31 bits, groups do not divide channels,
// there are more channels or groups than above, eps is not a positive number, or a dtype or activation is unknown.
SHOW1_API int show1_group_norm(const show1_group_norm_args* args, show1_stream stream);

SHOW1_API int show1_group_norm_ref(const show1_group_norm_args* args, show1_stream stream);

#endif
