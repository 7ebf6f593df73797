/* The kernels for one dtype: T, which FROM makes a float of, and TO a T of a float; NAMED is its name.

Plain loops that a compiler makes vectors of. Each result is one thread's, summed in one order: it
depends neither on the number of threads nor on what else is in the batch. */

/* One new token per sequence over the pages that hold its keys and values; see `paged_attention`.

A page at a time: scores, then the values weighted by them, with what was summed before shrunk to
the largest score so far. Four keys together keep the vector units busy. A thread takes all heads of
a sequence, which lie side by side in a page, or one head where there are few sequences; what it
reads next is asked for before. */
void NAMED(paged_attention)(const T *q, const T *keys, const T *values, const int32_t *table,
                            int64_t table_row, const int64_t *lengths, T *out, int64_t n,
                            int64_t heads, int64_t kv_heads, int64_t page, int64_t dim,
                            int64_t window, float scale) {
    const int64_t group = heads / kv_heads, chunk = page * dim;
    const int64_t together = n >= 4 * omp_get_max_threads() ? kv_heads : 1;
    const int64_t parts = kv_heads / together, states = together * group;
    #pragma omp parallel for schedule(dynamic, 1)
    for (int64_t item = 0; item < n * parts; item++) {
        const int64_t row = item / parts, head = item % parts * together;
        const int64_t length = lengths[row], first = (row * heads + head * group) * dim;
        float mean[states][dim], query[states][dim], largest[states], total[states], w[page];
        for (int64_t i = 0; i < states; i++) {
            largest[i] = -1e30f;
            total[i] = 0.0f;
            for (int64_t d = 0; d < dim; d++) {
                mean[i][d] = 0.0f;
                query[i][d] = FROM(q[first + i * dim + d]) * scale;
            }
        }
        const int64_t begin = window && length > window ? length - window : 0;
        for (int64_t start = begin / page * page; start < length; start += page) {
            const int32_t *place = table + row * table_row + start / page;
            const int64_t here = ((int64_t)place[0] * kv_heads + head) * chunk;
            const int64_t low = begin > start ? begin - start : 0;
            const int64_t high = length - start < page ? length - start : page;
            for (int64_t h = 0; h < together; h++) {
                const T *k = keys + here + h * chunk, *v = values + here + h * chunk;
                int64_t next = here + (h + 1) * chunk;
                if (h + 1 == together)
                    next = start + page < length
                               ? ((int64_t)place[1] * kv_heads + head) * chunk : here;
                for (int64_t i = 0; i < chunk; i += 64 / (int64_t)sizeof(T)) {
                    __builtin_prefetch(keys + next + i, 0, 2);
                    __builtin_prefetch(values + next + i, 0, 2);
                }
                for (int64_t g = h * group; g < (h + 1) * group; g++) {
                    int64_t p = low;
                    for (; p + 4 <= high; p += 4) {
                        const T *a = k + p * dim, *b = a + dim, *c = b + dim, *e = c + dim;
                        float s = 0.0f, t = 0.0f, u = 0.0f, x = 0.0f;
                        #pragma omp simd reduction(+ : s, t, u, x)
                        for (int64_t d = 0; d < dim; d++) {
                            const float y = query[g][d];
                            s += y * FROM(a[d]);
                            t += y * FROM(b[d]);
                            u += y * FROM(c[d]);
                            x += y * FROM(e[d]);
                        }
                        w[p] = s, w[p + 1] = t, w[p + 2] = u, w[p + 3] = x;
                    }
                    for (; p < high; p++) {
                        const T *a = k + p * dim;
                        float s = 0.0f;
                        #pragma omp simd reduction(+ : s)
                        for (int64_t d = 0; d < dim; d++) s += query[g][d] * FROM(a[d]);
                        w[p] = s;
                    }
                    float larger = largest[g], sum = 0.0f;
                    for (p = low; p < high; p++) larger = w[p] > larger ? w[p] : larger;
                    const float shrink = exponential(largest[g] - larger);
                    #pragma omp simd reduction(+ : sum)
                    for (p = low; p < high; p++) {
                        w[p] = exponential(w[p] - larger);
                        sum += w[p];
                    }
                    largest[g] = larger;
                    total[g] = total[g] * shrink + sum;
                    #pragma omp simd
                    for (int64_t d = 0; d < dim; d++) mean[g][d] *= shrink;
                    for (p = low; p + 4 <= high; p += 4) {
                        const T *a = v + p * dim, *b = a + dim, *c = b + dim, *e = c + dim;
                        const float s = w[p], t = w[p + 1], u = w[p + 2], x = w[p + 3];
                        #pragma omp simd
                        for (int64_t d = 0; d < dim; d++)
                            mean[g][d] += s * FROM(a[d]) + t * FROM(b[d]) + u * FROM(c[d])
                                          + x * FROM(e[d]);
                    }
                    for (; p < high; p++) {
                        const T *a = v + p * dim;
                        const float s = w[p];
                        #pragma omp simd
                        for (int64_t d = 0; d < dim; d++) mean[g][d] += s * FROM(a[d]);
                    }
                }
            }
        }
        for (int64_t i = 0; i < states; i++)
            for (int64_t d = 0; d < dim; d++)
                out[first + i * dim + d] = TO(length ? mean[i][d] / total[i] : 0.0f);
    }
}

