/* matmul_blocks256_avx512vnni.c - the types of blocks of 256 columns with AVX-512 and VNNI; see
 * matmul_blocks256_x86.h.
 *
 * Few tokens: vpdpbusd multiplies unsigned by signed bytes, so that codes need no widening: q is
 * 256 high + low, high signed and low unsigned.  The codes of a group are two vectors.  The sums
 * over four columns of each become, folded over ROWS rows, the sums of ROWS rows over one part in
 * each 128 bits.
 */
#define PE_AVX512

#include "matmul_avx512vnni.h"

#include "matmul_blocks256_x86.h"

/* The part of the group that is the i-th 16 bytes of the two vectors of codes. */
PE_INLINE int part_at(int type, int i)
{
    return has_wide_subs(type) ? 4 * (i / 2 % 2) + 2 * (i / 4) + i % 2
           : type == PE_IQ4_XS ? 2 * (i % 4) + i / 4
                               : i;
}

PE_INLINE void repeat(int32_t v, int32_t *to) { _mm_storeu_si128((void *)to, _mm_set1_epi32(v)); }

/* Highs of the first vector's columns, lows of the same, then of the second vector's.  Repeated:
 * of each part in this order the sum, times the offset (IQ4_XS: of the highs, which alone are
 * multiplied by an unsigned code); of types with wide sub-blocks, in their own order, the sum. */
PE_INLINE void split_group(int type, const int16_t *q, const int32_t *sums, int16_t *split,
                           int32_t *repeated)
{
    uint8_t *to = (uint8_t *)split;
    UNROLL
    for (int i = 0; i < PARTS; i++) {
        const int part = part_at(type, i);
        __m256i x = _mm256_loadu_si256((const void *)(q + part * PE_PART));
        __m128i low = _mm256_cvtepi16_epi8(x);
        _mm_storeu_si128((void *)(to + 128 * (i / 4) + 16 * (i % 4)),
                         _mm256_cvtepi16_epi8(_mm256_srai_epi16(x, 8)));
        _mm_storeu_si128((void *)(to + 128 * (i / 4) + 16 * (i % 4) + 64), low);
        if (type == PE_IQ4_XS) {
            __m128i lows = _mm_sad_epu8(low, _mm_setzero_si128());
            repeat(offset_of(type) *
                       (sums[part] - _mm_cvtsi128_si32(lows) - _mm_extract_epi32(lows, 2)),
                   repeated + ROWS * i);
        } else if (!has_wide_subs(type)) {
            repeat((offset_of(type) ? offset_of(type) : 1) * sums[part], repeated + ROWS * i);
        } else if (i < 4) {
            repeat(sums[2 * i] + sums[2 * i + 1], repeated + ROWS * i);
        }
    }
}

/* ---- scales ---------------------------------------------------------------------------------- */

PE_INLINE row_bytes16 load_row_bytes(const uint8_t *const *row, int64_t at)
{
    __m512i v = _mm512_castsi128_si512(_mm_loadu_si128((const void *)(row[0] + at)));
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const void *)(row[1] + at)), 1);
    v = _mm512_inserti32x4(v, _mm_loadu_si128((const void *)(row[2] + at)), 2);
    return _mm512_inserti32x4(v, _mm_loadu_si128((const void *)(row[3] + at)), 3);
}

/* 128 bits j: bytes 4 j to 4 j + 3 of each row, the ROWS bytes of one column together. */
PE_INLINE transposed transpose(row_bytes16 v)
{
    const __m512i lanes = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i bytes = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(lanes, v), bytes);
}

PE_INLINE __m512i nibbles_of(__m512i v, int high)
{
    return _mm512_and_si512(high ? _mm512_srli_epi16(v, 4) : v, _mm512_set1_epi8(15));
}

