/* matmul_avx512vnni.c - the matmuls of matmul.c with AVX-512 and VNNI; see matmul_x86.h for how. */
#define LANES 16
#define BLOCK 8
#define FEW_TOKENS 5

#include <immintrin.h>

typedef __m512i ints;
typedef __m512 floats;

#include "matmul_x86.h"

/* v has its value now, in a register: left to itself, gcc moves sums and loads about until it runs
 * out of registers. */
#define PIN(v) __asm__ volatile("" : "+v"(v))

/* ---- few tokens ------------------------------------------------------------------------------ */

ALWAYS_INLINE __m512i widen8(const void *codes)
{
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(codes));
}

/* q * code, summed over a block's 32 columns but for a last sum over lanes. */
ALWAYS_INLINE __m512i dot32(__m512i sum, __m512i codes, const int16_t *q)
{
    return _mm512_dpwssd_epi32(sum, codes, _mm512_loadu_si512(q));
}

/* A group of nibbles with vpdpbusd, of unsigned with signed bytes, which spares widening them: q is
 * 256 high + low, high signed and low unsigned, as split_token leaves it; a nibble is either. */
ALWAYS_INLINE __m512i dot_nibbles(const uint8_t *codes, const int16_t *q)
{
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i pairs = _mm512_loadu_si512(codes);
    __m512i even = _mm512_and_si512(pairs, mask);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), mask);
    __m512i high = _mm512_setzero_si512(), low = high;
    high = _mm512_dpbusd_epi32(high, even, _mm512_loadu_si512(q));
    low = _mm512_dpbusd_epi32(low, _mm512_loadu_si512(q + 32), even);
    high = _mm512_dpbusd_epi32(high, odd, _mm512_loadu_si512(q + 64));
    low = _mm512_dpbusd_epi32(low, _mm512_loadu_si512(q + 96), odd);
    return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
}

/* q * code over a whole group (INT4: q * nibble); two chains. */
ALWAYS_INLINE __m512i dot_group(int type, const uint8_t *codes, const int16_t *q)
{
    if (type == PE_INT4)
        return dot_nibbles(codes, q);
    __m512i a = _mm512_setzero_si512(), b = a;
    a = dot32(a, widen8(codes), q);
    b = dot32(b, widen8(codes + 32), q + 32);
    a = dot32(a, widen8(codes + 64), q + 64);
    b = dot32(b, widen8(codes + 96), q + 96);
    return _mm512_add_epi32(a, b);
}

/* q * code over a block, in 8 parts: the sums are folded more often than those of groups, and half
 * the width costs half as much. */
ALWAYS_INLINE __m256i dot_block(const uint8_t *codes, const int16_t *q)
{
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < PE_BLOCK; i += 16)
        sum = _mm256_dpwssd_epi32(
            sum, _mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)(codes + i))),
            _mm256_loadu_si256((const void *)(q + i)));
    return sum;
}

/* Each 128-bit lane of the result is (a, b, c, d), and its lanes are still to be summed. */
ALWAYS_INLINE __m512i fold4(__m512i a, __m512i b, __m512i c, __m512i d)
{
    __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
}

ALWAYS_INLINE __m256i fold4_halves(__m256i a, __m256i b, __m256i c, __m256i d)
{
    __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

ALWAYS_INLINE __m128i fold_halves(__m256i v)
{
    return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

ALWAYS_INLINE __m128i fold_lanes(__m512i v)
{
    return fold_halves(_mm256_add_epi32(_mm512_castsi512_si256(v),
                                        _mm512_extracti64x4_epi64(v, 1)));
}

ALWAYS_INLINE __m128i dots_of_group(int type, const uint8_t *const *row, int64_t at,
                                    const int16_t *q)
{
    __m512i v[ROWS];
    UNROLL
    for (int i = 0; i < ROWS; i++)
        v[i] = dot_group(type, row[i] + at, q);
    return fold_lanes(fold4(v[0], v[1], v[2], v[3]));
}

ALWAYS_INLINE __m128i dots_of_block(const uint8_t *const *row, int64_t at, const int16_t *q)
{
    __m256i v[ROWS];
    UNROLL
    for (int i = 0; i < ROWS; i++)
        v[i] = dot_block(row[i] + at, q);
    return fold_halves(fold4_halves(v[0], v[1], v[2], v[3]));
}

/* A group becomes four times 64 bytes: high and low of its even columns, then of its odd ones. */
ALWAYS_INLINE void split_token(const int16_t *q, int64_t groups, int16_t *split, int32_t *excess)
{
    for (int64_t g = 0; g < groups; g++, q += PE_GROUP) {
        uint8_t *to = (uint8_t *)(split + g * PE_GROUP);
        __m512i sum = _mm512_setzero_si512();
        for (int i = 0; i < PE_GROUP; i += 32, to += 16) {
            __m512i x = _mm512_loadu_si512(q + i), odd = _mm512_srai_epi32(x, 16);
            sum = _mm512_dpwssd_epi32(sum, x, _mm512_set1_epi16(8));
            _mm_storeu_si128((void *)to, _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8)));
            _mm_storeu_si128((void *)(to + 64), _mm512_cvtepi32_epi8(x));
            _mm_storeu_si128((void *)(to + 128), _mm512_cvtepi32_epi8(_mm512_srli_epi32(odd, 8)));
            _mm_storeu_si128((void *)(to + 192), _mm512_cvtepi32_epi8(odd));
        }
        excess[g] = _mm512_reduce_add_epi32(sum);
    }
}

