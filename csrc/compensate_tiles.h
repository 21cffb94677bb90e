/* compensate_tiles.h - sums of products of two matrices, in tiles, for every level: vectors are as
 * wide as the level's registers.
 *
 * A vector holds neighbouring outputs; each has its terms in the order that pyengine.h states.  The
 * sums of a tile stay in registers, and each load serves several of them.  Matrices whose rows lie
 * a power of two apart take few sets of the cache, so what a tile reads is packed first. */
#include "kernels.h"

#if defined(PE_AVX512)
#define DOUBLES 8
#define REGISTERS 32
#elif defined(__AVX2__)
#define DOUBLES 4
#define REGISTERS 16
#elif defined(PE_NEON)
#define DOUBLES 2
#define REGISTERS 32
#else
#define DOUBLES 2
#define REGISTERS 16
#endif

typedef double vec __attribute__((vector_size(8 * DOUBLES), may_alias));
typedef double vec_anywhere __attribute__((vector_size(8 * DOUBLES), may_alias, aligned(8)));

/* ---- tiles ----------------------------------------------------------------------------------- */

#define TILE_ROWS (REGISTERS / 4) /* half of the registers are sums */
#define TILE_WIDTH (2 * DOUBLES)
#define STRIP_ROWS 64   /* rows that use a packed part of b before the next is packed */
#define STRIP_TERMS 128 /* terms packed at a time */

typedef struct {
    _Alignas(64) double a[STRIP_ROWS * STRIP_TERMS]; /* [row / TILE_ROWS, term, row % TILE_ROWS] */
    _Alignas(64) double b[STRIP_TERMS * TILE_WIDTH]; /* [term, column] */
} packed_strip;

_Static_assert(STRIP_TERMS >= PE_PANEL, "a panel is one strip");

/* sum (+) x (*) y, or sum (-) x (*) y; minus is a constant. */
PE_INLINE vec with_term(vec sum, double x, vec y, int minus)
{
    const vec term = x * y;
    return minus ? sum - term : sum + term;
}

/* out[r, c] with the terms of a and b, t ascending. */
PE_INLINE void whole_tile(const double *a, const double *b, int64_t terms, int minus, double *out,
                          int64_t ld)
{
    vec sum[TILE_ROWS][2];
    for (int r = 0; r < TILE_ROWS; r++)
        for (int v = 0; v < 2; v++)
            sum[r][v] = *(const vec_anywhere *)(out + r * ld + v * DOUBLES);
    for (int64_t t = 0; t < terms; t++) {
        const vec left = ((const vec *)b)[2 * t], right = ((const vec *)b)[2 * t + 1];
        for (int r = 0; r < TILE_ROWS; r++) {
            const double x = a[t * TILE_ROWS + r];
            sum[r][0] = with_term(sum[r][0], x, left, minus);
            sum[r][1] = with_term(sum[r][1], x, right, minus);
        }
    }
    for (int r = 0; r < TILE_ROWS; r++)
        for (int v = 0; v < 2; v++)
            *(vec_anywhere *)(out + r * ld + v * DOUBLES) = sum[r][v];
}

/* Of a tile that is not whole; the packed values beyond it are 0. */
PE_INLINE void part_tile(const double *a, const double *b, int64_t terms, int minus, double *out,
                         int64_t ld, int64_t rows, int64_t width)
{
    double part[TILE_ROWS * TILE_WIDTH] = {0};
    for (int64_t r = 0; r < rows; r++)
        memcpy(part + r * TILE_WIDTH, out + r * ld, (size_t)width * sizeof *part);
    whole_tile(a, b, terms, minus, part, TILE_WIDTH);
    for (int64_t r = 0; r < rows; r++)
        memcpy(out + r * ld, part + r * TILE_WIDTH, (size_t)width * sizeof *part);
}

/* Neighbouring columns, width of them, of rows [row0, row1) of a strip. */
PE_INLINE void strip_columns(const packed_strip *s, int64_t row0, int64_t row1, int64_t width,
                             int64_t terms, int minus, double *out, int64_t ld)
{
    for (int64_t i = row0 / TILE_ROWS * TILE_ROWS; i < row1; i += TILE_ROWS) {
        const double *a = s->a + i * terms;
        if (width == TILE_WIDTH && i + TILE_ROWS <= row1)
            whole_tile(a, s->b, terms, minus, out + i * ld, ld);
        else
            part_tile(a, s->b, terms, minus, out + i * ld, ld, pe_min(TILE_ROWS, row1 - i), width);
    }
}

PE_INLINE void pack_columns(packed_strip *s, const double *b, int64_t ld, int64_t terms,
                            int64_t width)
{
    for (int64_t t = 0; t < terms; t++) {
        double *to = s->b + t * TILE_WIDTH;
        for (int l = 0; l < TILE_WIDTH; l++)
            to[l] = l < width ? b[t * ld + l] : 0.0;
    }
}

/* a[t, i] at a + t * step_t + i * step_i. */
PE_INLINE void pack_rows(packed_strip *s, const double *a, int64_t step_t, int64_t step_i,
                         int64_t terms, int64_t rows)
{
    for (int64_t i = 0; i < rows; i += TILE_ROWS)
        for (int64_t t = 0; t < terms; t++)
            for (int64_t r = i; r < i + TILE_ROWS; r++)
                s->a[i * terms + t * TILE_ROWS + r - i] =
                    r < rows ? a[t * step_t + r * step_i] : 0.0;
}

static void products_rows(const pe_products *p, int64_t begin, int64_t end)
{
    packed_strip s;
    for (int64_t i = begin; i < end; i += STRIP_ROWS) {
        const int64_t rows = pe_min(STRIP_ROWS, end - i), stop = p->lower ? i + rows : p->n;
        for (int64_t t = 0; t < p->tokens; t += STRIP_TERMS) {
            const int64_t terms = pe_min(STRIP_TERMS, p->tokens - t);
            pack_rows(&s, p->a + t * p->m + i, p->m, 1, terms, rows);
            for (int64_t j = 0; j < stop; j += TILE_WIDTH) {
                const int64_t width = pe_min(TILE_WIDTH, p->n - j);
                pack_columns(&s, p->b + t * p->n + j, p->n, terms, width);
                strip_columns(&s, p->lower && j > i ? j - i : 0, rows, width, terms, 0,
                              p->out + i * p->n + j, p->n);
            }
        }
    }
}

/* Four tokens for each load of a sum. */
static void squares_columns(const float *x, int64_t tokens, int64_t n, int64_t begin, int64_t end,
                            double *sums)
{
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4)
        for (int64_t j = begin; j < end; j++) {
            const float *at = x + t * n + j;
            const double a = at[0], b = at[n], c = at[2 * n], d = at[3 * n];
            sums[j] = (((sums[j] + a * a) + b * b) + c * c) + d * d;
        }
    for (; t < tokens; t++)
        for (int64_t j = begin; j < end; j++)
            sums[j] += (double)x[t * n + j] * x[t * n + j];
}
