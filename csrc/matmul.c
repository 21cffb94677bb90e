/* matmul.c - scalar, normative: see pe_matmul in pyengine.h; and how jobs are shared out.
 *
 * F32, F16, BF16, INT8 and INT4 are here; another weight type has a file of its own:
 * matmul_blocks32.c.
 *
 * Where the level has kernels that read rewritten tokens (split_matmul), jobs run in batches: the
 * tokens of a batch are rewritten into memory of a fixed size, by all threads; then its rows are
 * shared out.
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
    memset(k->split_matmul, 0, sizeof k->split_matmul);
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

/* Jobs that run together, some of them parts of a job's tokens. */
#define BATCH 64
typedef struct {
    int64_t n;
    pe_matmul_job jobs[BATCH];
    void *split[BATCH];    /* its rewritten tokens; NULL: the kernel reads a */
    int64_t blocks[BATCH]; /* of tokens to rewrite; 0: done for the job before */
} batch;

/* Jobs from the next token of the next job on. */
typedef struct {
    const pe_matmul_job *job, *end;
    int64_t token;
} jobs_left;

static int64_t blocks_of(int64_t tokens)
{
    return (tokens + PE_SPLIT_TOKENS - 1) / PE_SPLIT_TOKENS;
}

/* Of one block of tokens. */
static int64_t split_bytes(const pe_activations *a) { return pe_groups(a->cols) * PE_SPLIT_BYTES; }

static int is_split(const pe_matmul_job *job)
{
    const int32_t type = job->w.type;
    return pe_active.split_matmul[type] && job->a.tokens >= pe_active.split_least[type] &&
           split_bytes(&job->a) <= PE_POOL_SPLIT;
}

/* Tokens [first, first + tokens) of a job whose type is not dense. */
static pe_matmul_job job_part(const pe_matmul_job *job, int64_t first, int64_t tokens)
{
    const int64_t groups = pe_groups(job->w.cols);
    pe_matmul_job part = *job;
    part.a.tokens = tokens;
    part.a.q += first * groups * PE_GROUP;
    part.a.scales += first * groups;
    part.a.sums = job->a.sums ? job->a.sums + first * groups * (PE_GROUP / PE_PART) : NULL;
    part.y += first * job->ldy;
    return part;
}

static int reads_sums(const pe_matmul_job *job) { return pe_type(job->w.type)->sums; }

/* Whether the rewritten tokens of job a are all that b reads. */
static int same_tokens(const pe_matmul_job *job_a, const pe_matmul_job *job_b)
{
    const pe_activations *a = &job_a->a, *b = &job_b->a;
    return reads_sums(job_a) >= reads_sums(job_b) && a->q == b->q && a->scales == b->scales &&
           a->sums == b->sums && a->cols == b->cols && a->tokens == b->tokens;
}

/* As many as find room: at least one. */
static void take_batch(jobs_left *left, char *memory, batch *b)
{
    int64_t used = 0;
    b->n = 0;
    for (int64_t n = 0; left->job < left->end && n < BATCH; b->n = ++n) {
        const pe_matmul_job *job = left->job;
        b->jobs[n] = *job;
        b->split[n] = NULL;
        b->blocks[n] = 0;
        if (is_split(job)) {
            if (left->token == 0 && n > 0 && b->split[n - 1] &&
                same_tokens(&b->jobs[n - 1], job)) {
                b->split[n] = b->split[n - 1];
            } else {
                int64_t tokens = job->a.tokens - left->token;
                int64_t room = (PE_POOL_SPLIT - used) / split_bytes(&job->a);
                if (room == 0)
                    return;
                tokens = pe_min(tokens, room * PE_SPLIT_TOKENS);
                b->jobs[n] = job_part(job, left->token, tokens);
                b->split[n] = memory + used;
                b->blocks[n] = blocks_of(tokens);
                used += b->blocks[n] * split_bytes(&job->a);
                left->token += tokens;
                if (left->token < job->a.tokens)
                    continue;
            }
        }
        left->job++;
        left->token = 0;
    }
}

