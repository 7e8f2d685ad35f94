/* The whole contract of the kernels: argument structures, formulas, shapes, and the table of a variant.
 *
 * A step of a graph is an op_fn and its arguments. Every worker of the team calls it with the same
 * arguments and takes its part by its index; parts are cut so that a result's value never depends on the
 * number of workers. Matrices are row-major: n_tokens rows of n_cols floats, one behind the other, unless a
 * stride is given. Where two buffers may be one it is said; otherwise they do not overlap. */
#ifndef CYLORA_KERNELS_H
#define CYLORA_KERNELS_H

#include "blocks.h"
#include "team.h"

#include <stddef.h>
#include <stdint.h>

/* y[t] = W[ids[t]]                                         W: stored rows of n_cols */
struct embed_args {
    int64_t n_tokens, n_cols;
    const void *w;
    int64_t type;
    const int32_t *ids;
    float *y;
};

/* y[t][o] = sum_i x[t][i] W[o][i] + scale sum_r u[t][r] b[r][o] + base[t][o]
 * The second term if rank > 0, the third unless base is NULL. W: n_out stored rows of n_in; u: n_tokens x rank;
 * b: rank x n_out. Where n_tokens <= GEMV_TOKENS, u may be NULL: it is x A' then, with a: rank x n_in, and a and b of
 * factor_type, F32 or F16. Where n_tokens > GEMV_TOKENS, x and y may be BF16, as x_type and y_type say; they are F32 else.
 * partner: where W is quantized, round x to blocks of 32 signed bytes with half-precision scales (and block
 * sums) first, as the original does.
 * pairs: where there is a pair product, round x (and W, unless stored so) to bf16 and use it; sums stay float.
 * packed: where n_tokens > GEMV_TOKENS, x as `pack` leaves it for this type, partner and pairs. */
struct linear_args {
    int64_t n_tokens, n_in, n_out;
    const void *x;
    const void *w;
    int64_t type;
    void *y;
    int64_t rank;
    const float *u, *b;
    float scale;
    int64_t partner, pairs;
    void *packed;
    const float *base, *a;
    int64_t factor_type, x_type, y_type;
};

/* down.y = down.base + (silu(x G') (x U')) D'              G, U, D: weights of gate, up and down, with adapters only where
 * n_tokens <= GEMV_TOKENS. Where n_tokens > GEMV_TOKENS, gate.packed holds x and down.packed has room for the product of gate and up.
 * gate.y, up.y: n_tokens x gate.n_out; up.y may be gate.y. */
struct feed_forward_args {
    struct linear_args gate, up, down;
    int64_t
        panels; /* gate.y and up.y are not there: all products are of one precision, nothing is rounded to bytes */
};

/* The A or B of an adapter, rank x n_cols, or its gradient, and u: n_tokens x rank. Up to LORA_PARTS adapters that meet
 * the same rows go together, as those of queries, keys and values do, or of gate and up. */
enum { LORA_PARTS = 3 };
struct lora_part {
    int64_t rank;
    float *u, *m;
};

/* y[t][i] = base[t][i] + scale sum_r u[t][r] m[r][i], over all parts     base: NULL for zero; may be y */
struct lora_up_args {
    int64_t n_tokens, n_cols;
    const float *base;
    float scale;
    float *y;
    int64_t n_parts;
    struct lora_part parts[LORA_PARTS];
};

/* dx[t][i] (+)= sum_o dy[t][o] W[o][i]                     packed, with pairs: back_packed_bytes(), unless dy is BF16,
 * which it may be where n_out is even. */
struct linear_back_args {
    int64_t n_tokens, n_in, n_out;
    const void *dy;
    const void *w;
    int64_t type;
    float *dx;
    int64_t accumulate, pairs;
    void *packed;
    int64_t dy_type, dy_stride; /* elements from row to row; of F32 n_out */
    struct lora_up_args
        up; /* what adapters add to dx at last, its base and y; none if it has no parts */
};

enum { GEMV_TOKENS = 8 }; /* up to here a row of weights meets each token by a dot product */

enum {
    MAX_ROW =
        57344, /* the longest reduction for which WORKER_SCRATCH holds a vector of packed rows */
    PANEL_TOKENS = 64, /* the most lanes of a panel */
};

/* packed = x with tokens along the lanes, as products with weights of a type take it (gemm.c, quant.c). x is F32, or
 * BF16 where it goes in pairs and n_in is even. */
struct pack_args {
    int64_t n_tokens, n_in;
    const void *x;
    int64_t type, partner, pairs;
    void *packed;
    int64_t x_type;
};

/* Bytes of what is packed: panels, each with its columns and block sums; with pairs, two columns in four bytes. */
static inline int64_t linear_packed_bytes(int64_t n_tokens, int64_t n_in, int64_t pairs)
{
    int64_t lanes = (n_tokens + PANEL_TOKENS - 1) / PANEL_TOKENS * PANEL_TOKENS;
    return lanes * (pairs ? n_in / 2 : n_in + n_in / QUANT_BLOCK + 1) * 4;
}