/* ---- many tokens ----------------------------------------------------------------------------- */

ALWAYS_INLINE __m256i load_two(const uint8_t *low, const uint8_t *high)
{
    return _mm256_set_m128i(_mm_loadu_si128((const void *)high),
                            _mm_loadu_si128((const void *)low));
}

/* 16 bytes of each of 16 rows: o[j] holds bytes 4j .. 4j+3 of all, rows in lanes. */
ALWAYS_INLINE void gather16(const uint8_t *const *row, int64_t at, __m512i o[4])
{
    __m512i v[4];
    for (int i = 0; i < 4; i++)
        v[i] = _mm512_inserti64x4(
            _mm512_castsi256_si512(load_two(row[i] + at, row[4 + i] + at)),
            load_two(row[8 + i] + at, row[12 + i] + at), 1);
    __m512i lo01 = _mm512_unpacklo_epi32(v[0], v[1]), hi01 = _mm512_unpackhi_epi32(v[0], v[1]);
    __m512i lo23 = _mm512_unpacklo_epi32(v[2], v[3]), hi23 = _mm512_unpackhi_epi32(v[2], v[3]);
    o[0] = _mm512_unpacklo_epi64(lo01, lo23);
    o[1] = _mm512_unpackhi_epi64(lo01, lo23);
    o[2] = _mm512_unpacklo_epi64(hi01, hi23);
    o[3] = _mm512_unpackhi_epi64(hi01, hi23);
}

/* 16 columns of int8, the bytes from at on, to 8 pairs. */
ALWAYS_INLINE void pack8(const uint8_t *const *row, int64_t at, __m512i (*pairs)[2], int h)
{
    const __m512i swap = _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200);
    const __m512i byte = _mm512_set1_epi16(0xff), sign = _mm512_set1_epi16(0x80);
    __m512i o[4];
    gather16(row, at, o);
    for (int j = 0; j < 4; j++) {
        __m512i x = _mm512_shuffle_epi8(o[j], swap); /* 16-bit halves: (c0, c2), (c1, c3) */
        __m512i c01 = _mm512_ternarylogic_epi32(x, byte, sign, 0x6a); /* (x & byte) ^ sign */
        pairs[2 * j][h] = _mm512_sub_epi16(c01, sign);
        pairs[2 * j + 1][h] = _mm512_srai_epi16(x, 8);
    }
}

/* Lane bits 0..3 of a and 16..19 of b, each less 8. */
ALWAYS_INLINE __m512i two_nibbles(__m512i a, __m512i b)
{
    const __m512i low = _mm512_set1_epi32(0x0000000f), high = _mm512_set1_epi32(0x000f0000);
    __m512i x = _mm512_or_si512(_mm512_and_si512(a, low), _mm512_and_si512(b, high));
    return _mm512_sub_epi16(x, _mm512_set1_epi16(8));
}

/* 32 columns of nibbles to 16 pairs. */
ALWAYS_INLINE void pack4(const uint8_t *const *row, int64_t at, __m512i (*pairs)[2], int h)
{
    __m512i o[4];
    gather16(row, at, o);
    for (int j = 0; j < 4; j++) {
        __m512i x = o[j];
        pairs[4 * j][h] = two_nibbles(x, _mm512_slli_epi32(x, 12));
        pairs[4 * j + 1][h] = two_nibbles(_mm512_srli_epi32(x, 8), _mm512_slli_epi32(x, 4));
        pairs[4 * j + 2][h] = two_nibbles(_mm512_srli_epi32(x, 16), _mm512_srli_epi32(x, 4));
        pairs[4 * j + 3][h] = two_nibbles(_mm512_srli_epi32(x, 24), _mm512_srli_epi32(x, 12));
    }
}

