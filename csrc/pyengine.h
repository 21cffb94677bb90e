/* pyengine.h - the locked arithmetic: every operation of the engine's C core, with its contract.
 *
 * The contracts are normative.  The scalar functions (matmul.c, norm.c, ...) are their plainest
 * form.  The functions of each instruction set (matmul_avx2.h, ...) must give the same bits, and so
 * must any number of threads: threads share out whole output elements, never the terms of a sum.
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
 *               B[i] = A[i] + A[i+4], i < 4;  C[i] = B[i] + B[i+2], i < 2;  result C[0] + C[1].
 *               Its terms are float32 values or products of two, hence exact in float64.
 *   dot16(p)    the attention dot: sixteen float32 accumulators, all +0 at first; term i (a float32
 *               product, rounded) is added to accumulator i mod 16, i ascending; then
 *               B[i] = A[i] + A[i+8], i < 8;  C[i] = B[i] + B[i+4], i < 4;  D[i] = C[i] + C[i+2],
 *               i < 2;  result D[0] + D[1].
 *   exp, sigmoid, silu, softplus
 *               the float32 nearest to the exact value of the function at the float32 argument
 *               (activations.c); proved over all 2^32 arguments by tools/check/exhaustive_math.py.
 *
 * Arrays are row-major; a shape is written in storage order, and "ld" is the distance between two
 * rows in elements.  No argument may overlap another unless its contract says so.  An operation
 * returns PE_OK or an error below and prints nothing.
 *
 * The model whose steps these are is defined by Hugging Face transformers, models/qwen3_5_moe.
 * Between the operations: an embedding row is its codes times their scales, exact in
 * float32 (Q4_1, Q5_1: (code (*) scale) (+) minimum; Q2_K, Q4_K, Q5_K: ((d (*) s) (*) code) (-)
 * (dmin (*) m)); a residual is pe_add(hidden, output); states
 * and caches start at +0; eps is the decimal of config.json (a GGUF's float32 field read as its
 * shortest decimal: 1e-6, not 9.99999997e-07); neg_exp_a_log is a GGUF's ssm_a, or -exp(A_log);
 * inv_freq: see pyengine/checkpoint/config.py. Value heads, and with them the groups of out_proj's
 * columns, stay in the checkpoint's own order.
 */
#ifndef PYENGINE_H
#define PYENGINE_H

#include <stdint.h>

/* csrc/build.py reads the text between the two marks and passes it to cffi. */
/* CDEF BEGIN */

#define PE_OK 0
#define PE_ERROR_NONFINITE 1 /* NaN or infinity where a finite value is needed */
#define PE_ERROR_ARGUMENT 2  /* a size, type or pointer that the contract excludes */
#define PE_ERROR_MEMORY 3    /* no memory for scratch, or a thread did not start */
#define PE_ERROR_READ 4      /* the system could not read a file */

#define PE_GROUP 128 /* columns that share one activation scale, and one INT8/INT4 weight scale */
#define PE_BLOCK 32  /* columns of a block of Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, MXFP4 */
#define PE_PART 16   /* columns of one sum of quantised activations */

/* How a weight matrix is stored; row r, column c.  A new type is one more value before PE_TYPES,
 * and files of its own: see PE_TYPE_FILES in kernels.h. */
