/* What this CPU and its system run. The compilers' own __builtin_cpu_supports needs a runtime
 * library that zig lacks: it then says no to everything. */
#pragma once
#if defined(__x86_64__)
#include <cpuid.h>
#include <stdint.h>

/* A bit of a register (0 to 3: eax to edx) of a leaf of cpuid. */
static inline int cpu_bit(unsigned leaf, unsigned subleaf, int reg, int bit)
{
    unsigned r[4] = {0};
    return __get_cpuid_count(leaf, subleaf, &r[0], &r[1], &r[2], &r[3]) && r[reg] >> bit & 1;
}

/* Whether the system keeps these parts of the registers: XCR0, read only where cpuid allows. */
static inline int cpu_keeps(uint32_t parts)
{
    uint32_t low, high;
    if (!cpu_bit(1, 0, 2, 27)) return 0; /* OSXSAVE */
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & parts) == parts;
}

static inline int cpu_runs_avx2(void)
{
    return cpu_keeps(0x06) && cpu_bit(1, 0, 2, 12) /* FMA */ && cpu_bit(1, 0, 2, 29) /* F16C */ &&
           cpu_bit(7, 0, 1, 5);
}

static inline int cpu_runs_avx_vnni(void) { return cpu_runs_avx2() && cpu_bit(7, 1, 0, 4); }

/* AVX-512 F, DQ, BW, VL and VNNI. */
static inline int cpu_runs_avx512_vnni(void)
{
    return cpu_runs_avx2() && cpu_keeps(0xe6) && cpu_bit(7, 0, 1, 16) && cpu_bit(7, 0, 1, 17) &&
           cpu_bit(7, 0, 1, 30) && cpu_bit(7, 0, 1, 31) && cpu_bit(7, 0, 2, 11);
}

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

/* AMX with 8-bit integers, which a process must ask Linux for: ARCH_REQ_XCOMP_PERM of its tiles. */
static inline int cpu_runs_amx(void)
{
    return cpu_runs_avx512_vnni() && cpu_keeps(0x600e6) && cpu_bit(7, 0, 3, 24) &&
           cpu_bit(7, 0, 3, 25) && !syscall(SYS_arch_prctl, 0x1023, 18);
}
#else
static inline int cpu_runs_amx(void) { return 0; }
#endif

#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#undef MIN /* of sys/param.h; weights.inc has its own */
#undef MAX

static inline int cpu_has(const char *feature)
{
    int value = 0;
    size_t size = sizeof value;
    return !sysctlbyname(feature, &value, &size, NULL, 0) && value;
}

static inline int cpu_runs_dotprod(void) { return cpu_has("hw.optional.arm.FEAT_DotProd"); }
static inline int cpu_runs_i8mm(void)
{
    return cpu_runs_dotprod() && cpu_has("hw.optional.arm.FEAT_I8MM");
}
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

/* Bits of AT_HWCAP and AT_HWCAP2, which old headers do not name. */
static inline int cpu_runs_dotprod(void) { return getauxval(16) >> 20 & 1; }
static inline int cpu_runs_i8mm(void) { return cpu_runs_dotprod() && getauxval(26) >> 13 & 1; }
#else
static inline int cpu_runs_dotprod(void) { return 0; }
static inline int cpu_runs_i8mm(void) { return 0; }
#endif
