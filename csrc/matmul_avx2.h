/* matmul_avx2.h - the matmuls of matmul.c with AVX2, F16C and FMA; see matmul_x86.h. */
#define BLOCK 4
#define FEW_AT_ONCE 1 /* no registers are left for the codes of a second token */

#include "matmul_x86.h"

/* ---- few tokens ------------------------------------------------------------------------------ */

PE_INLINE __m256i widen8(const void *codes) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(codes)); }

/* q * code of 16 columns, in 8 sums. */
PE_INLINE __m256i dot16(__m256i codes, const int16_t *q)
{
    return _mm256_madd_epi16(codes, _mm256_loadu_si256((const void *)q));
}

/* The same over 32 columns, one block of Q8_0. */
PE_INLINE __m256i dot32(const uint8_t *codes, const int16_t *q)
{
    return _mm256_add_epi32(dot16(widen8(codes), q), dot16(widen8(codes + 16), q + 16));
}

/* 16 bytes of nibbles, q as split_token leaves it.  */
PE_INLINE __m256i dot32_nibbles(const uint8_t *codes, const int16_t *q)
{
    __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)codes));
    __m256i even = _mm256_and_si256(pairs, _mm256_set1_epi16(15));
    return _mm256_add_epi32(dot16(even, q), dot16(_mm256_srli_epi16(pairs, 4), q + 16));
}

/* q * code over a whole group (INT4: q * nibble); two chains. */
PE_INLINE __m256i dot_group(int type, const uint8_t *codes, const int16_t *q)
{
    __m256i d[4];
    for (int i = 0; i < 4; i++)
        d[i] = type == PE_INT4 ? dot32_nibbles(codes + 16 * i, q + 32 * i)
                               : dot32(codes + 32 * i, q + 32 * i);
    return _mm256_add_epi32(_mm256_add_epi32(d[0], d[1]), _mm256_add_epi32(d[2], d[3]));
}

