/* quantize_weights_avx2.c - eight float32 quotients at a time, which give float64's codes.
 *
 * A tie t = j + 1/2 times a float16 scale is a float32: 9 bits times 11.  So a float32 x that is not
 * t * scale lies at least one of its own ulps from it, and x / scale more than 2^-24 t from t, which is
 * more than rounding to float32 can take away.  Rounded, the quotient is on the same side of every tie
 * as it was, and on one only if it was. */
#include "kernels.h"

#include <immintrin.h>

static __m256i encode8(__m256 x, __m256 scale, __m256 largest)
{
    __m256 code = _mm256_round_ps(_mm256_div_ps(x, scale),
                                  _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    code = _mm256_min_ps(code, largest);
    code = _mm256_max_ps(code, _mm256_sub_ps(_mm256_setzero_ps(), largest));
    return _mm256_cvtps_epi32(code);
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
        /* packs work within halves: the last step puts the groups of four in order */
        __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256((__m256i *)(codes + i), bytes);
    }
    for (; i < n; i++) {
        __m256i code = encode8(_mm256_set1_ps(x[i]), s, m);
        codes[i] = (int8_t)_mm_cvtsi128_si32(_mm256_castsi256_si128(code));
    }
}

void pe_fill_avx2_quantize_weights(pe_kernels *k) { k->encode_group = encode_group; }
