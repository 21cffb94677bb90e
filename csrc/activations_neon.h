/* activations_neon.h - activations.c for NEON: exp, sigmoid and silu in float64x2.
 *
 * Each lane makes the steps of exp_fast in activations.c, in the same order and without a fused
 * multiply-add.  Its float64 value is therefore the scalar one, and the proof for the scalar value
 * holds here too.  Values that are not settled, and NaN, are computed one by one by the scalar
 * functions.  Eight values at a time keep four chains of dependent operations busy.
 */
#include "exp_steps.h"
#include "simd_neon.h"

#include <float.h>

typedef float64x2_t function64(float64x2_t x);
typedef float function32(float x);

/* e^x, -708 <= x <= 709. */
PE_INLINE float64x2_t exp_fast(float64x2_t x)
{
    static const double inverse_factorial[] = INVERSE_FACTORIALS;
    const float64x2_t round = vdupq_n_f64(ROUND_TO_INTEGER), one = vdupq_n_f64(1.0);
    float64x2_t k = vsubq_f64(vaddq_f64(vmulq_n_f64(x, LOG2_E), round), round);
    float64x2_t r = vsubq_f64(vsubq_f64(x, vmulq_n_f64(k, LN2_HI)), vmulq_n_f64(k, LN2_REST));
    float64x2_t p = vdupq_n_f64(INVERSE_FACTORIAL_13);
    for (int i = 0; i < N_INVERSE_FACTORIALS; i++)
        p = vaddq_f64(vmulq_f64(p, r), vdupq_n_f64(inverse_factorial[i]));
    int64x2_t exponent = vaddq_s64(vcvtq_s64_f64(k), vdupq_n_s64(1023));
    float64x2_t scale = vreinterpretq_f64_s64(vshlq_n_s64(exponent, 52));
    float64x2_t e = vaddq_f64(one, vaddq_f64(r, vmulq_f64(vmulq_f64(r, r), p)));
    return vmulq_f64(e, scale);
}

/* NaN stays NaN. */
PE_INLINE float64x2_t clamp(float64x2_t x, double low, double high)
{
    return vminq_f64(vmaxq_f64(x, vdupq_n_f64(low)), vdupq_n_f64(high));
}

PE_INLINE float64x2_t one_plus_exp_neg(float64x2_t x, double limit)
{
    return vaddq_f64(vdupq_n_f64(1.0), exp_fast(vnegq_f64(clamp(x, -limit, limit))));
}

PE_INLINE float64x2_t exp64(float64x2_t x) { return exp_fast(clamp(x, -200.0, 100.0)); }

PE_INLINE float64x2_t sigmoid64(float64x2_t x)
{
    return vdivq_f64(vdupq_n_f64(1.0), one_plus_exp_neg(x, 200.0));
}

/* -infinity is replaced by the least finite float32: the silu of both is -0. */
PE_INLINE float64x2_t silu64(float64x2_t x)
{
    return vdivq_f64(vmaxq_f64(x, vdupq_n_f64(-FLT_MAX)), one_plus_exp_neg(x, 400.0));
}

PE_INLINE float32x4_t narrow(float64x2_t low, float64x2_t high)
{
    return vcvt_high_f32_f64(vcvt_f32_f64(low), high);
}

/* y = function(x) rounded; the result has all bits set where y is settled, as in activations.c. */
PE_INLINE uint32x4_t four(function64 *function, float32x4_t x, float32x4_t *y)
{
    float64x2_t low = function(vcvt_f64_f32(vget_low_f32(x)));
    float64x2_t high = function(vcvt_high_f64_f32(x));
    const double less = 1.0 - 0x1p-50, more = 1.0 + 0x1p-50;
    *y = narrow(low, high);
    return vceqq_f32(narrow(vmulq_n_f64(low, less), vmulq_n_f64(high, less)),
                     narrow(vmulq_n_f64(low, more), vmulq_n_f64(high, more)));
}

/* The lanes that are not settled. */
PE_INLINE float32x4_t settle(function32 *exact, float32x4_t x, float32x4_t y, uint32x4_t settled)
{
    float in[4], out[4];
    uint32_t done[4];
    vst1q_f32(in, x);
    vst1q_f32(out, y);
    vst1q_u32(done, settled);
    for (int i = 0; i < 4; i++)
        if (!done[i])
            out[i] = in[i] != in[i] ? in[i] + in[i] : exact(in[i]);
    return vld1q_f32(out);
}

PE_INLINE void eight(function64 *function, function32 *exact, const float *x, float *y)
{
    float32x4_t x0 = vld1q_f32(x), x1 = vld1q_f32(x + 4), y0, y1;
    uint32x4_t settled0 = four(function, x0, &y0), settled1 = four(function, x1, &y1);
    if (vminvq_u32(vandq_u32(settled0, settled1)) == 0) {
        y0 = settle(exact, x0, y0, settled0);
        y1 = settle(exact, x1, y1, settled1);
    }
    vst1q_f32(y, y0);
    vst1q_f32(y + 4, y1);
}

PE_INLINE void each(function64 *function, function32 *exact, const float *x, int64_t n, float *y)
{
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        eight(function, exact, x + i, y + i);
    if (i < n) {
        float rest[8] = {0};
        memcpy(rest, x + i, (size_t)(n - i) * sizeof *x);
        eight(function, exact, rest, rest);
        memcpy(y + i, rest, (size_t)(n - i) * sizeof *y);
    }
}

static void exp_each(const float *x, int64_t n, float *y) { each(exp64, pe_exp_exact, x, n, y); }

static void sigmoid_each(const float *x, int64_t n, float *y)
{
    each(sigmoid64, pe_sigmoid_exact, x, n, y);
}

static void silu_each(const float *x, int64_t n, float *y) { each(silu64, pe_silu_exact, x, n, y); }

PE_INLINE void fill_activations(pe_kernels *k)
{
    k->exp = exp_each;
    k->sigmoid = sigmoid_each;
    k->silu = silu_each;
}
