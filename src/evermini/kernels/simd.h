/* Portable 16-lane vectors (GCC/Clang vector extensions) with the few operations that need an ISA's own instruction.
 *
 * Everything is written for 64-byte vectors; the compiler splits them where registers are narrower. Only the u8 x s8
 * dot product and the half-precision conversions are spelled per ISA, each with a plain fallback.
 */
#ifndef EVERMINI_SIMD_H
#define EVERMINI_SIMD_H
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int16_t i16x32 __attribute__((vector_size(64)));
typedef uint8_t u8x64 __attribute__((vector_size(64)));

#define INLINE static inline __attribute__((always_inline))
INLINE void spin_pause(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#define UNROLL _Pragma("GCC unroll 16")

INLINE f32x16 loadf(const float *p) { f32x16 v; memcpy(&v, p, 64); return v; }
INLINE void storef(float *p, f32x16 v) { memcpy(p, &v, 64); }
INLINE i32x16 loadi(const void *p) { i32x16 v; memcpy(&v, p, 64); return v; }
INLINE void storei(void *p, i32x16 v) { memcpy(p, &v, 64); }
INLINE f32x16 splatf(float x) { return x - (f32x16){0}; }
INLINE i32x16 splati(int32_t x) { return x - (i32x16){0}; }
INLINE f32x16 to_float(i32x16 v) { return __builtin_convertvector(v, f32x16); }
INLINE f32x16 selectf(i32x16 mask, f32x16 a, f32x16 b) {
    return (f32x16)(((i32x16)a & mask) | ((i32x16)b & ~mask));
}
INLINE f32x16 maxf(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return selectf(a > b, a, b);
#endif
}
INLINE f32x16 absf(f32x16 v) { return (f32x16)((i32x16)v & 0x7fffffff); }

/* Lane reductions always add in the same order: 8 apart, then 4, 2, 1. */
INLINE float reduce_add(f32x16 v) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return v[0];
}

INLINE int32_t reduce_addi(i32x16 v) {
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return v[0];
}

INLINE float reduce_max(f32x16 v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#else
    float a[16];
    memcpy(a, &v, 64);
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) a[i] = a[i] > a[i + n] ? a[i] : a[i + n];
    return a[0];
#endif
}

/* Nearest integer (ties to even) of |v| < 2^22, by adding 1.5 * 2^23. */
INLINE i32x16 round_to_int(f32x16 v) {
    return (i32x16)(v + 12582912.0f) - 0x4B400000;
}

/* e^v for v <= 0, 2 ulp; exactly 1 at 0 and exactly 0 below -87. */
INLINE f32x16 exp_nonpositive(f32x16 v) {
    i32x16 alive = v > -87.0f;
    v = selectf(alive, v, splatf(-87.0f));
    i32x16 n = round_to_int(v * 1.44269504f);
    f32x16 nf = to_float(n);
    f32x16 r = v - nf * 0.693359375f;
    r = r - nf * -2.12194440e-4f;
    f32x16 p = splatf(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    i32x16 e = (i32x16)p + (n << 23);
    return (f32x16)(e & alive);
}

/* The low byte of each lane. */
INLINE void store_bytes(int8_t *p, i32x16 v) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
    for (int i = 0; i < 16; i++) p[i] = (int8_t)v[i];
#endif
}

/* acc[c] += sum over 4 bytes j of w[c][j] (unsigned) * x[c][j] (signed); exact. */
INLINE i32x16 dot4(i32x16 acc, i32x16 w, i32x16 x) {
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
    /* u8 x s8 pairs overflow maddubs' 16 bits: widen even and odd bytes instead. */
    typedef int32_t i32x8 __attribute__((vector_size(32)));
    union { i32x16 v; __m256i h[2]; } a = {acc}, b = {w}, c = {x};
    const __m256i low = _mm256_set1_epi16(0xff);
    for (int i = 0; i < 2; i++) {
        __m256i even = _mm256_and_si256(b.h[i], low), odd = _mm256_srli_epi16(b.h[i], 8);
        __m256i xe = _mm256_srai_epi16(_mm256_slli_epi16(c.h[i], 8), 8);
        __m256i xo = _mm256_srai_epi16(c.h[i], 8);
        __m256i s = _mm256_add_epi32(_mm256_madd_epi16(even, xe), _mm256_madd_epi16(odd, xo));
        a.h[i] = _mm256_add_epi32(a.h[i], s);
    }
    return a.v;
#else
    for (int j = 0; j < 4; j++)
        acc += ((w >> (8 * j)) & 0xff) * ((x << (24 - 8 * j)) >> 24);
    return acc;
#endif
}

/* v with bit `bit` of byte i set where bit i of mask is set. */
INLINE i32x16 set_bit(i32x16 v, uint64_t mask, int bit) {
#if defined(__AVX512BW__)
    return (i32x16)_mm512_mask_add_epi8((__m512i)v, mask, (__m512i)v, _mm512_set1_epi8(1 << bit));
#else
    u8x64 b = (u8x64)v;
    for (int i = 0; i < 64; i++) b[i] |= ((mask >> i) & 1) << bit;
    return (i32x16)b;
#endif
}

/* IEEE half precision, 16 at a time. */
INLINE f32x16 half_to_float(const uint16_t *p) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
    union { f32x16 v; __m256 h[2]; } r;
    for (int i = 0; i < 2; i++) r.h[i] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p + i));
    return r.v;
#else
    _Float16 h[16];
    memcpy(h, p, 32);
    f32x16 v;
    for (int i = 0; i < 16; i++) v[i] = (float)h[i];
    return v;
#endif
}

INLINE uint16_t float_to_half(float x) {
#if defined(__F16C__)
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
    _Float16 h = (_Float16)x;
    uint16_t u;
    memcpy(&u, &h, 2);
    return u;
#endif
}

INLINE void store_half(uint16_t *p, f32x16 v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < 16; i++) p[i] = float_to_half(v[i]);
#endif
}
#endif
