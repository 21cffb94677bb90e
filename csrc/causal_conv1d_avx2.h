/* causal_conv1d_avx2.h - sixteen channels at a time, their sums in registers for all taps.  Every
 * input and weight is read once: the limit is memory, not the width of a register. */
#include "simd_x86.h"

/* Channels [c, c + lanes), lanes <= 16. */
PE_INLINE void conv16(const float *const *rows, const float *weight, int64_t channels, int64_t taps,
                      int64_t c, int64_t lanes, float *y)
{
    f32x16 sum = f32x16_mul(f32x16_load(weight + c, lanes), f32x16_load(rows[0] + c, lanes));
    for (int64_t j = 1; j < taps; j++) {
        f32x16 w = f32x16_load(weight + j * channels + c, lanes);
        sum = f32x16_add(sum, f32x16_mul(w, f32x16_load(rows[j] + c, lanes)));
    }
    f32x16_store(y + c, sum, lanes);
}

static void conv_taps(const float *const *rows, const float *weight, int64_t channels, int64_t taps,
                      int64_t c0, int64_t c1, float *y)
{
    int64_t c = c0;
    for (; c + 16 <= c1; c += 16)
        conv16(rows, weight, channels, taps, c, 16, y);
    if (c < c1)
        conv16(rows, weight, channels, taps, c, c1 - c, y);
}

PE_INLINE void fill_causal_conv1d(pe_kernels *k) { k->conv_taps = conv_taps; }
