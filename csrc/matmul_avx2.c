/* matmul_avx2.c - the matmuls of matmul.c with AVX2, F16C and FMA; see matmul_x86.h for how. */
#define LANES 8
#define BLOCK 4
#define FEW_TOKENS 4

#include <immintrin.h>

typedef __m256i ints;
typedef __m256 floats;

#include "matmul_x86.h"

/* sum += v.  Written out, since gcc copies the sums of a loop from register to register otherwise,
 * and moves the additions about until it runs out of registers. */
#define ADD(sum, v) __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(v))

/* ---- few tokens ------------------------------------------------------------------------------ */

ALWAYS_INLINE __m256i widen8(const void *codes)
{
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(codes));
}

/* q * code of 16 columns, in 8 sums. */
ALWAYS_INLINE __m256i dot16(__m256i codes, const int16_t *q)
{
    return _mm256_madd_epi16(codes, _mm256_loadu_si256((const void *)q));
}

/* The same over 32 columns, one block of Q8_0. */
ALWAYS_INLINE __m256i dot32(const uint8_t *codes, const int16_t *q)
{
    return _mm256_add_epi32(dot16(widen8(codes), q), dot16(widen8(codes + 16), q + 16));
}

/* 16 bytes of nibbles, q as split_token leaves it.  */
ALWAYS_INLINE __m256i dot32_nibbles(const uint8_t *codes, const int16_t *q)
{
    __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)codes));
    __m256i even = _mm256_and_si256(pairs, _mm256_set1_epi16(15));
    return _mm256_add_epi32(dot16(even, q), dot16(_mm256_srli_epi16(pairs, 4), q + 16));
}

/* q * code over a whole group (INT4: q * nibble); two chains. */
ALWAYS_INLINE __m256i dot_group(int type, const uint8_t *codes, const int16_t *q)
{
    __m256i d[4];
    for (int i = 0; i < 4; i++)
        d[i] = type == PE_INT4 ? dot32_nibbles(codes + 16 * i, q + 32 * i)
                               : dot32(codes + 32 * i, q + 32 * i);
    return _mm256_add_epi32(_mm256_add_epi32(d[0], d[1]), _mm256_add_epi32(d[2], d[3]));
}

/* Each 128-bit lane of the result is (a, b, c, d), and its lanes are still to be summed. */
ALWAYS_INLINE __m256i fold4(__m256i a, __m256i b, __m256i c, __m256i d)
{
    __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

ALWAYS_INLINE __m128i fold_lanes(__m256i v)
{
    return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

ALWAYS_INLINE __m128i dots_of_group(int type, const uint8_t *const *row, int64_t at,
                                    const int16_t *q)
{
    __m256i v[ROWS];
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
        v[i] = dot32(row[i] + at, q);
    return fold_lanes(fold4(v[0], v[1], v[2], v[3]));
}

/* Each 32 columns become the 16 even ones, then the 16 odd ones. */
ALWAYS_INLINE void split_token(const int16_t *q, int64_t groups, int16_t *split, int32_t *excess)
{
    for (int64_t g = 0; g < groups; g++) {
        int32_t sum = 0;
        for (int64_t c = g * PE_GROUP; c < (g + 1) * PE_GROUP; c += 32)
            for (int64_t i = 0; i < 16; i++) {
                sum += q[c + 2 * i] + q[c + 2 * i + 1];
                split[c + i] = q[c + 2 * i];
                split[c + 16 + i] = q[c + 2 * i + 1];
            }
        excess[g] = 8 * sum;
    }
}

/* ---- many tokens ----------------------------------------------------------------------------- */

/* 16 bytes of each of 8 rows: o[j] holds bytes 4j .. 4j+3 of all, rows in lanes. */
ALWAYS_INLINE void gather16(const uint8_t *const *row, int64_t at, __m256i o[4])
{
    __m256i v[4];
    for (int i = 0; i < 4; i++)
        v[i] = _mm256_set_m128i(_mm_loadu_si128((const void *)(row[4 + i] + at)),
                                _mm_loadu_si128((const void *)(row[i] + at)));
    __m256i lo01 = _mm256_unpacklo_epi32(v[0], v[1]), hi01 = _mm256_unpackhi_epi32(v[0], v[1]);
    __m256i lo23 = _mm256_unpacklo_epi32(v[2], v[3]), hi23 = _mm256_unpackhi_epi32(v[2], v[3]);
    o[0] = _mm256_unpacklo_epi64(lo01, lo23);
    o[1] = _mm256_unpackhi_epi64(lo01, lo23);
    o[2] = _mm256_unpacklo_epi64(hi01, hi23);
    o[3] = _mm256_unpackhi_epi64(hi01, hi23);
}

/* 16 columns of int8, the bytes from at on, to 8 pairs. */
ALWAYS_INLINE void pack8(const uint8_t *const *row, int64_t at, __m256i (*pairs)[2], int h)
{
    const __m256i swap = _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15,
                                          0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    __m256i o[4];
    gather16(row, at, o);
    for (int j = 0; j < 4; j++) {
        __m256i x = _mm256_shuffle_epi8(o[j], swap); /* 16-bit halves: (c0, c2), (c1, c3) */
        pairs[2 * j][h] = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
        pairs[2 * j + 1][h] = _mm256_srai_epi16(x, 8);
    }
}

/* Lane bits 0..3 of a and 16..19 of b, each less 8. */
ALWAYS_INLINE __m256i two_nibbles(__m256i a, __m256i b)
{
    const __m256i low = _mm256_set1_epi32(0x0000000f), high = _mm256_set1_epi32(0x000f0000);
    __m256i x = _mm256_or_si256(_mm256_and_si256(a, low), _mm256_and_si256(b, high));
    return _mm256_sub_epi16(x, _mm256_set1_epi16(8));
}

/* 32 columns of nibbles to 16 pairs. */
ALWAYS_INLINE void pack4(const uint8_t *const *row, int64_t at, __m256i (*pairs)[2], int h)
{
    __m256i o[4];
    gather16(row, at, o);
    for (int j = 0; j < 4; j++) {
        __m256i x = o[j];
        pairs[4 * j][h] = two_nibbles(x, _mm256_slli_epi32(x, 12));
        pairs[4 * j + 1][h] = two_nibbles(_mm256_srli_epi32(x, 8), _mm256_slli_epi32(x, 4));
        pairs[4 * j + 2][h] = two_nibbles(_mm256_srli_epi32(x, 16), _mm256_srli_epi32(x, 4));
        pairs[4 * j + 3][h] = two_nibbles(_mm256_srli_epi32(x, 24), _mm256_srli_epi32(x, 12));
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
                w->scale[b][h] = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(s[b] + 8 * h)));
    } else {
        uint16_t s[TILE] = {0};
        memcpy(s, halves, (size_t)n * sizeof s[0]);
        for (int h = 0; h < 2; h++)
            w->scale[0][h] = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(s + 8 * h)));
    }
}

