/* attention.c - scalar, normative: see pe_attention in pyengine.h.
 *
 * The unit of work is a block: some heads that read the same keys and values, at some successive
 * tokens.  A row is one head at one token.  A row's softmax needs the greatest of all its scores, so
 * a block has three steps: its scores, the greatest of each row; their exponentials and sums; the
 * mix.  The scores of a block lie position by position, [positions, rows].
 *
 * Many blocks are shared out, each to one thread: attend_alone.  Of a few, each step is shared out
 * by positions or columns, so that all threads read one long cache together: attend_together.
 */
#include "kernels.h"

#include <stdlib.h>

static void attention_scores(const float *const *query, int64_t rows, const float *key, int64_t ld,
                             int64_t keys, int64_t n, float scale, float *score, int64_t ld_score)
{
    for (int64_t p = 0; p < keys; p++) {
        for (int64_t r = 0; r < rows; r++) {
            float sum[16] = {0};
            for (int64_t i = 0; i < n; i++)
                sum[i % 16] += query[r][i] * key[p * ld + i];
            score[p * ld_score + r] = pe_tree16(sum) * scale;
        }
    }
}

static int attention_greatest(const float *score, int64_t ld, int64_t rows, int64_t keys,
                              float *greatest)
{
    int finite = 1;
    for (int64_t p = 0; p < keys; p++, score += ld) {
        finite &= pe_all_finite(score, rows);
        for (int64_t r = 0; r < rows; r++)
            greatest[r] = score[r] > greatest[r] ? score[r] : greatest[r];
    }
    return finite;
}

static void attention_weigh(float *score, int64_t ld, int64_t rows, int64_t keys,
                            const float *greatest, int64_t first, double *sum, int64_t ld_sum)
{
    for (int64_t p = 0; p < keys; p++, score += ld) {
        for (int64_t r = 0; r < rows; r++)
            score[r] -= greatest[r];
        pe_active.exp(score, rows, score);
        for (int64_t r = 0; r < rows; r++)
            sum[(first + p) % 8 * ld_sum + r] += (double)score[r];
    }
}

static void attention_mix(const float *e, int64_t ld_e, int64_t rows, const float *value,
                          int64_t ld, int64_t keys, int64_t n, float *const *out)
{
    for (int64_t p = 0; p < keys; p++)
        for (int64_t r = 0; r < rows; r++)
            for (int64_t j = 0; j < n; j++)
                out[r][j] += e[p * ld_e + r] * value[p * ld + j];
}

static void load_f16(const uint16_t *half, int64_t n, float *x)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = pe_f16_to_float(half[i]);
}

void pe_fill_scalar_attention(pe_kernels *k)
{
    k->load_f16 = load_f16;
    k->attention_scores = attention_scores;
    k->attention_greatest = attention_greatest;
    k->attention_weigh = attention_weigh;
    k->attention_mix = attention_mix;
}

/* ---- a block --------------------------------------------------------------------------------- */

#define ROWS 32   /* the most rows of a block, which use a piece of the cache in turn */
#define SUMS (ROWS + 8) /* as attention_weigh wants them */
#define PIECE 32  /* positions of a piece, while in the nearest caches */
#define RANGE 256 /* positions whose scores one thread computes, of a shared block */
#define STRIP 64  /* the fewest columns that one thread mixes, of a shared block */

/* The scores of a block beyond which it has fewer tokens: 32 MiB. */
#define MOST_SCORES (INT64_C(8) << 20)

typedef struct {
    const float *query;
    const void *key_cache, *value_cache; /* float32, or float16 */
    int half;
    int64_t ld, ld_head; /* from a position to the next, from a key-value head to the next */
    int64_t start, tokens, heads, kv_heads, n;
    float scale, *out;
} attention_args;

