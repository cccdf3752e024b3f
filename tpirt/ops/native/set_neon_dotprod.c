/* NEON with sdot. */
#include "set.h"

#if defined(__aarch64__) && NEON_DOT

#define SET(name) dotprod_##name
#define SET_NAME "neon-dotprod"
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#include "neon_common.inc"
#include "neon_sdot.inc"
#define TOKENS 4
#include "products.inc"

#endif