ALWAYS_INLINE void tile_times_tokens(int type, const tile *w, const int16_t *q, int64_t ld,
                                     const float *s_x, int64_t groups, float (*y)[TILE], int n)
{
    const int blocks = type == PE_Q8_0 ? BLOCKS : 1, steps = PAIRS / blocks;
    __m256 part[BLOCKS][BLOCK][2];
    for (int b = 0; b < blocks; b++) {
        __m256i lo[BLOCK], hi[BLOCK];
        UNROLL
        for (int t = 0; t < n; t++)
            lo[t] = hi[t] = _mm256_setzero_si256();
        const int16_t *x = q + b * steps * 2;
        for (int i = b * steps; i < (b + 1) * steps; i++, x += 2) {
            __m256i w0 = w->pairs[i][0], w1 = w->pairs[i][1];
            UNROLL
            for (int t = 0; t < n; t++) {
                int32_t pair;
                memcpy(&pair, x + t * ld, sizeof pair);
                __m256i v = _mm256_set1_epi32(pair);
                ADD(lo[t], _mm256_madd_epi16(w0, v));
                ADD(hi[t], _mm256_madd_epi16(w1, v));
            }
        }
        UNROLL
        for (int t = 0; t < n; t++) {
            if (type == PE_Q8_0) {
                part[b][t][0] = _mm256_mul_ps(_mm256_cvtepi32_ps(lo[t]), w->scale[b][0]);
                part[b][t][1] = _mm256_mul_ps(_mm256_cvtepi32_ps(hi[t]), w->scale[b][1]);
            } else {
                __m256 s = _mm256_set1_ps(s_x[t * groups]);
                __m256 p0 = _mm256_mul_ps(_mm256_cvtepi32_ps(lo[t]),
                                          _mm256_mul_ps(w->scale[0][0], s));
                __m256 p1 = _mm256_mul_ps(_mm256_cvtepi32_ps(hi[t]),
                                          _mm256_mul_ps(w->scale[0][1], s));
                _mm256_storeu_ps(y[t], _mm256_add_ps(_mm256_loadu_ps(y[t]), p0));
                _mm256_storeu_ps(y[t] + 8, _mm256_add_ps(_mm256_loadu_ps(y[t] + 8), p1));
            }
        }
    }
    if (type == PE_Q8_0)
        for (int t = 0; t < n; t++)
            for (int h = 0; h < 2; h++) {
                __m256 p = _mm256_add_ps(_mm256_add_ps(part[0][t][h], part[1][t][h]),
                                         _mm256_add_ps(part[2][t][h], part[3][t][h]));
                p = _mm256_mul_ps(p, _mm256_set1_ps(s_x[t * groups]));
                _mm256_storeu_ps(y[t] + 8 * h, _mm256_add_ps(_mm256_loadu_ps(y[t] + 8 * h), p));
            }
}

/* ---- dense ----------------------------------------------------------------------------------- */

/* Four values from p on, as doubles. */
ALWAYS_INLINE __m256d load_doubles(int type, const void *p)
{
    if (type == PE_F32)
        return _mm256_cvtps_pd(_mm_loadu_ps(p));
    __m128i h = _mm_loadl_epi64(p);
    if (type == PE_F16)
        return _mm256_cvtps_pd(_mm_cvtph_ps(h));
    /* Each 16 bits become the upper half of 32. */
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), h)));
}

