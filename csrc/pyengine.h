/* pyengine.h - the locked arithmetic: every operation of the engine's C core, with its contract.
 *
 * What a contract says is normative.  The scalar functions (matmul.c, norm.c, ...) are its plainest
 * form; an instruction set's sibling (matmul_avx2.c, ...) must give the same bits, and so must any
 * number of threads, since threads share out whole output elements and never the terms of a sum.
 *
 * Notation
 *   f32(e)      e in float64, every operation rounded to nearest even, then rounded to float32.
 *               (A product of two float32 values is exact in float64; a quotient or an integer
 *               that is rounded twice in this way is the one that is rounded once.)
 *   a (+) b     one float32 (or, where said, float64) operation, rounded to nearest even.
 *               Multiply and add are always two operations: nothing here is contracted to an FMA.
 *   "ascending" a sum starts with its first term and adds the others one at a time in that order.
 *   sum8(p)     the dense sum: eight float64 accumulators, all +0 at first; term i is added to
 *               accumulator i mod 8, i ascending; then, with A the accumulators,
 *               B[i] = A[i] + A[i+4] for i < 4;  C[i] = B[i] + B[i+2] for i < 2;  result C[0] + C[1].
 *               Its terms are float32 values or products of two, hence exact in float64.
 *   dot16(p)    the attention dot: sixteen float32 accumulators, all +0 at first; term i (a float32
 *               product, rounded) is added to accumulator i mod 16, i ascending; then
 *               B[i] = A[i] + A[i+8], i < 8;  C[i] = B[i] + B[i+4], i < 4;  D[i] = C[i] + C[i+2],
 *               i < 2;  result D[0] + D[1].
 *   exp, sigmoid, silu, softplus
 *               the float32 nearest to the exact value of the function at the float32 argument
 *               (activations.c); proved over all 2^32 arguments by tools/exhaustive_math.py.
 *
 * Arrays are row-major; a shape is written in storage order, and "ld" is the distance between two
 * rows in elements.  No argument may overlap another unless its contract says so.  An operation
 * returns PE_OK or an error below and prints nothing.
 *
 * The model whose steps these are is defined by Hugging Face transformers, models/qwen3_5_moe.
 * What lies between the operations: an embedding row is its codes times their scales, exact in
 * float32; a residual is pe_add(hidden, output); states and caches start at +0; eps is the decimal of
 * config.json (a GGUF's float32 field read as its shortest decimal: 1e-6, not 9.99999997e-07);
 * neg_exp_a_log is a GGUF's ssm_a, or -exp(A_log); inv_freq as pyengine/config.py states it.  Value
 * heads, and with them the groups of out_proj's columns, stay in the checkpoint's own order.
 */
#ifndef PYENGINE_H
#define PYENGINE_H

#include <stdint.h>

/* What lies between the two marks is read by csrc/build.py and handed to cffi. */
/* CDEF BEGIN */

#define PE_OK 0
#define PE_ERROR_NONFINITE 1 /* NaN or infinity where a finite value is needed */
#define PE_ERROR_ARGUMENT 2  /* a size, type or pointer that the contract excludes */
#define PE_ERROR_MEMORY 3    /* scratch or a thread could not be had */

#define PE_GROUP 128 /* columns that share one activation scale, and one INT8/INT4 weight scale */
#define PE_BLOCK 32  /* columns that share one Q8_0 weight scale */

/* How a weight matrix is stored; row r, column c. */
#define PE_F32 0  /* float32 */
#define PE_F16 1  /* IEEE half */
#define PE_BF16 2 /* the upper half of a float32 */
#define PE_Q8_0 3 /* 34-byte blocks of 32 columns: float16 scale, int8[32]; cols % 32 == 0 */
#define PE_INT8 4 /* int8 [rows, cols], scales float16 [n_groups, scale_ld], codes in [-127, 127] */
#define PE_INT4 5 /* uint8 [rows, cols/2], low nibble = even column, nibble = code + 8, codes in
                     [-7, 7]; scales as INT8; cols % 2 == 0 */

/* One matrix, or a stack of them (the experts): matrix e starts e * expert_stride bytes after data
 * and e * scale_expert_stride elements after scales.  n_groups = ceil(cols / PE_GROUP). */
