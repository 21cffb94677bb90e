/* matmul.c - scalar, normative: see pe_matmul in pyengine.h.
 *
 * F32, F16, BF16, INT8 and INT4 are here; another weight type has a file of its own:
 * matmul_blocks32.c.
 */
#include "kernels.h"

/* Columns of group g, the last of which may be short. */
static int64_t group_end(int64_t g, int64_t cols) { return pe_min((g + 1) * PE_GROUP, cols); }

/* The code of column c in one row. */
typedef int32_t code_at(const void *row, int64_t c);

static int32_t int8_at(const void *row, int64_t c) { return ((const int8_t *)row)[c]; }

static int32_t int4_at(const void *row, int64_t c)
{
    uint8_t pair = ((const uint8_t *)row)[c / 2];
    return (c % 2 ? pair >> 4 : pair & 15) - 8;
}

static inline void matmul_grouped(const pe_matrix *w, int64_t row_bytes, code_at *code,
                                  int64_t row0, int64_t row1, const pe_activations *a, float *y,
                                  int64_t ldy)
{
    const int64_t groups = pe_groups(w->cols), ld = groups * PE_GROUP;
    for (int64_t r = row0; r < row1; r++) {
        const void *row = (const uint8_t *)w->data + r * row_bytes;
        for (int64_t t = 0; t < a->tokens; t++) {
            const int16_t *q = a->q + t * ld;
            float sum = 0.0f;
            for (int64_t g = 0; g < groups; g++) {
                int32_t d = 0;
                for (int64_t c = g * PE_GROUP; c < group_end(g, w->cols); c++)
                    d += q[c] * code(row, c);
                float s_w = pe_f16_to_float(w->scales[g * w->scale_ld + r]);
                sum += (float)d * (s_w * a->scales[t * groups + g]);
            }
            y[t * ldy + r] = sum;
        }
    }
}

static void matmul_int8(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    matmul_grouped(w, w->cols, int8_at, row0, row1, a, y, ldy);
}

static void matmul_int4(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    matmul_grouped(w, w->cols / 2, int4_at, row0, row1, a, y, ldy);
}

/* The float32 value of column c in one row. */
typedef float value_at(const void *row, int64_t c);

static float f32_at(const void *row, int64_t c)
{
    float v; /* memcpy: a row may lie at any address */
    memcpy(&v, (const char *)row + c * 4, sizeof v);
    return v;
}

static float f16_at(const void *row, int64_t c)
{
    return pe_f16_to_float(pe_load_u16((const char *)row + c * 2));
}

static float bf16_at(const void *row, int64_t c)
{
    return pe_bf16_to_float(pe_load_u16((const char *)row + c * 2));
}

static inline void matmul_dense(const pe_matrix *w, int64_t row_bytes, value_at *value,
                                int64_t row0, int64_t row1, const pe_activations *a, float *y,
                                int64_t ldy)
{
    for (int64_t r = row0; r < row1; r++) {
        const void *row = (const char *)w->data + r * row_bytes;
        for (int64_t t = 0; t < a->tokens; t++) {
            const float *x = a->x + t * w->cols;
            double sum[8] = {0};
            for (int64_t c = 0; c < w->cols; c++)
                sum[c % 8] += (double)x[c] * (double)value(row, c);
            y[t * ldy + r] = (float)pe_tree8(sum);
        }
    }
}

static void matmul_f32(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                       float *y, int64_t ldy)
{
    matmul_dense(w, w->cols * 4, f32_at, row0, row1, a, y, ldy);
}

static void matmul_f16(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                       float *y, int64_t ldy)
{
    matmul_dense(w, w->cols * 2, f16_at, row0, row1, a, y, ldy);
}

static void matmul_bf16(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    matmul_dense(w, w->cols * 2, bf16_at, row0, row1, a, y, ldy);
}

static void load_f32(const void *row, int64_t cols, float *x)
{
    memcpy(x, row, (size_t)cols * sizeof *x);
}

static void load_f16(const void *row, int64_t cols, float *x)
{
    for (int64_t c = 0; c < cols; c++)
        x[c] = f16_at(row, c);
}

static void load_bf16(const void *row, int64_t cols, float *x)
{
    for (int64_t c = 0; c < cols; c++)
        x[c] = bf16_at(row, c);
}

