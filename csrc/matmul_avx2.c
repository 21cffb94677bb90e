/* matmul_avx2.c - the matmuls of matmul.c with AVX2 (and F16C, FMA).
 *
 * Group types (Q8_0, INT8, INT4) come in two shapes, chosen by the number of tokens:
 *
 * Few tokens: bound by reading the weights.  One row at a time is streamed in storage order, since
 * memory serves one stream best, with software prefetch past the ends of rows.  Codes are widened
 * to int16 and multiplied with vpmaddwd, which leaves each sum spread over 8 lanes; four sums (four
 * groups, or the four blocks of a Q8_0 group) are folded together, which costs little more than one.
 *
 * Many tokens: bound by arithmetic.  A tile is TILE rows by one group.  Its codes are repacked once
 * into int16 pairs, rows in lanes: lane r of pairs[i] holds columns 2i and 2i+1 of row r.  Then a
 * token's pair (2i, 2i+1) broadcast to all lanes meets all rows in one vpmaddwd, and the sums come
 * out one per lane: no folding.  BLOCK tokens share each load of weights; their accumulators fill
 * most of the registers.  y is summed over groups in a small buffer.
 *
 * Dense types: the eight accumulators of sum8 are the lanes of two vectors of doubles.  A product is
 * exact in float64, so that FMA rounds as multiply and add do.  The additions of one sum form one
 * chain, whose latency is hidden by working on several rows (and tokens) at once.
 */
#include "kernels.h"

#include <immintrin.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* Before a loop of constant length at most 8 over an array of vectors, so that they get registers. */
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif
/* sum += v.  Written out, since gcc copies the sums of a loop from register to register otherwise,
 * and moves the additions about until it runs out of registers. */
#define ADD(sum, v) __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(v))

#define TILE 16     /* rows: two vectors */
#define PAIRS (PE_GROUP / 2)
#define BLOCK 4     /* tokens that share the loads of weights */
#define CHUNK 128   /* tokens whose y share a buffer */
#define FEW_TOKENS 3
#define ROWS 4          /* that few tokens take at a time */
#define SCALES_AHEAD 32 /* rows whose scales share a cache line */
#define FEW_GROUPS 64 /* above it, few tokens are treated as many */
#define BLOCKS (PE_GROUP / PE_BLOCK)
#define Q8_BYTES (2 + PE_BLOCK)

/* Bytes of n columns in one row. */
ALWAYS_INLINE int64_t bytes_of(int type, int64_t n)
{
    switch (type) {
    case PE_Q8_0:
        return n / PE_BLOCK * Q8_BYTES;
    case PE_INT8:
        return n;
    case PE_INT4:
    case PE_F16:
    case PE_BF16:
        return type == PE_INT4 ? n / 2 : n * 2;
    default:
        return n * 4;
    }
}

/* Into the nearest cache, or the second one. */
ALWAYS_INLINE void prefetch1(const uint8_t *p, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)p + i, _MM_HINT_T0);
}

ALWAYS_INLINE void prefetch2(const uint8_t *p, int64_t bytes)
{
    for (int64_t i = 0; i < bytes; i += 64)
        _mm_prefetch((const char *)p + i, _MM_HINT_T1);
}

/* ---- few tokens ------------------------------------------------------------------------------ */

ALWAYS_INLINE __m256i widen8(const void *codes)
{
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(codes));
}

/* q * code of 16 columns, in 8 sums. */
ALWAYS_INLINE __m256i dot16(__m256i codes, const int16_t *q)
{
    return _mm256_madd_epi16(codes, _mm256_loadu_si256((const void *)q));
}

/* The same over 32 columns, one block of Q8_0. */
ALWAYS_INLINE __m256i dot32(const uint8_t *codes, const int16_t *q)
{
    return _mm256_add_epi32(dot16(widen8(codes), q), dot16(widen8(codes + 16), q + 16));
}

