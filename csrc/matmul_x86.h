/* matmul_x86.h - the matmuls of both x86 levels: all but the steps that depend on the instructions.
 *
 * Group types (INT8, INT4, and the types of blocks: Q8_0, Q4_0, ...) have two shapes, chosen by the
 * number of tokens.
 *
 * Few tokens: the limit is reading the weights.  ROWS rows are used at a time: each load of a
 * token's q serves several rows, and the sums of the rows, spread over lanes, are folded together
 * into one vector of four sums, so that the float32 steps and the additions over groups are
 * vertical.  FEW_AT_ONCE tokens share the unpacked codes of a group.  Memory serves a single stream
 * best; therefore the prefetches, issued while some rows are used, read the next rows in storage
 * order.
 *
 * Many tokens: the limit is arithmetic.  A tile is TILE rows by one group.  Its codes are repacked
 * once into int16 pairs, rows in lanes: lane r of pairs[i] holds columns 2i and 2i+1 of row r.  One
 * vpmaddwd or vpdpwssd then multiplies a token's pair (2i, 2i+1), broadcast to all lanes, by all
 * rows, and the sums are one per lane: no folding.  BLOCK tokens share each load of weights; their
 * accumulators fill most of the registers.  y is summed over groups in a small buffer.
 *
 * Dense types: the eight accumulators of sum8 are lanes of doubles.  A product is exact in float64,
 * so that FMA rounds as multiply and add do.  The additions of one sum form a chain; several rows
 * (and tokens) at once hide its latency.
 *
 * The including file first defines BLOCK and FEW_AT_ONCE, then the functions of the next section.
 * No function here is compiled on its own: type is a constant wherever a function is inlined, and
 * so are row and token counts where noted.
 */
#ifndef PYENGINE_MATMUL_X86_H
#define PYENGINE_MATMUL_X86_H

#include "blocks.h"
#include "simd_x86.h"

/* Before a loop of constant length, at most 8, over vectors: the vectors get registers. */
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 8")
#endif

#define BLOCKS (PE_GROUP / PE_BLOCK) /* in a group */
#define PARTS (PE_GROUP / PE_PART)   /* in a group */
#define Q8_BYTES (2 + PE_BLOCK)      /* the longest block */

#define ROWS 4          /* that few tokens use at a time */
#define FEW_GROUPS 256  /* the most groups of few tokens' q that are copied to the stack: 64 KiB */
#define SCALES_AHEAD 32 /* rows whose scales fill a cache line */
#define SUMS 16         /* int32 beside each group of split q, for what split_token leaves there */

#define TILE (2 * LANES) /* rows */
#define PAIRS (PE_GROUP / 2)
#define CHUNK 128 /* tokens whose y share a buffer */

typedef struct {
    ints pairs[PAIRS][2];    /* [.][h] lane r: two columns of row LANES * h + r */
    floats scale[BLOCKS][2]; /* of its rows; INT8, INT4: only [0] */
    floats minimum[BLOCKS][2];
} tile;

/* ROWS rows of the matrix, and at most FEW_AT_ONCE tokens. */
typedef struct {
    const uint8_t *row[ROWS];
    int64_t n;              /* rows that exist; the others repeat the last one */
    const uint16_t *scales; /* INT8, INT4: the rows' in group 0; the next group's scale_ld on */
    int64_t scale_ld;
    int64_t groups;
    const int16_t *q;    /* [tokens, groups * PE_GROUP], as split_token leaves it */
    const int32_t *sums; /* [tokens, groups, sums_of] */
    const float *s_x;    /* [tokens, groups] */
} few;

/* ---- defined by the including file ----------------------------------------------------------- */

/* The most tokens that are few, by measurement. */
PE_INLINE int64_t few_tokens(int type);

/* Of a group, how many int32 there are beside split q. */
PE_INLINE int64_t sums_of(int type);

/* q [groups * PE_GROUP] as add_group reads it: split has as many elements, sums has sums_of for
 * each group.  parts: the sums of pe_activations, of types with a minimum. */
