/* compensate_steps.h - the loops of compensate.c, the same C for every level, over vectors as wide
 * as the level's registers: see compensate_tiles.h for products.
 *
 * A vector holds neighbouring outputs, or rows of a matrix side by side, and every sum in a lane
 * has its terms in the order that pyengine.h states.  Several sums are in flight at once, because
 * each waits for its own previous addition; and they share what they load. */
#include "compensate_tiles.h"

#include <math.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* ---- rows side by side ----------------------------------------------------------------------- */

#define VECTORS 4                   /* of rows side by side */
#define ABREAST (VECTORS * DOUBLES) /* rows, one in each lane */
#define COLUMNS (REGISTERS / 8)     /* sums of each row at a time: half of the registers */

typedef double lanes[ABREAST] __attribute__((aligned(64)));

/* The sums of neighbouring columns; their number is a constant. */
typedef vec sums[COLUMNS][VECTORS];

PE_INLINE void load_sums(sums s, int columns, const lanes *from)
{
    for (int c = 0; c < columns; c++)
        for (int v = 0; v < VECTORS; v++)
            s[c][v] = ((const vec *)from[c])[v];
}

PE_INLINE void store_lanes(lanes to, const vec *from)
{
    for (int v = 0; v < VECTORS; v++)
        ((vec *)to)[v] = from[v];
}

/* Column c's sum with u[c, j] (*) e[j], j = from, from + step, ... before to; step is 1 or -1. */
PE_INLINE void column_terms(sums s, int columns, const double *u, int64_t ld, const lanes *e,
                            int64_t from, int64_t to, int step, int minus)
{
    for (int64_t j = from; j != to; j += step) {
        const vec *at = (const vec *)e[j];
        for (int c = 0; c < columns; c++)
            for (int v = 0; v < VECTORS; v++)
                s[c][v] = with_term(s[c][v], u[c * ld + j], at[v], minus);
    }
}

/* p[i, i + columns) of p[i] = (p[i] (-) (u[i, j] (*) p[j]), j ascending) (/) u[i, i]. */
PE_INLINE void rise(const double *u, int64_t ld, int64_t i, int columns, int divide, lanes *p)
{
    sums s;
    load_sums(s, columns, (const lanes *)(p + i));
    column_terms(s, columns, u + i * ld, ld, (const lanes *)p, 0, i, 1, 1);
    for (int c = 0; c < columns; c++) {
        const double *row = u + (i + c) * ld + i;
        for (int b = 0; b < c; b++)
            for (int v = 0; v < VECTORS; v++)
                s[c][v] = with_term(s[c][v], row[b], s[b][v], 1);
        if (divide)
            for (int v = 0; v < VECTORS; v++)
                s[c][v] /= row[c];
        store_lanes(p[i + c], s[c]);
    }
}

PE_INLINE void solve_rising(const double *u, int64_t ld, int64_t n, int divide, lanes *p)
{
    int64_t i = 0;
    for (; i + COLUMNS <= n; i += COLUMNS)
        rise(u, ld, i, COLUMNS, divide, p);
    for (; i < n; i++)
        rise(u, ld, i, 1, divide, p);
}

/* z[i, i + columns) of z[i] = z[i] (-) (u[i, j] (*) z[j]), j = n - 1 .. i + 1 descending. */
PE_INLINE void fall(const double *u, int64_t n, int64_t i, int columns, lanes *z)
{
    sums s;
    load_sums(s, columns, (const lanes *)(z + i));
    column_terms(s, columns, u + i * n, n, (const lanes *)z, n - 1, i + columns - 1, -1, 1);
    for (int c = columns - 1; c >= 0; c--) {
        for (int b = columns - 1; b > c; b--)
            for (int v = 0; v < VECTORS; v++)
                s[c][v] = with_term(s[c][v], u[(i + c) * n + i + b], s[b][v], 1);
        store_lanes(z[i + c], s[c]);
    }
}

