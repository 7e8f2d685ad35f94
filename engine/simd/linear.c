/* What the products with frozen weights share, whatever their precision: sizes of panels, the rounding of
 * activations that the original does, the adapter's end. */

enum {
    TILE_LANES = TILE_VECS * VL,
    CHUNK_TOKENS = 512, /* tokens worked on at a time: whole panels */
    LONG_DEPTH = 512,   /* part of a reduction of bf16 that is longer than one part */
    BACK_COLUMNS =
        256, /* columns of W decoded at a time on the way back: whole blocks of every type */
};

_Static_assert(
    (int)TILE_LANES <= (int)PANEL_TOKENS, "linear_packed_bytes() counts panels of PANEL_TOKENS");
_Static_assert(TILE_ROWS == 6, "tile.c names six heights");
/* pack_tokens: a rounded row, a vector of rows with their block sums, and codes with scale and sum. */
_Static_assert(
    (int64_t)(VL + 1) * 4 * (MAX_ROW + MAX_ROW / QUANT_BLOCK) + MAX_ROW / 4 * 5 <= WORKER_SCRATCH,
    "the longest row does not fit a worker's scratch");

/* Distance of the rows of the panel that begins with token `first`. */
V_INLINE int64_t panel_lanes(int64_t n_tokens, int64_t first)
{
    int64_t left = n_tokens - first;
    return left < TILE_LANES ? (left + VL - 1) / VL * VL : TILE_LANES;
}

/* Length of the reduction: with partner rounding, offsets of W meet block sums of x in columns of their own. */
V_INLINE int64_t reduction(const struct linear_args *a)
{
    return a->partner && has_offset((int)a->type) ? a->n_in + a->n_in / QUANT_BLOCK : a->n_in;
}

V_INLINE int rounds(const struct linear_args *a)
{
    return a->partner && has_quant_dot((int)a->type);
}

/* One activation row as the tile takes it: code times scale, then the block sums if they are asked for. */
static void FN(round_row)(const struct linear_args *a, const float *x, float *y, char *scratch)
{
    int64_t blocks = a->n_in / QUANT_BLOCK;
    struct q8_row row = {(int8_t *)scratch + 8 * blocks, (float *)(void *)scratch,
        (float *)(void *)scratch + blocks, QUANT_BLOCK};
    FN(quantize_q8)(x, a->n_in, 1, row);
    for (int64_t i = 0; i < a->n_in; i += VL)
        v_store(y + i, v_mul(v_from_i8(row.q + i), v_set1(row.scale[i / QUANT_BLOCK])));
    if (reduction(a) > a->n_in)
        memcpy(y + a->n_in, row.sum, (size_t)blocks * sizeof *y);
}

/* y[t][first + o] += scale sum_r u[t][r] b[r][first + o] for o < n, tokens t0 ... t1. */
static void FN(add_lora)(
    const struct linear_args *a, int64_t t0, int64_t t1, int64_t first, int64_t n)
{
    for (int64_t t = t0; t < t1; t++) {
        float *y = a->y + t * a->n_out + first;
        for (int64_t o = 0; o < n; o += VL) {
            int64_t lanes = n - o < VL ? n - o : VL;
            vf sum = v_load_n(y + o, lanes);
            for (int64_t r = 0; r < a->rank; r++) {
                vf b = v_load_n(a->b + r * a->n_out + first + o, lanes);
                sum = v_fma(v_set1(a->scale * a->u[t * a->rank + r]), b, sum);
            }
            v_store_n(y + o, sum, lanes);
        }
    }
}
