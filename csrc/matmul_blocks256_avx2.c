/* matmul_blocks256_avx2.c - the types of blocks of 256 columns with AVX2; see
 * matmul_blocks256_x86.h.
 *
 * Few tokens: the codes of a group are four vectors of 32 bytes, which are widened without their
 * sign: a code that may be negative is made unsigned by its offset.  The sums of two parts are in
 * the two 128 bits of one vector.
 */
#include "matmul_avx2.h"

#include "matmul_blocks256_x86.h"

/* The part of the group that is the i-th 16 bytes of the four vectors of codes. */
PE_INLINE int part_at(int type, int i)
{
    return type == PE_IQ4_XS ? i / 4 * 4 + i % 2 * 2 + i / 2 % 2 : i;
}

PE_INLINE void repeat(int32_t v, int32_t *to) { _mm_storeu_si128((void *)to, _mm_set1_epi32(v)); }

/* Of the two parts of each vector of codes, the first halves, then the second halves, as the codes
 * are widened.  Repeated: of each part in the order of the codes the sum, times the offset; of
 * types with wide sub-blocks, of each of them. */
PE_INLINE void split_group(int type, const int16_t *q, const int32_t *sums, int16_t *split,
                           int32_t *repeated)
{
    UNROLL
    for (int i = 0; i < PARTS; i += 2) {
        const int a = part_at(type, i), b = part_at(type, i + 1);
        __m256i x = _mm256_loadu_si256((const void *)(q + a * PE_PART));
        __m256i y = _mm256_loadu_si256((const void *)(q + b * PE_PART));
        _mm256_storeu_si256((void *)(split + 16 * i), _mm256_permute2x128_si256(x, y, 0x20));
        _mm256_storeu_si256((void *)(split + 16 * i + 16), _mm256_permute2x128_si256(x, y, 0x31));
        if (has_wide_subs(type)) {
            repeat(sums[i] + sums[i + 1], repeated + ROWS * (i / 2));
        } else {
            const int32_t times = offset_of(type) ? offset_of(type) : 1;
            repeat(times * sums[a], repeated + ROWS * i);
            repeat(times * sums[b], repeated + ROWS * (i + 1));
        }
    }
}

/* ---- scales ---------------------------------------------------------------------------------- */

PE_INLINE row_bytes16 load_row_bytes(const uint8_t *const *row, int64_t at)
{
    __m128i v[ROWS];
    for (int i = 0; i < ROWS; i++)
        v[i] = _mm_loadu_si128((const void *)(row[i] + at));
    return (row_bytes16){_mm256_set_m128i(v[2], v[0]), _mm256_set_m128i(v[3], v[1])};
}

PE_INLINE __m128i upper(__m256i v) { return _mm256_extracti128_si256(v, 1); }
PE_INLINE __m128i lower(__m256i v) { return _mm256_castsi256_si128(v); }

/* four[j]: bytes 4 j to 4 j + 3 of each row, the ROWS bytes of one column together. */
PE_INLINE transposed transpose(row_bytes16 v)
{
    __m256i a = _mm256_unpacklo_epi8(v.even, v.odd), b = _mm256_unpackhi_epi8(v.even, v.odd);
    return (transposed){
        {_mm_unpacklo_epi16(lower(a), upper(a)), _mm_unpackhi_epi16(lower(a), upper(a)),
         _mm_unpacklo_epi16(lower(b), upper(b)), _mm_unpackhi_epi16(lower(b), upper(b))}};
}

PE_INLINE __m256i words(int32_t a, int32_t b, int32_t c, int32_t d)
{
    return _mm256_setr_epi32(a, b, c, d, a, b, c, d);
}

/* The scales of two rows, and from byte 8 on the minimums, of types with wide sub-blocks. */
PE_INLINE __m256i wide_scales(__m256i v)
{
    __m256i low = _mm256_shuffle_epi32(v, _MM_SHUFFLE(3, 2, 3, 1));
    __m256i high = _mm256_srli_epi32(_mm256_shuffle_epi32(v, _MM_SHUFFLE(2, 2, 1, 1)), 2);
    low = _mm256_and_si256(_mm256_srlv_epi32(low, words(0, 0, 0, 4)),
                           words(0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f));
    return _mm256_or_si256(low, _mm256_and_si256(high, words(0, 0x30303030, 0, 0x30303030)));
}

/* The scales of two rows of Q3_K: 16 bytes that have l from byte 2 on, then u. */
PE_INLINE __m256i q3_k_scales(__m256i v)
{
    __m256i low = _mm256_shuffle_epi8(v, words(0x05040302, 0x09080706, 0x05040302, 0x09080706));
    __m256i high = _mm256_shuffle_epi8(v, words(0x0d0c0b0a, 0x0d0c0b0a, 0x0d0c0b0a, 0x0d0c0b0a));
    low = _mm256_and_si256(_mm256_srlv_epi32(low, words(0, 0, 4, 4)), _mm256_set1_epi8(15));
    high = _mm256_and_si256(_mm256_srlv_epi32(high, words(0, 2, 4, 6)), _mm256_set1_epi8(3));
    return _mm256_sub_epi8(_mm256_or_si256(low, _mm256_slli_epi32(high, 4)), _mm256_set1_epi8(32));
}