typedef struct {
    const attention_args *a;
    int64_t kv;            /* the key-value head */
    int64_t tokens, heads; /* row t * heads + h is head h at token t of the block */
    int64_t rows, common;  /* positions before `common` are read by all rows */
    const float *query[ROWS];
    float *out[ROWS];
    float *score; /* [positions, rows] */
    float greatest[ROWS];
    double sum[8][SUMS]; /* the accumulators of sum8 */
} block;

/* How a's tokens and heads are cut into blocks. */
typedef struct {
    int64_t tokens, heads; /* of a block, but for the last */
    int64_t pieces;        /* blocks that share a key-value head at one token */
    int64_t count;         /* blocks in all, head-major: neighbours read the same cache */
} plan;

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

static plan plan_of(const attention_args *a, int64_t threads)
{
    const int64_t group = a->heads / a->kv_heads, positions = a->start + a->tokens;
    plan p = {.heads = pe_min(group, ROWS)};
    p.pieces = ceil_div(group, p.heads);
    p.tokens = pe_min(ROWS / p.heads, a->tokens);
    while (p.tokens > 1 && (p.tokens * p.heads * positions > MOST_SCORES ||
                            ceil_div(a->tokens, p.tokens) * a->kv_heads * p.pieces < 4 * threads))
        p.tokens /= 2;
    p.count = ceil_div(a->tokens, p.tokens) * a->kv_heads * p.pieces;
    return p;
}

static void make_block(const attention_args *a, const plan *p, int64_t index, float *score,
                       block *b)
{
    const int64_t group = a->heads / a->kv_heads, steps = ceil_div(a->tokens, p->tokens);
    const int64_t token = index % steps * p->tokens, piece = index / steps % p->pieces;
    const int64_t first = piece * p->heads; /* head of the group */
    b->a = a;
    b->kv = index / steps / p->pieces;
    b->tokens = pe_min(p->tokens, a->tokens - token);
    b->heads = pe_min(p->heads, group - first);
    b->rows = b->tokens * b->heads;
    b->common = a->start + token + 1;
    b->score = score;
    for (int64_t r = 0; r < b->rows; r++) {
        const int64_t head = b->kv * group + first + r % b->heads;
        const int64_t at = ((token + r / b->heads) * a->heads + head) * a->n;
        b->query[r] = a->query + at;
        b->out[r] = a->out + at;
    }
}

/* Columns [j, j + n) of positions [p, p + count) of the block's keys or values as float32 rows, *ld
 * apart; piece [PIECE, n] is for a float16 cache. */
static const float *cache_rows(const block *b, const void *cache, int64_t p, int64_t count,
                               int64_t j, int64_t n, float *piece, int64_t *ld)
{
    const attention_args *a = b->a;
    const int64_t at = p * a->ld + b->kv * a->ld_head + j;
    if (!a->half) {
        *ld = a->ld;
        return (const float *)cache + at;
    }
    for (int64_t i = 0; i < count; i++)
        pe_active.load_f16((const uint16_t *)cache + at + i * a->ld, n, piece + i * n);
    *ld = n;
    return piece;
}

/* Of all rows at positions [p0, p1). */
static void scores(const block *b, int64_t p0, int64_t p1, float *piece)
{
    int64_t ld;
    for (int64_t p = p0; p < p1; p += PIECE) {
        const int64_t count = pe_min(PIECE, p1 - p);
        const float *keys = cache_rows(b, b->a->key_cache, p, count, 0, b->a->n, piece, &ld);
        pe_active.attention_scores(b->query, b->rows, keys, ld, count, b->a->n, b->a->scale,
                                   b->score + p * b->rows, b->rows);
    }
}

/* greatest[r0, r0 + rows), of these positions too. */
static int32_t greatest_scores(const block *b, int64_t p0, int64_t p1, int64_t r0, int64_t rows,
                               float *greatest)
{
    const float *score = b->score + p0 * b->rows + r0;
    return pe_active.attention_greatest(score, b->rows, rows, p1 - p0, greatest + r0)
               ? PE_OK
               : PE_ERROR_NONFINITE;
}

