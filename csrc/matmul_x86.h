/* matmul_x86.h - what matmul_avx2.c and matmul_avx512vnni.c share: all but the vectors' width.
 *
 * Group types (Q8_0, INT8, INT4) come in two shapes, chosen by the number of tokens.
 *
 * Few tokens: bound by reading the weights.  ROWS rows are used at a time: each load of a token's q
 * then meets several rows, and their sums, spread over lanes, are folded together into one vector
 * of four sums, which makes the float32 steps and the additions over groups vertical.  But memory
 * serves a single stream best, and so the prefetches, issued while some rows are used, walk through
 * the next rows in storage order.
 *
 * Many tokens: bound by arithmetic.  A tile is TILE rows by one group.  Its codes are repacked once
 * into int16 pairs, rows in lanes: lane r of pairs[i] holds columns 2i and 2i+1 of row r.  Then a
 * token's pair (2i, 2i+1), broadcast to all lanes, meets all rows in one vpmaddwd or vpdpwssd, and
 * the sums come out one per lane: no folding.  BLOCK tokens share each load of weights; their
 * accumulators fill most of the registers.  y is summed over groups in a small buffer.
 *
 * Dense types: the eight accumulators of sum8 are lanes of doubles.  A product is exact in float64,
 * so that FMA rounds as multiply and add do.  The additions of one sum form a chain, whose
 * latency is hidden by working on several rows (and tokens) at once.
 *
 * The including file first defines LANES, ints and floats (vectors of LANES int32, float32), BLOCK
 * and FEW_TOKENS.  No function here is compiled on its own: type is a constant wherever they are
 * inlined, and so are the numbers of rows and tokens that are said to be.
 */
#ifndef PYENGINE_MATMUL_X86_H
#define PYENGINE_MATMUL_X86_H

#include "kernels.h"

#include <immintrin.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* Before a loop of constant length, at most 8, over an array of vectors: they get registers. */
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

#define BLOCKS (PE_GROUP / PE_BLOCK) /* Q8_0's, in a group */
#define Q8_BYTES (2 + PE_BLOCK)

#define ROWS 4          /* that few tokens use at a time */
#define FEW_GROUPS 160  /* as many groups of few tokens' q are copied to the stack: 40 KiB */
#define SCALES_AHEAD 32 /* rows whose scales fill a cache line */

#define TILE (2 * LANES) /* rows */
#define PAIRS (PE_GROUP / 2)
#define CHUNK 128 /* tokens whose y share a buffer */

typedef struct {
    ints pairs[PAIRS][2];    /* [.][h] lane r: two columns of row LANES * h + r */
    floats scale[BLOCKS][2]; /* of its rows; INT8, INT4: only [0] */
} tile;

/* ---- defined by the including file ----------------------------------------------------------- */

/* For nibbles, which are code + 8: split [groups * PE_GROUP] is q with even and odd columns apart,
 * as dots_of_group wants it; excess[g] is 8 times the sum of q over group g. */
ALWAYS_INLINE void split_token(const int16_t *q, int64_t groups, int16_t *split, int32_t *excess);

/* The sums of q * code (INT4: of q * nibble) over one group, whose codes are at byte `at` of ROWS
 * rows. */
ALWAYS_INLINE __m128i dots_of_group(int type, const uint8_t *const *row, int64_t at,
                                    const int16_t *q);

/* The same over the codes of one block of Q8_0. */
ALWAYS_INLINE __m128i dots_of_block(const uint8_t *const *row, int64_t at, const int16_t *q);

/* The scales of a tile's group.  INT8, INT4: halves, of the n rows that exist; Q8_0: they stand in
 * the blocks that row[0, TILE) points at. */
ALWAYS_INLINE void pack_scales(int type, const uint8_t *const *row, const uint16_t *halves,
                               int64_t n, tile *w);

/* 16 bytes of int8 of each row [LANES * h, + LANES), from byte `at` on, to 8 pairs; row[0] is the
 * first of these rows. */
ALWAYS_INLINE void pack8(const uint8_t *const *row, int64_t at, ints (*pairs)[2], int h);

/* 16 bytes of nibbles, to 16 pairs. */
ALWAYS_INLINE void pack4(const uint8_t *const *row, int64_t at, ints (*pairs)[2], int h);

/* One tile times n <= BLOCK tokens (a constant): y[t] += their parts of this group. */
ALWAYS_INLINE void tile_times_tokens(int type, const tile *w, const int16_t *q, int64_t ld,
                                     const float *s_x, int64_t groups, float (*y)[TILE], int n);

/* Rows [row0, row1) of a dense matrix. */
ALWAYS_INLINE void matmul_dense(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                                const pe_activations *a, float *y, int64_t ldy);

/* ---- common ---------------------------------------------------------------------------------- */

