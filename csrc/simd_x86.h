/* simd_x86.h - vectors for both x86 levels; a file of the AVX-512 level first defines PE_AVX512.
 *
 * f32x16 and f64x8 are the two shapes of the contracts: sixteen float32 (dot16) and eight float64
 * (sum8).  Each is one AVX-512 register or a pair of AVX2 registers.  ints and floats are LANES
 * int32 and LANES float32: one register of the level.  A kernel that is written with these types
 * (activations_x86.h, ...) is compiled once per level.
 *
 * Each operation rounds as its scalar form does, lane by lane: no FMA, no reassociation.
 * A "part" touches only its first n elements of memory: the elements after them may be unreadable.
 */
#ifndef PYENGINE_SIMD_X86_H
#define PYENGINE_SIMD_X86_H

#include "kernels.h"

#include <immintrin.h>

/* ---- eight float32: one register on both levels ---------------------------------------------- */

/* All ones in the lanes below n. */
PE_INLINE __m256i lanes_below(int64_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* The first n elements, n <= 0 being none, and +0 beyond. */
PE_INLINE __m256 load8_part(const float *p, int64_t n)
{
    return _mm256_maskload_ps(p, lanes_below(n));
}

PE_INLINE void store8_part(float *p, __m256 v, int64_t n)
{
    _mm256_maskstore_ps(p, lanes_below(n), v);
}

/* ---- sixteen float32, eight float64 ---------------------------------------------------------- */

#ifdef PE_AVX512

typedef __m512 f32x16;
typedef __m512d f64x8;

PE_INLINE f32x16 f32x16_zero(void) { return _mm512_setzero_ps(); }
PE_INLINE f32x16 f32x16_all(float v) { return _mm512_set1_ps(v); }
PE_INLINE f32x16 f32x16_add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
PE_INLINE f32x16 f32x16_sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
PE_INLINE f32x16 f32x16_mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }

PE_INLINE f32x16 f32x16_load(const float *p, int64_t n)
{
    if (n >= 16)
        return _mm512_loadu_ps(p);
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}

PE_INLINE void f32x16_store(float *p, f32x16 v, int64_t n)
{
    if (n >= 16)
        _mm512_storeu_ps(p, v);
    else
        _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v);
}

/* The first step of dot16's tree: B[i] = A[i] + A[i+8]. */
PE_INLINE __m256 f32x16_fold(f32x16 a)
{
    return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}

PE_INLINE f64x8 f64x8_zero(void) { return _mm512_setzero_pd(); }
PE_INLINE f64x8 f64x8_all(double v) { return _mm512_set1_pd(v); }
PE_INLINE f64x8 f64x8_load(const double *p) { return _mm512_loadu_pd(p); }
PE_INLINE void f64x8_store(double *p, f64x8 v) { _mm512_storeu_pd(p, v); }
PE_INLINE f64x8 f64x8_add(f64x8 a, f64x8 b) { return _mm512_add_pd(a, b); }
PE_INLINE f64x8 f64x8_sub(f64x8 a, f64x8 b) { return _mm512_sub_pd(a, b); }
PE_INLINE f64x8 f64x8_mul(f64x8 a, f64x8 b) { return _mm512_mul_pd(a, b); }
PE_INLINE f64x8 f64x8_div(f64x8 a, f64x8 b) { return _mm512_div_pd(a, b); }
PE_INLINE f64x8 f64x8_min(f64x8 a, f64x8 b) { return _mm512_min_pd(a, b); }
PE_INLINE f64x8 f64x8_max(f64x8 a, f64x8 b) { return _mm512_max_pd(a, b); }
PE_INLINE f64x8 f64x8_widen(__m256 v) { return _mm512_cvtps_pd(v); }
PE_INLINE __m256 f64x8_narrow(f64x8 v) { return _mm512_cvtpd_ps(v); }

/* 2^k, where the low twelve bits of a lane hold k, -1022 <= k <= 1023. */
PE_INLINE f64x8 f64x8_pow2(f64x8 v)
{
    __m512i k = _mm512_add_epi64(_mm512_castpd_si512(v), _mm512_set1_epi64(1023));
    return _mm512_castsi512_pd(_mm512_slli_epi64(k, 52));
}

