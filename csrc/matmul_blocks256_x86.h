/* matmul_blocks256_x86.h - the matmuls of the types of blocks of 256 columns on both x86 levels:
 * all but the steps that depend on the instructions.
 *
 * Both shapes of matmul_x86.h, and why there are two: see there.
 *
 * Few tokens: the sums of ROWS rows over each part of 16 columns are folded together before they
 * are multiplied by the scales, so that one multiplication serves ROWS rows and the scales need no
 * spreading over lanes.
 *
 * Many tokens: a code times its scale fits into int16.  A tile holds these products, so that the
 * scales cost nothing per token, and the products are summed over as many columns as int32 can
 * hold.  A minimum times a sum of activations is the same step with 16 columns in the place of one:
 * the sum is 256 high + low, each of which fits into int16.
 *
 * The including file first includes matmul_LEVEL.h, then defines the functions of the next section.
 */
#ifndef PYENGINE_MATMUL_BLOCKS256_X86_H
#define PYENGINE_MATMUL_BLOCKS256_X86_H

#define PARTS (PE_GROUP / PE_PART) /* in a group */

/* What few tokens keep of a group on the stack: the bytes of q as the level reads them, and sums,
 * each ROWS times. */
#define FEW256_GROUPS 96 /* the most groups of few tokens: 36 KiB */
#define FEW256_TOKENS 2  /* by measurement */
#define REPEATED (PARTS * ROWS)

/* ---- the types ------------------------------------------------------------------------------- */

/* What a code is less than the number that few tokens multiply. */
PE_INLINE int offset_of(int type)
{
    return type == PE_Q3_K ? 4 : type == PE_Q6_K ? 32 : type == PE_IQ4_XS ? 128 : 0;
}

/* ---- defined by the including file ----------------------------------------------------------- */

/* q of a group as dots_of_parts reads it, and what is taken from its results, or the sums that the
 * minimums multiply: each ROWS times. */
PE_INLINE void split_group(int type, const int16_t *q, const int32_t *sums, int16_t *split,
                           int32_t *repeated);

/* 16 bytes of each of ROWS rows. */
#ifdef PE_AVX512
typedef __m512i row_bytes16; /* row i in the i-th 128 bits */
#else
typedef struct {
    __m256i even, odd; /* rows 0 and 2, rows 1 and 3 */
} row_bytes16;
#endif
PE_INLINE row_bytes16 load_row_bytes(const uint8_t *const *row, int64_t at);

/* The scales and minimums of ROWS rows of one block, as bytes in the order of the columns. */
#ifdef PE_AVX512
typedef __m512i transposed; /* of four columns of bytes in each 128 bits */
#else
typedef struct {
    __m128i four[4];
} transposed;
#endif
typedef struct {
    transposed scales, minimums;
} few_scales;
PE_INLINE few_scales read_few_scales(int type, const uint8_t *const *row, int64_t at);

/* D of group g of the block at byte `at` of ROWS rows, and the sum of M. */
PE_INLINE __m128 few_group_sum(int type, const uint8_t *const *row, int64_t at, int g,
                               const few_scales *s, const int16_t *split, const int32_t *repeated);
PE_INLINE __m128i few_minimum(int type, int g, const few_scales *s, const int32_t *repeated);

/* ---- few tokens ------------------------------------------------------------------------------ */

