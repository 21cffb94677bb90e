/* level_avx512vnni.c - the AVX-512 level: the families that gain by wider registers or by
 * VNNI.  The other entries of the table stay those of level_avx2.c. */
#define PE_AVX512

#include "activations_x86.h"
#include "attention_x86.h"
#include "compensate_steps.h"
#include "delta_rule_x86.h"
#include "matmul_avx512vnni.h"

void pe_fill_avx512vnni(pe_kernels *k)
{
    fill_activations(k);
    fill_attention(k);
    fill_compensate(k);
    fill_delta_rule(k);
    fill_matmul(k);
#define PE_TYPE_FILE(type) PE_FILL_TYPE(avx512vnni, type, k)
    PE_TYPE_FILES
}
