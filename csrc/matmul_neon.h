/* matmul_neon.h - the quantised matmuls of both NEON levels, all but the integer products.
 *
 * Rows are in lanes, so that the float32 steps of pe_matmul (convert, times scales, add) are made
 * for four rows at a time and no float32 sum crosses lanes.  The integer sums are exact, so their
 * order is free.  The two NEON levels differ only in these sums: exact_rows and the three functions
 * below it.
 *
 * Few tokens: four rows at a time, directly from the matrix.  Many tokens: the weights of a group
 * of up to 32 rows are packed, eight rows to a panel, in the order that the products need; each
 * panel is then multiplied by four tokens at a time.  Rows that do not fill a panel are computed as
 * for few tokens.
 *
 * Where fewer than four rows or tokens are left, the last one is used in place of the missing ones,
 * and their results are dropped.  Columns past the last are codes of 0.
 */
#ifndef PYENGINE_MATMUL_NEON_H
#define PYENGINE_MATMUL_NEON_H

#include "simd_neon.h"

#define PANEL 8       /* rows of a panel */
#define PANELS 4      /* panels packed together: PE_ROW_GRAIN rows */
#define TOKENS 4      /* tokens that meet a panel at once */
#define MANY_TOKENS 4 /* from here on weights are packed; an estimate, not measured on hardware */
#define GROUP_BLOCKS (PE_GROUP / PE_BLOCK)
#define Q8_0_BYTES (2 + PE_BLOCK)

/* One group of eight rows; half h is rows 4 h to 4 h + 3. */
typedef struct {
    union { /* in the level's order */
        int16_t int16[2 * PE_GROUP * 4];
        int32_t four_int8[2 * PE_GROUP];
    } weights;
    int32_t correction[GROUP_BLOCKS][PANEL]; /* if the level uses it */
    float scale[GROUP_BLOCKS][PANEL];        /* INT8, INT4: the first only */
} neon_panel;

/* One group of four tokens, in the level's order. */
typedef union {
    int16_t int16[PE_GROUP * TOKENS];
    int32_t four_int8[2 * PE_GROUP];
} neon_tokens;

/* ---- exact sums of q * code: defined by matmul_neon_smlal.h or matmul_neon_dotprod.h --------- */

/* For four rows, over n columns (a multiple of PE_BLOCK). */
PE_INLINE int32x4_t exact_rows(const int8_t *const code[4], int64_t n, const int16_t *q);

PE_INLINE void pack_weights(int8_t code[PANEL][PE_GROUP], neon_panel *panel);
PE_INLINE void pack_tokens(const int16_t *const q[TOKENS], neon_tokens *tokens);

/* d[t][h] over blocks [b0, b1) of the group. */
PE_INLINE void exact_panel(const neon_panel *panel, const neon_tokens *tokens, int64_t b0,
                           int64_t b1, int32x4_t d[TOKENS][2]);

/* ---- codes and scales ------------------------------------------------------------------------ */

/* Four halves from anywhere, aligned or not. */
PE_INLINE float32x4_t neon_halves(const void *const p[4])
{
    uint16x4_t h = vdup_n_u16(pe_load_u16(p[0]));
    h = vset_lane_u16(pe_load_u16(p[1]), h, 1);
    h = vset_lane_u16(pe_load_u16(p[2]), h, 2);
    h = vset_lane_u16(pe_load_u16(p[3]), h, 3);
    return vcvt_f32_f16(vreinterpret_f16_u16(h));
}

PE_INLINE int64_t neon_group_cols(const pe_matrix *w, int64_t g)
{
    return pe_min(PE_GROUP, w->cols - g * PE_GROUP);
}

PE_INLINE int64_t neon_group_blocks(const pe_matrix *w, int64_t g)
{
    return (neon_group_cols(w, g) + PE_BLOCK - 1) / PE_BLOCK;
}

/* The PE_GROUP codes of row r in group g: in the matrix itself, or copied to room. */
typedef const int8_t *neon_codes(const pe_matrix *w, int64_t r, int64_t g, int8_t room[PE_GROUP]);

PE_INLINE const int8_t *neon_int8_codes(const pe_matrix *w, int64_t r, int64_t g,
                                        int8_t room[PE_GROUP])
{
    const int8_t *codes = (const int8_t *)w->data + r * w->cols + g * PE_GROUP;
    int64_t n = neon_group_cols(w, g);
    if (n == PE_GROUP)
        return codes;
    memset(room, 0, PE_GROUP);
    memcpy(room, codes, (size_t)n);
    return room;
}

