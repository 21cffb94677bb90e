/* matmul_blocks256.c - the types of blocks of 256 columns, scalar, normative: see pe_matmul in
 * pyengine.h.  They differ in how a block holds its codes, scales and minimums, and in how many
 * parts int32 can add up. */
#include "kernels.h"

#define BLOCK256 256
#define SUBS (BLOCK256 / PE_PART)  /* the most sub-blocks of a block */
#define PARTS (PE_GROUP / PE_PART) /* of a group */

/* A block: code [256], scale and minimum of each PE_PART columns.  A type whose sub-blocks are
 * wider repeats theirs. */
typedef struct {
    int32_t code[BLOCK256];
    int32_t scale[SUBS], minimum[SUBS];
    float d, dmin;
} block256;

/* ---- blocks ---------------------------------------------------------------------------------- */

static float half_at(const uint8_t *p) { return pe_f16_to_float(pe_load_u16(p)); }

/* Columns 128 k + 32 j + i of codes of two bits. */
static int32_t two_bits(const uint8_t *bytes, int c)
{
    const int k = c / 128, j = c % 128 / 32, i = c % 32;
    return bytes[32 * k + i] >> 2 * j & 3;
}

/* Columns 64 k + 32 j + i of codes of four bits. */
static int32_t four_bits(const uint8_t *bytes, int c)
{
    const int k = c / 64, j = c % 64 / 32, i = c % 32;
    return bytes[32 * k + i] >> 4 * j & 15;
}

static void read_q2_k(const uint8_t *p, block256 *b)
{
    for (int c = 0; c < BLOCK256; c++)
        b->code[c] = two_bits(p + 16, c);
    for (int s = 0; s < SUBS; s++) {
        b->scale[s] = p[s] & 15;
        b->minimum[s] = p[s] >> 4;
    }
    b->d = half_at(p + 80);
    b->dmin = half_at(p + 82);
}

static void read_q3_k(const uint8_t *p, block256 *b)
{
    const uint8_t *scales = p + 96;
    for (int c = 0; c < BLOCK256; c++)
        b->code[c] = two_bits(p + 32, c) + 4 * (p[c % 32] >> c / 32 & 1) - 4;
    for (int s = 0; s < SUBS; s++) {
        int32_t low = scales[s % 8] >> 4 * (s / 8) & 15,
                high = scales[8 + s % 4] >> 2 * (s / 4) & 3;
        b->scale[s] = (low | high << 4) - 32;
    }
    b->d = half_at(p + 108);
}

/* The scales and minimums of Q4_K and Q5_K, eight of six bits each, in 12 bytes. */
static void read_scales_of_k4(const uint8_t *p, block256 *b)
{
    for (int s = 0; s < SUBS; s++) {
        const int j = s / 2;
        if (j < 4) {
            b->scale[s] = p[j] & 63;
            b->minimum[s] = p[j + 4] & 63;
        } else {
            b->scale[s] = (p[j + 4] & 15) | p[j - 4] >> 6 << 4;
            b->minimum[s] = p[j + 4] >> 4 | p[j] >> 6 << 4;
        }
    }
}

static void read_q4_k(const uint8_t *p, block256 *b)
{
    b->d = half_at(p);
    b->dmin = half_at(p + 2);
    read_scales_of_k4(p + 4, b);
    for (int c = 0; c < BLOCK256; c++)
        b->code[c] = four_bits(p + 16, c);
}

static void read_q5_k(const uint8_t *p, block256 *b)
{
    b->d = half_at(p);
    b->dmin = half_at(p + 2);
    read_scales_of_k4(p + 4, b);
    for (int c = 0; c < BLOCK256; c++)
        b->code[c] = four_bits(p + 48, c) + 16 * (p[16 + c % 32] >> c / 32 & 1);
}

static void read_q6_k(const uint8_t *p, block256 *b)
{
    for (int c = 0; c < BLOCK256; c++) {
        const int k = c / 128, j = c % 128 / 32, i = c % 32;
        int32_t low = p[64 * k + 32 * (j % 2) + i] >> 4 * (j / 2) & 15;
        b->code[c] = (low | two_bits(p + 128, c) << 4) - 32;
    }
    for (int s = 0; s < SUBS; s++)
        b->scale[s] = (int8_t)p[192 + s];
    b->d = half_at(p + 208);
}

static void read_iq4_xs(const uint8_t *p, block256 *b)
{
    const int high = pe_load_u16(p + 2);
    for (int c = 0; c < BLOCK256; c++)
        b->code[c] = pe_iq4_nl_codes[p[8 + c / 32 * 16 + c % 16] >> 4 * (c % 32 / 16) & 15];
    for (int s = 0; s < SUBS; s++) {
        const int j = s / 2;
        b->scale[s] = ((p[4 + j / 2] >> 4 * (j % 2) & 15) | (high >> 2 * j & 3) << 4) - 32;
    }
    b->d = half_at(p);
}