/* y of rows [r, r + n) of w, at most ROWS; split and repeated of all tokens and groups. */
PE_INLINE void few_rows256(int type, const pe_matrix *w, int64_t r, int64_t n,
                           const pe_activations *a, const int16_t *split, const int32_t *repeated,
                           float *y, int64_t ldy)
{
    const int64_t blocks = w->cols / BLOCK256, bytes = block256_bytes(type);
    const int64_t row_bytes = blocks * bytes;
    const uint8_t *first = (const uint8_t *)w->data + r * row_bytes, *row[ROWS];
    const uint8_t *next = first + fetch_ahead(ROWS * row_bytes);
    const int64_t share = ROWS * bytes / a->tokens; /* of the next rows, fetched with each block */
    const int near = fits_near(type, ROWS * row_bytes);
    for (int i = 0; i < ROWS; i++)
        row[i] = first + pe_min(i, n - 1) * row_bytes;
    for (int64_t t = 0; t < a->tokens; t++) {
        const float *s_x = a->scales + t * 2 * blocks;
        __m128 sum = _mm_setzero_ps();
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t at = b * bytes;
            prefetch_next(near, next + (t * blocks + b) * share, share);
            const few_scales s = read_few_scales(type, row, at);
            const __m128 d = block_halves(row, at + d_at(type));
            UNROLL
            for (int g = 0; g < 2; g++) {
                const int64_t group = (t * blocks + b) * 2 + g;
                const int32_t *rep = repeated + group * REPEATED;
                __m128 v = few_group_sum(type, row, at, g, &s, split + group * PE_GROUP, rep);
                v = _mm_mul_ps(v, d);
                if (has_minimums(type)) {
                    const __m128 dmin = block_halves(row, at + d_at(type) + 2);
                    __m128i m = few_minimum(type, g, &s, rep);
                    v = _mm_sub_ps(v, _mm_mul_ps(_mm_cvtepi32_ps(m), dmin));
                }
                sum = _mm_add_ps(sum, _mm_mul_ps(v, _mm_set1_ps(s_x[2 * b + g])));
            }
        }
        memcpy(y + t * ldy + r, &sum, (size_t)n * sizeof(float));
    }
}

PE_INLINE void matmul_few256(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                             const pe_activations *a, float *y, int64_t ldy)
{
    const int64_t all = a->tokens * (w->cols / PE_GROUP);
    _Alignas(64) int16_t split[FEW256_GROUPS * PE_GROUP];
    _Alignas(64) int32_t repeated[FEW256_GROUPS * REPEATED];
    for (int64_t g = 0; g < all; g++)
        split_group(type, a->q + g * PE_GROUP, a->sums + g * PARTS, split + g * PE_GROUP,
                    repeated + g * REPEATED);
    for (int64_t r = row0; r < row1; r += ROWS)
        few_rows256(type, w, r, pe_min(ROWS, row1 - r), a, split, repeated, y, ldy);
}

/* ---- many tokens: a tile --------------------------------------------------------------------- */

typedef struct {
    ints pairs[PAIRS][2]; /* [.][h] lane r: code times scale of two columns of row LANES * h + r */
    ints minimums[PARTS / 2][2]; /* of two sub-blocks */
    floats d[2], dmin[2];
} tile256;

/* Bytes 2 i and 2 i + 1 of each lane, as two int16. */
PE_INLINE ints two_bytes(ints v, int i)
{
    const __m128i at = i ? _mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1)
                         : _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1);
    return ints_shuffle8(v, ints_repeat(at));
}

/* Byte i of each lane, signed, as two equal int16. */
PE_INLINE ints byte_twice(ints v, int i)
{
    const __m128i at = _mm_setr_epi8(-1, 0, -1, 0, -1, 4, -1, 4, -1, 8, -1, 8, -1, 12, -1, 12);
    const __m128i more = _mm_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1);
    __m128i where = at;
    for (int j = 0; j < i; j++)
        where = _mm_add_epi8(where, more);
    return INTS_SHIFT16_RIGHT_SIGNED(ints_shuffle8(v, ints_repeat(where)), 8);
}

PE_INLINE ints and8(ints v, int mask) { return ints_and(v, ints_all(mask * 0x01010101)); }

/* The scales, and the minimums, of the LANES rows whose blocks row[] points at: byte i of lane r of
 * s[j] is that of part 4 j + i, or of sub-block 4 j + i in types with wide ones. */
