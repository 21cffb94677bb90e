/* matmul_avx512amx.h - many tokens of INT8, INT4 and the types of blocks of 32 columns, with AMX.
 *
 * q is 256 high + low, high signed and low unsigned.  tdpbssd multiplies int8 codes by the high
 * bytes, tdpbsud by the low ones: both sums are exact in int32, and so is 256 times the first plus
 * the second.  A tile of codes is 16 rows of the matrix; a tile of tokens has 16 tokens, and four
 * columns in each 32 bits; a tile of sums has a token in each lane.
 *
 * The bytes of the tokens are split and transposed once, for all rows and all threads: split_tokens.
 * The codes of TILE rows of a group are unpacked to int8 once for CHUNK_BLOCKS blocks of tokens.
 *
 * The sums of a step (some rows, one group, one block of tokens) are stored; then follow the float32
 * operations of the step before, which the processor executes while its tiles are busy.
 *
 * The instructions are written as assembly.  Thus no flag of the compiler is needed, and no compiler
 * uses tiles for anything else.
 */
#include "matmul_avx512vnni.h"

#define BLOCK_TOKENS PE_SPLIT_TOKENS
#define CHUNK_BLOCKS 4 /* by measurement */

_Static_assert(BLOCK_TOKENS == 16 && LANES == 16 && TILE == 32, "a tile has 16 rows");

/* One group of a block of tokens.  Tokens past the last repeat it; their results are not stored. */
typedef struct {
    uint8_t high[PE_GROUP / 4][BLOCK_TOKENS][4]; /* [c / 4][token][c % 4] */
    uint8_t low[PE_GROUP / 4][BLOCK_TOKENS][4];
    float s_x[BLOCK_TOKENS];
    float sums[BLOCKS][BLOCK_TOKENS]; /* of q over a block of columns, where there are sums */
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
static void split_tokens(const pe_activations *a, int64_t block0, int64_t block1, void *to)
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
                for (int b = 0; b < BLOCKS; b++) {
                    const int32_t *sums = a->sums + at * PARTS + 2 * b;
                    out->sums[b][i] = a->sums ? (float)(sums[0] + sums[1]) : 0.0f;
                }
            }
            split_columns(q, out->high, out->low);
            for (int i = 0; i < BLOCK_TOKENS; i++)
                q[i] += 64;
            split_columns(q, out->high + 16, out->low + 16);
        }
}

/* ---- the codes ------------------------------------------------------------------------------- */

/* TILE rows of a group; rows past the last repeat it. */
typedef struct {
    _Alignas(64) int8_t codes[TILE][PE_GROUP];
    tile scales; /* whose pairs are not used */
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

/* Of TILE rows and the whole group: high and low of the first 16 rows, then of the others. */
PE_INLINE void sums_of_group(const int8_t (*codes)[PE_GROUP], const split_group *x, sums16 *c)
{
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int k = 0; k < 2; k++) {
        TILE_LOAD(4, codes[0] + 64 * k, PE_GROUP);
        TILE_LOAD(6, x->high[16 * k], 64);
        TILE_ADD_HIGH(0, 4, 6);
        TILE_LOAD(7, x->low[16 * k], 64);
        TILE_ADD_LOW(1, 4, 7);
        TILE_LOAD(5, codes[16] + 64 * k, PE_GROUP);
        TILE_ADD_HIGH(2, 5, 6);
        TILE_ADD_LOW(3, 5, 7);
    }
    TILE_STORE(0, c[0], 64);
    TILE_STORE(1, c[1], 64);
    TILE_STORE(2, c[2], 64);
    TILE_STORE(3, c[3], 64);
}

