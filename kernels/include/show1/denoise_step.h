// One step of the denoising loop after the network: guidance, estimate of the clean sample, its limits, solver update,
// and the network's next input. The meaning is that of runtime/sampler.py and runtime/schedulers.py, operation by
// operation in float32; only exp() may differ from NumPy's by its last bits.
//
//   pred = negative + guidance_scale * (positive - negative)             Ho & Salimans 2022; where `guided`
//   x0   = limit((sample - pred_weight * pred) / divisor)                Saharia et al. 2022, sec. 2.3, per frame
//   next = sample_weight * sample + x0_weight * x0                       Lu et al. 2022, alg. 2, or
//        + previous_x0_weight * previous x0                              Ho et al. 2020, eq. 7
//        + std * noise                                                   DDPM; Nichol & Dhariwal 2021, eq. 15
//
// All that changes from step to step is read on the device: coefficients from a table whose row a device counter
// names. The kernel advances the counter itself, so one captured CUDA graph of network and step serves all steps, and
// with another table also another schedule, number of steps or guidance scale.
//
// With B = batch, C = channels, F = frames and adjacent pixels:
//
//   in/out  sample         float32 [B, C, F, H*W] contiguous
//   in/out  x0             float32 [B, C, F, H*W] contiguous: read as the previous step's x0, then overwritten. May be
//                          null if every previous_x0_weight in the table is 0 (DDPM, first-order solver)
//   in      noise_pred     `dtype`, planes; B of them, or 2B where `guided`: negative prompt first
//   in      variance_frac  `dtype`, planes; the prompt's B only. Null data unless `variance` is learned
//   in      noise          float32 planes; the batch stride is usually 0, see sampler.py. Null data: none is added.
//                          The caller refills one buffer from step to step
//   out     network_input  `dtype`, planes; B or 2B. Only the first C channels are written: condition channels behind
//                          them stay. Null data: not written
//   out     timesteps      float32 [B or 2B], the next step's timestep. Null: not written; nor is it in the last step
//
// The buffers may not overlap. A NaN in noise_pred stays one NaN, which ranks last in its frame's quantile; the sampler
// would lose the frame.
//
// Memory bound, one pass: with float16 and guidance 24 B per element of the sample (4 noise_pred, 8 sample, 8 x0,
// 4 network_input), 24 MB for 8 frames of 160 x 256. With dynamic thresholding beyond 1 there are two passes, of which
// the first leaves x0 in shared memory: one block per frame, 7,680 values each in Show-1's base, bound by the latency
// of the 22 to 31 counting rounds that find the quantile. A frame too large for shared memory (above 16 to 58 thousand
// values, by card) is read from L2 in every round: correct, not fast.
#ifndef SHOW1_DENOISE_STEP_H
#define SHOW1_DENOISE_STEP_H

#include "show1/types.h"

// One row per step: runtime.schedulers.Schedule with the guidance scale beside it.
typedef struct {
    float timestep, guidance_scale;
    float pred_weight, divisor;
    float sample_weight, x0_weight, previous_x0_weight;
    float min_log_var, max_log_var;  // no noise is added where max_log_var is -infinity
} show1_step;

// On the device; the caller sets it to {0, number of steps, 0} before a run. Beyond the last step the kernel does
// nothing.
typedef struct {
    int32_t step, steps;
    uint32_t finished_blocks;  // of the step under way
} show1_step_counter;

enum {
    SHOW1_VARIANCE_FIXED = 0,          // std = exp(min_log_var / 2)
    SHOW1_VARIANCE_LEARNED_RANGE = 1,  // std = exp((r * max_log_var + (1 - r) * min_log_var) / 2), r = (v + 1) / 2
    SHOW1_VARIANCE_LEARNED = 2,        // std = sqrt(v)
};

enum {
    SHOW1_LIMIT_NONE = 0,
    SHOW1_LIMIT_CLIP = 1,     // to [-limit_max, limit_max]
    SHOW1_LIMIT_DYNAMIC = 2,  // to [-s, s], then divided by s = clip(quantile(|x0|, limit_ratio), 1, limit_max)
};

typedef struct {
    int dtype;
    int batch, channels, frames, pixels;
    int guided;
    int variance;
    int limit;
    float limit_ratio, limit_max;
    const show1_step* table;
    show1_step_counter* counter;
    float* sample;
    float* x0;
    show1_planes noise_pred, variance_frac, noise, network_input;
    float* timesteps;
} show1_denoise_args;

// SHOW1_INVALID where a pointer that the modes need is null, a size is below 1 or their product does not fit 31 bits,
// a mode or dtype is unknown, limit_ratio is not in [0, 1], or limit_max is below 1 (CLIP: below 0).
SHOW1_API int show1_denoise_step(const show1_denoise_args* args, show1_stream stream);

SHOW1_API int show1_denoise_step_ref(const show1_denoise_args* args, show1_stream stream);

#endif
