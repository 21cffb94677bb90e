/* matmul_blocks_neon.h - the types of blocks but Q8_0, on both NEON levels.
 *
 * The codes of a group of four rows are unpacked to int8, and its scales to lanes; the products are
 * exact_rows of the level (see matmul_neon.h).  A group is unpacked once for all tokens.  Rows past
 * the last repeat the last, and their results are dropped.
 */
#ifndef PYENGINE_MATMUL_BLOCKS_NEON_H
#define PYENGINE_MATMUL_BLOCKS_NEON_H

#include "blocks.h"

#define PARTS (PE_GROUP / PE_PART)

/* One group of four rows, rows in lanes. */
typedef struct {
    int8_t code[4][PE_GROUP];
    /* Blocks of 32 columns. */
    float scale[GROUP_BLOCKS][4], minimum[GROUP_BLOCKS][4];
    /* Blocks of 256 columns, by part. */
    int32_t part_scale[PARTS][4], part_minimum[PARTS][4];
    float d[4], dmin[4];
} group_of_rows;

PE_INLINE float half_at(const uint8_t *p) { return pe_f16_to_float(pe_load_u16(p)); }

/* ---- codes: 16 at a time --------------------------------------------------------------------- */

PE_INLINE uint8x16_t low_nibbles(uint8x16_t v) { return vandq_u8(v, vdupq_n_u8(15)); }
PE_INLINE uint8x16_t high_nibbles(uint8x16_t v) { return vshrq_n_u8(v, 4); }

/* v >> right, or v << -right. */
PE_INLINE uint8x16_t shift_right(uint8x16_t v, int right)
{
    return vshlq_u8(v, vdupq_n_s8((int8_t)-right));
}

PE_INLINE uint8x16_t masked(uint8x16_t v, int mask)
{
    return vandq_u8(v, vdupq_n_u8((uint8_t)mask));
}

PE_INLINE void put_codes(int8_t *to, uint8x16_t v, int excess)
{
    vst1q_s8(to, vsubq_s8(vreinterpretq_s8_u8(v), vdupq_n_s8((int8_t)excess)));
}

/* The block's 16 bytes of nibbles, of a type with a table. */
PE_INLINE void put_table_codes(const int8_t table[16], const uint8_t *nibbles, int8_t *to)
{
    const int8x16_t codes = vld1q_s8(table);
    const uint8x16_t v = vld1q_u8(nibbles);
    vst1q_s8(to, vqtbl1q_s8(codes, low_nibbles(v)));
    vst1q_s8(to + 16, vqtbl1q_s8(codes, high_nibbles(v)));
}

/* 16 where the bit of the column is set, of 16 columns. */
PE_INLINE uint8x16_t fifth_bits(const uint8_t *bits)
{
    const uint8x8_t each = vcreate_u8(UINT64_C(0x8040201008040201));
    const uint8x16_t set =
        vtstq_u8(vcombine_u8(vdup_n_u8(bits[0]), vdup_n_u8(bits[1])), vcombine_u8(each, each));
    return masked(set, 16);
}

/* ---- blocks of 32 columns -------------------------------------------------------------------- */

PE_INLINE void unpack_block32(int type, const uint8_t *block, int8_t *to)
{
    const uint8_t *nibbles = block + nibbles_at(type);
    if (has_table(type)) {
        put_table_codes(type == PE_IQ4_NL ? pe_iq4_nl_codes : pe_mxfp4_codes, nibbles, to);
        return;
    }
    const uint8x16_t v = vld1q_u8(nibbles);
    uint8x16_t n[2] = {low_nibbles(v), high_nibbles(v)};
    for (int i = 0; i < 2; i++) {
        if (has_fifth_bits(type))
            n[i] = vorrq_u8(n[i], fifth_bits(block + fifth_bits_at(type) + 2 * i));
        put_codes(to + 16 * i, n[i], excess_of(type));
    }
}

PE_INLINE void unpack_group32(int type, const uint8_t *blocks, int64_t n, int i, group_of_rows *w)
{
    for (int64_t b = 0; b < n; b++) {
        const uint8_t *block = blocks + b * block_bytes(type);
        unpack_block32(type, block, w->code[i] + b * PE_BLOCK);
        w->scale[b][i] = type == PE_MXFP4 ? pe_e8m0_half_to_float(block[0]) : half_at(block);
        if (has_minimum(type))
            w->minimum[b][i] = half_at(block + 2);
    }
}