PE_INLINE void tile_scales(int type, const uint8_t *const *row, ints s[4], ints m[4])
{
    ints o[4];
    if (has_wide_subs(type)) {
        gather16(row, 0, o);
        s[0] = and8(o[1], 0x3f);
        s[1] = ints_or(and8(o[3], 0x0f), and8(INTS_SHIFT_RIGHT(o[1], 2), 0x30));
        m[0] = and8(o[2], 0x3f);
        m[1] =
            ints_or(and8(INTS_SHIFT_RIGHT(o[3], 4), 0x0f), and8(INTS_SHIFT_RIGHT(o[2], 2), 0x30));
    } else if (type == PE_Q2_K) {
        gather16(row, 0, o);
        for (int j = 0; j < 4; j++) {
            s[j] = and8(o[j], 0x0f);
            m[j] = and8(INTS_SHIFT_RIGHT(o[j], 4), 0x0f);
        }
    } else if (type == PE_Q3_K) {
        gather16(row, 94, o); /* from two bytes before the scales on: the block ends after d */
        for (int j = 0; j < 4; j++) {
            /* The bytes l and u of the header, where the 16 bytes are seen as lanes. */
            ints l0 = ints_or(INTS_SHIFT_RIGHT(o[0], 16), INTS_SHIFT_LEFT(o[1], 16));
            ints l1 = ints_or(INTS_SHIFT_RIGHT(o[1], 16), INTS_SHIFT_LEFT(o[2], 16));
            ints u = ints_or(INTS_SHIFT_RIGHT(o[2], 16), INTS_SHIFT_LEFT(o[3], 16));
            ints l = j % 2 ? l1 : l0;
            l = and8(j < 2 ? l : INTS_SHIFT_RIGHT(l, 4), 0x0f);
            u = j == 0   ? and8(INTS_SHIFT_LEFT(u, 4), 0x30)
                : j == 1 ? and8(INTS_SHIFT_LEFT(u, 2), 0x30)
                : j == 2 ? and8(u, 0x30)
                         : and8(INTS_SHIFT_RIGHT(u, 2), 0x30);
            s[j] = ints_sub8(ints_or(l, u), ints_all(0x20202020));
        }
    } else if (type == PE_Q6_K) {
        gather16(row, 192, s);
    } else { /* IQ4_XS: sub-blocks, each of which has two parts */
        gather16(row, 0, o);
        for (int j = 0; j < 2; j++) {
            /* Two bytes of l hold four low nibbles; a byte of h holds four high pairs of bits. */
            const __m128i l_at =
                j ? _mm_setr_epi8(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15)
                  : _mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13);
            const __m128i h_at =
                j ? _mm_setr_epi8(3, 3, 3, 3, 7, 7, 7, 7, 11, 11, 11, 11, 15, 15, 15, 15)
                  : _mm_setr_epi8(2, 2, 2, 2, 6, 6, 6, 6, 10, 10, 10, 10, 14, 14, 14, 14);
            ints l = ints_shuffle8(o[1], ints_repeat(l_at));
            ints h = ints_shuffle8(o[0], ints_repeat(h_at));
            l = ints_or(ints_and(l, ints_all(0x000f000f)),
                        ints_and(INTS_SHIFT_RIGHT(l, 4), ints_all(0x0f000f00)));
            h = ints_or(ints_or(ints_and(INTS_SHIFT_LEFT(h, 4), ints_all(0x00000030)),
                                ints_and(INTS_SHIFT_LEFT(h, 2), ints_all(0x00003000))),
                        ints_or(ints_and(h, ints_all(0x00300000)),
                                ints_and(INTS_SHIFT_RIGHT(h, 2), ints_all(0x30000000))));
            s[j] = ints_sub8(ints_or(l, h), ints_all(0x20202020));
        }
    }
}

/* Two codes of every row, as int16, to the pair of these columns of a part. */
PE_INLINE void put_pair(tile256 *w, int part, int pair, int h, ints codes, const ints *scale)
{
    w->pairs[part * (PE_PART / 2) + pair][h] = ints_mul16(codes, scale[part]);
}

