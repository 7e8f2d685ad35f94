"""GGUF bytes put together by hand, sound or not: what a writer would refuse to write."""

from __future__ import annotations

import struct
from collections.abc import Sequence


def integer(value: int, form: str = "I") -> bytes:
    return struct.pack(f"<{form}", value)


def string(text: str | bytes, version: int = 3) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return integer(len(raw), "I" if version == 1 else "Q") + raw


def key(name: str | bytes, kind: int, payload: bytes, version: int = 3) -> bytes:
    return string(name, version) + integer(kind) + payload


def array(name: str, element: int, count: int, payload: bytes, version: int = 3) -> bytes:
    head = integer(element) + integer(count, "I" if version == 1 else "Q")
    return key(name, 9, head + payload, version)


def tensor(
    name: str | bytes,
    sizes: Sequence[int],
    kind: int,
    offset: int,
    n_dims: int | None = None,
    version: int = 3,
) -> bytes:
    n_dims = len(sizes) if n_dims is None else n_dims
    packed = b"".join(integer(size, "I" if version == 1 else "q") for size in sizes)
    return string(name, version) + integer(n_dims) + packed + integer(kind) + integer(offset, "Q")


def build(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    form = "I" if version == 1 else "q"
    head = magic + integer(version)
    head += integer(len(tensors) if n_tensors is None else n_tensors, form)
    head += integer(len(keys) if n_keys is None else n_keys, form)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def small_file(version: int = 3) -> bytes:
    """Build a sound file with a key of each type, an array of each kind, and two tensors."""

    def named(name: str, kind: int, payload: bytes) -> bytes:
        return key(name, kind, payload, version)

    form = "I" if version == 1 else "Q"
    keys = [
        named("u8", 0, integer(200, "B")),
        named("i8", 1, integer(-100, "b")),
        named("u16", 2, integer(65_000, "H")),
        named("i16", 3, integer(-30_000, "h")),
        named("u32", 4, integer(4_000_000_000)),
        named("i32", 5, integer(-2_000_000_000, "i")),
        named("f32", 6, struct.pack("<f", 0.5)),
        named("bool", 7, b"\x01"),
        named("string", 8, string("Zoë", version)),
        named("u64", 10, integer(1 << 63, "Q")),
        named("i64", 11, integer(-1 << 63, "q")),
        named("f64", 12, struct.pack("<d", 0.1)),
        array("floats", 6, 3, struct.pack("<3f", 1, 2, 3), version),
        array("bools", 7, 2, b"\x00\x01", version),
        named("texts", 9, integer(8) + integer(3, form) + string("a", version)
              + string(b"\xff\x00", version) + string("", version)),
        named("none", 9, integer(8) + integer(0, form)),
    ]  # fmt: skip
    tensors = [
        tensor("matrix", (2, 3), 0, 0, version=version),
        tensor("q8", (32, 1), 8, 32, version=version),
    ]
    matrix = struct.pack("<6f", *range(6))
    return build(keys, tensors, matrix + bytes(8) + bytes(range(34)), version=version)