typedef struct {
    int64_t bytes;
    void (*read)(const uint8_t *p, block256 *b);
    int has_minimum;
    int terms; /* of D: 1, 2, 4 or 8 */
} type256;

static const type256 q2_k = {84, read_q2_k, 1, 1};
static const type256 q3_k = {110, read_q3_k, 0, 1};
static const type256 q4_k = {144, read_q4_k, 1, 2};
static const type256 q5_k = {176, read_q5_k, 1, 4};
static const type256 q6_k = {210, read_q6_k, 0, 8};
static const type256 iq4_xs = {136, read_iq4_xs, 0, 8};

/* ---- matmul ---------------------------------------------------------------------------------- */

/* D of the contract, of the group whose first part is `first`. */
PE_INLINE float group_sum(const type256 *type, const block256 *b, int first, const int16_t *q)
{
    int32_t sum[PARTS] = {0}; /* each part is added to the sum of its term */
    for (int p = 0; p < PARTS; p++) {
        int32_t dot = 0;
        for (int i = 0; i < PE_PART; i++)
            dot += q[p * PE_PART + i] * b->code[(first + p) * PE_PART + i];
        /* Q4_K and Q5_K: sub-blocks of two parts each. */
        const int term =
            type->terms == 2 || type->terms == 4 ? p / 2 % type->terms : p % type->terms;
        sum[term] += b->scale[first + p] * dot;
    }
    float term[PARTS];
    for (int i = 0; i < type->terms; i++)
        term[i] = (float)sum[i];
    for (int n = type->terms / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++)
            term[i] = term[i] + term[i + n];
    return term[0];
}

static float group_minimum(const block256 *b, int first, const int32_t *sums)
{
    int32_t sum = 0;
    for (int p = 0; p < PARTS; p++)
        sum += b->minimum[first + p] * sums[p];
    return (float)sum;
}

PE_INLINE void matmul_blocks(const type256 *type, const pe_matrix *w, int64_t row0, int64_t row1,
                             const pe_activations *a, float *y, int64_t ldy)
{
    const int64_t groups = pe_groups(w->cols), row_bytes = w->cols / BLOCK256 * type->bytes;
    for (int64_t r = row0; r < row1; r++) {
        const uint8_t *row = (const uint8_t *)w->data + r * row_bytes;
        for (int64_t t = 0; t < a->tokens; t++)
            y[t * ldy + r] = 0.0f;
        for (int64_t g = 0; g < groups; g++) {
            const int first = g % 2 ? PARTS : 0;
            block256 b;
            type->read(row + g / 2 * type->bytes, &b);
            for (int64_t t = 0; t < a->tokens; t++) {
                const int64_t at = t * groups + g;
                float part = group_sum(type, &b, first, a->q + at * PE_GROUP) * b.d;
                if (type->has_minimum)
                    part -= group_minimum(&b, first, a->sums + at * PARTS) * b.dmin;
                y[t * ldy + r] += part * a->scales[at];
            }
        }
    }
}

PE_INLINE void load_blocks(const type256 *type, const void *row, int64_t cols, float *x)
{
    for (int64_t first = 0; first < cols; first += BLOCK256) {
        block256 b;
        type->read((const uint8_t *)row + first / BLOCK256 * type->bytes, &b);
        for (int c = 0; c < BLOCK256; c++) {
            float v = b.d * (float)b.scale[c / PE_PART] * (float)b.code[c];
            if (type->has_minimum)
                v -= b.dmin * (float)b.minimum[c / PE_PART];
            x[first + c] = v;
        }
    }
}

/* ---- the table ------------------------------------------------------------------------------- */

#define KERNELS(type)                                                                              \
    static void matmul_##type(const pe_matrix *w, int64_t row0, int64_t row1,                      \
                              const pe_activations *a, float *y, int64_t ldy)                      \
    {                                                                                              \
        matmul_blocks(&type, w, row0, row1, a, y, ldy);                                            \
    }                                                                                              \
    static void load_##type(const void *row, int64_t cols, float *x)                               \
    {                                                                                              \
        load_blocks(&type, row, cols, x);                                                          \
    }
KERNELS(q2_k)
KERNELS(q3_k)
KERNELS(q4_k)
KERNELS(q5_k)
KERNELS(q6_k)
KERNELS(iq4_xs)
#undef KERNELS

void pe_fill_scalar_blocks256(pe_kernels *k)
{
#define ROW(number, name)                                                                          \
    k->type[number] = (pe_weight_type){BLOCK256, name.bytes, .sums = 1, .load = load_##name};      \
    k->matmul[number] = matmul_##name;
    ROW(PE_Q2_K, q2_k)
    ROW(PE_Q3_K, q3_k)
    ROW(PE_Q4_K, q4_k)
    ROW(PE_Q5_K, q5_k)
    ROW(PE_Q6_K, q6_k)
    ROW(PE_IQ4_XS, iq4_xs)
#undef ROW
}
