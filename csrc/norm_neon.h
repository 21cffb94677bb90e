/* norm_neon.h - norm.c for NEON: the eight float64 accumulators of sum8 are four float64x2.
 *
 * Terms past the last are taken as +0: no accumulator is ever -0, so that they change no sum.
 * The squares are exact in float64, so that a fused multiply-add rounds as multiply, then add.
 */
#include "simd_neon.h"

PE_INLINE void add_squares(const float *x, float64x2_t sum[4])
{
    float64x2_t wide[4];
    widen8(load8(x), wide);
    for (int k = 0; k < 4; k++)
        sum[k] = vfmaq_f64(sum[k], wide[k], wide[k]);
}

PE_INLINE void add_values(const float *x, float64x2_t sum[4])
{
    float64x2_t wide[4];
    widen8(load8(x), wide);
    for (int k = 0; k < 4; k++)
        sum[k] = vaddq_f64(sum[k], wide[k]);
}

PE_INLINE double sum8(void (*add)(const float *x, float64x2_t sum[4]), const float *x, int64_t n)
{
    float64x2_t sum[4];
    for (int k = 0; k < 4; k++)
        sum[k] = vdupq_n_f64(0.0);
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        add(x + i, sum);
    if (i < n) {
        float rest[8] = {0};
        memcpy(rest, x + i, (size_t)(n - i) * sizeof *x);
        add(rest, sum);
    }
    return tree8(sum);
}

static double sum_squares(const float *x, int64_t n) { return sum8(add_squares, x, n); }

static double sum(const float *x, int64_t n) { return sum8(add_values, x, n); }

/* y may be x. */
static void scale_by(const float *x, double inv, const float *scale, int64_t n, float *y)
{
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t v = vld1q_f32(x + i);
        float64x2_t low = vmulq_n_f64(vcvt_f64_f32(vget_low_f32(v)), inv);
        float64x2_t high = vmulq_n_f64(vcvt_high_f64_f32(v), inv);
        float32x4_t normed = vcvt_high_f32_f64(vcvt_f32_f64(low), high);
        vst1q_f32(y + i, vmulq_f32(normed, vld1q_f32(scale + i)));
    }
    for (; i < n; i++)
        y[i] = (float)((double)x[i] * inv) * scale[i];
}

PE_INLINE void fill_norm(pe_kernels *k)
{
    k->sum_squares = sum_squares;
    k->sum = sum;
    k->scale_by = scale_by;
}
