#include "show1/temporal_attention.h"

#include <algorithm>

#include "arguments.h"
#include "reference.h"

// Products and sums in float64 from the first to the last: only the output is rounded.
int show1_temporal_attention_ref(int dtype, const show1_heads* q, const show1_heads* k, const show1_heads* v,
                                 const show1_heads* out, int batch, int frames, int pixels, int heads, int head_dim,
                                 float scale, show1_stream) {
    using namespace show1;
    if (!temporal_attention_accepts(dtype, {q, k, v, out}, batch, frames, pixels, heads, head_dim, scale))
        return SHOW1_INVALID;
    double weights[SHOW1_MAX_FRAMES], result[SHOW1_MAX_FRAMES][SHOW1_MAX_HEAD_DIM];
    for (int b = 0; b < batch; ++b)
        for (int p = 0; p < pixels; ++p)
            for (int h = 0; h < heads; ++h) {
                const auto at = [&](const show1_heads* x, int f) {
                    return b * x->batch + f * x->frame + p * x->pixel + h * x->head;
                };
                for (int i = 0; i < frames; ++i) {
                    double largest = -INFINITY, sum = 0;
                    for (int j = 0; j < frames; ++j) {
                        double score = 0;
                        for (int c = 0; c < head_dim; ++c)
                            score += static_cast<double>(load(dtype, q->data, at(q, i) + c)) *
                                     load(dtype, k->data, at(k, j) + c);
                        weights[j] = score * scale;
                        largest = std::max(largest, weights[j]);
                    }
                    for (int j = 0; j < frames; ++j) sum += weights[j] = std::exp(weights[j] - largest);
                    for (int c = 0; c < head_dim; ++c) {
                        result[i][c] = 0;
                        for (int j = 0; j < frames; ++j)
                            result[i][c] += weights[j] / sum * load(dtype, v->data, at(v, j) + c);
                    }
                }
                // Stored only now: out may be q.
                for (int i = 0; i < frames; ++i)
                    for (int c = 0; c < head_dim; ++c)
                        store(dtype, out->data, at(out, i) + c, static_cast<float>(result[i][c]));
            }
    return SHOW1_OK;
}
