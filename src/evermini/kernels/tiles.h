/* Tiles of attention in float32: up to 6 query rows against STEP keys, whose scores stay in registers. */
#ifndef EVERMINI_TILES_H
#define EVERMINI_TILES_H
#include "evermini.h"

#define STEP 64
#define MASKED -1e30f

/* scores[rows][STEP] = q[rows][d] . k[d][STEP], `rows` constant. */
INLINE void scores_tile(int rows, const float *q, const float *k, int64_t d, float *scores) {
    f32x16 acc[6][4];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < 4; c++) acc[r][c] = splatf(0);
    for (int64_t i = 0; i < d; i++) {
        f32x16 kv[4];
        UNROLL for (int c = 0; c < 4; c++) kv[c] = loadf(k + i * STEP + c * 16);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int c = 0; c < 4; c++) acc[r][c] += kv[c] * q[r * d + i];
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < 4; c++) storef(scores + r * STEP + c * 16, acc[r][c]);
}

/* out[rows][columns * 16 of d] += p[rows][keys] . v[keys][d], `rows` and `columns` constant. */
INLINE void values_tile(int rows, int columns, const float *p, const float *v, int64_t keys, int64_t d, float *out) {
    f32x16 acc[6][4];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++) acc[r][c] = loadf(out + r * d + c * 16);
    for (int64_t j = 0; j < keys; j++) {
        f32x16 vv[4];
        UNROLL for (int c = 0; c < columns; c++) vv[c] = loadf(v + j * d + c * 16);
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int c = 0; c < columns; c++) acc[r][c] += vv[c] * p[r * STEP + j];
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int c = 0; c < columns; c++) storef(out + r * d + c * 16, acc[r][c]);
}

#define BY_ROWS(n, CALL) \
    switch (n) { \
    case 6: CALL(6); break; case 5: CALL(5); break; case 4: CALL(4); break; \
    case 3: CALL(3); break; case 2: CALL(2); break; default: CALL(1); }

/* The next tile of what is left: at most 6 rows, evenly divided (7 is 4 + 3). */
INLINE int64_t tile_size(int64_t rows) {
    const int64_t tiles = (rows + 5) / 6;
    return (rows + tiles - 1) / tiles;
}

static void all_scores(int64_t rows, const float *q, const float *k, int64_t d, float *scores) {
    for (int64_t r = 0, n; r < rows; r += n) {
        n = tile_size(rows - r);
#define CALL(n) scores_tile(n, q + r * d, k, d, scores + r * STEP)
        BY_ROWS(n, CALL)
#undef CALL
    }
}

static void all_values(int64_t rows, const float *p, const float *v, int64_t keys, int64_t d, float *out) {
    for (int64_t r = 0, n; r < rows; r += n) {
        int64_t c = 0;
        n = tile_size(rows - r);
        for (; c + 64 <= d; c += 64) {
#define CALL(n) values_tile(n, 4, p + r * STEP, v + c, keys, d, out + r * d + c)
            BY_ROWS(n, CALL)
#undef CALL
        }
        for (; c < d; c += 16) {
#define CALL(n) values_tile(n, 1, p + r * STEP, v + c, keys, d, out + r * d + c)
            BY_ROWS(n, CALL)
#undef CALL
        }
    }
}

/* One row's softmax step over STEP scores: probabilities in place, running max and 16 partial sums updated, out rescaled. */
INLINE void softmax_step(float *scores, int64_t visible, float *max, float *lane_sums, float *out, int64_t d) {
    f32x16 s[4];
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    UNROLL for (int c = 0; c < 4; c++) s[c] = loadf(scores + c * 16);
    if (visible < STEP)
        UNROLL for (int c = 0; c < 4; c++)
            s[c] = selectf(lane + 16 * c < splati((int32_t)(visible > 0 ? visible : 0)), s[c], splatf(MASKED));
    float m = reduce_max(maxf(maxf(s[0], s[1]), maxf(s[2], s[3])));
    if (m < *max) m = *max;
    UNROLL for (int c = 0; c < 4; c++) {
        s[c] = exp_nonpositive(s[c] - m);
        storef(scores + c * 16, s[c]);
    }
    f32x16 sums = loadf(lane_sums);
    if (m > *max) {
        const float keep = exp_nonpositive(splatf(*max - m))[0];
        sums *= keep;
        for (int64_t c = 0; c < d; c += 16) storef(out + c, loadf(out + c) * keep);
        *max = m;
    }
    storef(lane_sums, sums + ((s[0] + s[1]) + (s[2] + s[3])));
}
#endif
