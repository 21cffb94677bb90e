/* experts.c - see pe_experts in pyengine.h.
 *
 * The tokens of each expert are gathered, so that its weights are read once; the matmuls of all
 * experts and of the shared one are shared out over the threads together, first gate and up, then
 * down; the contributions are added last, token by token, by ascending expert.  One token and a
 * thousand take the same path.
 */
#include "kernels.h"

/* A slot is one (token, selected expert) pair; slots are sorted by expert, then by token. */
typedef struct {
    int64_t count;
    int64_t *first;     /* [num_experts + 1] expert e has slots first[e] .. first[e + 1] */
    int64_t *token;     /* [count] */
    float *weight;      /* [count] routing weight */
    int64_t *of_token;  /* [tokens, top_k] each token's slots, ascending */
    int64_t *filled;    /* [tokens] */
} slot_table;

/* gate, up, silu_mul, down over rows inputs: of the routed experts or of the shared one. */
typedef struct {
    int64_t rows, ff;
    float *gate, *up, *h; /* [rows, ff] */
    int16_t *q;           /* h quantised */
    float *scales;
    float *down; /* [rows, hidden] */
} branch;

typedef struct {
    const pe_experts_weights *w;
    const pe_activations *a;
    int64_t hidden, top_k;
    slot_table slots;
    pe_activations in; /* a's rows gathered by slot */
    branch routed, shared;
    float *shared_sigmoid; /* [tokens] */
    pe_matmul_job *jobs;   /* [2 * (num_experts + 1)] */
    float *y;
    const pe_experts_trace *trace;
} experts_run;

/* ---- scratch --------------------------------------------------------------------------------- */

/* Hands out aligned pieces of one block; without a block it only adds up their sizes. */
typedef struct {
    char *base;
    size_t used;
} arena;

static void *take(arena *a, int64_t count, size_t size)
{
    size_t at = a->used;
    a->used = (at + (size_t)count * size + 63) & ~(size_t)63;
    return a->base ? a->base + at : NULL;
}

static void take_branch(arena *a, branch *b, int64_t hidden)
{
    b->gate = take(a, b->rows * b->ff, sizeof(float));
    b->up = take(a, b->rows * b->ff, sizeof(float));
    b->h = take(a, b->rows * b->ff, sizeof(float));
    b->q = take(a, b->rows * pe_groups(b->ff) * PE_GROUP, sizeof(int16_t));
    b->scales = take(a, b->rows * pe_groups(b->ff), sizeof(float));
    b->down = take(a, b->rows * hidden, sizeof(float));
}

static void lay_out(experts_run *r, arena *a)
{
    slot_table *s = &r->slots;
    int64_t groups = pe_groups(r->hidden);
    s->first = take(a, r->w->num_experts + 1, sizeof *s->first);
    s->token = take(a, s->count, sizeof *s->token);
    s->weight = take(a, s->count, sizeof *s->weight);
    s->of_token = take(a, s->count, sizeof *s->of_token);
    s->filled = take(a, r->a->tokens, sizeof *s->filled);
    r->jobs = take(a, 2 * (r->w->num_experts + 1), sizeof *r->jobs);
    r->in.x = take(a, s->count * r->hidden, sizeof(float));
    r->in.q = take(a, s->count * groups * PE_GROUP, sizeof(int16_t));
    r->in.scales = take(a, s->count * groups, sizeof(float));
    r->shared_sigmoid = take(a, r->a->tokens, sizeof(float));
    take_branch(a, &r->routed, r->hidden);
    take_branch(a, &r->shared, r->hidden);
}

/* ---- gathering ------------------------------------------------------------------------------- */

static int32_t sort_slots(experts_run *r, const int32_t *selected, const float *weights)
{
    slot_table *s = &r->slots;
    const int64_t experts = r->w->num_experts;
    memset(s->first, 0, (size_t)(experts + 1) * sizeof *s->first);
    memset(s->filled, 0, (size_t)r->a->tokens * sizeof *s->filled);
    for (int64_t i = 0; i < s->count; i++) {
        if (selected[i] < 0 || selected[i] >= experts)
            return PE_ERROR_ARGUMENT;
        s->first[selected[i] + 1]++;
    }
    for (int64_t e = 0; e < experts; e++)
        s->first[e + 1] += s->first[e];
    for (int64_t i = 0; i < s->count; i++) { /* leaves first[e] at the end of e's slots */
        int64_t at = s->first[selected[i]]++;
        s->token[at] = i / r->top_k;
        s->weight[at] = weights[i];
    }
    memmove(s->first + 1, s->first, (size_t)experts * sizeof *s->first);
    s->first[0] = 0;
    for (int64_t at = 0; at < s->count; at++) {
        int64_t t = s->token[at];
        s->of_token[t * r->top_k + s->filled[t]++] = at;
    }
    return PE_OK;
}

