#include "show1/frames_to_uint8.h"

#include "arguments.h"
#include "reference.h"

int show1_frames_to_uint8_ref(int dtype, const show1_planes* clip, uint8_t* frames_out, int channels, int frames,
                              int pixels, show1_stream) {
    using namespace show1;
    if (!frames_to_uint8_accepts(dtype, clip, frames_out, channels, frames, pixels)) return SHOW1_INVALID;
    for (int f = 0; f < frames; ++f)
        for (int p = 0; p < pixels; ++p)
            for (int c = 0; c < channels; ++c) {
                const float unit = load(dtype, clip->data, plane(*clip, 0, c, f) + p) * 0.5f + 0.5f;
                *frames_out++ = static_cast<uint8_t>((unit > 0 ? unit < 1 ? unit : 1 : 0) * 255);
            }
    return SHOW1_OK;
}