PE_INLINE const int8_t *neon_int4_codes(const pe_matrix *w, int64_t r, int64_t g,
                                        int8_t room[PE_GROUP])
{
    const uint8_t *pairs = (const uint8_t *)w->data + r * (w->cols / 2) + g * (PE_GROUP / 2);
    int64_t n = neon_group_cols(w, g);
    uint8_t padded[PE_GROUP / 2];
    if (n < PE_GROUP) {
        memset(padded, 0x88, sizeof padded);
        memcpy(padded, pairs, (size_t)n / 2);
        pairs = padded;
    }
    const int8x16_t eight = vdupq_n_s8(8);
    for (int i = 0; i < PE_GROUP / 2; i += 16) {
        uint8x16_t v = vld1q_u8(pairs + i);
        int8x16_t even = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15))), eight);
        int8x16_t odd = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(v, 4)), eight);
        vst1q_s8(room + 2 * i, vzip1q_s8(even, odd));
        vst1q_s8(room + 2 * i + 16, vzip2q_s8(even, odd));
    }
    return room;
}

PE_INLINE const uint8_t *neon_q8_0_block(const pe_matrix *w, int64_t r, int64_t g, int64_t b)
{
    return (const uint8_t *)w->data +
           (r * (w->cols / PE_BLOCK) + g * GROUP_BLOCKS + b) * Q8_0_BYTES;
}

PE_INLINE const int8_t *neon_q8_0_codes(const pe_matrix *w, int64_t r, int64_t g,
                                        int8_t room[PE_GROUP])
{
    int64_t blocks = neon_group_blocks(w, g);
    memset(room, 0, PE_GROUP);
    for (int64_t b = 0; b < blocks; b++)
        memcpy(room + b * PE_BLOCK, neon_q8_0_block(w, r, g, b) + 2, PE_BLOCK);
    return room;
}

/* The scales of four rows, for block b of group g; rows past the last are the last. */
typedef float32x4_t neon_scales(const pe_matrix *w, int64_t r, int64_t last, int64_t g, int64_t b);

PE_INLINE float32x4_t neon_group_scales(const pe_matrix *w, int64_t r, int64_t last, int64_t g,
                                        int64_t b)
{
    const void *p[4];
    for (int i = 0; i < 4; i++)
        p[i] = w->scales + g * w->scale_ld + pe_min(r + i, last);
    (void)b;
    return neon_halves(p);
}

PE_INLINE float32x4_t neon_q8_0_scales(const pe_matrix *w, int64_t r, int64_t last, int64_t g,
                                       int64_t b)
{
    const void *p[4];
    for (int i = 0; i < 4; i++)
        p[i] = neon_q8_0_block(w, pe_min(r + i, last), g, b);
    return neon_halves(p);
}

/* ---- the float32 steps of pe_matmul ---------------------------------------------------------- */

/* f32(d) (*) (s_w (*) s_x) */
PE_INLINE float32x4_t neon_grouped_term(int32x4_t d, float32x4_t s_w, float s_x)
{
    return vmulq_f32(vcvtq_f32_s32(d), vmulq_n_f32(s_w, s_x));
}

/* f32(d) (*) s_w */
PE_INLINE float32x4_t neon_q8_0_part(int32x4_t d, float32x4_t s_w)
{
    return vmulq_f32(vcvtq_f32_s32(d), s_w);
}

/* ((p[0] (+) p[1]) (+) (p[2] (+) p[3])) (*) s_x */
PE_INLINE float32x4_t neon_q8_0_term(const float32x4_t p[GROUP_BLOCKS], float s_x)
{
    return vmulq_n_f32(vaddq_f32(vaddq_f32(p[0], p[1]), vaddq_f32(p[2], p[3])), s_x);
}

/* ---- few tokens ------------------------------------------------------------------------------ */

/* The terms that group g adds to y for four rows; q and s_x are the token's in that group. */
typedef float32x4_t neon_row_terms(const pe_matrix *w, int64_t r, int64_t last, int64_t g,
                                   const int16_t *q, float s_x);

PE_INLINE float32x4_t neon_grouped_rows(neon_codes *codes, const pe_matrix *w, int64_t r,
                                        int64_t last, int64_t g, const int16_t *q, float s_x)
{
    int8_t room[4][PE_GROUP];
    const int8_t *code[4];
    for (int i = 0; i < 4; i++)
        code[i] = codes(w, pe_min(r + i, last), g, room[i]);
    int32x4_t d = exact_rows(code, neon_group_blocks(w, g) * PE_BLOCK, q);
    return neon_grouped_term(d, neon_group_scales(w, r, last, g, 0), s_x);
}

