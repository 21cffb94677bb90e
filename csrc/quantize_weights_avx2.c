/* quantize_weights_avx2.c - four float64 quotients at a time; division and rounding are IEEE's, so
 * the order of the lanes has no influence. */
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

static void encode_group(const float *x, int64_t n, double scale, int32_t largest, int8_t *codes)
{
    const __m256d s = _mm256_set1_pd(scale), m = _mm256_set1_pd(largest);
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

void pe_fill_avx2_quantize_weights(pe_kernels *k) { k->encode_group = encode_group; }
