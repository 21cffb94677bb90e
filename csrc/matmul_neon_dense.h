/* matmul_neon_dense.h - F32, F16 and BF16 for every 64-bit ARM processor.
 *
 * The products are exact in float64, so that a fused multiply-add rounds as multiply, then add. The
 * eight accumulators of sum8 are four pairs.
 */
#include "simd_neon.h"

/* Eight weights as float32, from any address. */
typedef float32x4x2_t eight_weights(const uint8_t *p);

PE_INLINE float32x4x2_t eight_f32(const uint8_t *p)
{
    return (float32x4x2_t){
        {vreinterpretq_f32_u8(vld1q_u8(p)), vreinterpretq_f32_u8(vld1q_u8(p + 16))}};
}

PE_INLINE float32x4x2_t eight_f16(const uint8_t *p)
{
    float16x8_t h = vreinterpretq_f16_u8(vld1q_u8(p));
    return (float32x4x2_t){{vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)}};
}

PE_INLINE float32x4x2_t eight_bf16(const uint8_t *p)
{
    uint16x8_t h = vreinterpretq_u16_u8(vld1q_u8(p));
    return (float32x4x2_t){{vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)),
                            vreinterpretq_f32_u32(vshll_high_n_u16(h, 16))}};
}

#define MOST_SUMS 4 /* rows times tokens of a tile: 16 of the 32 registers hold accumulators */

/* Eight columns of rows x tokens sums. */
PE_INLINE void dense_columns(eight_weights *load, int rows, int tokens, const uint8_t *const w[],
                             const float *const x[], float64x2_t sum[MOST_SUMS][4])
{
    float64x2_t wide_x[MOST_SUMS][4];
    for (int t = 0; t < tokens; t++)
        widen8(load8(x[t]), wide_x[t]);
    for (int r = 0; r < rows; r++) {
        float64x2_t wide_w[4];
        widen8(load(w[r]), wide_w);
        for (int t = 0; t < tokens; t++)
            for (int k = 0; k < 4; k++)
                sum[r * tokens + t][k] = vfmaq_f64(sum[r * tokens + t][k], wide_x[t][k], wide_w[k]);
    }
}

/* y[r * tokens + t] of rows x tokens; size is the bytes of a weight.  Columns past the last are
 * taken as 0 * 0: no accumulator is ever -0, so that adding +0 does not change it. */
PE_INLINE void dense_tile(eight_weights *load, int64_t size, int rows, int tokens,
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

/* In tiles of rows x tokens; the last row and token are used in place of missing ones. */
PE_INLINE void dense_tiles(eight_weights *load, int64_t size, int rows, int tokens,
                           const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                           float *y, int64_t ldy)
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

/* A square tile halves the widening of the weights; a single token cannot use one. */
PE_INLINE void matmul_dense(eight_weights *load, int64_t size, const pe_matrix *w, int64_t row0,
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
    matmul_dense(eight_f32, 4, w, row0, row1, a, y, ldy);
}

static void matmul_f16(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                       float *y, int64_t ldy)
{
    matmul_dense(eight_f16, 2, w, row0, row1, a, y, ldy);
}

static void matmul_bf16(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    matmul_dense(eight_bf16, 2, w, row0, row1, a, y, ldy);
}

PE_INLINE void fill_matmul_dense(pe_kernels *k)
{
    k->matmul[PE_F32] = matmul_f32;
    k->matmul[PE_F16] = matmul_f16;
    k->matmul[PE_BF16] = matmul_bf16;
}
