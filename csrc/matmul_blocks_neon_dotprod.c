/* matmul_blocks_neon_dotprod.c - the types of blocks with sdot. */
#include "matmul_neon_dotprod.h"

#include "matmul_blocks_neon.h"

void pe_fill_neon_dotprod_blocks(pe_kernels *k) { fill_blocks(k); }
