"""Ranks: how rows, sums, failures and cores are shared; without MPI, ranks are threads here."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from engine.errors import EngineError, OptionError
from engine.lora import KINDS, create_adapter
from engine.model import Model
from engine.training import parallel
from engine.training.parallel import (
    AgreedError,
    Alone,
    DataParallel,
    check_agreement,
    check_failures,
    communicator,
    launched_size,
    own_cores,
    rows_of,
)
from engine.training.trainer import PART_BYTES, Trainer

MODEL = Path(__file__).parents[1] / "data" / "mini-f32.gguf"
N_BATCH, N_CTX = 5, 12


class Threads:
    """What the ranks of a job share; each has a `Rank`."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.values = [None] * size

    def run(self, work):
        """Results of `work` (communicator) on every rank, all at a time."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(work, [Rank(self, rank) for rank in range(self.size)]))


class Rank:
    """The communicator of one thread."""

    def __init__(self, job, rank):
        self.job, self.rank, self.size = job, rank, job.size
        self.pending = []

    def all(self, value):
        self.job.values[self.rank] = value
        self.job.barrier.wait()
        values = list(self.job.values)
        self.job.barrier.wait()
        return values

    def begin_sum(self, values):
        self.pending.append(values)

    def finish_sums(self):
        for values in self.pending:
            values[...] = np.sum(self.all(values.copy()), axis=0, dtype=values.dtype)
        self.pending = []

    def from_root(self, value):
        return self.all(value)[0]


@pytest.fixture(scope="module")
def model():
    return Model.load(MODEL)


def trained(model, n_rows, **options):
    """A trainer of so many rows, of an adapter that is the same each time."""
    ranks = {kind: 1 if "norm" in kind else 3 for kind in KINDS}
    adapter = create_adapter(model.adapter_shapes(ranks), 4, 4, 1)
    generator = np.random.default_rng(5)
    adapter.flat[:] = generator.standard_normal(adapter.flat.size, np.float32) * 0.1
    return Trainer(model, adapter, n_rows, N_CTX, n_threads=1, compute="f32", **options)


def batch(model, rng):
    shape = (N_BATCH, N_CTX)
    inputs = rng.integers(0, model.hparams.n_vocab, shape, np.int32)
    targets = rng.integers(0, model.hparams.n_vocab, shape, np.int32)
    targets[0] = targets[1, 3:] = targets[4, ::2] = -1  # so that rows do not weigh the same
    return inputs, targets


# ---------------------------------------------------------------- a trainer's gradient in parts


@pytest.mark.parametrize("options", [{}, {"checkpointing": False}, {"kept_layers": 1}])
def test_parts_of_the_gradient_are_told_of_once_and_are_final(model, rng, monkeypatch, options):
    monkeypatch.setattr("engine.training.trainer.PART_BYTES", 4000)
    trainer, again = trained(model, N_BATCH, **options), trained(model, N_BATCH)
    inputs, targets = batch(model, rng)
    told = []
    total = trainer.accumulate(
        inputs, targets, 0.5, None, lambda a, b: told.append((a, b, trainer.grad[a:b].copy()))
    )
    assert total == again.accumulate(inputs, targets, 0.5)
    assert trainer.grad.any() and np.array_equal(trainer.grad, again.grad)
    places = sorted((a, b) for a, b, _ in told)
    assert len(places) > 3
    assert [a for a, _ in places] == [0, *(b for _, b in places[:-1])]
    assert places[-1][1] == trainer.grad.size
    for a, b, value in told:
        assert np.array_equal(value, trainer.grad[a:b])
    assert told[0][1] == trainer.grad.size, "the last layer's is final first"


def test_a_small_gradient_is_told_of_in_one_part(model, rng):
    trainer, told = trained(model, N_BATCH), []
    assert trainer.grad.nbytes < PART_BYTES
    trainer.accumulate(*batch(model, rng), 1.0, None, lambda a, b: told.append((a, b)))
    assert told == [(0, trainer.grad.size)]


def test_kept_layers_change_no_bit_of_the_gradient(model, rng):
    inputs, targets = batch(model, rng)
    trainers = [trained(model, N_BATCH, kept_layers=n) for n in range(3)]
    trainers.append(trained(model, N_BATCH, checkpointing=False))
    losses = [trainer.evaluate(inputs, targets) for trainer in trainers]
    assert len(set(losses)) == 1
    for trainer in trainers[1:]:
        assert np.array_equal(trainer.grad, trainers[0].grad)
    flops = [trainer.flops for trainer in trainers]
    assert flops[0] > flops[1] > flops[2] == flops[3]
    repeated = [trainer.repeated_flops for trainer in trainers]
    assert [a - b for a, b in zip(flops, repeated, strict=True)] == [flops[3]] * 4


# ---------------------------------------------------------------- the same as one process


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_find_the_loss_and_gradient_of_one_process(model, rng, size):
    one = trained(model, N_BATCH)
    batches = [batch(model, rng) for _ in range(2)]
    expected = [one.evaluate(*rows, 0.5) for rows in batches]
    loss, counted = one.loss(*batches[0])

    def work(comm):
        rows = rows_of(N_BATCH, comm.rank, comm.size)
        trainer = trained(model, rows.stop - rows.start)
        ranks = DataParallel(trainer, comm, N_BATCH, n_evaluations=2)
        losses = [ranks.evaluate(*rows, 0.5) for rows in batches]
        return losses, ranks.grad.copy(), ranks.loss(*batches[0])

    results = Threads(size).run(work)
    scale = np.abs(one.grad).max()
    for losses, grad, (rank_loss, rank_counted) in results:
        assert losses == pytest.approx(expected, rel=1e-6)
        assert np.abs(grad - one.grad).max() <= 1e-5 * scale
        assert np.array_equal(grad, results[0][1])
        assert rank_loss == pytest.approx(loss, rel=1e-6)
        assert rank_counted == counted


def test_packed_rows_are_shared_with_the_begins_of_their_samples(model, rng):
    inputs, targets = batch(model, rng)
    starts = np.zeros_like(inputs)
    starts[:, 5:] = 5
    starts[3, 9:] = 9
    one = trained(model, N_BATCH, packed=True)
    expected = one.evaluate(inputs, targets, 1.0, starts)

    def work(comm):
        rows = rows_of(N_BATCH, comm.rank, comm.size)
        trainer = trained(model, rows.stop - rows.start, packed=True)
        return DataParallel(trainer, comm, N_BATCH).evaluate(inputs, targets, 1.0, starts)

    assert Threads(2).run(work) == pytest.approx([expected] * 2, rel=1e-6)
    assert expected != pytest.approx(one.evaluate(inputs, targets), rel=1e-4)


def test_one_rank_alone_computes_the_very_bits_of_a_trainer(model, rng):
    trainer, plain = trained(model, N_BATCH), trained(model, N_BATCH)
    ranks, rows = DataParallel(trainer, Alone(), N_BATCH), batch(model, rng)
    assert ranks.evaluate(*rows, 0.7) == plain.evaluate(*rows, 0.7)
    assert np.array_equal(ranks.grad, plain.grad)
    assert ranks.loss(*rows) == plain.loss(*rows)


def test_who_is_asked_to_stop_stops_all_of_them(model, rng):
    rows = batch(model, rng)

    def work(comm):
        part = rows_of(N_BATCH, comm.rank, comm.size)
        asked = threading.Event()
        trainer = trained(model, part.stop - part.start)
        ranks = DataParallel(trainer, comm, N_BATCH, stop_requested=asked.is_set)
        ranks.evaluate(*rows)
        before = ranks.stop_requested()
        if comm.rank == 1:
            asked.set()
        unsaid = ranks.stop_requested()
        ranks.evaluate(*rows)
        return before, unsaid, ranks.stop_requested()

    assert Threads(3).run(work) == [(False, False, True)] * 3


# ---------------------------------------------------------------- rows, cores, launchers


@pytest.mark.parametrize("n_batch, size", [(1, 1), (4, 4), (5, 2), (5, 3), (8, 3), (17, 5)])
def test_rows_are_shared_evenly_and_none_is_lost(n_batch, size):
    parts = [rows_of(n_batch, rank, size) for rank in range(size)]
    rows = [row for part in parts for row in range(n_batch)[part]]
    assert rows == list(range(n_batch))
    counts = {part.stop - part.start for part in parts}
    assert max(counts) - min(counts) <= 1 and min(counts) > 0


def test_fewer_rows_than_ranks_are_refused():
    with pytest.raises(OptionError, match="--batch: 2 rows cannot be shared by 3 ranks"):
        rows_of(2, 0, 3)


def test_cores_are_shared_with_those_who_may_use_them_too(monkeypatch):
    cores = {0: {0, 1, 2, 3}, 1: {0, 1, 2, 3}, 2: {4, 5}, 3: {7}}
    here = threading.local()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores[here.rank])

    def work(comm):
        here.rank = comm.rank
        return own_cores(comm)

    assert Threads(4).run(work) == [2, 2, 2, 1]


def test_ranks_of_other_hosts_share_no_cores(monkeypatch):
    here = threading.local()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(parallel.socket, "gethostname", lambda: f"host{here.rank}")

    def work(comm):
        here.rank = comm.rank
        return own_cores(comm)

    assert Threads(2).run(work) == [2, 2]


def test_launchers_are_known_by_what_they_set():
    assert launched_size({}) == 1
    assert launched_size({"PMI_RANK": "0", "PMI_SIZE": "3"}) == 3
    assert launched_size({"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1"}) == 2
    assert launched_size({"PMIX_RANK": "1"}) == 0
    assert isinstance(communicator({}), Alone)
    assert isinstance(communicator({"PMI_SIZE": "1"}), Alone)


def test_a_job_that_mpi_cannot_join_is_refused(monkeypatch):
    def missing():
        raise ImportError("No module named 'mpi4py'")

    monkeypatch.setattr(parallel, "Mpi", missing)
    with pytest.raises(EngineError, match=r"started by mpirun.*pip install 'cylora\[mpi\]'"):
        communicator({"PMI_SIZE": "2"})


def test_an_mpi_that_sees_one_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "Mpi", Alone)
    with pytest.raises(EngineError, match="started 2 processes, of which mpi4py sees one"):
        communicator({"PMI_SIZE": "2"})
    assert isinstance(communicator({"PMIX_RANK": "0"}), Alone)


# ---------------------------------------------------------------- failing together


def raised(call):
    try:
        call()
    except AgreedError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    "failures, expected",
    [
        (["", "", ""], None),
        (["no model", "", ""], "no model"),
        (["", "", "no text"], "rank 2: no text"),
        (["", "one", "two"], "rank 1: one"),
    ],
)
def test_what_fails_on_one_rank_is_raised_on_all(failures, expected):
    texts = Threads(3).run(lambda comm: raised(lambda: check_failures(comm, failures[comm.rank])))
    assert texts == [expected] * 3


def test_ranks_that_differ_are_named_with_what_they_differ_in():
    facts = [{"model": 1, "options": "a"}, {"model": 1, "options": "b"}]
    texts = Threads(2).run(lambda comm: raised(lambda: check_agreement(comm, facts[comm.rank])))
    assert texts[0] == texts[1]
    assert texts[0].startswith("rank 1 and rank 0 differ in options; ")
    assert (
        Threads(2).run(lambda comm: raised(lambda: check_agreement(comm, facts[0]))) == [None] * 2
    )