PE_INLINE void split_token(int type, const int16_t *q, const int32_t *parts, int64_t groups,
                           int16_t *split, int32_t *sums);

/* sum[t] += group g's part of the four y of token t; the group is at byte `at` of the rows. */
PE_INLINE void add_group(int type, const few *f, int64_t tokens, int64_t g, int64_t at,
                         __m128 *sum);

/* y of rows [row0, .) of w for one token, as far as the level has a faster way than few rows; q and
 * sums as split_token leaves them.  Returns the first row that is left, at most row1. */
PE_INLINE int64_t one_token_rows(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                                 const int16_t *q, const int32_t *sums, const float *s_x,
                                 float *y);

/* The first n of TILE halves, as floats; 0 in the other lanes. */
PE_INLINE void load_halves(const uint16_t *halves, int64_t n, floats v[2]);

/* 16 bytes of each of LANES rows, from byte `at` on: o[j] holds bytes 4j .. 4j+3 of every row, rows
 * in lanes. */
PE_INLINE void gather16(const uint8_t *const *row, int64_t at, ints o[4]);

/* 16 bytes of int8 of each row [LANES * h, + LANES), from byte `at` on, to 8 pairs; row[0] is the
 * first of these rows. */
PE_INLINE void pack8(const uint8_t *const *row, int64_t at, ints (*pairs)[2], int h);

/* *v is computed at this point of the program and is in a register. */
PE_INLINE void pin(ints *v);

/* *sum += the products of the two int16 of each lane. */
PE_INLINE void add_products(ints *sum, ints w, ints v);

/* Rows [row0, row1) of a dense matrix. */
PE_INLINE void matmul_dense(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                            const pe_activations *a, float *y, int64_t ldy);

/* ---- common ---------------------------------------------------------------------------------- */

PE_INLINE __m128i code_table(int type)
{
    return _mm_loadu_si128((const void *)(type == PE_IQ4_NL ? pe_iq4_nl_codes : pe_mxfp4_codes));
}

