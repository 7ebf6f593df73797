/* The CPU's kernels of a decode step, for two dtypes. src/kernels/cpu.py compiles and calls them. */

#include <math.h>
#include <omp.h>
#include <stdint.h>

static inline float bits_as_float(uint32_t bits) {
    union { uint32_t bits; float value; } x = {bits};
    return x.value;
}

static inline float from_float(float x) { return x; }
static inline float to_float(float x) { return x; }
static inline float from_bf16(uint16_t x) { return bits_as_float((uint32_t)x << 16); }
static inline uint16_t to_bf16(float x) { /* to the nearest, to even in the middle */
    union { float value; uint32_t bits; } y = {x};
    return (uint16_t)((y.bits + 0x7fff + (y.bits >> 16 & 1)) >> 16);
}

/* e^x to 2e-7 of itself, for x <= 0: x = n log 2 + r; a polynomial of r (Cephes, expf) by 2^n. */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * bits_as_float((uint32_t)((int32_t)n + 127) << 23);
}

#define T float
#define FROM from_float
#define TO to_float
#define NAMED(name) name##_float32
#include "cpu_kernels.h"
#undef T
#undef FROM
#undef TO
#undef NAMED

#define T uint16_t
#define FROM from_bf16
#define TO to_bf16
#define NAMED(name) name##_bfloat16
#include "cpu_kernels.h"