/* The scores to e, which are added to sum. */
static void weigh(const block *b, int64_t p0, int64_t p1, int64_t r0, int64_t rows,
                  double sum[8][SUMS])
{
    pe_active.attention_weigh(b->score + p0 * b->rows + r0, b->rows, rows, p1 - p0,
                              b->greatest + r0, p0, sum[0] + r0, SUMS);
}

/* Columns [j, j + n) of rows [r0, r0 + rows) at positions [p0, p1), p0 in order. */
static void mix(const block *b, int64_t p0, int64_t p1, int64_t r0, int64_t rows, int64_t j,
                int64_t n, float *piece)
{
    float *out[ROWS];
    int64_t ld;
    for (int64_t r = 0; r < rows; r++)
        out[r] = b->out[r0 + r] + j;
    for (int64_t p = p0; p < p1; p += PIECE) {
        const int64_t count = pe_min(PIECE, p1 - p);
        const float *values = cache_rows(b, b->a->value_cache, p, count, j, n, piece, &ld);
        pe_active.attention_mix(b->score + p * b->rows + r0, b->rows, rows, values, ld, count, n,
                                out);
    }
}

static void begin_block(block *b)
{
    for (int64_t r = 0; r < b->rows; r++) {
        b->greatest[r] = pe_bits_to_float(PE_INFINITY_BITS | 0x80000000u);
        for (int64_t j = 0; j < b->a->n; j++)
            b->out[r][j] = -0.0f; /* -0 (+) x is x, for every x: the sum starts with its first term */
    }
    memset(b->sum, 0, sizeof b->sum);
}

static void end_block(block *b)
{
    for (int64_t r = 0; r < b->rows; r++) {
        double sum[8];
        for (int i = 0; i < 8; i++)
            sum[i] = b->sum[i][r];
        const float total = (float)pe_tree8(sum);
        for (int64_t j = 0; j < b->a->n; j++)
            b->out[r][j] /= total;
    }
}

/* ---- a thread's own blocks ------------------------------------------------------------------- */

/* Positions from b->common on are read by the later tokens alone. */
static int32_t attend_alone(block *b, float *piece)
{
    const int64_t n = b->a->n, h = b->heads;
    int32_t status;
    begin_block(b);
    scores(b, 0, b->common + b->tokens - 1, piece);
    status = greatest_scores(b, 0, b->common, 0, b->rows, b->greatest);
    for (int64_t t = 1; t < b->tokens && !status; t++)
        status = greatest_scores(b, b->common, b->common + t, t * h, h, b->greatest);
    if (status)
        return status;
    for (int64_t p = 0; p < b->common; p += PIECE) {
        const int64_t end = pe_min(p + PIECE, b->common);
        weigh(b, p, end, 0, b->rows, b->sum);
        mix(b, p, end, 0, b->rows, 0, n, piece);
    }
    for (int64_t t = 1; t < b->tokens; t++) {
        weigh(b, b->common, b->common + t, t * h, h, b->sum);
        mix(b, b->common, b->common + t, t * h, h, 0, n, piece);
    }
    end_block(b);
    return PE_OK;
}

typedef struct {
    const attention_args *a;
    plan plan;
} blocks_args;

/* Floats of a thread's scratch. */
static int64_t scratch_floats(const plan *p, int64_t positions, int64_t n)
{
    return p->tokens * p->heads * positions + PIECE * n;
}

static int32_t attend_blocks(void *arg, int64_t begin, int64_t end)
{
    const blocks_args *w = arg;
    const attention_args *a = w->a;
    const int64_t positions = a->start + a->tokens;
    int32_t status = PE_OK;
    float *piece = malloc((size_t)scratch_floats(&w->plan, positions, a->n) * sizeof *piece);
    if (!piece)
        return PE_ERROR_MEMORY;
    for (int64_t i = begin; i < end && !status; i++) {
        block b;
        make_block(a, &w->plan, i, piece + PIECE * a->n, &b);
        status = attend_alone(&b, piece);
    }
    free(piece);
    return status;
}