PE_INLINE float32x4_t neon_int8_rows(const pe_matrix *w, int64_t r, int64_t last, int64_t g,
                                     const int16_t *q, float s_x)
{
    return neon_grouped_rows(neon_int8_codes, w, r, last, g, q, s_x);
}

PE_INLINE float32x4_t neon_int4_rows(const pe_matrix *w, int64_t r, int64_t last, int64_t g,
                                     const int16_t *q, float s_x)
{
    return neon_grouped_rows(neon_int4_codes, w, r, last, g, q, s_x);
}

PE_INLINE float32x4_t neon_q8_0_rows(const pe_matrix *w, int64_t r, int64_t last, int64_t g,
                                     const int16_t *q, float s_x)
{
    const int64_t blocks = neon_group_blocks(w, g);
    float32x4_t p[GROUP_BLOCKS];
    for (int b = 0; b < GROUP_BLOCKS; b++) {
        p[b] = vdupq_n_f32(0.0f);
        if (b < blocks) {
            const int8_t *code[4];
            for (int i = 0; i < 4; i++)
                code[i] = (const int8_t *)neon_q8_0_block(w, pe_min(r + i, last), g, b) + 2;
            int32x4_t d = exact_rows(code, PE_BLOCK, q + b * PE_BLOCK);
            p[b] = neon_q8_0_part(d, neon_q8_0_scales(w, r, last, g, b));
        }
    }
    return neon_q8_0_term(p, s_x);
}

PE_INLINE void neon_few_tokens(neon_row_terms *terms, const pe_matrix *w, int64_t row0,
                               int64_t row1, const pe_activations *a, float *y, int64_t ldy)
{
    const int64_t groups = pe_groups(w->cols);
    for (int64_t r = row0; r < row1; r += 4) {
        for (int64_t t = 0; t < a->tokens; t++) {
            float32x4_t sum = vdupq_n_f32(0.0f);
            for (int64_t g = 0; g < groups; g++) {
                int64_t at = t * groups + g;
                sum = vaddq_f32(sum, terms(w, r, row1 - 1, g, a->q + at * PE_GROUP, a->scales[at]));
            }
            float four[4];
            vst1q_f32(four, sum);
            memcpy(y + t * ldy + r, four, (size_t)pe_min(4, row1 - r) * sizeof *y);
        }
    }
}

/* ---- many tokens ----------------------------------------------------------------------------- */

/* The terms term[t][h] that a group adds to y for a panel; the group has `blocks` blocks. */
typedef void neon_panel_terms(const neon_panel *panel, const neon_tokens *tokens, int64_t blocks,
                              const float s_x[TOKENS], float32x4_t term[TOKENS][2]);

PE_INLINE void neon_grouped_panel(const neon_panel *panel, const neon_tokens *tokens,
                                  int64_t blocks, const float s_x[TOKENS],
                                  float32x4_t term[TOKENS][2])
{
    int32x4_t d[TOKENS][2];
    exact_panel(panel, tokens, 0, blocks, d);
    for (int h = 0; h < 2; h++) {
        float32x4_t s_w = vld1q_f32(panel->scale[0] + 4 * h);
        for (int t = 0; t < TOKENS; t++)
            term[t][h] = neon_grouped_term(d[t][h], s_w, s_x[t]);
    }
}

PE_INLINE void neon_q8_0_panel(const neon_panel *panel, const neon_tokens *tokens, int64_t blocks,
                               const float s_x[TOKENS], float32x4_t term[TOKENS][2])
{
    float32x4_t p[TOKENS][2][GROUP_BLOCKS];
    memset(p, 0, sizeof p);
    for (int64_t b = 0; b < blocks; b++) {
        int32x4_t d[TOKENS][2];
        exact_panel(panel, tokens, b, b + 1, d);
        for (int h = 0; h < 2; h++) {
            float32x4_t s_w = vld1q_f32(panel->scale[b] + 4 * h);
            for (int t = 0; t < TOKENS; t++)
                p[t][h][b] = neon_q8_0_part(d[t][h], s_w);
        }
    }
    for (int t = 0; t < TOKENS; t++)
        for (int h = 0; h < 2; h++)
            term[t][h] = neon_q8_0_term(p[t][h], s_x[t]);
}

PE_INLINE void neon_load_panel(neon_codes *codes, neon_scales *scales, int per_block,
                               const pe_matrix *w, int64_t r, int64_t g, neon_panel *panel)
{
    int8_t code[PANEL][PE_GROUP];
    for (int i = 0; i < PANEL; i++) {
        const int8_t *from = codes(w, r + i, g, code[i]);
        if (from != code[i])
            memcpy(code[i], from, PE_GROUP);
    }
    pack_weights(code, panel);
    const int64_t n_scales = per_block ? neon_group_blocks(w, g) : 1;
    for (int64_t b = 0; b < n_scales; b++)
        for (int h = 0; h < 2; h++)
            vst1q_f32(panel->scale[b] + 4 * h, scales(w, r + 4 * h, r + PANEL - 1, g, b));
}