enum {
    PE_F32,  /* float32 */
    PE_F16,  /* IEEE half */
    PE_BF16, /* the upper half of a float32 */
    PE_Q8_0, /* 34-byte blocks of 32 columns: float16 scale, int8[32]; cols % 32 == 0 */
    PE_INT8, /* int8 [rows, cols], scales float16 [n_groups, scale_ld], codes in [-127, 127] */
    PE_INT4, /* uint8 [rows, cols/2], low nibble = even column, nibble = code + 8, codes in
                [-7, 7]; scales as INT8; cols % 2 == 0 */
    /* Blocks of 32 columns, cols % 32 == 0; a float16 (MXFP4: a byte) is the scale.  n is the
     * nibble of column c of the block: of 16 bytes, the low nibbles are columns 0 to 15, the high
     * ones 16 to 31.  bits: uint32, little endian; bit c belongs to column c. */
    PE_Q4_0,   /* 18 bytes: scale, nibbles; code = n - 8 */
    PE_Q4_1,   /* 20 bytes: scale, float16 minimum, nibbles; code = n */
    PE_Q5_0,   /* 22 bytes: scale, bits, nibbles; code = n + 16 * bit - 16 */
    PE_Q5_1,   /* 24 bytes: scale, float16 minimum, bits, nibbles; code = n + 16 * bit */
    PE_IQ4_NL, /* 18 bytes: scale, nibbles; code = element n of -127, -104, -83, -65, -49, -35, -22,
                  -10, 1, 13, 25, 38, 53, 69, 89, 113 */
    PE_MXFP4,  /* 17 bytes: e, nibbles; code = element n of 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3,
                  -4, -6, -8, -12; the scale is 2^(e - 128), 0 <= e <= 255 */
    /* Blocks of 256 columns, cols % 256 == 0: two groups, g = 0 and 1, of eight parts of PE_PART
     * columns.  Part p of the block (of 16) has a scale s[p], some types also a minimum m[p]; the
     * whole block has the float16 d, and with minimums dmin.  Column c is 128 g + 32 j + i, i < 32,
     * and is in part c / 16; its sub-block of 32 columns is b = c / 32.  x.low and x.high are the
     * two nibbles of byte x; x:n is the n-th lowest pair of bits.  Bytes in storage order: */
    PE_Q2_K,   /* 84: x[16] q[64] d dmin; code = q[32 g + i]:j; s[p] = x[p].low, m[p] = x[p].high */
    PE_Q3_K,   /* 110: h[32] q[64] l[8] u[4] d; code = q[32 g + i]:j + 4 * (bit b of h[i]) - 4;
                  s[p] = l[p].low, p >= 8: l[p - 8].high, + 16 * u[p mod 4]:(p / 4) - 32 */
    PE_Q4_K,   /* 144: d dmin k[12] q[128]; code = q[64 g + 32 (j / 2) + i].low, j odd: .high;
                  s[2 b], s[2 b + 1] = k[b] mod 64, b >= 4: k[b + 4].low + 16 * k[b - 4]:3;
                  m[2 b], m[2 b + 1] = k[b + 4] mod 64, b >= 4: k[b + 4].high + 16 * k[b]:3 */
    PE_Q5_K,   /* 176: d dmin k[12] h[32] q[128]; code as Q4_K's + 16 * (bit b of h[i]); s, m as
                  Q4_K's */
    PE_Q6_K,   /* 210: q[128] h[64] s[16] d; code = q[64 g + 32 (j mod 2) + i].low, j >= 2: .high, +
                  16 * h[32 g + i]:j - 32; s int8 */
    PE_IQ4_XS, /* 136: d h l[4] q[128], h uint16; code = element q[16 b + i].low, i >= 16:
                  q[16 b + i - 16].high, of IQ4_NL's; s[2 b], s[2 b + 1] = l[b / 2].low, b odd:
                  .high, + 16 * h:b - 32 */
    PE_TYPES   /* the number of types */
};

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

/* The input of a matmul, in the forms that the weight types read: dense types (F32, F16, BF16) read
 * x, the others q and scales as pe_quantize_activations wrote them, and the types of blocks of 256
 * columns sums too.  An array that no matrix reads may be NULL. */
typedef struct {
    int64_t tokens;
    int64_t cols;
    const float *x;      /* [tokens, cols] */
    const int16_t *q;    /* [tokens, ld], ld = n_groups * PE_GROUP, zeros from cols on */
    const float *scales; /* [tokens, n_groups] */
    const int32_t *sums; /* [tokens, ld / PE_PART] */
} pe_activations;

/* ---- threads and instruction sets ------------------------------------------------------------ */

/* A pool of n - 1 threads and the caller.  1 <= n <= 1024; pin != 0 asks for thread i on the i-th
 * processor that this process may use (ignored where the system has no such call).  NULL: no memory
 * or no thread.  A pool serves one caller at a time. */
typedef struct pe_pool pe_pool;
pe_pool *pe_pool_new(int32_t n, int32_t pin);
void pe_pool_free(pe_pool *pool);
int32_t pe_pool_threads(const pe_pool *pool);
/* Memory that the pool keeps for intermediates, in bytes: it grows with the largest call so far.  A
 * level that rewrites the tokens of a matmul (avx512amx) keeps 4 MiB beside it. */
int64_t pe_pool_scratch_bytes(const pe_pool *pool);

/* The instruction sets in this build and on this processor, lowest first: names until NULL.  On
 * Linux the process asks for the tiles of avx512amx when this library is loaded; where the system
 * refuses them, the level is absent. */
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
 * n_groups]; sums [tokens, ld / PE_PART], the sums of PE_PART successive q.  Then |q| <= 32767 and
 * |sums| <= 524,272.  PE_ERROR_NONFINITE if any x is NaN or infinite. */
int32_t pe_quantize_activations(pe_pool *pool, const float *x, int64_t tokens, int64_t cols,
                                int16_t *q, float *scales, int32_t *sums);

