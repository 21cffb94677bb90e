/* quantize_weights_avx2.c - eight float32 quotients at a time, and four float64 ones where those do not
 * tell; division and rounding are IEEE's, so the order of the lanes has no influence. */
#include "kernels.h"

#include <immintrin.h>

static __m128i encode4(__m128 x, __m256d scale, __m256d largest)
{
    __m256d code = _mm256_round_pd(_mm256_div_pd(_mm256_cvtps_pd(x), scale),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    code = _mm256_min_pd(code, largest);
    code = _mm256_max_pd(code, _mm256_sub_pd(_mm256_setzero_pd(), largest));
    return _mm256_cvtpd_epi32(code);
}

static void encode_exactly(const float *x, int64_t n, __m256d s, __m256d m, int8_t *codes)
{
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        __m128i a = encode4(_mm_loadu_ps(x + i), s, m);
        __m128i b = encode4(_mm_loadu_ps(x + i + 4), s, m);
        __m128i c = encode4(_mm_loadu_ps(x + i + 8), s, m);
        __m128i d = encode4(_mm_loadu_ps(x + i + 12), s, m);
        __m128i bytes = _mm_packs_epi16(_mm_packs_epi32(a, b), _mm_packs_epi32(c, d));
        _mm_storeu_si128((__m128i *)(codes + i), bytes);
    }
    for (; i < n; i++) {
        __m128i code = encode4(_mm_set_ss(x[i]), s, m);
        codes[i] = (int8_t)_mm_cvtsi128_si32(code);
    }
}

/* A float32 quotient of up to 256 is within 2^-17 of the exact one: if it is further than that from
 * the middle between two integers, both round to the same.  -1 lanes of *near: it is not. */
static __m256i encode8(__m256 x, __m256 scale, __m256 largest, __m256 *near)
{
    const __m256 sign = _mm256_set1_ps(-0.0f), middle = _mm256_set1_ps(0.5f - 0x1p-16f);
    __m256 quotient = _mm256_div_ps(x, scale);
    __m256 code = _mm256_round_ps(quotient, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 away = _mm256_andnot_ps(sign, _mm256_sub_ps(quotient, code));
    *near = _mm256_or_ps(*near, _mm256_cmp_ps(away, middle, _CMP_GE_OQ));
    code = _mm256_max_ps(_mm256_min_ps(code, largest), _mm256_xor_ps(sign, largest));
    return _mm256_cvtps_epi32(code);
}

static void encode_group(const float *x, int64_t n, double scale, int32_t largest, int8_t *codes)
{
    const __m256d s = _mm256_set1_pd(scale), m = _mm256_set1_pd(largest);
    int64_t i = 0;
    const __m256 s8 = _mm256_set1_ps((float)scale), m8 = _mm256_set1_ps((float)largest); /* exact */
    for (; i + 32 <= n; i += 32) {
        __m256 near = _mm256_setzero_ps();
        __m256i a = encode8(_mm256_loadu_ps(x + i), s8, m8, &near);
        __m256i b = encode8(_mm256_loadu_ps(x + i + 8), s8, m8, &near);
        __m256i c = encode8(_mm256_loadu_ps(x + i + 16), s8, m8, &near);
        __m256i d = encode8(_mm256_loadu_ps(x + i + 24), s8, m8, &near);
        if (_mm256_movemask_ps(near)) {
            encode_exactly(x + i, 32, s, m, codes + i);
            continue;
        }
        /* packs work within halves: the last step puts the groups of four in order */
        __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((__m256i *)(codes + i), bytes);
    }
    encode_exactly(x + i, n - i, s, m, codes + i);
}

void pe_fill_avx2_quantize_weights(pe_kernels *k) { k->encode_group = encode_group; }
