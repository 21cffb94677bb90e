/* norm_neon.c - sibling of norm.c: the eight float64 accumulators of sum8 are four float64x2.
 *
 * Terms past the last are taken as +0: no accumulator is ever -0, so that adding them changes none.
 * The squares are exact in float64, so that a fused multiply-add rounds as multiply, then add.
 */
#include "kernels.h"

#include <arm_neon.h>

static inline void widen8(const float *x, float64x2_t wide[4])
{
    float32x4_t low = vld1q_f32(x), high = vld1q_f32(x + 4);
    wide[0] = vcvt_f64_f32(vget_low_f32(low));
    wide[1] = vcvt_high_f64_f32(low);
    wide[2] = vcvt_f64_f32(vget_low_f32(high));
    wide[3] = vcvt_high_f64_f32(high);
}

static inline double tree8(const float64x2_t sum[4])
{
    return vpaddd_f64(vaddq_f64(vaddq_f64(sum[0], sum[2]), vaddq_f64(sum[1], sum[3])));
}

static inline void add_squares(const float *x, float64x2_t sum[4])
{
    float64x2_t wide[4];
    widen8(x, wide);
    for (int k = 0; k < 4; k++)
        sum[k] = vfmaq_f64(sum[k], wide[k], wide[k]);
}

static inline void add_values(const float *x, float64x2_t sum[4])
{
    float64x2_t wide[4];
    widen8(x, wide);
    for (int k = 0; k < 4; k++)
        sum[k] = vaddq_f64(sum[k], wide[k]);
}

static inline double sum8(void (*add)(const float *x, float64x2_t sum[4]), const float *x,
                          int64_t n)
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

void pe_fill_neon_norm(pe_kernels *k)
{
    k->sum_squares = sum_squares;
    k->sum = sum;
    k->scale_by = scale_by;
}
