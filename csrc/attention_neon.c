/* attention_neon.c - sibling of attention.c.
 *
 * Scores: the sixteen accumulators of dot16 are four float32x4; four positions at a time share the
 * loads of the query and keep sixteen sums going.  Terms past the last are taken as +0 * +0: no
 * accumulator is ever -0, so that adding them changes none.
 *
 * Mix: columns in lanes, a strip of them over all positions with its sums in registers.
 */
#include "kernels.h"

#include <arm_neon.h>

#define POSITIONS 4
#define WIDE 16 /* vectors of a wide strip */

#define NEON_INLINE static inline __attribute__((always_inline))

/* Sixteen terms of each of some positions' sums. */
NEON_INLINE void add_terms(const float *query, const float *const key[], int positions,
                           float32x4_t sum[POSITIONS][4])
{
    for (int k = 0; k < 4; k++) {
        float32x4_t q = vld1q_f32(query + 4 * k);
        for (int p = 0; p < positions; p++)
            sum[p][k] = vaddq_f32(sum[p][k], vmulq_f32(q, vld1q_f32(key[p] + 4 * k)));
    }
}

/* The tree of dot16; sum[k] is accumulators 4 k to 4 k + 3. */
NEON_INLINE float tree16(const float32x4_t sum[4])
{
    float32x4_t c = vaddq_f32(vaddq_f32(sum[0], sum[2]), vaddq_f32(sum[1], sum[3]));
    return vpadds_f32(vadd_f32(vget_low_f32(c), vget_high_f32(c)));
}

NEON_INLINE void dots(const float *query, const float *key, int64_t ld, int positions, int64_t n,
                      float scale, float *score)
{
    float32x4_t sum[POSITIONS][4];
    const float *at[POSITIONS];
    for (int p = 0; p < positions; p++)
        for (int k = 0; k < 4; k++)
            sum[p][k] = vdupq_n_f32(0.0f);
    const int64_t whole = n - n % 16;
    for (int64_t i = 0; i < whole; i += 16) {
        for (int p = 0; p < positions; p++)
            at[p] = key + p * ld + i;
        add_terms(query + i, at, positions, sum);
    }
    if (whole < n) {
        float query_rest[16] = {0}, key_rest[POSITIONS][16] = {{0}};
        memcpy(query_rest, query + whole, (size_t)(n - whole) * sizeof(float));
        for (int p = 0; p < positions; p++) {
            memcpy(key_rest[p], key + p * ld + whole, (size_t)(n - whole) * sizeof(float));
            at[p] = key_rest[p];
        }
        add_terms(query_rest, at, positions, sum);
    }
    for (int p = 0; p < positions; p++)
        score[p] = tree16(sum[p]) * scale;
}

static void attention_scores(const float *query, const float *key, int64_t ld, int64_t count,
                             int64_t n, float scale, float *score)
{
    int64_t p = 0;
    for (; p + POSITIONS <= count; p += POSITIONS)
        dots(query, key + p * ld, ld, POSITIONS, n, scale, score + p);
    for (; p < count; p++)
        dots(query, key + p * ld, ld, 1, n, scale, score + p);
}

/* 4 * vectors columns; vectors is a constant at each call. */
NEON_INLINE void mix_strip(const float *e, const float *value, int64_t ld, int64_t count,
                           int vectors, float *out)
{
    float32x4_t sum[WIDE];
    for (int v = 0; v < vectors; v++)
        sum[v] = vld1q_f32(out + 4 * v);
    for (int64_t p = 0; p < count; p++)
        for (int v = 0; v < vectors; v++)
            sum[v] = vaddq_f32(sum[v], vmulq_n_f32(vld1q_f32(value + p * ld + 4 * v), e[p]));
    for (int v = 0; v < vectors; v++)
        vst1q_f32(out + 4 * v, sum[v]);
}

static void attention_mix(const float *e, const float *value, int64_t ld, int64_t count, int64_t n,
                          float *out)
{
    int64_t j = 0;
    for (; j + 4 * WIDE <= n; j += 4 * WIDE)
        mix_strip(e, value + j, ld, count, WIDE, out + j);
    for (; j + 4 <= n; j += 4)
        mix_strip(e, value + j, ld, count, 1, out + j);
    for (; j < n; j++) {
        float sum = out[j];
        for (int64_t p = 0; p < count; p++)
            sum += e[p] * value[p * ld + j];
        out[j] = sum;
    }
}

static void load_f16(const uint16_t *half, int64_t n, float *x)
{
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(x + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(half + i))));
    for (; i < n; i++)
        x[i] = pe_f16_to_float(half[i]);
}

void pe_fill_neon_attention(pe_kernels *k)
{
    k->load_f16 = load_f16;
    k->attention_scores = attention_scores;
    k->attention_mix = attention_mix;
}
