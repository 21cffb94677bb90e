/* matmul_avx512amx.h - many tokens of INT8, INT4 and the types of blocks of 32 columns, with AMX.
 *
 * q is 256 high + low, high signed and low unsigned.  tdpbssd multiplies int8 codes by the high
 * bytes, tdpbsud by the low ones: both sums are exact in int32, and so is 256 times the first plus
 * the second.  A tile of codes is 16 rows of the matrix; a tile of tokens has 16 tokens, and four
 * columns in each 32 bits; a tile of sums has a token in each lane.
 *
 * The bytes of the tokens are split and transposed once for all rows and threads: split_tokens.
 * The codes of TILE rows of a group are unpacked to int8 once for CHUNK_BLOCKS blocks of tokens.
 *
 * The sums of a step (some rows, one group, one block of tokens) are stored; the float32 operations
 * of the step before are executed while the tiles are busy.
 *
 * The instructions are written as assembly: so no flag of the compiler is needed, and no compiler
 * uses tiles for anything else.
 */
#include "matmul_avx512vnni.h"

#define BLOCK_TOKENS PE_SPLIT_TOKENS
/* By measurement. */
#define CHUNK_BLOCKS 8       /* of tokens, that share unpacked codes */
#define NEAR_BYTES (1 << 20) /* of rewritten tokens in the second cache */

_Static_assert(BLOCK_TOKENS == 16 && LANES == 16 && TILE == 32, "a tile has 16 rows");

/* One group of a block of tokens.  Tokens past the last repeat it; their results are not stored. */
typedef struct {
    uint8_t high[PE_GROUP / 4][BLOCK_TOKENS][4]; /* [c / 4][token][c % 4] */
    uint8_t low[PE_GROUP / 4][BLOCK_TOKENS][4];
    float s_x[BLOCK_TOKENS];
    float sums[BLOCKS][BLOCK_TOKENS]; /* of q over a block of columns, where a type reads them */
} split_group;

_Static_assert(sizeof(split_group) == PE_SPLIT_BYTES, "as kernels.h says");

/* ---- instructions ---------------------------------------------------------------------------- */

#define TILE_LOAD(t, from, stride)                                                                 \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t                                               \
                     :                                                                             \
                     : "r"(from), "r"((int64_t)(stride))                                           \
                     : "memory")
#define TILE_STORE(t, to, stride)                                                                  \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)"                                           \
                     :                                                                             \
                     : "r"(to), "r"((int64_t)(stride))                                             \
                     : "memory")
