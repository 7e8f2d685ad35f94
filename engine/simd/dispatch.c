/* Which variants this machine may run. Compiled for the baseline and free of link-time optimization, so that
 * nothing here needs the features it asks about.
 *
 * A feature counts when the processor has it (cpuid) and the system saves its registers (xgetbv, XCR0):
 * bits 1, 2 for 256-bit vectors, 5, 6, 7 besides for 512-bit ones, 17, 18 for matrix tiles. Tiles need the
 * kernel's permission, too, which a process asks for once, before its threads start. */
#define _GNU_SOURCE /* syscall */
#include "kernels.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

extern const struct kernels kernels_avx2, kernels_avx512, kernels_avx512bf16, kernels_amx;

enum word { LEAF1_ECX, LEAF7_EBX, LEAF7_ECX, LEAF7_EDX, LEAF7_1_EAX, STATE, N_WORDS };

struct feature {
    const char *name;
    enum word word;
    unsigned bits;
};

static const struct feature features_avx2[] = {
    {"AVX", LEAF1_ECX, 1u << 28},
    {"FMA", LEAF1_ECX, 1u << 12},
    {"F16C", LEAF1_ECX, 1u << 29},
    {"AVX2", LEAF7_EBX, 1u << 5},
    {"256-bit register state enabled by the operating system", STATE, 0x06},
    {NULL, 0, 0},
};
static const struct feature features_avx512[] = {
    {"AVX512F", LEAF7_EBX, 1u << 16},
    {"AVX512DQ", LEAF7_EBX, 1u << 17},
    {"AVX512BW", LEAF7_EBX, 1u << 30},
    {"AVX512VL", LEAF7_EBX, 1u << 31},
    {"AVX512_VNNI", LEAF7_ECX, 1u << 11},
    {"512-bit register state enabled by the operating system", STATE, 0xE6},
    {NULL, 0, 0},
};
static const struct feature features_avx512bf16[] = {
    {"AVX512_BF16", LEAF7_1_EAX, 1u << 5},
    {NULL, 0, 0},
};

static const struct feature features_amx[] = {
    {"AMX_TILE", LEAF7_EDX, 1u << 24},
    {"AMX_BF16", LEAF7_EDX, 1u << 22},
    {"tile register state enabled by the operating system", STATE, 0x60000},
    {NULL, 0, 0},
};

static void read_features(unsigned words[N_WORDS])
{
    unsigned a, b, c, d;
    for (int i = 0; i < N_WORDS; i++)
        words[i] = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return;
    words[LEAF1_ECX] = c;
    if (c & (1u << 27)) { /* OSXSAVE: xgetbv may be used */
        unsigned low, high;
        __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
        words[STATE] = low;
    }
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
        words[LEAF7_EBX] = b;
        words[LEAF7_ECX] = c;
        words[LEAF7_EDX] = d;
        if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
            words[LEAF7_1_EAX] = a;
    }
}

static const char *first_missing(const struct feature *list, const unsigned words[N_WORDS])
{
    for (; list->name; list++)
        if ((words[list->word] & list->bits) != list->bits)
            return list->name;
    return NULL;
}

/* arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), Linux 5.16. */
static const char *ask_for_tiles(void)
{
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0
        ? NULL
        : "the system's permission to use tile registers";
}

void list_variants(struct variant out[N_VARIANTS])
{
    unsigned words[N_WORDS];
    read_features(words);
    const char *missing = first_missing(features_avx2, words);
    out[3] = (struct variant){&kernels_avx2, missing};
    missing = missing ? missing : first_missing(features_avx512, words);
    out[2] = (struct variant){&kernels_avx512, missing};
    missing = missing ? missing : first_missing(features_avx512bf16, words);
    out[1] = (struct variant){&kernels_avx512bf16, missing};
    missing = missing ? missing : first_missing(features_amx, words);
    missing = missing ? missing : ask_for_tiles();
    out[0] = (struct variant){&kernels_amx, missing};
}