/* 16 bytes of nibbles, q as split_token leaves it.  Nibble = code + 8: see split_token. */
ALWAYS_INLINE __m256i dot32_nibbles(const uint8_t *codes, const int16_t *q)
{
    __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const void *)codes));
    __m256i even = _mm256_and_si256(pairs, _mm256_set1_epi16(15));
    return _mm256_add_epi32(dot16(even, q), dot16(_mm256_srli_epi16(pairs, 4), q + 16));
}

/* q * code over a whole group (INT4: q * nibble); two chains. */
ALWAYS_INLINE __m256i dot_group(int type, const uint8_t *codes, const int16_t *q)
{
    __m256i d[4];
    for (int i = 0; i < 4; i++)
        d[i] = type == PE_INT4 ? dot32_nibbles(codes + 16 * i, q + 32 * i)
                               : dot32(codes + 32 * i, q + 32 * i);
    return _mm256_add_epi32(_mm256_add_epi32(d[0], d[1]), _mm256_add_epi32(d[2], d[3]));
}

/* Each 128-bit lane of the result is (a, b, c, d), and its lanes are still to be summed. */
ALWAYS_INLINE __m256i fold4(__m256i a, __m256i b, __m256i c, __m256i d)
{
    __m256i ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    __m256i cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    return _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
}

