"""Keys and values in a file: whose they are, and what is left to evaluate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from engine.dtypes import F16, F32
from engine.errors import DataError, FormatError
from engine.lora import BaseInfo, read_adapter
from engine.model import Context, Model
from engine.prompt_cache import MAGIC, PromptCacheFile, UnusableCacheError

TOKENS = list(range(5, 45))


@pytest.fixture
def model(data_dir: Path) -> Model:
    return Model.load(data_dir / "mini-f32.gguf")


def context_with(model: Model, data_dir: Path, scale: float = 1.0, **options) -> Context:
    adapter = read_adapter(data_dir / "a-lora-20.bin", BaseInfo.of(model))
    return Context(model, 64, adapters=[(adapter, scale)], **options)


def saved(context: Context, path: Path, n_rows: int = len(TOKENS)) -> PromptCacheFile:
    file = PromptCacheFile(path, context)
    context.evaluate(TOKENS)
    file.save([*TOKENS, 7], n_rows)
    return file


def test_what_was_saved_goes_on_as_if_evaluated(model, tmp_path) -> None:
    first, second = Context(model, 64), Context(model, 64)
    saved(first, tmp_path / "cache")
    cache = PromptCacheFile(tmp_path / "cache", second).load()
    assert (cache.tokens, cache.n_rows) == ([*TOKENS, 7], len(TOKENS))
    cache.restore(second, 30)
    assert second.n_past == 30
    first.truncate(30)
    np.testing.assert_array_equal(second.evaluate([3, 4]), first.evaluate([3, 4]))


def test_the_common_beginning_is_counted(model, tmp_path) -> None:
    cache = saved(Context(model, 64), tmp_path / "cache").load()
    assert cache.common([*TOKENS, 7, 8]) == len(TOKENS) + 1
    assert cache.common(TOKENS[:9]) == 9
    assert cache.common([*TOKENS[:9], 1]) == 9
    assert cache.common([1]) == 0


def test_a_cache_without_rows_still_knows_the_text(model, tmp_path) -> None:
    cache = saved(Context(model, 64), tmp_path / "cache", n_rows=0).load()
    assert (cache.tokens[-1], cache.n_rows) == (7, 0)


def test_rows_that_are_not_there_cannot_be_restored(model, tmp_path) -> None:
    cache = saved(Context(model, 64), tmp_path / "cache", n_rows=5).load()
    with pytest.raises(DataError, match="6 positions cannot be restored after 0"):
        cache.restore(Context(model, 64), 6)
    filled = Context(model, 64)
    filled.evaluate([1])
    with pytest.raises(DataError, match="5 positions cannot be restored after 1"):
        cache.restore(filled, 5)


def test_whose_a_cache_is_decides_whether_it_is_used(model, data_dir, tmp_path) -> None:
    path = tmp_path / "cache"
    saved(context_with(model, data_dir), path)
    PromptCacheFile(path, context_with(model, data_dir)).load()
    other = Model.load(data_dir / "mini-gqa-f32.gguf")
    stretched = Model.load(data_dir / "mini-f32.gguf", rms_eps=1e-3)
    for context, name in (
        (Context(other, 64), "model"),
        (context_with(stretched, data_dir), "shape or rotation"),
        (Context(model, 64), "adapter or scale"),
        (context_with(model, data_dir, 0.5), "adapter or scale"),
        (context_with(model, data_dir, cache_types=(F16, F32)), "type of cache"),
    ):
        with pytest.raises(UnusableCacheError, match=f"cache: is of another {name}$"):
            PromptCacheFile(path, context).load()


def test_another_weight_is_another_model(model, data_dir, tmp_path) -> None:
    saved(Context(model, 64), tmp_path / "cache")
    content = bytearray((data_dir / "mini-f32.gguf").read_bytes())
    offset = model.file.tensors["blk.1.ffn_up.weight"].offset
    content[offset] ^= 1
    (tmp_path / "other.gguf").write_bytes(content)
    other = Model.load(tmp_path / "other.gguf")
    with pytest.raises(UnusableCacheError, match="another model"):
        PromptCacheFile(tmp_path / "cache", Context(other, 64)).load()


def test_a_scale_that_changes_later_does_not_change_whose_the_file_is(
    model, data_dir, tmp_path
) -> None:
    context = context_with(model, data_dir)
    file = PromptCacheFile(tmp_path / "cache", context)
    context.evaluate(TOKENS)
    context.set_adapter_scale(0, 0.0)
    file.save(TOKENS, len(TOKENS))
    assert PromptCacheFile(file.path, context_with(model, data_dir)).load().n_rows == len(TOKENS)


def test_a_scale_of_nothing_is_no_adapter(model, data_dir) -> None:
    context, plain = context_with(model, data_dir, 3.0), Context(model, 64)
    assert np.abs(context.evaluate(TOKENS) - plain.evaluate(TOKENS)).max() > 0.01
    context.truncate(0)
    plain.truncate(0)
    context.set_adapter_scale(0, 0.0)
    np.testing.assert_allclose(context.evaluate(TOKENS), plain.evaluate(TOKENS), atol=1e-6)


def test_a_damaged_cache_is_said_to_be_one(model, tmp_path, rng) -> None:
    path = tmp_path / "cache"
    file = saved(Context(model, 64), path)
    whole = path.read_bytes()
    for n in (0, 5, len(MAGIC), len(MAGIC) + 3, len(MAGIC) + 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises((UnusableCacheError, FormatError)):
            file.load()
    path.write_bytes(whole + b"x")
    with pytest.raises(UnusableCacheError, match="cut off or damaged"):
        file.load()


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": -1}, {"tokens": 10**12}, {"tokens": 1.0}, {"rows": True}, {"rows": 10**9},
        {"rows": None}, {"fits": None}, {"fits": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_lies_is_found_out(change, model, tmp_path) -> None:
    path = tmp_path / "cache"
    file = saved(Context(model, 64), path)
    content = path.read_bytes()
    at = len(MAGIC) + 4
    length = int.from_bytes(content[len(MAGIC) : at], "little")
    header = json.dumps(json.loads(content[at : at + length]) | change).encode()
    start = MAGIC + len(header).to_bytes(4, "little") + header
    path.write_bytes(start + content[at + length :])
    with pytest.raises(UnusableCacheError):
        file.load()


def test_a_token_beyond_the_vocabulary_is_found_out(model, tmp_path) -> None:
    file = PromptCacheFile(tmp_path / "cache", Context(model, 64))
    file.save([1, 10**6], 0)
    with pytest.raises(UnusableCacheError, match="damaged"):
        file.load()


def test_other_files_are_not_taken_for_caches(model, tmp_path) -> None:
    path = tmp_path / "cache"
    file = PromptCacheFile(path, Context(model, 64))
    path.write_bytes(b"a letter to a friend")
    with pytest.raises(FormatError, match="cache: is no prompt cache; give another name"):
        file.load()
    path.write_bytes(b"nsgg" + bytes(40))
    with pytest.raises(UnusableCacheError, match="another program"):
        file.load()
    with pytest.raises(FileNotFoundError):
        PromptCacheFile(tmp_path / "none", Context(model, 64)).load()