/* Bytes of n columns in one row. */
PE_INLINE int64_t bytes_of(int type, int64_t n)
{
    if (is_blocks(type))
        return n / PE_BLOCK * block_bytes(type);
    switch (type) {
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

/* Into the nearest cache, or the second one.  One address after the other: the step is in a register,
 * else processors that add constants when they rename registers ask for all lines at once, and the
 * loads of the rows in use wait behind them. */
PE_INLINE void prefetch1(const uint8_t *p, int64_t bytes)
{
    int64_t step = 64;
    __asm__("" : "+r"(step));
    for (int64_t i = 0; i < bytes; i += step)
        _mm_prefetch((const char *)p + i, _MM_HINT_T0);
}

PE_INLINE void prefetch2(const uint8_t *p, int64_t bytes)
{
    int64_t step = 64;
    __asm__("" : "+r"(step));
    for (int64_t i = 0; i < bytes; i += step)
        _mm_prefetch((const char *)p + i, _MM_HINT_T1);
}

/* Whether the next rows, that many bytes, fit into the nearest cache together with the rows in use
 * and the activations.  By measurement; AVX-512 reads the rows so fast that they never do. */
PE_INLINE int fits_near(int type, int64_t bytes)
{
#ifdef PE_AVX512
    (void)type;
    (void)bytes;
    return 0;
#else
    return bytes < (type == PE_INT8 || type == PE_INT4 ? 8192 : 12288);
#endif
}

/* How far ahead of the rows in use, that many bytes, few tokens fetch: the next rows, or further
 * where these are short.  By measurement: at 34 GB/s 12 KiB arrive in 360 ns. */
PE_INLINE int64_t fetch_ahead(int64_t bytes) { return bytes > 12288 ? bytes : 12288; }

PE_INLINE void prefetch_next(int near, const uint8_t *p, int64_t bytes)
{
    if (near)
        prefetch1(p, bytes);
    else
        prefetch2(p, bytes);
}

/* ---- few tokens ------------------------------------------------------------------------------ */

/* By measurement, within the space on the stack. */
PE_INLINE int is_few(int type, int64_t tokens, int64_t groups)
{
    return tokens <= few_tokens(type) && tokens * groups <= FEW_GROUPS;
}

PE_INLINE __m128 load_scales(const uint16_t *halves, int64_t n)
{
    uint64_t four = 0; /* the array may end here */
    if (n == ROWS)
        memcpy(&four, halves, sizeof four);
    else
        memcpy(&four, halves, (size_t)n * sizeof halves[0]);
    return _mm_cvtph_ps(_mm_cvtsi64_si128((long long)four));
}

/* The halves at byte `at` of ROWS rows. */
PE_INLINE __m128 block_halves(const uint8_t *const *row, int64_t at)
{
    __m128i h = _mm_cvtsi32_si128(pe_load_u16(row[0] + at));
    h = _mm_insert_epi16(h, pe_load_u16(row[1] + at), 1);
    h = _mm_insert_epi16(h, pe_load_u16(row[2] + at), 2);
    return _mm_cvtph_ps(_mm_insert_epi16(h, pe_load_u16(row[3] + at), 3));
}

/* y of rows [r, r + n) of w, at most ROWS; q and sums as split_token leaves them. */
PE_INLINE void few_rows(int type, const pe_matrix *w, int64_t r, int64_t n, const pe_activations *a,
                        const int16_t *q, const int32_t *sums, float *y, int64_t ldy)
{
    const int64_t groups = pe_groups(w->cols), full = w->cols / PE_GROUP;
    const int64_t row_bytes = bytes_of(type, w->cols), bytes = bytes_of(type, PE_GROUP);
    const uint8_t *row = (const uint8_t *)w->data + r * row_bytes;
    const uint8_t *next = row + fetch_ahead(ROWS * row_bytes);
    const int64_t passes = (a->tokens + FEW_AT_ONCE - 1) / FEW_AT_ONCE;
    const int64_t share = ROWS * bytes / passes; /* of the next rows, fetched with each group */
    const int near = fits_near(type, ROWS * row_bytes);
    uint8_t last[ROWS][BLOCKS * Q8_BYTES]; /* a short last group, filled up with zeros */
    few f = {.scales = w->scales ? w->scales + r : NULL,
             .scale_ld = w->scale_ld,
             .n = n,
             .groups = groups};
    if (full < groups)
        for (int i = 0; i < ROWS; i++) {
            memset(last[i], 0, sizeof last[i]);
            memcpy(last[i], row + pe_min(i, n - 1) * row_bytes + full * bytes,
                   (size_t)(row_bytes - full * bytes));
        }
    for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t first = pass * FEW_AT_ONCE;
        const int64_t tokens = FEW_AT_ONCE == 1 ? 1 : pe_min(FEW_AT_ONCE, a->tokens - first);
        __m128 sum[FEW_AT_ONCE];
        f.q = q + first * groups * PE_GROUP;
        f.sums = sums + first * groups * sums_of(type);
        f.s_x = a->scales + first * groups;
        for (int i = 0; i < ROWS; i++)
            f.row[i] = row + pe_min(i, n - 1) * row_bytes;
        for (int64_t t = 0; t < tokens; t++)
            sum[t] = _mm_setzero_ps();
        for (int64_t g = 0; g < full; g++) {
            prefetch_next(near, next + (pass * full + g) * share, share);
            add_group(type, &f, tokens, g, g * bytes, sum);
        }
        if (full < groups) {
            for (int i = 0; i < ROWS; i++)
                f.row[i] = last[i];
            add_group(type, &f, tokens, full, 0, sum);
        }
        for (int64_t t = 0; t < tokens; t++)
            memcpy(y + (first + t) * ldy + r, &sum[t], (size_t)n * sizeof(float));
    }
}

PE_INLINE void matmul_few(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                          const pe_activations *a, float *y, int64_t ldy)
{
    const int64_t groups = pe_groups(w->cols), ld = groups * PE_GROUP;
    _Alignas(64) int16_t q[FEW_GROUPS * PE_GROUP]; /* vectors within cache lines */
    _Alignas(64) int32_t sums[FEW_GROUPS * SUMS];
    for (int64_t t = 0; t < a->tokens; t++)
        split_token(type, a->q + t * ld, has_minimum(type) ? a->sums + t * groups * PARTS : NULL,
                    groups, q + t * ld, sums + t * groups * sums_of(type));
    const int64_t left =
        a->tokens == 1 ? one_token_rows(type, w, row0, row1, q, sums, a->scales, y) : row0;
    for (int64_t r = left; r < row1; r += ROWS) {
        if (!is_blocks(type) && r % SCALES_AHEAD == 0)
            for (int64_t g = 0; g < groups; g++)
                prefetch1((const uint8_t *)(w->scales + g * w->scale_ld + r + SCALES_AHEAD), 1);
        few_rows(type, w, r, pe_min(ROWS, row1 - r), a, q, sums, y, ldy);
    }
}

/* ---- many tokens ----------------------------------------------------------------------------- */

/* Bits 0..3 of a and 16..19 of b in each lane, each less 8. */
PE_INLINE ints two_nibbles(ints a, ints b)
{
    ints x = ints_or(ints_and(a, ints_all(0x0000000f)), ints_and(b, ints_all(0x000f0000)));
    return ints_sub16(x, ints_all(0x00080008));
}

/* 16 bytes of nibbles of each row [LANES * h, + LANES), from byte `at` on, to 16 pairs; row[0] is
 * the first of these rows. */
PE_INLINE void pack4(const uint8_t *const *row, int64_t at, ints (*pairs)[2], int h)
{
    ints o[4];
    gather16(row, at, o);
    for (int j = 0; j < 4; j++) {
        ints x = o[j];
        pairs[4 * j][h] = two_nibbles(x, INTS_SHIFT_LEFT(x, 12));
        pairs[4 * j + 1][h] = two_nibbles(INTS_SHIFT_RIGHT(x, 8), INTS_SHIFT_LEFT(x, 4));
        pairs[4 * j + 2][h] = two_nibbles(INTS_SHIFT_RIGHT(x, 16), INTS_SHIFT_RIGHT(x, 4));
        pairs[4 * j + 3][h] = two_nibbles(INTS_SHIFT_RIGHT(x, 24), INTS_SHIFT_RIGHT(x, 12));
    }
}

/* The nibbles of one block of each row [LANES * h, + LANES) to 16 pairs: the block is at byte `at`
 * of the rows, row[0] is the first of these rows. */
PE_INLINE void pack_nibbles(int type, const uint8_t *const *row, int64_t at, ints (*pairs)[2],
                            int h)
{
    /* A byte becomes 16 bits: its copy above it, or 0. */
    const int twice = has_table(type);
    const ints nibble = ints_all(twice ? 0x0f0f0f0f : 0x000f000f);
    const ints table = ints_repeat(twice ? code_table(type) : _mm_setzero_si128());
    const ints excess = ints_all(excess_of(type) * 0x00010001), sixteen = ints_all(0x00100010);
    const __m128i two =
        twice ? _mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13)
              : _mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1);
    const __m128i next = _mm_set1_epi16(twice ? 0x0202 : 0x0002);
    ints o[4], fifth[2];
    gather16(row, at + nibbles_at(type), o);
    if (has_fifth_bits(type)) { /* of columns 0 to 15 in each 16 bits, and of the others */
        int32_t bits[LANES];
        const __m128i half = _mm_setr_epi8(0, 1, 0, 1, 4, 5, 4, 5, 8, 9, 8, 9, 12, 13, 12, 13);
        for (int i = 0; i < LANES; i++)
            memcpy(bits + i, row[i] + at + fifth_bits_at(type), sizeof bits[i]);
        for (int i = 0; i < 2; i++)
            fifth[i] = ints_shuffle8(ints_load(bits),
                                     ints_repeat(_mm_add_epi8(half, _mm_set1_epi8((char)(2 * i)))));
    }
    UNROLL
    for (int j = 0; j < 8; j++) {
        ints bytes = ints_shuffle8(o[j / 2], ints_repeat(j % 2 ? _mm_add_epi8(two, next) : two));
        ints code[2] = {ints_and(bytes, nibble), ints_and(INTS_SHIFT16_RIGHT(bytes, 4), nibble)};
        UNROLL
        for (int i = 0; i < 2; i++) {
            ints c = code[i];
            if (has_table(type))
                c = INTS_SHIFT16_RIGHT_SIGNED(ints_shuffle8(table, c), 8);
            if (has_fifth_bits(type))
                c = ints_add16_where(c, sixteen, fifth[i],
                                     ints_all((int32_t)(UINT32_C(0x00020001) << 2 * j)));
            pairs[8 * i + j][h] = excess_of(type) ? ints_sub16(c, excess) : c;
        }
    }
}

