// The two ops of the CPU's hot path that no composition of PyTorch's own can keep inside the processor's caches: GroupNorm + FiLM + SiLU, forward
// and backward, and attention along time. Compiled on first use by `native.py`; plain C interface, no headers but the compiler's.
//
// Sixteen floats at a time through the compiler's vector extensions, whatever registers the processor has. Every sum runs in an order that depends on
// the shape alone, never on the number of threads or on other frames: the same bits on any machine load, and frames stay isolated to the last bit.

#include <cstdint>
#include <cstring>
#include <cstdlib>
#include <cmath>

typedef float f16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef uint16_t bf16;
typedef int64_t i64;

static inline f16 splat(float a) { return a - f16{}; }
static inline f16 min16(f16 a, f16 b) { return a > b ? b : a; }        // a NaN in a stays: the comparison is false
static inline f16 max16(f16 a, f16 b) { return a < b ? b : a; }

// n of 16 elements at p; the rest are zeros
static inline f16 load(const float* p, int n = 16) {
    f16 v = {};
    if (n == 16) __builtin_memcpy(&v, p, 64); else __builtin_memcpy(&v, p, 4 * n);
    return v;
}
static inline f16 load(const bf16* p, int n = 16) {
    h16 h = {};
    if (n == 16) __builtin_memcpy(&h, p, 32); else __builtin_memcpy(&h, p, 2 * n);
    return (f16)(__builtin_convertvector(h, u16) << 16);
}
static inline void store(float* p, f16 v, int n = 16) {
    if (n == 16) __builtin_memcpy(p, &v, 64); else __builtin_memcpy(p, &v, 4 * n);
}
static inline void store(bf16* p, f16 v, int n = 16) {                  // to nearest, ties to even, as PyTorch rounds
    u16 u = (u16)v, r = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    r = (u & 0x7fffffffu) > 0x7f800000u ? (u16{} + 0x7fc0u) : r;
    h16 h = __builtin_convertvector(r, h16);
    if (n == 16) __builtin_memcpy(p, &h, 32); else __builtin_memcpy(p, &h, 2 * n);
}