ALWAYS_INLINE __m128i fold_lanes(__m256i v)
{
    return _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

/* For nibbles: each 32 columns of q as the 16 even ones, then the 16 odd ones, as they meet the lower
 * and the upper nibbles; and what the sum over each group of q * nibble exceeds that of q * code by,
 * 8 times the sum of q. */
ALWAYS_INLINE void split_token(const int16_t *q, int64_t groups, int16_t *split, int32_t *excess)
{
    for (int64_t g = 0; g < groups; g++) {
        int32_t sum = 0;
        for (int64_t c = g * PE_GROUP; c < (g + 1) * PE_GROUP; c += 32)
            for (int64_t i = 0; i < 16; i++) {
                sum += q[c + 2 * i] + q[c + 2 * i + 1];
                split[c + i] = q[c + 2 * i];
                split[c + 16 + i] = q[c + 2 * i + 1];
            }
        excess[g] = 8 * sum;
    }
}

/* What few_rows works on: ROWS rows of the matrix, and one token. */
typedef struct {
    const uint8_t *row[ROWS];
    const uint16_t *scales; /* INT8, INT4: of the first row and group; the next group's scale_ld on */
    int64_t scale_ld;
    int64_t n;              /* rows that exist; the others repeat the last one */
    const int16_t *q;       /* as split_token leaves it, if INT4 */
    const int32_t *excess;  /* INT4: of split_token */
    const float *s_x;
} few;

ALWAYS_INLINE __m128 load_scales(const uint16_t *halves, int64_t n)
{
    uint64_t four = 0; /* the array may end here */
    if (n == ROWS)
        memcpy(&four, halves, sizeof four);
    else
        memcpy(&four, halves, (size_t)n * sizeof halves[0]);
    return _mm_cvtph_ps(_mm_cvtsi64_si128((long long)four));
}

ALWAYS_INLINE __m128 block_scales(const few *f, int64_t at)
{
    __m128i h = _mm_cvtsi32_si128(pe_load_u16(f->row[0] + at));
    h = _mm_insert_epi16(h, pe_load_u16(f->row[1] + at), 1);
    h = _mm_insert_epi16(h, pe_load_u16(f->row[2] + at), 2);
    return _mm_cvtph_ps(_mm_insert_epi16(h, pe_load_u16(f->row[3] + at), 3));
}

/* Group g of INT8 or INT4, whose codes are at byte `at` of the rows: its part of the four y. */
ALWAYS_INLINE __m128 group_part(int type, const few *f, int64_t g, int64_t at)
{
    const int16_t *q = f->q + g * PE_GROUP;
    __m256i v[ROWS];
    UNROLL
    for (int i = 0; i < ROWS; i++)
        v[i] = dot_group(type, f->row[i] + at, q);
    __m128i d = fold_lanes(fold4(v[0], v[1], v[2], v[3]));
    if (type == PE_INT4)
        d = _mm_sub_epi32(d, _mm_set1_epi32(f->excess[g]));
    __m128 s = load_scales(f->scales + g * f->scale_ld, f->n);
    return _mm_mul_ps(_mm_cvtepi32_ps(d), _mm_mul_ps(s, _mm_set1_ps(f->s_x[g])));
}

/* Group g of Q8_0. */
ALWAYS_INLINE __m128 blocks_part(const few *f, int64_t g, int64_t at)
{
    __m128 p[BLOCKS];
    UNROLL
    for (int b = 0; b < BLOCKS; b++) {
        const int16_t *q = f->q + g * PE_GROUP + b * PE_BLOCK;
        int64_t block = at + b * Q8_BYTES;
        __m256i v[ROWS];
    UNROLL
        for (int i = 0; i < ROWS; i++)
            v[i] = dot32(f->row[i] + block + 2, q);
        __m128i d = fold_lanes(fold4(v[0], v[1], v[2], v[3]));
        p[b] = _mm_mul_ps(_mm_cvtepi32_ps(d), block_scales(f, block));
    }
    __m128 sum = _mm_add_ps(_mm_add_ps(p[0], p[1]), _mm_add_ps(p[2], p[3]));
    return _mm_mul_ps(sum, _mm_set1_ps(f->s_x[g]));
}

ALWAYS_INLINE __m128 few_part(int type, const few *f, int64_t g, int64_t at)
{
    return type == PE_Q8_0 ? blocks_part(f, g, at) : group_part(type, f, g, at);
}

/* y of rows [r, r + n) of w, at most ROWS; q and excess as the type wants them. */
ALWAYS_INLINE void few_rows(int type, const pe_matrix *w, int64_t r, int64_t n,
                            const pe_activations *a, const int16_t *q, const int32_t *excess,
                            float *y, int64_t ldy)
{
    const int64_t groups = pe_groups(w->cols), full = w->cols / PE_GROUP;
    const int64_t row_bytes = bytes_of(type, w->cols), bytes = bytes_of(type, PE_GROUP);
    const uint8_t *row = (const uint8_t *)w->data + r * row_bytes, *next = row + ROWS * row_bytes;
    uint8_t last[ROWS][BLOCKS * Q8_BYTES]; /* a short last group, filled up with zeros */
    few f = {.scales = w->scales ? w->scales + r : NULL, .scale_ld = w->scale_ld, .n = n};
    if (full < groups)
        for (int i = 0; i < ROWS; i++) {
            memset(last[i], 0, sizeof last[i]);
            memcpy(last[i], row + pe_min(i, n - 1) * row_bytes + full * bytes,
                   (size_t)(row_bytes - full * bytes));
        }
    for (int64_t t = 0; t < a->tokens; t++) {
        f.q = q + t * groups * PE_GROUP;
        f.excess = excess + t * groups;
        f.s_x = a->scales + t * groups;
        for (int i = 0; i < ROWS; i++)
            f.row[i] = row + pe_min(i, n - 1) * row_bytes;
        __m128 sum = _mm_setzero_ps();
        for (int64_t g = 0; g < full; g++) {
            if (t == 0 && type == PE_INT8) /* by measurement */
                prefetch2(next + g * ROWS * bytes, ROWS * bytes);
            else if (t == 0)
                prefetch1(next + g * ROWS * bytes, ROWS * bytes);
            sum = _mm_add_ps(sum, few_part(type, &f, g, g * bytes));
        }
        if (full < groups) {
            for (int i = 0; i < ROWS; i++)
                f.row[i] = last[i];
            sum = _mm_add_ps(sum, few_part(type, &f, full, 0));
        }
        memcpy(y + t * ldy + r, &sum, (size_t)n * sizeof(float));
    }
}

ALWAYS_INLINE void matmul_few(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                              const pe_activations *a, float *y, int64_t ldy)
{
    const int64_t groups = pe_groups(w->cols), ld = groups * PE_GROUP;
    _Alignas(64) int16_t q[FEW_TOKENS * FEW_GROUPS * PE_GROUP]; /* vectors within cache lines */
    int32_t excess[FEW_TOKENS * FEW_GROUPS];
    if (type == PE_INT4)
        for (int64_t t = 0; t < a->tokens; t++)
            split_token(a->q + t * ld, groups, q + t * ld, excess + t * groups);
    else
        memcpy(q, a->q, (size_t)(a->tokens * ld) * sizeof q[0]);
    for (int64_t r = row0; r < row1; r += ROWS) {
        if (type != PE_Q8_0 && r % SCALES_AHEAD == 0)
            for (int64_t g = 0; g < groups; g++)
                prefetch1((const uint8_t *)(w->scales + g * w->scale_ld + r + SCALES_AHEAD), 1);
        few_rows(type, w, r, pe_min(ROWS, row1 - r), a, q, excess, y, ldy);
    }
}

/* ---- many tokens ----------------------------------------------------------------------------- */

typedef struct {
    __m256i pairs[PAIRS][2];  /* [.][h] lane r: two columns of row 8 h + r */
    __m256 scale[BLOCKS][2];  /* INT8, INT4: only [0] */
} tile;

/* 16 bytes of each of 8 rows: o[j] holds bytes 4j .. 4j+3 of all, rows in lanes. */
ALWAYS_INLINE void gather16(const uint8_t *const *row, int64_t at, __m256i o[4])
{
    __m256i v[4];
    for (int i = 0; i < 4; i++)
        v[i] = _mm256_set_m128i(_mm_loadu_si128((const void *)(row[4 + i] + at)),
                                _mm_loadu_si128((const void *)(row[i] + at)));
    __m256i lo01 = _mm256_unpacklo_epi32(v[0], v[1]), hi01 = _mm256_unpackhi_epi32(v[0], v[1]);
    __m256i lo23 = _mm256_unpacklo_epi32(v[2], v[3]), hi23 = _mm256_unpackhi_epi32(v[2], v[3]);
    o[0] = _mm256_unpacklo_epi64(lo01, lo23);
    o[1] = _mm256_unpackhi_epi64(lo01, lo23);
    o[2] = _mm256_unpacklo_epi64(hi01, hi23);
    o[3] = _mm256_unpackhi_epi64(hi01, hi23);
}

/* 16 columns of int8, the bytes from at on, to 8 pairs. */
ALWAYS_INLINE void pack8(const uint8_t *const *row, int64_t at, __m256i (*pairs)[2], int h)
{
    const __m256i swap = _mm256_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15,
                                          0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    __m256i o[4];
    gather16(row, at, o);
    for (int j = 0; j < 4; j++) {
        __m256i x = _mm256_shuffle_epi8(o[j], swap); /* 16-bit halves: (c0, c2), (c1, c3) */
        pairs[2 * j][h] = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
        pairs[2 * j + 1][h] = _mm256_srai_epi16(x, 8);
    }
}

/* Lane bits 0..3 of a and 16..19 of b, each less 8. */
ALWAYS_INLINE __m256i two_nibbles(__m256i a, __m256i b)
{
    const __m256i low = _mm256_set1_epi32(0x0000000f), high = _mm256_set1_epi32(0x000f0000);
    __m256i x = _mm256_or_si256(_mm256_and_si256(a, low), _mm256_and_si256(b, high));
    return _mm256_sub_epi16(x, _mm256_set1_epi16(8));
}

/* 32 columns of nibbles to 16 pairs. */
ALWAYS_INLINE void pack4(const uint8_t *const *row, int64_t at, __m256i (*pairs)[2], int h)
{
    __m256i o[4];
    gather16(row, at, o);
    for (int j = 0; j < 4; j++) {
        __m256i x = o[j];
        pairs[4 * j][h] = two_nibbles(x, _mm256_slli_epi32(x, 12));
        pairs[4 * j + 1][h] = two_nibbles(_mm256_srli_epi32(x, 8), _mm256_slli_epi32(x, 4));
        pairs[4 * j + 2][h] = two_nibbles(_mm256_srli_epi32(x, 16), _mm256_srli_epi32(x, 4));
        pairs[4 * j + 3][h] = two_nibbles(_mm256_srli_epi32(x, 24), _mm256_srli_epi32(x, 12));
    }
}

/* row[i] is where row i's full group starts. */
ALWAYS_INLINE void pack_tile(int type, const uint8_t *const *row, tile *w)
{
    for (int h = 0; h < 2; h++) {
        const uint8_t *const *half = row + 8 * h;
        if (type == PE_Q8_0)
            for (int c = 0; c < PE_GROUP; c += 16)
                pack8(half, c / PE_BLOCK * Q8_BYTES + 2 + c % PE_BLOCK, w->pairs + c / 2, h);
        else if (type == PE_INT8)
            for (int c = 0; c < PE_GROUP; c += 16)
                pack8(half, c, w->pairs + c / 2, h);
        else
            for (int c = 0; c < PE_GROUP; c += 32)
                pack4(half, c / 2, w->pairs + c / 2, h);
    }
}

/* The scales of rows [0, n) of a tile's group: halves is its line of w->scales, or else (Q8_0) they
 * stand in the blocks that row points at. */
ALWAYS_INLINE void pack_scales(int type, const uint8_t *const *row, const uint16_t *halves,
                               int64_t n, tile *w)
{
    if (type == PE_Q8_0) {
        uint16_t s[BLOCKS][TILE];
        for (int i = 0; i < TILE; i++)
            for (int b = 0; b < BLOCKS; b++)
                s[b][i] = pe_load_u16(row[i] + b * Q8_BYTES);
        for (int b = 0; b < BLOCKS; b++)
            for (int h = 0; h < 2; h++)
                w->scale[b][h] = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(s[b] + 8 * h)));
    } else {
        uint16_t s[TILE] = {0};
        memcpy(s, halves, (size_t)n * sizeof s[0]);
        for (int h = 0; h < 2; h++)
            w->scale[0][h] = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(s + 8 * h)));
    }
}

