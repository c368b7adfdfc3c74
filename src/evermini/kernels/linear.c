/* Integer linear layers: y = x W^T with int8 activations and 4-, 5-, 6- or 8-bit weights, int32 accumulation.
 *
 * Every weight is an int8 times its output channel's scale. At 8 bits it is stored as such. Below, a run of 32 weights of
 * one channel (a group) is g * q with a small integer g and a `bits`-bit q, so the same exact integer sum comes out
 * whether a kernel multiplies group sums by g (few rows: memory-bound) or expands panels to int8 (many rows).
 * Integer sums do not depend on order: a row's result is the same bit for bit, whatever else is in the batch.
 *
 * Memory: channels in panels of 64 (4 vectors of 16), 4 consecutive inputs side by side for the dot instruction:
 *
 *   8 bits:   panel: [k/4][4 vectors][16 channels][4 inputs]            u8 = weight + 128
 *   < 8 bits: panel: [k/32] x { nibbles [4][4][64]: byte = step j | step j+4 << 4     u8 = q + 2^(bits-1)
 *                               bit 4   [8][4] x u64 (5 and 6 bits)
 *                               bit 5   [8][4] x u64 (6 bits)
 *                               g       [64] x u8 }
 */
#include "evermini.h"

#define GROUP 32
#define PANEL 64
#define TILE 6 /* rows x 4 vectors = 24 accumulators of 32 registers */
#define FEW_ROWS 8
#define PREFETCH 4096 /* a page ahead: the hardware's prefetcher stops at page ends */

INLINE int64_t group_bytes(int bits) { return 1024 + (bits - 4) * 256 + 64; }
INLINE int64_t panel_bytes(const Linear *w) {
    return w->bits == 8 ? w->k_padded * PANEL : w->k_padded / GROUP * group_bytes(w->bits);
}

INLINE i32x16 input4(const int8_t *x) {
    int32_t v;
    memcpy(&v, x, 4);
    return splati(v);
}

INLINE f32x16 scaled(const Linear *w, i32x16 acc, float scale, int64_t n) {
    f32x16 v = to_float(acc) * (loadf(w->scale + n) * scale);
    return w->bias ? v + loadf(w->bias + n) : v;
}

INLINE void write_vector(float *y, int64_t n, int64_t end, f32x16 v, Output output) {
    if (n + 16 <= end) {
        storef(y + n, output == ADD ? loadf(y + n) + v : v);
    } else {
        for (int64_t i = 0; n + i < end; i++) y[n + i] = output == ADD ? y[n + i] + v[i] : v[i];
    }
}

INLINE f32x16 silu(f32x16 g) {
    const f32x16 e = exp_nonpositive(-absf(g)); /* sigmoid from e^-|g|, which cannot overflow */
    return g * selectf(g >= 0, splatf(1), e) / (e + 1.0f);
}

/* The tanh form: x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x^3)). */
INLINE f32x16 gelu(f32x16 x) {
    const f32x16 z = (x + x * x * x * 0.044715f) * 1.5957691216f;
    const f32x16 e = exp_nonpositive(-absf(z));
    return x * selectf(z >= 0, splatf(1), e) / (e + 1.0f);
}

/* Turn one row's `vectors` sums of a panel (vector i is number z0 + i * step) into outputs of y's row, each with what
 * its adapter adds to it; delta is NULL (a constant) for rows without one. */
INLINE void finish(const Linear *w, const i32x16 *acc, const f32x16 *delta, int z0, int step, int vectors, float scale,
                   int64_t n0, float *y, Output output) {
    if (output == GATE) { /* the panel is 2 vectors of gates, then the 2 of their factors */
        UNROLL for (int i = 0; i < vectors / 2; i++) {
            const int64_t n = n0 + (z0 + i * step) * 16;
            f32x16 gate = scaled(w, acc[i], scale, n), up = scaled(w, acc[i + vectors / 2], scale, n + 32);
            if (delta) {
                gate += delta[i];
                up += delta[i + vectors / 2];
            }
            write_vector(y, n0 / 2 + (z0 + i * step) * 16, w->n / 2, silu(gate) * up, STORE);
        }
        return;
    }
    UNROLL for (int i = 0; i < vectors; i++) {
        const int64_t n = n0 + (z0 + i * step) * 16;
        f32x16 v = scaled(w, acc[i], scale, n);
        if (delta) v += delta[i];
        write_vector(y, n, w->n, output == GELU ? gelu(v) : v, output);
    }
}