/* Each 128-bit lane of the result is (a, b, c, d); the 128-bit lanes are not summed yet. */
PE_INLINE __m256i fold4(__m256i a, __m256i b, __m256i c, __m256i d)
{
    __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

PE_INLINE __m128i fold_lanes(__m256i v)
{
    return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

/* The sums of q * code (INT4: of q * nibble) over one group, whose codes are at byte `at` of ROWS
 * rows. */
PE_INLINE __m128i dots_of_group(int type, const uint8_t *const *row, int64_t at, const int16_t *q)
{
    __m256i v[ROWS];
    UNROLL
    for (int i = 0; i < ROWS; i++)
        v[i] = dot_group(type, row[i] + at, q);
    return fold_lanes(fold4(v[0], v[1], v[2], v[3]));
}

/* The same over the codes of one block of Q8_0. */
PE_INLINE __m128i dots_of_block(const uint8_t *const *row, int64_t at, const int16_t *q)
{
    __m256i v[ROWS];
    UNROLL
    for (int i = 0; i < ROWS; i++)
        v[i] = dot32(row[i] + at, q);
    return fold_lanes(fold4(v[0], v[1], v[2], v[3]));
}

/* Each 32 columns become the 16 even ones, then the 16 odd ones. */
PE_INLINE void split_pairs(const int16_t *q, int64_t groups, int16_t *split, int32_t *excess)
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

#include "matmul_nibbles_avx2.h"

/* The most tokens, by measurement. */
PE_INLINE int64_t few_tokens(int type) { return type == PE_Q8_0 ? 3 : 4; }

PE_INLINE int64_t sums_of(int type) { return type == PE_INT4 ? 1 : SUMS; }

PE_INLINE int64_t one_token_rows(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                                 const int16_t *q, const int32_t *sums, const float *s_x, float *y)
{
    (void)type, (void)w, (void)row1, (void)q, (void)sums, (void)s_x, (void)y;
    return row0;
}

/* The part of INT8 and INT4; the group's codes are at byte `at` of the rows. */
PE_INLINE __m128 group_part(int type, const few *f, int64_t g, int64_t at)
{
    __m128i d = dots_of_group(type, f->row, at, f->q + g * PE_GROUP);
    if (type == PE_INT4)
        d = _mm_sub_epi32(d, _mm_set1_epi32(f->sums[g]));
    __m128 s = load_scales(f->scales + g * f->scale_ld, f->n);
    return _mm_mul_ps(_mm_cvtepi32_ps(d), _mm_mul_ps(s, _mm_set1_ps(f->s_x[g])));
}

/* The same for Q8_0. */
PE_INLINE __m128 blocks_part(const few *f, int64_t g, int64_t at)
{
    __m128 p[BLOCKS];
    UNROLL
    for (int b = 0; b < BLOCKS; b++) {
        int64_t block = at + b * Q8_BYTES;
        __m128i d = dots_of_block(f->row, block + 2, f->q + g * PE_GROUP + b * PE_BLOCK);
        p[b] = _mm_mul_ps(_mm_cvtepi32_ps(d), block_halves(f->row, block));
    }
    __m128 sum = _mm_add_ps(_mm_add_ps(p[0], p[1]), _mm_add_ps(p[2], p[3]));
    return _mm_mul_ps(sum, _mm_set1_ps(f->s_x[g]));
}

PE_INLINE void add_group(int type, const few *f, int64_t tokens, int64_t g, int64_t at, __m128 *sum)
{
    (void)tokens; /* FEW_AT_ONCE */
    __m128 part = type == PE_Q8_0 ? blocks_part(f, g, at) : _mm_setzero_ps();
    if (has_nibbles(type))
        part = _mm_mul_ps(nibbles_part(type, f->row, at, f->q + g * PE_GROUP, f->sums + g * SUMS),
                          _mm_set1_ps(f->s_x[g]));
    else if (type != PE_Q8_0)
        part = group_part(type, f, g, at);
    *sum = _mm_add_ps(*sum, part);
}

/* ---- many tokens ----------------------------------------------------------------------------- */

PE_INLINE void gather16(const uint8_t *const *row, int64_t at, __m256i o[4])
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

PE_INLINE void pack8(const uint8_t *const *row, int64_t at, __m256i (*pairs)[2], int h)
{
    const __m256i swap = _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15, 0,
                                          2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    __m256i o[4];
    gather16(row, at, o);
    for (int j = 0; j < 4; j++) {
        __m256i x = _mm256_shuffle_epi8(o[j], swap); /* 16-bit halves: (c0, c2), (c1, c3) */
        pairs[2 * j][h] = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
        pairs[2 * j + 1][h] = _mm256_srai_epi16(x, 8);
    }
}

PE_INLINE void load_halves(const uint16_t *halves, int64_t n, floats v[2])
{
    uint16_t s[TILE] = {0};
    memcpy(s, halves, (size_t)n * sizeof s[0]);
    for (int h = 0; h < 2; h++)
        v[h] = floats_of_halves(s + LANES * h);
}

PE_INLINE void pin(ints *v) { (void)v; }

/* The addition is written in assembly: gcc otherwise copies the sums of a loop from register to
 * register and moves the additions until it runs out of registers. */
PE_INLINE void add_products(ints *sum, ints w, ints v)
{
    __asm__ volatile("vpaddd %1, %0, %0" : "+x"(*sum) : "x"(_mm256_madd_epi16(w, v)));
}

/* ---- dense ----------------------------------------------------------------------------------- */

/* Four values from p on, as doubles. */
PE_INLINE __m256d load_doubles(int type, const void *p)
{
    if (type == PE_F32)
        return _mm256_cvtps_pd(_mm_loadu_ps(p));
    __m128i h = _mm_loadl_epi64(p);
    if (type == PE_F16)
        return _mm256_cvtps_pd(_mm_cvtph_ps(h));
    /* Each 16 bits become the upper half of 32. */
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), h)));
}

#define DENSE_ROWS 4 /* for a single token; otherwise DENSE_ROWS / 2 by DENSE_TOKENS */
#define DENSE_TOKENS 2

typedef struct {
    __m256d half[2];
} sum8;

/* Columns [c, c + 8) of row[r] and x[t]. */
PE_INLINE void dense_step(int type, const uint8_t *const *row, const float *const *x, int64_t c,
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
PE_INLINE void dense_block(int type, const uint8_t *data, int64_t cols, const float *x, float *y,
                           int64_t ldy, int rows, int tokens)
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
    for (int t = 0; t < tokens; t++) {
        UNROLL
        for (int r = 0; r < rows; r++)
            y[t * ldy + r] = (float)f64x8_tree((f64x8){sum[t][r].half[0], sum[t][r].half[1]});
    }
}

PE_INLINE void matmul_dense(int type, const pe_matrix *w, int64_t row0, int64_t row1,
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