typedef struct {
    int32_t type;
    int64_t rows;
    int64_t cols;
    const void *data;
    const uint16_t *scales; /* INT8, INT4: float16 [n_groups, scale_ld]; NULL otherwise */
    int64_t scale_ld;
    int64_t expert_stride;
    int64_t scale_expert_stride;
} pe_matrix;

/* The input of a matmul, in the forms that the weight types want: dense types (F32, F16, BF16) read
 * x, the others q and scales as pe_quantize_activations wrote them.  What is not read may be NULL. */
typedef struct {
    int64_t tokens;
    int64_t cols;
    const float *x;      /* [tokens, cols] */
    const int16_t *q;    /* [tokens, ld], ld = n_groups * PE_GROUP, zeros from cols on */
    const float *scales; /* [tokens, n_groups] */
} pe_activations;

/* ---- threads and instruction sets ------------------------------------------------------------ */

/* A pool of n - 1 threads and the caller.  1 <= n <= 1024; pin != 0 asks for thread i on the i-th
 * processor that this process may use (ignored where the system has no such call).  NULL: no memory
 * or no thread.  A pool serves one caller at a time. */
typedef struct pe_pool pe_pool;
pe_pool *pe_pool_new(int32_t n, int32_t pin);
void pe_pool_free(pe_pool *pool);
int32_t pe_pool_threads(const pe_pool *pool);
/* Memory that the pool keeps for intermediates, in bytes: it grows with the largest call so far. */
int64_t pe_pool_scratch_bytes(const pe_pool *pool);

/* The instruction sets in this build and on this processor, lowest first: names until NULL. */
const char *pe_isa_name(int32_t i);
/* The one in use. */
const char *pe_isa_active(void);
/* Use that level (and what lies below it); not while an operation runs.  PE_ERROR_ARGUMENT: the
 * name is unknown, or this build or processor lacks it. */
int32_t pe_isa_select(const char *name);

/* ---- matmul ---------------------------------------------------------------------------------- */

/* Activations to int16, per token and group of PE_GROUP columns (the last may be short):
 *     a = max |x|;  s = f32(a / 32767);  q = rint(f32(x / s)), ties to even
 *     a < 2^-100: s = 0 and q = 0
 * x [tokens, cols] -> q [tokens, ld], zero-padded to ld = n_groups * PE_GROUP; scales [tokens,
 * n_groups].  Then |q| <= 32767.  PE_ERROR_NONFINITE if any x is NaN or infinite. */
int32_t pe_quantize_activations(pe_pool *pool, const float *x, int64_t tokens, int64_t cols,
                                int16_t *q, float *scales);

/* y[t, r] = sum over c of x[t, c] * w[r, c]:  y [tokens, ldy], of which w.rows columns are written.
 *
 * INT8, INT4: with d[g] = sum over the group's columns of q * code, exact in int32,
 *     y = 0;  for g ascending:  y = y (+) (f32(d[g]) (*) (f32(s_w[g]) (*) s_x[g]))
 * Q8_0: each group holds up to four blocks; with d[b] the exact sum over block b,
 *     p[b] = f32(d[b]) (*) f32(s_w[b]), and p[b] = +0 for blocks past the last column
 *     y = 0;  for g ascending:  y = y (+) (((p[0] (+) p[1]) (+) (p[2] (+) p[3])) (*) s_x[g])
 * F32, F16, BF16: y = f32(sum8(x[c] * w[c])).
 *
 * expert selects the matrix of a stack (0 for a single one).  PE_ERROR_ARGUMENT: unknown type, cols
 * that the type excludes, or w.cols != a.cols. */
int32_t pe_matmul(pe_pool *pool, const pe_matrix *w, int64_t expert, const pe_activations *a,
                  float *y, int64_t ldy);

/* The same for n <= PE_EACH single matrices that read the same a, as one piece of work: the y of
 * w[0] [tokens, w[0]->rows], then that of w[1], one after another. */
#define PE_EACH 8
int32_t pe_matmul_each(pe_pool *pool, const pe_matrix *const *w, int64_t n, const pe_activations *a,
                       float *y);

/* ---- elementwise ----------------------------------------------------------------------------- */

/* y[i] = function(x[i]), i < n, correctly rounded; y may be x.  softplus(x) = log(1 + exp(x)), and x
 * itself above 20, as torch.nn.functional.softplus.  exp(NaN) and the like give NaN. */