/* y[t, r] = sum over c of x[t, c] * w[r, c]:  y [tokens, ldy], of which w.rows columns are written.
 *
 * INT8, INT4: with d[g] = sum over the group's columns of q * code, exact in int32,
 *     y = 0;  for g ascending:  y = y (+) (f32(d[g]) (*) (f32(s_w[g]) (*) s_x[g]))
 * Q8_0, Q4_0, Q5_0, IQ4_NL, MXFP4: each group holds up to four blocks; with d[b] the exact sum of
 * q * code over block b,
 *     p[b] = f32(d[b]) (*) f32(s_w[b]), and p[b] = +0 for blocks past the last column
 *     y = 0;  for g ascending:  y = y (+) (((p[0] (+) p[1]) (+) (p[2] (+) p[3])) (*) s_x[g])
 * Q4_1, Q5_1: the same y; with S[b] the exact sum of q over block b and m[b] its minimum,
 *     p[b] = (f32(d[b]) (*) f32(s_w[b])) (+) (f32(S[b]) (*) f32(m[b])), +0 past the last column
 * Q2_K to Q6_K, IQ4_XS: with P[p] = s[p] * (sum of q * code over part p) for the parts p < 8 of the
 * group, and S[p] the sum of q over part p, all exact in int32,
 *     Q2_K, Q3_K:    D = f32(P[0] + ... + P[7])
 *     Q4_K:          D = f32(P[0] + P[1] + P[4] + P[5]) (+) f32(P[2] + P[3] + P[6] + P[7])
 *     Q5_K:          A[i] = f32(P[2 i] + P[2 i + 1]), i < 4;  B[i] = A[i] (+) A[i + 2], i < 2;
 *                    D = B[0] (+) B[1]
 *     Q6_K, IQ4_XS:  A[i] = f32(P[i]) (+) f32(P[i + 4]), i < 4;  B and D as of Q5_K
 *     Q2_K, Q4_K, Q5_K:  M = f32(m[0] * S[0] + ... + m[7] * S[7])
 *     y = 0;  for g ascending:  y = y (+) (((D (*) d) (-) (M (*) dmin)) (*) s_x[g]), without M and
 *     its difference for types that have no minimums
 * F32, F16, BF16: y = f32(sum8(x[c] * w[c])).
 *
 * int32 holds each sum: INT8 128 * 32767 * 127 = 532,660,752; a block of Q8_0 32 * 32767 * 128 =
 * 134,213,632, of the other types less, and of q alone 32 * 32767 = 1,048,544, exact in float32; of
 * the blocks of 256 columns the sums that f32 is taken of, M last: Q2_K 128 * 32767 * 3 * 15 =
 * 188,737,920 and 62,912,640; Q3_K 128 * 32767 * 4 * 32 = 536,854,528; Q4_K 64 * 32767 * 15 * 63 =
 * 1,981,748,160 and 264,233,088; Q5_K 32 * 32767 * 31 * 63 = 2,047,806,432 and 264,233,088; Q6_K
 * 16 * 32767 * 32 * 128 = 2,147,418,112; IQ4_XS 16 * 32767 * 127 * 32 = 2,130,641,408.
 *
 * expert selects the matrix of a stack (0 for a single one).  PE_ERROR_ARGUMENT: unknown type, cols
 * that the type excludes, or w.cols != a.cols. */
int32_t pe_matmul(pe_pool *pool, const pe_matrix *w, int64_t expert, const pe_activations *a,
                  float *y, int64_t ldy);

/* The same for n <= PE_MAX_SHARED single matrices that read the same a, as one piece of work: the y
 * of w[0] [tokens, w[0]->rows], then the y of w[1], and so on.  A layer of the model has at most
 * four such matrices (qkv, z, b and a of the delta net); the limit is twice that. */
#define PE_MAX_SHARED 8
int32_t pe_matmul_shared_input(pe_pool *pool, const pe_matrix *const *w, int64_t n,
                               const pe_activations *a, float *y);

/* ---- the head, screened ---------------------------------------------------------------------- */

/* The greatest of y = W x is wanted, or the k greatest, with the bits that pe_matmul gives: here
 * W [rows, cols] is the head, F32, F16, BF16 or Q8_0, and x one token's [cols].  A smaller form V of W,
 * and a proved bound on the difference that it makes, show which rows can be among them; pe_matmul
 * of these rows alone decides.  (A row's bits do not depend on the other rows.)
 *
 * The bound.  |.| of a vector is its 2-norm, u = 2^-24, G = n_groups, cols <= 2^18.
 * z [cols] is the input as the quantised types read it: q * scale of pe_quantize_activations.
 *     v[r]: row r of V;  error[r] >= |w[r] - v[r]|;  norm[r] >= |w[r]|, both < 2^61
 *     s = pe_matmul of V, by z;  y = pe_matmul of W, by x (F32, F16, BF16) or by z (Q8_0)
 *     rho = (G + 8) * 2 * u;  m = max(|x|, |z|) < 2^60;  d = |x - z|
 *     |y[r] - s[r]| <= error[r] * a + norm[r] * b + c
 *     a = |z| * (1 + rho);  b = 2 * rho * m + d;  c = (G + 2) * 2^-147
 * Proof.  Between y and s lie two roundings, and two exact differences that Cauchy-Schwarz bounds:
 *   1. y is rounded.  Dense: the products are exact; sum8 has at most cols / 8 + 4 roundings to
 *      float64, then comes one to float32: together at most 2 u of the sum of |w x|, which is
 *      at most norm |x|; and 2^-150 where y is subnormal.  Q8_0: each block's term is rounded as d[b],
 *      times its scale, in two sums of its group, times s_x, and in at most G sums: G + 5 times.
 *      The terms' magnitudes sum to at most the sum over blocks of |w_block| |z_block| <= norm |z|;
 *      so the roundings to at most ((1 + u)^(G + 5) - 1) norm |z| < (1 + 2^-12) (G + 5) u norm |z|,
 *      and 2^-150 for each product with s_x that is subnormal (nothing before it can be: a float16
 *      is a multiple of 2^-24).  Dense or Q8_0: at most rho / 2 * norm * m + G * 2^-150.
 *   2. |w . x - w . z| <= norm * d.
 *   3. |w . z - v . z| <= error * |z|.
 *   4. s is rounded, as Q8_0 in 1: at most rho / 2 * |v| |z| + G * 2^-150, |v| <= norm + error.
 * Sum: error * |z| * (1 + rho / 2) + norm * (rho * m + d) + G * 2^-149.  Nothing overflows: all that is
 * summed is < 2^123.  a, b and c are greater than that asks for.  This pays for the roundings to
 * float32 of the sum in pe_screen, of which each term but s has a share of its own: for that of s, whose
 * magnitude is at most (norm + error) * |z| * (1 + rho), there is rho.  Who computes a, b and c
 * multiplies each by 1 + 2^-20 in float64 (for |x|, |z|, d, computed there, too) and rounds up.
 *
 * Given `low`, the least exact logit of any k rows: every row that is among the k greatest, or equal
 * to the least of them, has y >= low, and therefore s + bound >= low. */

