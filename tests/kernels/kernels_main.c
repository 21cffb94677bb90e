/* kernels_main.c - every operation of pyengine.h on every instruction set, compared with the scalar
 * level bit for bit, without Python: for emulators, valgrind and the sanitizers of other compilers.
 *
 *     tools/check/build_kernels_main.sh cc "$(uname -m)" /tmp/kernels_main && /tmp/kernels_main
 *
 * One line for each operation and level: how many cases, a hash of all the results, and "equal", or
 * where the first difference lies; exit status 1 if there is any.  Inputs come from a generator
 * with a fixed seed by integer steps alone, so that the hashes of two machines may be compared.
 * Every array is a malloc block of just its size.  tests/kernels/test_*.py are the fuller tests, against
 * the contracts and with extremes.
 */
#define _POSIX_C_SOURCE 200809L
#include "pyengine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SEED 1729
#define MAX_BLOCKS 128

static void give_up(const char *what)
{
    fprintf(stderr, "kernels_main: %s\n", what);
    exit(2);
}

/* ---- random numbers: xorshift64*, exact steps only -------------------------------------------- */

static uint64_t random_state;

static uint64_t random_bits(void)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return random_state * UINT64_C(0x2545f4914f6cdd1d);
}

static void seed(uint64_t op, uint64_t index)
{
    random_state = SEED + op * UINT64_C(0x9e3779b97f4a7c15) + index * UINT64_C(0xbf58476d1ce4e5b9);
    for (int i = 0; i < 8; i++)
        random_bits();
}

/* low <= result <= high */
static int64_t random_int(int64_t low, int64_t high)
{
    return low + (int64_t)(random_bits() >> 11) % (high - low + 1);
}

/* 2^exponent: a product of exact factors. */
static float power_of_two(int64_t exponent)
{
    float f = 1.0f;
    for (; exponent > 0; exponent--)
        f *= 2.0f;
    for (; exponent < 0; exponent++)
        f *= 0.5f;
    return f;
}

/* In [-1, 1), 24 bits, times 2^-bits .. 2^bits. */
static float random_float(int bits)
{
    float f = (float)random_int(-(1 << 23), (1 << 23) - 1) * 0x1p-23f;
    return bits ? f * power_of_two(random_int(-bits, bits)) : f;
}

/* ---- the arrays of one case ------------------------------------------------------------------- */

typedef struct {
    unsigned char *data;
    size_t bytes;
    int is_output;
} block;

static block blocks[MAX_BLOCKS];
static int n_blocks;

static void *array(size_t bytes, int is_output)
{
    if (n_blocks == MAX_BLOCKS)
        give_up("too many arrays in a case");
    unsigned char *data = malloc(bytes ? bytes : 1);
    if (!data)
        give_up("no memory");
    memset(data, 0xa5, bytes);
    blocks[n_blocks++] = (block){data, bytes, is_output};
    return data;
}

static float *output(int64_t n) { return array((size_t)n * sizeof(float), 1); }

static float *fill(float *x, int64_t n, int bits)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = random_float(bits);
    return x;
}

static float *input(int64_t n, int bits)
{
    return fill(array((size_t)n * sizeof(float), 0), n, bits);
}

/* Read and written: its random start belongs to the case. */
static float *state(int64_t n, int bits) { return fill(output(n), n, bits); }

/* In (0, 1). */
static float *fractions(int64_t n)
{
    float *x = array((size_t)n * sizeof(float), 0);
    for (int64_t i = 0; i < n; i++)
        x[i] = (float)random_int(1, (1 << 24) - 1) * 0x1p-24f;
    return x;
}

static size_t output_bytes(void)
{
    size_t bytes = 0;
    for (int i = 0; i < n_blocks; i++)
        bytes += blocks[i].is_output ? blocks[i].bytes : 0;
    return bytes;
}

/* All outputs end to end; frees the case's arrays. */
static unsigned char *take_outputs(size_t *bytes)
{
    *bytes = output_bytes();
    unsigned char *all = malloc(*bytes + 1), *at = all;
    if (!all)
        give_up("no memory");
    for (int i = 0; i < n_blocks; i++) {
        if (blocks[i].is_output) {
            memcpy(at, blocks[i].data, blocks[i].bytes);
            at += blocks[i].bytes;
        }
        free(blocks[i].data);
    }
    n_blocks = 0;
    return all;
}

/* ---- matrices and activations ------------------------------------------------------------------ */

static int64_t groups_of(int64_t cols) { return (cols + PE_GROUP - 1) / PE_GROUP; }

/* A finite half, neither zero nor subnormal. */
static uint16_t random_half(void)
{
    uint16_t magnitude = (uint16_t)random_int(3 << 10, (18 << 10) - 1);
    return (uint16_t)(magnitude | random_int(0, 1) << 15);
}

static uint16_t *halves(int64_t n)
{
    uint16_t *x = array((size_t)n * sizeof *x, 0);
    for (int64_t i = 0; i < n; i++)
        x[i] = random_half();
    return x;
}

/* n - 1, ..., 0 */
static int64_t *reversed(int64_t n)
{
    int64_t *order = array((size_t)n * sizeof *order, 0);
    for (int64_t i = 0; i < n; i++)
        order[i] = n - 1 - i;
    return order;
}

/* Halves of small integers times a scale, which the greatest of them, largest times it, gives back; some
 * an ulp away, so that their quotient in float32 is a half and their exact one is not. */
