/* What the processor that runs this can do, in the words of Linux's /proc/cpuinfo. For C99 and C++.
 *
 * Asked of the processor itself (CPUID, and XGETBV for the registers that the system saves) or of the kernel (HWCAP),
 * not read from /proc: that is the host's in an emulator, and hidden in some containers. Compile it for the plainest
 * processor of the architecture: it runs before anything is known.
 *
 * Sources: Intel 64 manual, volume 2A, CPUID; Linux, Documentation/arch/arm64/elf_hwcaps.rst and arch/x86/xstate.rst.
 */
#ifndef GRAPHOPT_PROCESSOR_H_
#define GRAPHOPT_PROCESSOR_H_

#include <stddef.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#define GRAPHOPT_ARCH "x86_64"
#elif defined(__aarch64__)
#include <sys/auxv.h>
#define GRAPHOPT_ARCH "aarch64"
#else
#error "graphopt compiles for x86_64 and aarch64"
#endif

#if defined(__x86_64__)

/* Where CPUID says it, and which state components (bits of XCR0) the system has to save for it. */
typedef struct {
  const char* name;
  unsigned leaf, subleaf;
  int output; /* 0 EAX, 1 EBX, 2 ECX, 3 EDX */
  int bit;
  unsigned state;
} graphopt_feature;

enum { GRAPHOPT_YMM = 0x6, GRAPHOPT_ZMM = 0xe6, GRAPHOPT_TILES = 0x60000 };

static const graphopt_feature graphopt_features[] = {
    {"ssse3", 1, 0, 2, 9, 0},
    {"sse4_1", 1, 0, 2, 19, 0},
    {"sse4_2", 1, 0, 2, 20, 0},
    {"popcnt", 1, 0, 2, 23, 0},
    {"movbe", 1, 0, 2, 22, 0},
    {"abm", 0x80000001u, 0, 2, 5, 0},
    {"bmi1", 7, 0, 1, 3, 0},
    {"bmi2", 7, 0, 1, 8, 0},
    {"avx", 1, 0, 2, 28, GRAPHOPT_YMM},
    {"fma", 1, 0, 2, 12, GRAPHOPT_YMM},
    {"f16c", 1, 0, 2, 29, GRAPHOPT_YMM},
    {"avx2", 7, 0, 1, 5, GRAPHOPT_YMM},
    {"avx_vnni", 7, 1, 0, 4, GRAPHOPT_YMM},
    {"avx512f", 7, 0, 1, 16, GRAPHOPT_ZMM},
    {"avx512dq", 7, 0, 1, 17, GRAPHOPT_ZMM},
    {"avx512cd", 7, 0, 1, 28, GRAPHOPT_ZMM},
    {"avx512bw", 7, 0, 1, 30, GRAPHOPT_ZMM},
    {"avx512vl", 7, 0, 1, 31, GRAPHOPT_ZMM},
    {"avx512_vnni", 7, 0, 2, 11, GRAPHOPT_ZMM},
    {"avx512_bf16", 7, 1, 0, 5, GRAPHOPT_ZMM},
    {"amx_bf16", 7, 0, 3, 22, GRAPHOPT_TILES},
    {"amx_tile", 7, 0, 3, 24, GRAPHOPT_TILES},
    {"amx_int8", 7, 0, 3, 25, GRAPHOPT_TILES},
    {"amx_fp16", 7, 1, 0, 21, GRAPHOPT_TILES},
};

static inline unsigned graphopt_saved_state(void) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx >> 27 & 1)) return 0; /* OSXSAVE */
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return eax;
}

static inline int graphopt_has_feature(const graphopt_feature* f) {
  unsigned found[4] = {0, 0, 0, 0};
  if (f->subleaf) { /* leaf 7 tells in EAX how many subleaves there are */
    if (!__get_cpuid_count(f->leaf, 0, &found[0], &found[1], &found[2], &found[3]) || found[0] < f->subleaf) return 0;
  }
  if (!__get_cpuid_count(f->leaf, f->subleaf, &found[0], &found[1], &found[2], &found[3])) return 0;
  return (found[f->output] >> f->bit & 1) && (f->state == 0 || (graphopt_saved_state() & f->state) == f->state);
}

/* Ask Linux for the AMX tile registers, once for all threads of the process: 1 where it gives them. Code that uses them
 * unasked is ended with an illegal instruction. */
static inline int graphopt_allow_tiles(void) {
  const long request_permission = 0x1023, tile_data = 18; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

#else /* aarch64 */

typedef struct {
  const char* name;
  unsigned long which; /* AT_HWCAP or AT_HWCAP2 */
  int bit;
} graphopt_feature;

static const graphopt_feature graphopt_features[] = {
    {"asimd", AT_HWCAP, 1}, {"fphp", AT_HWCAP, 9}, {"asimdhp", AT_HWCAP, 10}, {"asimddp", AT_HWCAP, 20},
    {"sve", AT_HWCAP, 22},  {"sve2", AT_HWCAP2, 1}, {"i8mm", AT_HWCAP2, 13},  {"bf16", AT_HWCAP2, 14},
};

static inline int graphopt_has_feature(const graphopt_feature* f) { return getauxval(f->which) >> f->bit & 1; }

static inline int graphopt_allow_tiles(void) { return 0; }

#endif

enum { GRAPHOPT_FEATURES = sizeof graphopt_features / sizeof graphopt_features[0] };

/* 1 where the processor has the feature and the system lets programs use it; 0 where not, or nobody knows the name. */
static inline int graphopt_processor_has(const char* name) {
  size_t i;
  for (i = 0; i < GRAPHOPT_FEATURES; ++i) {
    if (strcmp(graphopt_features[i].name, name) == 0) return graphopt_has_feature(&graphopt_features[i]);
  }
  return 0;
}

#endif /* GRAPHOPT_PROCESSOR_H_ */