/* The halves at byte `at` of each block. */
PE_INLINE void pack_halves(int type, const uint8_t *const *row, int64_t at, floats (*to)[2])
{
    uint16_t s[BLOCKS][TILE];
    for (int i = 0; i < TILE; i++)
        for (int b = 0; b < BLOCKS; b++)
            s[b][i] = pe_load_u16(row[i] + b * block_bytes(type) + at);
    for (int b = 0; b < BLOCKS; b++)
        for (int h = 0; h < 2; h++)
            to[b][h] = floats_of_halves(s[b] + LANES * h);
}

/* The scales of a tile's group.  INT8, INT4: halves, of the n rows that exist; types of blocks: the
 * scales are in the blocks that row[0, TILE) points at. */
PE_INLINE void pack_scales(int type, const uint8_t *const *row, const uint16_t *halves, int64_t n,
                           tile *w)
{
    if (type == PE_MXFP4) {
        float s[BLOCKS][TILE];
        for (int i = 0; i < TILE; i++)
            for (int b = 0; b < BLOCKS; b++)
                s[b][i] = pe_e8m0_half_to_float(row[i][b * block_bytes(type)]);
        for (int b = 0; b < BLOCKS; b++)
            for (int h = 0; h < 2; h++)
                w->scale[b][h] = floats_load(s[b] + LANES * h);
    } else if (is_blocks(type)) {
        pack_halves(type, row, 0, w->scale);
        if (has_minimum(type))
            pack_halves(type, row, 2, w->minimum);
    } else {
        load_halves(halves, n, w->scale[0]);
    }
}

