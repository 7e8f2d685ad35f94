"""Cross-entropy: losses and, at once, their gradient."""

from engine.graph cimport Graph, Node
from engine.kernels cimport cross_entropy_args, kernels, op_fn
from engine.ops.checks cimport BF16, F32, ints, result
from engine.tensor cimport Tensor


cdef class CrossEntropy(Node):
    """Loss of each row and, in place of the logits, their gradient."""

    cdef cross_entropy_args a

    def __init__(self, Tensor logits, targets, weight, int type):
        self.inputs = (logits,)
        stride = 2 * logits.cols if type == BF16 else logits.cols
        dlogits = Tensor("dlogits", logits.rows, logits.cols, type, stride)
        self.outputs = (result("loss", logits.rows, 1), dlogits)
        self.aliases = {1: 0}
        self.must_alias = True

    cdef op_fn lower(self, const kernels *table) except NULL:
        cdef Tensor logits = self.inputs[0], loss = self.outputs[0]
        cdef const float[::1] weight = self.recipe[2]
        self.a = cross_entropy_args(
            logits.rows, logits.cols, logits.floats(), ints(self.recipe[1], logits.rows),
            &weight[0], loss.floats(), self.recipe[3])
        self.args = &self.a
        return table.cross_entropy


def cross_entropy(Graph graph, Tensor logits, targets, weight, int type=F32):
    """Loss of each row and the gradient of weight times their sum with respect to the logits.

    The gradient takes the logits' place, so it comes with the value and no softmax is kept.

    Parameters
    ----------
    targets : int32 array of n_tokens, read at each run; -1 leaves a row out
    weight : float32 array of one element, read at each run
    type : int
        Of the gradient: F32, or BF16 with room between its rows.

    Returns
    -------
    loss : Tensor of shape (n_tokens, 1)
    dlogits : Tensor of the logits' shape
    """
    return graph.add(CrossEntropy, logits, targets, weight, type)