PE_INLINE few_scales read_few_scales(int type, const uint8_t *const *row, int64_t at)
{
    few_scales s;
    if (has_wide_subs(type)) { /* 128 bits 0 and 1: the scales, 2 and 3: the minimums */
        const __m512i v = load_row_bytes(row, at);
        __m512i low = _mm512_shuffle_epi32(v, _MM_PERM_DCDB); /* k0, k2, k1, k2: lanes 1, 3, 2, 3 */
        __m512i high = _mm512_shuffle_epi32(v, _MM_PERM_CCBB); /* k0 for 1, k1 for 3 */
        low = _mm512_srlv_epi32(low, _mm512_set4_epi32(4, 0, 0, 0));
        low = _mm512_and_si512(low,
                               _mm512_set4_epi32(0x0f0f0f0f, 0x3f3f3f3f, 0x0f0f0f0f, 0x3f3f3f3f));
        high = _mm512_and_si512(_mm512_srli_epi32(high, 2),
                                _mm512_set4_epi32(0x30303030, 0, 0x30303030, 0));
        s.scales = transpose(_mm512_or_si512(low, high));
        s.minimums = s.scales;
    } else if (type == PE_Q2_K) {
        const __m512i v = transpose(load_row_bytes(row, at));
        s.scales = nibbles_of(v, 0);
        s.minimums = nibbles_of(v, 1);
    } else if (type == PE_Q3_K) {
        const __m512i v = load_row_bytes(row, at + 94); /* the scales from byte 2 on, then d */
        const __m512i at_l = _mm512_set4_epi32(0x09080706, 0x05040302, 0x09080706, 0x05040302);
        const __m512i at_u = _mm512_set1_epi32(0x0d0c0b0a);
        __m512i low = _mm512_shuffle_epi8(v, at_l);
        low = _mm512_and_si512(_mm512_srlv_epi32(low, _mm512_set4_epi32(4, 4, 0, 0)),
                               _mm512_set1_epi8(15));
        __m512i high =
            _mm512_srlv_epi32(_mm512_shuffle_epi8(v, at_u), _mm512_set4_epi32(6, 4, 2, 0));
        high = _mm512_slli_epi32(_mm512_and_si512(high, _mm512_set1_epi8(3)), 4);
        s.scales = transpose(_mm512_sub_epi8(_mm512_or_si512(low, high), _mm512_set1_epi8(32)));
        s.minimums = s.scales;
    } else if (type == PE_Q6_K) {
        s.scales = transpose(load_row_bytes(row, at + 192));
        s.minimums = s.scales;
    } else { /* IQ4_XS: two bytes of h, four of l, from byte 2 on; eight scales */
        const __m512i v = load_row_bytes(row, at);
        const __m512i at_l = _mm512_set4_epi32(-1, -1, 0x07070606, 0x05050404);
        const __m512i at_h = _mm512_set4_epi32(-1, -1, 0x03030303, 0x02020202);
        const __m512i l = _mm512_shuffle_epi8(v, at_l), h = _mm512_shuffle_epi8(v, at_h);
        __m512i low =
            _mm512_mask_blend_epi8(UINT64_C(0xaaaaaaaaaaaaaaaa), l, _mm512_srli_epi16(l, 4));
        low = _mm512_and_si512(low, _mm512_set1_epi8(15));
        /* The j-th pair of bits of byte j of each 32 bits to bits 4 and 5. */
        __m512i high = _mm512_mask_blend_epi8(UINT64_C(0x2222222222222222), _mm512_slli_epi16(h, 4),
                                              _mm512_slli_epi16(h, 2));
        high = _mm512_mask_blend_epi8(UINT64_C(0x4444444444444444), high, h);
        high = _mm512_mask_blend_epi8(UINT64_C(0x8888888888888888), high, _mm512_srli_epi16(h, 2));
        high = _mm512_and_si512(high, _mm512_set1_epi8(0x30));
        s.scales = transpose(_mm512_sub_epi8(_mm512_or_si512(low, high), _mm512_set1_epi8(32)));
        s.minimums = s.scales;
    }
    return s;
}

/* 128 bits j of v, as 16 int32: four columns, ROWS rows of each.  j is a constant. */
PE_INLINE __m512i four_columns(transposed v, int j)
{
    __m128i x = j == 0   ? _mm512_castsi512_si128(v)
                : j == 1 ? _mm512_extracti32x4_epi32(v, 1)
                : j == 2 ? _mm512_extracti32x4_epi32(v, 2)
                         : _mm512_extracti32x4_epi32(v, 3);
    return _mm512_cvtepi8_epi32(x);
}

/* ---- codes ----------------------------------------------------------------------------------- */