/* Rows [row0, row1) of w, a type with float values (as pe_quantize_weights), cols % 32 == 0, as V:
 * data uint8 [row1 - row0, cols / 32 * 22], Q5_0; error, norm [row1 - row0].  For a block x of 32:
 *     s = f16(max |x| / 15), the quotient in float64, and at most 65504
 *     code = rint(x / s) within [-15, 15], the quotient in float64, ties to even; 0 where s = 0
 *     norm = f32(sqrt(sum8(x * x)) * (1 + 2^-22) + 2^-120), in float64
 *     error, the same of the differences x - s * code, rounded to float64
 * The factor is more than the roundings of sum, root and float32 can take away.
 * PE_ERROR_NONFINITE: a weight is NaN or infinite, or a row's norm is 2^60 or more. */
int32_t pe_screen_rows(pe_pool *pool, const pe_matrix *w, int64_t row0, int64_t row1, uint8_t *data,
                       float *error, float *norm);

/* keep[r] = s[r] (+) (((error[r] (*) a) (+) (norm[r] (*) b)) (+) c) >= low: 1 or 0.  All [rows]. */
int32_t pe_screen(pe_pool *pool, const float *s, const float *error, const float *norm,
                  int64_t rows, float a, float b, float c, float low, uint8_t *keep);

/* ---- elementwise ----------------------------------------------------------------------------- */

/* y[i] = function(x[i]), i < n, correctly rounded; y may be x.  softplus(x) = log(1 + exp(x)), and
 * x itself above 20, as torch.nn.functional.softplus.  exp(NaN) and the like give NaN. */
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
 * 0 < inv_freq <= 1.
 * Of a model with YaRN the caller multiplies both: cos (*) f32(attention factor), sin likewise. */
int32_t pe_rope_table(int64_t start, int64_t tokens, const float *inv_freq, int64_t half,
                      float *cos_table, float *sin_table);

/* In place, for heads vectors of each token, x contiguous [tokens, heads, n], n >= 2 * half:
 *     x1 = x[i], x2 = x[i + half]:  x[i] = (x1 (*) cos) (-) (x2 (*) sin)
 *                                   x[i + half] = (x2 (*) cos) (+) (x1 (*) sin)
 * Entries from 2 * half on stay. */
int32_t pe_rope(pe_pool *pool, float *x, int64_t tokens, int64_t heads, int64_t n, int64_t half,
                const float *cos_table, const float *sin_table);

/* ---- mixers ---------------------------------------------------------------------------------- */

/* Causal depthwise convolution, then silu: x [tokens, channels], weight [taps, channels] (tap
 * taps - 1 is for the newest token), conv_state [taps - 1, channels] the inputs before x, oldest
 * first, updated to the last taps - 1 inputs; y [tokens, channels]:
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
 * their own keys and values.  query [tokens, heads, n]; the n elements of key-value head k at
 * position p < start + tokens are at key_cache + p * ld + k * ld_head, likewise of value_cache; out
 * [tokens, heads, n]; head h reads key-value head h / (heads / kv_heads).  Per token (positions p =
 * 0 .. its own) and head:
 *     score[p] = dot16(query[i] (*) key[p, i]) (*) scale
 *     m = max score;  e[p] = exp(score[p] (-) m);  total = f32(sum8(e[p])), p ascending
 *     out[j] = (sum over p ascending of e[p] (*) value[p, j]) (/) total
 * scale = f32(head_dim^-0.5).  Non-finite scores give PE_ERROR_NONFINITE. */