/* y += v */
PE_INLINE void add_to(float *y, floats v) { floats_store(y, floats_add(floats_load(y), v)); }

/* The tokens' side of one group: of the first token, and the steps to the next. */
typedef struct {
    const int16_t *q;
    const float *s_x;
    const int32_t *sums; /* of parts; types with a minimum only */
    int64_t groups;
} inputs;

PE_INLINE inputs inputs_after(const inputs *x, int64_t tokens)
{
    return (inputs){x->q + tokens * x->groups * PE_GROUP, x->s_x + tokens * x->groups,
                    x->sums ? x->sums + tokens * x->groups * PARTS : NULL, x->groups};
}

/* One tile times n <= BLOCK tokens (a constant): y[t] += their parts of this group. */
PE_INLINE void tile_times_tokens(int type, const tile *w, const inputs *in, float (*y)[TILE], int n)
{
    const int blocks = is_blocks(type) ? BLOCKS : 1, steps = PAIRS / blocks;
    floats part[BLOCKS][BLOCK][2];
    for (int b = 0; b < blocks; b++) {
        ints lo[BLOCK], hi[BLOCK];
        UNROLL
        for (int t = 0; t < n; t++)
            lo[t] = hi[t] = ints_zero();
        const int16_t *x = in->q + b * steps * 2;
        for (int i = b * steps; i < (b + 1) * steps; i++, x += 2) {
            ints w0 = w->pairs[i][0], w1 = w->pairs[i][1];
            pin(&w0);
            pin(&w1);
            UNROLL
            for (int t = 0; t < n; t++) {
                int32_t pair;
                memcpy(&pair, x + t * in->groups * PE_GROUP, sizeof pair);
                ints v = ints_all(pair);
                pin(&v);
                add_products(&lo[t], w0, v);
                add_products(&hi[t], w1, v);
            }
        }
        UNROLL
        for (int t = 0; t < n; t++) {
            if (is_blocks(type)) {
                part[b][t][0] = floats_mul(floats_of_ints(lo[t]), w->scale[b][0]);
                part[b][t][1] = floats_mul(floats_of_ints(hi[t]), w->scale[b][1]);
                if (has_minimum(type)) {
                    const int32_t *sums = in->sums + t * in->groups * PARTS + 2 * b;
                    floats s = floats_all((float)(sums[0] + sums[1]));
                    part[b][t][0] = floats_add(part[b][t][0], floats_mul(s, w->minimum[b][0]));
                    part[b][t][1] = floats_add(part[b][t][1], floats_mul(s, w->minimum[b][1]));
                }
            } else {
                floats s = floats_all(in->s_x[t * in->groups]);
                floats p0 = floats_mul(floats_of_ints(lo[t]), floats_mul(w->scale[0][0], s));
                floats p1 = floats_mul(floats_of_ints(hi[t]), floats_mul(w->scale[0][1], s));
                add_to(y[t], p0);
                add_to(y[t] + LANES, p1);
            }
        }
    }
    if (is_blocks(type))
        for (int t = 0; t < n; t++)
            for (int h = 0; h < 2; h++) {
                floats p = floats_add(floats_add(part[0][t][h], part[1][t][h]),
                                      floats_add(part[2][t][h], part[3][t][h]));
                add_to(y[t] + LANES * h, floats_mul(p, floats_all(in->s_x[t * in->groups])));
            }
}

