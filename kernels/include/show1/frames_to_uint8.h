// Decoded clip to displayable frames: floor(clamp(x / 2 + 1/2, 0, 1) * 255). The reference truncates; so do we.
//
//   in   clip    float16, bfloat16 or float32, planes of H*W adjacent pixels near [-1, 1]; strides over channels and
//                frames are free, so [C, F, H, W] and the decoder's [F, C, H, W] both do (the batch stride is not used)
//   out  frames  uint8 [F, H, W, C], contiguous
//
// NaN becomes 0. The arithmetic is float32 and each result equals runtime.ops.clip_to_frames.
//
// Memory bound: 2 B (float32: 4 B) read and 1 B written per element, 48 MB for 29 frames of 320 x 576 in half. In pieces
// of 16 bytes where the pointers and the strides allow it and pixels is a multiple of 16.
#ifndef SHOW1_FRAMES_TO_UINT8_H
#define SHOW1_FRAMES_TO_UINT8_H

#include "show1/types.h"

// SHOW1_INVALID unless both pointers are set, 1 <= channels <= 4, frames and pixels (H*W) are at least 1 and their
// product fits 31 bits.
SHOW1_API int show1_frames_to_uint8(int dtype, const show1_planes* clip, uint8_t* frames_out, int channels, int frames,
                                    int pixels, show1_stream stream);

SHOW1_API int show1_frames_to_uint8_ref(int dtype, const show1_planes* clip, uint8_t* frames_out, int channels,
                                        int frames, int pixels, show1_stream stream);

#endif
