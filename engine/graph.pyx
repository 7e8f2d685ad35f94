"""The graph: nodes in the order of their making, one plan, many runs.

A node says which tensors it reads and writes and lowers itself to a kernel and its arguments.
`Graph.plan` gives every written tensor a place in one arena, where tensors whose lives do not meet
share bytes, and decides between which steps the workers must wait for each other. `Graph.run` then
only executes: no Python, no allocation, one parallel region.
"""

import numpy as np

from engine.errors import ShapeError

from engine.kernels cimport MAX_WORKERS, WORKER_SCRATCH, kernels, op_fn, step, team_clock, team_run
from engine.kernels cimport table as table_of
from engine.tensor cimport Tensor
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free

cdef enum:
    ALIGNMENT = 64


cdef char *aligned(object owner):
    """First address of an uint8 array that is a multiple of ALIGNMENT."""
    cdef size_t start = owner.ctypes.data
    return <char *>((start + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT)


cdef class Node:
    """One step of a graph. A subclass names its tensors and fills its kernel's arguments.

    Attributes
    ----------
    inputs, outputs : tuple of Tensor
        What it reads and writes. An output that some earlier node wrote is accumulated into.
    """

    def __cinit__(self, *args):
        self.recipe = args
        self.aliases = {}
        self.args = NULL
        self.shared = NULL

    cdef int64_t shared_bytes(self) except -1:
        """Bytes that the workers share while the step runs."""
        return 0

    cdef op_fn lower(self, const kernels *table) except NULL:
        raise ShapeError(f"{type(self).__name__} has no kernel")

    @property
    def label(self) -> str:
        """What the node is called where times are told."""
        return type(self).__name__

    @property
    def varies(self) -> bool:
        """Whether one run is more work than another."""
        return False

    def work(self) -> tuple[float, float]:
        """FLOPs of products and bytes moved, of one run: the next one, where they differ."""
        cdef Tensor t
        return 0.0, float(sum([t.n_bytes() for t in self.inputs + self.outputs]))

    def gradient(self, grads):
        """Add nodes for the gradients of the inputs, given the outputs' (see autograd.pyx)."""
        raise ShapeError(f"{type(self).__name__} has no gradient")


cdef class Places:
    """Best-fit allocation of an arena's bytes over time."""

    cdef list free_          # (start, size), by start
    cdef readonly int64_t end

    def __cinit__(self):
        self.free_ = []
        self.end = 0

    cdef int64_t take(self, int64_t size):
        """Start of the smallest hole that holds `size` bytes, or of new ones at the end."""
        cdef int64_t start, hole
        cdef Py_ssize_t i, best = -1
        for i, (start, hole) in enumerate(self.free_):
            if hole >= size and (best < 0 or hole < self.free_[best][1]):
                best = i
        if best >= 0:
            start, hole = self.free_.pop(best)
            if hole > size:
                self.free_.insert(best, (start + size, hole - size))
            return start
        start = self.end
        if self.free_:
            start, hole = self.free_[len(self.free_) - 1]
            if start + hole == self.end:
                self.free_.pop()
            else:
                start = self.end
        self.end = start + size
        return start

    cdef int give(self, int64_t start, int64_t size) except -1:
        """Return bytes, joining them with free neighbours."""
        self.free_.append((start, size))
        self.free_.sort()
        cdef list joined = []
        for first, n in self.free_:
            if joined and first == joined_end:
                first, before = joined.pop()
                n += before
            joined.append((first, n))
            joined_end = first + n
        self.free_ = joined
        return 0


cdef Tensor root(Tensor tensor):
    while tensor.base is not None:
        tensor = tensor.base
    return tensor


cdef class Graph:
    """Nodes over tensors, planned once and run often.

    Parameters
    ----------
    n_threads : int
        Workers of a run. Results do not depend on it.
    isa : str, optional
        Kernel variant; the one in force by default.
    """

    def __cinit__(self, int n_threads=1, isa=None):
        if not 1 <= n_threads <= MAX_WORKERS:
            raise ShapeError(f"{n_threads} threads: from 1 to {MAX_WORKERS} can be used")
        self.nodes = []
        self.kept = set()
        self.packed = {}
        self.n_threads = n_threads
        self.isa = isa
        self.table = table_of(isa)
        self.steps = NULL
        self.n_steps = 0

    def __dealloc__(self):
        free(self.steps)

    def add(self, kind, *args) -> tuple:
        """Make a node of class `kind` and append it; returns its outputs."""
        cdef Node node = kind(*args)
        cdef Tensor tensor
        if self.arena is not None:
            raise ShapeError("a planned graph takes no more nodes")
        node.segment = self.segment
        needs = any([(<Tensor>t).needs_grad for t in node.inputs])
        for tensor in node.outputs:
            if tensor.producer is None and tensor.data == NULL and tensor.base is None:
                tensor.producer = node
                tensor.needs_grad = needs
        self.nodes.append(node)
        return node.outputs

    def keep(self, Tensor tensor) -> Tensor:
        """Let the tensor's value stay readable after a run."""
        self.kept.add(root(tensor))
        return tensor

    cdef dict place(self):
        """Start in the arena of every planned tensor; sets arena_bytes."""
        cdef Node node
        cdef Tensor tensor, old
        cdef dict last = {}, starts = {}, sizes = {}
        cdef Places places = Places()
        for i, node in enumerate(self.nodes):
            for tensor in node.inputs + node.outputs:
                last[root(tensor)] = i
        for i, node in enumerate(self.nodes):
            taken = set()
            for number, tensor in enumerate(node.outputs):
                tensor = root(tensor)
                if tensor.data != NULL or tensor in starts:
                    continue
                source = node.aliases.get(number)
                old = None if source is None else node.inputs[source]
                if (
                    old is not None and old.base is None and old.data == NULL
                    and old in starts and last[old] == i and old not in self.kept
                    and old not in taken and old.n_bytes() == tensor.n_bytes()
                ):
                    starts[tensor], sizes[tensor] = starts[old], sizes[old]
                    taken.add(old)
                    continue
                if node.must_alias and source is not None:
                    kind = type(node).__name__
                    raise ShapeError(f"{kind} works in place, but {old.name} is read later")
                size = (tensor.n_bytes() + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
                starts[tensor], sizes[tensor] = places.take(size), size
            for tensor in {root(t) for t in node.inputs + node.outputs}:
                ends = last[tensor] == i and tensor not in self.kept and tensor not in taken
                if ends and tensor in starts:
                    places.give(starts[tensor], sizes[tensor])
        self.arena_bytes = places.end
        return starts

    cdef int set_barriers(self, step *steps) except -1:
        """A step waits if it reads what was written, or writes what was touched, since then."""
        cdef Node node
        cdef Tensor tensor
        cdef list reads = [], writes = []
        for i, node in enumerate(self.nodes):
            r = [span(tensor) for tensor in node.inputs]
            w = [span(tensor) for tensor in node.outputs]
            if node.shared != NULL:
                w.append((<size_t>node.shared, <size_t>node.shared + 1))
            if i > 0 and (overlap(r, writes) or overlap(w, writes) or overlap(w, reads)):
                steps[i].barrier = 1
                reads, writes = [], []
            reads += r
            writes += w
        return 0

    def plan(self, Graph lender=None):
        """Give every tensor its place and every step its arguments.

        Parameters
        ----------
        lender : Graph, optional
            A planned one whose memory this one takes, too, where it is enough. Nothing that a run
            leaves there is whole after a run of the other.

        Raises
        ------
        ShapeError
            If a node cannot be lowered.
        """
        cdef Node node
        cdef Tensor tensor
        cdef int64_t shared = 0
        cdef char *start
        cdef step *steps
        if self.arena is not None:
            raise ShapeError("a graph is planned once")
        starts = self.place()
        for node in self.nodes:
            shared = max(shared, node.shared_bytes())
        self.arena = self.memory(
            self.arena_bytes + shared + ALIGNMENT, None if lender is None else lender.arena)
        start = aligned(self.arena)
        for tensor, offset in starts.items():
            tensor.data = start + <int64_t>offset
            tensor.owner = self.arena
        self.scratch = self.memory(
            self.scratch_bytes + ALIGNMENT, None if lender is None else lender.scratch)
        self.scratch_start = aligned(self.scratch)
        self.arena_bytes += shared
        steps = <step *>calloc(max(len(self.nodes), 1), sizeof(step))
        if steps == NULL:
            raise MemoryError
        try:
            self.lower(steps, start + self.arena_bytes - shared)
        except BaseException:
            free(steps)
            raise
        self.n_steps = len(self.nodes)
        self.steps = steps

    cdef object memory(self, int64_t n_bytes, lent):
        """Bytes to be written: those that are lent if there are enough, else new ones."""
        if lent is not None and len(lent) >= n_bytes:
            return lent
        return np.empty(n_bytes, np.uint8)

    cdef int lower(self, step *steps, void *shared) except -1:
        """Fill the steps: kernel, arguments, barrier."""
        cdef Node node
        cdef Tensor tensor
        for i, node in enumerate(self.nodes):
            for tensor in node.inputs + node.outputs:
                if tensor.base is not None:
                    settle(tensor)
            node.shared = shared if node.shared_bytes() else NULL
            steps[i].run = node.lower(self.table)
            steps[i].args = node.args
        self.set_barriers(steps)
        return 0

    @property
    def scratch_bytes(self) -> int:
        """Working space of all workers."""
        return <int64_t>self.n_threads * WORKER_SCRATCH

    def run(self, int64_t first=0, end=None):
        """Execute steps first ... end - 1, all by default; a step is the node of its number.

        Inputs are read from, and results left in, the tensors' memory. A run may come in parts, in
        order, so that somebody may look at what is complete already.

        Raises
        ------
        ShapeError
            If there are no such steps.
        """
        if self.steps == NULL:
            self.plan()
        cdef int64_t last = self.n_steps if end is None else end
        if not 0 <= first <= last <= self.n_steps:
            raise ShapeError(f"steps {first} to {last} of {self.n_steps} cannot be run")
        cdef team_clock clock = self.clock
        if clock.steps != NULL:
            clock.steps += first
            self.count_work(first, last)
            self.n_runs += first == 0
        with nogil:
            team_run(
                self.steps + first, last - first, self.n_threads, self.scratch_start,
                NULL if clock.steps == NULL else &clock)

    cdef int count_work(self, int64_t first, int64_t last) except -1:
        """Add up what differs from run to run; known before it, not when it is asked for."""
        cdef int64_t i
        for i in self.worked:
            if first <= i < last:
                flops, n_bytes = self.nodes[i].work()
                before_flops, before_bytes = self.worked[i]
                self.worked[i] = (before_flops + flops, before_bytes + n_bytes)
        return 0

    def measure(self):
        """Plan, and from now on count the time of each step."""
        cdef int64_t[::1] steps, waits
        if self.steps == NULL:
            self.plan()
        steps = self.step_ns = np.zeros(max(self.n_steps, 1), np.int64)
        waits = self.wait_ns = np.zeros(self.n_threads, np.int64)
        self.clock = team_clock(&steps[0], &waits[0])
        self.worked = {i: (0.0, 0.0) for i, node in enumerate(self.nodes) if node.varies}
        self.n_runs = 0

    def times(self) -> dict[str, tuple[int, float, float, float]]:
        """Where the time went since `measure`.

        Returns
        -------
        dict
            Label of a kind of step -> steps in a run, seconds over all runs, and FLOPs and bytes
            of one run, the mean of all. The seconds are worker 0's, its waits included.
        """
        cdef Node node
        out = {}
        for i, (node, ns) in enumerate(zip(self.nodes, self.step_ns, strict=True)):
            n, seconds, flops, n_bytes = out.get(node.label, (0, 0.0, 0.0, 0.0))
            if i in self.worked:
                more_flops, more_bytes = [x / max(self.n_runs, 1) for x in self.worked[i]]
            else:
                more_flops, more_bytes = node.work()
            out[node.label] = (
                n + 1, seconds + ns * 1e-9, flops + more_flops, n_bytes + more_bytes)
        return out

    @property
    def waited(self) -> float:
        """Share of the workers' time that they stood at barriers since `measure`."""
        total = self.step_ns.sum() * self.n_threads
        return float(self.wait_ns.sum() / total) if total else 0.0


cdef int settle(Tensor view) except -1:
    """Give a view of a planned tensor its address."""
    cdef Tensor base = view.base
    if base.base is not None:
        settle(base)
    view.data = base.data + base.n_bytes() // base.rows * view.first_row
    view.owner = base.owner
    return 0


cdef tuple span(Tensor tensor):
    return <size_t>tensor.data, <size_t>tensor.data + tensor.n_bytes()


cdef bint overlap(list a, list b):
    for first, end in a:
        for other, other_end in b:
            if first < other_end and other < end:
                return True
    return False