int32_t pe_exp(pe_pool *pool, const float *x, int64_t n, float *y);
int32_t pe_sigmoid(pe_pool *pool, const float *x, int64_t n, float *y);
int32_t pe_silu(pe_pool *pool, const float *x, int64_t n, float *y);
int32_t pe_softplus(pe_pool *pool, const float *x, int64_t n, float *y);

/* y[i] = a[i] (+) b[i]; y may be a or b.  A residual. */
int32_t pe_add(pe_pool *pool, const float *a, const float *b, int64_t n, float *y);

/* y[i] = silu(gate[i]) (*) up[i]; y may be gate or up. */
int32_t pe_silu_mul(pe_pool *pool, const float *gate, const float *up, int64_t n, float *y);

/* y[r, i] = x[r, i] (*) sigmoid(gate[r, i]) for rows r, i < n: x and y contiguous [rows, n], gate
 * [rows, ld_gate].  y may be x.  The output gate of full attention: row = token and head. */
int32_t pe_sigmoid_mul(pe_pool *pool, const float *x, const float *gate, int64_t ld_gate,
                       int64_t rows, int64_t n, float *y);

/* The delta net's gates, [tokens, heads] each:
 *     beta = sigmoid(b)
 *     log_decay = neg_exp_a_log (*) softplus(a (+) dt_bias);  decay = exp(log_decay)
 * neg_exp_a_log, dt_bias [heads]; neg_exp_a_log = -exp(A_log). */
int32_t pe_delta_gates(pe_pool *pool, const float *a, const float *b, const float *neg_exp_a_log,
                       const float *dt_bias, int64_t tokens, int64_t heads, float *beta,
                       float *decay);

/* ---- norms ----------------------------------------------------------------------------------- */

/* Zero-centred RMS norm of heads vectors of n in each token, x[t, h] at x + t * ldx + h * head_ld;
 * y contiguous [tokens, heads, n]:
 *     inv = 1 / sqrt(sum8(x * x) / n + eps), in float64, each operation rounded to float64
 *     y = f32(x * inv) (*) scale, with scale = f32(1 + weight) [n]
 * y may be x where x is contiguous.  Source: Qwen3_5MoeRMSNorm. */
int32_t pe_rms_norm(pe_pool *pool, const float *x, int64_t tokens, int64_t ldx, int64_t heads,
                    int64_t head_ld, int64_t n, const float *scale, double eps, float *y);

/* Gated RMS norm, rows of n, all contiguous, inv as above:
 *     y = (weight (*) f32(x * inv)) (*) silu(z)
 * weight [n] is plain, not zero-centred; y may be x.  Source: Qwen3_5MoeRMSNormGated. */
int32_t pe_rms_norm_gated(pe_pool *pool, const float *x, const float *z, int64_t rows, int64_t n,
                          const float *weight, double eps, float *y);

/* L2 norm of heads vectors of n in each token, x addressed as above (head_ld = n), y contiguous:
 *     inv = 1 / sqrt(sum8(x * x) + 1e-6), in float64;  y = f32(x * inv) (*) scale
 * scale = 1 leaves the product out in effect.  Source: l2norm; query then times head_k_dim^-0.5. */
int32_t pe_l2_norm(pe_pool *pool, const float *x, int64_t tokens, int64_t ldx, int64_t heads,
                   int64_t n, float scale, float *y);

/* ---- rotary positions ------------------------------------------------------------------------ */

/* cos and sin [tokens, half] of position * inv_freq[i] (exact in float64), position = start + t:
 * float64 values by the stated steps of rope.c, rounded once to float32.  0 <= position < 2^24 and
 * 0 < inv_freq <= 1. */
int32_t pe_rope_table(int64_t start, int64_t tokens, const float *inv_freq, int64_t half,
                      float *cos_table, float *sin_table);

/* In place, for heads vectors of each token, x contiguous [tokens, heads, n], n >= 2 * half:
 *     x1 = x[i], x2 = x[i + half]:  x[i] = (x1 (*) cos) (-) (x2 (*) sin)
 *                                   x[i + half] = (x2 (*) cos) (+) (x1 (*) sin)
 * Entries from 2 * half on stay. */
int32_t pe_rope(pe_pool *pool, float *x, int64_t tokens, int64_t heads, int64_t n, int64_t half,
                const float *cos_table, const float *sin_table);

/* ---- mixers ---------------------------------------------------------------------------------- */

