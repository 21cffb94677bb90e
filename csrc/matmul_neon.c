/* matmul_neon.c - sibling of matmul.c for every 64-bit ARM processor.
 *
 * Quantised types (the frame is matmul_neon.h): int16 activations meet codes widened to int16 in
 * smlal, four exact int32 products and sums each.  A panel holds its weights column by column, the
 * four rows of a half side by side, and the tokens likewise, so that the token is chosen by smlal's
 * lane, three loads serve the 64 products of two columns, and nothing is summed across lanes.
 *
 * Dense types: the products are exact in float64, so that a fused multiply-add rounds as multiply,
 * then add.  The eight accumulators of sum8 are four pairs.
 */
#include "matmul_neon.h"

/* ---- quantised: the integer products --------------------------------------------------------- */

NEON_INLINE int32x4_t rows_smlal(const int8_t *const code[4], int64_t n, const int16_t *q)
{
    int32x4_t low[4], high[4];
    for (int i = 0; i < 4; i++)
        low[i] = high[i] = vdupq_n_s32(0);
    for (int64_t c = 0; c < n; c += 16) {
        int16x8_t q0 = vld1q_s16(q + c), q1 = vld1q_s16(q + c + 8);
        for (int i = 0; i < 4; i++) {
            int8x16_t w = vld1q_s8(code[i] + c);
            int16x8_t w0 = vmovl_s8(vget_low_s8(w)), w1 = vmovl_high_s8(w);
            low[i] = vmlal_s16(low[i], vget_low_s16(w0), vget_low_s16(q0));
            high[i] = vmlal_high_s16(high[i], w0, q0);
            low[i] = vmlal_s16(low[i], vget_low_s16(w1), vget_low_s16(q1));
            high[i] = vmlal_high_s16(high[i], w1, q1);
        }
    }
    for (int i = 0; i < 4; i++)
        low[i] = vaddq_s32(low[i], high[i]);
    return vpaddq_s32(vpaddq_s32(low[0], low[1]), vpaddq_s32(low[2], low[3]));
}

/* [half][column][row of the half]; vst4 does the transposing. */
NEON_INLINE void pack_weights_int16(int8_t code[PANEL][PE_GROUP], neon_panel *panel)
{
    for (int h = 0; h < 2; h++) {
        for (int c = 0; c < PE_GROUP; c += 8) {
            int16x8x4_t rows;
            for (int i = 0; i < 4; i++)
                rows.val[i] = vmovl_s8(vld1_s8(code[4 * h + i] + c));
            vst4q_s16(panel->weights.int16 + (h * PE_GROUP + c) * 4, rows);
        }
    }
}

/* [column][token] */
NEON_INLINE void pack_tokens_int16(const int16_t *const q[TOKENS], neon_tokens *tokens)
{
    for (int c = 0; c < PE_GROUP; c += 8) {
        int16x8x4_t of_token;
        for (int t = 0; t < TOKENS; t++)
            of_token.val[t] = vld1q_s16(q[t] + c);
        vst4q_s16(tokens->int16 + c * TOKENS, of_token);
    }
}

/* w and q hold two columns of four rows and of four tokens; the first of them, then the second. */
NEON_INLINE void add_low_column(int32x4_t d[TOKENS], int16x8_t w, int16x8_t q)
{
    d[0] = vmlal_laneq_s16(d[0], vget_low_s16(w), q, 0);
    d[1] = vmlal_laneq_s16(d[1], vget_low_s16(w), q, 1);
    d[2] = vmlal_laneq_s16(d[2], vget_low_s16(w), q, 2);
    d[3] = vmlal_laneq_s16(d[3], vget_low_s16(w), q, 3);
}

NEON_INLINE void add_high_column(int32x4_t d[TOKENS], int16x8_t w, int16x8_t q)
{
    d[0] = vmlal_high_laneq_s16(d[0], w, q, 4);
    d[1] = vmlal_high_laneq_s16(d[1], w, q, 5);
    d[2] = vmlal_high_laneq_s16(d[2], w, q, 6);
    d[3] = vmlal_high_laneq_s16(d[3], w, q, 7);
}