/* v << count, or v >> -count: a constant count. */
PE_INLINE ints shift16(ints v, int count)
{
    switch (count) { /* an immediate in each case */
    case 4:
        return INTS_SHIFT16_LEFT(v, 4);
    case 3:
        return INTS_SHIFT16_LEFT(v, 3);
    case 2:
        return INTS_SHIFT16_LEFT(v, 2);
    case 1:
        return INTS_SHIFT16_LEFT(v, 1);
    case -1:
        return INTS_SHIFT16_RIGHT(v, 1);
    case -2:
        return INTS_SHIFT16_RIGHT(v, 2);
    case -3:
        return INTS_SHIFT16_RIGHT(v, 3);
    case -4:
        return INTS_SHIFT16_RIGHT(v, 4);
    case -5:
        return INTS_SHIFT16_RIGHT(v, 5);
    case -6:
        return INTS_SHIFT16_RIGHT(v, 6);
    default:
        return v;
    }
}

PE_INLINE ints and16(ints v, int mask) { return ints_and(v, ints_all(mask * 0x00010001)); }

/* The codes of group g of the LANES rows whose blocks row[] points at, times their scales. */
PE_INLINE void pack_codes(int type, const uint8_t *const *row, int g, int h, const ints *scale,
                          tile256 *w)
{
    const ints table = ints_repeat(code_table(PE_IQ4_NL));
    for (int half = 0; half < 2; half++) { /* the first or second part of each 32 columns */
        ints high[4] = {ints_zero()};
        if (type == PE_Q6_K)
            gather16(row, 128 + 32 * g + 16 * half, high);
        else if (type == PE_Q5_K)
            gather16(row, 16 + 16 * half, high);
        else if (type == PE_Q3_K)
            gather16(row, 16 * half, high);
        for (int c = 0; c < (type == PE_Q2_K || type == PE_Q3_K ? 1 : 2); c++) {
            const int64_t at = type == PE_Q2_K   ? 16 + 32 * g + 16 * half
                               : type == PE_Q3_K ? 32 + 32 * g + 16 * half
                               : type == PE_Q4_K ? 16 + 64 * g + 32 * c + 16 * half
                               : type == PE_Q5_K ? 48 + 64 * g + 32 * c + 16 * half
                               : type == PE_Q6_K ? 64 * g + 32 * c + 16 * half
                                                 : 8 + 64 * g + 32 * c + 16 * half;
            ints o[4];
            gather16(row, at, o);
            UNROLL
            for (int i = 0; i < 8; i++) { /* the pair */
                if (type == PE_IQ4_XS) {
                    const __m128i twice =
                        i % 2
                            ? _mm_setr_epi8(2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15)
                            : _mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13);
                    ints x = ints_shuffle8(o[i / 2], ints_repeat(twice));
                    ints low = ints_shuffle8(table, and8(x, 0x0f));
                    ints up = ints_shuffle8(table, and8(INTS_SHIFT16_RIGHT(x, 4), 0x0f));
                    const int part = 2 * (2 * c + half);
                    put_pair(w, part, i, h, INTS_SHIFT16_RIGHT_SIGNED(low, 8), scale);
                    put_pair(w, part + 1, i, h, INTS_SHIFT16_RIGHT_SIGNED(up, 8), scale);
                    continue;
                }
                ints x = two_bytes(o[i / 2], i % 2), y = ints_zero();
                if (type == PE_Q3_K || type == PE_Q5_K || type == PE_Q6_K)
                    y = two_bytes(high[i / 2], i % 2);
                if (type == PE_Q2_K || type == PE_Q3_K) {
                    UNROLL
                    for (int j = 0; j < 4; j++) {
                        ints code = and16(shift16(x, -2 * j), 3);
                        if (type == PE_Q3_K) {
                            code = ints_or(code, and16(shift16(y, 2 - 4 * g - j), 4));
                            code = ints_sub16(code, ints_all(0x00040004));
                        }
                        put_pair(w, 2 * j + half, i, h, code, scale);
                    }
                    continue;
                }
                UNROLL
                for (int up = 0; up < 2; up++) {
                    ints code = up ? INTS_SHIFT16_RIGHT(x, 4) : and16(x, 0x0f);
                    int j = 2 * c + up; /* of the header: Q6_K's upper nibbles are columns 64 on */
                    if (type == PE_Q5_K)
                        code = ints_or(code, and16(shift16(y, 4 - 4 * g - j), 0x10));
                    if (type == PE_Q6_K) {
                        j = c + 2 * up;
                        code = ints_or(code, and16(shift16(y, 4 - 2 * j), 0x30));
                        code = ints_sub16(code, ints_all(0x00200020));
                    }
                    put_pair(w, 2 * j + half, i, h, code, scale);
                }
            }
        }
    }
}

