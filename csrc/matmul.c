/* matmul.c - scalar, normative: see pe_matmul in pyengine.h. */
#include "kernels.h"

/* Columns of group g, the last of which may be short. */
static int64_t group_end(int64_t g, int64_t cols)
{
    return pe_min((g + 1) * PE_GROUP, cols);
}

static float q8_0_group(const uint8_t *blocks, const int16_t *q, int64_t n_blocks)
{
    float p[PE_GROUP / PE_BLOCK] = {0};
    for (int64_t b = 0; b < n_blocks; b++) {
        const uint8_t *block = blocks + b * (2 + PE_BLOCK);
        const int8_t *code = (const int8_t *)(block + 2);
        int32_t d = 0;
        for (int i = 0; i < PE_BLOCK; i++)
            d += q[b * PE_BLOCK + i] * code[i];
        p[b] = (float)d * pe_f16_to_float(pe_load_u16(block));
    }
    return (p[0] + p[1]) + (p[2] + p[3]);
}

static void matmul_q8_0(const pe_matrix *w, int64_t row0, int64_t row1, const pe_activations *a,
                        float *y, int64_t ldy)
{
    const int64_t groups = pe_groups(w->cols), ld = groups * PE_GROUP;
    const int64_t row_bytes = w->cols / PE_BLOCK * (2 + PE_BLOCK);
    for (int64_t r = row0; r < row1; r++) {
        const uint8_t *row = (const uint8_t *)w->data + r * row_bytes;
        for (int64_t t = 0; t < a->tokens; t++) {
            float sum = 0.0f;
            for (int64_t g = 0; g < groups; g++) {
                int64_t first = g * PE_GROUP, n = group_end(g, w->cols) - first;
                float part = q8_0_group(row + first / PE_BLOCK * (2 + PE_BLOCK),
                                        a->q + t * ld + first, n / PE_BLOCK);
                sum += part * a->scales[t * groups + g];
            }
            y[t * ldy + r] = sum;
        }
    }
}

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
    float v; /* a file's tensors are aligned to less than a vector, and a caller's perhaps not at all */
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

void pe_fill_scalar_matmul(pe_kernels *k)
{
    k->matmul_q8_0 = matmul_q8_0;
    k->matmul_int8 = matmul_int8;
    k->matmul_int4 = matmul_int4;
    k->matmul_f32 = matmul_f32;
    k->matmul_f16 = matmul_f16;
    k->matmul_bf16 = matmul_bf16;
}

/* ---- the operation --------------------------------------------------------------------------- */

int32_t pe_matrix_check(const pe_matrix *w)
{
    if (w->rows < 1 || w->cols < 1 || !w->data)
        return PE_ERROR_ARGUMENT;
    switch (w->type) {
    case PE_F32:
    case PE_F16:
    case PE_BF16:
        return PE_OK;
    case PE_Q8_0:
        return w->cols % PE_BLOCK ? PE_ERROR_ARGUMENT : PE_OK;
    case PE_INT8:
        return w->scales && w->scale_ld >= w->rows ? PE_OK : PE_ERROR_ARGUMENT;
    case PE_INT4:
        return w->scales && w->scale_ld >= w->rows && w->cols % 2 == 0 ? PE_OK
                                                                       : PE_ERROR_ARGUMENT;
    default:
        return PE_ERROR_ARGUMENT;
    }
}

pe_matmul_kernel *pe_matmul_kernel_for(int32_t type)
{
    switch (type) {
    case PE_F32:
        return pe_active.matmul_f32;
    case PE_F16:
        return pe_active.matmul_f16;
    case PE_BF16:
        return pe_active.matmul_bf16;
    case PE_Q8_0:
        return pe_active.matmul_q8_0;
    case PE_INT8:
        return pe_active.matmul_int8;
    default:
        return pe_active.matmul_int4;
    }
}

typedef struct {
    const pe_matmul_job *jobs;
    int64_t n_jobs;
} matmul_args;

static int64_t job_tiles(const pe_matmul_job *job)
{
    return (job->w.rows + PE_ROW_GRAIN - 1) / PE_ROW_GRAIN;
}

/* Tiles [begin, end) of all the jobs' rows laid end to end. */
static int32_t matmul_tiles(void *arg, int64_t begin, int64_t end)
{
    const matmul_args *m = arg;
    const pe_matmul_job *job = m->jobs;
    for (int64_t first = 0; first < end; first += job_tiles(job), job++) {
        int64_t tile0 = begin > first ? begin - first : 0;
        int64_t tile1 = pe_min(end - first, job_tiles(job));
        if (tile0 < tile1)
            pe_matmul_kernel_for(job->w.type)(&job->w, tile0 * PE_ROW_GRAIN,
                                              pe_min(tile1 * PE_ROW_GRAIN, job->w.rows), &job->a,
                                              job->y, job->ldy);
    }
    return PE_OK;
}

int32_t pe_matmul_many(pe_pool *pool, const pe_matmul_job *jobs, int64_t n_jobs)
{
    int64_t tiles = 0;
    for (int64_t j = 0; j < n_jobs; j++) {
        const pe_matrix *w = &jobs[j].w;
        const pe_activations *a = &jobs[j].a;
        int32_t status = pe_matrix_check(w);
        if (status)
            return status;
        if (w->cols != a->cols || a->tokens < 0 || jobs[j].ldy < w->rows ||
            (pe_is_dense(w->type) ? !a->x : !a->q || !a->scales))
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
    return pe_matmul_many(pool, &job, 1);
}

int32_t pe_matmul_each(pe_pool *pool, const pe_matrix *const *w, int64_t n, const pe_activations *a,
                       float *y)
{
    pe_matmul_job jobs[PE_EACH];
    if (n < 0 || n > PE_EACH || a->tokens < 0)
        return PE_ERROR_ARGUMENT;
    for (int64_t i = 0; i < n; i++) {
        jobs[i] = (pe_matmul_job){*w[i], *a, y, w[i]->rows};
        y += a->tokens * w[i]->rows;
    }
    return pe_matmul_many(pool, jobs, n);
}