/* Bytes of n columns in one row. */
ALWAYS_INLINE int64_t bytes_of(int type, int64_t n)
{
    switch (type) {
    case PE_Q8_0:
        return n / PE_BLOCK * Q8_BYTES;
    case PE_INT8:
        return n;
    case PE_INT4:
        return n / 2;
    case PE_F32:
        return n * 4;
    default:
        return n * 2;
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

/* Whether the next rows, so many bytes, fit into the nearest cache together with those in use and
 * the activations.  By measurement. */
ALWAYS_INLINE int fits_near(int type, int64_t bytes)
{
    return bytes < (type == PE_INT8 || type == PE_INT4 ? 8192 : 12288);
}

ALWAYS_INLINE void prefetch_next(int near, const uint8_t *p, int64_t bytes)
{
    if (near)
        prefetch1(p, bytes);
    else
        prefetch2(p, bytes);
}

/* ---- few tokens ------------------------------------------------------------------------------ */

/* By measurement, and as far as the stack goes. */
ALWAYS_INLINE int is_few(int type, int64_t tokens, int64_t groups)
{
    return tokens <= (type == PE_Q8_0 ? 3 : FEW_TOKENS) && tokens * groups <= FEW_GROUPS;
}

/* What few_rows works on: ROWS rows of the matrix, and one token. */
typedef struct {
    const uint8_t *row[ROWS];
    int64_t n;              /* rows that exist; the others repeat the last one */
    const uint16_t *scales; /* INT8, INT4: the rows' in group 0; the next group's scale_ld on */
    int64_t scale_ld;
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

/* Group g's part of the four y; its codes are at byte `at` of the rows. */
ALWAYS_INLINE __m128 group_part(int type, const few *f, int64_t g, int64_t at)
{
    __m128i d = dots_of_group(type, f->row, at, f->q + g * PE_GROUP);
    if (type == PE_INT4)
        d = _mm_sub_epi32(d, _mm_set1_epi32(f->excess[g]));
    __m128 s = load_scales(f->scales + g * f->scale_ld, f->n);
    return _mm_mul_ps(_mm_cvtepi32_ps(d), _mm_mul_ps(s, _mm_set1_ps(f->s_x[g])));
}

/* The same for Q8_0. */
ALWAYS_INLINE __m128 blocks_part(const few *f, int64_t g, int64_t at)
{
    __m128 p[BLOCKS];
    UNROLL
    for (int b = 0; b < BLOCKS; b++) {
        int64_t block = at + b * Q8_BYTES;
        __m128i d = dots_of_block(f->row, block + 2, f->q + g * PE_GROUP + b * PE_BLOCK);
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
    const int64_t share = ROWS * bytes / a->tokens; /* of the next rows, fetched with each group */
    const int near = fits_near(type, ROWS * row_bytes);
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
            prefetch_next(near, next + (t * full + g) * share, share);
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
    _Alignas(64) int16_t q[FEW_GROUPS * PE_GROUP]; /* vectors within cache lines */
    int32_t excess[FEW_GROUPS];
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

/* row[i] is where row i's full group starts. */
ALWAYS_INLINE void pack_tile(int type, const uint8_t *const *row, tile *w)
{
    for (int h = 0; h < 2; h++)
        for (int c = 0; c < PE_GROUP; c += type == PE_INT4 ? 32 : 16) {
            const uint8_t *const *half = row + LANES * h;
            if (type == PE_Q8_0)
                pack8(half, c / PE_BLOCK * Q8_BYTES + 2 + c % PE_BLOCK, w->pairs + c / 2, h);
            else if (type == PE_INT8)
                pack8(half, c, w->pairs + c / 2, h);
            else
                pack4(half, c / 2, w->pairs + c / 2, h);
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
#if BLOCK == 8
            CASE(5) CASE(6) CASE(7) CASE(8)
#endif
#undef CASE
        }
        q += size * ld;
        s_x += size * groups;
        y += size;
    }
}

/* Rows [r, r + rows) of w, at most TILE, times tokens [t0, t0 + n), at most CHUNK.  next: the rows
 * of the tile to be used next, if they are worth a prefetch. */
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
    if (a->tokens == 0)
        return;
    if (is_few(type, a->tokens, pe_groups(w->cols))) {
        matmul_few(type, w, row0, row1, a, y, ldy);
        return;
    }
    const int64_t row_bytes = bytes_of(type, w->cols);
    for (int64_t r = row0; r < row1; r += TILE)
        for (int64_t t = 0; t < a->tokens; t += CHUNK) {
            const uint8_t *next = (const uint8_t *)w->data + (r + TILE) * row_bytes;
            if (t > 0 || r + TILE >= row1)
                next = NULL;
            matmul_tile(type, w, r, pe_min(TILE, row1 - r), a, t, pe_min(CHUNK, a->tokens - t), y,
                        ldy, next);
        }
}

/* ---- the table ------------------------------------------------------------------------------- */

#define KERNEL(name, function, type)                                                               \
    static void name(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,      \
                     float *y, int64_t ldy)                                                        \
    {                                                                                              \
        function(type, w, row0, row1, a, y, ldy);                                                  \
    }
KERNEL(matmul_q8_0, matmul_group_type, PE_Q8_0)
KERNEL(matmul_int8, matmul_group_type, PE_INT8)
KERNEL(matmul_int4, matmul_group_type, PE_INT4)
KERNEL(matmul_f32, matmul_dense, PE_F32)
KERNEL(matmul_f16, matmul_dense, PE_F16)
KERNEL(matmul_bf16, matmul_dense, PE_BF16)
#undef KERNEL

static void fill_matmul(pe_kernels *k)
{
    k->matmul_q8_0 = matmul_q8_0;
    k->matmul_int8 = matmul_int8;
    k->matmul_int4 = matmul_int4;
    k->matmul_f32 = matmul_f32;
    k->matmul_f16 = matmul_f16;
    k->matmul_bf16 = matmul_bf16;
}

#endif
