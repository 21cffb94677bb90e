/* screen.c - see pe_screen_rows and pe_screen in pyengine.h. */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>

#define BLOCK_BYTES 22     /* of Q5_0 */
#define MOST_NORM 0x1p60   /* of a row: below it no product overflows */
#define LARGEST_CODE 15

/* ---- the rows, and how far they are from the weights ------------------------------------------ */

typedef struct {
    pe_matrix w;
    int64_t row0;
    uint8_t *data;
    float *error, *norm;
} rows_args;

static uint16_t scale_of(const float *x)
{
    const float most = pe_bits_to_float(pe_active.greatest_magnitude(x, PE_BLOCK));
    const uint16_t scale = pe_f16_nearest((double)most / LARGEST_CODE);
    return scale < PE_F16_INFINITY ? scale : PE_F16_INFINITY - 1;
}

/* The lowest bits of eight bytes, which hold 0 or 1, as one byte: each is multiplied to its place in the
 * top byte. */
static uint32_t low_bits(uint64_t bytes)
{
    return (uint32_t)((bytes * UINT64_C(0x0102040810204080)) >> 56);
}

static void pack(const int8_t *code, uint16_t scale, uint8_t *block)
{
    uint8_t five[PE_BLOCK], top[PE_BLOCK]; /* code + 16; its fifth bit */
    for (int i = 0; i < PE_BLOCK; i++) {
        five[i] = (uint8_t)(code[i] + 16);
        top[i] = five[i] >> 4;
    }
    memcpy(block, &scale, sizeof scale);
    for (int i = 0; i < PE_BLOCK / 8; i++) {
        uint64_t bytes = 0;
        for (int j = 0; j < 8; j++)
            bytes |= (uint64_t)top[8 * i + j] << 8 * j;
        block[2 + i] = (uint8_t)low_bits(bytes);
    }
    for (int i = 0; i < 16; i++)
        block[6 + i] = (uint8_t)((five[i] & 15) | five[i + 16] << 4);
}

/* Adds the squares of x and of x - code * s.  The product is exact: 5 bits times 11. */
static void add_squares(const float *x, const int8_t *code, float s, double squares[8],
                        double errors[8])
{
    float value[PE_BLOCK];
    for (int i = 0; i < PE_BLOCK; i++)
        value[i] = (float)code[i] * s;
    for (int i = 0; i < PE_BLOCK; i += 8) {
        for (int j = 0; j < 8; j++) {
            const double v = (double)x[i + j], error = v - (double)value[i + j];
            squares[j] += v * v;
            errors[j] += error * error;
        }
    }
}

/* A float32 that is no less than the root that a sum of rounded squares stands for. */
static float rounded_up(double root) { return (float)(root * (1.0 + 0x1p-22) + 0x1p-120); }

static int32_t screen_row(const rows_args *a, int64_t i, float *x)
{
    const int64_t cols = a->w.cols;
    const pe_weight_type *type = pe_type(a->w.type);
    const int64_t row_bytes = cols / type->block_cols * type->block_bytes;
    double squares[8] = {0}, errors[8] = {0};
    uint8_t *block = a->data + i * (cols / PE_BLOCK) * BLOCK_BYTES;
    type->load((const char *)a->w.data + (a->row0 + i) * row_bytes, cols, x);
    if (!pe_all_finite(x, cols))
        return PE_ERROR_NONFINITE;
    for (int64_t c = 0; c < cols; c += PE_BLOCK, block += BLOCK_BYTES) {
        int8_t code[PE_BLOCK];
        const uint16_t scale = scale_of(x + c);
        const float s = pe_f16_to_float(scale);
        if (scale)
            pe_active.encode_group(x + c, PE_BLOCK, (double)s, LARGEST_CODE, code);
        else
            memset(code, 0, sizeof code);
        add_squares(x + c, code, s, squares, errors);
        pack(code, scale, block);
    }
    const double norm = sqrt(pe_tree8(squares));
    if (!(norm < MOST_NORM))
        return PE_ERROR_NONFINITE;
    a->norm[i] = rounded_up(norm);
    a->error[i] = rounded_up(sqrt(pe_tree8(errors)));
    return PE_OK;
}

static int32_t screen_rows(void *arg, int64_t begin, int64_t end)
{
    const rows_args *a = arg;
    float *x = malloc((size_t)a->w.cols * sizeof *x);
    if (!x)
        return PE_ERROR_MEMORY;
    int32_t status = PE_OK;
    for (int64_t i = begin; i < end && !status; i++)
        status = screen_row(a, i, x);
    free(x);
    return status;
}

int32_t pe_screen_rows(pe_pool *pool, const pe_matrix *w, int64_t row0, int64_t row1, uint8_t *data,
                       float *error, float *norm)
{
    int32_t status = pe_matrix_check(w);
    if (status)
        return status;
    if (!pe_type(w->type)->load || w->cols % PE_BLOCK || row0 < 0 || row1 > w->rows || row0 > row1)
        return PE_ERROR_ARGUMENT;
    rows_args a = {*w, row0, data, error, norm};
    return pe_pool_run(pool, screen_rows, &a, row1 - row0, 8);
}

/* ---- the rows that can still win --------------------------------------------------------------- */

typedef struct {
    const float *s, *error, *norm;
    float a, b, c, low;
    uint8_t *keep;
} screen_args;

static void screen(const screen_args *k, int64_t begin, int64_t end)
{
    const float *restrict s = k->s, *restrict error = k->error, *restrict norm = k->norm;
    uint8_t *restrict keep = k->keep;
    for (int64_t r = begin; r < end; r++)
        keep[r] = s[r] + (error[r] * k->a + norm[r] * k->b + k->c) >= k->low;
}

static int32_t screen_part(void *arg, int64_t begin, int64_t end)
{
    screen(arg, begin, end);
    return PE_OK;
}

int32_t pe_screen(pe_pool *pool, const float *s, const float *error, const float *norm,
                  int64_t rows, float a, float b, float c, float low, uint8_t *keep)
{
    if (rows < 0)
        return PE_ERROR_ARGUMENT;
    screen_args k = {s, error, norm, a, b, c, low, keep};
    return pe_pool_run(pool, screen_part, &k, rows, 4096);
}
