#include "show1/group_norm.h"

#include "arguments.h"
#include "reference.h"

namespace show1 {
namespace {

double activated(int activation, double y) {
    switch (activation) {
        case SHOW1_ACTIVATION_SILU: return y / (1 + std::exp(-y));
        case SHOW1_ACTIVATION_GELU: return y * (1 + std::erf(y * std::sqrt(0.5))) / 2;
        default: return y;
    }
}

}  // namespace
}  // namespace show1

int show1_group_norm_ref(const show1_group_norm_args* args, show1_stream) {
    using namespace show1;
    if (!group_norm_accepts(args)) return SHOW1_INVALID;
    const show1_group_norm_args& a = *args;
    const int size = a.channels / a.groups;
    for (int n = 0; n < a.batch; ++n) {
        const int64_t add = n / a.repeat * a.add_row, modulation = n / a.repeat * a.modulation_row;
        const auto value = [&](int r, int c) -> double {
            const float x = load(a.dtype, a.x, (static_cast<int64_t>(n) * a.rows + r) * a.channels + c);
            return a.add ? x + load(a.dtype, a.add, add + c) : x;
        };
        for (int g = 0; g < a.groups; ++g) {
            double mean = 0, var = 0;
            for (int r = 0; r < a.rows; ++r)
                for (int c = g * size; c < (g + 1) * size; ++c) mean += value(r, c);
            mean /= static_cast<double>(a.rows) * size;
            for (int r = 0; r < a.rows; ++r)
                for (int c = g * size; c < (g + 1) * size; ++c) var += (value(r, c) - mean) * (value(r, c) - mean);
            var /= static_cast<double>(a.rows) * size;
            for (int c = g * size; c < (g + 1) * size; ++c) {
                double factor = load(a.dtype, a.weight, c) / std::sqrt(var + a.eps);
                double offset = load(a.dtype, a.bias, c);
                if (a.scale) {
                    const double scale = 1.0 + load(a.dtype, a.scale, modulation + c);
                    factor *= scale;
                    offset = offset * scale + load(a.dtype, a.shift, modulation + c);
                }
                for (int r = 0; r < a.rows; ++r)
                    store(a.dtype, a.out, (static_cast<int64_t>(n) * a.rows + r) * a.channels + c,
                          static_cast<float>(activated(a.activation, (value(r, c) - mean) * factor + offset)));
            }
        }
    }
    return SHOW1_OK;
}
