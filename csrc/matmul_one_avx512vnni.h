/* matmul_one_avx512vnni.h - one token times INT8 and INT4 with AVX-512 and VNNI; see matmul_x86.h.
 *
 * As few tokens, but MANY rows are used at a time: their sums fill a whole vector, and the scales of
 * MANY rows lie side by side.  The float32 steps are a quarter of those of few tokens, and so are
 * the starts of rows.
 */
#define MANY 16

/* The sums over the 128-bit lanes of four folded vectors: those of v[k] are lane k of the result. */
PE_INLINE __m512i fold_quarters(const __m512i v[4])
{
    __m512i half[2];
    UNROLL
    for (int i = 0; i < 2; i++)
        half[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0x44),
                                   _mm512_shuffle_i32x4(v[2 * i], v[2 * i + 1], 0xee));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(half[0], half[1], 0x88),
                            _mm512_shuffle_i32x4(half[0], half[1], 0xdd));
}

/* y of rows [r, r + MANY) of w, all of whose groups are whole; q and sums as split_token leaves
 * them. */
PE_INLINE void many_rows(int type, const pe_matrix *w, int64_t r, const int16_t *q,
                         const int32_t *sums, const float *s_x, float *y)
{
    const int64_t groups = w->cols / PE_GROUP, bytes = bytes_of(type, PE_GROUP);
    const int64_t row_bytes = groups * bytes;
    const uint8_t *row = (const uint8_t *)w->data + r * row_bytes;
    const uint8_t *next = row + fetch_ahead(MANY * row_bytes);
    const uint16_t *scales = w->scales + r;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t g = 0; g < groups; g++, row += bytes, scales += w->scale_ld) {
        __m512i folded[4];
        if (r % SCALES_AHEAD == 0)
            prefetch1((const uint8_t *)(scales + SCALES_AHEAD), 1);
        UNROLL
        for (int k = 0; k < 4; k++, next += ROWS * bytes) {
            few_codes c;
            prefetch2(next, ROWS * bytes);
            UNROLL
            for (int i = 0; i < ROWS; i++)
                code_and_positive(type, row + (ROWS * k + i) * row_bytes, c.code[i], c.positive[i]);
            folded[k] = dots_of_group(&c, q + g * PE_GROUP);
        }
        const __m512i d = _mm512_sub_epi32(fold_quarters(folded), _mm512_set1_epi32(sums[g]));
        const __m512 s_w = _mm512_cvtph_ps(_mm256_loadu_si256((const void *)scales));
        sum = _mm512_add_ps(sum, _mm512_mul_ps(_mm512_cvtepi32_ps(d),
                                               _mm512_mul_ps(s_w, _mm512_set1_ps(s_x[g]))));
    }
    _mm512_storeu_ps(y + r, sum);
}

PE_INLINE int64_t one_token_rows(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                                 const int16_t *q, const int32_t *sums, const float *s_x, float *y)
{
    int64_t r = row0;
    if (!is_blocks(type) && w->cols % PE_GROUP == 0)
        for (; r + MANY <= row1; r += MANY)
            many_rows(type, w, r, q, sums, s_x, y);
    return r;
}
