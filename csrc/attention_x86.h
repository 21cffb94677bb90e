/* attention_x86.h - scores eight positions at a time, the mix in tiles of positions by columns.
 *
 * Scores: the sixteen sums of a dot16 are one f32x16.  Four positions share the loads of the query
 * and give enough independent chains; two fours end in one tree, eight positions across.
 * Mix: within a tile the columns' sums are registers, between tiles they wait in out.  All bands of
 * a few positions come before the next ones, so that the values are read as they lie in memory.
 */
#include "simd_x86.h"

#define BAND 4       /* f32x16 in a band: the chains of additions that run side by side */
#define POSITIONS 16 /* of a tile */

/* Steps C, D and the last of dot16's tree for eight B, whose results land in the order given. */
PE_INLINE __m256 trees(const __m256 b[8])
{
    __m256 c[4], d[2];
    for (int i = 0; i < 4; i++) /* four lanes of b[i], then four of b[i+4] */
        c[i] = _mm256_add_ps(_mm256_permute2f128_ps(b[i], b[i + 4], 0x20),
                             _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
    for (int i = 0; i < 2; i++) { /* two of each of 2i, 2i+1; then of 2i+4, 2i+5 */
        __m256d even = _mm256_castps_pd(c[2 * i]), odd = _mm256_castps_pd(c[2 * i + 1]);
        d[i] = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(even, odd)),
                             _mm256_castpd_ps(_mm256_unpackhi_pd(even, odd)));
    }
    return _mm256_add_ps(_mm256_shuffle_ps(d[0], d[1], 0x88), _mm256_shuffle_ps(d[0], d[1], 0xdd));
}

/* The sixteen sums of four positions, each folded to eight. */
PE_INLINE void dots4(const float *query, const float *const key[4], int64_t n, __m256 b[4])
{
    f32x16 sum[4];
    for (int p = 0; p < 4; p++)
        sum[p] = f32x16_zero();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        const f32x16 q = f32x16_load(query + i, 16);
        for (int p = 0; p < 4; p++)
            sum[p] = f32x16_add(sum[p], f32x16_mul(q, f32x16_load(key[p] + i, 16)));
    }
    if (i < n) { /* the lanes beyond add +0 to sums that began at +0, hence are never -0 */
        const f32x16 q = f32x16_load(query + i, n - i);
        for (int p = 0; p < 4; p++)
            sum[p] = f32x16_add(sum[p], f32x16_mul(q, f32x16_load(key[p] + i, n - i)));
    }
    for (int p = 0; p < 4; p++)
        b[p] = f32x16_fold(sum[p]);
}

static void attention_scores(const float *query, const float *key, int64_t ld, int64_t count,
                             int64_t n, float scale, float *score)
{
    for (int64_t p = 0; p < count; p += 8) {
        const float *row[8]; /* past the end, the last position again */
        __m256 b[8];
        for (int k = 0; k < 8; k++)
            row[k] = key + pe_min(p + k, count - 1) * ld;
        dots4(query, row, n, b);
        dots4(query, row + 4, n, b + 4);
        __m256 scaled = _mm256_mul_ps(trees(b), _mm256_set1_ps(scale));
        store8_part(score + p, scaled, pe_min(8, count - p));
    }
}

typedef struct {
    const float *e, *value;
    int64_t ld, n;
    float *out;
} mix_args;

static void load_f16(const uint16_t *half, int64_t n, float *x)
{
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(x + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(half + i))));
    for (; i < n; i++)
        x[i] = pe_f16_to_float(half[i]);
}

/* Columns [j, j + 16 * (vectors - 1) + last) of positions [p0, p1). */
PE_INLINE void mix_tile(const mix_args *m, int64_t p0, int64_t p1, int64_t j, int vectors,
                        int64_t last)
{
    f32x16 sum[BAND];
    for (int v = 0; v < vectors; v++)
        sum[v] = f32x16_load(m->out + j + 16 * v, lanes_of(v, vectors, last));
    for (int64_t p = p0; p < p1; p++) {
        const float *row = m->value + p * m->ld + j;
        const f32x16 e = f32x16_all(m->e[p]);
        for (int v = 0; v < vectors; v++) {
            f32x16 x = f32x16_load(row + 16 * v, lanes_of(v, vectors, last));
            sum[v] = f32x16_add(sum[v], f32x16_mul(e, x));
        }
    }
    for (int v = 0; v < vectors; v++)
        f32x16_store(m->out + j + 16 * v, sum[v], lanes_of(v, vectors, last));
}

static void mix_positions(const mix_args *m, int64_t p0, int64_t p1)
{
    int64_t j = 0;
    for (; j + 16 * BAND <= m->n; j += 16 * BAND)
        mix_tile(m, p0, p1, j, BAND, 16);
    for (; j < m->n; j += 16)
        mix_tile(m, p0, p1, j, 1, pe_min(16, m->n - j));
}

static void attention_mix(const float *e, const float *value, int64_t ld, int64_t count, int64_t n,
                          float *out)
{
    const mix_args m = {e, value, ld, n, out};
    for (int64_t p = 0; p < count; p += POSITIONS)
        mix_positions(&m, p, pe_min(p + POSITIONS, count));
}