/* ---- blocks that all threads share ----------------------------------------------------------- */

typedef struct {
    const attention_args *a;
    block *blocks; /* of one token each */
    int64_t count, ranges, strips;
    float (*greatest)[ROWS]; /* of each range of each block */
} shared_args;

/* Whether a's blocks are shared: there are fewer than two for each thread, and long ones. */
static int is_shared(const plan *p, int64_t positions, int64_t threads)
{
    return threads > 1 && p->count < 2 * threads && positions >= 2 * RANGE;
}

static int64_t shared_bytes(const plan *p, int64_t positions, int64_t count)
{
    const int64_t scores = positions * p->heads * (int64_t)sizeof(float);
    const int64_t ranges = ceil_div(positions, RANGE) * ROWS * (int64_t)sizeof(float);
    return count * ((int64_t)sizeof(block) + ranges + scores);
}

/* Item: a range of a block. */
static int32_t score_ranges(void *arg, int64_t begin, int64_t end)
{
    const shared_args *s = arg;
    int32_t status = PE_OK;
    float *piece = malloc((size_t)(PIECE * s->a->n) * sizeof *piece);
    if (!piece)
        return PE_ERROR_MEMORY;
    for (int64_t i = begin; i < end && !status; i++) {
        const block *b = &s->blocks[i / s->ranges];
        const int64_t p = i % s->ranges * RANGE, stop = pe_min(p + RANGE, b->common);
        memcpy(s->greatest[i], b->greatest, sizeof b->greatest);
        if (p < stop) {
            scores(b, p, stop, piece);
            status = greatest_scores(b, p, stop, 0, b->rows, s->greatest[i]);
        }
    }
    free(piece);
    return status;
}

/* Item: a range of a block.  The sums go in order, and have to wait. */
static int32_t weigh_ranges(void *arg, int64_t begin, int64_t end)
{
    const shared_args *s = arg;
    double unused[8][SUMS] = {{0}};
    for (int64_t i = begin; i < end; i++) {
        const block *b = &s->blocks[i / s->ranges];
        const int64_t p = i % s->ranges * RANGE, stop = pe_min(p + RANGE, b->common);
        if (p < stop)
            weigh(b, p, stop, 0, b->rows, unused);
    }
    return PE_OK;
}

static void add_sums(block *b)
{
    for (int64_t p = 0; p < b->common; p++)
        for (int64_t r = 0; r < b->rows; r++)
            b->sum[p % 8][r] += (double)b->score[p * b->rows + r];
}

/* Item: some columns of a block. */
static int32_t mix_strips(void *arg, int64_t begin, int64_t end)
{
    const shared_args *s = arg;
    const int64_t n = s->a->n, width = ceil_div(ceil_div(n, s->strips), 16) * 16;
    float *piece = malloc((size_t)(PIECE * n) * sizeof *piece);
    if (!piece)
        return PE_ERROR_MEMORY;
    for (int64_t i = begin; i < end; i++) {
        block *b = &s->blocks[i / s->strips];
        const int64_t j = i % s->strips * width;
        if (j == 0)
            add_sums(b);
        if (j < n)
            mix(b, 0, b->common, 0, b->rows, j, pe_min(width, n - j), piece);
    }
    free(piece);
    return PE_OK;
}

/* Wide strips are read faster; narrow ones are needed where blocks alone keep no thread busy. */
static int64_t strips_of(int64_t count, int64_t n, int64_t threads)
{
    int64_t strips = 1;
    while (count * strips % threads && 2 * strips * STRIP <= n)
        strips *= 2;
    return strips;
}