/* The term that the group adds to y; sums are those of its parts, of types with a minimum. */
PE_INLINE float32x4_t term_of_group32(int type, const group_of_rows *w, int64_t blocks,
                                      const int16_t *q, const int32_t *sums, float s_x)
{
    float32x4_t p[GROUP_BLOCKS];
    for (int b = 0; b < GROUP_BLOCKS; b++) {
        p[b] = vdupq_n_f32(0.0f);
        if (b < blocks) {
            const int8_t *code[4];
            for (int i = 0; i < 4; i++)
                code[i] = w->code[i] + b * PE_BLOCK;
            p[b] = neon_q8_0_part(exact_rows(code, PE_BLOCK, q + b * PE_BLOCK),
                                  vld1q_f32(w->scale[b]));
            if (has_minimum(type))
                p[b] = vaddq_f32(p[b], vmulq_n_f32(vld1q_f32(w->minimum[b]),
                                                   (float)(sums[2 * b] + sums[2 * b + 1])));
        }
    }
    return neon_q8_0_term(p, s_x);
}

/* ---- blocks of 256 columns ------------------------------------------------------------------- */

/* Half h of a block of Q4_K or Q5_K: eight scales and minimums of six bits each, in 12 bytes. */
PE_INLINE void unpack_wide_subs(const uint8_t *p, int h, int i, group_of_rows *w)
{
    for (int part = 0; part < PARTS; part++) {
        const int j = 4 * h + part / 2;
        const int low = j < 4;
        w->part_scale[part][i] = low ? p[j] & 63 : (p[j + 4] & 15) | p[j - 4] >> 6 << 4;
        w->part_minimum[part][i] = low ? p[j + 4] & 63 : p[j + 4] >> 4 | p[j] >> 6 << 4;
    }
}

PE_INLINE void unpack_scales256(int type, const uint8_t *p, int h, int i, group_of_rows *w)
{
    if (has_wide_subs(type))
        unpack_wide_subs(p + 4, h, i, w);
    for (int part = 0; part < PARTS && !has_wide_subs(type); part++) {
        const int s = PARTS * h + part;
        if (type == PE_Q2_K) {
            w->part_scale[part][i] = p[s] & 15;
            w->part_minimum[part][i] = p[s] >> 4;
        } else if (type == PE_Q3_K) {
            const uint8_t *scales = p + 96;
            w->part_scale[part][i] =
                (scales[part] >> 4 * h & 15) | (scales[8 + s % 4] >> 2 * (s / 4) & 3) << 4;
            w->part_scale[part][i] -= 32;
        } else if (type == PE_Q6_K) {
            w->part_scale[part][i] = (int8_t)p[192 + s];
        } else {
            const int j = s / 2;
            w->part_scale[part][i] =
                ((p[4 + j / 2] >> 4 * (j % 2) & 15) | (pe_load_u16(p + 2) >> 2 * j & 3) << 4) - 32;
        }
    }
    w->d[i] = half_at(p + d_at(type));
    if (has_minimums(type))
        w->dmin[i] = half_at(p + d_at(type) + 2);
}

/* Columns 32 j + [at, at + 16) of half h, at < 32. */
PE_INLINE void unpack_codes256(int type, const uint8_t *p, int h, int j, int at, int8_t *to)
{
    uint8x16_t v;
    switch (type) {
    case PE_Q2_K:
        put_codes(to, masked(shift_right(vld1q_u8(p + 16 + 32 * h + at), 2 * j), 3), 0);
        break;
    case PE_Q3_K:
        v = masked(shift_right(vld1q_u8(p + 32 + 32 * h + at), 2 * j), 3);
        v = vorrq_u8(v, masked(shift_right(vld1q_u8(p + at), 4 * h + j - 2), 4));
        put_codes(to, v, 4);
        break;
    case PE_Q4_K:
    case PE_Q5_K:
        v = vld1q_u8(p + (type == PE_Q4_K ? 16 : 48) + 64 * h + 32 * (j / 2) + at);
        v = j % 2 ? high_nibbles(v) : low_nibbles(v);
        if (type == PE_Q5_K)
            v = vorrq_u8(v, masked(shift_right(vld1q_u8(p + 16 + at), 4 * h + j - 4), 16));
        put_codes(to, v, 0);
        break;
    default: /* Q6_K */
        v = vld1q_u8(p + 64 * h + 32 * (j % 2) + at);
        v = j / 2 ? high_nibbles(v) : low_nibbles(v);
        v = vorrq_u8(v, masked(shift_right(vld1q_u8(p + 128 + 32 * h + at), 2 * j - 4), 48));
        put_codes(to, v, 32);
    }
}

/* Half h of the block at p, row i. */
PE_INLINE void unpack_group256(int type, const uint8_t *p, int h, int i, group_of_rows *w)
{
    unpack_scales256(type, p, h, i, w);
    for (int j = 0; j < PE_GROUP / 32; j++) {
        int8_t *to = w->code[i] + 32 * j;
        if (type == PE_IQ4_XS) {
            put_table_codes(pe_iq4_nl_codes, p + 8 + 64 * h + 16 * j, to);
        } else {
            unpack_codes256(type, p, h, j, 0, to);
            unpack_codes256(type, p, h, j, 16, to + 16);
        }
    }
}