/* One tile times n <= BLOCK tokens (a constant): y[t] += their parts of this group. */
ALWAYS_INLINE void tile_times_tokens(int type, const tile *w, const int16_t *q, int64_t ld,
                                     const float *s_x, int64_t groups, float (*y)[TILE], int n)
{
    const int blocks = type == PE_Q8_0 ? BLOCKS : 1, steps = PAIRS / blocks;
    __m256 part[BLOCKS][BLOCK][2];
    for (int b = 0; b < blocks; b++) {
        __m256i lo[BLOCK], hi[BLOCK];
    UNROLL
        for (int t = 0; t < n; t++)
            lo[t] = hi[t] = _mm256_setzero_si256();
        const int16_t *x = q + b * steps * 2;
        for (int i = b * steps; i < (b + 1) * steps; i++, x += 2) {
            __m256i w0 = w->pairs[i][0], w1 = w->pairs[i][1];
    UNROLL
            for (int t = 0; t < n; t++) {
                int32_t pair;
                memcpy(&pair, x + t * ld, sizeof pair);
                __m256i v = _mm256_set1_epi32(pair);
                ADD(lo[t], _mm256_madd_epi16(w0, v));
                ADD(hi[t], _mm256_madd_epi16(w1, v));
            }
        }
    UNROLL
        for (int t = 0; t < n; t++) {
            if (type == PE_Q8_0) {
                part[b][t][0] = _mm256_mul_ps(_mm256_cvtepi32_ps(lo[t]), w->scale[b][0]);
                part[b][t][1] = _mm256_mul_ps(_mm256_cvtepi32_ps(hi[t]), w->scale[b][1]);
            } else {
                __m256 s = _mm256_set1_ps(s_x[t * groups]);
                __m256 p0 = _mm256_mul_ps(_mm256_cvtepi32_ps(lo[t]),
                                          _mm256_mul_ps(w->scale[0][0], s));
                __m256 p1 = _mm256_mul_ps(_mm256_cvtepi32_ps(hi[t]),
                                          _mm256_mul_ps(w->scale[0][1], s));
                _mm256_storeu_ps(y[t], _mm256_add_ps(_mm256_loadu_ps(y[t]), p0));
                _mm256_storeu_ps(y[t] + 8, _mm256_add_ps(_mm256_loadu_ps(y[t] + 8), p1));
            }
        }
    }
    if (type == PE_Q8_0)
        for (int t = 0; t < n; t++)
            for (int h = 0; h < 2; h++) {
                __m256 p = _mm256_add_ps(_mm256_add_ps(part[0][t][h], part[1][t][h]),
                                         _mm256_add_ps(part[2][t][h], part[3][t][h]));
                p = _mm256_mul_ps(p, _mm256_set1_ps(s_x[t * groups]));
                _mm256_storeu_ps(y[t] + 8 * h, _mm256_add_ps(_mm256_loadu_ps(y[t] + 8 * h), p));
            }
}