/* Of 16 rows: high and low of each block. */
PE_INLINE void sums_of_blocks(const int8_t (*codes)[PE_GROUP], const split_group *x, sums16 *c)
{
    for (int b = 0; b < BLOCKS; b += 2) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
        TILE_LOAD(4, codes[0] + PE_BLOCK * b, PE_GROUP);
        TILE_LOAD(6, x->high[8 * b], 64);
        TILE_ADD_HIGH(0, 4, 6);
        TILE_LOAD(7, x->low[8 * b], 64);
        TILE_ADD_LOW(1, 4, 7);
        TILE_LOAD(5, codes[0] + PE_BLOCK * (b + 1), PE_GROUP);
        TILE_LOAD(6, x->high[8 * (b + 1)], 64);
        TILE_ADD_HIGH(2, 5, 6);
        TILE_LOAD(7, x->low[8 * (b + 1)], 64);
        TILE_ADD_LOW(3, 5, 7);
        TILE_STORE(0, c[2 * b], 64);
        TILE_STORE(1, c[2 * b + 1], 64);
        TILE_STORE(2, c[2 * b + 2], 64);
        TILE_STORE(3, c[2 * b + 3], 64);
    }
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
    const sums16 *c;
    const amx_codes *w;
    const split_group *x;
    float (*y)[BLOCK_TOKENS];
    int half; /* types of blocks: of the rows */
} amx_step;