/* The 32 bytes at p twice, each 16 bits shifted by the counts of its half. */
PE_INLINE __m512i twice(const uint8_t *p)
{
    return _mm512_broadcast_i64x4(_mm256_loadu_si256((const void *)p));
}

PE_INLINE __m512i halves16(int first, int second)
{
    return _mm512_inserti64x4(_mm512_set1_epi16((short)first), _mm256_set1_epi16((short)second), 1);
}

/* Each 16 bits of v shifted right by a and b bits in the two halves; left where negative. */
PE_INLINE __m512i shift_halves(__m512i v, int a, int b)
{
    if (a == 0 && b == 0)
        return v;
    if (a <= 0 && b <= 0)
        return _mm512_sllv_epi16(v, halves16(-a, -b));
    return _mm512_srlv_epi16(v, halves16(a, b));
}

/* a | (v & mask) */
PE_INLINE __m512i or_bits(__m512i a, __m512i v, int mask)
{
    return _mm512_ternarylogic_epi64(a, v, _mm512_set1_epi8((char)mask), 0xf8);
}

/* The codes of group g of a block, each plus the type's offset; IQ4_XS: the code itself. */
PE_INLINE void codes_of_group(int type, const uint8_t *p, int g, __m512i code[2])
{
    const __m512i mask = _mm512_set1_epi8(15);
    if (type == PE_Q2_K || type == PE_Q3_K) {
        const __m512i q = twice(p + (type == PE_Q2_K ? 16 : 32) + 32 * g);
        UNROLL
        for (int k = 0; k < 2; k++)
            code[k] = _mm512_and_si512(shift_halves(q, 4 * k, 4 * k + 2), _mm512_set1_epi8(3));
        if (type == PE_Q3_K) {
            const __m512i h = twice(p);
            UNROLL
            for (int k = 0; k < 2; k++) { /* bit 4 g + 2 k, and the next, to bit 2 */
                const int down = 4 * g + 2 * k - 2;
                code[k] = or_bits(code[k], shift_halves(h, down, down + 1), 4);
            }
        }
        return;
    }
    const int64_t at = type == PE_Q4_K   ? 16 + 64 * g
                       : type == PE_Q5_K ? 48 + 64 * g
                       : type == PE_Q6_K ? 64 * g
                                         : 8 + 64 * g;
    const __m512i q = _mm512_loadu_si512(p + at);
    code[0] = _mm512_and_si512(q, mask);
    code[1] = _mm512_and_si512(_mm512_srli_epi16(q, 4), mask);
    if (type == PE_Q5_K) {
        const __m512i h = twice(p + 16);
        UNROLL
        for (int k = 0; k < 2; k++) /* bits 4 g + k and 4 g + k + 2 to bit 4 */
            code[k] = or_bits(code[k], shift_halves(h, 4 * g + k - 4, 4 * g + k - 2), 16);
    } else if (type == PE_Q6_K) {
        const __m512i h = twice(p + 128 + 32 * g);
        code[0] = or_bits(code[0], shift_halves(h, -4, -2), 48);
        code[1] = or_bits(code[1], shift_halves(h, 0, 2), 48);
    } else if (type == PE_IQ4_XS) {
        const __m512i table = _mm512_broadcast_i32x4(code_table(PE_IQ4_NL));
        code[0] = _mm512_shuffle_epi8(table, code[0]);
        code[1] = _mm512_shuffle_epi8(table, code[1]);
    }
}

/* ---- sums ------------------------------------------------------------------------------------ */

/* Sums of q * code over the parts of group g, ROWS rows of a part in each 128 bits, in the order of
 * part_at. */