#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t ::)
/* Tile t += codes (signed) times bytes of q (signed: high, unsigned: low). */
#define TILE_ADD_HIGH(t, codes, bytes)                                                             \
    __asm__ volatile("tdpbssd %%tmm" #bytes ", %%tmm" #codes ", %%tmm" #t ::)
#define TILE_ADD_LOW(t, codes, bytes)                                                              \
    __asm__ volatile("tdpbsud %%tmm" #bytes ", %%tmm" #codes ", %%tmm" #t ::)

/* Tiles 0 to 3 are sums, 4 and 5 codes of `columns` columns, 6 and 7 bytes of q of as many. */
PE_INLINE void configure_tiles(int columns)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int t = 0; t < 8; t++) {
        config.row_bytes[t] = (uint16_t)(t == 4 || t == 5 ? columns : 64);
        config.rows[t] = (uint8_t)(t >= 6 ? columns / 4 : 16);
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
}

/* Tiles in use make each switch of threads longer. */
PE_INLINE void release_tiles(void) { __asm__ volatile("tilerelease" ::); }

/* ---- the tokens ------------------------------------------------------------------------------ */

/* 64 columns: 16 rows of split_group's bytes. */
PE_INLINE void split_columns(const int16_t *const *q, uint8_t (*high)[BLOCK_TOKENS][4],
                             uint8_t (*low)[BLOCK_TOKENS][4])
{
    _Alignas(64) uint8_t bytes[2][BLOCK_TOKENS][64];
    const uint8_t *row[2][BLOCK_TOKENS];
    for (int t = 0; t < BLOCK_TOKENS; t++) {
        for (int i = 0; i < 2; i++) {
            __m512i x = _mm512_loadu_si512(q[t] + 32 * i);
            _mm256_store_si256((void *)(bytes[0][t] + 32 * i),
                               _mm512_cvtepi16_epi8(_mm512_srai_epi16(x, 8)));
            _mm256_store_si256((void *)(bytes[1][t] + 32 * i), _mm512_cvtepi16_epi8(x));
        }
        row[0][t] = bytes[0][t];
        row[1][t] = bytes[1][t];
    }
    for (int j = 0; j < 4; j++) {
        gather16(row[0], 16 * j, (__m512i *)high[4 * j]);
        gather16(row[1], 16 * j, (__m512i *)low[4 * j]);
    }
}

/* Blocks [block0, block1) of a's tokens -> to, all groups of the first block and so on. */
static void split_tokens(const pe_activations *a, int with_sums, int64_t block0, int64_t block1,
                         void *to)
{
    const int64_t groups = pe_groups(a->cols);
    split_group *out = to;
    for (int64_t block = block0; block < block1; block++)
        for (int64_t g = 0; g < groups; g++, out++) {
            const int16_t *q[BLOCK_TOKENS];
            for (int i = 0; i < BLOCK_TOKENS; i++) {
                int64_t at = pe_min(block * BLOCK_TOKENS + i, a->tokens - 1) * groups + g;
                q[i] = a->q + at * PE_GROUP;
                out->s_x[i] = a->scales[at];
                for (int b = 0; b < BLOCKS && with_sums; b++) {
                    const int32_t *sums = a->sums + at * PARTS + 2 * b;
                    out->sums[b][i] = (float)(sums[0] + sums[1]);
                }
            }
            split_columns(q, out->high, out->low);
            for (int i = 0; i < BLOCK_TOKENS; i++)
                q[i] += 64;
            split_columns(q, out->high + 16, out->low + 16);
        }
}

/* ---- the codes ------------------------------------------------------------------------------- */

/* Rows past the last repeat it. */
typedef struct {
    _Alignas(64) int8_t codes[TILE][PE_GROUP];
    floats scale[BLOCKS][2], minimum[BLOCKS][2]; /* as in tile */
} amx_codes;

/* 128 codes of the full group that starts at `group`. */
PE_INLINE void unpack_row(int type, const uint8_t *group, int8_t *codes)
{
    if (type == PE_INT8) {
        _mm512_store_si512(codes, _mm512_loadu_si512(group));
        _mm512_store_si512(codes + 64, _mm512_loadu_si512(group + 64));
    } else if (type == PE_INT4) {
        for (int i = 0; i < 2; i++) { /* a byte b becomes b + 16 b: its nibbles in two bytes */
            __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)(group + 32 * i)));
            x = _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi16(x, 4)),
                                 _mm512_set1_epi8(15));
            _mm512_store_si512(codes + 64 * i, _mm512_sub_epi8(x, _mm512_set1_epi8(8)));
        }
    } else if (type == PE_Q8_0) {
        for (int b = 0; b < BLOCKS; b++)
            memcpy(codes + b * PE_BLOCK, group + b * Q8_BYTES + 2, PE_BLOCK);
    } else {
        const __m512i added =
            _mm512_set1_epi8((char)(is_signed(type) ? 0 : added_to(type)));
        const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        __m512i half[2]; /* of the columns of each block */
        codes_of_row(type, group, half);
        for (int i = 0; i < 2; i++) {
            __m512i two = _mm512_permutex2var_epi64(
                half[0], _mm512_add_epi64(first, _mm512_set1_epi64(4 * i)), half[1]);
            _mm512_store_si512(codes + 64 * i, _mm512_sub_epi8(two, added));
        }
    }
}

/* ---- the sums -------------------------------------------------------------------------------- */

typedef int32_t sums16[16][BLOCK_TOKENS];

/* Tiles HIGH and LOW: the sums of 16 rows of codes over one group, or over block b of it.  Macros,
 * because a tile's number is part of the instruction. */
#define SUM_GROUP(HIGH, LOW, codes, x)                                                             \
    {                                                                                              \
        TILE_ZERO(HIGH);                                                                           \
        TILE_ZERO(LOW);                                                                            \
        for (int k = 0; k < 2; k++) {                                                              \
            TILE_LOAD(4, (codes)[0] + 64 * k, PE_GROUP);                                           \
            TILE_LOAD(6, (x)->high[16 * k], 64);                                                   \
            TILE_ADD_HIGH(HIGH, 4, 6);                                                             \
            TILE_LOAD(7, (x)->low[16 * k], 64);                                                    \
            TILE_ADD_LOW(LOW, 4, 7);                                                               \
        }                                                                                          \
    }