ALWAYS_INLINE float tree8(__m256d lo, __m256d hi)
{
    __m256d b = _mm256_add_pd(lo, hi);
    __m128d c = _mm_add_pd(_mm256_castpd256_pd128(b), _mm256_extractf128_pd(b, 1));
    return (float)(_mm_cvtsd_f64(c) + _mm_cvtsd_f64(_mm_unpackhi_pd(c, c)));
}

#define DENSE_ROWS 4 /* for a single token, else DENSE_ROWS / 2 by DENSE_TOKENS */
#define DENSE_TOKENS 2

typedef struct {
    __m256d half[2];
} sum8;

/* Columns [c, c + 8) of row[r] and x[t]. */
ALWAYS_INLINE void dense_step(int type, const uint8_t *const *row, const float *const *x, int64_t c,
                              int rows, int tokens, sum8 sum[DENSE_TOKENS][DENSE_ROWS])
{
    UNROLL
    for (int h = 0; h < 2; h++) {
        __m256d u[DENSE_TOKENS];
        UNROLL
        for (int t = 0; t < tokens; t++)
            u[t] = load_doubles(PE_F32, x[t] + c + 4 * h);
        UNROLL
        for (int r = 0; r < rows; r++) {
            __m256d v = load_doubles(type, row[r] + bytes_of(type, c + 4 * h));
            UNROLL
            for (int t = 0; t < tokens; t++)
                sum[t][r].half[h] = _mm256_fmadd_pd(u[t], v, sum[t][r].half[h]);
        }
    }
}

/* rows <= DENSE_ROWS rows times tokens <= DENSE_TOKENS tokens, both constants. */
ALWAYS_INLINE void dense_block(int type, const uint8_t *data, int64_t cols, const float *x,
                               float *y, int64_t ldy, int rows, int tokens)
{
    const int64_t row_bytes = bytes_of(type, cols), end = cols / 8 * 8;
    const int near = fits_near(type, rows * row_bytes);
    const uint8_t *row[DENSE_ROWS];
    const float *token[DENSE_TOKENS];
    sum8 sum[DENSE_TOKENS][DENSE_ROWS];
    UNROLL
    for (int t = 0; t < tokens; t++) {
        token[t] = x + t * cols;
        UNROLL
        for (int r = 0; r < rows; r++)
            sum[t][r].half[0] = sum[t][r].half[1] = _mm256_setzero_pd();
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        row[r] = data + r * row_bytes;
    for (int64_t c = 0; c < end; c += 8) {
        if (tokens == 1) /* the same share of the next rows, in storage order */
            prefetch_next(near, data + rows * (row_bytes + bytes_of(type, c)),
                          rows * bytes_of(type, 8));
        dense_step(type, row, token, c, rows, tokens, sum);
    }
    if (end < cols) { /* the last columns, filled up with zeros */
        uint8_t last_w[DENSE_ROWS][32] = {0};
        float last_x[DENSE_TOKENS][8] = {0};
        for (int t = 0; t < tokens; t++) {
            memcpy(last_x[t], token[t] + end, (size_t)(cols - end) * sizeof(float));
            token[t] = last_x[t];
        }
        for (int r = 0; r < rows; r++) {
            memcpy(last_w[r], row[r] + bytes_of(type, end), (size_t)bytes_of(type, cols - end));
            row[r] = last_w[r];
        }
        dense_step(type, row, token, 0, rows, tokens, sum);
    }
    UNROLL
    for (int t = 0; t < tokens; t++)
        UNROLL
        for (int r = 0; r < rows; r++)
            y[t * ldy + r] = tree8(sum[t][r].half[0], sum[t][r].half[1]);
}

ALWAYS_INLINE void matmul_dense(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                                const pe_activations *a, float *y, int64_t ldy)
{
    const uint8_t *data = w->data;
    const int64_t row_bytes = bytes_of(type, w->cols);
    int64_t r = row0;
    for (; r + DENSE_ROWS <= row1; r += DENSE_ROWS) {
        const uint8_t *row = data + r * row_bytes;
        int64_t t = 0;
        for (; t + DENSE_TOKENS <= a->tokens; t += DENSE_TOKENS)
            for (int i = 0; i < DENSE_ROWS; i += DENSE_ROWS / 2)
                dense_block(type, row + i * row_bytes, w->cols, a->x + t * w->cols,
                            y + t * ldy + r + i, ldy, DENSE_ROWS / 2, DENSE_TOKENS);
        for (; t < a->tokens; t++)
            dense_block(type, row, w->cols, a->x + t * w->cols, y + t * ldy + r, ldy, DENSE_ROWS,
                        1);
    }
    for (; r < row1; r++)
        for (int64_t t = 0; t < a->tokens; t++)
            dense_block(type, data + r * row_bytes, w->cols, a->x + t * w->cols, y + t * ldy + r,
                        ldy, 1, 1);
}

void pe_fill_avx2_matmul(pe_kernels *k);
void pe_fill_avx2_matmul(pe_kernels *k)
{
    fill_matmul(k);
}
