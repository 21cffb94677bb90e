/* attention_neon.h - attention.c for NEON, in tiles of queries by keys, and of queries by columns.
 *
 * Scores: the sixteen sums of a dot16 are four float32x4.  A tile is two queries by two keys, whose
 * sums fill sixteen registers.  Terms past the last are taken as +0 * +0: no sum is ever -0, so that
 * they change none.
 *
 * Mix: a tile is four queries by four vectors of columns, whose sums stay in registers over all keys.
 */
#include "simd_neon.h"

#define QUERIES 2 /* of a tile of scores */
#define KEYS 2
#define MIX_QUERIES 4
#define MIX_VECTORS 4
#define MIX_SPAN 32 /* keys that all queries use in turn */

/* Sixteen terms of the sums of each pair. */
PE_INLINE void add_terms(const float *const query[], int queries, const float *const key[],
                         int keys, int64_t i, float32x4_t sum[][4])
{
    for (int j = 0; j < 4; j++) {
        float32x4_t q[QUERIES], x[KEYS];
        for (int r = 0; r < queries; r++)
            q[r] = vld1q_f32(query[r] + i + 4 * j);
        for (int k = 0; k < keys; k++)
            x[k] = vld1q_f32(key[k] + i + 4 * j);
        for (int r = 0; r < queries; r++)
            for (int k = 0; k < keys; k++)
                sum[r * keys + k][j] = vaddq_f32(sum[r * keys + k][j], vmulq_f32(q[r], x[k]));
    }
}

/* The tree of dot16; sum[k] is accumulators 4 k to 4 k + 3. */
PE_INLINE float tree16(const float32x4_t sum[4])
{
    float32x4_t c = vaddq_f32(vaddq_f32(sum[0], sum[2]), vaddq_f32(sum[1], sum[3]));
    return vpadds_f32(vadd_f32(vget_low_f32(c), vget_high_f32(c)));
}

/* score[k * ld + r] */
PE_INLINE void score_tile(const float *const query[], int queries, const float *const key[],
                          int keys, int64_t n, float scale, float *score, int64_t ld)
{
    float32x4_t sum[QUERIES * KEYS][4];
    for (int j = 0; j < queries * keys; j++)
        for (int k = 0; k < 4; k++)
            sum[j][k] = vdupq_n_f32(0.0f);
    const int64_t whole = n - n % 16;
    for (int64_t i = 0; i < whole; i += 16)
        add_terms(query, queries, key, keys, i, sum);
    if (whole < n) {
        float rest[QUERIES + KEYS][16] = {{0}};
        const float *at[QUERIES + KEYS];
        for (int j = 0; j < queries + keys; j++) {
            const float *row = j < queries ? query[j] : key[j - queries];
            memcpy(rest[j], row + whole, (size_t)(n - whole) * sizeof(float));
            at[j] = rest[j];
        }
        add_terms(at, queries, at + queries, keys, 0, sum);
    }
    for (int r = 0; r < queries; r++)
        for (int k = 0; k < keys; k++)
            score[k * ld + r] = tree16(sum[r * keys + k]) * scale;
}

static void attention_scores(const float *const *query, int64_t rows, const float *key, int64_t ld,
                             int64_t keys, int64_t n, float scale, float *score, int64_t ld_score)
{
    for (int64_t p = 0; p < keys; p += KEYS, score += KEYS * ld_score) {
        const float *at[KEYS] = {key + p * ld, key + (p + 1) * ld};
        int64_t r = 0;
        if (p + KEYS <= keys)
            for (; r + QUERIES <= rows; r += QUERIES)
                score_tile(query + r, QUERIES, at, KEYS, n, scale, score + r, ld_score);
        for (; r < rows; r++)
            for (int k = 0; k < pe_min(KEYS, keys - p); k++)
                score_tile(query + r, 1, at + k, 1, n, scale, score + k * ld_score + r, ld_score);
    }
}

typedef struct {
    const float *e, *value;
    int64_t ld_e, ld, keys;
} mix_args;

/* 4 * vectors columns from j on of some rows of out. */
PE_INLINE void mix_tile(const mix_args *m, float *const out[], int64_t row, int rows, int64_t j,
                        int vectors)
{
    float32x4_t sum[MIX_QUERIES][MIX_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = vld1q_f32(out[row + r] + j + 4 * v);
    const float *e = m->e + row, *value = m->value + j;
    for (int64_t p = 0; p < m->keys; p++, e += m->ld_e, value += m->ld) {
        for (int v = 0; v < vectors; v++) {
            const float32x4_t x = vld1q_f32(value + 4 * v);
            for (int r = 0; r < rows; r++)
                sum[r][v] = vaddq_f32(sum[r][v], vmulq_n_f32(x, e[r]));
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            vst1q_f32(out[row + r] + j + 4 * v, sum[r][v]);
}

PE_INLINE void mix_columns(const mix_args *m, float *const out[], int64_t rows, int64_t j,
                           int vectors)
{
    int64_t r = 0;
    for (; r + MIX_QUERIES <= rows; r += MIX_QUERIES)
        mix_tile(m, out, r, MIX_QUERIES, j, vectors);
    for (; r < rows; r++)
        mix_tile(m, out, r, 1, j, vectors);
}

static void attention_mix(const float *e, int64_t ld_e, int64_t rows, const float *value,
                          int64_t ld, int64_t keys, int64_t n, float *const *out)
{
    for (int64_t p = 0; p < keys; p += MIX_SPAN) {
        const mix_args m = {e + p * ld_e, value + p * ld, ld_e, ld, pe_min(MIX_SPAN, keys - p)};
        int64_t j = 0;
        for (; j + 4 * MIX_VECTORS <= n; j += 4 * MIX_VECTORS)
            mix_columns(&m, out, rows, j, MIX_VECTORS);
        for (; j + 4 <= n; j += 4)
            mix_columns(&m, out, rows, j, 1);
        for (; j < n; j++)
            for (int64_t r = 0; r < rows; r++)
                for (int64_t k = 0; k < m.keys; k++)
                    out[r][j] += m.e[k * ld_e + r] * m.value[k * ld + j];
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

PE_INLINE void fill_attention(pe_kernels *k)
{
    k->load_f16 = load_f16;
    k->attention_scores = attention_scores;
    k->attention_mix = attention_mix;
}