static int32_t gather_slots(void *arg, int64_t begin, int64_t end)
{
    experts_run *r = arg;
    const int64_t groups = pe_groups(r->hidden), ld = groups * PE_GROUP;
    for (int64_t at = begin; at < end; at++) {
        int64_t t = r->slots.token[at];
        if (pe_is_dense(r->w->gate.type)) {
            memcpy((float *)r->in.x + at * r->hidden, r->a->x + t * r->hidden,
                   (size_t)r->hidden * sizeof(float));
        } else {
            memcpy((int16_t *)r->in.q + at * ld, r->a->q + t * ld, (size_t)ld * sizeof(int16_t));
            memcpy((float *)r->in.scales + at * groups, r->a->scales + t * groups,
                   (size_t)groups * sizeof(float));
        }
    }
    return PE_OK;
}

/* ---- matmuls --------------------------------------------------------------------------------- */

/* Rows [first, first + tokens) of a. */
static pe_activations rows_of(const pe_activations *a, int64_t first, int64_t tokens)
{
    const int64_t groups = pe_groups(a->cols);
    return (pe_activations){
        .tokens = tokens,
        .cols = a->cols,
        .x = a->x ? a->x + first * a->cols : NULL,
        .q = a->q ? a->q + first * groups * PE_GROUP : NULL,
        .scales = a->scales ? a->scales + first * groups : NULL,
    };
}

/* Every expert's product with its own slots, then nothing of the experts that have none. */
static int64_t add_routed_jobs(experts_run *r, int64_t n, const pe_matrix *stack,
                               const pe_activations *in, float *y)
{
    const int64_t *first = r->slots.first;
    for (int64_t e = 0; e < r->w->num_experts; e++)
        if (first[e] < first[e + 1])
            r->jobs[n++] = (pe_matmul_job){pe_matrix_expert(stack, e),
                                           rows_of(in, first[e], first[e + 1] - first[e]),
                                           y + first[e] * stack->rows, stack->rows};
    return n;
}

static int64_t add_shared_job(experts_run *r, int64_t n, const pe_matrix *w,
                              const pe_activations *in, float *y)
{
    r->jobs[n++] = (pe_matmul_job){*w, *in, y, w->rows};
    return n;
}

static int32_t gate_and_up(pe_pool *pool, experts_run *r)
{
    const pe_experts_weights *w = r->w;
    int64_t n = add_routed_jobs(r, 0, &w->gate, &r->in, r->routed.gate);
    n = add_routed_jobs(r, n, &w->up, &r->in, r->routed.up);
    n = add_shared_job(r, n, &w->shared_gate, r->a, r->shared.gate);
    n = add_shared_job(r, n, &w->shared_up, r->a, r->shared.up);
    return pe_matmul_many(pool, r->jobs, n);
}

/* h, in the form that down wants. */
static int32_t activate(pe_pool *pool, const branch *b, const pe_matrix *down, pe_activations *h)
{
    *h = (pe_activations){b->rows, b->ff, b->h, b->q, b->scales};
    int32_t status = pe_silu_mul(pool, b->gate, b->up, b->rows * b->ff, b->h);
    if (status)
        return status;
    if (pe_is_dense(down->type))
        return pe_all_finite(b->h, b->rows * b->ff) ? PE_OK : PE_ERROR_NONFINITE;
    return pe_quantize_activations(pool, b->h, b->rows, b->ff, b->q, b->scales);
}

static int32_t down(pe_pool *pool, experts_run *r)
{
    const pe_experts_weights *w = r->w;
    pe_activations routed, shared;
    int32_t status = activate(pool, &r->routed, &w->down, &routed);
    if (!status)
        status = activate(pool, &r->shared, &w->shared_down, &shared);
    if (status)
        return status;
    int64_t n = add_routed_jobs(r, 0, &w->down, &routed, r->routed.down);
    n = add_shared_job(r, n, &w->shared_down, &shared, r->shared.down);
    return pe_matmul_many(pool, r->jobs, n);
}