/* Blocks [begin, end) of those to rewrite. */
static int32_t split_blocks(void *arg, int64_t begin, int64_t end)
{
    const batch *b = arg;
    for (int64_t i = 0, first = 0; first < end; first += b->blocks[i++]) {
        int64_t block0 = begin > first ? begin - first : 0;
        int64_t block1 = pe_min(end - first, b->blocks[i]);
        const pe_activations *a = &b->jobs[i].a;
        if (block0 < block1)
            pe_active.split_tokens(a, reads_sums(&b->jobs[i]), block0, block1,
                                   (char *)b->split[i] + block0 * split_bytes(a));
    }
    return PE_OK;
}

typedef struct {
    const pe_matmul_job *jobs;
    void *const *split; /* of each job; NULL: of none */
} matmul_args;

static int64_t job_tiles(const pe_matmul_job *job)
{
    return (job->w.rows + PE_ROW_GRAIN - 1) / PE_ROW_GRAIN;
}

static int64_t all_tiles(const pe_matmul_job *jobs, int64_t n)
{
    int64_t tiles = 0;
    for (int64_t j = 0; j < n; j++)
        tiles += job_tiles(&jobs[j]);
    return tiles;
}

/* The first rows of the next job, where they are like those of this one. */
static const void *next_rows(const pe_matmul_job *job)
{
    const pe_matrix *w = &job[0].w, *next = &job[1].w;
    return w->type == next->type && w->cols == next->cols ? next->data : NULL;
}

/* Tiles [begin, end), where the rows of all jobs are counted one job after another. */
static int32_t matmul_tiles(void *arg, int64_t begin, int64_t end)
{
    const matmul_args *m = arg;
    for (int64_t j = 0, first = 0; first < end; first += job_tiles(&m->jobs[j++])) {
        const pe_matmul_job *job = &m->jobs[j];
        int64_t tile0 = begin > first ? begin - first : 0;
        int64_t tile1 = pe_min(end - first, job_tiles(job));
        int64_t row0 = tile0 * PE_ROW_GRAIN, row1 = pe_min(tile1 * PE_ROW_GRAIN, job->w.rows);
        int more = first + job_tiles(job) < end;
        if (tile0 >= tile1)
            continue;
        if (m->split && m->split[j])
            pe_active.split_matmul[job->w.type](&job->w, row0, row1, job->a.tokens, m->split[j],
                                                job->y, job->ldy,
                                                more ? next_rows(job) : NULL);
        else
            pe_active.matmul[job->w.type](&job->w, row0, row1, &job->a, job->y, job->ldy);
    }
    return PE_OK;
}

static int32_t run_batches(pe_pool *pool, jobs_left left, void *memory)
{
    int32_t status = PE_OK;
    while (left.job < left.end && !status) {
        batch b;
        int64_t blocks = 0;
        take_batch(&left, memory, &b);
        for (int64_t j = 0; j < b.n; j++)
            blocks += b.blocks[j];
        matmul_args m = {b.jobs, b.split};
        status = pe_pool_run(pool, split_blocks, &b, blocks, 1);
        if (!status)
            status = pe_pool_run(pool, matmul_tiles, &m, all_tiles(b.jobs, b.n), 1);
    }
    return status;
}

int32_t pe_matmul_jobs(pe_pool *pool, const pe_matmul_job *jobs, int64_t n_jobs)
{
    int split = 0;
    for (int64_t j = 0; j < n_jobs; j++) {
        const pe_matrix *w = &jobs[j].w;
        const pe_activations *a = &jobs[j].a;
        int32_t status = pe_matrix_check(w);
        if (status)
            return status;
        if (w->cols != a->cols || a->tokens < 0 || jobs[j].ldy < w->rows ||
            !pe_has_form_for(a, w->type))
            return PE_ERROR_ARGUMENT;
        split |= is_split(&jobs[j]);
    }
    void *memory = split ? pe_pool_split(pool) : NULL;
    if (memory)
        return run_batches(pool, (jobs_left){jobs, jobs + n_jobs, 0}, memory);
    matmul_args m = {jobs, NULL};
    return pe_pool_run(pool, matmul_tiles, &m, all_tiles(jobs, n_jobs), 1);
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