/* D, from the P of the parts. */
PE_INLINE float32x4_t sum_of_parts(int type, const int32x4_t part[PARTS])
{
    int32x4_t sum[PARTS];
    float32x4_t term[PARTS];
    const int terms = terms_of(type);
    for (int p = 0; p < PARTS; p++) {
        const int at = terms == 8 ? p : p / 2 % terms;
        sum[at] = terms == 8 || p == 2 * at ? part[p] : vaddq_s32(sum[at], part[p]);
    }
    for (int i = 0; i < terms; i++)
        term[i] = vcvtq_f32_s32(sum[i]);
    for (int n = terms / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            term[i] = vaddq_f32(term[i], term[i + n]);
    return term[0];
}

PE_INLINE float32x4_t term_of_group256(int type, const group_of_rows *w, const int16_t *q,
                                       const int32_t *sums, float s_x)
{
    int32x4_t part[PARTS], minimum = vdupq_n_s32(0);
    for (int p = 0; p < PARTS; p++) {
        const int8_t *code[4];
        for (int i = 0; i < 4; i++)
            code[i] = w->code[i] + p * PE_PART;
        part[p] =
            vmulq_s32(vld1q_s32(w->part_scale[p]), exact_rows(code, PE_PART, q + p * PE_PART));
        if (has_minimums(type))
            minimum = vmlaq_n_s32(minimum, vld1q_s32(w->part_minimum[p]), sums[p]);
    }
    float32x4_t term = vmulq_f32(sum_of_parts(type, part), vld1q_f32(w->d));
    if (has_minimums(type))
        term = vsubq_f32(term, vmulq_f32(vcvtq_f32_s32(minimum), vld1q_f32(w->dmin)));
    return vmulq_n_f32(term, s_x);
}

/* ---- the kernels ----------------------------------------------------------------------------- */

PE_INLINE void unpack_group(int type, const pe_matrix *w, int64_t r, int64_t last, int64_t g,
                            group_of_rows *group)
{
    const int64_t blocks = w->cols / (is_blocks(type) ? PE_BLOCK : BLOCK256);
    const int64_t bytes = is_blocks(type) ? block_bytes(type) : block256_bytes(type);
    for (int i = 0; i < 4; i++) {
        const uint8_t *row = (const uint8_t *)w->data + pe_min(r + i, last) * blocks * bytes;
        if (is_blocks(type))
            unpack_group32(type, row + g * GROUP_BLOCKS * bytes, neon_group_blocks(w, g), i, group);
        else
            unpack_group256(type, row + g / 2 * bytes, g % 2, i, group);
    }
}

/* y[0, n) (+) term, or +0 (+) term for the first group. */
PE_INLINE void add_term(float *y, int64_t n, int first, float32x4_t term)
{
    float four[4] = {0};
    if (!first)
        memcpy(four, y, (size_t)n * sizeof *y);
    vst1q_f32(four, vaddq_f32(vld1q_f32(four), term));
    memcpy(y, four, (size_t)n * sizeof *y);
}

PE_INLINE void matmul_unpacked(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                               const pe_activations *a, float *y, int64_t ldy)
{
    const int64_t groups = pe_groups(w->cols);
    const int sums = has_minimum(type) || has_minimums(type);
    for (int64_t r = row0; r < row1; r += 4) {
        for (int64_t g = 0; g < groups; g++) {
            group_of_rows group;
            unpack_group(type, w, r, row1 - 1, g, &group);
            for (int64_t t = 0; t < a->tokens; t++) {
                const int64_t at = t * groups + g;
                const int16_t *q = a->q + at * PE_GROUP;
                const int32_t *s = sums ? a->sums + at * PARTS : NULL;
                float32x4_t term = is_blocks(type)
                                       ? term_of_group32(type, &group, neon_group_blocks(w, g), q,
                                                         s, a->scales[at])
                                       : term_of_group256(type, &group, q, s, a->scales[at]);
                add_term(y + t * ldy + r, pe_min(4, row1 - r), g == 0, term);
            }
        }
    }
}

#define BLOCK_TYPES(TYPE)                                                                          \
    TYPE(Q4_0)                                                                                     \
    TYPE(Q4_1)                                                                                     \
    TYPE(Q5_0) TYPE(Q5_1) TYPE(IQ4_NL) TYPE(MXFP4) TYPE(Q2_K) TYPE(Q3_K) TYPE(Q4_K) TYPE(Q5_K)     \
        TYPE(Q6_K) TYPE(IQ4_XS)

#define KERNEL(type)                                                                               \
    static void matmul_unpacked_##type(const pe_matrix *w, int64_t row0, int64_t row1,             \
                                       const pe_activations *a, float *y, int64_t ldy)             \
    {                                                                                              \
        matmul_unpacked(PE_##type, w, row0, row1, a, y, ldy);                                      \
    }
BLOCK_TYPES(KERNEL)
#undef KERNEL

PE_INLINE void fill_blocks(pe_kernels *k)
{
#define ENTRY(type) k->matmul[PE_##type] = matmul_unpacked_##type;
    BLOCK_TYPES(ENTRY)
#undef ENTRY
}

#endif