ALWAYS_INLINE void pack_scales(int type, const uint8_t *const *row, const uint16_t *halves,
                               int64_t n, tile *w)
{
    if (type == PE_Q8_0) {
        uint16_t s[BLOCKS][TILE];
        for (int i = 0; i < TILE; i++)
            for (int b = 0; b < BLOCKS; b++)
                s[b][i] = pe_load_u16(row[i] + b * Q8_BYTES);
        for (int b = 0; b < BLOCKS; b++)
            for (int h = 0; h < 2; h++)
                w->scale[b][h] = _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(s[b] + 16 * h)));
    } else {
        __mmask32 mask = (__mmask32)(0xffffffffu >> (TILE - n));
        __m512i s = _mm512_maskz_loadu_epi16(mask, halves);
        w->scale[0][0] = _mm512_cvtph_ps(_mm512_castsi512_si256(s));
        w->scale[0][1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(s, 1));
    }
}

ALWAYS_INLINE void tile_times_tokens(int type, const tile *w, const int16_t *q, int64_t ld,
                                     const float *s_x, int64_t groups, float (*y)[TILE], int n)
{
    const int blocks = type == PE_Q8_0 ? BLOCKS : 1, steps = PAIRS / blocks;
    __m512 part[BLOCKS][BLOCK][2];
    for (int b = 0; b < blocks; b++) {
        __m512i lo[BLOCK], hi[BLOCK];
        UNROLL
        for (int t = 0; t < n; t++)
            lo[t] = hi[t] = _mm512_setzero_si512();
        const int16_t *x = q + b * steps * 2;
        for (int i = b * steps; i < (b + 1) * steps; i++, x += 2) {
            __m512i w0 = w->pairs[i][0], w1 = w->pairs[i][1];
            PIN(w0);
            PIN(w1);
            UNROLL
            for (int t = 0; t < n; t++) {
                int32_t pair;
                memcpy(&pair, x + t * ld, sizeof pair);
                __m512i v = _mm512_set1_epi32(pair);
                PIN(v);
                lo[t] = _mm512_dpwssd_epi32(lo[t], w0, v);
                PIN(lo[t]);
                hi[t] = _mm512_dpwssd_epi32(hi[t], w1, v);
                PIN(hi[t]);
            }
        }
        UNROLL
        for (int t = 0; t < n; t++) {
            if (type == PE_Q8_0) {
                part[b][t][0] = _mm512_mul_ps(_mm512_cvtepi32_ps(lo[t]), w->scale[b][0]);
                part[b][t][1] = _mm512_mul_ps(_mm512_cvtepi32_ps(hi[t]), w->scale[b][1]);
            } else {
                __m512 s = _mm512_set1_ps(s_x[t * groups]);
                __m512 p0 = _mm512_mul_ps(_mm512_cvtepi32_ps(lo[t]),
                                          _mm512_mul_ps(w->scale[0][0], s));
                __m512 p1 = _mm512_mul_ps(_mm512_cvtepi32_ps(hi[t]),
                                          _mm512_mul_ps(w->scale[0][1], s));
                _mm512_storeu_ps(y[t], _mm512_add_ps(_mm512_loadu_ps(y[t]), p0));
                _mm512_storeu_ps(y[t] + 16, _mm512_add_ps(_mm512_loadu_ps(y[t] + 16), p1));
            }
        }
    }
    if (type == PE_Q8_0)
        for (int t = 0; t < n; t++)
            for (int h = 0; h < 2; h++) {
                __m512 p = _mm512_add_ps(_mm512_add_ps(part[0][t][h], part[1][t][h]),
                                         _mm512_add_ps(part[2][t][h], part[3][t][h]));
                p = _mm512_mul_ps(p, _mm512_set1_ps(s_x[t * groups]));
                _mm512_storeu_ps(y[t] + 16 * h, _mm512_add_ps(_mm512_loadu_ps(y[t] + 16 * h), p));
            }
}

/* ---- dense ----------------------------------------------------------------------------------- */