/* What the adapter of `rows` (constant) rows from row0 on adds to the vector of w's channels n to n + 15. */
INLINE void lora_vector(const Linear *w, const LoraCall *call, int rows, int64_t row0, int64_t n, Output output,
                        f32x16 *delta, int64_t ld) {
    const Lora *l = call->lora;
    UNROLL for (int r = 0; r < rows; r++) delta[r * ld] = splatf(0);
    if (n >= w->n) return;
    int part = 0;
    int64_t local = n;
    if (output == GATE) { /* 32 gates, 32 factors, 32 gates, ... */
        part = (n >> 5) & 1;
        local = (n >> 6) * 32 + (n & 31);
    } else {
        while (part + 1 < call->count && local >= call->sizes[part]) local -= call->sizes[part++];
    }
    const LoraFactors *f = &l->layers[l->segments[row0 - l->first]][call->layer].part[call->part + part];
    const float *t = l->t + (row0 - l->first) * l->stride + f->start;
    const uint16_t *b = f->b + local * f->rank;
    for (int64_t j = 0; j < f->rank; j++, b += 16) {
        const f32x16 v = half_to_float(b);
        UNROLL for (int r = 0; r < rows; r++) delta[r * ld] += v * t[r * l->stride + j];
    }
}

/* `finish` for `rows` (constant, at most TILE) rows; call is NULL (a constant) if they have no adapters. */
INLINE void finish_rows(const Linear *w, const i32x16 (*acc)[4], const LoraCall *call, int rows, int z0, int step,
                        int vectors, const Activation *x, int64_t row0, int64_t n0, float *y, int64_t ldy,
                        Output output) {
    if (!call) {
        UNROLL for (int r = 0; r < rows; r++)
            finish(w, acc[r], NULL, z0, step, vectors, x->scale[row0 + r], n0, y + (row0 + r) * ldy, output);
        return;
    }
    f32x16 delta[TILE][4];
    const int32_t *segments = call->lora->segments + row0 - call->lora->first;
    for (int i = 0; i < vectors; i++) {
        const int64_t n = n0 + (z0 + i * step) * 16;
        if (segments[0] == segments[rows - 1]) {
            lora_vector(w, call, rows, row0, n, output, &delta[0][i], 4);
        } else {
            for (int r = 0; r < rows; r++) lora_vector(w, call, 1, row0 + r, n, output, &delta[r][i], 4);
        }
    }
    for (int r = 0; r < rows; r++)
        finish(w, acc[r], delta[r], z0, step, vectors, x->scale[row0 + r], n0, y + (row0 + r) * ldy, output);
}

/* The 4 packed steps j and j+4 of vector z of one group, as bytes q + 2^(bits-1). */
INLINE void unpack(int bits, const uint8_t *group, int j, int z, i32x16 *low, i32x16 *high) {
    i32x16 nibbles = loadi(group + (j * 4 + z) * 64);
    *low = nibbles & 0x0f0f0f0f;
    *high = (i32x16)((u32x16)nibbles >> 4) & 0x0f0f0f0f;
    for (int bit = 4; bit < bits; bit++) {
        const uint8_t *plane = group + 1024 + (bit - 4) * 256;
        uint64_t a, b;
        memcpy(&a, plane + (j * 4 + z) * 8, 8);
        memcpy(&b, plane + ((j + 4) * 4 + z) * 8, 8);
        *low = set_bit(*low, a, bit);
        *high = set_bit(*high, b, bit);
    }
}

INLINE i32x16 group_scales(int bits, const uint8_t *group, int z) {
    uint8_t g[16];
    memcpy(g, group + 1024 + (bits - 4) * 256 + z * 16, 16);
    i32x16 v;
    for (int i = 0; i < 16; i++) v[i] = g[i];
    return v;
}