// exp, within 2 units of the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' coefficients)
static inline f16 exp16(f16 x) {
    x = min16(max16(x, splat(-87.33f)), splat(88.37f));
    const f16 magic = splat(12582912.f);                                // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    f16 t = x * 1.44269504f + magic, n = t - magic;
    f16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f16 p = ((((1.9875691500e-4f * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r + 1.6666665459e-1f) * r + 0.5f;
    p = p * r * r + r + 1.f;
    return p * (f16)(((i16)t - (i16)magic + 127) << 23);
}

// ---------------------------------------------------------------- GroupNorm + FiLM + SiLU

const i64 ROWS = 64;              // pixels summed in fp32 before they join the double: short sums, and a tile that stays in the first cache

// a frame's mean and variance per group, around a pivot near the mean: E[d^2] - E[d]^2 of d = x - pivot loses nothing to a large mean
template <class T>
static void moments(const T* x, i64 P, i64 C, i64 G, double* mean, double* var, double* s, double* q) {
    i64 K = C / G;
    for (i64 c = 0; c < C; c++) s[c] = q[c] = 0;
    for (i64 p0 = 0; p0 < P; p0 += ROWS) {
        i64 p1 = p0 + ROWS < P ? p0 + ROWS : P;
        for (i64 c = 0; c < C; c += 16) {
            int n = C - c < 16 ? (int)(C - c) : 16;
            f16 pivot = load(x + c, n), a = {}, b = {};
            for (i64 p = p0; p < p1; p++) { f16 d = load(x + p * C + c, n) - pivot; a += d; b += d * d; }
            for (int i = 0; i < n; i++) { s[c + i] += a[i]; q[c + i] += b[i]; }
        }
    }
    for (i64 g = 0; g < G; g++) {
        double m = 0, v = 0;
        for (i64 c = g * K; c < (g + 1) * K; c++) { float pivot = load(x + c, 1)[0]; m += pivot + s[c] / P; }
        m /= K;
        for (i64 c = g * K; c < (g + 1) * K; c++) {
            double d = s[c] / P, off = (double)load(x + c, 1)[0] + d - m;
            v += q[c] / P - d * d + off * off;
        }
        mean[g] = m;
        var[g] = v > 0 ? v / K : (v == v ? 0 : v);
    }
}

template <class T>
static void norm_forward(const T* x, T* y, i64 N, i64 P, i64 C, i64 G, const float* affine, const float* add, i64 film, float eps,
                         const float* stats, float* mean, float* rstd, float* gain, float* shift) {
    #pragma omp parallel
    {
        double* work = new double[2 * C + 2 * G];
        #pragma omp for schedule(static)
        for (i64 n = 0; n < N; n++) {
            const T* xn = x + n * P * C;
            T* yn = y + n * P * C;
            double *m = work + 2 * C, *v = m + G;
            if (stats) for (i64 g = 0; g < G; g++) { m[g] = stats[(n * G + g) * 2]; v[g] = stats[(n * G + g) * 2 + 1]; }
            else moments(xn, P, C, G, m, v, work, work + C);
            for (i64 c = 0; c < C; c++) {
                i64 g = c / (C / G), i = n * C + c;
                double r = 1 / std::sqrt(v[g] + eps);
                mean[i] = m[g]; rstd[i] = r;
                gain[i] = r * affine[film * n * C + c];
                shift[i] = add[film * n * C + c];
            }
            const float *mc = mean + n * C, *a = gain + n * C, *b = shift + n * C;
            for (i64 p = 0; p < P; p++)
                for (i64 c = 0; c < C; c += 16) {
                    int k = C - c < 16 ? (int)(C - c) : 16;
                    f16 u = (load(xn + p * C + c, k) - load(mc + c, k)) * load(a + c, k) + load(b + c, k);
                    store(yn + p * C + c, u / (1.f + exp16(-u)), k);
                }
        }
        delete[] work;
    }
}

// du = dy * silu'(u), u recomputed; doffset = sum du, dnormed = sum du * normalised, then dx through the statistics
template <class T>
static void norm_backward(const T* x, const T* dy, T* dx, i64 N, i64 P, i64 C, i64 G, const float* affine, i64 film, const float* mean,
                          const float* rstd, const float* gain, const float* shift, float* doffset, float* dnormed) {
    i64 K = C / G;
    #pragma omp parallel
    {
        double* s = new double[2 * C];
        float* ab = new float[2 * C];
        #pragma omp for schedule(static)
        for (i64 n = 0; n < N; n++) {
            const T *xn = x + n * P * C, *dn = dy + n * P * C;
            const float *m = mean + n * C, *r = rstd + n * C, *a = gain + n * C, *b = shift + n * C;
            auto slope = [&](i64 at, i64 c, int k) {
                f16 u = (load(xn + at, k) - load(m + c, k)) * load(a + c, k) + load(b + c, k), sg = 1.f / (1.f + exp16(-u));
                return load(dn + at, k) * sg * (1.f + u * (1.f - sg));
            };
            for (i64 c = 0; c < 2 * C; c++) s[c] = 0;
            for (i64 p0 = 0; p0 < P; p0 += ROWS) {
                i64 p1 = p0 + ROWS < P ? p0 + ROWS : P;
                for (i64 c = 0; c < C; c += 16) {
                    int k = C - c < 16 ? (int)(C - c) : 16;
                    f16 s1 = {}, s2 = {}, mc = load(m + c, k);
                    for (i64 p = p0; p < p1; p++) {
                        f16 du = slope(p * C + c, c, k);
                        s1 += du; s2 += du * (load(xn + p * C + c, k) - mc);
                    }
                    for (int i = 0; i < k; i++) { s[c + i] += s1[i]; s[C + c + i] += s2[i]; }
                }
            }
            for (i64 g = 0; g < G; g++) {
                double g1 = 0, g2 = 0;
                for (i64 c = g * K; c < (g + 1) * K; c++) {
                    double w = affine[film * n * C + c];
                    s[C + c] *= r[c];
                    doffset[n * C + c] = s[c]; dnormed[n * C + c] = s[C + c];
                    g1 += s[c] * w; g2 += s[C + c] * w;
                }
                for (i64 c = g * K; c < (g + 1) * K; c++) {
                    ab[c] = -(double)r[c] * r[c] * g2 / ((double)P * K);
                    ab[C + c] = -(double)r[c] * g1 / ((double)P * K);
                }
            }
            T* out = dx + n * P * C;
            for (i64 p = 0; p < P; p++)
                for (i64 c = 0; c < C; c += 16) {
                    int k = C - c < 16 ? (int)(C - c) : 16;
                    f16 d = load(xn + p * C + c, k) - load(m + c, k);
                    store(out + p * C + c, slope(p * C + c, c, k) * load(a + c, k) + d * load(ab + c, k) + load(ab + C + c, k), k);
                }
        }
        delete[] s;
        delete[] ab;
    }
}

// ---------------------------------------------------------------- attention along time

// 16 x 16 floats, rows ld apart, transposed into rows of 16 by swapping ever larger blocks
static inline void transpose16(const float* in, i64 ld, float* out, i64 out_ld) {
    f16 r[16];
    for (int i = 0; i < 16; i++) r[i] = load(in + i * ld);
    #define SWAP(S, A, B) for (int i = 0; i < 16; i++) if (!(i & S)) { \
        f16 lo = __builtin_shuffle(r[i], r[i + S], A), hi = __builtin_shuffle(r[i], r[i + S], B); r[i] = lo; r[i + S] = hi; }
    SWAP(1, (i16{0,16,2,18,4,20,6,22,8,24,10,26,12,28,14,30}), (i16{1,17,3,19,5,21,7,23,9,25,11,27,13,29,15,31}))
    SWAP(2, (i16{0,1,16,17,4,5,20,21,8,9,24,25,12,13,28,29}), (i16{2,3,18,19,6,7,22,23,10,11,26,27,14,15,30,31}))
    SWAP(4, (i16{0,1,2,3,16,17,18,19,8,9,10,11,24,25,26,27}), (i16{4,5,6,7,20,21,22,23,12,13,14,15,28,29,30,31}))
    SWAP(8, (i16{0,1,2,3,4,5,6,7,16,17,18,19,20,21,22,23}), (i16{8,9,10,11,12,13,14,15,24,25,26,27,28,29,30,31}))
    #undef SWAP
    for (int i = 0; i < 16; i++) store(out + i * out_ld, r[i]);
}

// acc rows 0..7 = lhs [8, n] times rhs [n, 16]: eight sums side by side, odd and even terms apart, keep the multipliers busy and the error small
static inline void product8(const float* lhs, i64 ld, const float* rhs, i64 rhs_ld, i64 n, f16* acc) {
    f16 odd[8] = {};
    for (int i = 0; i < 8; i++) acc[i] = f16{};
    i64 j = 0;
    for (; j + 1 < n; j += 2) {
        f16 b = load(rhs + j * rhs_ld), c = load(rhs + (j + 1) * rhs_ld);
        for (int i = 0; i < 8; i++) { acc[i] += lhs[i * ld + j] * b; odd[i] += lhs[i * ld + j + 1] * c; }
    }
    if (j < n) { f16 b = load(rhs + j * rhs_ld); for (int i = 0; i < 8; i++) acc[i] += lhs[i * ld + j] * b; }
    for (int i = 0; i < 8; i++) acc[i] += odd[i];
}

// the largest lane in every lane, the sum of all lanes in every lane
static inline f16 top16(f16 v) {
    v = max16(v, __builtin_shuffle(v, i16{8,9,10,11,12,13,14,15,0,1,2,3,4,5,6,7}));
    v = max16(v, __builtin_shuffle(v, i16{4,5,6,7,0,1,2,3,12,13,14,15,8,9,10,11}));
    v = max16(v, __builtin_shuffle(v, i16{2,3,0,1,6,7,4,5,10,11,8,9,14,15,12,13}));
    return max16(v, __builtin_shuffle(v, i16{1,0,3,2,5,4,7,6,9,8,11,10,13,12,15,14}));
}
static inline f16 all16(f16 v) {
    v += __builtin_shuffle(v, i16{8,9,10,11,12,13,14,15,0,1,2,3,4,5,6,7});
    v += __builtin_shuffle(v, i16{4,5,6,7,0,1,2,3,12,13,14,15,8,9,10,11});
    v += __builtin_shuffle(v, i16{2,3,0,1,6,7,4,5,10,11,8,9,14,15,12,13});
    return v + __builtin_shuffle(v, i16{1,0,3,2,5,4,7,6,9,8,11,10,13,12,15,14});
}

// strides of q, k, v (in) and out (to) in elements: sample, frame, pixel, head. Frames are padded to 16s: zeros, whose bias is minus infinity.
template <class T>
static void attend(const T* q, const T* k, const T* v, const float* bias, T* out, i64 B, i64 F, i64 P, i64 H, i64 d,
                   const i64* in, const i64* to, float scale) {
    const i64 Fp = (F + 15) / 16 * 16, D = (d + 15) / 16 * 16;
    float* padded = (float*)std::aligned_alloc(64, H * Fp * Fp * sizeof(float));
    for (i64 i = 0; i < H * Fp; i++)
        for (i64 s = 0; s < Fp; s++) padded[i * Fp + s] = s < F ? (i % Fp < F ? bias[(i / Fp * F + i % Fp) * F + s] : 0) : -INFINITY;
    #pragma omp parallel
    {
        const i64 part = Fp * D + 80;                      // not a multiple of 4 KiB apart: the processor would take one's stores for another's loads
        float* work = (float*)std::aligned_alloc(64, (4 * part + 8 * Fp) * sizeof(float));
        float *wq = work, *wk = wq + part, *wv = wk + part, *kt = wv + part, *w = kt + part;
        std::memset(work, 0, 3 * part * sizeof(float));
        #pragma omp for schedule(static)
        for (i64 bp = 0; bp < B * P; bp++) {
            // the rows of a pixel lie a frame apart, too far for the processor to foresee: ask for the next pixel's now
            const i64 ahead = bp % P + 1 < P ? in[2] : 0;
            for (i64 h = 0; h < H; h++) {
                const i64 at = bp / P * in[0] + bp % P * in[2] + h * in[3], to_at = bp / P * to[0] + bp % P * to[2] + h * to[3];
                for (i64 t = 0; t < F; t++)
                    for (i64 c = 0; c < d; c += 16) {
                        const int n = d - c < 16 ? (int)(d - c) : 16;
                        const i64 e = at + t * in[1] + c;
                        __builtin_prefetch(q + e + ahead, 0, 1); __builtin_prefetch(k + e + ahead, 0, 1); __builtin_prefetch(v + e + ahead, 0, 1);
                        store(wq + t * D + c, load(q + e, n) * scale); store(wk + t * D + c, load(k + e, n)); store(wv + t * D + c, load(v + e, n));
                    }
                for (i64 t = 0; t < Fp; t += 16)
                    for (i64 c = 0; c < D; c += 16) transpose16(wk + t * D + c, D, kt + c * Fp + t, Fp);
                for (i64 t = 0; t < F; t += 8) {
                    f16 most[8], sum[8];
                    for (int i = 0; i < 8; i++) { most[i] = splat(-INFINITY); sum[i] = f16{}; }
                    for (i64 s = 0; s < Fp; s += 16) {
                        f16 acc[8];
                        product8(wq + t * D, D, kt + s, Fp, d, acc);
                        for (int i = 0; i < 8; i++) acc[i] += load(padded + (h * Fp + t + i) * Fp + s);
                        for (int i = 0; i < 8; i++) { store(w + i * Fp + s, acc[i]); most[i] = max16(most[i], acc[i]); }
                    }
                    for (int i = 0; i < 8; i++) most[i] = top16(most[i]);
                    for (i64 s = 0; s < Fp; s += 16)
                        for (int i = 0; i < 8; i++) {
                            f16 z = exp16(load(w + i * Fp + s) - most[i]);
                            store(w + i * Fp + s, z);
                            sum[i] += z;
                        }
                    for (int i = 0; i < 8; i++) sum[i] = 1.f / all16(sum[i]);
                    const int rows = F - t < 8 ? (int)(F - t) : 8;
                    for (i64 c = 0; c < d; c += 16) {
                        const int n = d - c < 16 ? (int)(d - c) : 16;
                        f16 acc[8];
                        product8(w, Fp, wv + c, D, F, acc);
                        for (int i = 0; i < rows; i++) store(out + to_at + (t + i) * to[1] + c, acc[i] * sum[i], n);
                    }
                }
            }
        }
        std::free(work);
    }
    std::free(padded);
}

extern "C" {
#define NORM_FORWARD(T) (const T* x, T* y, i64 N, i64 P, i64 C, i64 G, const float* affine, const float* add, i64 film, float eps, \
    const float* stats, float* mean, float* rstd, float* gain, float* shift) \
    { norm_forward(x, y, N, P, C, G, affine, add, film, eps, stats, mean, rstd, gain, shift); }
#define NORM_BACKWARD(T) (const T* x, const T* dy, T* dx, i64 N, i64 P, i64 C, i64 G, const float* affine, i64 film, const float* mean, \
    const float* rstd, const float* gain, const float* shift, float* doffset, float* dnormed) \
    { norm_backward(x, dy, dx, N, P, C, G, affine, film, mean, rstd, gain, shift, doffset, dnormed); }
#define ATTEND(T) (const T* q, const T* k, const T* v, const float* bias, T* out, i64 B, i64 F, i64 P, i64 H, i64 d, const i64* in, \
    const i64* to, float scale) { attend(q, k, v, bias, out, B, F, P, H, d, in, to, scale); }
void norm_forward_f32 NORM_FORWARD(float)
void norm_forward_bf16 NORM_FORWARD(bf16)
void norm_backward_f32 NORM_BACKWARD(float)
void norm_backward_bf16 NORM_BACKWARD(bf16)
void attend_f32 ATTEND(float)
void attend_bf16 ATTEND(bf16)
}