static void solve_falling(const double *u, int64_t n, lanes *z)
{
    int64_t i = n;
    for (; i >= COLUMNS; i -= COLUMNS)
        fall(u, n, i - COLUMNS, COLUMNS, z);
    for (; i > 0; i--)
        fall(u, n, i - 1, 1, z);
}

/* ---- the factors ----------------------------------------------------------------------------- */

static void factor_rows(const pe_panel *f, int64_t begin, int64_t end)
{
    const int64_t n = f->n, columns = f->k1 - f->k0;
    lanes v[PE_PANEL];
    for (int64_t i = begin; i < end; i += ABREAST) {
        const int64_t rows = pe_min(ABREAST, end - i);
        double *below = f->h + i * n + f->k0, *beside = f->h + f->k0 * n + i;
        memset(v, 0, sizeof v);
        for (int64_t l = 0; l < rows; l++)
            for (int64_t k = 0; k < columns; k++)
                v[k][l] = below[l * n + k];
        solve_rising(f->u, PE_PANEL, columns, 0, v);
        for (int64_t l = 0; l < rows; l++)
            for (int64_t k = 0; k < columns; k++)
                below[l * n + k] = v[k][l];
        for (int64_t k = 0; k < columns; k++) {
            const double d = f->h[(f->k0 + k) * n + f->k0 + k];
            for (int64_t l = 0; l < rows; l++)
                beside[k * n + l] = v[k][l] / d;
        }
    }
}

/* Of a tile on the diagonal, what lies above is not read again before factor_rows replaces it. */
static void subtract_panel(const pe_panel *f, int64_t begin, int64_t end)
{
    const int64_t n = f->n, terms = f->k1 - f->k0;
    packed_strip s;
    for (int64_t i = begin; i < end; i += STRIP_ROWS) {
        const int64_t rows = pe_min(STRIP_ROWS, end - i);
        pack_rows(&s, f->h + i * n + f->k0, 1, n, terms, rows);
        for (int64_t j = f->k1; j < i + rows; j += TILE_WIDTH) {
            const int64_t width = pe_min(TILE_WIDTH, n - j);
            pack_columns(&s, f->h + f->k0 * n + j, n, terms, width);
            strip_columns(&s, j > i ? j - i : 0, rows, width, terms, 1, f->h + i * n + j, n);
        }
    }
}

/* ---- rounding -------------------------------------------------------------------------------- */

/* Scales of a group and what they give: the loss is that of the columns so far. */
typedef struct {
    lanes scale, divisor, used, loss;
} trial;

PE_INLINE double diagonal(const pe_rounding *r, int64_t i)
{
    return r->f ? r->f[i * r->n + i] : r->d[i];
}

/* x > largest ? largest : x, then x < -largest ? -largest : x. */
PE_INLINE vec clipped(vec x, double largest)
{
    const vec high = (vec){0} + largest, low = -high;
#if defined(PE_AVX512)
    return (vec)_mm512_max_pd((__m512d)low, _mm512_min_pd((__m512d)high, (__m512d)x));
#elif defined(__AVX2__)
    return (vec)_mm256_max_pd((__m256d)low, _mm256_min_pd((__m256d)high, (__m256d)x));
#elif defined(__SSE2__)
    return (vec)_mm_max_pd((__m128d)low, _mm_min_pd((__m128d)high, (__m128d)x));
#else
    for (int l = 0; l < DOUBLES; l++) {
        x[l] = x[l] > high[l] ? high[l] : x[l];
        x[l] = x[l] < low[l] ? low[l] : x[l];
    }
    return x;
#endif
}

/* One column: what it is to become, to its codes and to e, what is left of w. */
PE_INLINE void round_column(double d, double largest, const lanes goal, const lanes w, trial *s,
                            lanes e, lanes codes)
{
    const double round = 0x1.8p52;
    for (int v = 0; v < VECTORS; v++) {
        const vec wanted = ((const vec *)goal)[v];
        vec code = clipped(wanted / ((const vec *)s->divisor)[v], largest);
        code = ((code + round) - round) * ((const vec *)s->used)[v];
        const vec value = code * ((const vec *)s->scale)[v], left = wanted - value;
        ((vec *)codes)[v] = code;
        ((vec *)e)[v] = ((const vec *)w)[v] - value;
        ((vec *)s->loss)[v] += d * (left * left);
    }
}