static inline float NAMED(dot)(const T *x, const T *w, int64_t size) {
    float sum = 0.0f;
    #pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; i++) sum += FROM(x[i]) * FROM(w[i]);
    return sum;
}

/* silu(gate) · up, rounded in between. */
static inline T NAMED(gated)(T gate, T up) {
    const float x = FROM(gate), e = exponential(-fabsf(x));
    const float silu = x * (x < 0.0f ? e : 1.0f) / (1.0f + e);
    return TO(FROM(TO(silu)) * FROM(up));
}

/* What lies 4 KiB after this row of a weight is asked for, and told not to stay: nothing reads it
again soon. */
static inline void NAMED(ask_ahead)(const T *w, int64_t size) {
    const T *ahead = w + 4096 / sizeof(T);
    for (int64_t i = 0; i < size; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(ahead + i, 0, 0);
}

/* out = x Wᵀ (+ bias) for a few rows of x: reads the weight once, at the speed of the memory. */
void NAMED(few_rows)(const T *x, const T *weight, const T *bias, T *out, int64_t rows, int64_t in,
                     int64_t n) {
    #pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < n; j++) {
        const T *w = weight + j * in;
        NAMED(ask_ahead)(w, in);
        for (int64_t row = 0; row < rows; row++) {
            const float sum = NAMED(dot)(x + row * in, w, in);
            out[row * n + j] = TO(bias ? sum + FROM(bias[j]) : sum);
        }
    }
}

/* silu(gate) · up of a few rows; weight: gate's rows, then up's, [2 n, in]. */
void NAMED(few_rows_gated)(const T *x, const T *weight, T *out, int64_t rows, int64_t in,
                           int64_t n) {
    #pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < n; j++) {
        const T *gate = weight + j * in, *up = gate + n * in;
        NAMED(ask_ahead)(gate, in);
        NAMED(ask_ahead)(up, in);
        for (int64_t row = 0; row < rows; row++) {
            const T *a = x + row * in;
            out[row * n + j] = NAMED(gated)(TO(NAMED(dot)(a, gate, in)), TO(NAMED(dot)(a, up, in)));
        }
    }
}

/* The same by a weight in codes: levels says what a byte stands for, [256, per_byte]; the numbers of
a row have a scale for each block of 64, and are zeros past the last of x. */
void NAMED(few_rows_by_codes)(const T *x, const uint8_t *codes, const float *scales,
                              const float *levels, const T *bias, T *out, int64_t rows, int64_t in,
                              int64_t n, int64_t per_byte) {
    const int64_t blocks = (in + 63) / 64, bytes = 64 / per_byte;
    #pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < n; j++) {
        float w[blocks * 64];
        for (int64_t b = 0; b < blocks; b++) {
            const uint8_t *code = codes + (j * blocks + b) * bytes;
            const float scale = scales[j * blocks + b];
            float *to = w + b * 64;
            if (per_byte == 2)
                for (int64_t i = 0; i < bytes; i++) /* both numbers in one move */
                    __builtin_memcpy(to + 2 * i, levels + 2 * code[i], 2 * sizeof(float));
            else
                for (int64_t i = 0; i < bytes; i++) to[i] = levels[code[i]];
            #pragma omp simd
            for (int64_t i = 0; i < 64; i++) to[i] = FROM(TO(to[i] * scale));
        }
        for (int64_t row = 0; row < rows; row++) {
            const T *a = x + row * in;
            float sum = 0.0f;
            #pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < in; i++) sum += FROM(a[i]) * w[i];
            out[row * n + j] = TO(bias ? sum + FROM(bias[j]) : sum);
        }
    }
}