/* The eight scales of two rows of IQ4_XS: 16 bytes that have h from byte 2 on, then l. */
PE_INLINE __m256i iq4_xs_scales(__m256i v)
{
    const __m256i l = _mm256_shuffle_epi8(v, words(0x05050404, 0x07070606, -1, -1));
    const __m256i h = _mm256_shuffle_epi8(v, words(0x02020202, 0x03030303, -1, -1));
    __m256i low = _mm256_blendv_epi8(l, _mm256_srli_epi16(l, 4), _mm256_set1_epi16((short)0xff00));
    __m256i high = _mm256_blendv_epi8(_mm256_slli_epi16(h, 4), _mm256_slli_epi16(h, 2),
                                      _mm256_set1_epi32(0x0000ff00));
    high = _mm256_blendv_epi8(high, h, _mm256_set1_epi32(0x00ff0000));
    high = _mm256_blendv_epi8(high, _mm256_srli_epi16(h, 2), _mm256_set1_epi32((int)0xff000000));
    low = _mm256_and_si256(low, _mm256_set1_epi8(15));
    high = _mm256_and_si256(high, _mm256_set1_epi8(0x30));
    return _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32));
}

PE_INLINE __m256i nibbles_of(__m256i v, int high)
{
    return _mm256_and_si256(high ? _mm256_srli_epi16(v, 4) : v, _mm256_set1_epi8(15));
}

PE_INLINE few_scales read_few_scales(int type, const uint8_t *const *row, int64_t at)
{
    few_scales s;
    row_bytes16 v = load_row_bytes(row, at + (type == PE_Q3_K ? 94 : type == PE_Q6_K ? 192 : 0));
    if (has_wide_subs(type)) {
        s.scales = transpose((row_bytes16){wide_scales(v.even), wide_scales(v.odd)});
        s.minimums = s.scales;
    } else if (type == PE_Q2_K) {
        s.scales = transpose((row_bytes16){nibbles_of(v.even, 0), nibbles_of(v.odd, 0)});
        s.minimums = transpose((row_bytes16){nibbles_of(v.even, 1), nibbles_of(v.odd, 1)});
    } else {
        if (type == PE_Q3_K)
            v = (row_bytes16){q3_k_scales(v.even), q3_k_scales(v.odd)};
        else if (type == PE_IQ4_XS)
            v = (row_bytes16){iq4_xs_scales(v.even), iq4_xs_scales(v.odd)};
        s.scales = s.minimums = transpose(v);
    }
    return s;
}

/* Columns 2 j and 2 j + 1 as 8 int32: ROWS rows of each.  j is a constant. */
PE_INLINE __m256i two_columns(const transposed *v, int j)
{
    __m128i x = v->four[j / 2];
    return _mm256_cvtepi8_epi32(j % 2 ? _mm_srli_si128(x, 8) : x);
}

/* ---- codes ----------------------------------------------------------------------------------- */

PE_INLINE __m256i load32(const uint8_t *p) { return _mm256_loadu_si256((const void *)p); }

/* a | (the bits of mask in v, shifted right by count, left where negative); constants. */
PE_INLINE __m256i or_bits(__m256i a, __m256i v, int count, int mask)
{
    return _mm256_or_si256(a, _mm256_and_si256(shift16(v, -count), _mm256_set1_epi8((char)mask)));
}

/* The codes of group g of a block, each plus the type's offset. */
PE_INLINE void codes_of_group(int type, const uint8_t *p, int g, __m256i code[4])
{
    const __m256i mask = _mm256_set1_epi8(15);
    if (type == PE_Q2_K || type == PE_Q3_K) {
        const __m256i q = load32(p + (type == PE_Q2_K ? 16 : 32) + 32 * g);
        UNROLL
        for (int j = 0; j < 4; j++) {
            code[j] = _mm256_and_si256(shift16(q, -2 * j), _mm256_set1_epi8(3));
            if (type == PE_Q3_K)
                code[j] = or_bits(code[j], load32(p), 4 * g + j - 2, 4);
        }
        return;
    }
    const int64_t at = type == PE_Q4_K   ? 16 + 64 * g
                       : type == PE_Q5_K ? 48 + 64 * g
                       : type == PE_Q6_K ? 64 * g
                                         : 8 + 64 * g;
    UNROLL
    for (int c = 0; c < 2; c++) {
        const __m256i q = load32(p + at + 32 * c);
        const int low = type == PE_Q6_K ? c : 2 * c, high = type == PE_Q6_K ? c + 2 : 2 * c + 1;
        code[low] = _mm256_and_si256(q, mask);
        code[high] = _mm256_and_si256(_mm256_srli_epi16(q, 4), mask);
    }
    UNROLL
    for (int j = 0; j < 4; j++) {
        if (type == PE_Q5_K)
            code[j] = or_bits(code[j], load32(p + 16), 4 * g + j - 4, 16);
        if (type == PE_Q6_K)
            code[j] = or_bits(code[j], load32(p + 128 + 32 * g), 2 * j - 4, 48);
        if (type == PE_IQ4_XS) {
            __m128i table = _mm_add_epi8(code_table(PE_IQ4_NL), _mm_set1_epi8((char)0x80));
            code[j] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), code[j]);
        }
    }
}