static void make_ties(float *x, int64_t n, int32_t largest)
{
    const float scale = 1.0f + (float)random_int(0, 1023) * 0x1p-10f; /* a float16: products are exact */
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        x[i] = scale * (i % 32 ? (float)random_int(-2 * largest, 2 * largest) * 0.5f : (float)largest);
        memcpy(&bits, x + i, sizeof bits);
        if (i % 32 && bits & 0x7fffffffu)
            bits -= (uint32_t)random_int(0, 1);
        memcpy(x + i, &bits, sizeof bits);
    }
}

/* Floats as random_row draws them, which as they are want a scale beyond float16; others stay. */
static void divide_by_16(int32_t type, void *data, int64_t n)
{
    float *f = data;
    uint16_t *h = data;
    for (int64_t i = 0; i < n; i++) {
        if (type == PE_F32)
            f[i] *= 0x1p-4f;
        else if (type == PE_BF16)
            h[i] -= 4 << 7; /* of the exponent */
    }
}

/* From 2^-20 to 2^20. */
static uint16_t random_bf16(void)
{
    uint16_t magnitude = (uint16_t)random_int(107 << 7, (148 << 7) - 1);
    return (uint16_t)(magnitude | random_int(0, 1) << 15);
}

/* Of a type of blocks of PE_BLOCK columns; 0 of any other. */
static size_t block_bytes(int32_t type)
{
    switch (type) {
    case PE_Q8_0:
        return 34;
    case PE_MXFP4:
        return 17;
    case PE_Q4_0:
    case PE_IQ4_NL:
        return 18;
    case PE_Q4_1:
        return 20;
    case PE_Q5_0:
        return 22;
    case PE_Q5_1:
        return 24;
    default:
        return 0;
    }
}

/* Of a type of blocks of 256 columns: its bytes, and where d is; dmin follows, if there is one. */
typedef struct {
    size_t bytes, d, halves;
} block256;

static block256 block256_of(int32_t type)
{
    switch (type) {
    case PE_Q2_K:
        return (block256){84, 80, 2};
    case PE_Q3_K:
        return (block256){110, 108, 1};
    case PE_Q4_K:
        return (block256){144, 0, 2};
    case PE_Q5_K:
        return (block256){176, 0, 2};
    case PE_Q6_K:
        return (block256){210, 208, 1};
    case PE_IQ4_XS:
        return (block256){136, 0, 1};
    default:
        return (block256){0, 0, 0};
    }
}

/* Bytes of float16 at the start of a block: a scale, and a minimum. */
static size_t block_halves(int32_t type)
{
    return type == PE_MXFP4 ? 0 : type == PE_Q4_1 || type == PE_Q5_1 ? 4 : 2;
}

static size_t row_bytes(int32_t type, int64_t cols)
{
    if (block_bytes(type))
        return (size_t)(cols / PE_BLOCK) * block_bytes(type);
    if (block256_of(type).bytes)
        return (size_t)(cols / 256) * block256_of(type).bytes;
    switch (type) {
    case PE_F32:
        return (size_t)cols * 4;
    case PE_F16:
    case PE_BF16:
        return (size_t)cols * 2;
    case PE_INT8:
        return (size_t)cols;
    default:
        return (size_t)(cols / 2);
    }
}

static void random_row(int32_t type, int64_t cols, unsigned char *row)
{
    const block256 big = block256_of(type);
    for (size_t i = 0; i < row_bytes(type, cols) && big.bytes; i++) {
        size_t at = i % big.bytes - big.d;
        if (at >= 2 * big.halves)
            row[i] = (unsigned char)random_int(0, 255);
        else if (at % 2 == 0) {
            uint16_t h = random_half();
            memcpy(row + i, &h, sizeof h);
        }
    }
    for (size_t i = 0; i < row_bytes(type, cols); i++) {
        float f;
        uint16_t h;
        if (type == PE_F32 && i % 4 == 0) {
            f = random_float(20);
            memcpy(row + i, &f, sizeof f);
        } else if ((type == PE_F16 || type == PE_BF16) && i % 2 == 0) {
            h = type == PE_F16 ? random_half() : random_bf16();
            memcpy(row + i, &h, sizeof h);
        } else if (block_bytes(type) && i % block_bytes(type) < block_halves(type)) {
            if (i % block_bytes(type) % 2 == 0) {
                h = random_half();
                memcpy(row + i, &h, sizeof h);
            }
        } else if (type == PE_MXFP4 && i % block_bytes(type) == 0) {
            row[i] = (unsigned char)random_int(0, 138); /* 2^-128 to 2^10 */
        } else if (block_bytes(type)) {
            row[i] = (unsigned char)random_int(0, 255);
        } else if (type == PE_INT8) {
            row[i] = (unsigned char)random_int(-127, 127);
        } else if (type == PE_INT4) {
            int64_t pair = random_int(0, 15 * 15 - 1);
            row[i] = (unsigned char)((1 + pair % 15) | (1 + pair / 15) << 4);
        }
    }
}

/* cols raised to what the type can hold. */
static int64_t allowed_cols(int32_t type, int64_t cols)
{
    int64_t step = block256_of(type).bytes ? 256 : block_bytes(type) ? PE_BLOCK : type == PE_INT4 ? 2 : 1;
    return (cols + step - 1) / step * step;
}

