/* experts.c - see pe_experts in pyengine.h.
 *
 * The tokens of each expert are gathered, so that its weights are read once.  The matmuls of all
 * experts and of the shared one are shared out over the threads together: first gate and up, then
 * down.  The contributions are added last, token by token, by ascending expert.  One token and a
 * thousand tokens take the same path.
 *
 * With a cache the experts are computed in several such steps: first those that are in memory, with
 * the shared one, then the others as they arrive.
 */
#include "kernels.h"

#define PARTS (PE_GROUP / PE_PART) /* sums of a group */

/* A slot is one (token, selected expert) pair; slots are sorted by the order of the experts, then by
 * token. */
typedef struct {
    int64_t count;
    int64_t *uses;     /* [num_experts] number of an expert's slots */
    int64_t *end;      /* [num_experts] expert e has the slots end[e] - uses[e] .. end[e] */
    int32_t *order;    /* [used] the experts that have slots, as they are computed */
    int64_t used;      /* number of them */
    int64_t in_memory; /* the first ones, which need not be waited for */
    int64_t *token;    /* [count] */
    float *weight;     /* [count] routing weight */
    int64_t *of_token; /* [tokens, top_k] each token's slots, ascending */
    int64_t *filled;   /* [tokens] */
} slot_table;

/* gate, up, silu_mul, down over rows inputs: of the routed experts or of the shared one. */
typedef struct {
    int64_t rows, ff;
    float *gate, *up, *h; /* [rows, ff] */
    int16_t *q;           /* h quantised */
    float *scales;
    int32_t *sums;
    float *down; /* [rows, hidden] */
} branch;

typedef struct {
    const pe_experts_weights *w;
    const pe_activations *a;
    int64_t tokens, hidden, num_experts, top_k;
    slot_table slots;
    pe_activations in; /* a's rows gathered by slot */
    branch routed, shared;
    float *shared_sigmoid; /* [tokens] */
    pe_matmul_job *jobs;   /* [2 * (num_experts + 1)] */
    float *y;
    const pe_experts_trace *trace;
} experts_run;

/* ---- scratch --------------------------------------------------------------------------------- */

/* Hands out aligned pieces of one block; without a block it only adds up the pieces' sizes. */
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
    b->sums = take(a, b->rows * pe_groups(b->ff) * PARTS, sizeof(int32_t));
    b->down = take(a, b->rows * hidden, sizeof(float));
}

static void lay_out(experts_run *r, arena *a)
{
    slot_table *s = &r->slots;
    int64_t groups = pe_groups(r->hidden);
    s->uses = take(a, r->num_experts, sizeof *s->uses);
    s->end = take(a, r->num_experts, sizeof *s->end);
    s->order = take(a, r->num_experts, sizeof *s->order);
    s->token = take(a, s->count, sizeof *s->token);
    s->weight = take(a, s->count, sizeof *s->weight);
    s->of_token = take(a, s->count, sizeof *s->of_token);
    s->filled = take(a, r->tokens, sizeof *s->filled);
    r->jobs = take(a, 2 * (r->num_experts + 1), sizeof *r->jobs);
    r->in.x = take(a, s->count * r->hidden, sizeof(float));
    r->in.q = take(a, s->count * groups * PE_GROUP, sizeof(int16_t));
    r->in.scales = take(a, s->count * groups, sizeof(float));
    r->in.sums = take(a, s->count * groups * PARTS, sizeof(int32_t));
    r->shared_sigmoid = take(a, r->tokens, sizeof(float));
    take_branch(a, &r->routed, r->hidden);
    take_branch(a, &r->shared, r->hidden);
}