/* The first step of sum8's tree: B[i] = A[i] + A[i+4]. */
PE_INLINE __m256d f64x8_fold(f64x8 a)
{
    return _mm256_add_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
}

#define LANES 16
typedef __m512i ints;
typedef __m512 floats;

/* Macros: the count must be an immediate. */
#define INTS_SHIFT_LEFT(v, count) _mm512_slli_epi32(v, count)
#define INTS_SHIFT_RIGHT(v, count) _mm512_srli_epi32(v, count) /* logical */

PE_INLINE ints ints_zero(void) { return _mm512_setzero_si512(); }
PE_INLINE ints ints_all(int32_t v) { return _mm512_set1_epi32(v); }
PE_INLINE ints ints_load(const int32_t *p) { return _mm512_loadu_si512(p); }
PE_INLINE ints ints_and(ints a, ints b) { return _mm512_and_si512(a, b); }
PE_INLINE ints ints_or(ints a, ints b) { return _mm512_or_si512(a, b); }
/* Two int16 in each lane. */
PE_INLINE ints ints_sub16(ints a, ints b) { return _mm512_sub_epi16(a, b); }
PE_INLINE ints ints_mul16(ints a, ints b) { return _mm512_mullo_epi16(a, b); }
/* Four int8 in each lane. */
PE_INLINE ints ints_sub8(ints a, ints b) { return _mm512_sub_epi8(a, b); }
#define INTS_SHIFT16_LEFT(v, count) _mm512_slli_epi16(v, count)
#define INTS_SHIFT16_RIGHT(v, count) _mm512_srli_epi16(v, count) /* logical */
#define INTS_SHIFT16_RIGHT_SIGNED(v, count) _mm512_srai_epi16(v, count)
/* a + b in each int16 where v has a bit of mask, else a. */
PE_INLINE ints ints_add16_where(ints a, ints b, ints v, ints mask)
{
    return _mm512_mask_add_epi16(a, _mm512_test_epi16_mask(v, mask), a, b);
}
/* The same 16 bytes in every 128 bits. */
PE_INLINE ints ints_repeat(__m128i v) { return _mm512_broadcast_i32x4(v); }
/* Byte i of each 128 bits is byte at[i] of these bits of v, or 0 where at[i] is negative. */
PE_INLINE ints ints_shuffle8(ints v, ints at) { return _mm512_shuffle_epi8(v, at); }

PE_INLINE floats floats_all(float v) { return _mm512_set1_ps(v); }
PE_INLINE floats floats_add(floats a, floats b) { return _mm512_add_ps(a, b); }
PE_INLINE floats floats_sub(floats a, floats b) { return _mm512_sub_ps(a, b); }
PE_INLINE floats floats_mul(floats a, floats b) { return _mm512_mul_ps(a, b); }
PE_INLINE floats floats_load(const float *p) { return _mm512_loadu_ps(p); }
PE_INLINE void floats_store(float *p, floats v) { _mm512_storeu_ps(p, v); }
PE_INLINE floats floats_of_ints(ints v) { return _mm512_cvtepi32_ps(v); }

/* The first n elements, n <= 0 being none, and +0 beyond. */
PE_INLINE floats floats_load_part(const float *p, int64_t n)
{
    return f32x16_load(p, n < 0 ? 0 : n);
}

PE_INLINE void floats_store_part(float *p, floats v, int64_t n) { f32x16_store(p, v, n); }

/* f32x16_fold of sums that come in one pass. */
PE_INLINE void floats_fold(floats sum, int pass, __m256 *b)
{
    (void)pass;
    *b = f32x16_fold(sum);
}

PE_INLINE floats floats_of_halves(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
}

#else

typedef struct {
    __m256 lo, hi;
} f32x16;
typedef struct {
    __m256d lo, hi;
} f64x8;