/* out = x / rms(x) · weight, of one row, rounded where PyTorch's is. */
static inline void NAMED(norm)(const T *x, const T *weight, T *out, int64_t dim, float eps) {
    float square = 0.0f;
    #pragma omp simd reduction(+ : square)
    for (int64_t d = 0; d < dim; d++) square += FROM(x[d]) * FROM(x[d]);
    const float r = 1.0f / sqrtf(square / (float)dim + eps);
    #pragma omp simd
    for (int64_t d = 0; d < dim; d++)
        out[d] = TO(FROM(TO(FROM(x[d]) * r)) * FROM(weight[d]));
}

/* total = x + delta, or x itself without a delta; out = its norm. x, delta: [rows, dim]. */
void NAMED(add_rms_norm)(const T *x, const T *delta, const T *weight, T *total, T *out,
                         int64_t rows, int64_t dim, float eps) {
    #pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const T *sum = x + row * dim;
        if (delta) {
            T *written = total + row * dim;
            #pragma omp simd
            for (int64_t d = 0; d < dim; d++)
                written[d] = TO(FROM(sum[d]) + FROM(delta[row * dim + d]));
            sum = written;
        }
        NAMED(norm)(sum, weight, out + row * dim, dim, eps);
    }
}

/* silu(gate) · up; joined [rows, 2 width]: gate and up side by side. */
void NAMED(swiglu)(const T *joined, T *out, int64_t rows, int64_t width) {
    #pragma omp parallel for schedule(static) if (rows > 1)
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = joined + 2 * row * width, *up = gate + width;
        #pragma omp simd
        for (int64_t i = 0; i < width; i++) out[row * width + i] = NAMED(gated)(gate[i], up[i]);
    }
}

/* Each row's queries turned, its keys turned and, with its values, written to their pages; see
`rotate_and_write`. The complex numbers lie as pairs. */
void NAMED(rotate_and_write)(const T *qkv, const float *q_rotary, const float *k_rotary,
                             const T *q_norm, const T *k_norm, T *keys, T *values,
                             const int32_t *table, int64_t table_row, const int64_t *positions,
                             T *out, int64_t n, int64_t heads, int64_t kv_heads, int64_t page,
                             int64_t dim, float eps) {
    #pragma omp parallel for schedule(static) if (n > 1)
    for (int64_t row = 0; row < n; row++) {
        const T *x = qkv + row * (heads + 2 * kv_heads) * dim;
        const int is_kept = positions[row] >= 0; /* else there is no place for it */
        const int64_t position = is_kept ? positions[row] : 0, offset = position % page;
        const int64_t place = is_kept ? table[row * table_row + position / page] : 0;
        for (int64_t h = 0; h < heads + 2 * kv_heads; h++, x += dim) {
            const int is_query = h < heads, is_key = !is_query && h < heads + kv_heads;
            if (!is_query && !is_kept) continue;
            const int64_t kv_head = (h - heads) % kv_heads;
            const int64_t there = ((place * kv_heads + kv_head) * page + offset) * dim;
            T *to = is_query ? out + (row * heads + h) * dim
                             : (is_key ? keys : values) + there;
            if (!is_query && !is_key) {
                for (int64_t d = 0; d < dim; d++) to[d] = x[d];
                continue;
            }
            const T *weight = is_query ? q_norm : k_norm;
            T normed[dim];
            if (weight) NAMED(norm)(x, weight, normed, dim, eps);
            const T *from = weight ? normed : x;
            const float *turn = (is_query ? q_rotary : k_rotary) + row * dim;
            for (int64_t d = 0; d < dim; d += 2) {
                const float a = FROM(from[d]), b = FROM(from[d + 1]);
                to[d] = TO(a * turn[d] - b * turn[d + 1]);
                to[d + 1] = TO(a * turn[d + 1] + b * turn[d]);
            }
        }
    }
}
