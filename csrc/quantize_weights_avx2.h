/* quantize_weights_avx2.h - eight float32 quotients at a time, which give the codes of float64.
 *
 * A tie t = j + 1/2 times a float16 scale is a float32: 9 bits times 11.  A float32 x that is not
 * t * scale is therefore at least one of its own ulps away from t * scale, and x / scale is more
 * than 2^-24 t away from t.  Rounding to float32 moves the quotient by less.  The rounded quotient
 * is on the same side of every tie as the exact quotient, and it is a tie only if the exact
 * quotient is one. */
#include "simd_x86.h"

PE_INLINE __m256 code8(__m256 x, __m256 scale, __m256 largest)
{
    __m256 code =
        _mm256_round_ps(_mm256_div_ps(x, scale), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    code = _mm256_min_ps(code, largest);
    return _mm256_max_ps(code, _mm256_sub_ps(_mm256_setzero_ps(), largest));
}

PE_INLINE __m256i encode8(__m256 x, __m256 scale, __m256 largest)
{
    return _mm256_cvtps_epi32(code8(x, scale, largest));
}

static void encode_group(const float *x, int64_t n, double scale, int32_t largest, int8_t *codes)
{
    const __m256 s = _mm256_set1_ps((float)scale), m = _mm256_set1_ps((float)largest);
    int64_t i = 0;
    for (; i + 32 <= n; i += 32) {
        __m256i a = encode8(_mm256_loadu_ps(x + i), s, m);
        __m256i b = encode8(_mm256_loadu_ps(x + i + 8), s, m);
        __m256i c = encode8(_mm256_loadu_ps(x + i + 16), s, m);
        __m256i d = encode8(_mm256_loadu_ps(x + i + 24), s, m);
        /* packs work within halves: the last step orders the groups of four */
        __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((__m256i *)(codes + i), bytes);
    }
    for (; i < n; i++) {
        __m256i code = encode8(_mm256_set1_ps(x[i]), s, m);
        codes[i] = (int8_t)_mm_cvtsi128_si32(_mm256_castsi256_si128(code));
    }
}

/* Eight scales at a time.  A code times a scale is exact in float64 (7 bits times 11), so that the
 * fused subtraction rounds as the plain one does; the square is rounded, and is not fused. */
static void squared_errors(const float *x, int64_t n, const double *scale, float largest,
                           double *sum)
{
    const __m256d s_lo = _mm256_loadu_pd(scale), s_hi = _mm256_loadu_pd(scale + 4);
    const __m256 s = _mm256_set_m128(_mm256_cvtpd_ps(s_hi), _mm256_cvtpd_ps(s_lo));
    const __m256 m = _mm256_set1_ps(largest);
    __m256d lo = _mm256_setzero_pd(), hi = lo;
    for (int64_t i = 0; i < n; i++) {
        const __m256 code = code8(_mm256_set1_ps(x[i]), s, m);
        const __m256d value = _mm256_set1_pd(x[i]);
        const __m256d e_lo =
            _mm256_fnmadd_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(code)), s_lo, value);
        const __m256d e_hi =
            _mm256_fnmadd_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(code, 1)), s_hi, value);
        lo = _mm256_add_pd(lo, _mm256_mul_pd(e_lo, e_lo));
        hi = _mm256_add_pd(hi, _mm256_mul_pd(e_hi, e_hi));
    }
    _mm256_storeu_pd(sum, lo);
    _mm256_storeu_pd(sum + 4, hi);
}

static void load_q8_0(const void *row, int64_t cols, float *x)
{
    for (int64_t b = 0; b < cols / PE_BLOCK; b++) {
        const char *block = (const char *)row + b * (2 + PE_BLOCK);
        const __m256 scale = _mm256_set1_ps(_cvtsh_ss(pe_load_u16(block)));
        for (int i = 0; i < PE_BLOCK; i += 8) {
            const __m128i codes = _mm_loadl_epi64((const __m128i *)(block + 2 + i));
            const __m256 code = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
            _mm256_storeu_ps(x + b * PE_BLOCK + i, _mm256_mul_ps(scale, code));
        }
    }
}

PE_INLINE void fill_quantize_weights(pe_kernels *k)
{
    k->encode_group = encode_group;
    k->squared_errors = squared_errors;
    k->type[PE_Q8_0].load = load_q8_0;
}