/* A stack of count matrices; the scales' rows are a little longer than they must be, but the last. */
static pe_matrix random_stack(int32_t type, int64_t count, int64_t rows, int64_t cols)
{
    const size_t bytes = row_bytes(type, cols);
    pe_matrix w = {.type = type, .rows = rows, .cols = cols};
    unsigned char *data = array((size_t)(count * rows) * bytes, 0);
    for (int64_t r = 0; r < count * rows; r++)
        random_row(type, cols, data + (size_t)r * bytes);
    w.data = data;
    w.expert_stride = rows * (int64_t)bytes;
    if (type == PE_INT8 || type == PE_INT4) {
        const int64_t n = count * groups_of(cols), ld = rows + 3;
        uint16_t *scales = array((size_t)((n - 1) * ld + rows) * sizeof *scales, 0);
        for (int64_t i = 0; i < (n - 1) * ld + rows; i++)
            scales[i] = random_half();
        w.scales = scales;
        w.scale_ld = ld;
        w.scale_expert_stride = groups_of(cols) * ld;
    }
    return w;
}

/* x, and q, scales and sums as a quantiser might have left them. */
static pe_activations random_activations(int64_t tokens, int64_t cols)
{
    const int64_t groups = groups_of(cols);
    int16_t *q = array((size_t)(tokens * groups * PE_GROUP) * sizeof *q, 0);
    for (int64_t i = 0; i < tokens * groups * PE_GROUP; i++)
        q[i] = i % (groups * PE_GROUP) < cols ? (int16_t)random_int(-32767, 32767) : 0;
    const float *x = input(tokens * cols, 10), *scales = input(tokens * groups, 10);
    int32_t *sums = array((size_t)(tokens * groups * PE_GROUP / PE_PART) * sizeof *sums, 0);
    for (int64_t i = 0; i < tokens * groups * PE_GROUP / PE_PART; i++) {
        sums[i] = 0;
        for (int64_t j = i * PE_PART; j < (i + 1) * PE_PART; j++)
            sums[i] += q[j];
    }
    return (pe_activations){tokens, cols, x, q, scales, sums};
}

/* ---- operations: case number index ------------------------------------------------------------- */

/* Each array has a name: arguments of a call are evaluated in an order that C leaves open, and two
 * compilers would draw different inputs. */

/* Every length from 1 on, then longer ones. */
static int64_t length(int index) { return index < 70 ? index + 1 : random_int(71, 700); }

static int32_t quantize(pe_pool *pool, int index)
{
    const int64_t tokens = random_int(1, 5), cols = length(index), groups = groups_of(cols);
    const float *x = input(tokens * cols, index % 3 * 40);
    int16_t *q = array((size_t)(tokens * groups * PE_GROUP) * sizeof *q, 1);
    float *scales = output(tokens * groups);
    int32_t *sums = array((size_t)(tokens * groups * PE_GROUP / PE_PART) * sizeof *sums, 1);
    return pe_quantize_activations(pool, x, tokens, cols, q, scales, sums);
}

static int32_t matmul(pe_pool *pool, int index, int32_t type)
{
    const int64_t rows = index % 2 ? random_int(1, 9) : random_int(10, 70);
    const int64_t cols = allowed_cols(type, length(index)), ldy = rows + random_int(0, 2);
    const pe_matrix w = random_stack(type, 2, rows, cols);
    const pe_activations a = random_activations(1 + index % 9, cols);
    return pe_matmul(pool, &w, index % 2, &a, output(a.tokens * ldy), ldy);
}

static int32_t matmul_f32(pe_pool *pool, int index) { return matmul(pool, index, PE_F32); }
static int32_t matmul_f16(pe_pool *pool, int index) { return matmul(pool, index, PE_F16); }
static int32_t matmul_bf16(pe_pool *pool, int index) { return matmul(pool, index, PE_BF16); }
static int32_t matmul_q8_0(pe_pool *pool, int index) { return matmul(pool, index, PE_Q8_0); }
static int32_t matmul_q4_0(pe_pool *pool, int index) { return matmul(pool, index, PE_Q4_0); }
static int32_t matmul_q4_1(pe_pool *pool, int index) { return matmul(pool, index, PE_Q4_1); }
static int32_t matmul_q5_0(pe_pool *pool, int index) { return matmul(pool, index, PE_Q5_0); }
static int32_t matmul_q5_1(pe_pool *pool, int index) { return matmul(pool, index, PE_Q5_1); }
static int32_t matmul_iq4_nl(pe_pool *pool, int index) { return matmul(pool, index, PE_IQ4_NL); }
static int32_t matmul_mxfp4(pe_pool *pool, int index) { return matmul(pool, index, PE_MXFP4); }
static int32_t matmul_q2_k(pe_pool *pool, int index) { return matmul(pool, index, PE_Q2_K); }
static int32_t matmul_q3_k(pe_pool *pool, int index) { return matmul(pool, index, PE_Q3_K); }
static int32_t matmul_q4_k(pe_pool *pool, int index) { return matmul(pool, index, PE_Q4_K); }
static int32_t matmul_q5_k(pe_pool *pool, int index) { return matmul(pool, index, PE_Q5_K); }
static int32_t matmul_q6_k(pe_pool *pool, int index) { return matmul(pool, index, PE_Q6_K); }
static int32_t matmul_iq4_xs(pe_pool *pool, int index) { return matmul(pool, index, PE_IQ4_XS); }
static int32_t matmul_int8(pe_pool *pool, int index) { return matmul(pool, index, PE_INT8); }
static int32_t matmul_int4(pe_pool *pool, int index) { return matmul(pool, index, PE_INT4); }

