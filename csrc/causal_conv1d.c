/* causal_conv1d.c - scalar, normative: see pe_causal_conv1d in pyengine.h. */
#include "kernels.h"

#define MAX_TAPS 16

static void conv_taps(const float *const *rows, const float *weight, int64_t channels, int64_t taps,
                      int64_t c0, int64_t c1, float *y)
{
    for (int64_t c = c0; c < c1; c++) {
        float sum = weight[c] * rows[0][c];
        for (int64_t j = 1; j < taps; j++)
            sum += weight[j * channels + c] * rows[j][c];
        y[c] = sum;
    }
}

void pe_fill_scalar_causal_conv1d(pe_kernels *k) { k->conv_taps = conv_taps; }

/* ---- the operation --------------------------------------------------------------------------- */

typedef struct {
    const float *x, *weight;
    float *conv_state, *y;
    int64_t tokens, channels, taps;
} conv_args;

/* The input row age steps before token t: from x, or from the state. */
static const float *input_row(const conv_args *v, int64_t t, int64_t age)
{
    int64_t row = t - age;
    if (row >= 0)
        return v->x + row * v->channels;
    return v->conv_state + (v->taps - 1 + row) * v->channels;
}

/* Channels [c0, c1) of every token, then of the state: a channel depends on no other. */
static int32_t conv_channels(void *arg, int64_t c0, int64_t c1)
{
    const conv_args *v = arg;
    const float *rows[MAX_TAPS];
    for (int64_t t = 0; t < v->tokens; t++) {
        for (int64_t j = 0; j < v->taps; j++)
            rows[j] = input_row(v, t, v->taps - 1 - j);
        float *y = v->y + t * v->channels;
        pe_active.conv_taps(rows, v->weight, v->channels, v->taps, c0, c1, y);
        pe_active.silu(y + c0, c1 - c0, y + c0);
    }
    /* Oldest first: row j takes a later row, which is not overwritten yet. */
    for (int64_t j = 0; j < v->taps - 1; j++)
        memmove(v->conv_state + j * v->channels + c0,
                input_row(v, v->tokens - 1, v->taps - 2 - j) + c0, (size_t)(c1 - c0) * 4);
    return PE_OK;
}

int32_t pe_causal_conv1d(pe_pool *pool, const float *x, int64_t tokens, int64_t channels,
                         const float *weight, int64_t taps, float *conv_state, float *y)
{
    if (tokens < 0 || channels < 1 || taps < 1 || taps > MAX_TAPS)
        return PE_ERROR_ARGUMENT;
    conv_args v = {x, weight, conv_state, y, tokens, channels, taps};
    return pe_pool_run(pool, conv_channels, &v, channels, 64);
}