/* Few rows straight from the packed panel: `rows` x `vectors` sums (every step-th vector from z0); constants all. */
INLINE void few_rows(const Linear *w, const uint8_t *panel, int bits, int rows, int z0, int step, int vectors,
                     const Activation *x, int64_t row0, int64_t n0, float *y, int64_t ldy, Output output,
                     const LoraCall *lora) {
    i32x16 total[4][4];
    const int64_t groups = w->k_padded / GROUP;
    const int8_t *xq[4];
    const int32_t *sums[4];
    for (int r = 0; r < rows; r++) {
        xq[r] = x->q + (row0 + r) * w->k_padded;
        sums[r] = x->group_sums + (row0 + r) * (groups + 1);
        for (int z = 0; z < vectors; z++)
            total[r][z] = bits == 8 ? splati(-128 * sums[r][groups]) : splati(0);
    }
    if (bits == 8) {
        for (int64_t k = 0; k < w->k_padded; k += 4) {
            i32x16 v[4];
            UNROLL for (int z = 0; z < vectors; z++) {
                const uint8_t *at = panel + k * PANEL + (z0 + z * step) * 64;
                v[z] = loadi(at);
                __builtin_prefetch(at + PREFETCH);
            }
            UNROLL for (int r = 0; r < rows; r++) {
                i32x16 b = input4(xq[r] + k);
                UNROLL for (int z = 0; z < vectors; z++) total[r][z] = dot4(total[r][z], v[z], b);
            }
        }
    } else {
        const uint8_t *group = panel;
        for (int64_t g = 0; g < groups; g++, group += group_bytes(bits)) {
            i32x16 acc[4][4];
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int z = 0; z < vectors; z++)
                    acc[r][z] = splati(-(1 << (bits - 1)) * sums[r][g]);
            UNROLL for (int j = 0; j < 4; j++) {
                UNROLL for (int z = 0; z < vectors; z++) {
                    i32x16 low, high;
                    unpack(bits, group, j, z0 + z * step, &low, &high);
                    UNROLL for (int r = 0; r < rows; r++) {
                        const int8_t *in = xq[r] + g * GROUP + j * 4;
                        acc[r][z] = dot4(acc[r][z], low, input4(in));
                        acc[r][z] = dot4(acc[r][z], high, input4(in + 16));
                    }
                }
            }
            UNROLL for (int z = 0; z < vectors; z++) {
                i32x16 scale = group_scales(bits, group, z0 + z * step);
                UNROLL for (int r = 0; r < rows; r++) total[r][z] += acc[r][z] * scale;
            }
        }
    }
    finish_rows(w, total, lora, rows, z0, step, vectors, x, row0, n0, y, ldy, output);
}

INLINE void few_rows_panel(const Linear *w, const uint8_t *panel, int bits, const Activation *x, int64_t row,
                           int64_t end, int64_t n0, float *y, int64_t ldy, Output output, const LoraCall *lora) {
    for (; row + 4 <= end; row += 4)
        for (int z = 0; z < 2; z++) few_rows(w, panel, bits, 4, z, 2, 2, x, row, n0, y, ldy, output, lora);
    if (row + 2 <= end) {
        for (int z = 0; z < 2; z++) few_rows(w, panel, bits, 2, z, 2, 2, x, row, n0, y, ldy, output, lora);
        row += 2;
    }
    if (row < end) few_rows(w, panel, bits, 1, 0, 1, 4, x, row, n0, y, ldy, output, lora);
}

/* Rows up to `plain` have no adapter. Each kind has code of its own, so the one does not slow the other. */
INLINE void few_rows_bits(const Linear *w, const uint8_t *panel, int bits, const Activation *x, int64_t plain,
                          int64_t m, int64_t n0, float *y, int64_t ldy, Output output, const LoraCall *lora) {
    few_rows_panel(w, panel, bits, x, 0, plain, n0, y, ldy, output, NULL);
    if (plain < m) few_rows_panel(w, panel, bits, x, plain, m, n0, y, ldy, output, lora);
}

/* Write a panel's weights as u8 = weight + 128 in the 8-bit layout. */
INLINE void expand(const Linear *w, const uint8_t *panel, int bits, uint8_t *out) {
    const int64_t groups = w->k_padded / GROUP;
    for (int64_t g = 0; g < groups; g++, panel += group_bytes(bits), out += GROUP * PANEL) {
        for (int z = 0; z < 4; z++) {
            i32x16 scale = group_scales(bits, panel, z);
            i16x32 scale16 = (i16x32)(scale * 0x10001);
            i32x16 shift = (128 - (scale << (bits - 1))) & 0xff;
            u8x64 offset = (u8x64)(shift * 0x01010101);
            for (int j = 0; j < 4; j++) {
                i32x16 part[2];
                unpack(bits, panel, j, z, &part[0], &part[1]);
                for (int h = 0; h < 2; h++) {
                    i16x32 even = (i16x32)(part[h] & 0x00ff00ff) * scale16;
                    i16x32 odd = (i16x32)((part[h] >> 8) & 0x00ff00ff) * scale16;
                    i32x16 bytes = ((i32x16)even & 0x00ff00ff) | (((i32x16)odd & 0x00ff00ff) << 8);
                    storei(out + ((j + 4 * h) * 4 + z) * 64, (i32x16)((u8x64)bytes + offset));
                }
            }
        }
    }
}