/* ---- adding up ------------------------------------------------------------------------------- */

static int32_t combine_tokens(void *arg, int64_t begin, int64_t end)
{
    experts_run *r = arg;
    for (int64_t t = begin; t < end; t++) {
        float *y = r->y + t * r->hidden;
        const float *shared = r->shared.down + t * r->hidden;
        const float gate = r->shared_sigmoid[t];
        memset(y, 0, (size_t)r->hidden * sizeof *y);
        for (int64_t k = 0; k < r->top_k; k++) {
            int64_t at = r->slots.of_token[t * r->top_k + k];
            const float *expert = r->routed.down + at * r->hidden;
            const float weight = r->slots.weight[at];
            for (int64_t i = 0; i < r->hidden; i++)
                y[i] += expert[i] * weight;
        }
        if (r->trace && r->trace->routed)
            memcpy(r->trace->routed + t * r->hidden, y, (size_t)r->hidden * sizeof *y);
        for (int64_t i = 0; i < r->hidden; i++)
            y[i] += gate * shared[i];
    }
    return PE_OK;
}

static void copy_trace(const experts_run *r)
{
    const branch *b = &r->shared;
    const pe_experts_trace *t = r->trace;
    if (t && t->shared_gate)
        memcpy(t->shared_gate, b->gate, (size_t)(b->rows * b->ff) * sizeof(float));
    if (t && t->shared_up)
        memcpy(t->shared_up, b->up, (size_t)(b->rows * b->ff) * sizeof(float));
    if (t && t->shared)
        memcpy(t->shared, b->down, (size_t)(b->rows * r->hidden) * sizeof(float));
}

/* ---- the operation --------------------------------------------------------------------------- */

static int has_form_for(const pe_activations *a, const pe_matrix *w)
{
    return pe_is_dense(w->type) ? a->x != NULL : a->q != NULL && a->scales != NULL;
}

/* The shapes fit together; the types of gate and up may differ from down's, not from each other. */
static int32_t check(const pe_experts_weights *w, const pe_activations *a, int64_t top_k)
{
    int ok = has_form_for(a, &w->gate) && has_form_for(a, &w->shared_gate) &&
             has_form_for(a, &w->shared_up) && w->num_experts >= 1 && a->tokens >= 0 &&
             top_k >= 1 && w->gate.cols == a->cols &&
             w->up.rows == w->gate.rows && w->up.cols == a->cols && w->up.type == w->gate.type &&
             w->down.rows == a->cols && w->down.cols == w->gate.rows &&
             w->shared_gate.cols == a->cols && w->shared_up.cols == a->cols &&
             w->shared_up.rows == w->shared_gate.rows && w->shared_down.rows == a->cols &&
             w->shared_down.cols == w->shared_gate.rows;
    return ok ? PE_OK : PE_ERROR_ARGUMENT;
}

int32_t pe_experts(pe_pool *pool, const pe_experts_weights *w, const pe_activations *a,
                   const int32_t *selected_experts, const float *routing_weights, int64_t top_k,
                   const float *shared_expert_gate, float *y, const pe_experts_trace *trace)
{
    int32_t status = check(w, a, top_k);
    if (status || a->tokens == 0)
        return status;
    const int64_t slots = a->tokens * top_k;
    experts_run r = {
        .w = w, .a = a, .hidden = a->cols, .top_k = top_k, .slots = {.count = slots},
        .in = {.tokens = slots, .cols = a->cols},
        .routed = {.rows = slots, .ff = w->gate.rows},
        .shared = {.rows = a->tokens, .ff = w->shared_gate.rows}, .y = y, .trace = trace,
    };
    arena sizes = {NULL, 0};
    lay_out(&r, &sizes);
    arena block = {pe_pool_scratch(pool, sizes.used), 0};
    if (!block.base)
        return PE_ERROR_MEMORY;
    lay_out(&r, &block);
    status = sort_slots(&r, selected_experts, routing_weights);
    if (!status)
        status = pe_pool_run(pool, gather_slots, &r, slots, 4);
    if (!status)
        status = gate_and_up(pool, &r);
    if (!status)
        status = down(pool, &r);
    if (!status)
        status = pe_sigmoid(pool, shared_expert_gate, a->tokens, r.shared_sigmoid);
    if (!status)
        status = pe_pool_run(pool, combine_tokens, &r, a->tokens, 1);
    if (!status)
        copy_trace(&r);
    return status;
}