/* A run of these sizes, whose pieces are not laid out yet. */
static experts_run run_of(int64_t tokens, int64_t hidden, int64_t num_experts, int64_t top_k,
                          int64_t ff, int64_t shared_ff)
{
    return (experts_run){
        .tokens = tokens,
        .hidden = hidden,
        .num_experts = num_experts,
        .top_k = top_k,
        .slots = {.count = tokens * top_k},
        .in = {.tokens = tokens * top_k, .cols = hidden},
        .routed = {.rows = tokens * top_k, .ff = ff},
        .shared = {.rows = tokens, .ff = shared_ff},
    };
}

/* ---- gathering ------------------------------------------------------------------------------- */

static int32_t count_uses(experts_run *r, const int32_t *selected)
{
    slot_table *s = &r->slots;
    memset(s->uses, 0, (size_t)r->num_experts * sizeof *s->uses);
    for (int64_t i = 0; i < s->count; i++) {
        if (selected[i] < 0 || selected[i] >= r->num_experts)
            return PE_ERROR_ARGUMENT;
        s->uses[selected[i]]++;
    }
    return PE_OK;
}

/* Experts by ascending index, or in the cache's order; missing ones are asked for here. */
static void order_experts(experts_run *r)
{
    slot_table *s = &r->slots;
    s->used = 0;
    if (r->w->cache) {
        s->in_memory = pe_expert_cache_begin(r->w->cache, r->w->cache_layer, r->tokens, s->uses,
                                             s->order, &s->used);
        return;
    }
    for (int64_t e = 0; e < r->num_experts; e++)
        if (s->uses[e])
            s->order[s->used++] = (int32_t)e;
    s->in_memory = s->used;
}

static void sort_slots(experts_run *r, const int32_t *selected, const float *weights)
{
    slot_table *s = &r->slots;
    for (int64_t p = 0, at = 0; p < s->used; p++) {
        s->end[s->order[p]] = at; /* for now the begin: it moves to the end as the slots fill */
        at += s->uses[s->order[p]];
    }
    for (int64_t i = 0; i < s->count; i++) {
        int64_t at = s->end[selected[i]]++;
        s->token[at] = i / r->top_k;
        s->weight[at] = weights[i];
    }
    memset(s->filled, 0, (size_t)r->tokens * sizeof *s->filled);
    for (int64_t e = 0; e < r->num_experts; e++) {
        for (int64_t k = s->uses[e]; k > 0; k--) {
            int64_t at = s->end[e] - k, t = s->token[at];
            s->of_token[t * r->top_k + s->filled[t]++] = at;
        }
    }
}

static int32_t gather_slots(void *arg, int64_t begin, int64_t end)
{
    experts_run *r = arg;
    const int64_t groups = pe_groups(r->hidden), ld = groups * PE_GROUP;
    const pe_weight_type *gate = pe_type(r->w->gate.type), *up = pe_type(r->w->up.type);
    const int dense = gate->dense || up->dense, quantised = !gate->dense || !up->dense;
    const int sums = gate->sums || up->sums;
    for (int64_t at = begin; at < end; at++) {
        int64_t t = r->slots.token[at];
        if (dense)
            memcpy((float *)r->in.x + at * r->hidden, r->a->x + t * r->hidden,
                   (size_t)r->hidden * sizeof(float));
        if (quantised) {
            memcpy((int16_t *)r->in.q + at * ld, r->a->q + t * ld, (size_t)ld * sizeof(int16_t));
            memcpy((float *)r->in.scales + at * groups, r->a->scales + t * groups,
                   (size_t)groups * sizeof(float));
        }
        if (sums)
            memcpy((int32_t *)r->in.sums + at * groups * PARTS, r->a->sums + t * groups * PARTS,
                   (size_t)(groups * PARTS) * sizeof(int32_t));
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
        .sums = a->sums ? a->sums + first * groups * PARTS : NULL,
    };
}