#define SUM_BLOCK(HIGH, LOW, codes, x, b)                                                          \
    {                                                                                              \
        TILE_ZERO(HIGH);                                                                           \
        TILE_ZERO(LOW);                                                                            \
        TILE_LOAD(4, (codes)[0] + PE_BLOCK * (b), PE_GROUP);                                       \
        TILE_LOAD(6, (x)->high[8 * (b)], 64);                                                      \
        TILE_ADD_HIGH(HIGH, 4, 6);                                                                 \
        TILE_LOAD(7, (x)->low[8 * (b)], 64);                                                       \
        TILE_ADD_LOW(LOW, 4, 7);                                                                   \
    }
#define STORE_SUMS(HIGH, LOW, c)                                                                   \
    {                                                                                              \
        TILE_STORE(HIGH, (c)[0], 64);                                                              \
        TILE_STORE(LOW, (c)[1], 64);                                                               \
    }

/* ---- float32 --------------------------------------------------------------------------------- */

/* f32 of the sums of row i; high and low are neighbours. */
PE_INLINE __m512 sum_of_row(const sums16 *c, int i)
{
    __m512i high = _mm512_slli_epi32(_mm512_load_si512(c[0][i]), 8);
    return _mm512_cvtepi32_ps(_mm512_add_epi32(high, _mm512_load_si512(c[1][i])));
}

/* A step whose sums are stored, and whose y [rows][tokens] wait for them. */
typedef struct {
    sums16 *c;
    const amx_codes *w;
    const split_group *x;
    float (*y)[BLOCK_TOKENS];
    const uint8_t *next; /* where a group of TILE rows is fetched from, or NULL */
    int half; /* types of blocks: of the rows */
} amx_step;

/* Row by row: many fetches at once would wait for each other, and the rest for them. */
PE_INLINE void fetch_row(int type, const amx_step *s, int i)
{
    if (s->next)
        prefetch2(s->next + i * bytes_of(type, PE_GROUP), bytes_of(type, PE_GROUP));
}

/* The 16 rows of that half. */
PE_INLINE void add_group_rows(int type, const amx_step *s, int half)
{
    const __m512 s_x = _mm512_load_ps(s->x->s_x);
    const float *s_w = (const float *)&s->w->scale[0][half];
    float(*y)[BLOCK_TOKENS] = s->y + 16 * half;
    UNROLL
    for (int i = 0; i < 16; i++) {
        fetch_row(type, s, 16 * half + i);
        __m512 scale = _mm512_mul_ps(_mm512_set1_ps(s_w[i]), s_x);
        add_to(y[i], _mm512_mul_ps(sum_of_row(s->c + 2 * half, i), scale));
    }
}

/* Rows [i0, i1) of the half. */
PE_INLINE void add_blocks_rows(int type, const amx_step *s, int i0, int i1)
{
    const __m512 s_x = _mm512_load_ps(s->x->s_x);
    const amx_codes *w = s->w;
    __m512 sums[BLOCKS];
    for (int b = 0; b < BLOCKS && has_minimum(type); b++)
        sums[b] = _mm512_load_ps(s->x->sums[b]);
    for (int i = i0; i < i1; i++) {
        fetch_row(type, s, 16 * s->half + i);
        __m512 p[BLOCKS];
        UNROLL
        for (int b = 0; b < BLOCKS; b++) {
            const float *scale = (const float *)&w->scale[b][s->half];
            const float *minimum = (const float *)&w->minimum[b][s->half];
            p[b] = _mm512_mul_ps(sum_of_row(s->c + 2 * b, i), _mm512_set1_ps(scale[i]));
            if (has_minimum(type))
                p[b] = _mm512_add_ps(p[b], _mm512_mul_ps(sums[b], _mm512_set1_ps(minimum[i])));
        }
        __m512 all = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
        add_to(s->y[16 * s->half + i], _mm512_mul_ps(all, s_x));
    }
}

/* The sums of the step now, of which the last ones stay in tiles 2 and 3, and the float32 steps
 * of the one before.  One is stored and the other one added up while the next sums are computed:
 * stores that wait for a sum would fill the processor's queue. */
