/* rope.c - see pe_rope_table and pe_rope in pyengine.h.  One definition serves every level: the
 * table is made once per forward pass, and the rotation is two products per element. */
#include "kernels.h"

/* pi/2 in three parts; the first two have 28 bits, so that times k < 2^25 they are exact. */
#define PI_2_HI 0x1.921fb54p+0
#define PI_2_MID 0x1.10b461p-30
#define PI_2_LO 0x1.a62633145c06ep-58
#define MAX_POSITION (INT64_C(1) << 24) /* a float32 still holds it, and k its 28 bits */
#define TWO_OVER_PI 0x1.45f306dc9c883p-1

/* Taylor about 0, |r| <= pi/4: error below 2^-53. */
static double sin_near_zero(double r)
{
    double z = r * r, p = 0.0;
    for (int n = 17; n >= 3; n -= 2)
        p = (p + 1.0) * (-z / (double)(n * (n - 1)));
    return r + r * p;
}

static double cos_near_zero(double r)
{
    double z = r * r, p = 0.0;
    for (int n = 18; n >= 2; n -= 2)
        p = (p + 1.0) * (-z / (double)(n * (n - 1)));
    return 1.0 + p;
}

static void sin_cos(double angle, float *sin_value, float *cos_value)
{
    int64_t k = (int64_t)(angle * TWO_OVER_PI + 0.5);
    double hi = angle - (double)k * PI_2_HI; /* exact: the leading bits cancel */
    double mid = (double)k * PI_2_MID;
    double r = hi - mid;
    double lost = (hi - r) - mid;
    r += lost - (double)k * PI_2_LO;
    double s = sin_near_zero(r), c = cos_near_zero(r);
    switch (k & 3) {
    case 0:
        *sin_value = (float)s;
        *cos_value = (float)c;
        break;
    case 1:
        *sin_value = (float)c;
        *cos_value = (float)-s;
        break;
    case 2:
        *sin_value = (float)-s;
        *cos_value = (float)-c;
        break;
    default:
        *sin_value = (float)-c;
        *cos_value = (float)s;
    }
}

typedef struct {
    int64_t start;
    const float *inv_freq;
    int64_t half;
    float *cos_table, *sin_table;
} table_args;

static int32_t table_rows(void *arg, int64_t begin, int64_t end)
{
    const table_args *a = arg;
    for (int64_t i = 0; i < a->half; i++)
        if (!(a->inv_freq[i] > 0.0f && a->inv_freq[i] <= 1.0f))
            return PE_ERROR_ARGUMENT;
    for (int64_t t = begin; t < end; t++)
        for (int64_t i = 0; i < a->half; i++)
            sin_cos((double)(a->start + t) * (double)a->inv_freq[i], a->sin_table + t * a->half + i,
                    a->cos_table + t * a->half + i);
    return PE_OK;
}

int32_t pe_rope_table(int64_t start, int64_t tokens, const float *inv_freq, int64_t half,
                      float *cos_table, float *sin_table)
{
    if (start < 0 || start > MAX_POSITION || tokens < 0 || tokens > MAX_POSITION - start ||
        half < 1)
        return PE_ERROR_ARGUMENT;
    table_args a = {start, inv_freq, half, cos_table, sin_table};
    return pe_run_alone(table_rows, &a, tokens);
}

typedef struct {
    float *x;
    int64_t heads, n, half;
    const float *cos_table, *sin_table;
} rope_args;

static int32_t rotate_vectors(void *arg, int64_t begin, int64_t end)
{
    const rope_args *a = arg;
    for (int64_t v = begin; v < end; v++) {
        float *x = a->x + v * a->n;
        const float *c = a->cos_table + v / a->heads * a->half;
        const float *s = a->sin_table + v / a->heads * a->half;
        for (int64_t i = 0; i < a->half; i++) {
            float x1 = x[i], x2 = x[i + a->half];
            x[i] = x1 * c[i] - x2 * s[i];
            x[i + a->half] = x2 * c[i] + x1 * s[i];
        }
    }
    return PE_OK;
}

int32_t pe_rope(pe_pool *pool, float *x, int64_t tokens, int64_t heads, int64_t n, int64_t half,
                const float *cos_table, const float *sin_table)
{
    if (tokens < 0 || heads < 1 || half < 0 || half > n / 2)
        return PE_ERROR_ARGUMENT;
    rope_args a = {x, heads, n, half, cos_table, sin_table};
    return pe_pool_run(pool, rotate_vectors, &a, tokens * heads, 16);
}