int32_t pe_attention(pe_pool *pool, const float *query, const float *key_cache,
                     const float *value_cache, int64_t ld, int64_t ld_head, int64_t start,
                     int64_t tokens, int64_t heads, int64_t kv_heads, int64_t n, float scale,
                     float *out);

/* The same over a float16 cache, whose entries are widened exactly: keys and values were rounded to
 * float16, nearest even, when they were stored. */
int32_t pe_attention_f16(pe_pool *pool, const float *query, const uint16_t *key_cache,
                         const uint16_t *value_cache, int64_t ld, int64_t ld_head, int64_t start,
                         int64_t tokens, int64_t heads, int64_t kv_heads, int64_t n, float scale,
                         float *out);

/* The memory that each thread takes in either of them, and frees at their end, in bytes: the most
 * for that many positions (start + tokens), at any number of tokens and threads.  0: heads or
 * kv_heads is less than 1. */
int64_t pe_attention_scratch_bytes(int64_t positions, int64_t heads, int64_t kv_heads, int64_t n);
/* The memory of the pool that either needs, in bytes: of few tokens, whose cache all threads read
 * together.  0 where that is not so. */
int64_t pe_attention_shared_bytes(int64_t threads, int64_t positions, int64_t heads,
                                  int64_t kv_heads);

/* ---- mixture of experts ---------------------------------------------------------------------- */

/* logits [tokens, experts] -> routing_weights, selected_experts [tokens, top_k], by falling
 * probability:
 *     m = max logit;  e = exp(logit (-) m);  total = sum8(e), in float64;  p = f32(e / total)
 *     the top_k greatest p, equal ones by ascending expert index
 *     routing_weight = f32(p / sum of the chosen p, float64, in the order chosen)
 * 1 <= top_k <= experts <= 65536.  PE_ERROR_NONFINITE for NaN or infinite logits. */
int32_t pe_router(pe_pool *pool, const float *logits, int64_t tokens, int64_t experts,
                  int64_t top_k, float *routing_weights, int32_t *selected_experts);
/* The routing weights of experts that are given, in place of the greatest: selected_experts [tokens,
 * top_k], each 0 .. experts - 1 and once in its row -> routing_weights [tokens, top_k], as pe_router
 * computes them of p.  PE_ERROR_NONFINITE also where the chosen p of a token are all 0. */
int32_t pe_routing_weights(pe_pool *pool, const float *logits, int64_t tokens, int64_t experts,
                           int64_t top_k, const int32_t *selected_experts, float *routing_weights);

/* The memory that each thread takes in either, and frees at its end, in bytes. */
int64_t pe_router_scratch_bytes(int64_t experts);

/* Where the gate, up and down of one expert are. */
typedef struct {
    const void *data[3];
    const uint16_t *scales[3]; /* NULL: the type has no array of scales */
} pe_expert_place;

/* See "experts that are read when they are chosen". */
typedef struct pe_expert_cache pe_expert_cache;

/* The routed experts (stacks) and the shared expert (single matrices); gate and up [ff, hidden],
 * down [hidden, ff], each of any type.  A fused gate_up is two views of one array.
 * With places or a cache, data and the strides of gate, up and down are not used. */
typedef struct {
    int64_t num_experts;
    pe_matrix gate, up, down;
    pe_matrix shared_gate, shared_up, shared_down;
    const pe_expert_place *places; /* [num_experts] for experts that are not in stacks; or NULL */
    pe_expert_cache *cache;        /* the experts of its layer cache_layer; or NULL */
    int64_t cache_layer;
} pe_experts_weights;

/* Where pe_experts puts the intermediates of a trace; any may be NULL. */
typedef struct {
    float *routed;      /* [tokens, hidden] mlp.experts */
    float *shared_gate; /* [tokens, shared ff] mlp.shared_expert.gate_proj */
    float *shared_up;   /* [tokens, shared ff] mlp.shared_expert.up_proj */
    float *shared;      /* [tokens, hidden] mlp.shared_expert */
} pe_experts_trace;

/* a: the hidden states (x always; the other arrays if any matrix reads them); y [tokens, hidden].
 * Each matmul as pe_matmul, h quantised anew as pe_quantize_activations does:
 *     expert(x) = down(silu(gate x) (*) (up x))
 *     routed = +0;  for the token's experts by ascending index:
 *         routed = routed (+) (expert(x) (*) routing_weight)
 *     y = routed (+) (sigmoid(shared_expert_gate) (*) shared(x))
 * selected_experts, routing_weights [tokens, top_k]; shared_expert_gate [tokens], before sigmoid.
 * PE_ERROR_NONFINITE: an intermediate is not finite; with a cache also a scale that was read, see
 * pe_expert_cache_refused.  Source: Qwen3_5MoeSparseMoeBlock. */
int32_t pe_experts(pe_pool *pool, const pe_experts_weights *w, const pe_activations *a,
                   const int32_t *selected_experts, const float *routing_weights, int64_t top_k,
                   const float *shared_expert_gate, float *y, const pe_experts_trace *trace);

