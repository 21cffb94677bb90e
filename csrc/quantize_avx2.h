/* quantize_avx2.h - a group in steps of sixteen: one register of int16.
 *
 * The bits of a float32 without its sign have the order of the magnitudes; infinity and NaN are
 * above all finite values.  One integer maximum therefore finds the greatest and shows whether it
 * is finite.  Division is the limit of the rest, and AVX-512 does not divide faster.
 */
#include "simd_x86.h"

PE_INLINE __m256i magnitude_bits(__m256 v)
{
    return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}

PE_INLINE uint32_t greatest(__m256i v)
{
    __m128i a = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    a = _mm_max_epi32(a, _mm_unpackhi_epi64(a, a));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epi32(a, _mm_shuffle_epi32(a, 1)));
}

static uint32_t greatest_magnitude(const float *x, int64_t n)
{
    __m256i a = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        f32x16 v = f32x16_load(x + i, 16);
        a = _mm256_max_epi32(a, _mm256_max_epi32(magnitude_bits(v.lo), magnitude_bits(v.hi)));
    }
    f32x16 v = f32x16_load(x + i, n - i);
    return greatest(
        _mm256_max_epi32(a, _mm256_max_epi32(magnitude_bits(v.lo), magnitude_bits(v.hi))));
}

/* rint(x / s) as int16: the conversion rounds to nearest even. */
PE_INLINE __m256i quantize16(f32x16 x, __m256 s)
{
    __m256i lo = _mm256_cvtps_epi32(_mm256_div_ps(x.lo, s));
    __m256i hi = _mm256_cvtps_epi32(_mm256_div_ps(x.hi, s));
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(lo, hi), 0xd8);
}

static int32_t quantize_group(const float *x, int64_t n, int16_t *q, float *scale)
{
    const uint32_t bits = greatest_magnitude(x, n);
    if (bits >= PE_INFINITY_BITS)
        return PE_ERROR_NONFINITE;
    const float a = pe_bits_to_float(bits);
    if (a < 0x1p-100f) {
        *scale = 0.0f;
        memset(q, 0, (size_t)n * sizeof *q);
        return PE_OK;
    }
    *scale = a / 32767.0f;
    const __m256 s = _mm256_set1_ps(*scale);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i *)(q + i), quantize16(f32x16_load(x + i, 16), s));
    if (i < n) {
        int16_t last[16];
        _mm256_storeu_si256((__m256i *)last, quantize16(f32x16_load(x + i, n - i), s));
        memcpy(q + i, last, (size_t)(n - i) * sizeof *q);
    }
    return PE_OK;
}

PE_INLINE void fill_quantize(pe_kernels *k)
{
    k->greatest_magnitude = greatest_magnitude;
    k->quantize_group = quantize_group;
}
