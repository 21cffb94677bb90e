/* causal_conv1d_neon.h - causal_conv1d.c for NEON: channels in lanes, each with its own sum. */
#include "simd_neon.h"

PE_INLINE float32x4_t four_channels(const float *const *rows, const float *weight, int64_t channels,
                                    int64_t taps, int64_t c)
{
    float32x4_t sum = vmulq_f32(vld1q_f32(weight + c), vld1q_f32(rows[0] + c));
    for (int64_t j = 1; j < taps; j++)
        sum =
            vaddq_f32(sum, vmulq_f32(vld1q_f32(weight + j * channels + c), vld1q_f32(rows[j] + c)));
    return sum;
}

static void conv_taps(const float *const *rows, const float *weight, int64_t channels, int64_t taps,
                      int64_t c0, int64_t c1, float *y)
{
    int64_t c = c0;
    for (; c + 4 <= c1; c += 4)
        vst1q_f32(y + c, four_channels(rows, weight, channels, taps, c));
    for (; c < c1; c++) {
        float sum = weight[c] * rows[0][c];
        for (int64_t j = 1; j < taps; j++)
            sum += weight[j * channels + c] * rows[j][c];
        y[c] = sum;
    }
}

PE_INLINE void fill_causal_conv1d(pe_kernels *k) { k->conv_taps = conv_taps; }