/* Arguments of every size, up to 2^7. */
static int32_t elementwise(pe_pool *pool, int index,
                           int32_t (*op)(pe_pool *, const float *, int64_t, float *))
{
    const int64_t n = index % 10 == 9 ? random_int(1500, 5000) : length(index);
    const float *x = input(n, 7);
    return op(pool, x, n, output(n));
}

static int32_t exponential(pe_pool *pool, int index) { return elementwise(pool, index, pe_exp); }
static int32_t sigmoid(pe_pool *pool, int index) { return elementwise(pool, index, pe_sigmoid); }
static int32_t silu(pe_pool *pool, int index) { return elementwise(pool, index, pe_silu); }
static int32_t softplus(pe_pool *pool, int index) { return elementwise(pool, index, pe_softplus); }

static int32_t add(pe_pool *pool, int index)
{
    const int64_t n = index % 20 == 19 ? random_int(40000, 70000) : length(index);
    const float *a = input(n, 5), *b = input(n, 5);
    return pe_add(pool, a, b, n, output(n));
}

static int32_t silu_mul(pe_pool *pool, int index)
{
    const int64_t n = length(index) * (1 + index % 4);
    const float *gate = input(n, 5), *up = input(n, 5);
    return pe_silu_mul(pool, gate, up, n, output(n));
}

static int32_t sigmoid_mul(pe_pool *pool, int index)
{
    const int64_t rows = 1 + index % 9, n = length(index), ld = n + index % 4;
    const float *x = input(rows * n, 5), *gate = input((rows - 1) * ld + n, 5);
    return pe_sigmoid_mul(pool, x, gate, ld, rows, n, output(rows * n));
}

static int32_t delta_gates(pe_pool *pool, int index)
{
    const int64_t tokens = 1 + index % 9, heads = length(index);
    const float *a = input(tokens * heads, 4), *b = input(tokens * heads, 4);
    const float *dt_bias = input(heads, 2);
    float *neg_exp_a_log = fractions(heads);
    for (int64_t h = 0; h < heads; h++)
        neg_exp_a_log[h] = -neg_exp_a_log[h];
    float *beta = output(tokens * heads), *decay = output(tokens * heads);
    return pe_delta_gates(pool, a, b, neg_exp_a_log, dt_bias, tokens, heads, beta, decay);
}

static int32_t rms_norm(pe_pool *pool, int index)
{
    const int64_t tokens = 1 + index % 9, heads = 1 + index % 4, n = length(index);
    const int64_t head_ld = n + index % 3, ldx = heads * head_ld + index % 5;
    const float *x = input((tokens - 1) * ldx + (heads - 1) * head_ld + n, 10);
    const float *scale = input(n, 1);
    return pe_rms_norm(pool, x, tokens, ldx, heads, head_ld, n, scale, 1e-6,
                       output(tokens * heads * n));
}

static int32_t rms_norm_gated(pe_pool *pool, int index)
{
    const int64_t rows = 1 + index % 19, n = length(index);
    const float *x = input(rows * n, 10), *z = input(rows * n, 5), *weight = input(n, 1);
    return pe_rms_norm_gated(pool, x, z, rows, n, weight, 1e-6, output(rows * n));
}

static int32_t l2_norm(pe_pool *pool, int index)
{
    const int64_t tokens = 1 + index % 9, heads = 1 + index % 4, n = length(index);
    const int64_t ldx = heads * n + index % 5;
    const float *x = input((tokens - 1) * ldx + heads * n, 10);
    return pe_l2_norm(pool, x, tokens, ldx, heads, n, 0.0884f, output(tokens * heads * n));
}

static int32_t rope_table(pe_pool *pool, int index)
{
    const int64_t tokens = 1 + index % 9, half = length(index), start = random_int(0, 1 << 23);
    const float *inv_freq = fractions(half);
    float *cos_table = output(tokens * half), *sin_table = output(tokens * half);
    (void)pool;
    return pe_rope_table(start, tokens, inv_freq, half, cos_table, sin_table);
}

static int32_t rope(pe_pool *pool, int index)
{
    const int64_t tokens = 1 + index % 9, heads = 1 + index % 4, half = length(index);
    const int64_t n = 2 * half + index % 3;
    float *x = state(tokens * heads * n, 3);
    const float *cos_table = input(tokens * half, 0), *sin_table = input(tokens * half, 0);
    return pe_rope(pool, x, tokens, heads, n, half, cos_table, sin_table);
}

static int32_t causal_conv1d(pe_pool *pool, int index)
{
    const int64_t tokens = 1 + index % 9, channels = length(index), taps = 1 + index % 16;
    const float *x = input(tokens * channels, 5), *weight = input(taps * channels, 2);
    float *conv_state = state((taps - 1) * channels, 5);
    return pe_causal_conv1d(pool, x, tokens, channels, weight, taps, conv_state,
                            output(tokens * channels));
}