static int32_t attend_together(pe_pool *pool, const attention_args *a, const plan *p)
{
    const int64_t positions = a->start + a->tokens;
    shared_args s = {.a = a, .count = p->count, .ranges = ceil_div(positions, RANGE)};
    s.strips = strips_of(s.count, a->n, pe_pool_threads(pool));
    s.blocks = pe_pool_scratch(pool, (size_t)shared_bytes(p, positions, s.count));
    if (!s.blocks)
        return PE_ERROR_MEMORY;
    s.greatest = (void *)(s.blocks + s.count);
    float *score = s.greatest[s.count * s.ranges];
    for (int64_t i = 0; i < s.count; i++, score += p->heads * positions) {
        make_block(a, p, i, score, &s.blocks[i]);
        begin_block(&s.blocks[i]);
    }
    int32_t status = pe_pool_run(pool, score_ranges, &s, s.count * s.ranges, 1);
    if (status)
        return status;
    for (int64_t i = 0; i < s.count * s.ranges; i++) {
        block *b = &s.blocks[i / s.ranges];
        for (int64_t r = 0; r < b->rows; r++)
            b->greatest[r] = s.greatest[i][r] > b->greatest[r] ? s.greatest[i][r] : b->greatest[r];
    }
    status = pe_pool_run(pool, weigh_ranges, &s, s.count * s.ranges, 1);
    if (!status)
        status = pe_pool_run(pool, mix_strips, &s, s.count * s.strips, 1);
    for (int64_t i = 0; i < s.count && !status; i++)
        end_block(&s.blocks[i]);
    return status;
}

/* ---- the operation --------------------------------------------------------------------------- */

static int32_t attention(pe_pool *pool, const attention_args *a)
{
    if (a->start < 0 || a->tokens < 0 || a->heads < 1 || a->kv_heads < 1 ||
        a->heads % a->kv_heads || a->n < 1 || a->ld < 0 || a->ld_head < 0)
        return PE_ERROR_ARGUMENT;
    if (!a->tokens)
        return PE_OK;
    const int64_t threads = pe_pool_threads(pool);
    blocks_args args = {a, plan_of(a, threads)};
    if (is_shared(&args.plan, a->start + a->tokens, threads))
        return attend_together(pool, a, &args.plan);
    return pe_pool_run(pool, attend_blocks, &args, args.plan.count, 1);
}

int64_t pe_attention_scratch_bytes(int64_t positions, int64_t heads, int64_t kv_heads, int64_t n)
{
    if (heads < 1 || kv_heads < 1)
        return 0;
    const attention_args a = {.tokens = positions, .heads = heads, .kv_heads = kv_heads, .n = n};
    const plan p = plan_of(&a, 1);
    return scratch_floats(&p, positions, n) * (int64_t)sizeof(float);
}

int64_t pe_attention_shared_bytes(int64_t threads, int64_t positions, int64_t heads,
                                  int64_t kv_heads)
{
    if (heads < 1 || kv_heads < 1)
        return 0;
    const attention_args a = {
        .start = positions - 1, .tokens = 1, .heads = heads, .kv_heads = kv_heads};
    const plan p = plan_of(&a, threads);
    const int64_t most = (2 * threads - 1) / p.count * p.count; /* of more tokens than one */
    return is_shared(&p, positions, threads) ? shared_bytes(&p, positions, most) : 0;
}

int32_t pe_attention(pe_pool *pool, const float *query, const float *key_cache,
                     const float *value_cache, int64_t ld, int64_t ld_head, int64_t start,
                     int64_t tokens, int64_t heads, int64_t kv_heads, int64_t n, float scale,
                     float *out)
{
    const attention_args a = {query,  key_cache, value_cache, 0, ld,    ld_head, start,
                              tokens, heads,     kv_heads,    n, scale, out};
    return attention(pool, &a);
}

int32_t pe_attention_f16(pe_pool *pool, const float *query, const uint16_t *key_cache,
                         const uint16_t *value_cache, int64_t ld, int64_t ld_head, int64_t start,
                         int64_t tokens, int64_t heads, int64_t kv_heads, int64_t n, float scale,
                         float *out)
{
    const attention_args a = {query,  key_cache, value_cache, 1, ld,    ld_head, start,
                              tokens, heads,     kv_heads,    n, scale, out};
    return attention(pool, &a);
}
