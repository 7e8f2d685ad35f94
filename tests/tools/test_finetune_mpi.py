"""`mpirun -n N finetune`: the losses of one process, files of rank 0 alone, and how a job ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.lora import read_adapter
from engine.training.checkpoint import read_checkpoint

DATA = Path(__file__).parents[1] / "data"
MODEL = str(DATA / "mini-f32.gguf")
FINETUNE = [sys.executable, "-m", "engine.tools.finetune"]
SMALL = [
    "--model-base", MODEL, "--train-data", "train.txt", "--checkpoint-out", "chk-ITERATION.gguf",
    "--lora-out", "lora-ITERATION.bin", "--threads", "1", "--compute", "f32", "--ctx", "16",
    "--batch", "5", "--seed", "3", "--warmup", "1", "--checkpoint-in", "", "--save-every", "2",
]  # fmt: skip
LOSS = re.compile(r"iter= *\d+ .* loss=(\S+) ")
SECONDS = 60

# An ordinary user of a machine with fewer cores than ranks; the names are Open MPI's.
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def launcher() -> str:
    """Path of mpirun: the one installed beside Python, as wheels of MPI do, else that of PATH."""
    beside = str(Path(sys.executable).parent)
    path = shutil.which("mpirun", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if path is None:
        pytest.skip("no mpirun on this machine")
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Empty folder, made current, with a training text."""
    pytest.importorskip("mpi4py")
    monkeypatch.chdir(tmp_path)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    shutil.copy(DATA / "play.txt", "train.txt")
    return tmp_path


def job(*ranks: list[str]) -> list[str]:
    """Command that starts a process for each list of options."""
    command = [launcher()]
    for options in ranks:
        command += [":"] * (len(command) > 1) + ["-n", "1", *FINETUNE, *options]
    return command


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def written(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"train.txt"}


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_as_one_process_does(folder, size):
    options = [*SMALL, "--adam-iter", "4", "--val-split", "0.1", "--eval-every", "2"]
    options += ["--grad-acc", "2"]
    one = run([*FINETUNE, *options])
    assert one.returncode == 0, one.stderr
    expected, files = read_adapter("lora-4.bin"), written(folder)
    for name in files:
        os.remove(name)
    many = run(job(*[options] * size))
    assert many.returncode == 0, many.stderr
    assert written(folder) == files
    losses = [[float(x) for x in LOSS.findall(r.stdout)] for r in (one, many)]
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert np.abs(read_adapter("lora-4.bin").flat - expected.flat).max() < 1e-4
    words = [re.sub(r"[\d.:]+(ms)?|-|bytes.*", "", r.stdout).split() for r in (one, many)]
    assert words[1] == words[0], "every line is printed once"
    proofs = [re.sub(r"\d\d:\d\d.*|[\d.]+ms", "", r.stderr).splitlines() for r in (one, many)]
    assert [p for p in proofs[1] if "moved" in p] == [p for p in proofs[0] if "moved" in p]


def test_a_job_is_resumed_by_one_process_and_the_other_way_round(folder):
    def options(n_iterations: int, checkpoint: str = "") -> list[str]:
        return [*SMALL, "--adam-iter", str(n_iterations), "--checkpoint-in", checkpoint]

    assert run(job(*[options(2)] * 2)).returncode == 0
    assert run([*FINETUNE, *options(2, "chk-2.gguf")]).returncode == 0
    mixed = read_adapter("lora-4.bin").flat.copy()
    assert run([*FINETUNE, *options(2)]).returncode == 0
    many = run(job(*[options(2, "chk-2.gguf")] * 2))
    assert many.returncode == 0, many.stderr
    assert np.abs(read_adapter("lora-4.bin").flat - mixed).max() < 1e-4


def test_what_one_rank_lacks_is_told_once_and_ends_all(folder):
    lacks = [*SMALL, "--train-data", "missing.txt"]
    ended = run(job(SMALL, lacks, SMALL))
    assert ended.returncode != 0
    assert ended.stderr.count("error: rank 1: missing.txt: training text cannot be read") == 1
    assert "Traceback" not in ended.stderr
    assert written(folder) == set()


def test_ranks_with_other_options_or_more_ranks_than_rows_are_refused(folder):
    ended = run(job(SMALL, [*SMALL, "--adam-alpha", "0.5"]))
    assert ended.returncode != 0
    assert "error: rank 1 and rank 0 differ in options" in ended.stderr
    ended = run(job(*[[*SMALL, "--batch", "1"]] * 2))
    assert ended.returncode != 0
    assert "error: --batch: 1 rows cannot be shared by 2 ranks" in ended.stderr
    assert written(folder) == set()


def test_a_wrong_option_is_explained_once(folder):
    ended = run(job(*[["--no-such-option"]] * 2))
    assert ended.returncode != 0
    assert ended.stderr.count("usage: finetune") == 1


def running(command: list[str]) -> Iterator[str]:
    """Lines of a job on both outputs, then its status."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
        status = process.wait(SECONDS)
    yield f"status {status}"


def process_of_rank(rank: int, folder: Path) -> int:
    """Find the process that a launcher has started as that rank in a folder."""
    marks = {f"{name}={rank}".encode() for name in ("PMI_RANK", "PMIX_RANK")}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = set((process / "environ").read_bytes().split(b"\0"))
            if marks & variables and Path(os.readlink(process / "cwd")) == folder:
                return int(process.name)
        except OSError:
            continue  # it has ended, or is another user's
    raise AssertionError(f"no process of rank {rank}")


def test_a_rank_that_dies_ends_the_job_and_leaves_the_last_checkpoint_whole(folder):
    lines = running(job(*[[*SMALL, "--adam-iter", "1000000"]] * 3))
    for line in lines:
        if re.search(r"iter= *5 ", line):
            break
    os.kill(process_of_rank(1, folder), signal.SIGKILL)
    *rest, status = lines
    assert status != "status 0"
    told = "".join(rest)
    # MPICH's launcher kills the others and tells it; Open MPI's lets them end by themselves.
    assert re.search(r"rank 0: told to end: another rank has died.*go on from chk-|Killed", told)
    assert read_checkpoint("chk-LATEST.gguf").state.opt_iteration >= 4
    rest = run([*FINETUNE, *SMALL, "--checkpoint-in", "chk-LATEST.gguf", "--adam-iter", "1"])
    assert rest.returncode == 0, rest.stderr


def test_an_interrupted_rank_stops_all_of_them_with_a_save(folder):
    lines = running(job(*[[*SMALL, "--adam-iter", "1000000", "--save-every", "0"]] * 2))
    for line in lines:
        if re.search(r"iter= *3 ", line):
            break
    os.kill(process_of_rank(1, folder), signal.SIGINT)
    *rest, _ = lines
    assert any("saving to chk-LATEST.gguf" in line for line in rest)
    assert read_checkpoint("chk-LATEST.gguf").state.opt_iteration >= 3
