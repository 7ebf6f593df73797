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

/* SplitMix64's finaliser (Steele, Lea, Flood 2014). */
static inline uint64_t mix(uint64_t x) {
    x += 0x9E3779B97F4A7C15u;
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
    x = (x ^ x >> 27) * 0x94D049BB133111EBu;
    return x ^ x >> 31;
}

/* e^(x - top), and nothing of what is far below. */
static inline float mass(float x, float top) {
    return x - top < -87.0f ? 0.0f : exponential(x - top);
}

#define WIDTH 256 /* logits of a block */

/* A token of each row of logits, [n, size], and its log-probability; see `draw`.

The mass of a block is summed in double, and the cumulated masses of the blocks; then again inside
the one in which the number falls. */
void draw(const float *logits, const float *tops, int64_t n, int64_t size, int64_t seed,
          const int64_t *samples, const int64_t *steps, int64_t *tokens, float *logprobs) {
    const int64_t blocks = (size + WIDTH - 1) / WIDTH;
    #pragma omp parallel for schedule(static) if (n > 1)
    for (int64_t row = 0; row < n; row++) {
        const float *z = logits + row * size, top = tops[row];
        double cumulated[blocks], total = 0.0;
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t end = (b + 1) * WIDTH < size ? (b + 1) * WIDTH : size;
            double sum = 0.0;
            #pragma omp simd reduction(+ : sum)
            for (int64_t i = b * WIDTH; i < end; i++) sum += mass(z[i], top);
            cumulated[b] = total += sum;
        }
        const uint64_t mixed = mix(mix(mix(seed) ^ samples[row]) ^ steps[row]);
        const double target = (double)(mixed >> 11) * 0x1p-53 * total;
        int64_t block = 0;
        while (block + 1 < blocks && !(cumulated[block] > target)) block++;
        /* Sums in another order may end a little below: then it is the last that has any mass. */
        double rest = target - (block ? cumulated[block - 1] : 0.0);
        const int64_t end = (block + 1) * WIDTH < size ? (block + 1) * WIDTH : size;
        int64_t token = block * WIDTH;
        for (int64_t i = token; i < end && rest >= 0.0; i++) {
            const float p = mass(z[i], top);
            rest -= p;
            if (p > 0.0f) token = i;
        }
        tokens[row] = token;
        logprobs[row] = (float)((double)(z[token] - top) - log(total));
    }
}