PE_INLINE void add_step(int type, const amx_step *s)
{
    const __m512 s_x = _mm512_load_ps(s->x->s_x);
    const tile *w = &s->w->scales;
    if (!is_blocks(type)) {
        for (int h = 0; h < 2; h++)
            for (int i = 0; i < 16; i++) {
                __m512 scale = _mm512_mul_ps(_mm512_set1_ps(((const float *)&w->scale[0][h])[i]), s_x);
                __m512 p = _mm512_mul_ps(sum_of_row(s->c + 2 * h, i), scale);
                add_to(s->y[16 * h + i], p);
            }
        return;
    }
    __m512 sums[BLOCKS];
    for (int b = 0; b < BLOCKS; b++)
        sums[b] = _mm512_load_ps(s->x->sums[b]);
    for (int i = 0; i < 16; i++) {
        __m512 p[BLOCKS];
        UNROLL
        for (int b = 0; b < BLOCKS; b++) {
            p[b] = _mm512_mul_ps(sum_of_row(s->c + 2 * b, i),
                                 _mm512_set1_ps(((const float *)&w->scale[b][s->half])[i]));
            if (has_minimum(type)) {
                __m512 m = _mm512_set1_ps(((const float *)&w->minimum[b][s->half])[i]);
                p[b] = _mm512_add_ps(p[b], _mm512_mul_ps(sums[b], m));
            }
        }
        __m512 all = _mm512_add_ps(_mm512_add_ps(p[0], p[1]), _mm512_add_ps(p[2], p[3]));
        add_to(s->y[16 * s->half + i], _mm512_mul_ps(all, s_x));
    }
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

/* What one thread keeps: of a chunk of tokens and TILE rows. */
typedef struct {
    _Alignas(64) float y[CHUNK_BLOCKS][TILE][BLOCK_TOKENS];
    _Alignas(64) sums16 sums[2][2 * BLOCKS]; /* of this step and the one before */
    amx_codes codes[2];                      /* of this group and the one before */
} amx_memory;

/* Rows [r, r + rows) of w, at most TILE, times blocks [0, blocks) from x on, n tokens; next as in
 * matmul_tile. */
PE_INLINE void amx_rows(int type, const pe_matrix *w, int64_t r, int64_t rows,
                        const split_group *x, int64_t blocks, int64_t n, float *y, int64_t ldy,
                        const uint8_t *next, amx_memory *m)
{
    const int64_t groups = pe_groups(w->cols);
    const int64_t group_bytes = bytes_of(type, PE_GROUP), row_bytes = bytes_of(type, w->cols);
    amx_step before = {.c = NULL};
    int at = 0;
    memset(m->y, 0, (size_t)blocks * sizeof m->y[0]);

    const uint8_t *row[TILE];
    for (int i = 0; i < TILE; i++)
        row[i] = (const uint8_t *)w->data + (r + pe_min(i, rows - 1)) * row_bytes;
    for (int64_t g = 0; g < groups; g++) {
        amx_codes *codes = &m->codes[g % 2];
        uint8_t last[TILE][BLOCKS * Q8_BYTES]; /* a short last group, filled up with zeros */
        if (w->cols < (g + 1) * PE_GROUP)
            for (int i = 0; i < TILE; i++) {
                memset(last[i], 0, sizeof last[i]);
                memcpy(last[i], row[i], (size_t)(row_bytes - g * group_bytes));
                row[i] = last[i];
            }
        if (next)
            prefetch2(next + g * TILE * group_bytes, TILE * group_bytes);
        pack_scales(type, row, w->scales ? w->scales + g * w->scale_ld + r : NULL, rows,
                    &codes->scales);
        for (int i = 0; i < TILE; i++) {
            unpack_row(type, row[i], codes->codes[i]);
            row[i] += group_bytes;
        }
        for (int64_t b = 0; b < blocks; b++)
            for (int half = 0; half <= is_blocks(type); half++, at ^= 1) {
                amx_step now = {m->sums[at], codes, x + b * groups + g, m->y[b], half};
                if (is_blocks(type))
                    sums_of_blocks(codes->codes + 16 * half, now.x, m->sums[at]);
                else
                    sums_of_group(codes->codes, now.x, m->sums[at]);
                if (before.c)
                    add_step(type, &before);
                before = now;
            }
    }
    add_step(type, &before);
    for (int64_t b = 0; b < blocks; b++)
        store_block(m->y[b], rows, pe_min(n - b * BLOCK_TOKENS, BLOCK_TOKENS),
                    y + b * BLOCK_TOKENS * ldy + r, ldy);
}

PE_INLINE void matmul_split(int type, const pe_matrix *w, int64_t row0, int64_t row1,
                            int64_t tokens, const void *split, float *y, int64_t ldy)
{
    const int64_t row_bytes = bytes_of(type, w->cols), groups = pe_groups(w->cols);
    const int64_t blocks = (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    amx_memory m;
    configure_tiles(is_blocks(type) ? PE_BLOCK : 64);
    for (int64_t r = row0; r < row1; r += TILE)
        for (int64_t b = 0; b < blocks; b += CHUNK_BLOCKS) {
            const uint8_t *next = (const uint8_t *)w->data + (r + TILE) * row_bytes;
            if (b > 0 || r + TILE >= row1)
                next = NULL;
            amx_rows(type, w, r, pe_min(TILE, row1 - r), (const split_group *)split + b * groups,
                     pe_min(CHUNK_BLOCKS, blocks - b), tokens - b * BLOCK_TOKENS,
                     y + b * BLOCK_TOKENS * ldy, ldy, next, &m);
        }
    release_tiles();
}

#define KERNEL(name, type)                                                                         \
    static void name(const pe_matrix *w, int64_t row0, int64_t row1, int64_t tokens,               \
                     const void *split, float *y, int64_t ldy)                                     \
    {                                                                                              \
        matmul_split(type, w, row0, row1, tokens, split, y, ldy);                                  \
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
    k->split_tokens = split_tokens;
    k->split_matmul[PE_Q8_0] = split_q8_0;
    k->split_matmul[PE_Q4_0] = split_q4_0;
    k->split_matmul[PE_Q4_1] = split_q4_1;
    k->split_matmul[PE_Q5_0] = split_q5_0;
    k->split_matmul[PE_Q5_1] = split_q5_1;
    k->split_matmul[PE_IQ4_NL] = split_iq4_nl;
    k->split_matmul[PE_MXFP4] = split_mxfp4;
    k->split_matmul[PE_INT8] = split_int8;
    k->split_matmul[PE_INT4] = split_int4;
}