NEON_INLINE void panel_smlal(const neon_panel *panel, const neon_tokens *tokens, int64_t b0,
                             int64_t b1, int32x4_t d[TOKENS][2])
{
    int32x4_t sum0[TOKENS], sum1[TOKENS];
    for (int t = 0; t < TOKENS; t++)
        sum0[t] = sum1[t] = vdupq_n_s32(0);
    for (int64_t c = b0 * PE_BLOCK; c < b1 * PE_BLOCK; c += 2) {
        int16x8_t q = vld1q_s16(tokens->int16 + c * TOKENS);
        int16x8_t w0 = vld1q_s16(panel->weights.int16 + c * 4);
        int16x8_t w1 = vld1q_s16(panel->weights.int16 + (PE_GROUP + c) * 4);
        add_low_column(sum0, w0, q);
        add_low_column(sum1, w1, q);
        add_high_column(sum0, w0, q);
        add_high_column(sum1, w1, q);
    }
    for (int t = 0; t < TOKENS; t++) {
        d[t][0] = sum0[t];
        d[t][1] = sum1[t];
    }
}

static const neon_products smlal_products = {
    rows_smlal,
    pack_weights_int16,
    pack_tokens_int16,
    panel_smlal,
};

static void matmul_q8_0(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    neon_matmul_q8_0(&smlal_products, w, row0, row1, a, y, ldy);
}

static void matmul_int8(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    neon_matmul_int8(&smlal_products, w, row0, row1, a, y, ldy);
}

static void matmul_int4(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    neon_matmul_int4(&smlal_products, w, row0, row1, a, y, ldy);
}

/* ---- dense ----------------------------------------------------------------------------------- */

/* Eight weights as float32, from any address. */
typedef float32x4x2_t load8(const uint8_t *p);

NEON_INLINE float32x4x2_t load8_f32(const uint8_t *p)
{
    return (float32x4x2_t){{vreinterpretq_f32_u8(vld1q_u8(p)),
                            vreinterpretq_f32_u8(vld1q_u8(p + 16))}};
}

NEON_INLINE float32x4x2_t load8_f16(const uint8_t *p)
{
    float16x8_t h = vreinterpretq_f16_u8(vld1q_u8(p));
    return (float32x4x2_t){{vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)}};
}

NEON_INLINE float32x4x2_t load8_bf16(const uint8_t *p)
{
    uint16x8_t h = vreinterpretq_u16_u8(vld1q_u8(p));
    return (float32x4x2_t){{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)),
                            vreinterpretq_f32_u32(vshll_high_n_u16(h, 16))}};
}

NEON_INLINE void widen8(float32x4x2_t v, float64x2_t wide[4])
{
    wide[0] = vcvt_f64_f32(vget_low_f32(v.val[0]));
    wide[1] = vcvt_high_f64_f32(v.val[0]);
    wide[2] = vcvt_f64_f32(vget_low_f32(v.val[1]));
    wide[3] = vcvt_high_f64_f32(v.val[1]);
}

#define MOST_SUMS 4 /* rows times tokens of a tile: 16 of the 32 registers hold accumulators */

/* Eight columns of rows x tokens sums. */
NEON_INLINE void dense_columns(load8 *load, int rows, int tokens, const uint8_t *const w[],
                               const float *const x[], float64x2_t sum[MOST_SUMS][4])
{
    float64x2_t wide_x[MOST_SUMS][4];
    for (int t = 0; t < tokens; t++)
        widen8((float32x4x2_t){{vld1q_f32(x[t]), vld1q_f32(x[t] + 4)}}, wide_x[t]);
    for (int r = 0; r < rows; r++) {
        float64x2_t wide_w[4];
        widen8(load(w[r]), wide_w);
        for (int t = 0; t < tokens; t++)
            for (int k = 0; k < 4; k++)
                sum[r * tokens + t][k] = vfmaq_f64(sum[r * tokens + t][k], wide_x[t][k], wide_w[k]);
    }
}

/* The tree of sum8; sum[k] is accumulators 2 k and 2 k + 1. */
NEON_INLINE double tree8(const float64x2_t sum[4])
{
    return vpaddd_f64(vaddq_f64(vaddq_f64(sum[0], sum[2]), vaddq_f64(sum[1], sum[3])));
}

/* y[r * tokens + t] of rows x tokens; size is a weight's in bytes.  What lies past the last column
 * is taken as 0 * 0: no accumulator is ever -0, so that adding +0 leaves it as it is. */
