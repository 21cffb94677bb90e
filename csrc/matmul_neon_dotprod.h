/* matmul_neon_dotprod.h - the exact products of matmul_neon.h by sdot.
 *
 * sdot multiplies int8 by int8, sixteen products per instruction; smlal makes four.  A 16-bit
 * activation is therefore split, exactly, into two int8:
 *
 *     q = 256 * high + low + 128,  high = q >> 8,  low = (q & 255) - 128, both in [-128, 127]
 *     sum(q * w) = 256 * sum(high * w) + sum(low * w) + 128 * sum(w)
 *
 * Over a group each of the three terms stays below 2^30 in magnitude, and so do their partial sums
 * and the result, for any int8 codes: nothing overflows.  sum(w) is computed once when weights are
 * packed, otherwise by a third sdot, with ones.
 *
 * A panel holds four columns of four rows side by side, and so do the packed tokens, so that the
 * lane operand of sdot selects the token, as in matmul_neon_smlal.h.
 *
 * The bits are checked under an emulator only.  The speed on hardware is not measured.
 */
#include "matmul_neon.h"

/* The sixteen q at q: val[0] their low parts, val[1] their high ones. */
PE_INLINE int8x16x2_t split(const int16_t *q)
{
    int8x16x2_t bytes = vld2q_s8((const int8_t *)q);
    bytes.val[0] = veorq_s8(bytes.val[0], vdupq_n_s8(-128)); /* unsigned, less 128 */
    return bytes;
}

PE_INLINE int32x4_t join(int32x4_t high, int32x4_t low, int32x4_t codes_times_128)
{
    return vaddq_s32(vaddq_s32(vshlq_n_s32(high, 8), low), codes_times_128);
}

PE_INLINE int32x4_t exact_rows(const int8_t *const code[4], int64_t n, const int16_t *q)
{
    int32x4_t high[4], low[4], codes[4];
    for (int i = 0; i < 4; i++)
        high[i] = low[i] = codes[i] = vdupq_n_s32(0);
    for (int64_t c = 0; c < n; c += 16) {
        int8x16x2_t parts = split(q + c);
        for (int i = 0; i < 4; i++) {
            int8x16_t w = vld1q_s8(code[i] + c);
            high[i] = vdotq_s32(high[i], w, parts.val[1]);
            low[i] = vdotq_s32(low[i], w, parts.val[0]);
            codes[i] = vdotq_s32(codes[i], w, vdupq_n_s8(1));
        }
    }
    for (int i = 0; i < 4; i++)
        high[i] = join(high[i], low[i], vshlq_n_s32(codes[i], 7));
    return vpaddq_s32(vpaddq_s32(high[0], high[1]), vpaddq_s32(high[2], high[3]));
}

/* int8 [half][column / 4][row of the half][column % 4], four columns to an int32, which vst4
 * transposes; correction: 128 times the sum of a row's codes in a block. */
PE_INLINE void pack_weights(int8_t code[PANEL][PE_GROUP], neon_panel *panel)
{
    for (int h = 0; h < 2; h++) {
        for (int c = 0; c < PE_GROUP; c += 16) {
            int32x4x4_t rows;
            for (int i = 0; i < 4; i++)
                rows.val[i] = vreinterpretq_s32_s8(vld1q_s8(code[4 * h + i] + c));
            vst4q_s32(panel->weights.four_int8 + h * PE_GROUP + c, rows);
        }
    }
    for (int i = 0; i < PANEL; i++) {
        for (int b = 0; b < GROUP_BLOCKS; b++) {
            const int8_t *block = code[i] + b * PE_BLOCK;
            panel->correction[b][i] =
                128 * (vaddlvq_s8(vld1q_s8(block)) + vaddlvq_s8(vld1q_s8(block + 16)));
        }
    }
}

/* int8 [column / 4][token][column % 4], the high parts and then the low ones. */
PE_INLINE void pack_tokens(const int16_t *const q[TOKENS], neon_tokens *tokens)
{
    for (int c = 0; c < PE_GROUP; c += 16) {
        int32x4x4_t high, low;
        for (int t = 0; t < TOKENS; t++) {
            int8x16x2_t parts = split(q[t] + c);
            high.val[t] = vreinterpretq_s32_s8(parts.val[1]);
            low.val[t] = vreinterpretq_s32_s8(parts.val[0]);
        }
        vst4q_s32(tokens->four_int8 + c, high);
        vst4q_s32(tokens->four_int8 + PE_GROUP + c, low);
    }
}

PE_INLINE int8x16_t load_bytes(const int32_t *p) { return vreinterpretq_s8_s32(vld1q_s32(p)); }

/* Four columns of four rows, w, and of four tokens, q. */
PE_INLINE void add_columns(int32x4_t d[TOKENS], int8x16_t w, int8x16_t q)
{
    d[0] = vdotq_laneq_s32(d[0], w, q, 0);
    d[1] = vdotq_laneq_s32(d[1], w, q, 1);
    d[2] = vdotq_laneq_s32(d[2], w, q, 2);
    d[3] = vdotq_laneq_s32(d[3], w, q, 3);
}

PE_INLINE void exact_panel(const neon_panel *panel, const neon_tokens *tokens, int64_t b0,
                           int64_t b1, int32x4_t d[TOKENS][2])
{
    const int32_t *w = panel->weights.four_int8, *q = tokens->four_int8;
    int32x4_t high0[TOKENS], high1[TOKENS], low0[TOKENS], low1[TOKENS];
    for (int t = 0; t < TOKENS; t++)
        high0[t] = high1[t] = low0[t] = low1[t] = vdupq_n_s32(0);
    for (int64_t c = b0 * PE_BLOCK; c < b1 * PE_BLOCK; c += 4) {
        int8x16_t w0 = load_bytes(w + c), w1 = load_bytes(w + PE_GROUP + c);
        int8x16_t high = load_bytes(q + c), low = load_bytes(q + PE_GROUP + c);
        add_columns(high0, w0, high);
        add_columns(high1, w1, high);
        add_columns(low0, w0, low);
        add_columns(low1, w1, low);
    }
    int32x4_t codes0 = vdupq_n_s32(0), codes1 = vdupq_n_s32(0);
    for (int64_t b = b0; b < b1; b++) {
        codes0 = vaddq_s32(codes0, vld1q_s32(panel->correction[b]));
        codes1 = vaddq_s32(codes1, vld1q_s32(panel->correction[b] + 4));
    }
    for (int t = 0; t < TOKENS; t++) {
        d[t][0] = join(high0[t], low0[t], codes0);
        d[t][1] = join(high1[t], low1[t], codes1);
    }
}
