/* quantize_neon.h - quantize.c for NEON: four columns in lanes.
 *
 * The greatest magnitude is the greatest bit pattern without its sign: the patterns have the order
 * of the magnitudes, and infinity and NaN are above all finite values.
 */
#include "simd_neon.h"

#define MAGNITUDE 0x7fffffffu

static uint32_t greatest_magnitude(const float *x, int64_t n)
{
    uint32x4_t most = vdupq_n_u32(0);
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(x + i));
        most = vmaxq_u32(most, vandq_u32(bits, vdupq_n_u32(MAGNITUDE)));
    }
    uint32_t a = vmaxvq_u32(most);
    for (; i < n; i++) {
        uint32_t bits = pe_float_to_bits(x[i]) & MAGNITUDE;
        a = bits > a ? bits : a;
    }
    return a;
}

static int32_t quantize_group(const float *x, int64_t n, int16_t *q, float *scale)
{
    uint32_t bits = greatest_magnitude(x, n);
    if (bits >= PE_INFINITY_BITS)
        return PE_ERROR_NONFINITE;
    float a = pe_bits_to_float(bits);
    if (a < 0x1p-100f) {
        *scale = 0.0f;
        memset(q, 0, (size_t)n * sizeof *q);
        return PE_OK;
    }
    float s = a / 32767.0f;
    *scale = s;
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t ratio = vdivq_f32(vld1q_f32(x + i), vdupq_n_f32(s));
        vst1_s16(q + i, vmovn_s32(vcvtnq_s32_f32(ratio))); /* ties to even */
    }
    for (; i < n; i++)
        q[i] = (int16_t)vcvtns_s32_f32(x[i] / s);
    return PE_OK;
}

PE_INLINE void fill_quantize(pe_kernels *k)
{
    k->greatest_magnitude = greatest_magnitude;
    k->quantize_group = quantize_group;
}
