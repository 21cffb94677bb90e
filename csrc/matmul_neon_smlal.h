/* matmul_neon_smlal.h - the exact products of matmul_neon.h for every 64-bit ARM processor.
 *
 * smlal multiplies int16 activations by codes widened to int16: four exact int32 products and sums
 * per instruction.  A panel holds its weights column by column, the four rows of a half side by
 * side, and so do the packed tokens.  The lane operand of smlal then selects the token, three loads
 * serve the 64 products of two columns, and nothing is summed across lanes.
 */
#include "matmul_neon.h"

PE_INLINE int32x4_t exact_rows(const int8_t *const code[4], int64_t n, const int16_t *q)
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

/* [half][column][row of the half]; vst4 transposes. */
PE_INLINE void pack_weights(int8_t code[PANEL][PE_GROUP], neon_panel *panel)
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
PE_INLINE void pack_tokens(const int16_t *const q[TOKENS], neon_tokens *tokens)
{
    for (int c = 0; c < PE_GROUP; c += 8) {
        int16x8x4_t of_token;
        for (int t = 0; t < TOKENS; t++)
            of_token.val[t] = vld1q_s16(q[t] + c);
        vst4q_s16(tokens->int16 + c * TOKENS, of_token);
    }
}

/* w and q hold two columns of four rows and of four tokens: here the first column, below the
 * second. */
PE_INLINE void add_low_column(int32x4_t d[TOKENS], int16x8_t w, int16x8_t q)
{
    d[0] = vmlal_laneq_s16(d[0], vget_low_s16(w), q, 0);
    d[1] = vmlal_laneq_s16(d[1], vget_low_s16(w), q, 1);
    d[2] = vmlal_laneq_s16(d[2], vget_low_s16(w), q, 2);
    d[3] = vmlal_laneq_s16(d[3], vget_low_s16(w), q, 3);
}

PE_INLINE void add_high_column(int32x4_t d[TOKENS], int16x8_t w, int16x8_t q)
{
    d[0] = vmlal_high_laneq_s16(d[0], w, q, 4);
    d[1] = vmlal_high_laneq_s16(d[1], w, q, 5);
    d[2] = vmlal_high_laneq_s16(d[2], w, q, 6);
    d[3] = vmlal_high_laneq_s16(d[3], w, q, 7);
}

PE_INLINE void exact_panel(const neon_panel *panel, const neon_tokens *tokens, int64_t b0,
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