PE_INLINE f32x16 f32x16_all(float v) { return (f32x16){_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
PE_INLINE f32x16 f32x16_zero(void) { return f32x16_all(0.0f); }

PE_INLINE f32x16 f32x16_add(f32x16 a, f32x16 b)
{
    return (f32x16){_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}

PE_INLINE f32x16 f32x16_sub(f32x16 a, f32x16 b)
{
    return (f32x16){_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}

PE_INLINE f32x16 f32x16_mul(f32x16 a, f32x16 b)
{
    return (f32x16){_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}

PE_INLINE f32x16 f32x16_load(const float *p, int64_t n)
{
    if (n >= 16)
        return (f32x16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
    return (f32x16){load8_part(p, n), load8_part(p + 8, n - 8)};
}

PE_INLINE void f32x16_store(float *p, f32x16 v, int64_t n)
{
    if (n >= 16) {
        _mm256_storeu_ps(p, v.lo);
        _mm256_storeu_ps(p + 8, v.hi);
    } else {
        store8_part(p, v.lo, n);
        store8_part(p + 8, v.hi, n - 8);
    }
}

/* The first step of dot16's tree: B[i] = A[i] + A[i+8]. */
PE_INLINE __m256 f32x16_fold(f32x16 a) { return _mm256_add_ps(a.lo, a.hi); }

PE_INLINE f64x8 f64x8_all(double v) { return (f64x8){_mm256_set1_pd(v), _mm256_set1_pd(v)}; }
PE_INLINE f64x8 f64x8_zero(void) { return f64x8_all(0.0); }

PE_INLINE f64x8 f64x8_load(const double *p)
{
    return (f64x8){_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)};
}

PE_INLINE void f64x8_store(double *p, f64x8 v)
{
    _mm256_storeu_pd(p, v.lo);
    _mm256_storeu_pd(p + 4, v.hi);
}

PE_INLINE f64x8 f64x8_add(f64x8 a, f64x8 b)
{
    return (f64x8){_mm256_add_pd(a.lo, b.lo), _mm256_add_pd(a.hi, b.hi)};
}

PE_INLINE f64x8 f64x8_sub(f64x8 a, f64x8 b)
{
    return (f64x8){_mm256_sub_pd(a.lo, b.lo), _mm256_sub_pd(a.hi, b.hi)};
}

PE_INLINE f64x8 f64x8_mul(f64x8 a, f64x8 b)
{
    return (f64x8){_mm256_mul_pd(a.lo, b.lo), _mm256_mul_pd(a.hi, b.hi)};
}

PE_INLINE f64x8 f64x8_div(f64x8 a, f64x8 b)
{
    return (f64x8){_mm256_div_pd(a.lo, b.lo), _mm256_div_pd(a.hi, b.hi)};
}

PE_INLINE f64x8 f64x8_min(f64x8 a, f64x8 b)
{
    return (f64x8){_mm256_min_pd(a.lo, b.lo), _mm256_min_pd(a.hi, b.hi)};
}

PE_INLINE f64x8 f64x8_max(f64x8 a, f64x8 b)
{
    return (f64x8){_mm256_max_pd(a.lo, b.lo), _mm256_max_pd(a.hi, b.hi)};
}

PE_INLINE f64x8 f64x8_widen(__m256 v)
{
    return (f64x8){_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                   _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
}

PE_INLINE __m256 f64x8_narrow(f64x8 v)
{
    return _mm256_set_m128(_mm256_cvtpd_ps(v.hi), _mm256_cvtpd_ps(v.lo));
}

PE_INLINE __m256d f64x4_pow2(__m256d v)
{
    __m256i k = _mm256_add_epi64(_mm256_castpd_si256(v), _mm256_set1_epi64x(1023));
    return _mm256_castsi256_pd(_mm256_slli_epi64(k, 52));
}

/* 2^k, where the low twelve bits of a lane hold k, -1022 <= k <= 1023. */
PE_INLINE f64x8 f64x8_pow2(f64x8 v) { return (f64x8){f64x4_pow2(v.lo), f64x4_pow2(v.hi)}; }

/* The first step of sum8's tree: B[i] = A[i] + A[i+4]. */
PE_INLINE __m256d f64x8_fold(f64x8 a) { return _mm256_add_pd(a.lo, a.hi); }

#define LANES 8
typedef __m256i ints;
typedef __m256 floats;

/* Macros: the count must be an immediate. */
#define INTS_SHIFT_LEFT(v, count) _mm256_slli_epi32(v, count)
#define INTS_SHIFT_RIGHT(v, count) _mm256_srli_epi32(v, count) /* logical */

PE_INLINE ints ints_zero(void) { return _mm256_setzero_si256(); }
PE_INLINE ints ints_all(int32_t v) { return _mm256_set1_epi32(v); }
PE_INLINE ints ints_load(const int32_t *p) { return _mm256_loadu_si256((const void *)p); }
PE_INLINE ints ints_and(ints a, ints b) { return _mm256_and_si256(a, b); }
PE_INLINE ints ints_or(ints a, ints b) { return _mm256_or_si256(a, b); }
/* Two int16 in each lane. */
PE_INLINE ints ints_sub16(ints a, ints b) { return _mm256_sub_epi16(a, b); }
PE_INLINE ints ints_mul16(ints a, ints b) { return _mm256_mullo_epi16(a, b); }
/* Four int8 in each lane. */
PE_INLINE ints ints_sub8(ints a, ints b) { return _mm256_sub_epi8(a, b); }
#define INTS_SHIFT16_LEFT(v, count) _mm256_slli_epi16(v, count)
#define INTS_SHIFT16_RIGHT(v, count) _mm256_srli_epi16(v, count) /* logical */
#define INTS_SHIFT16_RIGHT_SIGNED(v, count) _mm256_srai_epi16(v, count)
/* a + b in each int16 where v has the bit of mask, else a. */
PE_INLINE ints ints_add16_where(ints a, ints b, ints v, ints mask)
{
    __m256i where = _mm256_cmpeq_epi16(_mm256_and_si256(v, mask), mask);
    return _mm256_add_epi16(a, _mm256_and_si256(where, b));
}
/* The same 16 bytes in every 128 bits. */
PE_INLINE ints ints_repeat(__m128i v) { return _mm256_broadcastsi128_si256(v); }
/* Byte i of each 128 bits is byte at[i] of these bits of v, or 0 where at[i] is negative. */
PE_INLINE ints ints_shuffle8(ints v, ints at) { return _mm256_shuffle_epi8(v, at); }

PE_INLINE floats floats_all(float v) { return _mm256_set1_ps(v); }
PE_INLINE floats floats_add(floats a, floats b) { return _mm256_add_ps(a, b); }
PE_INLINE floats floats_sub(floats a, floats b) { return _mm256_sub_ps(a, b); }
PE_INLINE floats floats_mul(floats a, floats b) { return _mm256_mul_ps(a, b); }
PE_INLINE floats floats_load(const float *p) { return _mm256_loadu_ps(p); }
PE_INLINE void floats_store(float *p, floats v) { _mm256_storeu_ps(p, v); }
PE_INLINE floats floats_of_ints(ints v) { return _mm256_cvtepi32_ps(v); }

/* The first n elements, n <= 0 being none, and +0 beyond. */
PE_INLINE floats floats_load_part(const float *p, int64_t n)
{
    return n >= 8 ? _mm256_loadu_ps(p) : load8_part(p, n);
}

PE_INLINE void floats_store_part(float *p, floats v, int64_t n)
{
    if (n >= 8)
        _mm256_storeu_ps(p, v);
    else
        store8_part(p, v, n);
}

/* f32x16_fold of sums that come in two passes, the lower eight first. */
PE_INLINE void floats_fold(floats sum, int pass, __m256 *b)
{
    *b = pass == 0 ? sum : _mm256_add_ps(*b, sum);
}

PE_INLINE floats floats_of_halves(const uint16_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
}

#endif

/* The start of an ascending sum: -0 + x is x for every x, even -0, so the sum starts with x. */
PE_INLINE f32x16 f32x16_nothing(void) { return f32x16_all(-0.0f); }

/* Valid lanes of vector v of several; only the last vector may be partial. */
PE_INLINE int64_t lanes_of(int v, int vectors, int64_t last) { return v < vectors - 1 ? 16 : last; }

/* sum8's tree: B by the fold, then C[i] = B[i] + B[i+2], then C[0] + C[1]. */
PE_INLINE double f64x8_tree(f64x8 a)
{
    __m256d b = f64x8_fold(a);
    __m128d c = _mm_add_pd(_mm256_castpd256_pd128(b), _mm256_extractf128_pd(b, 1));
    return _mm_cvtsd_f64(_mm_add_sd(c, _mm_unpackhi_pd(c, c)));
}

#endif
