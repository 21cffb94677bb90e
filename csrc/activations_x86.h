/* activations_x86.h - exp, sigmoid and silu, eight at a time in float64: the steps of activations.c
 * lane by lane, so that the same lanes are undecided.  The undecided lanes, about one in 2^24, are
 * computed one by one by the exact scalar function.
 */
#ifndef PYENGINE_ACTIVATIONS_X86_H
#define PYENGINE_ACTIVATIONS_X86_H

#include "exp_steps.h"
#include "simd_x86.h"

#include <math.h>

PE_INLINE f64x8 clamp8(f64x8 x, double low, double high)
{
    return f64x8_min(f64x8_max(x, f64x8_all(low)), f64x8_all(high));
}

PE_INLINE f64x8 exp_fast8(f64x8 x)
{
    static const double inverse_factorial[] = INVERSE_FACTORIALS;
    const f64x8 one = f64x8_all(1.0), round = f64x8_all(ROUND_TO_INTEGER);
    f64x8 rounded = f64x8_add(f64x8_mul(x, f64x8_all(LOG2_E)), round); /* its low bits are k */
    f64x8 k = f64x8_sub(rounded, round);
    f64x8 r = f64x8_sub(x, f64x8_mul(k, f64x8_all(LN2_HI)));
    r = f64x8_sub(r, f64x8_mul(k, f64x8_all(LN2_REST)));
    f64x8 p = f64x8_all(INVERSE_FACTORIAL_13);
    for (int i = 0; i < N_INVERSE_FACTORIALS; i++)
        p = f64x8_add(f64x8_mul(p, r), f64x8_all(inverse_factorial[i]));
    f64x8 tail = f64x8_add(r, f64x8_mul(f64x8_mul(r, r), p));
    return f64x8_mul(f64x8_add(one, tail), f64x8_pow2(rounded));
}

/* 1 + e^-x, x within the bounds. */
PE_INLINE f64x8 one_plus_exp_neg8(f64x8 x, double bound)
{
    f64x8 negated = f64x8_mul(clamp8(x, -bound, bound), f64x8_all(-1.0));
    return f64x8_add(f64x8_all(1.0), exp_fast8(negated));
}

__attribute__((noinline, cold)) static __m256 exact_lanes(__m256 x, __m256 y, unsigned lanes,
                                                          float (*exact)(float))
{
    float in[8], out[8];
    _mm256_storeu_ps(in, x);
    _mm256_storeu_ps(out, y);
    for (int i = 0; i < 8; i++)
        if (lanes >> i & 1)
            out[i] = exact(in[i]);
    return _mm256_loadu_ps(out);
}

/* v rounded to float32; x where x is NaN; exact(x) where the error of v (2^-50) leaves it
 * undecided. */
PE_INLINE __m256 settle8(__m256 x, f64x8 v, float (*exact)(float))
{
    __m256 below = f64x8_narrow(f64x8_mul(v, f64x8_all(1.0 - 0x1p-50)));
    __m256 above = f64x8_narrow(f64x8_mul(v, f64x8_all(1.0 + 0x1p-50)));
    __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    __m256 open = _mm256_andnot_ps(nan, _mm256_cmp_ps(below, above, _CMP_NEQ_UQ));
    __m256 y = _mm256_blendv_ps(f64x8_narrow(v), _mm256_add_ps(x, x), nan);
    unsigned lanes = (unsigned)_mm256_movemask_ps(open);
    return __builtin_expect(lanes != 0, 0) ? exact_lanes(x, y, lanes, exact) : y;
}

PE_INLINE __m256 exp8(__m256 x)
{
    return settle8(x, exp_fast8(clamp8(f64x8_widen(x), -200.0, 100.0)), pe_exp_exact);
}

PE_INLINE __m256 sigmoid8(__m256 x)
{
    f64x8 v = f64x8_div(f64x8_all(1.0), one_plus_exp_neg8(f64x8_widen(x), 200.0));
    return settle8(x, v, pe_sigmoid_exact);
}

PE_INLINE __m256 silu8(__m256 x)
{
    f64x8 wide = f64x8_widen(x);
    f64x8 v = f64x8_div(wide, one_plus_exp_neg8(wide, 400.0));
    __m256 y = settle8(x, v, pe_silu_exact);
    __m256 lowest = _mm256_cmp_ps(x, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ);
    return _mm256_blendv_ps(y, _mm256_set1_ps(-0.0f), lowest); /* the limit, not inf / inf */
}

PE_INLINE void each8(__m256 (*function)(__m256), const float *x, int64_t n, float *y)
{
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, function(_mm256_loadu_ps(x + i)));
    if (i < n)
        store8_part(y + i, function(load8_part(x + i, n - i)), n - i);
}

static void exp_each(const float *x, int64_t n, float *y) { each8(exp8, x, n, y); }
static void sigmoid_each(const float *x, int64_t n, float *y) { each8(sigmoid8, x, n, y); }
static void silu_each(const float *x, int64_t n, float *y) { each8(silu8, x, n, y); }

PE_INLINE void fill_activations(pe_kernels *k)
{
    k->exp = exp_each;
    k->sigmoid = sigmoid_each;
    k->silu = silu_each;
}

#endif