/* The memory of the pool that one pe_experts needs, in bytes. */
int64_t pe_experts_scratch_bytes(int64_t tokens, int64_t hidden, int64_t num_experts, int64_t top_k,
                                 int64_t ff, int64_t shared_ff);

/* ---- experts that are read when they are chosen ---------------------------------------------- */

/* A cache of experts: `slots` blocks of memory, each with room for one expert of one of its layers.
 * A limit says how many of them may hold one; memory is taken when a slot is filled.
 * pe_experts asks for the chosen experts that are not in memory, PE_AHEAD of them at once, and
 * computes the shared expert and the experts that are in memory meanwhile.  What is in memory changes
 * no bit.
 *
 * Bytes are read past the page cache where the file allows it (O_DIRECT): from the file's pages of
 * PE_PAGE bytes that hold them to the same place of pages in the slot.
 *
 * Policy.  An expert's heat counts the tokens that chose it, a layer's time the tokens that passed
 * through it, each token as PE_HEAT.  After each PE_HALF_LIFE tokens of a layer its time and its
 * experts' heat are halved, rounded down.  A call of pe_experts with n tokens first does that (more
 * than once, if n is large), then adds n to the time, and to the heat.  A missing expert takes a slot
 * that is empty, where the limit allows it, or else the slot of the expert with the least heat / time
 * of its layer; among equals, of the one whose last use is the longest ago (in calls); among these, of
 * the first one.  Heat without time would not do: a prompt passes layer by layer, and those that it has
 * passed would look hotter than those to come, which would lose their experts just before they are
 * needed.  The experts of the call that are in memory, and those that were asked for and are not
 * computed yet, keep their slots.  Experts that are in memory are computed first; the missing ones are
 * asked for, and computed, by ascending index.  Each expert that is computed makes room for the next
 * one, so that a long prompt, which needs nearly all experts of a layer, takes few slots from the other
 * layers. */
#define PE_PAGE 4096
#define PE_AHEAD 32
#define PE_HEAT 256
#define PE_HALF_LIFE 1024

/* nbytes of a file at offset, to byte offset mod PE_PAGE behind `at` of the slot; `at` is a multiple
 * of PE_PAGE.  The slot has room up to the end of the last page. */
typedef struct {
    int64_t file; /* index of a descriptor */
    int64_t offset;
    int64_t nbytes;
    int64_t at;
} pe_expert_read;

/* Words of one expert's gate, up or down (part 0, 1, 2) or of its scales (3, 4, 5): count words of
 * `bytes` bytes (1, 2 or 4; little endian), stride bytes apart, the first `offset` behind the part's
 * place.  A word whose bits `bits` are all ones is refused: its scale, or value, is not finite. */
typedef struct {
    int64_t part;
    int64_t offset;
    int64_t count;
    int64_t stride;
    int64_t bytes;
    int64_t bits;
} pe_scale_words;

/* One layer.  The arrays must live as long as the cache. */
typedef struct {
    int64_t n_reads;
    const pe_expert_read *reads; /* [experts, n_reads] */
    const int64_t *places;       /* [experts, 6]: gate, up, down, their scales in the slot; -1: none */
    int64_t n_words;
    const pe_scale_words *words; /* [n_words]: checked when an expert is read for the first time */
} pe_expert_layer;

/* files: descriptors, which the caller closes after pe_expert_cache_free; past_cache: they were
 * opened for reads past the page cache; otherwise what was read is dropped from it.  threads: that
 * many reads at a time.  slot_bytes: a multiple of PE_PAGE.  slots, layers, experts, threads >= 1.
 * NULL: no memory, no thread, or an argument out of range. */
pe_expert_cache *pe_expert_cache_new(int64_t layers, int64_t experts, const pe_expert_layer *layer,
                                     int64_t slots, int64_t slot_bytes, const int32_t *files,
                                     int32_t past_cache, int32_t threads);
void pe_expert_cache_free(pe_expert_cache *cache);

/* So many slots may hold an expert from now on, at least 1 and at most those that the cache was made
 * with, which is what it begins with.  Experts above that give up their slots, by the policy, and the
 * memory of these goes back to the system.  Not during a call of pe_experts. */
void pe_expert_cache_limit(pe_expert_cache *cache, int64_t slots);

/* Since the cache was made. */
typedef struct {
    int64_t hits;        /* experts that a call chose and found in memory, one per call and expert */
    int64_t misses;      /* experts that a call chose and had to read */
    int64_t asked_bytes; /* the nbytes of their reads */
    int64_t read_bytes;  /* whole pages */
    int64_t wait_ns;     /* time in which a call had nothing to compute but what was not there yet */
    int64_t resident;    /* experts in memory now */
} pe_expert_counts;
void pe_expert_cache_counts(pe_expert_cache *cache, pe_expert_counts *counts);

/* [layers, experts] -> 1 for each expert in memory, otherwise 0. */
void pe_expert_cache_resident(pe_expert_cache *cache, uint8_t *resident);