/* y [count, 8 rows] (+) term, or +0 (+) term for the first group. */
PE_INLINE void neon_add_terms(float32x4_t term[TOKENS][2], int64_t count, int first, float *y,
                              int64_t ldy)
{
    for (int64_t t = 0; t < count; t++) {
        for (int h = 0; h < 2; h++) {
            float *at = y + t * ldy + 4 * h;
            float32x4_t sum = first ? vdupq_n_f32(0.0f) : vld1q_f32(at);
            vst1q_f32(at, vaddq_f32(sum, term[t][h]));
        }
    }
}

/* One group of up to PANELS panels, rows from r on, against all tokens. */
PE_INLINE void neon_meet_tokens(neon_panel_terms *terms, const neon_panel panels[PANELS],
                                int64_t n_panels, const pe_matrix *w, int64_t r, int64_t g,
                                const pe_activations *a, float *y, int64_t ldy)
{
    const int64_t groups = pe_groups(w->cols);
    for (int64_t t = 0; t < a->tokens; t += TOKENS) {
        const int16_t *q[TOKENS];
        float s_x[TOKENS];
        for (int i = 0; i < TOKENS; i++) {
            int64_t at = pe_min(t + i, a->tokens - 1) * groups + g;
            q[i] = a->q + at * PE_GROUP;
            s_x[i] = a->scales[at];
        }
        neon_tokens tokens;
        pack_tokens(q, &tokens);
        for (int64_t i = 0; i < n_panels; i++) {
            float32x4_t term[TOKENS][2];
            terms(&panels[i], &tokens, neon_group_blocks(w, g), s_x, term);
            neon_add_terms(term, pe_min(TOKENS, a->tokens - t), g == 0, y + t * ldy + r + i * PANEL,
                           ldy);
        }
    }
}

/* row1 - row0 is a multiple of PANEL. */
PE_INLINE void neon_many_tokens(neon_codes *codes, neon_scales *scales, int per_block,
                                neon_panel_terms *terms, const pe_matrix *w, int64_t row0,
                                int64_t row1, const pe_activations *a, float *y, int64_t ldy)
{
    neon_panel panels[PANELS];
    for (int64_t r = row0; r < row1; r += PANELS * PANEL) {
        int64_t n_panels = pe_min(PANELS, (row1 - r) / PANEL);
        for (int64_t g = 0; g < pe_groups(w->cols); g++) {
            for (int64_t i = 0; i < n_panels; i++)
                neon_load_panel(codes, scales, per_block, w, r + i * PANEL, g, &panels[i]);
            neon_meet_tokens(terms, panels, n_panels, w, r, g, a, y, ldy);
        }
    }
}

/* ---- the kernels ----------------------------------------------------------------------------- */

/* Rows from row0 on that go in panels end here. */
PE_INLINE int64_t neon_panels_end(int64_t row0, int64_t row1, const pe_activations *a)
{
    return a->tokens < MANY_TOKENS ? row0 : row1 - (row1 - row0) % PANEL;
}

static void matmul_q8_0(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    int64_t end = neon_panels_end(row0, row1, a);
    neon_many_tokens(neon_q8_0_codes, neon_q8_0_scales, 1, neon_q8_0_panel, w, row0, end, a, y,
                     ldy);
    neon_few_tokens(neon_q8_0_rows, w, end, row1, a, y, ldy);
}

static void matmul_int8(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    int64_t end = neon_panels_end(row0, row1, a);
    neon_many_tokens(neon_int8_codes, neon_group_scales, 0, neon_grouped_panel, w, row0, end, a, y,
                     ldy);
    neon_few_tokens(neon_int8_rows, w, end, row1, a, y, ldy);
}

static void matmul_int4(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    int64_t end = neon_panels_end(row0, row1, a);
    neon_many_tokens(neon_int4_codes, neon_group_scales, 0, neon_grouped_panel, w, row0, end, a, y,
                     ldy);
    neon_few_tokens(neon_int4_rows, w, end, row1, a, y, ldy);
}

PE_INLINE void fill_matmul_quantised(pe_kernels *k)
{
    k->matmul[PE_Q8_0] = matmul_q8_0;
    k->matmul[PE_INT8] = matmul_int8;
    k->matmul[PE_INT4] = matmul_int4;
}

#endif