/* Bytes of linear_back_args.packed: dy in bf16, rows of whole pairs. */
static inline int64_t back_packed_bytes(int64_t n_tokens, int64_t n_out)
{
    return n_tokens * (n_out + 1) * 2;
}

/* y[t][i] = w[i] x[t][i] r[t], r[t] = 1 / sqrt(mean_i x[t][i]^2 + eps)        RMSNorm, arXiv:1910.07467
 * inv: r, n_tokens floats. y may be x. y_type: F32 or BF16, another place than x then. */
struct rms_norm_args {
    int64_t n_tokens, n_cols;
    const float *x, *w;
    float eps;
    void *y;
    float *inv;
    int64_t y_type;
};

/* dx (+)= r (w dy - x r^2 mean(w dy x));  dw[i] (+)= sum_t dy[t][i] x[t][i] r[t] unless dw is NULL
 * dx may be dy. */
struct rms_norm_back_args {
    int64_t n_tokens, n_cols;
    const float *x, *w, *inv, *dy;
    float *dx, *dw;
    int64_t accumulate_x, accumulate_w;
};

/* Rotates pairs (2i, 2i + 1) of each head's first n_rot elements by angle position x frequency.
 * cos, sin: one row of n_rot a position; cos holds c0 c0 c1 c1 ..., sin -s0 s0 -s1 s1 ...
 * sign: 1 forward, -1 for the gradient. y may be x. round_f16: results rounded to half and back. y_type: as in a norm. */
struct rope_args {
    int64_t n_tokens, n_head, head_dim, n_rot;
    const float *x;
    const int32_t *positions;
    const float *cos, *sin;
    float sign;
    int64_t round_f16;
    void *y;
    int64_t y_type;
};

/* y = g / (1 + e^-g) u                                   n numbers; y may be g or u
 * Both F32 and y F32 or BF16, or all BF16. */
struct silu_mul_args {
    int64_t n;
    const void *g, *u;
    int64_t type;
    void *y;
    int64_t y_type;
};

/* dg = dy u s (1 + g (1 - s)), du = dy g s, s = 1 / (1 + e^-g); dg may be g, du u, and either dy if they are F32
 * type: of g, u, dg and du, F32 or BF16 */
struct silu_mul_back_args {
    int64_t n;
    const void *g, *u;
    int64_t type;
    const float *dy;
    void *dg, *du;
};

/* y = a + b                                              n floats; y may be a or b */
struct add_args {
    int64_t n;
    const float *a, *b;
    float *y;
};

/* y = 0 */
struct zero_args {
    int64_t n;
    float *y;
};

/* Appends n_tokens keys or values of n_cols floats to a cache: row *n_past + t, of a type that has_encoder. */
struct cache_store_args {
    int64_t n_tokens, n_cols;
    const float *x;
    void *cache;
    int64_t type;
    const int32_t *n_past;
};

/* Causal attention of n_seq sequences, n_query queries each; query t of a sequence stands at position
 * *n_past + t (n_past NULL: 0) and sees keys first_key[t] (NULL: 0) ... *n_past + t. Query head h uses key head h / (n_head /
 * n_head_kv).
 *     out[t][h] = sum_j softmax_j(scale q[t][h] . k[j]) v[j],    lse[t][h] = log sum_j e^(scale q . k)
 * q, out: n_seq n_query rows of n_head head_dim; k, v: rows of n_head_kv head_dim of k_type and v_type, those of
 * sequence s from row s kv_seq_rows on; first_key: n_seq n_query, counted from the sequence's first key; lse: may
 * be NULL; parts: attention_part_bytes() shared by the workers. pairs: where there is a pair product and there are
 * more than FEW_QUERIES, round queries, keys, probabilities and values to bf16; sums and softmax stay float.
 * q_type, out_type: F32 or BF16. */
struct attention_args {
    int64_t n_seq, n_query, n_head, n_head_kv, head_dim;
    const void *q, *k, *v;
    int64_t q_type, k_type, v_type, kv_seq_rows;
    const int32_t *n_past, *first_key;
    float scale;
    void *out;
    int64_t out_type;
    float *lse, *parts;
    int64_t pairs;
};

enum {
    FEW_QUERIES = 16, /* up to here queries go one by one */
    SPLIT_KEYS = 256, /* and the context in such parts */
};

/* Bytes of attention_args.parts: for each query and part of the context a head's output, maximum and sum. */
static inline int64_t attention_part_bytes(
    int64_t n_seq, int64_t n_query, int64_t n_head, int64_t head_dim, int64_t n_key)
{
    int64_t parts = (n_key + SPLIT_KEYS - 1) / SPLIT_KEYS;
    return n_query > FEW_QUERIES ? 0 : n_seq * n_query * n_head * parts * (head_dim + 18) * 4;
}

/* The gradient of the above for n_past = 0 and as many keys as queries: dq, dk, dv from dout, out and lse.
 * Types: F32 or BF16, each. delta: n_seq n_query x n_head floats of working space. */
struct attention_back_args {
    int64_t n_seq, n_query, n_head, n_head_kv, head_dim;
    const void *q, *k, *v, *out;
    int64_t q_type, k_type, v_type, out_type;
    const float *lse, *dout;
    const int32_t *first_key;
    float scale;
    float *delta, *dq, *dk, *dv;
    int64_t pairs;
};