/* row[i] is where row i's full group starts. */
PE_INLINE void pack_tile(int type, const uint8_t *const *row, tile *w)
{
    const int step = type == PE_INT4 || has_nibbles(type) ? 32 : 16;
    for (int h = 0; h < 2; h++)
        for (int c = 0; c < PE_GROUP; c += step) {
            const uint8_t *const *half = row + LANES * h;
            if (has_nibbles(type))
                pack_nibbles(type, half, c / PE_BLOCK * block_bytes(type), w->pairs + c / 2, h);
            else if (type == PE_Q8_0)
                pack8(half, c / PE_BLOCK * Q8_BYTES + 2 + c % PE_BLOCK, w->pairs + c / 2, h);
            else if (type == PE_INT8)
                pack8(half, c, w->pairs + c / 2, h);
            else
                pack4(half, c / 2, w->pairs + c / 2, h);
        }
}

/* One tile times n tokens, in blocks of about equal size. */
PE_INLINE void tile_times_chunk(int type, const tile *w, inputs in, float (*y)[TILE], int64_t n)
{
    for (int64_t left = n, size; left; left -= size) {
        int64_t blocks = (left + BLOCK - 1) / BLOCK;
        size = (left + blocks - 1) / blocks;
        switch (size) {
#define CASE(k)                                                                                    \
    case k:                                                                                        \
        tile_times_tokens(type, w, &in, y, k);                                                     \
        break;
            CASE(1)
            CASE(2)
            CASE(3)
            CASE(4)
#if BLOCK == 8
            CASE(5) CASE(6) CASE(7) CASE(8)
#endif
#undef CASE
        }
        in = inputs_after(&in, size);
        y += size;
    }
}

/* Once packed, types differ only in the float32 steps.  These functions are compiled on their own,
 * because they are most of the code. */