/* Causal depthwise convolution, then silu: x [tokens, channels], weight [taps, channels] (tap taps-1
 * meets the newest token), conv_state [taps - 1, channels] the inputs before x, oldest first, updated
 * to the last taps - 1 inputs; y [tokens, channels]:
 *     y[t] = silu(sum over j ascending of weight[j] (*) input[t - (taps - 1) + j])
 * 1 <= taps <= 16.  y must not be x. */
int32_t pe_causal_conv1d(pe_pool *pool, const float *x, int64_t tokens, int64_t channels,
                         const float *weight, int64_t taps, float *conv_state, float *y);

/* The gated delta rule, token by token, in prefill too.  query, key [tokens, key_heads, dk], both
 * L2-normed, query scaled; value: head h of token t at value + t * ld_value + h * dv; beta, decay
 * [tokens, value_heads]; key_head [value_heads] names the key head each value head reads;
 * recurrent_state [value_heads, dk, dv], updated; out [tokens, value_heads, dv].  Per token and
 * value head, S its state, k and q of its key head:
 *     S[i, j]   = S[i, j] (*) decay
 *     kv_mem[j] = sum over i ascending of S[i, j] (*) k[i]
 *     delta[j]  = (v[j] (-) kv_mem[j]) (*) beta
 *     S[i, j]   = S[i, j] (+) (k[i] (*) delta[j])
 *     out[j]    = sum over i ascending of S[i, j] (*) q[i]
 * 1 <= dv <= 1024.  Source: torch_recurrent_gated_delta_rule. */
int32_t pe_delta_rule(pe_pool *pool, const float *query, const float *key, const float *value,
                      int64_t ld_value, const float *beta, const float *decay, int64_t tokens,
                      int64_t key_heads, int64_t value_heads, int64_t dk, int64_t dv,
                      const int32_t *key_head, float *recurrent_state, float *out);

/* Causal attention of tokens at positions start, start + 1, ... over the cache, which already holds
 * their own keys and values.  query [tokens, heads, n]; key_cache, value_cache [>= start + tokens,
 * kv_heads, n]; out [tokens, heads, n]; head h reads key-value head h / (heads / kv_heads).  Per
 * token (positions p = 0 .. its own) and head:
 *     score[p] = dot16(query[i] (*) key[p, i]) (*) scale
 *     m = max score;  e[p] = exp(score[p] (-) m);  total = f32(sum8(e[p])), p ascending
 *     out[j] = (sum over p ascending of e[p] (*) value[p, j]) (/) total
 * scale = f32(head_dim^-0.5).  Non-finite scores give PE_ERROR_NONFINITE. */
int32_t pe_attention(pe_pool *pool, const float *query, const float *key_cache,
                     const float *value_cache, int64_t start, int64_t tokens, int64_t heads,
                     int64_t kv_heads, int64_t n, float scale, float *out);

/* The same over a float16 cache, whose entries are widened exactly: keys and values were rounded to
 * float16, nearest even, when they were stored. */
int32_t pe_attention_f16(pe_pool *pool, const float *query, const uint16_t *key_cache,
                         const uint16_t *value_cache, int64_t start, int64_t tokens, int64_t heads,
                         int64_t kv_heads, int64_t n, float scale, float *out);

/* ---- mixture of experts ---------------------------------------------------------------------- */

/* logits [tokens, experts] -> routing_weights, selected_experts [tokens, top_k], by falling
 * probability:
 *     m = max logit;  e = exp(logit (-) m);  total = sum8(e), in float64;  p = f32(e / total)
 *     the top_k greatest p, equal ones by ascending expert index
 *     routing_weight = f32(p / sum of the chosen p, float64, in the order chosen)
 * 1 <= top_k <= experts <= 65536.  PE_ERROR_NONFINITE for NaN or infinite logits. */
int32_t pe_router(pe_pool *pool, const float *logits, int64_t tokens, int64_t experts,
                  int64_t top_k, float *routing_weights, int32_t *selected_experts);

/* The routed experts (stacks) and the shared expert (single matrices); gate and up [ff, hidden],
 * down [hidden, ff].  A fused gate_up is two views of one array. */
typedef struct {
    int64_t num_experts;
    pe_matrix gate, up, down;
    pe_matrix shared_gate, shared_up, shared_down;
} pe_experts_weights;