enum { ATTENTION_MAX_DIM = 512, ATTENTION_MAX_GROUP = 256 }; /* what the workers' scratch holds */

/* u[t][r] (+)= scale sum_i x[t][i] m[r][i], for each part    x: F32 or BF16, x_stride elements from row to row */
struct lora_down_args {
    int64_t n_tokens, n_cols;
    const void *x;
    int64_t x_type, x_stride;
    float scale;
    int64_t accumulate, n_parts;
    struct lora_part parts[LORA_PARTS];
};

/* m[r][i] += scale sum_t u[t][r] x[t][i], for each part      x as above; m: gradients */
struct lora_outer_args {
    int64_t n_tokens, n_cols;
    const void *x;
    int64_t x_type, x_stride;
    float scale;
    int64_t n_parts;
    struct lora_part parts[LORA_PARTS];
};

/* u[t][r] = m[r][ids[t]]                                 m: rank x n_cols */
struct lora_gather_args {
    int64_t n_tokens, n_cols, rank;
    const int32_t *ids;
    const float *m;
    float *u;
};

/* g[r][ids[t]] += scale du[t][r], t rising */
struct lora_scatter_args {
    int64_t n_tokens, n_cols, rank;
    const int32_t *ids;
    const float *du;
    float scale;
    float *g;
};

/* With p = softmax(logits[t]) and target c: loss[t] = -log((1 - eps) p_c + eps), eps = 1e-9, and in place
 *     logits[t][j] = weight ((1 - eps) p_j + eps - [j = c])
 * as `type` says in F32, or in BF16 from the beginning of each row of floats on.
 * A target of -1 leaves the row out: loss 0, gradient 0. */
struct cross_entropy_args {
    int64_t n_tokens, n_vocab;
    float *logits;
    const int32_t *targets;
    const float *weight;
    float *loss;
    int64_t type;
};

/* sums[i] = squares of part i of x, SQUARE_PART floats each, the last one shorter. */
struct square_sums_args {
    int64_t n;
    const float *x;
    double *sums;
};

enum { SQUARE_PART = 1 << 14 };

/* What changes from one update to the next. */
struct adamw_now {
    float clip, step, correction, decay;
};

/* One step of AdamW (arXiv:1711.05101) over n parameters; g is set to zero.
 *     g' = clip g;  m = beta1 m + (1 - beta1) g';  v = beta2 v + (1 - beta2) g'^2
 *     x = x (1 - decay) - step m / (sqrt(v correction) + 1e-8)
 * Parameters lie in n_runs stretches, of which those decay that run_decays says; they end at run_ends, rising
 * to n. */
struct adamw_args {
    int64_t n;
    float *x, *g, *m, *v;
    float beta1, beta2;
    const struct adamw_now *now;
    int64_t n_runs;
    const int64_t *run_ends;
    const int32_t *run_decays;
};

/* Peaks: n steps of arithmetic, or n floats to read. sink: a float a worker, so that nothing is left out. */
struct probe_args {
    int64_t n;
    const float *data;
    float *sink;
};

enum {
    /* a step of probe_fma, times the floats of a vector; of probe_pairs twice that */
    PROBE_FMA_FLOPS = 2 * 24,
    PROBE_TILES_FLOPS = 4 * 2 * 16 * 16 * 32, /* a step of probe_tiles */
};

typedef void (*decode_row_fn)(int type, const void *p, int64_t n, float *y);
typedef void (*encode_row_fn)(int type, const float *x, int64_t n, void *y);
typedef void (*quantize_row_fn)(
    int type, const float *x, const float *importance, int64_t n, void *y);
typedef void (*encode_fn)(const float *x, int64_t n, uint16_t *y);
typedef int64_t (*find_invalid_fn)(int type, const void *p, int64_t n);
typedef double (*sum_squares_fn)(const float *x, int64_t n);

struct kernels {
    const char *isa;
    int64_t lanes; /* floats of a vector */
    int64_t pairs; /* there is a pair product of bf16: 2, on matrix tiles; 1, on vectors; 0, none */
    decode_row_fn decode_row;
    encode_row_fn encode_row;
    quantize_row_fn quantize_row;
    encode_fn encode_bf16, encode_f16;
    find_invalid_fn find_invalid;
    sum_squares_fn sum_squares;
    op_fn embed, pack, linear, feed_forward, linear_back, rms_norm, rms_norm_back, rope, silu_mul,
        silu_mul_back;
    op_fn add, zero, cache_store, attention, attention_back, lora_down, lora_up, lora_outer;
    op_fn lora_gather, lora_scatter, cross_entropy, probe_fma, probe_pairs, probe_tiles, probe_read;
    op_fn square_sums, adamw;
};

/* dispatch.c: the variants of this build, best first. */
enum { N_VARIANTS = 4 };
struct variant {
    const struct kernels *table;
    const char *missing; /* NULL if the machine has all it needs, else the first feature it lacks */
};
void list_variants(struct variant out[N_VARIANTS]);

#endif