PE_INLINE void dots_of_parts(int type, const uint8_t *const *row, int64_t at, int g,
                             const int16_t *split, const int32_t *repeated, __m512i dot[2])
{
    __m512i v[2][ROWS];
    UNROLL
    for (int i = 0; i < ROWS; i++) {
        __m512i code[2];
        codes_of_group(type, row[i] + at, g, code);
        UNROLL
        for (int k = 0; k < 2; k++) {
            __m512i positive = type == PE_IQ4_XS
                                   ? _mm512_xor_si512(code[k], _mm512_set1_epi8((char)0x80))
                                   : code[k];
            __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), positive,
                                              _mm512_loadu_si512(split + 64 * k));
            sum = _mm512_slli_epi32(sum, 8);
            v[k][i] = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(split + 64 * k + 32), code[k]);
        }
    }
    UNROLL
    for (int k = 0; k < 2; k++) {
        dot[k] = fold4(v[k][0], v[k][1], v[k][2], v[k][3]);
        if (offset_of(type))
            dot[k] = _mm512_sub_epi32(dot[k], _mm512_loadu_si512(repeated + 16 * k));
    }
}

PE_INLINE __m128 upper128(__m256 v) { return _mm256_extractf128_ps(v, 1); }
PE_INLINE __m128 lower128(__m256 v) { return _mm256_castps256_ps128(v); }

/* v[0] + v[2] and v[1] + v[3] of the four 128 bits. */
PE_INLINE __m256 add_half(__m512 v)
{
    return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
}

PE_INLINE __m128 few_group_sum(int type, const uint8_t *const *row, int64_t at, int g,
                               const few_scales *s, const int16_t *split, const int32_t *repeated)
{
    __m512i dot[2];
    dots_of_parts(type, row, at, g, split, repeated, dot);
    if (has_wide_subs(type)) {
        /* 128 bits: parts 0, 1, 4, 5 and 2, 3, 6, 7 become sub-blocks 0, 1, 2, 3. */
        __m512i even = _mm512_mask_shuffle_i32x4(dot[0], 0xf0f0, dot[1], dot[1], 0xa0);
        __m512i odd = _mm512_mask_shuffle_i32x4(dot[1], 0x0f0f, dot[0], dot[0], 0xf5);
        __m512i p = _mm512_mullo_epi32(_mm512_add_epi32(even, odd), four_columns(s->scales, g));
        if (type == PE_Q5_K) {
            __m256 b = add_half(_mm512_cvtepi32_ps(p));
            return _mm_add_ps(lower128(b), upper128(b));
        }
        __m256 d = _mm256_cvtepi32_ps(
            _mm256_add_epi32(_mm512_castsi512_si256(p), _mm512_extracti64x4_epi64(p, 1)));
        return _mm_add_ps(lower128(d), upper128(d));
    }
    if (type == PE_IQ4_XS) { /* parts 0, 2, 4, 6 and 1, 3, 5, 7 */
        const __m512i scales = four_columns(s->scales, g);
        __m256 a02 = add_half(_mm512_cvtepi32_ps(_mm512_mullo_epi32(dot[0], scales)));
        __m256 a13 = add_half(_mm512_cvtepi32_ps(_mm512_mullo_epi32(dot[1], scales)));
        return _mm_add_ps(_mm_add_ps(lower128(a02), upper128(a02)),
                          _mm_add_ps(lower128(a13), upper128(a13)));
    }
    dot[0] = _mm512_mullo_epi32(dot[0], four_columns(s->scales, 2 * g));
    dot[1] = _mm512_mullo_epi32(dot[1], four_columns(s->scales, 2 * g + 1));
    if (terms_of(type) == 1)
        return _mm_cvtepi32_ps(fold_lanes(_mm512_add_epi32(dot[0], dot[1])));
    __m256 b = add_half(_mm512_add_ps(_mm512_cvtepi32_ps(dot[0]), _mm512_cvtepi32_ps(dot[1])));
    return _mm_add_ps(lower128(b), upper128(b));
}

PE_INLINE __m128i few_minimum(int type, int g, const few_scales *s, const int32_t *repeated)
{
    if (has_wide_subs(type))
        return fold_lanes(
            _mm512_mullo_epi32(four_columns(s->minimums, 2 + g), _mm512_loadu_si512(repeated)));
    __m512i a = _mm512_mullo_epi32(four_columns(s->minimums, 2 * g), _mm512_loadu_si512(repeated));
    __m512i b =
        _mm512_mullo_epi32(four_columns(s->minimums, 2 * g + 1), _mm512_loadu_si512(repeated + 16));
    return fold_lanes(_mm512_add_epi32(a, b));
}

void pe_fill_avx512vnni_blocks256(pe_kernels *k) { fill_blocks256(k); }
