/* level_neon.c - the NEON level, for every 64-bit ARM processor.  softplus and the quantizing of
 * weights stay scalar: the model takes one softplus per head and token. */
#define PE_NEON

#include "activations_neon.h"
#include "attention_neon.h"
#include "causal_conv1d_neon.h"
#include "compensate_steps.h"
#include "delta_rule_neon.h"
#include "matmul_neon_dense.h"
#include "matmul_neon_smlal.h"
#include "norm_neon.h"
#include "quantize_neon.h"

void pe_fill_neon(pe_kernels *k)
{
    fill_activations(k);
    fill_attention(k);
    fill_causal_conv1d(k);
    fill_compensate(k);
    fill_delta_rule(k);
    fill_matmul_dense(k);
    fill_matmul_quantised(k);
    fill_norm(k);
    fill_quantize(k);
#define PE_TYPE_FILE(type) PE_FILL_TYPE(neon, type, k)
    PE_TYPE_FILES
}
