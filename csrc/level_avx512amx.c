/* level_avx512amx.c - the AMX level: many tokens of some weight types.  All other entries of the
 * table stay those of level_avx512vnni.c. */
#define PE_AVX512

#include "kernels.h"

#ifdef PE_AMX
#include "matmul_avx512amx.h"

void pe_fill_avx512amx(pe_kernels *k)
{
    fill_split_matmul(k);
#define PE_TYPE_FILE(type) PE_FILL_TYPE(avx512amx, type, k)
    PE_TYPE_FILES
}
#endif