static int32_t delta_rule(pe_pool *pool, int index)
{
    const int64_t tokens = 1 + index % 5, key_heads = 1 + index % 3, value_heads = 2 * key_heads;
    const int64_t dk = random_int(1, 40), dv = length(index), ld = value_heads * dv + index % 3;
    const int64_t keys = tokens * key_heads * dk, gates = tokens * value_heads;
    const float *query = input(keys, 0), *key = input(keys, 0);
    const float *value = input((tokens - 1) * ld + value_heads * dv, 5);
    const float *beta = fractions(gates), *decay = fractions(gates);
    float *recurrent_state = state(value_heads * dk * dv, 5), *out = output(gates * dv);
    int32_t *key_head = array((size_t)value_heads * sizeof *key_head, 0);
    for (int64_t h = 0; h < value_heads; h++)
        key_head[h] = (int32_t)random_int(0, key_heads - 1);
    return pe_delta_rule(pool, query, key, value, ld, beta, decay, tokens, key_heads, value_heads,
                         dk, dv, key_head, recurrent_state, out);
}

/* A cache position by position or head by head; of every eighth case a long one, whose few tokens
 * the threads share. */
typedef struct {
    int64_t start, tokens, heads, kv_heads, n, ld, ld_head, elements;
} attention_shape;

static attention_shape attention_case(int index)
{
    attention_shape s = {.start = random_int(0, index % 8 ? 90 : 700), .kv_heads = 1 + index % 3};
    s.tokens = index % 8 ? 1 + index % 11 : 1 + index / 8 % 2;
    s.heads = s.kv_heads * random_int(1, index % 8 == 0 ? 2 : index % 5 ? 6 : 40);
    s.n = length(index);
    const int64_t positions = s.start + s.tokens, by_head = index % 2;
    s.ld = by_head ? s.n : s.kv_heads * s.n;
    s.ld_head = by_head ? positions * s.n : s.n;
    s.elements = positions * s.kv_heads * s.n;
    return s;
}

static int32_t attention(pe_pool *pool, int index)
{
    const attention_shape s = attention_case(index);
    const float *query = input(s.tokens * s.heads * s.n, 1);
    const float *key_cache = input(s.elements, 1), *value_cache = input(s.elements, 5);
    return pe_attention(pool, query, key_cache, value_cache, s.ld, s.ld_head, s.start, s.tokens,
                        s.heads, s.kv_heads, s.n, 0.125f, output(s.tokens * s.heads * s.n));
}

static int32_t attention_f16(pe_pool *pool, int index)
{
    const attention_shape s = attention_case(index);
    const float *query = input(s.tokens * s.heads * s.n, 1);
    const uint16_t *key_cache = halves(s.elements), *value_cache = halves(s.elements);
    return pe_attention_f16(pool, query, key_cache, value_cache, s.ld, s.ld_head, s.start, s.tokens,
                            s.heads, s.kv_heads, s.n, 0.125f, output(s.tokens * s.heads * s.n));
}

static int32_t router(pe_pool *pool, int index)
{
    const int64_t tokens = 1 + index % 9, experts = length(index);
    const int64_t top_k = 1 + index % (experts < 8 ? experts : 8);
    const float *logits = input(tokens * experts, 2);
    float *weights = output(tokens * top_k);
    int32_t *selected = array((size_t)(tokens * top_k) * sizeof *selected, 1);
    return pe_router(pool, logits, tokens, experts, top_k, weights, selected);
}

static int32_t routing_weights(pe_pool *pool, int index)
{
    const int64_t tokens = 1 + index % 9, experts = length(index);
    const int64_t top_k = 1 + index % (experts < 8 ? experts : 8);
    const float *logits = input(tokens * experts, 2);
    float *weights = output(tokens * top_k);
    int32_t *selected = array((size_t)(tokens * top_k) * sizeof *selected, 1);
    for (int64_t i = 0; i < tokens * top_k; i++)
        selected[i] = (int32_t)((i + index) % experts);
    return pe_routing_weights(pool, logits, tokens, experts, top_k, selected, weights);
}

#define EXPERTS 5
#define SCALES 3 /* parts of an expert: gate, up, down, then their scales */

/* Experts in a file, and the cache that reads them. */
typedef struct {
    FILE *file;
    int32_t descriptor;
    int64_t parts, position;
    pe_expert_read reads[EXPERTS * 2 * SCALES];
    int64_t places[EXPERTS * 2 * SCALES];
    pe_expert_layer layer;
    pe_expert_cache *cache;
} cached_experts;

/* One part of each expert to the end of the file; it has two pages of the slot. */
static void write_part(cached_experts *c, int64_t part, int64_t at, const void *data, int64_t stride,
                       int64_t nbytes)
{
    for (int64_t e = 0; e < EXPERTS; e++) {
        const char *bytes = (const char *)data + e * stride;
        if (fwrite(bytes, 1, (size_t)nbytes, c->file) != (size_t)nbytes)
            give_up("no room for a file");
        c->reads[e * c->parts + part] = (pe_expert_read){0, c->position, nbytes, at};
        c->places[e * 2 * SCALES + part] = at + c->position % PE_PAGE;
        c->position += nbytes;
    }
}

static int64_t pages(int64_t nbytes) { return (nbytes / PE_PAGE + 2) * PE_PAGE; }

