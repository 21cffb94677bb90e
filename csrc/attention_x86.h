/* attention_x86.h - attention.c in tiles of queries by keys, and of queries by columns.
 *
 * Scores: a tile is 4 queries by LANES / 4 keys.  Each pair has one register of dot16's sixteen
 * sums: all of them, or with AVX2 eight in a first and eight in a second pass.  A load of a query
 * serves all keys of the tile, a load of a key all queries.  The sums of eight pairs end in one tree.
 * Eight keys at a time stay in the nearest cache while all queries use them.
 *
 * Mix: a tile is 4 queries by some registers of columns, whose sums stay in registers over all keys.
 *
 * In both, the products of a row of the tile come before its additions: processors that compute
 * 512 bits in two halves have units for both, but take turns badly.
 */
#include "activations_x86.h"

#define QUERIES 4        /* of a tile */
#define KEYS (LANES / 4) /* of a tile of scores */
#define SPAN 8           /* keys that all queries use in turn */
#define AHEAD (KEYS / 2) /* of the next span, each tile asks for so many keys: eight queries for all */
#define PASSES (16 / LANES)
#define MIX_VECTORS (LANES / 4)
#define MIX_SPAN 32 /* keys that all queries use in turn */

/* Steps C, D and the last step of dot16's tree for eight B; the results are in the order of b. */
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

/* Else the compiler may load it again for each use, and loads are what there is too much of. */
#define IN_REGISTER(v) __asm__("" : "+v"(v))

/* One register of products of each pair, added to its sums; sum[k * rows + r]. */
PE_INLINE void add_pairs(const floats query[], int rows, const floats key[], int keys,
                            floats sum[])
{
    for (int k = 0; k < keys; k++) {
        floats product[QUERIES];
        for (int r = 0; r < rows; r++)
            product[r] = floats_mul(query[r], key[k]);
        for (int r = 0; r < rows; r++)
            sum[k * rows + r] = floats_add(sum[k * rows + r], product[r]);
    }
}

/* The sixteen sums of each pair folded to eight, b[k * rows + r]; rows * keys <= 16.  Meanwhile the
 * keys `next` come nearer. */
PE_INLINE void dots(const float *const query[], int rows, const float *const key[], int keys,
                    const float *next, int64_t ld, int64_t n, __m256 b[])
{
    const int64_t whole = n - n % 16;
    for (int pass = 0; pass < PASSES; pass++) {
        floats sum[16], q[QUERIES], x[8];
        for (int i = 0; i < rows * keys; i++)
            sum[i] = floats_all(0.0f);
        int64_t i = pass * LANES;
        for (; i < whole; i += 16) {
            for (int k = 0; k < AHEAD && pass == 0; k++)
                _mm_prefetch((const char *)(next + k * ld + i), _MM_HINT_T1);
            for (int r = 0; r < rows; r++) {
                q[r] = floats_load(query[r] + i);
                IN_REGISTER(q[r]);
            }
            for (int k = 0; k < keys; k++)
                x[k] = floats_load(key[k] + i);
            add_pairs(q, rows, x, keys, sum);
        }
        if (whole < n) { /* lanes past n add +0 to sums that are never -0 */
            for (int r = 0; r < rows; r++)
                q[r] = floats_load_part(query[r] + i, n - i);
            for (int k = 0; k < keys; k++)
                x[k] = floats_load_part(key[k] + i, n - i);
            add_pairs(q, rows, x, keys, sum);
        }
        for (int j = 0; j < rows * keys; j++)
            floats_fold(sum[j], pass, &b[j]);
    }
}

/* QUERIES queries by the first `count` keys, at most KEYS; score[k * ld + r]. */
PE_INLINE void score_tile(const float *const query[], const float *const key[], int64_t count,
                          const float *next, int64_t ld_next, int64_t n, __m256 scale,
                          float *score, int64_t ld)
{
    __m256 b[QUERIES * KEYS];
    dots(query, QUERIES, key, KEYS, next, ld_next, n, b);
    for (int k = 0; k < KEYS; k += 2) {
        __m256 scaled = _mm256_mul_ps(trees(b + k * QUERIES), scale);
        if (k < count)
            _mm_storeu_ps(score + k * ld, _mm256_castps256_ps128(scaled));
        if (k + 1 < count)
            _mm_storeu_ps(score + (k + 1) * ld, _mm256_extractf128_ps(scaled, 1));
    }
}

/* One query by the first `count` of SPAN keys. */
PE_INLINE void score_row(const float *const *query, const float *const key[], int64_t count,
                         int64_t n, __m256 scale, float *score, int64_t ld)
{
    __m256 b[SPAN];
    float row[SPAN];
    dots(query, 1, key, SPAN, key[0], 0, n, b);
    _mm256_storeu_ps(row, _mm256_mul_ps(trees(b), scale));
    for (int k = 0; k < count; k++)
        score[k * ld] = row[k];
}

static void attention_scores(const float *const *query, int64_t rows, const float *key, int64_t ld,
                             int64_t keys, int64_t n, float scale, float *score, int64_t ld_score)
{
    const __m256 scales = _mm256_set1_ps(scale);
    for (int64_t p = 0; p < keys; p += SPAN, score += SPAN * ld_score) {
        const int64_t count = pe_min(SPAN, keys - p);
        const float *at[SPAN]; /* past the end, the last key again */
        const float *next = key + (p + SPAN) * ld;
        int64_t r = 0;
        for (int k = 0; k < SPAN; k++)
            at[k] = key + pe_min(p + k, keys - 1) * ld;
        for (; r + QUERIES <= rows; r += QUERIES)
            for (int64_t k = 0; k < count; k += KEYS, next += AHEAD * ld)
                score_tile(query + r, at + k, count - k, next, ld, n, scales,
                           score + k * ld_score + r, ld_score);
        for (; r < rows; r++)
            score_row(query + r, at, count, n, scales, score + r, ld_score);
    }
}

