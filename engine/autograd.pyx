"""The reverse pass: gradients as further nodes of the same graph.

`backward` walks nodes from last to first and asks each for the gradients of its inputs. A node of a
*segment* (a layer) may have been forgotten by then: with checkpoints its outputs are not kept from
the forward pass but computed again from the segment's inputs just before they are needed, by the
same nodes made anew.
"""

from engine.errors import ShapeError

from engine.graph cimport Graph, Node
from engine.ops import add
from engine.tensor cimport Tensor


cdef class Gradients:
    """Gradients of tensors while the reverse pass goes on.

    Attributes
    ----------
    graph : Graph
        Where a node's `gradient` adds its nodes.
    """

    cdef readonly Graph graph
    cdef dict known
    cdef Tensor lent  # what `into` gave last and `add` has not seen come back

    def __init__(self, Graph graph, dict seeds):
        self.graph = graph
        self.known = dict(seeds)
        self.lent = None

    def __getitem__(self, Tensor tensor) -> Tensor:
        return self.known[tensor]

    def __contains__(self, Tensor tensor) -> bool:
        return tensor in self.known

    def into(self, Tensor tensor):
        """The tensor into which an accumulating kernel may add this one's gradient, or None.

        There is none before the first gradient; nor if another tensor shares it (both terms of a
        sum have the same), which may still be read; nor if it lies in somebody else's memory, as a
        seed does.
        """
        if tensor.grad is not None:
            return tensor.grad
        cdef Tensor found = self.known.get(tensor)
        if found is not None and found.data != NULL:
            found = None
        for other, grad in self.known.items():
            if grad is found and other is not tensor:
                found = None
                break
        self.lent = found
        return found

    def add(self, Tensor tensor, Tensor grad):
        """Add to the gradient: by a node of its own, unless `grad` is what `into` has just given.

        Being the same tensor is not enough: in x + (x + y) both sums hand x the same gradient.
        """
        if tensor.grad is not None:
            if grad is not tensor.grad:
                raise ShapeError(f"{tensor.name}: a parameter's gradient is for its kernel to sum")
            return
        found = self.known.get(tensor)
        if found is None:
            self.known[tensor] = grad
        elif found is not grad or found is not self.lent:
            self.known[tensor] = add(self.graph, found, grad)
        self.lent = None

    cdef int drop(self, tuple tensors) except -1:
        for tensor in tensors:
            self.known.pop(tensor, None)
        return 0


cdef list again(Graph graph, list nodes, dict fresh):
    """Make the nodes anew; `fresh` maps tensors of the first pass to the new ones."""
    cdef Node node
    cdef list made = []
    for node in nodes:
        for a in node.recipe:
            if isinstance(a, (list, tuple)) and any([isinstance(item, Tensor) for item in a]):
                raise ShapeError(f"{type(node).__name__}: tensors must be arguments of their own")
        args = [fresh.get(a, a) if isinstance(a, Tensor) else a for a in node.recipe]
        outputs = graph.add(type(node), *args)
        fresh.update(zip(node.outputs, outputs))
        made.append(graph.nodes[len(graph.nodes) - 1])
    return made


def backward(Graph graph, list nodes, dict seeds, bint checkpoints=False, kept=frozenset()) -> dict:
    """Append the reverse pass of `nodes`.

    Parameters
    ----------
    graph : Graph
    nodes : list of Node
        The forward nodes, in order.
    seeds : dict of Tensor to Tensor
        Gradients of the last outputs.
    checkpoints : bool
        Compute each segment again before its reverse pass, so that between the passes only what
        enters a segment is kept. The last is no exception: keeping it would save 1 / n_layer of a
        forward pass, but its activations would stand beside the logits, where memory peaks.
    kept : collection
        Segments that are an exception all the same. The results are the same bits.

    Returns
    -------
    dict of Tensor to Tensor
        Gradients of tensors that enter `nodes` from outside and are not parameters. A parameter's
        gradient is added to its `grad`.
    """
    cdef Gradients grads = Gradients(graph, seeds)
    cdef Node node
    groups = []
    group = None
    for node in nodes:
        if group is None or (<Node>group[0]).segment != node.segment:
            group = []
            groups.append(group)
        group.append(node)
    for group in reversed(groups):
        segment = group[0].segment
        if checkpoints and segment is not None and segment not in kept:
            fresh = {}
            made = again(graph, group, fresh)
            for old, new in fresh.items():
                if old in grads:
                    grads.add(new, grads[old])
                    grads.drop((old,))
            group = made
        for node in reversed(group):
            reached = any([t in grads for t in node.outputs])
            if reached and any([(<Tensor>t).needs_grad for t in node.inputs]):
                node.gradient(grads)
            grads.drop(node.outputs)
    return dict(grads.known)