/* Columns [i, i + columns) of a group that ends before stop: t has the terms from stop on. */
PE_INLINE void round_columns(const pe_rounding *r, const lanes *w, const lanes *t, int64_t i,
                             int columns, int64_t stop, trial *s, lanes *e, lanes *codes)
{
    const int64_t n = r->n;
    lanes goal[COLUMNS];
    if (r->f) {
        sums behind;
        load_sums(behind, columns, t);
        column_terms(behind, columns, r->f + i * n, n, (const lanes *)e, stop - 1, i + columns - 1,
                     -1, 0);
        for (int c = 0; c < columns; c++)
            store_lanes(goal[c], behind[c]);
    } else {
        memcpy(goal, t, (size_t)columns * sizeof *goal);
    }
    for (int c = columns - 1; c >= 0; c--) {
        round_column(diagonal(r, i + c), r->largest, goal[c], w[i + c], s, e[i + c], codes[c]);
        for (int b = 0; b < c && r->f; b++)
            for (int v = 0; v < VECTORS; v++) {
                vec *sum = (vec *)goal[b] + v;
                *sum = with_term(*sum, r->f[(i + b) * n + i + c], ((const vec *)e[i + c])[v], 0);
            }
    }
}

/* The codes of columns [first, stop) of ABREAST rows with these scales: t is what each column is to
 * become when the columns from `stop` on are done.  loss: see the contract. */
static void round_group(const pe_rounding *r, const lanes *w, const lanes *t, int64_t first,
                        int64_t stop, trial *s, lanes *e, lanes *codes)
{
    for (int l = 0; l < ABREAST; l++) {
        s->used[l] = s->scale[l] != 0.0 ? 1.0 : 0.0;
        s->divisor[l] = s->scale[l] != 0.0 ? s->scale[l] : 1.0;
        s->loss[l] = 0.0;
    }
    int64_t i = stop;
    for (; i - COLUMNS >= first; i -= COLUMNS) {
        const int64_t at = i - COLUMNS - first;
        round_columns(r, w, t + at, i - COLUMNS, COLUMNS, stop, s, e, codes + at);
    }
    for (; i > first; i--)
        round_columns(r, w, t + (i - 1 - first), i - 1, 1, stop, s, e, codes + (i - 1 - first));
}

static int32_t first_scales(const pe_rounding *r, const lanes *t, int64_t n, uint16_t *absmax)
{
    lanes amax = {0}, unfit = {0};
    for (int64_t i = 0; i < n; i++)
        for (int l = 0; l < ABREAST; l++) {
            const double magnitude = fabs(t[i][l]);
            unfit[l] += magnitude < INFINITY ? 0.0 : 1.0;
            amax[l] = magnitude > amax[l] ? magnitude : amax[l];
        }
    for (int l = 0; l < ABREAST; l++) {
        if (unfit[l] != 0.0)
            return PE_ERROR_NONFINITE;
        absmax[l] = pe_f16_nearest(amax[l] / r->largest);
        if (absmax[l] == 0 && amax[l] > 0.0)
            absmax[l] = 1;
        if (absmax[l] >= PE_F16_INFINITY)
            return PE_ERROR_NONFINITE;
    }
    return PE_OK;
}

static void best_scales(const pe_rounding *r, const lanes *w, const lanes *t, int64_t first,
                        int64_t stop, const uint16_t *absmax, lanes *e, lanes *codes,
                        uint16_t *best)
{
    lanes least;
    for (int l = 0; l < ABREAST; l++)
        least[l] = INFINITY;
    for (int c = 0; c < PE_ROUND_CANDIDATES; c++) {
        uint16_t candidate[ABREAST];
        trial s;
        for (int l = 0; l < ABREAST; l++) {
            const double whole = (double)pe_f16_to_float(absmax[l]);
            candidate[l] = pe_f16_nearest(whole * ((32 - c) / 32.0));
            s.scale[l] = (double)pe_f16_to_float(candidate[l]);
        }
        round_group(r, w, t, first, stop, &s, e, codes);
        for (int l = 0; l < ABREAST; l++) {
            if (s.loss[l] < least[l] && (candidate[l] || !absmax[l])) {
                least[l] = s.loss[l];
                best[l] = candidate[l];
            }
        }
    }
}

