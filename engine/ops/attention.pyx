"""Causal attention and its gradient."""

from engine.graph cimport Graph, Node
from engine.kernels cimport (
    ATTENTION_MAX_DIM, ATTENTION_MAX_GROUP, attention_args, attention_back_args,
    attention_part_bytes, block_elements, kernels, op_fn,
)
from engine.ops.checks cimport F32, ints, require, require_numbers, result
from engine.tensor cimport Tensor
from libc.stdint cimport int64_t


cdef double pairs_seen(int64_t n_seq, int64_t n_query, n_past):
    """Pairs of query and visible key."""
    before = 0 if n_past is None else int(n_past[0])
    return n_seq * (n_query * before + n_query * (n_query + 1) / 2.0)


cdef class Attention(Node):
    """Causal attention; rows are n_seq sequences of equal length."""

    cdef attention_args a

    def __init__(
        self, Tensor q, Tensor k, Tensor v, int64_t n_seq, int64_t n_head, int64_t n_head_kv,
        float scale, n_past, first_key, bint pairs, int type
    ):
        require(n_seq > 0 and n_head > 0 and n_head_kv > 0, "there must be sequences and heads")
        head_dim = q.cols // n_head
        fits = head_dim * n_head == q.cols and head_dim * n_head_kv == k.cols == v.cols
        require(fits, "heads do not fit the columns")
        require(n_head % n_head_kv == 0 and q.rows % n_seq == 0, "heads or sequences do not divide")
        group = n_head // n_head_kv
        require(group <= ATTENTION_MAX_GROUP, f"{group} query heads share a key head")
        require(head_dim <= ATTENTION_MAX_DIM, f"head size {head_dim} is above {ATTENTION_MAX_DIM}")
        require(n_past is not None or k.rows == q.rows, "keys and queries differ in number")
        require_numbers(q)
        for cache in (k, v):
            block = block_elements((<Tensor>cache).type)
            dense = (<Tensor>cache).stride == (<Tensor>cache).cols
            require(dense, f"{cache.name}: there must be no room between its rows")
            fits = block > 0 and head_dim % block == 0
            require(fits, f"{cache.name}: heads of {head_dim} are no whole blocks of its type")
        self.inputs = (q, k, v)
        out = result("attention", q.rows, q.cols, type)
        self.outputs = (out, result("attention.lse", q.rows, n_head))

    cdef int64_t shared_bytes(self) except -1:
        cdef Tensor q = self.inputs[0], k = self.inputs[1]
        n_seq, n_head = self.recipe[3], self.recipe[4]
        return attention_part_bytes(
            n_seq, q.rows // <int64_t>n_seq, n_head, q.cols // <int64_t>n_head,
            k.rows // <int64_t>n_seq)

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor q = self.inputs[0], k = self.inputs[1], v = self.inputs[2]
        cdef Tensor out = self.outputs[0], lse = self.outputs[1]
        n_seq, n_head, n_head_kv, scale, n_past, first_key, pairs, _ = self.recipe[3:]
        self.a = attention_args(
            n_seq, q.rows // <int64_t>n_seq, n_head, n_head_kv, q.cols // <int64_t>n_head,
            q.data, k.data, v.data, q.type, k.type, v.type, k.rows // <int64_t>n_seq, NULL, NULL,
            scale, out.data, out.type, lse.floats(), <float *>self.shared, pairs)
        if n_past is not None:
            self.a.n_past = ints(n_past, 1)
        if first_key is not None:
            self.a.first_key = ints(first_key, q.rows)
        self.args = &self.a
        return table.attention

    @property
    def varies(self) -> bool:
        return self.recipe[7] is not None

    def work(self) -> tuple[float, float]:
        cdef Tensor q = self.inputs[0], k = self.inputs[1]
        n_seq, n_past = self.recipe[3], self.recipe[7]
        seen = pairs_seen(n_seq, q.rows // n_seq, n_past)
        n_key = q.rows // n_seq + (0 if n_past is None else int(n_past[0]))
        cached = 2.0 * k.n_bytes() // k.rows * n_seq * n_key
        return 4.0 * q.cols * seen, cached + 2.0 * q.n_bytes()

    def gradient(self, grads):
        q, k, v, n_seq, n_head, n_head_kv, scale, n_past, first_key, pairs, _ = self.recipe
        require(n_past is None, "attention over a cache has no gradient")
        dout = grads[self.outputs[0]]
        dq, dk, dv = grads.graph.add(
            AttentionBack, q, k, v, *self.outputs, dout, n_seq, n_head, n_head_kv, scale,
            first_key, pairs)[:3]
        grads.add(q, dq)
        grads.add(k, dk)
        grads.add(v, dv)


cdef class AttentionBack(Node):
    cdef attention_back_args a

    def __init__(self, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dout, *sizes):
        for tensor in (q, k, v, out):
            require_numbers(tensor)
        self.inputs = (q, k, v, out, lse, dout)
        shapes = [("dq", q), ("dk", k), ("dv", v), ("delta", lse)]
        self.outputs = tuple([result("attention." + name, t.rows, t.cols) for name, t in shapes])

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor q, k, v, out, lse, dout, dq, dk, dv, delta
        q, k, v, out, lse, dout = self.inputs
        dq, dk, dv, delta = self.outputs
        n_seq, n_head, n_head_kv, scale, first_key, pairs = self.recipe[6:]
        self.a = attention_back_args(
            n_seq, q.rows // <int64_t>n_seq, n_head, n_head_kv, q.cols // <int64_t>n_head,
            q.data, k.data, v.data, out.data, q.type, k.type, v.type, out.type, lse.floats(),
            dout.floats(), NULL, scale, delta.floats(), dq.floats(), dk.floats(), dv.floats(),
            pairs)
        if first_key is not None:
            self.a.first_key = ints(first_key, q.rows)
        self.args = &self.a
        return table.attention_back

    def work(self) -> tuple[float, float]:
        cdef Tensor q = self.inputs[0]
        n_seq = self.recipe[6]
        return 10.0 * q.cols * pairs_seen(n_seq, q.rows // n_seq, None), super().work()[1]


def attention(
    Graph graph, Tensor q, Tensor k, Tensor v, int64_t n_seq, int64_t n_head, int64_t n_head_kv,
    float scale, n_past=None, first_key=None, bint pairs=False, int type=F32
) -> Tensor:
    """Causal attention with grouped heads.

    Parameters
    ----------
    q : Tensor of shape (n_seq * n_query, n_head * head_dim)
        F32 or BF16.
    k, v : Tensor of shape (n_seq * n_key, n_head_kv * head_dim)
        Of any stored type whose blocks divide a head, each its own.
    n_past : int32 array of one element, optional
        Position of the first query, read at each run. With it k and v are caches; without it there
        are as many keys as queries, all F32 or BF16, and the op has a gradient.
    first_key : int32 array, one a row of q, optional
        The first key that each query sees, counted within its sequence; read at each run.
    pairs : bool
        Multiply in bf16 where the variant has a pair product (see `multiplies_pairs`).
    type : int
        Of the result: F32 or BF16.
    """
    return graph.add(
        Attention, q, k, v, n_seq, n_head, n_head_kv, scale, n_past, first_key, pairs, type)[0]