/* The expert, layer * experts + expert, whose words were refused; -1: none was. */
int64_t pe_expert_cache_refused(pe_expert_cache *cache);

/* ---- replay ---------------------------------------------------------------------------------- */

/* The calls for every single token are the same; only the contents of the arrays change.  A caller
 * in an interpreted language spends more time between two calls than many calls take, so the calls
 * can be made from a list.  The memory that the list points to must live as long as the list is
 * used. */

/* An argument: i an integer of any size, d a float or double, p a pointer. */
typedef union {
    int64_t i;
    double d;
    void *p;
} pe_word;

/* An operation and its arguments after the pool.  14: pe_delta_rule has the most. */
#define PE_CALL_WORDS 14
typedef struct {
    int32_t operation;
    pe_word words[PE_CALL_WORDS];
} pe_call;

/* The number of an operation of this file that can be replayed, by its name; -1 for any other. */
int32_t pe_operation(const char *name);

/* Make the calls one after another, up to the first that returns an error: the result is its
 * status, *failed its index.  PE_ERROR_ARGUMENT: also an operation with an unknown number. */
int32_t pe_replay(pe_pool *pool, const pe_call *calls, int64_t n, int64_t *failed);

/* ---- quantizing weights ---------------------------------------------------------------------- */

/* How a group's scale is chosen: see pe_quantize_weights. */
#define PE_SCALE_ABSMAX 0
#define PE_SCALE_MSE 1

/* Rows [row0, row1) of w (in the caller's order) to symmetric codes, |code| <= largest (127 or 7),
 * in groups of group_size columns, the last of which may be short.  Row r is stored row
 * row_order[r], column c is stored column col_order[c]; NULL: the same.  w is not INT8 or INT4.
 * codes [row1 - row0, cols] int8; scales [row1 - row0, n_groups] float16.  For a group x:
 *     amax = max |x|;  amax = 0: s = 0 and every code 0
 *     s = f16(amax / largest), the quotient in float64; 2^-24 where that is 0; the next float16 up
 *         where rint(amax / s) > largest, which is only possible for a subnormal s
 *     code = rint(x / s), the quotient in float64, ties to even
 * PE_SCALE_MSE starts from that s and takes, of the float16 values from it downward to 3/4 of it
 * (as 64 evenly spaced candidates f16(s * (256 - i) / 256)), the one whose codes, clipped to
 * [-largest, largest], have the least sum over the group, ascending, in float64, of
 * (x - code * s)^2; the greatest such s among equals.
 * PE_ERROR_NONFINITE: a value is NaN or infinite, or needs a scale beyond float16. */
int32_t pe_quantize_weights(pe_pool *pool, const pe_matrix *w, int64_t expert,
                            const int64_t *row_order, const int64_t *col_order, int64_t row0,
                            int64_t row1, int32_t largest, int64_t group_size, int32_t method,
                            int8_t *codes, uint16_t *scales);

/* Two codes in a byte, i < n: packed[i] = (codes[2 i] + 8) | (codes[2 i + 1] + 8) << 4. */
int32_t pe_pack_int4(pe_pool *pool, const int8_t *codes, int64_t n, uint8_t *packed);

/* ---- files ----------------------------------------------------------------------------------- */

/* The index of the first of count words, each of width 1, 2 or 4 bytes, little-endian, stride bytes
 * apart, in which all of `bits` are set: a scale that its type refuses.  -1: there is none. */
int64_t pe_first_refused(const void *data, int64_t count, int64_t stride, int32_t width,
                         uint32_t bits);

/* Strings as a GGUF has them, one after another: a length, uint64, little-endian, and so many bytes.
 * ends[i]: where string i ends, in bytes from data, i < count.  Returns the number of strings that end
 * within size bytes: count, or the index of the first that does not. */
int64_t pe_string_ends(const void *data, int64_t size, int64_t count, int64_t *ends);

/* ---- error-compensated rounding --------------------------------------------------------------- */

/* Everything is float64, and multiply, add, subtract and divide are operations of their own.  For one
 * linear layer y = W x, x [n]: H is the sum of x x^T over calibration tokens, and damped. */

/* out [m, n]: out[i, j] = out[i, j] (+) (a[t, i] (*) b[t, j]), t ascending; a [tokens, m],
 * b [tokens, n].  lower: m == n, and only outputs with j <= i have that value; the others are
 * undefined.  Any split of the tokens over calls gives the same bits. */
int32_t pe_add_products(pe_pool *pool, const double *a, const double *b, int64_t tokens, int64_t m,
                        int64_t n, int32_t lower, double *out);

/* sums [n]: sums[j] = sums[j] (+) x[t, j]^2, t ascending; a square of a float32 is exact. */
int32_t pe_add_squares(pe_pool *pool, const float *x, int64_t tokens, int64_t n, double *sums);