/* t of columns [first, stop) with the terms from stop on. */
static void start_group(const pe_rounding *r, const lanes *w, const lanes *e, int64_t first,
                        int64_t stop, lanes *t)
{
    const int64_t n = r->n;
    int64_t i = first;
    sums s;
    for (; r->f && i + COLUMNS <= stop; i += COLUMNS) {
        load_sums(s, COLUMNS, w + i);
        column_terms(s, COLUMNS, r->f + i * n, n, e, n - 1, stop - 1, -1, 0);
        for (int c = 0; c < COLUMNS; c++)
            store_lanes(t[i - first + c], s[c]);
    }
    for (; i < stop; i++) {
        load_sums(s, 1, w + i);
        if (r->f)
            column_terms(s, 1, r->f + i * n, n, e, n - 1, stop - 1, -1, 0);
        store_lanes(t[i - first], s[0]);
    }
}

/* w + b H^-1: b becomes p, then z. */
static void add_correction(const pe_rounding *r, lanes *b, lanes *w)
{
    solve_rising(r->f, r->n, r->n, 1, b);
    solve_falling(r->f, r->n, b);
    for (int64_t i = 0; i < r->n; i++)
        for (int l = 0; l < ABREAST; l++)
            w[i][l] += b[i][l];
}

static int32_t round_rows(const pe_rounding *r, int64_t row0, double *memory)
{
    const int64_t n = r->n, groups = (n + r->group - 1) / r->group;
    const int64_t rows = pe_min(ABREAST, r->rows - row0);
    lanes *w = (lanes *)memory, *e = w + n, *t = e + n, *codes = t + r->group;
    memset(memory, 0, (size_t)(2 * n + 2 * r->group) * sizeof *w);
    for (int64_t l = 0; l < rows; l++)
        for (int64_t i = 0; i < n; i++)
            w[i][l] = (double)r->w[(row0 + l) * n + i];
    if (r->b) {
        for (int64_t l = 0; l < rows; l++)
            for (int64_t i = 0; i < n; i++)
                e[i][l] = r->b[(row0 + l) * n + i];
        add_correction(r, e, w);
    }
    for (int64_t g = groups - 1; g >= 0; g--) {
        const int64_t first = g * r->group, stop = pe_min(first + r->group, n);
        uint16_t absmax[ABREAST], best[ABREAST] = {0};
        trial s;
        start_group(r, (const lanes *)w, (const lanes *)e, first, stop, t);
        const int32_t status = first_scales(r, (const lanes *)t, stop - first, absmax);
        if (status)
            return status;
        best_scales(r, (const lanes *)w, (const lanes *)t, first, stop, absmax, e, codes, best);
        for (int l = 0; l < ABREAST; l++)
            s.scale[l] = (double)pe_f16_to_float(best[l]);
        round_group(r, (const lanes *)w, (const lanes *)t, first, stop, &s, e, codes);
        for (int64_t l = 0; l < rows; l++) {
            for (int64_t i = first; i < stop; i++)
                r->codes[(row0 + l) * n + i] = (int8_t)codes[i - first][l];
            r->scales[(row0 + l) * groups + g] = best[l];
        }
    }
    return PE_OK;
}

PE_INLINE void fill_compensate(pe_kernels *k)
{
    k->products_rows = products_rows;
    k->squares_columns = squares_columns;
    k->factor_rows = factor_rows;
    k->subtract_panel = subtract_panel;
    k->rows_rounded = ABREAST;
    k->round_rows = round_rows;
}