NEON_INLINE void dense_tile(load8 *load, int64_t size, int rows, int tokens,
                            const uint8_t *const w[], const float *const x[], int64_t cols,
                            float y[MOST_SUMS])
{
    float64x2_t sum[MOST_SUMS][4];
    for (int i = 0; i < rows * tokens; i++)
        for (int k = 0; k < 4; k++)
            sum[i][k] = vdupq_n_f64(0.0);
    const uint8_t *w_at[MOST_SUMS];
    const float *x_at[MOST_SUMS];
    const int64_t whole = cols - cols % 8;
    for (int64_t c = 0; c < whole; c += 8) {
        for (int r = 0; r < rows; r++)
            w_at[r] = w[r] + c * size;
        for (int t = 0; t < tokens; t++)
            x_at[t] = x[t] + c;
        dense_columns(load, rows, tokens, w_at, x_at, sum);
    }
    if (whole < cols) {
        uint8_t w_rest[MOST_SUMS][32] = {{0}};
        float x_rest[MOST_SUMS][8] = {{0}};
        for (int r = 0; r < rows; r++) {
            memcpy(w_rest[r], w[r] + whole * size, (size_t)((cols - whole) * size));
            w_at[r] = w_rest[r];
        }
        for (int t = 0; t < tokens; t++) {
            memcpy(x_rest[t], x[t] + whole, (size_t)(cols - whole) * sizeof(float));
            x_at[t] = x_rest[t];
        }
        dense_columns(load, rows, tokens, w_at, x_at, sum);
    }
    for (int i = 0; i < rows * tokens; i++)
        y[i] = (float)tree8(sum[i]);
}

/* In tiles of rows x tokens; the last row and token stand in for missing ones. */
NEON_INLINE void dense_tiles(load8 *load, int64_t size, int rows, int tokens, const pe_matrix *w,
                             int64_t row0, int64_t row1, const pe_activations *a, float *y,
                             int64_t ldy)
{
    for (int64_t r0 = row0; r0 < row1; r0 += rows) {
        const uint8_t *row[MOST_SUMS];
        for (int r = 0; r < rows; r++)
            row[r] = (const uint8_t *)w->data + pe_min(r0 + r, row1 - 1) * w->cols * size;
        for (int64_t t0 = 0; t0 < a->tokens; t0 += tokens) {
            const float *x[MOST_SUMS];
            for (int t = 0; t < tokens; t++)
                x[t] = a->x + pe_min(t0 + t, a->tokens - 1) * w->cols;
            float sums[MOST_SUMS];
            dense_tile(load, size, rows, tokens, row, x, w->cols, sums);
            for (int64_t r = 0; r < pe_min(rows, row1 - r0); r++)
                for (int64_t t = 0; t < pe_min(tokens, a->tokens - t0); t++)
                    y[(t0 + t) * ldy + r0 + r] = sums[r * tokens + t];
        }
    }
}

/* A square tile halves the widening of the weights; a single token has no use for one. */
NEON_INLINE void matmul_dense(load8 *load, int64_t size, const pe_matrix *w, int64_t row0,
                              int64_t row1, const pe_activations *a, float *y, int64_t ldy)
{
    if (a->tokens == 1)
        dense_tiles(load, size, 4, 1, w, row0, row1, a, y, ldy);
    else
        dense_tiles(load, size, 2, 2, w, row0, row1, a, y, ldy);
}

static void matmul_f32(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                       float *y, int64_t ldy)
{
    matmul_dense(load8_f32, 4, w, row0, row1, a, y, ldy);
}

static void matmul_f16(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                       float *y, int64_t ldy)
{
    matmul_dense(load8_f16, 2, w, row0, row1, a, y, ldy);
}

static void matmul_bf16(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    matmul_dense(load8_bf16, 2, w, row0, row1, a, y, ldy);
}

void pe_fill_neon_matmul(pe_kernels *k)
{
    k->matmul_q8_0 = matmul_q8_0;
    k->matmul_int8 = matmul_int8;
    k->matmul_int4 = matmul_int4;
    k->matmul_f32 = matmul_f32;
    k->matmul_f16 = matmul_f16;
    k->matmul_bf16 = matmul_bf16;
}
