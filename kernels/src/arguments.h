// Which arguments a function accepts: asked once, by the kernel's launcher and by its reference.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "show1/denoise_step.h"
#include "show1/group_norm.h"
#include "show1/temporal_attention.h"

namespace show1 {

// All at least 1, and the product fits 31 bits.
inline bool sizes_fit(std::initializer_list<int> sizes) {
    int64_t product = 1;
    for (int size : sizes) {
        if (size < 1) return false;
        product *= size;
        if (product > INT32_MAX) return false;
    }
    return true;
}

inline bool is_half(int dtype) { return dtype == SHOW1_FLOAT16 || dtype == SHOW1_BFLOAT16; }

inline bool temporal_attention_accepts(int dtype, std::initializer_list<const show1_heads*> tensors, int batch,
                                       int frames, int pixels, int heads, int head_dim, float scale) {
    for (const show1_heads* tensor : tensors) {
        if (!tensor || !tensor->data || reinterpret_cast<uintptr_t>(tensor->data) % 2) return false;
    }
    return is_half(dtype) && sizes_fit({batch, frames, pixels, heads, head_dim}) && frames <= SHOW1_MAX_FRAMES &&
           head_dim <= SHOW1_MAX_HEAD_DIM && scale > 0 && std::isfinite(scale);
}

// Whether all tensors of half precision begin at multiples of `bytes`.
inline bool group_norm_aligned(const show1_group_norm_args& a, int bytes) {
    for (const void* tensor : {a.x, static_cast<const void*>(a.out), a.weight, a.bias, a.add, a.scale, a.shift})
        if (reinterpret_cast<uintptr_t>(tensor) % bytes) return false;
    return true;
}

inline bool group_norm_accepts(const show1_group_norm_args* a) {
    if (!a || !a->x || !a->out || !a->weight || !a->bias || !a->partials || !a->scale != !a->shift) return false;
    return is_half(a->dtype) && group_norm_aligned(*a, 2) && reinterpret_cast<uintptr_t>(a->partials) % 4 == 0 &&
           sizes_fit({2, a->rows, a->channels}) && sizes_fit({a->batch, SHOW1_NORM_PARTS}) &&
           sizes_fit({a->batch, a->groups}) && a->channels % a->groups == 0 && a->channels <= SHOW1_MAX_NORM_CHANNELS &&
           a->groups <= SHOW1_MAX_NORM_GROUPS && a->repeat >= 1 && a->eps > 0 && std::isfinite(a->eps) &&
           a->activation >= SHOW1_ACTIVATION_NONE && a->activation <= SHOW1_ACTIVATION_GELU;
}

inline bool denoise_step_accepts(const show1_denoise_args* a) {
    if (!a || !a->table || !a->counter || !a->sample || !a->noise_pred.data) return false;
    if (!is_half(a->dtype) && a->dtype != SHOW1_FLOAT32) return false;
    if (!sizes_fit({a->guided ? 2 : 1, a->batch, a->channels, a->frames, a->pixels})) return false;
    switch (a->variance) {
        case SHOW1_VARIANCE_FIXED: break;
        case SHOW1_VARIANCE_LEARNED_RANGE:
        case SHOW1_VARIANCE_LEARNED:
            if (!a->variance_frac.data) return false;
            break;
        default: return false;
    }
    switch (a->limit) {
        case SHOW1_LIMIT_NONE: return true;
        case SHOW1_LIMIT_CLIP: return a->limit_max >= 0;
        case SHOW1_LIMIT_DYNAMIC: return a->limit_max >= 1 && a->limit_ratio >= 0 && a->limit_ratio <= 1;
        default: return false;
    }
}

// Linear interpolation between two neighbours of the sorted values, in float32 as torch.quantile does it.
struct QuantileRank {
    int lower;       // rank of the lower neighbour, from 0
    float fraction;  // of the way to the next one

    QuantileRank(float ratio, int count) {
        const float position = ratio * static_cast<float>(count - 1);
        lower = static_cast<int>(position);
        fraction = position - static_cast<float>(lower);
    }
};

}  // namespace show1