/* The gate, up or down (0, 1, 2) of one expert. */
static pe_matrix matrix_of(const pe_experts_weights *w, int i, int64_t expert)
{
    pe_matrix m = i == 0 ? w->gate : i == 1 ? w->up : w->down;
    if (!w->places && !w->cache)
        return pe_matrix_expert(&m, expert);
    const pe_expert_place place =
        w->cache ? pe_expert_cache_place(w->cache, w->cache_layer, expert) : w->places[expert];
    m.data = place.data[i];
    m.scales = place.scales[i];
    return m;
}

/* Experts order[from, to), and the shared one or not.  Their slots are neighbours. */
typedef struct {
    int64_t from, to;
    int shared;
} step;

static int64_t first_slot(const slot_table *s, int64_t p)
{
    return p < s->used ? s->end[s->order[p]] - s->uses[s->order[p]] : s->count;
}

/* The product of the gate, up or down of expert order[p] with its own slots. */
static int64_t add_routed_job(experts_run *r, int64_t n, int64_t p, int i, const pe_activations *in,
                              float *y)
{
    const slot_table *s = &r->slots;
    const int64_t first = first_slot(s, p);
    const pe_matrix w = matrix_of(r->w, i, s->order[p]);
    r->jobs[n++] = (pe_matmul_job){w, rows_of(in, first, s->uses[s->order[p]]), y + first * w.rows,
                                   w.rows};
    return n;
}

static int64_t add_shared_job(experts_run *r, int64_t n, const pe_matrix *w,
                              const pe_activations *in, float *y)
{
    r->jobs[n++] = (pe_matmul_job){*w, *in, y, w->rows};
    return n;
}

static int32_t gate_and_up(pe_pool *pool, experts_run *r, step now)
{
    const pe_experts_weights *w = r->w;
    int64_t n = 0;
    for (int64_t p = now.from; p < now.to; p++) { /* neighbours, for they read the same tokens */
        n = add_routed_job(r, n, p, 0, &r->in, r->routed.gate);
        n = add_routed_job(r, n, p, 1, &r->in, r->routed.up);
    }
    if (now.shared) {
        n = add_shared_job(r, n, &w->shared_gate, r->a, r->shared.gate);
        n = add_shared_job(r, n, &w->shared_up, r->a, r->shared.up);
    }
    return pe_matmul_jobs(pool, r->jobs, n);
}

/* Rows [first, first + rows) of h, in the form that down reads. */
static int32_t activate(pe_pool *pool, const branch *b, const pe_matrix *down, int64_t first,
                        int64_t rows)
{
    const int64_t groups = pe_groups(b->ff), at = first * b->ff;
    float *h = b->h + at;
    int32_t status = pe_silu_mul(pool, b->gate + at, b->up + at, rows * b->ff, h);
    if (status)
        return status;
    if (pe_type(down->type)->dense)
        return pe_all_finite(h, rows * b->ff) ? PE_OK : PE_ERROR_NONFINITE;
    return pe_quantize_activations(pool, h, rows, b->ff, b->q + first * groups * PE_GROUP,
                                   b->scales + first * groups, b->sums + first * groups * PARTS);
}

static pe_activations activated(const branch *b)
{
    return (pe_activations){b->rows, b->ff, b->h, b->q, b->scales, b->sums};
}

static int32_t down(pe_pool *pool, experts_run *r, step now)
{
    const pe_experts_weights *w = r->w;
    const int64_t first = first_slot(&r->slots, now.from), end = first_slot(&r->slots, now.to);
    const pe_activations routed = activated(&r->routed), shared = activated(&r->shared);
    int32_t status = PE_OK;
    if (first < end)
        status = activate(pool, &r->routed, &w->down, first, end - first);
    if (!status && now.shared)
        status = activate(pool, &r->shared, &w->shared_down, 0, r->tokens);
    if (status)
        return status;
    int64_t n = 0;
    for (int64_t p = now.from; p < now.to; p++)
        n = add_routed_job(r, n, p, 2, &routed, r->routed.down);
    if (now.shared)
        n = add_shared_job(r, n, &w->shared_down, &shared, r->shared.down);
    return pe_matmul_jobs(pool, r->jobs, n);
}