/* One tile times n tokens, in blocks of about equal size. */
ALWAYS_INLINE void tile_times_chunk(int type, const tile *w, const int16_t *q, int64_t ld,
                                    const float *s_x, int64_t groups, float (*y)[TILE], int64_t n)
{
    for (int64_t left = n, size; left; left -= size) {
        int64_t blocks = (left + BLOCK - 1) / BLOCK;
        size = (left + blocks - 1) / blocks;
        switch (size) {
#define CASE(k)                                                                                    \
    case k:                                                                                        \
        tile_times_tokens(type, w, q, ld, s_x, groups, y, k);                                      \
        break;
            CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
        }
        q += size * ld;
        s_x += size * groups;
        y += size;
    }
}

/* Rows [r, r + rows) of w, at most TILE, times tokens [t0, t0 + n), at most CHUNK.  next: the tile to
 * be used next, if it is not in a cache. */
ALWAYS_INLINE void matmul_tile(int type, const pe_matrix *w, int64_t r, int64_t rows,
                               const pe_activations *a, int64_t t0, int64_t n, float *y,
                               int64_t ldy, const uint8_t *next)
{
    const int64_t groups = pe_groups(w->cols), ld = groups * PE_GROUP;
    const int64_t group_bytes = bytes_of(type, PE_GROUP), row_bytes = bytes_of(type, w->cols);
    const int16_t *q = a->q + t0 * ld;
    const float *s_x = a->scales + t0 * groups;
    tile packed;
    float sum[CHUNK][TILE];
    memset(sum, 0, (size_t)n * sizeof sum[0]);

    const uint8_t *row[TILE]; /* rows past the last repeat it: what they give is not stored */
    for (int i = 0; i < TILE; i++)
        row[i] = (const uint8_t *)w->data + (r + pe_min(i, rows - 1)) * row_bytes;
    for (int64_t g = 0; g < groups; g++) {
        uint8_t last[TILE][BLOCKS * Q8_BYTES]; /* a short last group, filled up with zeros */
        if (w->cols < (g + 1) * PE_GROUP)
            for (int i = 0; i < TILE; i++) {
                memset(last[i], 0, sizeof last[i]);
                memcpy(last[i], row[i], (size_t)(row_bytes - g * group_bytes));
                row[i] = last[i];
            }
        if (next) /* while this tile is used, the next one is fetched, in storage order */
            prefetch2(next + g * TILE * group_bytes, TILE * group_bytes);
        pack_scales(type, row, w->scales ? w->scales + g * w->scale_ld + r : NULL, rows, &packed);
        pack_tile(type, row, &packed);
        tile_times_chunk(type, &packed, q + g * PE_GROUP, ld, s_x + g, groups, sum, n);
        for (int i = 0; i < TILE; i++)
            row[i] += group_bytes;
    }
    for (int64_t t = 0; t < n; t++)
        memcpy(y + (t0 + t) * ldy + r, sum[t], (size_t)rows * sizeof(float));
}