#define CHUNK_FUNCTION(name, type)                                                                 \
    static __attribute__((noinline)) void name(const tile *w, const inputs *in, float (*y)[TILE],  \
                                               int64_t n)                                          \
    {                                                                                              \
        tile_times_chunk(type, w, *in, y, n);                                                      \
    }
CHUNK_FUNCTION(scaled_chunk, PE_INT8)
CHUNK_FUNCTION(blocks_chunk, PE_Q8_0)
CHUNK_FUNCTION(blocks_with_minimum_chunk, PE_Q4_1)
#undef CHUNK_FUNCTION

/* Rows [r, r + rows) of w, at most TILE, times tokens [t0, t0 + n), at most CHUNK.  next: the rows
 * of the tile to be used next, if they are worth a prefetch. */
PE_INLINE void matmul_tile(int type, const pe_matrix *w, int64_t r, int64_t rows,
                           const pe_activations *a, int64_t t0, int64_t n, float *y, int64_t ldy,
                           const uint8_t *next)
{
    const int64_t groups = pe_groups(w->cols);
    const int64_t group_bytes = bytes_of(type, PE_GROUP), row_bytes = bytes_of(type, w->cols);
    const inputs first = {a->q, a->scales, has_minimum(type) ? a->sums : NULL, groups};
    inputs in = inputs_after(&first, t0);
    tile packed;
    float sum[CHUNK][TILE];
    memset(sum, 0, (size_t)n * sizeof sum[0]);

    const uint8_t *row[TILE]; /* rows past the last repeat the last; their results are not stored */
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
        if (has_minimum(type))
            blocks_with_minimum_chunk(&packed, &in, sum, n);
        else if (is_blocks(type))
            blocks_chunk(&packed, &in, sum, n);
        else
            scaled_chunk(&packed, &in, sum, n);
        in = (inputs){in.q + PE_GROUP, in.s_x + 1, in.sums ? in.sums + PARTS : NULL, groups};
        for (int i = 0; i < TILE; i++)
            row[i] += group_bytes;
    }
    for (int64_t t = 0; t < n; t++)
        memcpy(y + (t0 + t) * ldy + r, sum[t], (size_t)rows * sizeof(float));
}

PE_INLINE void matmul_group_type(int type, const pe_matrix *w, int64_t row0, int64_t row1,
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
KERNEL(matmul_q4_0, matmul_group_type, PE_Q4_0)
KERNEL(matmul_q4_1, matmul_group_type, PE_Q4_1)
KERNEL(matmul_q5_0, matmul_group_type, PE_Q5_0)
KERNEL(matmul_q5_1, matmul_group_type, PE_Q5_1)
KERNEL(matmul_iq4_nl, matmul_group_type, PE_IQ4_NL)
KERNEL(matmul_mxfp4, matmul_group_type, PE_MXFP4)
KERNEL(matmul_int8, matmul_group_type, PE_INT8)
KERNEL(matmul_int4, matmul_group_type, PE_INT4)
KERNEL(matmul_f32, matmul_dense, PE_F32)
KERNEL(matmul_f16, matmul_dense, PE_F16)
KERNEL(matmul_bf16, matmul_dense, PE_BF16)
#undef KERNEL

PE_INLINE void fill_matmul(pe_kernels *k)
{
    k->matmul[PE_Q8_0] = matmul_q8_0;
    k->matmul[PE_Q4_0] = matmul_q4_0;
    k->matmul[PE_Q4_1] = matmul_q4_1;
    k->matmul[PE_Q5_0] = matmul_q5_0;
    k->matmul[PE_Q5_1] = matmul_q5_1;
    k->matmul[PE_IQ4_NL] = matmul_iq4_nl;
    k->matmul[PE_MXFP4] = matmul_mxfp4;
    k->matmul[PE_INT8] = matmul_int8;
    k->matmul[PE_INT4] = matmul_int4;
    k->matmul[PE_F32] = matmul_f32;
    k->matmul[PE_F16] = matmul_f16;
    k->matmul[PE_BF16] = matmul_bf16;
}

#endif