static int32_t compute(pe_pool *pool, experts_run *r, step now)
{
    int32_t status = gate_and_up(pool, r, now);
    return status ? status : down(pool, r, now);
}

/* The experts that are not in memory yet, as they arrive. */
static int32_t compute_missing(pe_pool *pool, experts_run *r)
{
    pe_expert_cache *cache = r->w->cache;
    int32_t status = PE_OK;
    pe_expert_cache_release(cache, 0, r->slots.in_memory);
    for (int64_t from = r->slots.in_memory, to; from < r->slots.used && !status; from = to) {
        status = pe_expert_cache_wait(cache, from, &to);
        if (!status)
            status = compute(pool, r, (step){from, to, 0});
        pe_expert_cache_release(cache, from, to);
    }
    return status;
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

/* The shapes must fit.  Each matrix has a type of its own. */
static int32_t check(const pe_experts_weights *w, const pe_activations *a, int64_t top_k)
{
    int ok = pe_has_form_for(a, w->gate.type) && pe_has_form_for(a, w->up.type) &&
             pe_has_form_for(a, w->shared_gate.type) && pe_has_form_for(a, w->shared_up.type) &&
             w->num_experts >= 1 && a->tokens >= 0 && top_k >= 1 && w->gate.cols == a->cols &&
             w->up.rows == w->gate.rows && w->up.cols == a->cols && w->down.rows == a->cols &&
             w->down.cols == w->gate.rows && w->shared_gate.cols == a->cols &&
             w->shared_up.cols == a->cols && w->shared_up.rows == w->shared_gate.rows &&
             w->shared_down.rows == a->cols && w->shared_down.cols == w->shared_gate.rows;
    return ok ? PE_OK : PE_ERROR_ARGUMENT;
}

int64_t pe_experts_scratch_bytes(int64_t tokens, int64_t hidden, int64_t num_experts, int64_t top_k,
                                 int64_t ff, int64_t shared_ff)
{
    experts_run r = run_of(tokens, hidden, num_experts, top_k, ff, shared_ff);
    arena sizes = {NULL, 0};
    lay_out(&r, &sizes);
    return (int64_t)sizes.used;
}

int32_t pe_experts(pe_pool *pool, const pe_experts_weights *w, const pe_activations *a,
                   const int32_t *selected_experts, const float *routing_weights, int64_t top_k,
                   const float *shared_expert_gate, float *y, const pe_experts_trace *trace)
{
    int32_t status = check(w, a, top_k);
    if (status || a->tokens == 0)
        return status;
    experts_run r =
        run_of(a->tokens, a->cols, w->num_experts, top_k, w->gate.rows, w->shared_gate.rows);
    r.w = w;
    r.a = a;
    r.y = y;
    r.trace = trace;
    arena sizes = {NULL, 0};
    lay_out(&r, &sizes);
    arena block = {pe_pool_scratch(pool, sizes.used), 0};
    if (!block.base)
        return PE_ERROR_MEMORY;
    lay_out(&r, &block);
    status = count_uses(&r, selected_experts);
    if (status)
        return status;
    order_experts(&r);
    sort_slots(&r, selected_experts, routing_weights);
    status = pe_pool_run(pool, gather_slots, &r, r.slots.count, 4);
    if (!status)
        status = compute(pool, &r, (step){0, r.slots.in_memory, 1});
    if (!status && w->cache)
        status = compute_missing(pool, &r);
    if (w->cache)
        pe_expert_cache_end(w->cache);
    if (!status)
        status = pe_sigmoid(pool, shared_expert_gate, a->tokens, r.shared_sigmoid);
    if (!status)
        status = pe_pool_run(pool, combine_tokens, &r, a->tokens, 1);
    if (!status)
        copy_trace(&r);
    return status;
}
