/* matmul_avx512vnni.h - the matmuls of matmul.c with AVX-512 and VNNI; see matmul_x86.h. */
#define BLOCK 8
#define FEW_AT_ONCE 8

#include "matmul_x86.h"

#include "matmul_few_avx512vnni.h"
#include "matmul_one_avx512vnni.h"

/* ---- many tokens ----------------------------------------------------------------------------- */

PE_INLINE __m256i load_two(const uint8_t *low, const uint8_t *high)
{
    return _mm256_set_m128i(_mm_loadu_si128((const void *)high),
                            _mm_loadu_si128((const void *)low));
}

PE_INLINE void gather16(const uint8_t *const *row, int64_t at, __m512i o[4])
{
    __m512i v[4];
    for (int i = 0; i < 4; i++)
        v[i] = _mm512_inserti64x4(_mm512_castsi256_si512(load_two(row[i] + at, row[4 + i] + at)),
                                  load_two(row[8 + i] + at, row[12 + i] + at), 1);
    __m512i lo01 = _mm512_unpacklo_epi32(v[0], v[1]), hi01 = _mm512_unpackhi_epi32(v[0], v[1]);
    __m512i lo23 = _mm512_unpacklo_epi32(v[2], v[3]), hi23 = _mm512_unpackhi_epi32(v[2], v[3]);
    o[0] = _mm512_unpacklo_epi64(lo01, lo23);
    o[1] = _mm512_unpackhi_epi64(lo01, lo23);
    o[2] = _mm512_unpacklo_epi64(hi01, hi23);
    o[3] = _mm512_unpackhi_epi64(hi01, hi23);
}

PE_INLINE void pack8(const uint8_t *const *row, int64_t at, __m512i (*pairs)[2], int h)
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

PE_INLINE void load_halves(const uint16_t *halves, int64_t n, floats v[2])
{
    __mmask32 mask = (__mmask32)(0xffffffffu >> (TILE - n));
    __m512i s = _mm512_maskz_loadu_epi16(mask, halves);
    v[0] = _mm512_cvtph_ps(_mm512_castsi512_si256(s));
    v[1] = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(s, 1));
}

/* Without it gcc moves sums and loads until it runs out of registers. */
PE_INLINE void pin(ints *v) { __asm__ volatile("" : "+v"(*v)); }

PE_INLINE void add_products(ints *sum, ints w, ints v)
{
    *sum = _mm512_dpwssd_epi32(*sum, w, v);
    pin(sum);
}

/* ---- dense ----------------------------------------------------------------------------------- */

/* The columns of mask, of eight from p on, as doubles; zero elsewhere. */
PE_INLINE __m512d load_doubles(int type, const void *p, __mmask8 mask)
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

#define DENSE_ROWS 4
#define DENSE_TOKENS 4

PE_INLINE void dense_step(int type, const uint8_t *const *row, int64_t c, const float *x,
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
PE_INLINE void dense_block(int type, const uint8_t *data, int64_t cols, const float *x, float *y,
                           int64_t ldy, int rows, int tokens)
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
    for (int t = 0; t < tokens; t++) {
        UNROLL
        for (int r = 0; r < rows; r++)
            y[t * ldy + r] = (float)f64x8_tree(sum[t][r]);
    }
}

PE_INLINE void dense_rows(int type, const uint8_t *data, int64_t cols, const pe_activations *a,
                          float *y, int64_t ldy, int rows)
{
    int64_t t = 0;
    for (; t + DENSE_TOKENS <= a->tokens; t += DENSE_TOKENS)
        dense_block(type, data, cols, a->x + t * cols, y + t * ldy, ldy, rows, DENSE_TOKENS);
    for (; t < a->tokens; t++)
        dense_block(type, data, cols, a->x + t * cols, y + t * ldy, ldy, rows, 1);
}

PE_INLINE void matmul_dense(int type, const pe_matrix *w, int64_t row0, int64_t row1,
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