/* Group g of the TILE rows whose blocks row[] points at. */
PE_INLINE void pack_tile256(int type, const uint8_t *const *row, int g, tile256 *w)
{
    uint16_t d[TILE], dmin[TILE];
    for (int i = 0; i < TILE; i++) {
        d[i] = pe_load_u16(row[i] + d_at(type));
        dmin[i] = has_minimums(type) ? pe_load_u16(row[i] + d_at(type) + 2) : 0;
    }
    for (int h = 0; h < 2; h++) {
        const uint8_t *const *half = row + LANES * h;
        ints s[4], m[4], scale[PARTS];
        w->d[h] = floats_of_halves(d + LANES * h);
        w->dmin[h] = floats_of_halves(dmin + LANES * h);
        tile_scales(type, half, s, m);
        UNROLL
        for (int p = 0; p < PARTS; p++) {
            const int i = has_wide_subs(type) || type == PE_IQ4_XS ? 4 * g + p / 2 : 8 * g + p;
            scale[p] = byte_twice(s[i / 4], i % 4);
        }
        if (has_wide_subs(type))
            for (int i = 0; i < 2; i++)
                w->minimums[i][h] = two_bytes(m[g], i);
        else if (type == PE_Q2_K)
            for (int i = 0; i < 4; i++)
                w->minimums[i][h] = two_bytes(m[2 * g + i / 2], i % 2);
        pack_codes(type, half, g, h, scale, w);
    }
}

/* ---- many tokens: products ------------------------------------------------------------------- */

/* The sums of one token's group that the minimums multiply, each 256 high + low: the highs, then
 * the lows, in pairs of int16. */
typedef struct {
    int32_t pairs[PARTS];
} sum_pairs;

PE_INLINE sum_pairs pairs_of_sums(int type, const int32_t *sums)
{
    sum_pairs v = {{0}};
    const __m128i low = _mm_set1_epi32(255);
    __m128i a = _mm_loadu_si128((const void *)sums), b = _mm_loadu_si128((const void *)(sums + 4));
    if (has_wide_subs(type)) {
        a = _mm_hadd_epi32(a, b);
        a = _mm_packs_epi32(_mm_srai_epi32(a, 8), _mm_and_si128(a, low));
        _mm_storeu_si128((void *)v.pairs, a);
    } else {
        __m128i high = _mm_packs_epi32(_mm_srai_epi32(a, 8), _mm_srai_epi32(b, 8));
        _mm_storeu_si128((void *)v.pairs, high);
        a = _mm_packs_epi32(_mm_and_si128(a, low), _mm_and_si128(b, low));
        _mm_storeu_si128((void *)(v.pairs + 4), a);
    }
    return v;
}

/* Term `term` of D starts at this pair; in Q4_K it has a second half, 32 pairs on. */
PE_INLINE int first_pair(int type, int term)
{
    return term * (type == PE_Q4_K ? 16 : PAIRS / terms_of(type));
}