ALWAYS_INLINE void matmul_group_type(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                                     const pe_activations *a, float *y, int64_t ldy)
{
    if (a->tokens <= FEW_TOKENS && w->cols <= FEW_GROUPS * PE_GROUP) {
        matmul_few(type, w, row0, row1, a, y, ldy);
        return;
    }
    const int64_t row_bytes = bytes_of(type, w->cols);
    for (int64_t t = 0; t < a->tokens; t += CHUNK)
        for (int64_t r = row0; r < row1; r += TILE) {
            const uint8_t *next = t == 0 && r + TILE < row1
                                      ? (const uint8_t *)w->data + (r + TILE) * row_bytes
                                      : NULL;
            matmul_tile(type, w, r, pe_min(TILE, row1 - r), a, t, pe_min(CHUNK, a->tokens - t), y,
                        ldy, next);
        }
}

static void matmul_q8_0(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    matmul_group_type(PE_Q8_0, w, row0, row1, a, y, ldy);
}

static void matmul_int8(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    matmul_group_type(PE_INT8, w, row0, row1, a, y, ldy);
}

static void matmul_int4(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    matmul_group_type(PE_INT4, w, row0, row1, a, y, ldy);
}

/* ---- dense ----------------------------------------------------------------------------------- */

/* Four values from p on, as doubles. */
ALWAYS_INLINE __m256d load_doubles(int type, const void *p)
{
    if (type == PE_F32)
        return _mm256_cvtps_pd(_mm_loadu_ps(p));
    __m128i h = _mm_loadl_epi64(p);
    if (type == PE_F16)
        return _mm256_cvtps_pd(_mm_cvtph_ps(h));
    return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(h), 16)));
}