/* ---- sums ------------------------------------------------------------------------------------ */

/* Sums of q * code over the parts of group g, ROWS rows of a part in each 128 bits, in the order of
 * part_at. */
PE_INLINE void dots_of_parts(int type, const uint8_t *const *row, int64_t at, int g,
                             const int16_t *split, const int32_t *repeated, __m256i dot[4])
{
    const __m256i zero = _mm256_setzero_si256();
    __m256i v[4][ROWS];
    UNROLL
    for (int i = 0; i < ROWS; i++) {
        __m256i code[4];
        codes_of_group(type, row[i] + at, g, code);
        UNROLL
        for (int k = 0; k < 4; k++)
            v[k][i] =
                _mm256_add_epi32(dot16(_mm256_unpacklo_epi8(code[k], zero), split + 32 * k),
                                 dot16(_mm256_unpackhi_epi8(code[k], zero), split + 32 * k + 16));
    }
    UNROLL
    for (int k = 0; k < 4; k++) {
        dot[k] = fold4(v[k][0], v[k][1], v[k][2], v[k][3]);
        if (offset_of(type))
            dot[k] = _mm256_sub_epi32(dot[k], load32((const uint8_t *)(repeated + 8 * k)));
    }
}

/* The sums of the two 128 bits of a and of b. */
PE_INLINE __m256i add_halves(__m256i a, __m256i b)
{
    return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                            _mm256_permute2x128_si256(a, b, 0x31));
}

PE_INLINE __m128 sum_halves(__m256 v)
{
    return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
}

PE_INLINE __m128 few_group_sum(int type, const uint8_t *const *row, int64_t at, int g,
                               const few_scales *s, const int16_t *split, const int32_t *repeated)
{
    __m256i p[4];
    dots_of_parts(type, row, at, g, split, repeated, p);
    if (has_wide_subs(type)) {
        __m256i p01 = _mm256_mullo_epi32(add_halves(p[0], p[1]), two_columns(&s->scales, 2 * g));
        __m256i p23 =
            _mm256_mullo_epi32(add_halves(p[2], p[3]), two_columns(&s->scales, 2 * g + 1));
        if (type == PE_Q5_K)
            return sum_halves(_mm256_add_ps(_mm256_cvtepi32_ps(p01), _mm256_cvtepi32_ps(p23)));
        return sum_halves(_mm256_cvtepi32_ps(_mm256_add_epi32(p01, p23)));
    }
    UNROLL
    for (int k = 0; k < 4; k++)
        p[k] = _mm256_mullo_epi32(
            p[k], two_columns(&s->scales, type == PE_IQ4_XS ? 2 * g + k / 2 : 4 * g + k));
    if (terms_of(type) == 1)
        return _mm_cvtepi32_ps(fold_lanes(
            _mm256_add_epi32(_mm256_add_epi32(p[0], p[1]), _mm256_add_epi32(p[2], p[3]))));
    __m256 a = _mm256_add_ps(_mm256_cvtepi32_ps(p[0]), _mm256_cvtepi32_ps(p[2]));
    __m256 b = _mm256_add_ps(_mm256_cvtepi32_ps(p[1]), _mm256_cvtepi32_ps(p[3]));
    if (type == PE_IQ4_XS) /* parts 0, 2 and 1, 3 of each half of the group */
        return _mm_add_ps(sum_halves(a), sum_halves(b));
    return sum_halves(_mm256_add_ps(a, b));
}

PE_INLINE __m128i few_minimum(int type, int g, const few_scales *s, const int32_t *repeated)
{
    const int n = has_wide_subs(type) ? 2 : 4, first = has_wide_subs(type) ? 4 + 2 * g : 4 * g;
    __m256i sum = _mm256_setzero_si256();
    UNROLL
    for (int k = 0; k < n; k++)
        sum =
            _mm256_add_epi32(sum, _mm256_mullo_epi32(two_columns(&s->minimums, first + k),
                                                     load32((const uint8_t *)(repeated + 8 * k))));
    return fold_lanes(sum);
}

void pe_fill_avx2_blocks256(pe_kernels *k) { fill_blocks256(k); }
