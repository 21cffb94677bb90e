/* delta_rule_avx512vnni.c - see delta_rule_x86.h. */
#define PE_AVX512
#include "delta_rule_x86.h"

void pe_fill_avx512vnni_delta_rule(pe_kernels *k) { k->delta_step = delta_step; }