ALWAYS_INLINE float tree8(__m256d lo, __m256d hi)
{
    __m256d b = _mm256_add_pd(lo, hi);
    __m128d c = _mm_add_pd(_mm256_castpd256_pd128(b), _mm256_extractf128_pd(b, 1));
    return (float)(_mm_cvtsd_f64(c) + _mm_cvtsd_f64(_mm_unpackhi_pd(c, c)));
}

#define DENSE_ROWS 4 /* for a single token, else DENSE_ROWS / 2 by DENSE_TOKENS */
#define DENSE_TOKENS 2

typedef struct {
    __m256d half[2];
} sum8;

/* Columns [c, c + 8) of row[r] and x[t]. */
ALWAYS_INLINE void dense_step(int type, const uint8_t *const *row, const float *const *x, int64_t c,
                              int rows, int tokens, sum8 sum[DENSE_TOKENS][DENSE_ROWS])
{
    UNROLL
    for (int h = 0; h < 2; h++) {
        __m256d u[DENSE_TOKENS];
    UNROLL
        for (int t = 0; t < tokens; t++)
            u[t] = load_doubles(PE_F32, x[t] + c + 4 * h);
    UNROLL
        for (int r = 0; r < rows; r++) {
            __m256d v = load_doubles(type, row[r] + bytes_of(type, c + 4 * h));
    UNROLL
            for (int t = 0; t < tokens; t++)
                sum[t][r].half[h] = _mm256_fmadd_pd(u[t], v, sum[t][r].half[h]);
        }
    }
}

/* While columns [c, c + 8) of some rows are used, the same share of the next rows is fetched, but in
 * storage order: memory sees one stream. */
ALWAYS_INLINE void prefetch_next_rows(int type, const uint8_t *next, int64_t c, int rows)
{
    for (int64_t i = bytes_of(type, c) * rows; i < bytes_of(type, c + 8) * rows; i += 64)
        _mm_prefetch((const char *)next + i, _MM_HINT_T0);
}