/* `rows` (constant) x 64 channels over all inputs of an 8-bit panel. */
INLINE void tile(const Linear *w, const uint8_t *panel, int rows, const Activation *x, int64_t row0,
                 int64_t n0, float *y, int64_t ldy, Output output, const LoraCall *lora) {
    i32x16 acc[TILE][4];
    const int64_t groups = w->k_padded / GROUP;
    const int8_t *xq = x->q + row0 * w->k_padded;
    UNROLL for (int r = 0; r < rows; r++) {
        int32_t sum = x->group_sums[(row0 + r) * (groups + 1) + groups];
        UNROLL for (int z = 0; z < 4; z++) acc[r][z] = splati(-128 * sum);
    }
    for (int64_t k = 0; k < w->k_padded; k += 4) {
        i32x16 v[4];
        UNROLL for (int z = 0; z < 4; z++) {
            v[z] = loadi(panel + k * PANEL + z * 64);
            __builtin_prefetch(panel + k * PANEL + z * 64 + PREFETCH);
        }
        UNROLL for (int r = 0; r < rows; r++) {
            i32x16 b = input4(xq + r * w->k_padded + k);
            UNROLL for (int z = 0; z < 4; z++) acc[r][z] = dot4(acc[r][z], v[z], b);
        }
    }
    finish_rows(w, acc, lora, rows, 0, 1, 4, x, row0, n0, y, ldy, output);
}

INLINE void tile_rows(const Linear *w, const uint8_t *panel, const Activation *x, int64_t row, int64_t end,
                      int64_t n0, float *y, int64_t ldy, Output output, const LoraCall *lora) {
    for (int64_t n; row < end; row += n) {
        const int64_t tiles = (end - row + TILE - 1) / TILE;
        n = (end - row + tiles - 1) / tiles; /* evenly: 8 rows are 4 + 4 */
        switch (n) {
        case 6: tile(w, panel, 6, x, row, n0, y, ldy, output, lora); break;
        case 5: tile(w, panel, 5, x, row, n0, y, ldy, output, lora); break;
        case 4: tile(w, panel, 4, x, row, n0, y, ldy, output, lora); break;
        case 3: tile(w, panel, 3, x, row, n0, y, ldy, output, lora); break;
        case 2: tile(w, panel, 2, x, row, n0, y, ldy, output, lora); break;
        default: tile(w, panel, 1, x, row, n0, y, ldy, output, lora);
        }
    }
}

static void plain_rows(const Linear *w, const uint8_t *panel, const Activation *x, int64_t row, int64_t end,
                       int64_t n0, float *y, int64_t ldy, Output output) {
    tile_rows(w, panel, x, row, end, n0, y, ldy, output, NULL);
}

static void lora_rows(const Linear *w, const uint8_t *panel, const Activation *x, int64_t row, int64_t end,
                      int64_t n0, float *y, int64_t ldy, Output output, const LoraCall *lora) {
    tile_rows(w, panel, x, row, end, n0, y, ldy, output, lora);
}

void linear_team(Team *team, const Linear *w, const Activation *x, int64_t m, float *y, int64_t ldy, Output output,
                 const LoraCall *lora) {
    const int64_t plain = lora ? lora->lora->first : m;
    const int64_t panels = (w->n + PANEL - 1) / PANEL, stride = panel_bytes(w);
    if (m < (w->bits == 8 ? 3 : FEW_ROWS)) {
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < panels; p++) {
            const uint8_t *panel = w->data + p * stride;
            switch (w->bits) {
            case 4: few_rows_bits(w, panel, 4, x, plain, m, p * PANEL, y, ldy, output, lora); break;
            case 5: few_rows_bits(w, panel, 5, x, plain, m, p * PANEL, y, ldy, output, lora); break;
            case 6: few_rows_bits(w, panel, 6, x, plain, m, p * PANEL, y, ldy, output, lora); break;
            default: few_rows_bits(w, panel, 8, x, plain, m, p * PANEL, y, ldy, output, lora);
            }
        }
        team_wait(team);
        return;
    }
    const int64_t chunk = 258, chunks = (m + chunk - 1) / chunk; /* 43 tiles: rows and panel stay in L2 */
    uint8_t *scratch = w->bits == 8 ? NULL : thread_scratch(SCRATCH_PANEL, w->k_padded * PANEL);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t t = 0; t < panels * chunks; t++) {
        const int64_t p = t % panels, row = t / panels * chunk, end = row + chunk < m ? row + chunk : m;
        const uint8_t *panel = w->data + p * stride;
        switch (w->bits) {
        case 4: expand(w, panel, 4, scratch); panel = scratch; break;
        case 5: expand(w, panel, 5, scratch); panel = scratch; break;
        case 6: expand(w, panel, 6, scratch); panel = scratch; break;
        }
        if (row < plain) plain_rows(w, panel, x, row, end < plain ? end : plain, p * PANEL, y, ldy, output);
        if (plain < end) lora_rows(w, panel, x, row > plain ? row : plain, end, p * PANEL, y, ldy, output, lora);
    }
    team_wait(team);
}