PE_INLINE void amx_steps(int type, const amx_step *now, const amx_step *before)
{
    const int8_t(*codes)[PE_GROUP] = now->w->codes + 16 * now->half;
    const split_group *x = now->x;
    if (!is_blocks(type)) {
        SUM_GROUP(0, 1, codes, x)
        STORE_SUMS(2, 3, before->c + 2)
        add_group_rows(type, before, 0);
        SUM_GROUP(2, 3, codes + 16, x)
        STORE_SUMS(0, 1, now->c)
        add_group_rows(type, before, 1);
        return;
    }
    SUM_BLOCK(0, 1, codes, x, 0)
    STORE_SUMS(2, 3, before->c + 6)
    add_blocks_rows(type, before, 0, 4);
    SUM_BLOCK(2, 3, codes, x, 1)
    STORE_SUMS(0, 1, now->c)
    add_blocks_rows(type, before, 4, 8);
    SUM_BLOCK(0, 1, codes, x, 2)
    STORE_SUMS(2, 3, now->c + 2)
    add_blocks_rows(type, before, 8, 12);
    SUM_BLOCK(2, 3, codes, x, 3)
    STORE_SUMS(0, 1, now->c + 4)
    add_blocks_rows(type, before, 12, 16);
}

/* Of the last step. */
PE_INLINE void finish_step(int type, const amx_step *before)
{
    if (is_blocks(type)) {
        STORE_SUMS(2, 3, before->c + 6)
        add_blocks_rows(type, before, 0, 16);
        return;
    }
    STORE_SUMS(2, 3, before->c + 2)
    add_group_rows(type, before, 0);
    add_group_rows(type, before, 1);
}

/* ---- the kernels ----------------------------------------------------------------------------- */

/* y of tokens, n of them, and rows, from its transpose. */
PE_INLINE void store_block(float (*from)[BLOCK_TOKENS], int64_t rows, int64_t n, float *y,
                           int64_t ldy)
{
    for (int h = 0; h < 2 && 16 * h < rows; h++) {
        const __mmask16 mask = (__mmask16)(0xffff >> (16 - pe_min(rows - 16 * h, 16)));
        const uint8_t *row[16];
        for (int i = 0; i < 16; i++)
            row[i] = (const uint8_t *)from[16 * h + i];
        for (int64_t t = 0; t < n; t += 4) {
            __m512i o[4];
            gather16(row, 4 * t, o);
            for (int64_t j = 0; j < 4 && t + j < n; j++)
                _mm512_mask_storeu_epi32(y + (t + j) * ldy + 16 * h, mask, o[j]);
        }
    }
}

/* What one thread keeps: of TILE rows and a chunk of tokens. */
typedef struct {
    _Alignas(64) float y[CHUNK_BLOCKS][TILE][BLOCK_TOKENS];
    _Alignas(64) float unused[TILE][BLOCK_TOKENS];
    _Alignas(64) sums16 sums[2][2 * BLOCKS]; /* of this step and the one before */
    amx_codes codes[2];                      /* of this group and the next one */
} amx_memory;

/* Rows [r, r + rows) of group g, at most TILE. */
PE_INLINE void unpack_rows(int type, const pe_matrix *w, int64_t r, int64_t rows, int64_t g,
                           amx_codes *to)
{
    const int64_t group_bytes = bytes_of(type, PE_GROUP), row_bytes = bytes_of(type, w->cols);
    const int64_t bytes = row_bytes - g * group_bytes;
    const uint8_t *data = (const uint8_t *)w->data + r * row_bytes + g * group_bytes;
    const uint8_t *row[TILE];
    uint8_t last[TILE][BLOCKS * Q8_BYTES]; /* a short last group, filled up with zeros */
    tile scales;                           /* no other part of it is used */
    for (int i = 0; i < TILE; i++) {
        row[i] = data + pe_min(i, rows - 1) * row_bytes;
        if (bytes < group_bytes) {
            memset(last[i], 0, sizeof last[i]);
            memcpy(last[i], row[i], (size_t)bytes);
            row[i] = last[i];
        }
    }
    pack_scales(type, row, w->scales ? w->scales + g * w->scale_ld + r : NULL, rows, &scales);
    memcpy(to->scale, scales.scale, sizeof to->scale);
    if (has_minimum(type))
        memcpy(to->minimum, scales.minimum, sizeof to->minimum);
    for (int i = 0; i < TILE; i++)
        unpack_row(type, row[i], to->codes[i]);
}

/* Rows [r, r + rows) of w, at most TILE, times blocks [0, blocks) from x on, n tokens.  next: the
 * rows to be used next, if they are worth a prefetch. */
