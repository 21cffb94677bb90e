/* dispatch.c - the table of kernels: filled upward, from scalar to the level in use. */
#define _GNU_SOURCE
#include "kernels.h"

/* The scalar parts, each in the file of its operation. */
void pe_fill_scalar_matmul(pe_kernels *k);
void pe_fill_scalar_quantize(pe_kernels *k);
void pe_fill_scalar_quantize_weights(pe_kernels *k);
void pe_fill_scalar_activations(pe_kernels *k);
void pe_fill_scalar_norm(pe_kernels *k);
void pe_fill_scalar_causal_conv1d(pe_kernels *k);
void pe_fill_scalar_delta_rule(pe_kernels *k);
void pe_fill_scalar_attention(pe_kernels *k);
void pe_fill_scalar_compensate(pe_kernels *k);

void pe_fill_scalar(pe_kernels *k)
{
    pe_fill_scalar_matmul(k);
    pe_fill_scalar_quantize(k);
    pe_fill_scalar_quantize_weights(k);
    pe_fill_scalar_activations(k);
    pe_fill_scalar_norm(k);
    pe_fill_scalar_causal_conv1d(k);
    pe_fill_scalar_delta_rule(k);
    pe_fill_scalar_attention(k);
    pe_fill_scalar_compensate(k);
#define PE_TYPE_FILE(type) PE_FILL_TYPE(scalar, type, k)
    PE_TYPE_FILES
}

static int always(void) { return 1; }

#ifdef PE_HAVE_AVX2
#include <cpuid.h>

/* The features that a level needs are the -m flags of csrc/build.py: change both together.
 *
 * Every processor with AVX2 so far has F16C and FMA too, but each has a bit of its own; and
 * __builtin_cpu_supports of clang 14 does not know "f16c". */
static int have_f16c_and_fma(void)
{
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) && (ecx & bit_FMA);
}

static int have_avx2(void) { return __builtin_cpu_supports("avx2") && have_f16c_and_fma(); }
#endif

#ifdef PE_HAVE_AVX512VNNI
static int have_avx512vnni(void)
{
    return have_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
#endif

#ifdef PE_AMX
#include <sys/syscall.h>
#include <unistd.h>

/* Linux lets a process use tiles only after it has asked: once, for all threads and children.  It
 * refuses where the kernel is older than 5.16, and where a signal stack is too small for tiles. */
static int may_use_tiles(void)
{
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

static int have_avx512amx(void)
{
    const unsigned amx_tile = 1u << 24, amx_int8 = 1u << 25;
    unsigned eax, ebx, ecx, edx;
    return have_avx512vnni() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) &&
           (edx & amx_tile) && (edx & amx_int8) && may_use_tiles();
}
#endif

#ifdef PE_HAVE_NEON_DOTPROD
#if defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
static int have_neon_dotprod(void) { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#else
static int have_neon_dotprod(void) { return 1; } /* every 64-bit Apple processor has it */
#endif
#endif

/* Lowest first.  A level's table starts as the one of the levels below it. */
static const struct {
    const char *name;
    int (*present)(void);
    void (*fill)(pe_kernels *k);
} levels[] = {
    {"scalar", always, pe_fill_scalar},
#ifdef PE_HAVE_AVX2
    {"avx2", have_avx2, pe_fill_avx2},
#endif
#ifdef PE_HAVE_AVX512VNNI
    {"avx512vnni", have_avx512vnni, pe_fill_avx512vnni},
#endif
#ifdef PE_AMX
    {"avx512amx", have_avx512amx, pe_fill_avx512amx},
#endif
#ifdef PE_HAVE_NEON
    {"neon", always, pe_fill_neon},
#endif
#ifdef PE_HAVE_NEON_DOTPROD
    {"neon_dotprod", have_neon_dotprod, pe_fill_neon_dotprod},
#endif
};

#define N_LEVELS ((int32_t)(sizeof levels / sizeof levels[0]))

pe_kernels pe_active;

static void fill_up_to(int32_t top)
{
    for (int32_t i = 0; i <= top; i++)
        levels[i].fill(&pe_active);
    pe_active.name = levels[top].name;
}

const char *pe_isa_name(int32_t i)
{
    for (int32_t level = 0; level < N_LEVELS; level++)
        if (levels[level].present() && i-- == 0)
            return levels[level].name;
    return NULL;
}

const char *pe_isa_active(void) { return pe_active.name; }

int32_t pe_isa_select(const char *name)
{
    for (int32_t level = 0; level < N_LEVELS; level++) {
        if (!strcmp(levels[level].name, name)) {
            if (!levels[level].present())
                return PE_ERROR_ARGUMENT;
            fill_up_to(level);
            return PE_OK;
        }
    }
    return PE_ERROR_ARGUMENT;
}

/* Selects the highest level present, so that no operation can find an empty table. */
__attribute__((constructor)) static void select_highest(void)
{
#if defined(__x86_64__)
    __builtin_cpu_init(); /* this constructor may run before the runtime's own */
#endif
    for (int32_t level = N_LEVELS - 1; level >= 0; level--)
        if (levels[level].present()) {
            fill_up_to(level);
            return;
        }
}