/* The tree of D, over n terms. */
PE_INLINE floats tree_of_terms(floats (*term)[BLOCK][2], int t, int h, int n)
{
    floats v[8];
    UNROLL
    for (int i = 0; i < n; i++)
        v[i] = term[i][t][h];
    UNROLL
    for (int i = 0; i < n / 2; i++)
        v[i] = floats_add(v[i], v[i + n / 2]);
    if (n == 8)
        for (int i = 0; i < 2; i++)
            v[i] = floats_add(v[i], v[i + 2]);
    return n > 2 ? floats_add(v[0], v[1]) : v[0];
}

/* One tile times n <= BLOCK tokens (a constant): y[t] += their parts of this group. */
PE_INLINE void tile256_times_tokens(int type, const tile256 *w, const int16_t *q, int64_t ld,
                                    const sum_pairs *sums, const float *s_x, int64_t groups,
                                    float (*y)[TILE], int n)
{
    const int terms = terms_of(type), halves = type == PE_Q4_K ? 2 : 1;
    floats term[8][BLOCK][2];
    for (int k = 0; k < terms; k++) {
        ints lo[BLOCK], hi[BLOCK];
        UNROLL
        for (int t = 0; t < n; t++)
            lo[t] = hi[t] = ints_zero();
        for (int half = 0; half < halves; half++) {
            const int first = first_pair(type, k) + 32 * half;
            const int16_t *x = q + 2 * first;
            for (int i = first; i < first + PAIRS / terms / halves; i++, x += 2) {
                ints w0 = w->pairs[i][0], w1 = w->pairs[i][1];
                pin(&w0);
                pin(&w1);
                UNROLL
                for (int t = 0; t < n; t++) {
                    int32_t pair;
                    memcpy(&pair, x + t * ld, sizeof pair);
                    ints v = ints_all(pair);
                    pin(&v);
                    add_products(&lo[t], w0, v);
                    add_products(&hi[t], w1, v);
                }
            }
        }
        UNROLL
        for (int t = 0; t < n; t++) {
            term[k][t][0] = floats_of_ints(lo[t]);
            term[k][t][1] = floats_of_ints(hi[t]);
        }
    }
    for (int t = 0; t < n; t++)
        for (int h = 0; h < 2; h++) {
            floats v = floats_mul(tree_of_terms(term, t, h, terms), w->d[h]);
            if (has_minimums(type)) {
                const int pairs = type == PE_Q2_K ? 4 : 2;
                ints m = ints_zero();
                UNROLL
                for (int i = 0; i < pairs; i++)
                    add_products(&m, w->minimums[i][h], ints_all(sums[t].pairs[i]));
                m = INTS_SHIFT_LEFT(m, 8);
                UNROLL
                for (int i = 0; i < pairs; i++)
                    add_products(&m, w->minimums[i][h], ints_all(sums[t].pairs[pairs + i]));
                v = floats_sub(v, floats_mul(floats_of_ints(m), w->dmin[h]));
            }
            add_to(y[t] + LANES * h, floats_mul(v, floats_all(s_x[t * groups])));
        }
}

/* One tile times n tokens, in blocks of about equal size. */
PE_INLINE void tile256_times_chunk(int type, const tile256 *w, const int16_t *q, int64_t ld,
                                   const sum_pairs *sums, const float *s_x, int64_t groups,
                                   float (*y)[TILE], int64_t n)
{
    for (int64_t left = n, size; left; left -= size) {
        int64_t blocks = (left + BLOCK - 1) / BLOCK;
        size = (left + blocks - 1) / blocks;
        switch (size) {
#define CASE(k)                                                                                    \
    case k:                                                                                        \
        tile256_times_tokens(type, w, q, ld, sums, s_x, groups, y, k);                             \
        break;
            CASE(1)
            CASE(2)
            CASE(3)
            CASE(4)
#if BLOCK == 8
            CASE(5) CASE(6) CASE(7) CASE(8)
#endif
#undef CASE
        }
        q += size * ld;
        sums += size;
        s_x += size * groups;
        y += size;
    }
}

/* Rows [r, r + rows) of w, at most TILE, times tokens [t0, t0 + n), at most CHUNK.  next: the rows
 * of the tile to be used next, if they are worth a prefetch. */
