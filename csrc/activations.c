/* activations.c - exp, sigmoid, silu, softplus: the float32 nearest to the exact value.
 *
 * Each is first computed in float64 with a relative error below 2^-51.  If the value plus and minus
 * 2^-50 of it rounds to one float32, that float32 is the result.  About one argument in 2^24 (half
 * of all arguments where silu is subnormal) is too near a rounding boundary and is computed again
 * in double-double (about 100 bits).  exp and log of the C library are not called: C libraries
 * differ.
 *
 * tools/check/exhaustive_math.py checks all 2^32 arguments of each function on every level.
 */
#include "exp_steps.h"
#include "kernels.h"

#include <math.h>

#define LN2_MID 0x1.a39ef356p-33 /* LN2_REST in two parts, for double-double */
#define LN2_LO 0x1.93c7673007e5fp-65

static double pow2(int64_t k)
{
    uint64_t bits = (uint64_t)(k + 1023) << 52;
    double v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

static double nearest_integer(double v) { return (v + ROUND_TO_INTEGER) - ROUND_TO_INTEGER; }

/* ---- float64, relative error below 2^-51 ----------------------------------------------------- */

/* e^x, -708 <= x <= 709, by its Taylor series about a multiple of ln 2. */
static double exp_fast(double x)
{
    double k = nearest_integer(x * LOG2_E);
    double r = (x - k * LN2_HI) - k * LN2_REST;
    double p = INVERSE_FACTORIAL_13;
    static const double inverse_factorial[] = INVERSE_FACTORIALS;
    for (int i = 0; i < N_INVERSE_FACTORIALS; i++)
        p = p * r + inverse_factorial[i];
    return (1.0 + (r + r * r * p)) * pow2((int64_t)k);
}

/* 2 atanh(s), |s| <= 0.172. */
static double twice_atanh(double s)
{
    double z = s * s, p = 1.0 / 27.0;
    for (int k = 25; k >= 3; k -= 2)
        p = p * z + 1.0 / k;
    return 2.0 * (s + s * z * p);
}

/* log(1 + e), 0 < e < 2^30. */
static double log1p_fast(double e)
{
    if (e < 0.25)
        return twice_atanh(e / (2.0 + e));
    double u = 1.0 + e;
    double lost = e < 1.0 ? e - (u - 1.0) : 1.0 - (u - e);
    uint64_t bits;
    memcpy(&bits, &u, sizeof bits);
    int64_t k = (int64_t)(bits >> 52) - 1023;
    double m = u * pow2(-k); /* in [1, 2) */
    if (m > 1.4142135623730951) {
        m *= 0.5;
        k++;
    }
    double log_m = twice_atanh((m - 1.0) / (m + 1.0));
    return (double)k * LN2_HI + (log_m + ((double)k * LN2_REST + lost / u));
}

/* ---- double-double --------------------------------------------------------------------------- */

typedef struct {
    double hi, lo; /* the value is hi + lo, and hi is the float64 nearest to it */
} dd;

static dd two_sum(double a, double b)
{
    double s = a + b, t = s - a;
    return (dd){s, (a - (s - t)) + (b - t)};
}

/* Dekker's product: exact without a fused multiply-add, which some levels do not have. */
static dd two_product(double a, double b)
{
    double p = a * b;
    double ca = 134217729.0 * a, cb = 134217729.0 * b;
    double ah = ca - (ca - a), bh = cb - (cb - b);
    double al = a - ah, bl = b - bh;
    return (dd){p, ((ah * bh - p) + ah * bl + al * bh) + al * bl};
}

static dd dd_add(dd a, dd b)
{
    dd s = two_sum(a.hi, b.hi), t = two_sum(a.lo, b.lo);
    dd u = two_sum(s.hi, s.lo + t.hi);
    return two_sum(u.hi, u.lo + t.lo);
}

static dd dd_mul(dd a, dd b)
{
    dd p = two_product(a.hi, b.hi);
    return two_sum(p.hi, p.lo + (a.hi * b.lo + a.lo * b.hi));
}

static dd dd_neg(dd a) { return (dd){-a.hi, -a.lo}; }

static dd dd_div(dd a, dd b)
{
    double q0 = a.hi / b.hi;
    dd r = dd_add(a, dd_neg(dd_mul(b, (dd){q0, 0.0})));
    double q1 = r.hi / b.hi;
    r = dd_add(r, dd_neg(dd_mul(b, (dd){q1, 0.0})));
    dd q = two_sum(q0, q1);
    return two_sum(q.hi, q.lo + r.hi / b.hi);
}

static dd dd_exp(dd x)
{
    double k = nearest_integer(x.hi * LOG2_E);
    dd r = dd_add(x, two_sum(-k * LN2_HI, -k * LN2_MID));
    r = dd_add(r, (dd){-k * LN2_LO, 0.0});
    dd s = {1.0, 0.0};
    for (int n = 27; n >= 1; n--) /* 1 + r/1 (1 + r/2 (1 + ...)) */
        s = dd_add((dd){1.0, 0.0}, dd_mul(dd_div(r, (dd){n, 0.0}), s));
    double scale = pow2((int64_t)k);
    return (dd){s.hi * scale, s.lo * scale};
}

/* log(1 + e): a Newton step from float64, or the series where 1 + e would lose most bits of e. */
static dd dd_log1p(dd e)
{
    if (e.hi < 0x1p-40) {
        dd cube = dd_div(e, (dd){3.0, 0.0});
        dd half = dd_add((dd){0.5, 0.0}, dd_neg(cube));
        return dd_add(e, dd_neg(dd_mul(dd_mul(e, e), half)));
    }
    dd y = {log1p_fast(e.hi), 0.0};
    dd ratio = dd_mul(dd_add((dd){1.0, 0.0}, e), dd_exp(dd_neg(y)));
    return dd_add(y, dd_add(ratio, (dd){-1.0, 0.0}));
}

/* One rounding.  If lo is not zero, the last bit of hi is made odd first, so that the conversion
 * rounds to the correct side of a boundary. */
static float dd_round(dd v)
{
    uint64_t bits;
    memcpy(&bits, &v.hi, sizeof bits);
    if (v.lo != 0.0) {
        if ((v.lo < 0.0) != (v.hi < 0.0))
            bits -= 1;
        bits |= 1;
    }
    memcpy(&v.hi, &bits, sizeof bits);
    return (float)v.hi;
}

/* ---- one value ------------------------------------------------------------------------------- */

/* Whether v, with a relative error of 2^-50, can round to one float32 only. */
static int settled(double v)
{
    return (float)(v * (1.0 - 0x1p-50)) == (float)(v * (1.0 + 0x1p-50));
}

static double clamp(double x, double low, double high)
{
    return x < low ? low : x > high ? high : x;
}

float pe_exp_exact(float x)
{
    double c = clamp(x, -200.0, 100.0); /* beyond: 0 and infinity all the same */
    return dd_round(dd_exp((dd){c, 0.0}));
}

static dd one_plus_exp_neg(double x) { return dd_add((dd){1.0, 0.0}, dd_exp((dd){-x, 0.0})); }

float pe_sigmoid_exact(float x)
{
    return dd_round(dd_div((dd){1.0, 0.0}, one_plus_exp_neg(clamp(x, -200.0, 200.0))));
}

float pe_silu_exact(float x)
{
    return dd_round(dd_div((dd){x, 0.0}, one_plus_exp_neg(clamp(x, -400.0, 400.0))));
}

static float exp1(float x)
{
    if (x != x)
        return x + x;
    double v = exp_fast(clamp(x, -200.0, 100.0));
    return settled(v) ? (float)v : pe_exp_exact(x);
}

static float sigmoid1(float x)
{
    if (x != x)
        return x + x;
    double v = 1.0 / (1.0 + exp_fast(-clamp(x, -200.0, 200.0)));
    return settled(v) ? (float)v : pe_sigmoid_exact(x);
}

static float silu1(float x)
{
    if (x != x)
        return x + x;
    if (x == -INFINITY) /* the limit; as an expression it would be inf / inf */
        return -0.0f;
    double v = (double)x / (1.0 + exp_fast(-clamp(x, -400.0, 400.0)));
    return settled(v) ? (float)v : pe_silu_exact(x);
}

static float softplus1(float x)
{
    if (x != x)
        return x + x;
    if (x > 20.0f)
        return x;
    double c = clamp(x, -200.0, 20.0);
    double v = log1p_fast(exp_fast(c));
    return settled(v) ? (float)v : dd_round(dd_log1p(dd_exp((dd){c, 0.0})));
}

/* ---- kernels --------------------------------------------------------------------------------- */

static void exp_each(const float *x, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = exp1(x[i]);
}

static void sigmoid_each(const float *x, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = sigmoid1(x[i]);
}

static void silu_each(const float *x, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = silu1(x[i]);
}

static void softplus_each(const float *x, int64_t n, float *y)
{
    for (int64_t i = 0; i < n; i++)
        y[i] = softplus1(x[i]);
}

void pe_fill_scalar_activations(pe_kernels *k)
{
    k->exp = exp_each;
    k->sigmoid = sigmoid_each;
    k->silu = silu_each;
    k->softplus = softplus_each;
}

/* ---- the operations -------------------------------------------------------------------------- */

typedef struct {
    void (*function)(const float *x, int64_t n, float *y);
    const float *x;
    const float *other; /* silu_mul: up; sigmoid_mul: the gate */
    int64_t n, ld_other;
    float *y;
} each_args;

static int32_t each_range(void *arg, int64_t begin, int64_t end)
{
    const each_args *e = arg;
    e->function(e->x + begin, end - begin, e->y + begin);
    return PE_OK;
}

static int32_t each(pe_pool *pool, void (*function)(const float *, int64_t, float *),
                    const float *x, int64_t n, float *y)
{
    if (n < 0)
        return PE_ERROR_ARGUMENT;
    each_args e = {.function = function, .x = x, .y = y};
    return pe_pool_run(pool, each_range, &e, n, 1024);
}

int32_t pe_exp(pe_pool *pool, const float *x, int64_t n, float *y)
{
    return each(pool, pe_active.exp, x, n, y);
}

int32_t pe_sigmoid(pe_pool *pool, const float *x, int64_t n, float *y)
{
    return each(pool, pe_active.sigmoid, x, n, y);
}

int32_t pe_silu(pe_pool *pool, const float *x, int64_t n, float *y)
{
    return each(pool, pe_active.silu, x, n, y);
}

int32_t pe_softplus(pe_pool *pool, const float *x, int64_t n, float *y)
{
    return each(pool, pe_active.softplus, x, n, y);
}

#define PIECE 256

static int32_t add_range(void *arg, int64_t begin, int64_t end)
{
    const each_args *e = arg;
    for (int64_t i = begin; i < end; i++)
        e->y[i] = e->x[i] + e->other[i];
    return PE_OK;
}

int32_t pe_add(pe_pool *pool, const float *a, const float *b, int64_t n, float *y)
{
    if (n < 0)
        return PE_ERROR_ARGUMENT;
    each_args e = {.x = a, .other = b, .y = y};
    return pe_pool_run(pool, add_range, &e, n, 1 << 14);
}

static int32_t silu_mul_range(void *arg, int64_t begin, int64_t end)
{
    const each_args *e = arg;
    float gate[PIECE];
    for (int64_t i = begin; i < end; i += PIECE) {
        int64_t n = pe_min(PIECE, end - i);
        pe_active.silu(e->x + i, n, gate);
        for (int64_t j = 0; j < n; j++)
            e->y[i + j] = gate[j] * e->other[i + j];
    }
    return PE_OK;
}

int32_t pe_silu_mul(pe_pool *pool, const float *gate, const float *up, int64_t n, float *y)
{
    if (n < 0)
        return PE_ERROR_ARGUMENT;
    each_args e = {.x = gate, .other = up, .y = y};
    return pe_pool_run(pool, silu_mul_range, &e, n, 1024);
}

static int32_t sigmoid_mul_rows(void *arg, int64_t begin, int64_t end)
{
    const each_args *e = arg;
    float gate[PIECE];
    for (int64_t r = begin; r < end; r++) {
        for (int64_t i = 0; i < e->n; i += PIECE) {
            int64_t n = pe_min(PIECE, e->n - i);
            const float *x = e->x + r * e->n + i;
            float *y = e->y + r * e->n + i;
            pe_active.sigmoid(e->other + r * e->ld_other + i, n, gate);
            for (int64_t j = 0; j < n; j++)
                y[j] = x[j] * gate[j];
        }
    }
    return PE_OK;
}

int32_t pe_sigmoid_mul(pe_pool *pool, const float *x, const float *gate, int64_t ld_gate,
                       int64_t rows, int64_t n, float *y)
{
    if (rows < 0 || n < 1)
        return PE_ERROR_ARGUMENT;
    each_args e = {.x = x, .other = gate, .n = n, .ld_other = ld_gate, .y = y};
    return pe_pool_run(pool, sigmoid_mul_rows, &e, rows, 4);
}
