"""The header of a GGUF file: what is said of the model, and where its tensors lie.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is read here once more, in few lines, because
transformers' reader meets a damaged file with errors of many kinds or none, and leaves out what it does not know. Lists
(a vocabulary has 10^5 entries) are skipped.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cskv.errors import CSKVError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, LIST = 8, 9  # the other types of values
F32 = 0  # of tensors


class Entry(NamedTuple):
    """A tensor in the file: shape with the innermost size first, type as ggml numbers them, offset in bytes."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
        path: the file.
        values: metadata, lists left out.
        tensors: by name.
        data: where tensors begin, in bytes.
    """

    path: Path
    values: dict[str, Any]
    tensors: dict[str, Entry]
    data: int

    @property
    def architecture(self) -> str:
        """Llama.cpp's name of the model's family; empty where the file names none."""
        return str(self.values.get("general.architecture", ""))

    def value(self, name: str, default: Any = None) -> Any:
        """Return what the file says under the name of its own architecture."""
        return self.values.get(f"{self.architecture}.{name}", default)

    def numbers(self, name: str) -> np.ndarray:
        """Read a tensor of fp32, flat.

        Raises:
            CSKVError: it is of another type.
        """
        entry = self.tensors[name]
        if entry.kind != F32:
            raise CSKVError(f"{self.path}: {name} is of type {entry.kind}; expected {F32}, numbers of 32 bits")
        return np.fromfile(self.path, "<f4", prod(entry.shape), offset=self.data + entry.offset)

    def end(self, sizes: dict[int, tuple[int, int]]) -> int:
        """Return how many bytes a whole file has at least.

        Args:
            sizes: numbers and bytes of a block by type, as `gguf.GGML_QUANT_SIZES`.

        Raises:
            CSKVError: a tensor is of a type that is not among them.
        """
        ends = [self.data]
        for name, entry in self.tensors.items():
            if entry.kind not in sizes:
                raise CSKVError(f"{self.path}: {name} is of type {entry.kind}, which the installed gguf does not know")
            count, size = sizes[entry.kind]
            ends.append(self.data + entry.offset + prod(entry.shape) // count * size)
        return max(ends)


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        CSKVError: it is no GGUF file, of a version that is not known, or ends within the header.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CSKVError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _parsed(path, content)
            except (struct.error, UnicodeDecodeError, KeyError) as error:
                raise CSKVError(f"{path} is truncated or damaged in its header; copy or download it again") from error


def _parsed(path: Path, content: mmap.mmap) -> Header:
    cursor = _Cursor(content, len(MAGIC))
    version, tensor_count, value_count = cursor.take("<IQQ")
    if version not in VERSIONS:
        raise CSKVError(f"{path} is of GGUF version {version}; expected {' or '.join(map(str, VERSIONS))}")
    values, tensors = {}, {}
    for _ in range(value_count):
        name, (kind,) = cursor.string(), cursor.take("<I")
        if kind == LIST:
            cursor.skip_list()
        else:
            values[name] = cursor.string() if kind == STRING else cursor.take(NUMBERS[kind])[0]
    for _ in range(tensor_count):
        name, (dimensions,) = cursor.string(), cursor.take("<I")
        shape = cursor.take(f"<{dimensions}Q")
        tensors[name] = Entry(shape, *cursor.take("<IQ"))
    alignment = values.get("general.alignment", 32)
    return Header(path, values, tensors, -(-cursor.place // alignment) * alignment)


class _Cursor:
    """A place in the file that moves on with everything read."""

    def __init__(self, content: mmap.mmap, place: int) -> None:
        self.content, self.place = content, place

    def take(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from(form, self.content, self.place)
        self.place += struct.calcsize(form)
        return found

    def string(self) -> str:
        (length,) = self.take("<Q")
        self.place += length
        if self.place > len(self.content):
            raise struct.error
        return self.content[self.place - length : self.place].decode()

    def skip_list(self) -> None:
        kind, count = self.take("<IQ")
        if kind != STRING:
            self.place += count * struct.calcsize(NUMBERS[kind])
            return
        for _ in range(count):
            (length,) = self.take("<Q")
            self.place += length
