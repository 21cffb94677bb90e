/* level_neon_dotprod.c - the NEON level with sdot, which only the quantised matmuls can use. */
#include "matmul_neon_dotprod.h"

void pe_fill_neon_dotprod(pe_kernels *k)
{
    fill_matmul_quantised(k);
#define PE_TYPE_FILE(type) PE_FILL_TYPE(neon_dotprod, type, k)
    PE_TYPE_FILES
}