/* The columns of mask, of eight from p on, as doubles; zero elsewhere. */
ALWAYS_INLINE __m512d load_doubles(int type, const void *p, __mmask8 mask)
{
    if (type == PE_F32)
        return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, p));
    __m128i h = _mm_maskz_loadu_epi16(mask, p);
    if (type == PE_F16)
        return _mm512_cvtps_pd(_mm256_cvtph_ps(h));
    /* Each 16 bits become the upper half of 32. */
    const __m256i spread =
        _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, //
                         -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    __m256i f = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(h), spread);
    return _mm512_cvtps_pd(_mm256_castsi256_ps(f));
}

ALWAYS_INLINE float tree8(__m512d a)
{
    __m256d b = _mm256_add_pd(_mm512_castpd512_pd256(a), _mm512_extractf64x4_pd(a, 1));
    __m128d c = _mm_add_pd(_mm256_castpd256_pd128(b), _mm256_extractf128_pd(b, 1));
    return (float)(_mm_cvtsd_f64(c) + _mm_cvtsd_f64(_mm_unpackhi_pd(c, c)));
}

#define DENSE_ROWS 4
#define DENSE_TOKENS 4

ALWAYS_INLINE void dense_step(int type, const uint8_t *const *row, int64_t c, const float *x,
                              int64_t cols, int rows, int tokens, __mmask8 mask,
                              __m512d sum[DENSE_TOKENS][DENSE_ROWS])
{
    __m512d v[DENSE_ROWS];
    UNROLL
    for (int r = 0; r < rows; r++)
        v[r] = load_doubles(type, row[r] + bytes_of(type, c), mask);
    UNROLL
    for (int t = 0; t < tokens; t++) {
        __m512d u = load_doubles(PE_F32, x + t * cols + c, mask);
        UNROLL
        for (int r = 0; r < rows; r++)
            sum[t][r] = _mm512_fmadd_pd(u, v[r], sum[t][r]);
    }
}

/* rows <= DENSE_ROWS rows times tokens <= DENSE_TOKENS tokens, both constants. */
ALWAYS_INLINE void dense_block(int type, const uint8_t *data, int64_t cols, const float *x,
                               float *y, int64_t ldy, int rows, int tokens)
{
    const int64_t row_bytes = bytes_of(type, cols);
    const int near = fits_near(type, rows * row_bytes);
    const uint8_t *row[DENSE_ROWS];
    __m512d sum[DENSE_TOKENS][DENSE_ROWS];
    UNROLL
    for (int r = 0; r < rows; r++) {
        row[r] = data + r * row_bytes;
        UNROLL
        for (int t = 0; t < tokens; t++)
            sum[t][r] = _mm512_setzero_pd();
    }
    int64_t c = 0;
    for (; c + 8 <= cols; c += 8) {
        if (tokens == 1) /* the same share of the next rows, in storage order */
            prefetch_next(near, data + rows * (row_bytes + bytes_of(type, c)),
                          rows * bytes_of(type, 8));
        dense_step(type, row, c, x, cols, rows, tokens, 0xff, sum);
    }
    if (c < cols)
        dense_step(type, row, c, x, cols, rows, tokens, (__mmask8)(0xff >> (8 - (cols - c))), sum);
    UNROLL
    for (int t = 0; t < tokens; t++)
        UNROLL
        for (int r = 0; r < rows; r++)
            y[t * ldy + r] = tree8(sum[t][r]);
}

ALWAYS_INLINE void dense_rows(int type, const uint8_t *data, int64_t cols, const pe_activations *a,
                              float *y, int64_t ldy, int rows)
{
    int64_t t = 0;
    for (; t + DENSE_TOKENS <= a->tokens; t += DENSE_TOKENS)
        dense_block(type, data, cols, a->x + t * cols, y + t * ldy, ldy, rows, DENSE_TOKENS);
    for (; t < a->tokens; t++)
        dense_block(type, data, cols, a->x + t * cols, y + t * ldy, ldy, rows, 1);
}

ALWAYS_INLINE void matmul_dense(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                                const pe_activations *a, float *y, int64_t ldy)
{
    const uint8_t *data = w->data;
    const int64_t row_bytes = bytes_of(type, w->cols);
    int64_t r = row0;
    for (; r + DENSE_ROWS <= row1; r += DENSE_ROWS)
        dense_rows(type, data + r * row_bytes, w->cols, a, y + r, ldy, DENSE_ROWS);
    for (; r < row1; r++)
        dense_rows(type, data + r * row_bytes, w->cols, a, y + r, ldy, 1);
}

void pe_fill_avx512vnni_matmul(pe_kernels *k);
void pe_fill_avx512vnni_matmul(pe_kernels *k)
{
    fill_matmul(k);
}