static void open_cache(cached_experts *c, const pe_experts_weights *w, int64_t slots)
{
    const pe_matrix *matrices[SCALES] = {&w->gate, &w->up, &w->down};
    int64_t at = 0, n = 0;
    *c = (cached_experts){.file = tmpfile()};
    if (!c->file)
        give_up("no temporary file");
    for (int i = 0; i < 2 * SCALES * EXPERTS; i++)
        c->places[i] = -1;
    for (int i = 0; i < SCALES; i++)
        c->parts += matrices[i]->scales ? 2 : 1;
    for (int i = 0; i < SCALES; i++, n++) {
        write_part(c, n, at, matrices[i]->data, matrices[i]->expert_stride,
                   matrices[i]->expert_stride);
        at += pages(matrices[i]->expert_stride);
    }
    for (int i = 0; i < SCALES && c->parts == 2 * SCALES; i++, n++) {
        const pe_matrix *m = matrices[i];
        const int64_t rows = m->scale_expert_stride / m->scale_ld;
        const int64_t nbytes = 2 * ((rows - 1) * m->scale_ld + m->rows);
        write_part(c, n, at, m->scales, 2 * m->scale_expert_stride, nbytes);
        at += pages(nbytes);
    }
    if (fflush(c->file))
        give_up("no room for a file");
    c->descriptor = fileno(c->file);
    c->layer = (pe_expert_layer){c->parts, c->reads, c->places, 0, NULL};
    c->cache = pe_expert_cache_new(1, EXPERTS, &c->layer, slots, at, &c->descriptor, 0, 3);
    if (!c->cache)
        give_up("no cache");
}

static int32_t experts_from(pe_pool *pool, int index, int cached)
{
    static const int32_t types[] = {PE_F32,  PE_F16,  PE_BF16, PE_Q8_0, PE_INT8,   PE_INT4,
                                    PE_Q4_0, PE_Q4_1, PE_Q5_0, PE_Q5_1, PE_IQ4_NL, PE_MXFP4};
    const int32_t outer = types[index % 12], inner = types[index / 12 % 12];
    const int64_t tokens = 1 + index % 7, num_experts = EXPERTS, top_k = 1 + index % 3;
    const int64_t hidden = 32 * random_int(1, 5), ff = 32 * random_int(1, 5);
    pe_experts_weights w = {.num_experts = num_experts};
    w.gate = random_stack(outer, num_experts, ff, hidden);
    w.up = random_stack(outer, num_experts, ff, hidden);
    w.down = random_stack(inner, num_experts, hidden, ff);
    w.shared_gate = random_stack(outer, 1, ff, hidden);
    w.shared_up = random_stack(outer, 1, ff, hidden);
    w.shared_down = random_stack(inner, 1, hidden, ff);
    const pe_activations a = random_activations(tokens, hidden);
    float *routed = output(tokens * hidden), *shared = output(tokens * hidden);
    float *shared_gate = output(tokens * ff), *shared_up = output(tokens * ff);
    const pe_experts_trace trace = {routed, shared_gate, shared_up, shared};
    const float *weights = fractions(tokens * top_k), *shared_expert_gate = input(tokens, 2);
    int32_t *selected = array((size_t)(tokens * top_k) * sizeof *selected, 0);
    for (int64_t i = 0; i < tokens * top_k; i++) /* distinct within a token */
        selected[i] = (int32_t)((i / top_k + 2 * (i % top_k)) % num_experts);
    float *y = output(tokens * hidden);
    /* What the others are compared with is not read.  Of scales a layer has three arrays, or none. */
    const int reference = !strcmp(pe_isa_active(), "scalar") && pe_pool_threads(pool) == 1;
    if (!cached || reference || !w.gate.scales != !w.down.scales)
        return pe_experts(pool, &w, &a, selected, weights, top_k, shared_expert_gate, y, &trace);
    cached_experts c;
    open_cache(&c, &w, EXPERTS);
    w.cache = c.cache;
    int32_t status = PE_OK;
    for (int i = 0; i < 3 && !status; i++) { /* the second time some experts are there */
        pe_expert_cache_limit(c.cache, 1 + (index + i) % EXPERTS);
        status = pe_experts(pool, &w, &a, selected, weights, top_k, shared_expert_gate, y, &trace);
    }
    pe_expert_cache_free(c.cache);
    fclose(c.file);
    return status;
}

/* Every pair of types over the cases. */
static int32_t experts(pe_pool *pool, int index) { return experts_from(pool, index, 0); }

/* The experts are read from a file. */
static int32_t experts_read(pe_pool *pool, int index) { return experts_from(pool, index, 1); }

/* Every source type, with and without reordering; groups of every size, the last one often short.
 * Every other F32 case has ties and their neighbours. */
static int32_t quantize_weights(pe_pool *pool, int index, int32_t largest, int32_t method)
{
    static const int32_t types[] = {PE_F32,  PE_F16,  PE_BF16, PE_Q8_0,   PE_Q4_0,
                                    PE_Q4_1, PE_Q5_0, PE_Q5_1, PE_IQ4_NL, PE_MXFP4};
    static const int64_t sizes[] = {128, 32, 2, 46, 1000};
    const int32_t type = types[index % 10];
    const int64_t rows = random_int(1, 20), cols = allowed_cols(type, length(index));
    const int64_t group = sizes[index % 5], groups = (cols + group - 1) / group;
    const int64_t row0 = random_int(0, rows - 1), row1 = random_int(row0 + 1, rows);
    const pe_matrix w = random_stack(type, 2, rows, cols);
    const int64_t *row_order = index % 3 ? reversed(rows) : NULL;
    const int64_t *col_order = index % 2 ? reversed(cols) : NULL;
    if (type == PE_F32 && index % 20)
        make_ties((float *)w.data, 2 * rows * cols, largest);
    else
        divide_by_16(type, (void *)w.data, 2 * rows * cols);
    int8_t *codes = array((size_t)((row1 - row0) * cols), 1);
    uint16_t *scales = array((size_t)((row1 - row0) * groups) * sizeof *scales, 1);
    return pe_quantize_weights(pool, &w, index % 2, row_order, col_order, row0, row1, largest, group,
                               method, codes, scales);
}

