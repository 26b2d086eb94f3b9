#include "show1/denoise_step.h"

#include <algorithm>
#include <cfloat>
#include <vector>

#include "arguments.h"
#include "reference.h"

namespace show1 {
namespace {

float clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }  // NaN stays

// torch.quantile(values, ratio), where infinity counts as the largest number: it would interpolate to NaN.
float quantile(std::vector<float> values, float ratio) {
    const QuantileRank rank(ratio, static_cast<int>(values.size()));
    std::sort(values.begin(), values.end(), [](float a, float b) { return to_bits(a) < to_bits(b); });  // all >= 0
    const auto at = [&](size_t i) { return i < values.size() && values[i] < FLT_MAX ? values[i] : FLT_MAX; };
    const float low = at(rank.lower), high = at(rank.lower + 1);
    return low + (high - low) * rank.fraction;
}

float noise_std(const show1_denoise_args& a, const show1_step& s, int b, int c, int f, int p) {
    if (a.variance == SHOW1_VARIANCE_FIXED) return std::exp(s.min_log_var / 2);
    const float v = load(a.dtype, a.variance_frac.data, plane(a.variance_frac, b, c, f) + p);
    if (a.variance == SHOW1_VARIANCE_LEARNED) return std::sqrt(v);
    const float frac = (v + 1) / 2;
    return std::exp((frac * s.max_log_var + (1 - frac) * s.min_log_var) / 2);
}

void step_frame(const show1_denoise_args& a, const show1_step& s, int b, int f) {
    std::vector<float> x0, magnitudes;
    for (int c = 0; c < a.channels; ++c)
        for (int p = 0; p < a.pixels; ++p) {
            const auto output = [&](int item) {
                return load(a.dtype, a.noise_pred.data, plane(a.noise_pred, item, c, f) + p);
            };
            float pred = output(b);
            if (a.guided) pred = (output(b + a.batch) - pred) * s.guidance_scale + pred;
            const float sample = a.sample[((static_cast<int64_t>(b) * a.channels + c) * a.frames + f) * a.pixels + p];
            x0.push_back((sample - pred * s.pred_weight) / s.divisor);
            magnitudes.push_back(std::fabs(x0.back()));
        }
    if (a.limit == SHOW1_LIMIT_CLIP)
        for (float& x : x0) x = clip(x, -a.limit_max, a.limit_max);
    if (a.limit == SHOW1_LIMIT_DYNAMIC) {
        const float bound = clip(quantile(magnitudes, a.limit_ratio), 1, a.limit_max);
        for (float& x : x0) x = clip(x, -bound, bound) / bound;
    }
    auto estimate = x0.begin();
    for (int c = 0; c < a.channels; ++c)
        for (int p = 0; p < a.pixels; ++p, ++estimate) {
            const int64_t at = ((static_cast<int64_t>(b) * a.channels + c) * a.frames + f) * a.pixels + p;
            float next = a.sample[at] * s.sample_weight;
            next += *estimate * s.x0_weight;
            if (s.previous_x0_weight != 0) next += a.x0[at] * s.previous_x0_weight;
            if (a.noise.data && s.max_log_var > -INFINITY) {
                const int64_t drawn = plane(a.noise, b, c, f) + p;
                next += noise_std(a, s, b, c, f, p) * static_cast<const float*>(a.noise.data)[drawn];
            }
            a.sample[at] = next;
            if (a.x0) a.x0[at] = *estimate;
            for (int item = b; a.network_input.data && item < (a.guided ? 2 : 1) * a.batch; item += a.batch)
                store(a.dtype, a.network_input.data, plane(a.network_input, item, c, f) + p, next);
        }
}

}  // namespace
}  // namespace show1

int show1_denoise_step_ref(const show1_denoise_args* args, show1_stream) {
    using namespace show1;
    if (!denoise_step_accepts(args)) return SHOW1_INVALID;
    show1_step_counter& counter = *args->counter;
    if (counter.step < 0 || counter.step >= counter.steps) return SHOW1_OK;
    for (int b = 0; b < args->batch; ++b)
        for (int f = 0; f < args->frames; ++f) step_frame(*args, args->table[counter.step], b, f);
    ++counter.step;
    if (args->timesteps && counter.step < counter.steps)
        std::fill_n(args->timesteps, (args->guided ? 2 : 1) * args->batch, args->table[counter.step].timestep);
    return SHOW1_OK;
}