void pe_fill_scalar_matmul(pe_kernels *k)
{
    memset(k->type, 0, sizeof k->type);
    k->type[PE_F32] = (pe_weight_type){1, 4, .dense = 1, .load = load_f32};
    k->type[PE_F16] = (pe_weight_type){1, 2, .dense = 1, .load = load_f16};
    k->type[PE_BF16] = (pe_weight_type){1, 2, .dense = 1, .load = load_bf16};
    k->type[PE_INT8] = (pe_weight_type){1, 1, .scaled = 1};
    k->type[PE_INT4] = (pe_weight_type){2, 1, .scaled = 1};
    k->matmul[PE_F32] = matmul_f32;
    k->matmul[PE_F16] = matmul_f16;
    k->matmul[PE_BF16] = matmul_bf16;
    k->matmul[PE_INT8] = matmul_int8;
    k->matmul[PE_INT4] = matmul_int4;
}

/* ---- the operation --------------------------------------------------------------------------- */

const pe_weight_type *pe_type(int32_t type)
{
    static const pe_weight_type none;
    return type >= 0 && type < PE_TYPES ? &pe_active.type[type] : &none;
}

int32_t pe_matrix_check(const pe_matrix *w)
{
    const pe_weight_type *type = pe_type(w->type);
    if (!type->block_cols || w->rows < 1 || w->cols < 1 || !w->data || w->cols % type->block_cols)
        return PE_ERROR_ARGUMENT;
    if (type->scaled && (!w->scales || w->scale_ld < w->rows))
        return PE_ERROR_ARGUMENT;
    return PE_OK;
}

typedef struct {
    const pe_matmul_job *jobs;
    int64_t n_jobs;
} matmul_args;

static int64_t job_tiles(const pe_matmul_job *job)
{
    return (job->w.rows + PE_ROW_GRAIN - 1) / PE_ROW_GRAIN;
}

/* Tiles [begin, end), where the rows of all jobs are counted one job after another. */
static int32_t matmul_tiles(void *arg, int64_t begin, int64_t end)
{
    const matmul_args *m = arg;
    const pe_matmul_job *job = m->jobs;
    for (int64_t first = 0; first < end; first += job_tiles(job), job++) {
        int64_t tile0 = begin > first ? begin - first : 0;
        int64_t tile1 = pe_min(end - first, job_tiles(job));
        if (tile0 < tile1)
            pe_active.matmul[job->w.type](&job->w, tile0 * PE_ROW_GRAIN,
                                          pe_min(tile1 * PE_ROW_GRAIN, job->w.rows), &job->a,
                                          job->y, job->ldy);
    }
    return PE_OK;
}

int32_t pe_matmul_jobs(pe_pool *pool, const pe_matmul_job *jobs, int64_t n_jobs)
{
    int64_t tiles = 0;
    for (int64_t j = 0; j < n_jobs; j++) {
        const pe_matrix *w = &jobs[j].w;
        const pe_activations *a = &jobs[j].a;
        int32_t status = pe_matrix_check(w);
        if (status)
            return status;
        if (w->cols != a->cols || a->tokens < 0 || jobs[j].ldy < w->rows ||
            !pe_has_form_for(a, w->type))
            return PE_ERROR_ARGUMENT;
        tiles += job_tiles(&jobs[j]);
    }
    matmul_args m = {jobs, n_jobs};
    return pe_pool_run(pool, matmul_tiles, &m, tiles, 1);
}

int32_t pe_matmul(pe_pool *pool, const pe_matrix *w, int64_t expert, const pe_activations *a,
                  float *y, int64_t ldy)
{
    pe_matmul_job job = {pe_matrix_expert(w, expert), *a, y, ldy};
    return pe_matmul_jobs(pool, &job, 1);
}

int32_t pe_matmul_shared_input(pe_pool *pool, const pe_matrix *const *w, int64_t n,
                               const pe_activations *a, float *y)
{
    pe_matmul_job jobs[PE_MAX_SHARED];
    if (n < 0 || n > PE_MAX_SHARED || a->tokens < 0)
        return PE_ERROR_ARGUMENT;
    for (int64_t i = 0; i < n; i++) {
        jobs[i] = (pe_matmul_job){*w[i], *a, y, w[i]->rows};
        y += a->tokens * w[i]->rows;
    }
    return pe_matmul_jobs(pool, jobs, n);
}