static int32_t screen_rows(pe_pool *pool, int index)
{
    static const int32_t types[] = {PE_F32, PE_F16, PE_BF16, PE_Q8_0};
    const int32_t type = types[index % 4];
    const int64_t rows = random_int(1, 20), blocks = random_int(1, 9), cols = blocks * PE_BLOCK;
    const int64_t row0 = random_int(0, rows - 1), row1 = random_int(row0 + 1, rows);
    const pe_matrix w = random_stack(type, 1, rows, cols);
    if (type == PE_F32 && index % 8)
        make_ties((float *)w.data, rows * cols, 15);
    uint8_t *data = array((size_t)((row1 - row0) * blocks * 22), 1);
    float *error = output(row1 - row0), *norm = output(row1 - row0);
    return pe_screen_rows(pool, &w, row0, row1, data, error, norm);
}

static int32_t screen(pe_pool *pool, int index)
{
    const int64_t rows = index < 20 ? index : random_int(1, 9000);
    const float *s = input(rows, 2), *error = fractions(rows), *norm = fractions(rows);
    uint8_t *keep = array((size_t)rows, 1);
    /* Arguments are evaluated in any order, so that draws among them would be the compiler's. */
    const float a = random_float(2), b = random_float(0), c = random_float(2);
    return pe_screen(pool, s, error, norm, rows, a, b, 0x1p-140f, c, keep);
}

static int32_t weights_int8(pe_pool *pool, int index)
{
    return quantize_weights(pool, index, 127, PE_SCALE_ABSMAX);
}

static int32_t weights_int4(pe_pool *pool, int index)
{
    return quantize_weights(pool, index, 7, PE_SCALE_ABSMAX);
}

static int32_t weights_int8_mse(pe_pool *pool, int index)
{
    return quantize_weights(pool, index, 127, PE_SCALE_MSE);
}

static int32_t weights_int4_mse(pe_pool *pool, int index)
{
    return quantize_weights(pool, index, 7, PE_SCALE_MSE);
}

static int32_t pack_int4(pe_pool *pool, int index)
{
    const int64_t n = index == 9 ? 200000 : length(index);
    int8_t *codes = array((size_t)(2 * n), 0);
    for (int64_t i = 0; i < 2 * n; i++)
        codes[i] = (int8_t)random_int(-8, 7);
    return pe_pack_int4(pool, codes, n, array((size_t)n, 1));
}

/* ---- error-compensated rounding --------------------------------------------------------------- */

static double *doubles(int64_t n, int is_output)
{
    double *x = array((size_t)n * sizeof *x, is_output);
    for (int64_t i = 0; i < n; i++)
        x[i] = (double)random_int(-(1 << 20), 1 << 20) * 0x1p-18;
    return x;
}

static int32_t add_products(pe_pool *pool, int index)
{
    const int lower = index % 3 == 2;
    const int64_t tokens = index % 5 ? random_int(0, 20) : 300;
    const int64_t n = random_int(1, index % 4 ? 70 : 150), m = lower ? n : random_int(1, 150);
    const double *a = doubles(tokens * m, 0), *b = lower ? a : doubles(tokens * n, 0);
    double *out = doubles(m * n, 1);
    const int32_t status = pe_add_products(pool, a, b, tokens, m, n, lower, out);
    for (int64_t i = 0; lower && i < n; i++) /* the part that is undefined */
        for (int64_t j = i + 1; j < n; j++)
            out[i * n + j] = 0.0;
    return status;
}

static int32_t add_squares(pe_pool *pool, int index)
{
    const int64_t tokens = random_int(0, 20), n = length(index);
    const float *x = input(tokens * n, 8);
    return pe_add_squares(pool, x, tokens, n, doubles(n, 1));
}

/* Symmetric, and its diagonal greater than the rest of the row. */
static double *random_moments(int64_t n)
{
    double *h = doubles(n * n, 1);
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < i; j++)
            h[j * n + i] = h[i * n + j];
        h[i * n + i] = 4.0 * (double)n + (double)random_int(1, 1000);
    }
    return h;
}

static int32_t factor(pe_pool *pool, int index)
{
    const int64_t n = index % 10 ? index + 1 : index + 71;
    return pe_factor(pool, random_moments(n), n);
}

static int32_t round_weights(pe_pool *pool, int index)
{
    const int64_t n = random_int(1, 80), rows = random_int(1, 70), group = random_int(1, 40);
    const int32_t largest = index % 2 ? 7 : 127;
    double *h = random_moments(n), *d = doubles(n, 0);
    for (int64_t i = 0; i < n; i++)
        d[i] = d[i] * d[i] + 0x1p-10;
    const float *w = input(rows * n, index % 4 * 5);
    int8_t *codes = array((size_t)(rows * n), 1);
    uint16_t *scales = array((size_t)(rows * ((n + group - 1) / group)) * sizeof *scales, 1);
    const int32_t status = pe_factor(pool, h, n);
    if (status)
        return status;
    const double *b = index % 3 ? doubles(rows * n, 0) : NULL;
    return pe_round_weights(pool, w, index % 5 ? b : NULL, index % 5 ? h : NULL, d, rows, n, group,
                            largest, codes, scales);
}