PE_INLINE void matmul_tile256(int type, const pe_matrix *w, int64_t r, int64_t rows,
                              const pe_activations *a, int64_t t0, int64_t n, float *y, int64_t ldy,
                              const uint8_t *next)
{
    const int64_t groups = w->cols / PE_GROUP, ld = groups * PE_GROUP;
    const int64_t bytes = block256_bytes(type), row_bytes = w->cols / BLOCK256 * bytes;
    tile256 packed;
    sum_pairs sums[CHUNK];
    float sum[CHUNK][TILE];
    memset(sum, 0, (size_t)n * sizeof sum[0]);

    const uint8_t *row[TILE]; /* rows past the last repeat the last; their results are not stored */
    for (int i = 0; i < TILE; i++)
        row[i] = (const uint8_t *)w->data + (r + pe_min(i, rows - 1)) * row_bytes;
    for (int64_t g = 0; g < groups; g++) {
        if (next && g % 2 == 0) /* in storage order */
            prefetch2(next + g / 2 * TILE * bytes, TILE * bytes);
        if (g % 2)
            pack_tile256(type, row, 1, &packed);
        else
            pack_tile256(type, row, 0, &packed);
        if (has_minimums(type))
            for (int64_t t = 0; t < n; t++)
                sums[t] = pairs_of_sums(type, a->sums + ((t0 + t) * groups + g) * PARTS);
        tile256_times_chunk(type, &packed, a->q + t0 * ld + g * PE_GROUP, ld, sums,
                            a->scales + t0 * groups + g, groups, sum, n);
        if (g % 2)
            for (int i = 0; i < TILE; i++)
                row[i] += bytes;
    }
    for (int64_t t = 0; t < n; t++)
        memcpy(y + (t0 + t) * ldy + r, sum[t], (size_t)rows * sizeof(float));
}

PE_INLINE void matmul_blocks256(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                                const pe_activations *a, float *y, int64_t ldy)
{
    const int64_t row_bytes = w->cols / BLOCK256 * block256_bytes(type);
    if (a->tokens == 0)
        return;
    if (a->tokens <= FEW256_TOKENS && a->tokens * (w->cols / PE_GROUP) <= FEW256_GROUPS) {
        matmul_few256(type, w, row0, row1, a, y, ldy);
        return;
    }
    for (int64_t r = row0; r < row1; r += TILE)
        for (int64_t t = 0; t < a->tokens; t += CHUNK) {
            const uint8_t *next = (const uint8_t *)w->data + (r + TILE) * row_bytes;
            if (t > 0 || r + TILE >= row1)
                next = NULL;
            matmul_tile256(type, w, r, pe_min(TILE, row1 - r), a, t, pe_min(CHUNK, a->tokens - t),
                           y, ldy, next);
        }
}

/* ---- the table ------------------------------------------------------------------------------- */

#define KERNEL(name, type)                                                                         \
    static void name(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,      \
                     float *y, int64_t ldy)                                                        \
    {                                                                                              \
        matmul_blocks256(type, w, row0, row1, a, y, ldy);                                          \
    }
KERNEL(matmul_q2_k, PE_Q2_K)
KERNEL(matmul_q3_k, PE_Q3_K)
KERNEL(matmul_q4_k, PE_Q4_K)
KERNEL(matmul_q5_k, PE_Q5_K)
KERNEL(matmul_q6_k, PE_Q6_K)
KERNEL(matmul_iq4_xs, PE_IQ4_XS)
#undef KERNEL

PE_INLINE void fill_blocks256(pe_kernels *k)
{
    k->matmul[PE_Q2_K] = matmul_q2_k;
    k->matmul[PE_Q3_K] = matmul_q3_k;
    k->matmul[PE_Q4_K] = matmul_q4_k;
    k->matmul[PE_Q5_K] = matmul_q5_k;
    k->matmul[PE_Q6_K] = matmul_q6_k;
    k->matmul[PE_IQ4_XS] = matmul_iq4_xs;
}

#endif