/* rows <= DENSE_ROWS rows times tokens <= DENSE_TOKENS tokens, both constants. */
ALWAYS_INLINE void dense_block(int type, const uint8_t *data, int64_t cols, const float *x,
                               float *y, int64_t ldy, int rows, int tokens)
{
    const int64_t row_bytes = bytes_of(type, cols), end = cols / 8 * 8;
    const uint8_t *row[DENSE_ROWS];
    const float *token[DENSE_TOKENS];
    sum8 sum[DENSE_TOKENS][DENSE_ROWS];
    UNROLL
    for (int t = 0; t < tokens; t++) {
        token[t] = x + t * cols;
    UNROLL
        for (int r = 0; r < rows; r++)
            sum[t][r].half[0] = sum[t][r].half[1] = _mm256_setzero_pd();
    }
    UNROLL
    for (int r = 0; r < rows; r++)
        row[r] = data + r * row_bytes;
    for (int64_t c = 0; c < end; c += 8) {
        if (tokens == 1)
            prefetch_next_rows(type, data + rows * row_bytes, c, rows);
        dense_step(type, row, token, c, rows, tokens, sum);
    }
    if (end < cols) { /* the last columns, filled up with zeros */
        uint8_t last_w[DENSE_ROWS][32] = {0};
        float last_x[DENSE_TOKENS][8] = {0};
        for (int t = 0; t < tokens; t++) {
            memcpy(last_x[t], token[t] + end, (size_t)(cols - end) * sizeof(float));
            token[t] = last_x[t];
        }
        for (int r = 0; r < rows; r++) {
            memcpy(last_w[r], row[r] + bytes_of(type, end), (size_t)bytes_of(type, cols - end));
            row[r] = last_w[r];
        }
        dense_step(type, row, token, 0, rows, tokens, sum);
    }
    UNROLL
    for (int t = 0; t < tokens; t++)
    UNROLL
        for (int r = 0; r < rows; r++)
            y[t * ldy + r] = tree8(sum[t][r].half[0], sum[t][r].half[1]);
}

ALWAYS_INLINE void matmul_dense(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                                const pe_activations *a, float *y, int64_t ldy)
{
    const uint8_t *data = w->data;
    const int64_t row_bytes = bytes_of(type, w->cols);
    int64_t r = row0;
    for (; r + DENSE_ROWS <= row1; r += DENSE_ROWS) {
        const uint8_t *row = data + r * row_bytes;
        int64_t t = 0;
        for (; t + DENSE_TOKENS <= a->tokens; t += DENSE_TOKENS)
            for (int i = 0; i < DENSE_ROWS; i += DENSE_ROWS / 2)
                dense_block(type, row + i * row_bytes, w->cols, a->x + t * w->cols,
                            y + t * ldy + r + i, ldy, DENSE_ROWS / 2, DENSE_TOKENS);
        for (; t < a->tokens; t++)
            dense_block(type, row, w->cols, a->x + t * w->cols, y + t * ldy + r, ldy, DENSE_ROWS,
                        1);
    }
    for (; r < row1; r++)
        for (int64_t t = 0; t < a->tokens; t++)
            dense_block(type, data + r * row_bytes, w->cols, a->x + t * w->cols, y + t * ldy + r,
                        ldy, 1, 1);
}

static void matmul_f32(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                       float *y, int64_t ldy)
{
    matmul_dense(PE_F32, w, row0, row1, a, y, ldy);
}

static void matmul_f16(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                       float *y, int64_t ldy)
{
    matmul_dense(PE_F16, w, row0, row1, a, y, ldy);
}

static void matmul_bf16(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    matmul_dense(PE_BF16, w, row0, row1, a, y, ldy);
}

void pe_fill_avx2_matmul(pe_kernels *k);
void pe_fill_avx2_matmul(pe_kernels *k)
{
    k->matmul_q8_0 = matmul_q8_0;
    k->matmul_int8 = matmul_int8;
    k->matmul_int4 = matmul_int4;
    k->matmul_f32 = matmul_f32;
    k->matmul_f16 = matmul_f16;
    k->matmul_bf16 = matmul_bf16;
}
