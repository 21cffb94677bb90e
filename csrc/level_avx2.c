/* level_avx2.c - the AVX2 level: AVX2, F16C and FMA. */
#include "activations_x86.h"
#include "attention_x86.h"
#include "causal_conv1d_avx2.h"
#include "compensate_steps.h"
#include "delta_rule_x86.h"
#include "matmul_avx2.h"
#include "norm_avx2.h"
#include "quantize_avx2.h"
#include "quantize_weights_avx2.h"

void pe_fill_avx2(pe_kernels *k)
{
    fill_activations(k);
    fill_attention(k);
    fill_causal_conv1d(k);
    fill_compensate(k);
    fill_delta_rule(k);
    fill_matmul(k);
    fill_norm(k);
    fill_quantize(k);
    fill_quantize_weights(k);
#define PE_TYPE_FILE(type) PE_FILL_TYPE(avx2, type, k)
    PE_TYPE_FILES
}