PE_INLINE void amx_rows(int type, const pe_matrix *w, int64_t r, int64_t rows,
                        const split_group *x, int64_t blocks, int64_t n, float *y, int64_t ldy,
                        const uint8_t *next, amx_memory *m)
{
    const int64_t groups = pe_groups(w->cols), bytes = TILE * bytes_of(type, PE_GROUP);
    /* Before the first step: any sums, to a y that is not used. */
    amx_step before = {m->sums[1], m->codes, x, m->unused, NULL, 0};
    int at = 0;
    memset(m->y, 0, (size_t)blocks * sizeof m->y[0]);
    unpack_rows(type, w, r, rows, 0, m->codes);
    for (int64_t g = 0; g < groups; g++)
        for (int64_t b = 0; b < blocks; b++)
            for (int half = 0; half <= is_blocks(type); half++, at ^= 1) {
                const amx_step now = {m->sums[at], &m->codes[g % 2], x + b * groups + g, m->y[b],
                                      b == 0 && next ? next + g * bytes : NULL, half};
                amx_steps(type, &now, &before);
                before = now;
                if (b == 0 && half == 0 && g + 1 < groups)
                    unpack_rows(type, w, r, rows, g + 1, &m->codes[(g + 1) % 2]);
            }
    finish_step(type, &before);
    for (int64_t b = 0; b < blocks; b++)
        store_block(m->y[b], rows, pe_min(n - b * BLOCK_TOKENS, BLOCK_TOKENS),
                    y + b * BLOCK_TOKENS * ldy + r, ldy);
}

/* As many blocks of tokens as stay in the second cache while all rows are used. */
PE_INLINE int64_t near_blocks(int64_t groups)
{
    const int64_t fit = NEAR_BYTES / (groups * PE_SPLIT_BYTES) / CHUNK_BLOCKS * CHUNK_BLOCKS;
    return fit > CHUNK_BLOCKS ? fit : CHUNK_BLOCKS;
}

PE_INLINE void matmul_split(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                            int64_t tokens, const void *split, float *y, int64_t ldy,
                            const void *after)
{
    const int64_t row_bytes = bytes_of(type, w->cols), groups = pe_groups(w->cols);
    const int64_t blocks = (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS, near = near_blocks(groups);
    amx_memory m;
    configure_tiles(is_blocks(type) ? PE_BLOCK : 64);
    for (int64_t first = 0; first < blocks; first += near)
        for (int64_t r = row0; r < row1; r += TILE)
            for (int64_t b = first; b < pe_min(first + near, blocks); b += CHUNK_BLOCKS) {
                const uint8_t *next = (const uint8_t *)w->data + (r + TILE) * row_bytes;
                if (r + TILE >= row1)
                    next = after;
                if (b > first)
                    next = NULL;
                amx_rows(type, w, r, pe_min(TILE, row1 - r),
                         (const split_group *)split + b * groups, pe_min(CHUNK_BLOCKS, blocks - b),
                         tokens - b * BLOCK_TOKENS, y + b * BLOCK_TOKENS * ldy, ldy, next, &m);
            }
    release_tiles();
}

#define KERNEL(name, type)                                                                         \
    static void name(const pe_matrix *w, int64_t row0, int64_t row1, int64_t tokens,               \
                     const void *split, float *y, int64_t ldy, const void *next)                   \
    {                                                                                              \
        matmul_split(type, w, row0, row1, tokens, split, y, ldy, next);                            \
    }
KERNEL(split_q8_0, PE_Q8_0)
KERNEL(split_q4_0, PE_Q4_0)
KERNEL(split_q4_1, PE_Q4_1)
KERNEL(split_q5_0, PE_Q5_0)
KERNEL(split_q5_1, PE_Q5_1)
KERNEL(split_iq4_nl, PE_IQ4_NL)
KERNEL(split_mxfp4, PE_MXFP4)
KERNEL(split_int8, PE_INT8)
KERNEL(split_int4, PE_INT4)
#undef KERNEL

PE_INLINE void fill_split_matmul(pe_kernels *k)
{
    static const struct {
        int32_t type;
        int64_t least; /* by measurement */
        pe_split_matmul_kernel *matmul;
    } kernels[] = {
        {PE_INT8, 5, split_int8},     {PE_INT4, 5, split_int4}, {PE_Q8_0, 8, split_q8_0},
        {PE_Q4_0, 8, split_q4_0},     {PE_Q4_1, 8, split_q4_1}, {PE_Q5_0, 8, split_q5_0},
        {PE_Q5_1, 8, split_q5_1},     {PE_MXFP4, 8, split_mxfp4},
        {PE_IQ4_NL, 8, split_iq4_nl},
    };
    k->split_tokens = split_tokens;
    for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; i++) {
        k->split_matmul[kernels[i].type] = kernels[i].matmul;
        k->split_least[kernels[i].type] = kernels[i].least;
    }
}