/* Eight rows at a time. */
static int attention_greatest(const float *score, int64_t ld, int64_t rows, int64_t keys,
                              float *greatest)
{
    const __m256i exponent = _mm256_set1_epi32(PE_INFINITY_BITS);
    __m256i bad = _mm256_setzero_si256();
    for (int64_t r = 0; r < rows; r += 8) {
        __m256 m = load8_part(greatest + r, rows - r);
        for (int64_t p = 0; p < keys; p++) {
            const __m256 x = load8_part(score + p * ld + r, rows - r);
            const __m256i bits = _mm256_and_si256(_mm256_castps_si256(x), exponent);
            bad = _mm256_or_si256(bad, _mm256_cmpeq_epi32(bits, exponent));
            m = _mm256_max_ps(m, x);
        }
        store8_part(greatest + r, m, rows - r);
    }
    return _mm256_testz_si256(bad, bad);
}

/* One key: its e is stored, and added to sum. */
PE_INLINE void weigh_key(float *score, __m256 greatest, int64_t rows, double *sum)
{
    const __m256 e = exp8(_mm256_sub_ps(load8_part(score, rows), greatest));
    const __m256 own = _mm256_and_ps(e, _mm256_castsi256_ps(lanes_below(rows)));
    store8_part(score, e, rows);
    f64x8_store(sum, f64x8_add(f64x8_load(sum), f64x8_widen(own)));
}

static void attention_weigh(float *score, int64_t ld, int64_t rows, int64_t keys,
                            const float *greatest, int64_t first, double *sum, int64_t ld_sum)
{
    for (int64_t r = 0; r < rows; r += 8) {
        const __m256 m = load8_part(greatest + r, rows - r);
        for (int64_t p = 0; p < keys; p++)
            weigh_key(score + p * ld + r, m, rows - r, sum + (first + p) % 8 * ld_sum + r);
    }
}

#define HALVES_AHEAD 8192 /* 16 KB: the rows of a head follow one another */

static void load_f16(const uint16_t *half, int64_t n, float *x)
{
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        if (i % 32 == 0)
            _mm_prefetch((const char *)(half + i + HALVES_AHEAD), _MM_HINT_T1);
        floats_store(x + i, floats_of_halves(half + i));
    }
    for (; i < n; i++)
        x[i] = pe_f16_to_float(half[i]);
}

typedef struct {
    const float *e, *value;
    int64_t ld_e, ld, keys;
} mix_args;

/* Some vectors of columns from j on, of which the last may be partial, for some rows of out. */
PE_INLINE void mix_tile(const mix_args *m, float *const out[], int64_t row, int rows, int64_t j,
                        int vectors, int64_t last, int64_t ahead)
{
    floats sum[QUERIES][MIX_VECTORS];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            sum[r][v] = floats_load_part(out[row + r] + j + LANES * v,
                                         v < vectors - 1 ? LANES : last);
    const float *e = m->e + row, *value = m->value + j;
    for (int64_t p = 0; p < m->keys; p++, e += m->ld_e, value += m->ld) {
        if (ahead)
            for (int v = 0; v < vectors; v++)
                _mm_prefetch((const char *)(value + ahead + LANES * v), _MM_HINT_T1);
        floats weight[QUERIES];
        for (int r = 0; r < rows; r++)
            weight[r] = floats_all(e[r]);
        for (int v = 0; v < vectors; v++) {
            const floats x = floats_load_part(value + LANES * v, v < vectors - 1 ? LANES : last);
            floats product[QUERIES];
            for (int r = 0; r < rows; r++)
                product[r] = floats_mul(weight[r], x);
            for (int r = 0; r < rows; r++)
                sum[r][v] = floats_add(sum[r][v], product[r]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++)
            floats_store_part(out[row + r] + j + LANES * v, sum[r][v],
                              v < vectors - 1 ? LANES : last);
}

PE_INLINE void mix_columns(const mix_args *m, float *const out[], int64_t rows, int64_t j,
                           int vectors, int64_t last)
{
    int64_t r = 0;
    for (; r + QUERIES <= rows; r += QUERIES)
        mix_tile(m, out, r, QUERIES, j, vectors, last, r ? 0 : MIX_SPAN * m->ld);
    for (; r < rows; r++)
        mix_tile(m, out, r, 1, j, vectors, last, 0);
}

static void attention_mix(const float *e, int64_t ld_e, int64_t rows, const float *value,
                          int64_t ld, int64_t keys, int64_t n, float *const *out)
{
    for (int64_t p = 0; p < keys; p += MIX_SPAN) {
        const int64_t count = pe_min(MIX_SPAN, keys - p);
        const mix_args m = {e + p * ld_e, value + p * ld, ld_e, ld, count};
        int64_t j = 0;
        for (; j + MIX_VECTORS * LANES <= n; j += MIX_VECTORS * LANES)
            mix_columns(&m, out, rows, j, MIX_VECTORS, LANES);
        for (; j + LANES <= n; j += LANES)
            mix_columns(&m, out, rows, j, 1, LANES);
        if (j < n)
            mix_columns(&m, out, rows, j, 1, n - j);
    }
}

PE_INLINE void fill_attention(pe_kernels *k)
{
    k->load_f16 = load_f16;
    k->attention_scores = attention_scores;
    k->attention_greatest = attention_greatest;
    k->attention_weigh = attention_weigh;
    k->attention_mix = attention_mix;
}