/* Where pe_experts puts what a trace wants; any may be NULL. */
typedef struct {
    float *routed;      /* [tokens, hidden] mlp.experts */
    float *shared_gate; /* [tokens, shared ff] mlp.shared_expert.gate_proj */
    float *shared_up;   /* [tokens, shared ff] mlp.shared_expert.up_proj */
    float *shared;      /* [tokens, hidden] mlp.shared_expert */
} pe_experts_trace;

/* a: the hidden states (x always; q and scales if any matrix is quantised); y [tokens, hidden].
 * Each matmul as pe_matmul, h quantised anew as pe_quantize_activations does:
 *     expert(x) = down(silu(gate x) (*) (up x))
 *     routed = +0;  for the token's experts by ascending index:
 *         routed = routed (+) (expert(x) (*) routing_weight)
 *     y = routed (+) (sigmoid(shared_expert_gate) (*) shared(x))
 * selected_experts, routing_weights [tokens, top_k]; shared_expert_gate [tokens], before sigmoid.
 * PE_ERROR_NONFINITE: an intermediate is not finite.  Source: Qwen3_5MoeSparseMoeBlock. */
int32_t pe_experts(pe_pool *pool, const pe_experts_weights *w, const pe_activations *a,
                   const int32_t *selected_experts, const float *routing_weights, int64_t top_k,
                   const float *shared_expert_gate, float *y, const pe_experts_trace *trace);

/* ---- replay ---------------------------------------------------------------------------------- */

/* One token's calls are the last token's, but for what stands in the arrays.  A caller in an interpreted
 * language spends more time between two of them than many of them take, so they can be made from a list.
 * What the pointers in it point to must live as long as the list is used. */

/* An argument: i an integer of any size, d a float or double, p a pointer. */
typedef union {
    int64_t i;
    double d;
    void *p;
} pe_word;

/* An operation and its arguments after the pool. */
#define PE_CALL_WORDS 14
typedef struct {
    int32_t operation;
    pe_word words[PE_CALL_WORDS];
} pe_call;

/* The number of an operation of this file that can be replayed, by its name; -1 for any other. */
int32_t pe_operation(const char *name);

/* Make the calls one after another, up to the first that returns an error: its status, and its index
 * in *failed.  PE_ERROR_ARGUMENT: also an operation with an unknown number. */
int32_t pe_replay(pe_pool *pool, const pe_call *calls, int64_t n, int64_t *failed);

/* ---- quantizing weights ---------------------------------------------------------------------- */

/* How a group's scale is chosen: see pe_quantize_weights. */
#define PE_SCALE_ABSMAX 0
#define PE_SCALE_MSE 1

/* Rows [row0, row1) of w (in the caller's order) to symmetric codes, |code| <= largest (127 or 7), in
 * groups of group_size columns, the last of which may be short.  Row r is stored row row_order[r],
 * column c is stored column col_order[c]; NULL: the same.  w is F32, F16, BF16 or Q8_0.
 * codes [row1 - row0, cols] int8; scales [row1 - row0, n_groups] float16.  For a group x:
 *     amax = max |x|;  amax = 0: s = 0 and every code 0
 *     s = f16(amax / largest), the quotient in float64; 2^-24 where that is 0; the next float16 up
 *         where rint(amax / s) > largest, which only a subnormal s can bring about
 *     code = rint(x / s), the quotient in float64, ties to even
 * PE_SCALE_MSE starts from that s and takes, of the float16 values from it downward to 3/4 of it (as
 * 64 evenly spaced candidates f16(s * (256 - i) / 256)), the one whose codes, clipped to
 * [-largest, largest], have the least sum over the group, ascending, in float64, of
 * (x - code * s)^2; the greatest such s among equals.
 * PE_ERROR_NONFINITE: a value is NaN or infinite, or wants a scale beyond float16. */
int32_t pe_quantize_weights(pe_pool *pool, const pe_matrix *w, int64_t expert,
                            const int64_t *row_order, const int64_t *col_order, int64_t row0,
                            int64_t row1, int32_t largest, int64_t group_size, int32_t method,
                            int8_t *codes, uint16_t *scales);

/* Two codes from -8 to 7 a byte: packed[i] = (codes[2 i] + 8) | (codes[2 i + 1] + 8) << 4, i < n. */
int32_t pe_pack_int4(pe_pool *pool, const int8_t *codes, int64_t n, uint8_t *packed);

/* CDEF END */

#endif
