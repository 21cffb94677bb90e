/* matmul_blocks32.c - the types of blocks of 32 columns, scalar, normative: see pe_matmul in
 * pyengine.h.  They differ only in how a block holds its codes, its scale and its minimum. */
#include "kernels.h"

/* ---- blocks ---------------------------------------------------------------------------------- */

typedef struct {
    int64_t bytes;                                /* of a block */
    int32_t (*code)(const uint8_t *block, int c); /* of column c of the block */
    float (*scale)(const uint8_t *block);
    float (*minimum)(const uint8_t *block); /* NULL: the type has none */
} block_type;

/* The four bits of column c: 16 bytes whose low nibbles are columns 0 to 15. */
static int32_t nibble_at(const uint8_t *nibbles, int c)
{
    return c < 16 ? nibbles[c] & 15 : nibbles[c - 16] >> 4;
}

/* 16 where bit c of 32 is set: the fifth bit of column c. */
static int32_t fifth_bit(const uint8_t *bits, int c) { return (bits[c / 8] >> c % 8 & 1) << 4; }

static int32_t q8_0_code(const uint8_t *block, int c) { return ((const int8_t *)block)[2 + c]; }
static int32_t q4_0_code(const uint8_t *block, int c) { return nibble_at(block + 2, c) - 8; }
static int32_t q4_1_code(const uint8_t *block, int c) { return nibble_at(block + 4, c); }

static int32_t q5_0_code(const uint8_t *block, int c)
{
    return (nibble_at(block + 6, c) | fifth_bit(block + 2, c)) - 16;
}

static int32_t q5_1_code(const uint8_t *block, int c)
{
    return nibble_at(block + 8, c) | fifth_bit(block + 4, c);
}

static int32_t iq4_nl_code(const uint8_t *block, int c)
{
    return pe_iq4_nl_codes[nibble_at(block + 2, c)];
}

static int32_t mxfp4_code(const uint8_t *block, int c)
{
    return pe_mxfp4_codes[nibble_at(block + 1, c)];
}

static float first_half(const uint8_t *block) { return pe_f16_to_float(pe_load_u16(block)); }
static float second_half(const uint8_t *block) { return pe_f16_to_float(pe_load_u16(block + 2)); }
static float mxfp4_scale(const uint8_t *block) { return pe_e8m0_half_to_float(block[0]); }

static const block_type q8_0 = {34, q8_0_code, first_half, NULL};
static const block_type q4_0 = {18, q4_0_code, first_half, NULL};
static const block_type q4_1 = {20, q4_1_code, first_half, second_half};
static const block_type q5_0 = {22, q5_0_code, first_half, NULL};
static const block_type q5_1 = {24, q5_1_code, first_half, second_half};
static const block_type iq4_nl = {18, iq4_nl_code, first_half, NULL};
static const block_type mxfp4 = {17, mxfp4_code, mxfp4_scale, NULL};

/* ---- matmul ---------------------------------------------------------------------------------- */

#define PARTS (PE_GROUP / PE_PART)
#define BLOCKS (PE_GROUP / PE_BLOCK)

/* p[b] of the contract; sums are those of the block's two parts. */
PE_INLINE float block_part(const block_type *type, const uint8_t *block, const int16_t *q,
                           const int32_t *sums)
{
    int32_t d = 0;
    for (int c = 0; c < PE_BLOCK; c++)
        d += q[c] * type->code(block, c);
    float p = (float)d * type->scale(block);
    return type->minimum ? p + (float)(sums[0] + sums[1]) * type->minimum(block) : p;
}

PE_INLINE void matmul_blocks(const block_type *type, const pe_matrix *w, int64_t row0, int64_t row1,
                             const pe_activations *a, float *y, int64_t ldy)
{
    const int64_t groups = pe_groups(w->cols), blocks = w->cols / PE_BLOCK;
    for (int64_t r = row0; r < row1; r++) {
        const uint8_t *row = (const uint8_t *)w->data + r * blocks * type->bytes;
        for (int64_t t = 0; t < a->tokens; t++) {
            const int16_t *q = a->q + t * groups * PE_GROUP;
            const int32_t *sums = type->minimum ? a->sums + t * groups * PARTS : NULL;
            float sum = 0.0f;
            for (int64_t g = 0; g < groups; g++) {
                float p[BLOCKS] = {0};
                for (int64_t b = g * BLOCKS; b < pe_min((g + 1) * BLOCKS, blocks); b++)
                    p[b % BLOCKS] = block_part(type, row + b * type->bytes, q + b * PE_BLOCK,
                                               sums ? sums + 2 * b : NULL);
                sum += ((p[0] + p[1]) + (p[2] + p[3])) * a->scales[t * groups + g];
            }
            y[t * ldy + r] = sum;
        }
    }
}

PE_INLINE void load_blocks(const block_type *type, const void *row, int64_t cols, float *x)
{
    for (int64_t c = 0; c < cols; c++) {
        const uint8_t *block = (const uint8_t *)row + c / PE_BLOCK * type->bytes;
        float v = type->scale(block) * (float)type->code(block, c % PE_BLOCK);
        x[c] = type->minimum ? v + type->minimum(block) : v;
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
KERNELS(q8_0)
KERNELS(q4_0)
KERNELS(q4_1)
KERNELS(q5_0)
KERNELS(q5_1)
KERNELS(iq4_nl)
KERNELS(mxfp4)
#undef KERNELS

void pe_fill_scalar_blocks32(pe_kernels *k)
{
#define ROW(number, name)                                                                          \
    k->type[number] =                                                                              \
        (pe_weight_type){PE_BLOCK, name.bytes, .sums = name.minimum != NULL, .load = load_##name}; \
    k->matmul[number] = matmul_##name;
    ROW(PE_Q8_0, q8_0)
    ROW(PE_Q4_0, q4_0)
    ROW(PE_Q4_1, q4_1)
    ROW(PE_Q5_0, q5_0)
    ROW(PE_Q5_1, q5_1)
    ROW(PE_IQ4_NL, iq4_nl)
    ROW(PE_MXFP4, mxfp4)
#undef ROW
}
