/* norm_avx2.h - the sums of norm.c with their eight float64 accumulators in two registers.  A wider
 * register would not help: each accumulator waits for its own previous addition. */
#include "simd_x86.h"

/* Lanes past the end add +0 to accumulators that started at +0 and are therefore never -0. */
static double sum_squares(const float *x, int64_t n)
{
    f64x8 total = f64x8_zero();
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        f64x8 v = f64x8_widen(_mm256_loadu_ps(x + i));
        total = f64x8_add(total, f64x8_mul(v, v));
    }
    f64x8 v = f64x8_widen(load8_part(x + i, n - i));
    return f64x8_tree(f64x8_add(total, f64x8_mul(v, v)));
}

static double sum(const float *x, int64_t n)
{
    f64x8 total = f64x8_zero();
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        total = f64x8_add(total, f64x8_widen(_mm256_loadu_ps(x + i)));
    return f64x8_tree(f64x8_add(total, f64x8_widen(load8_part(x + i, n - i))));
}

PE_INLINE __m256 scale8(__m256 x, double inv, __m256 scale)
{
    return _mm256_mul_ps(f64x8_narrow(f64x8_mul(f64x8_widen(x), f64x8_all(inv))), scale);
}

static void scale_by(const float *x, double inv, const float *scale, int64_t n, float *y)
{
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(y + i, scale8(_mm256_loadu_ps(x + i), inv, _mm256_loadu_ps(scale + i)));
    if (i < n)
        store8_part(y + i, scale8(load8_part(x + i, n - i), inv, load8_part(scale + i, n - i)),
                    n - i);
}

PE_INLINE void fill_norm(pe_kernels *k)
{
    k->sum_squares = sum_squares;
    k->sum = sum;
    k->scale_by = scale_by;
}