/* h [n, n], symmetric, of which j <= i is read, to its factors, in place: H = L diag(d) L^T.
 *     v[i, k] = h[i, k] (-) (v[i, j] (*) u[j, k]), j = 0 .. k - 1 ascending, k <= i
 *     d[k] = v[k, k];  u[k, i] = v[i, k] (/) d[k], i > k, which is L[i, k]
 * Afterwards h has d in the diagonal, v below it and u above it.
 * PE_ERROR_NONFINITE: a d that is not above 0, or not finite. */
int32_t pe_factor(pe_pool *pool, double *h, int64_t n);

/* Scales that pe_round_weights tries: f16(absmax * (32 - c) / 32), c below this. */
#define PE_ROUND_CANDIDATES 16

/* Rows w [rows, n] to symmetric codes in groups of group_size columns, |code| <= largest (127 or
 * 7), so that the sum over tokens of (W x - D x)^2 is small, D = code * scale.  f [n, n]: factors as
 * pe_factor leaves them.  b [rows, n] or NULL: first w becomes w + b H^-1:
 *     p[i] = (b[i] (-) (v[i, j] (*) p[j]), j = 0 .. i - 1 ascending) (/) d[i]
 *     z[i] = p[i] (-) (u[i, j] (*) z[j]), j = n - 1 .. i + 1 descending;  w[i] = w[i] (+) z[i]
 * Then groups from the last to the first, and in a group the columns from the last to the first:
 *     t[i] = w[i] (+) (u[i, j] (*) e[j]), j = n - 1 .. i + 1 descending
 *     code[i] = t[i] (/) s rounded to the nearest integer, ties to even, clipped to [-largest, largest]
 *     e[i] = w[i] (-) (code[i] (*) s)
 *     loss = loss (+) (d[i] (*) (r (*) r)), r = t[i] (-) (code[i] (*) s)
 * absmax = f16(a (/) largest), a the greatest |t[i]| of the group, each with the e of the groups
 * behind it alone; 2^-24 where that is 0 and a is not.  s is the one of PE_ROUND_CANDIDATES, in the
 * order of c, with the least loss of the group, the first of equals; a scale that is 0 is taken
 * only where absmax is 0, and its codes are 0.  f NULL: u is 0, d [n] is given, and b is NULL.
 * codes [rows, n] int8, scales [rows, n_groups] float16.
 * PE_ERROR_NONFINITE: a t that is not finite, or needs a scale beyond float16.
 * Source: Frantar et al., "GPTQ" (2022), as Babai's nearest plane (Chen et al., 2025). */
int32_t pe_round_weights(pe_pool *pool, const float *w, const double *b, const double *f,
                         const double *d, int64_t rows, int64_t n, int64_t group_size,
                         int32_t largest, int8_t *codes, uint16_t *scales);

/* ---- soft labels ----------------------------------------------------------------------------- */

/* Three steps over rows of logits [tokens, vocab], vocab >= 1; rows are shared out.  In all three
 *     m = the greatest of the row;  e[i] = exp(power (*) (logit[i] (-) m))
 * where power (*) is left out if it is 1.  PE_ERROR_NONFINITE for NaN or infinite logits. */

/* ids [tokens, top_k]: the top_k greatest logits of each row, by falling logit, the lower id first
 * among equals (+0 and -0 are equal).  1 <= top_k <= vocab. */
int32_t pe_top_k(pe_pool *pool, const float *logits, int64_t tokens, int64_t vocab, int64_t top_k,
                 int32_t *ids);

/* power = 1.  ids [tokens, n], n >= 0, in any order, each at most once in a row; a negative one is
 * no id, another at or above vocab is PE_ERROR_ARGUMENT.
 *     total[t] = sum8(e), i ascending
 *     rest[t] = sum8(e'), e' = e with +0 in place of the ids' terms */
int32_t pe_exp_sums(pe_pool *pool, const float *logits, int64_t tokens, int64_t vocab,
                    const int32_t *ids, int64_t n, double *total, double *rest);

/* Draws with replacement, with probabilities in proportion to e; power > 0 and finite.
 * b[j] = sum8 of block j of e, PE_DRAW_BLOCK terms, the last block may be short;  B[j] the sum of
 * b[0..j], ascending;  total[t] = B[last].  For u = uniforms[t, d] in [0, 1):
 *     goal = u * B[last], in float64;  j the least with B[j] > goal;  B[-1] = +0
 *     ids[t, d] = the least i of block j for which B[j - 1] + e[first of j] + ... + e[i], added
 *     one at a time, is > goal; where there is none, the last i of the block with e[i] > 0
 * PE_ERROR_ARGUMENT: also a u that is not in [0, 1). */
#define PE_DRAW_BLOCK 256
int32_t pe_draw(pe_pool *pool, const float *logits, int64_t tokens, int64_t vocab, float power,
                const double *uniforms, int64_t draws, int32_t *ids, double *total);

/* The memory that each thread takes in pe_exp_sums and pe_draw, and frees at its end, in bytes. */
int64_t pe_labels_scratch_bytes(int64_t vocab);

/* CDEF END */

#endif
