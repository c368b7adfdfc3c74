/* Adapters (LoRA): y += scale * (x a^T) b^T for rows that each have their own, beside the integer product of their base.
 *
 * The first product is here; the second one happens where a tile's sums become outputs (linear.c), so that a gate gets
 * its part before its silu. Every number is a sum in one fixed order, whatever the tile it is computed in: a row's result
 * is the same bit for bit, whatever else is in the batch. Factors are kept in half precision, each matrix scaled so that
 * its largest number is 1; they are read once per step, like weights, and are as fast as they are small.
 */
#include <omp.h>
#include "evermini.h"

/* `rows` x `ranks` (constants) dot products over the k (a multiple of 16) inputs. */
INLINE void dots(const float *x, int64_t ldx, int rows, const uint16_t *a, int ranks, int64_t k, float scale, float *t,
                 int64_t stride) {
    f32x16 sum[4][8];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < ranks; j++) sum[r][j] = splatf(0);
    for (int64_t i = 0; i < k; i += 16) {
        f32x16 v[4];
        UNROLL for (int r = 0; r < rows; r++) v[r] = loadf(x + r * ldx + i);
        UNROLL for (int j = 0; j < ranks; j++) {
            const f32x16 w = half_to_float(a + j * k + i);
            UNROLL for (int r = 0; r < rows; r++) sum[r][j] += v[r] * w;
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int j = 0; j < ranks; j++) t[r * stride + j] = reduce_add(sum[r][j]) * scale;
}

/* All ranks of one part for `rows` (constant) rows, `tile` (constant) at a time. */
INLINE void project(const float *x, int64_t ldx, int rows, int tile, const LoraFactors *f, int64_t k, float *t,
                    int64_t stride, int64_t *task, int64_t me, int64_t threads) {
    for (int64_t j = 0; j < f->rank; j += tile) {
        if ((*task)++ % threads != me) continue;
        if (j + tile <= f->rank) {
            dots(x, ldx, rows, f->a + j * k, tile, k, f->scale, t + j, stride);
        } else {
            for (int64_t i = j; i < f->rank; i++) dots(x, ldx, rows, f->a + i * k, 1, k, f->scale, t + i, stride);
        }
    }
}

void lora_team(Team *team, const LoraCall *call, const float *x, int64_t ldx, int64_t k) {
    const Lora *l = call->lora;
    const int64_t me = omp_get_thread_num(), k16 = (k + 15) / 16 * 16;
    int64_t task = 0;
    for (int64_t s = 0; s < l->num_segments; s++) {
        for (int p = call->part; p < call->part + call->count; p++) {
            const LoraFactors *f = &l->layers[s][call->layer].part[p];
            const int64_t end = l->starts[s + 1] - l->first;
            for (int64_t r = l->starts[s] - l->first; r < end; r += 4) {
                const float *from = x + r * ldx;
                float *t = l->t + r * l->stride + f->start;
                switch (end - r) {
                case 1: project(from, ldx, 1, 8, f, k16, t, l->stride, &task, me, team->threads); break;
                case 2: project(from, ldx, 2, 4, f, k16, t, l->stride, &task, me, team->threads); break;
                case 3: project(from, ldx, 3, 4, f, k16, t, l->stride, &task, me, team->threads); break;
                default: project(from, ldx, 4, 4, f, k16, t, l->stride, &task, me, team->threads);
                }
            }
        }
    }
    team_wait(team);
}