static const struct {
    const char *name;
    int32_t (*run)(pe_pool *pool, int index);
    int cases;
} operations[] = {
    {"quantize_activations", quantize, 90},
    {"matmul F32", matmul_f32, 90},
    {"matmul F16", matmul_f16, 90},
    {"matmul BF16", matmul_bf16, 90},
    {"matmul Q8_0", matmul_q8_0, 90},
    {"matmul Q4_0", matmul_q4_0, 90},
    {"matmul Q4_1", matmul_q4_1, 90},
    {"matmul Q5_0", matmul_q5_0, 90},
    {"matmul Q5_1", matmul_q5_1, 90},
    {"matmul IQ4_NL", matmul_iq4_nl, 90},
    {"matmul MXFP4", matmul_mxfp4, 90},
    {"matmul Q2_K", matmul_q2_k, 90},
    {"matmul Q3_K", matmul_q3_k, 90},
    {"matmul Q4_K", matmul_q4_k, 90},
    {"matmul Q5_K", matmul_q5_k, 90},
    {"matmul Q6_K", matmul_q6_k, 90},
    {"matmul IQ4_XS", matmul_iq4_xs, 90},
    {"matmul INT8", matmul_int8, 90},
    {"matmul INT4", matmul_int4, 90},
    {"exp", exponential, 100},
    {"sigmoid", sigmoid, 100},
    {"silu", silu, 100},
    {"softplus", softplus, 100},
    {"add", add, 80},
    {"silu_mul", silu_mul, 80},
    {"sigmoid_mul", sigmoid_mul, 80},
    {"delta_gates", delta_gates, 80},
    {"rms_norm", rms_norm, 90},
    {"rms_norm_gated", rms_norm_gated, 90},
    {"l2_norm", l2_norm, 90},
    {"rope_table", rope_table, 40},
    {"rope", rope, 80},
    {"causal_conv1d", causal_conv1d, 96},
    {"delta_rule", delta_rule, 80},
    {"attention", attention, 80},
    {"attention_f16", attention_f16, 80},
    {"router", router, 90},
    {"routing_weights", routing_weights, 90},
    {"experts", experts, 144},
    {"experts read", experts_read, 144},
    {"screen_rows", screen_rows, 80},
    {"screen", screen, 60},
    {"weights INT8", weights_int8, 120},
    {"weights INT4", weights_int4, 120},
    {"weights INT8 mse", weights_int8_mse, 60},
    {"weights INT4 mse", weights_int4_mse, 60},
    {"pack_int4", pack_int4, 40},
    {"add_products", add_products, 60},
    {"add_squares", add_squares, 60},
    {"factor", factor, 70},
    {"round_weights", round_weights, 60},
};

#define N_OPERATIONS ((int)(sizeof operations / sizeof operations[0]))

/* ---- the comparison ----------------------------------------------------------------------------- */

static pe_pool *alone, *three;

static unsigned char *run_case(const char *level, pe_pool *pool, int op, int index, size_t *bytes)
{
    if (pe_isa_select(level) || strcmp(pe_isa_active(), level))
        give_up("a level cannot be selected");
    seed((uint64_t)op, (uint64_t)index);
    int32_t status = operations[op].run(pool, index);
    if (status) {
        fprintf(stderr, "kernels_main: %s case %d: status %d\n", operations[op].name, index, status);
        exit(1);
    }
    return take_outputs(bytes);
}

static uint64_t hash(uint64_t h, const unsigned char *data, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) /* FNV-1a */
        h = (h ^ data[i]) * UINT64_C(0x100000001b3);
    return h;
}

static int64_t first_difference(const unsigned char *a, const unsigned char *b, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        if (a[i] != b[i])
            return (int64_t)i;
    return -1;
}

/* One case at one level, with 1 and now and then 3 threads; the byte that differs, or -1. */
static int64_t compare_case(const char *level, int op, int index, uint64_t *h)
{
    size_t bytes, same_bytes;
    unsigned char *want = run_case("scalar", alone, op, index, &bytes);
    int64_t at = -1;
    for (int threads = 1; threads <= (index % 4 ? 1 : 3) && at < 0; threads += 2) {
        unsigned char *got = run_case(level, threads == 1 ? alone : three, op, index, &same_bytes);
        if (same_bytes != bytes)
            give_up("a case is not the same twice");
        at = first_difference(got, want, bytes);
        if (threads == 1)
            *h = hash(*h, got, bytes);
        free(got);
    }
    free(want);
    return at;
}

/* 1 if any case differs. */
static int compare(const char *level, int op)
{
    uint64_t h = UINT64_C(0xcbf29ce484222325);
    for (int index = 0; index < operations[op].cases; index++) {
        int64_t at = compare_case(level, op, index, &h);
        if (at >= 0) {
            printf("%-21s %-13s DIFFERENT: case %d, byte %lld of its outputs\n",
                   operations[op].name, level, index, (long long)at);
            return 1;
        }
    }
    printf("%-21s %-13s %3d cases  %016llx  equal\n", operations[op].name, level,
           operations[op].cases, (unsigned long long)h);
    fflush(stdout);
    return 0;
}

int main(void)
{
    int different = 0;
    const char *level;
    alone = pe_pool_new(1, 0);
    three = pe_pool_new(3, 0);
    if (!alone || !three)
        give_up("no threads");
    for (int op = 0; op < N_OPERATIONS; op++)
        for (int32_t i = 0; (level = pe_isa_name(i)); i++)
            different |= compare(level, op);
    pe_pool_free(alone);
    pe_pool_free(three);
    return different;
}
