"""Text by name: a local file, a dataset of the `datasets` library, or the corpus that every Python carries.

    notes.txt          a UTF-8 text file, read in its own order
    offline            this Python's documentation and library sources (`cskv.data.offline`); needs no network
    pile_subset        ola13/small-the_pile, the paper's calibration and training text
    wikitext2          Salesforce/wikitext, wikitext-2-raw-v1
    c4                 allenai/c4, English
    anything else      a hub name or a local folder that `datasets.load_dataset` understands
    a+b                several of these in turns, as many characters of each, until one ends

Every source streams: no more than a bounded shuffling buffer of documents is held.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cskv.data import offline
from cskv.data.offline import Split
from cskv.errors import DataError, first_line

PIECE_CHARACTERS = 1 << 16
SHUFFLED_DOCUMENTS = 1000
MIXED_CHARACTERS = 4096  # of a piece of a mixture: some thousand tokens


@dataclass(frozen=True)
class TextSource:
    """Documents that can be read again and again.

    Attributes:
        name: what errors and saved statistics call it.
        read: seed -> an iterator over texts. The same seed gives the same order.
        separate: True where each text is a document of its own; False where texts are pieces of one running text.
    """

    name: str
    read: Callable[[int], Iterator[str]]
    separate: bool = True


@dataclass(frozen=True)
class HubText:
    """Where a named text lies on the hub.

    Attributes:
        path, config: arguments of `datasets.load_dataset`.
        heldout: the split to evaluate on, or None where the dataset has but one.
        separate: False where a row is a line of a running text and no document.
    """

    path: str
    config: str | None = None
    heldout: str | None = "validation"
    separate: bool = True


HUB_TEXTS = {
    "pile_subset": HubText("ola13/small-the_pile", heldout=None),
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", heldout="test", separate=False),
    "c4": HubText("allenai/c4", "en"),
}


def open_source(name: str, split: Split = "train") -> TextSource:
    """Find a text source by name. Nothing is read or downloaded until its documents are.

    Args:
        name: see the module's docstring.
        split: "train", or "heldout" for evaluation. A local file is one text, whatever the split.

    Raises:
        DataError: there is no such file or split.
    """
    if split not in ("train", "heldout"):
        raise DataError(f"split is {split!r}; expected 'train' or 'heldout'")
    if "+" in name and not Path(name).exists():
        return _mixture([open_source(part.strip(), split) for part in name.split("+")])
    if name == "offline":
        return TextSource(name, lambda seed: _offline_texts(split, seed))
    if name in HUB_TEXTS:
        return _dataset_source(name, split, HUB_TEXTS[name])
    path = Path(name)
    if path.is_file():
        return TextSource(name, lambda _seed: read_pieces(path), separate=False)
    if not path.is_dir() and (path.suffix == ".txt" or path.is_absolute() or name.startswith(".")):
        raise DataError(f"there is no text file or folder {name}")
    return _dataset_source(name, split, HubText(name))


def _mixture(sources: Sequence[TextSource]) -> TextSource:
    def read(seed: int) -> Iterator[str]:
        texts = [_cut(source.read(seed)) for source in sources]
        given = [0] * len(texts)
        while True:
            least = given.index(min(given))
            piece = next(texts[least], None)
            if piece is None:
                return
            given[least] += len(piece)
            yield piece

    return TextSource("+".join(source.name for source in sources), read)


def _cut(texts: Iterator[str]) -> Iterator[str]:
    """Cut texts at line ends into pieces of a mixture."""
    for text in texts:
        while len(text) > MIXED_CHARACTERS:
            stop = text.rfind("\n", 0, MIXED_CHARACTERS) + 1 or MIXED_CHARACTERS
            yield text[:stop]
            text = text[stop:]
        if text.strip():
            yield text


def read_pieces(path: Path) -> Iterator[str]:
    """Yield a UTF-8 file in pieces that end at line ends, or after `PIECE_CHARACTERS` more of a very long line.

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            while piece := file.read(PIECE_CHARACTERS):
                yield piece + file.readline(PIECE_CHARACTERS)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason}); convert it, for instance with iconv") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _offline_texts(split: Split, seed: int) -> Iterator[str]:
    # The corpus fits in memory (tens of MB); alphabetical order would give a short run one corner of it.
    texts = [text for _, text in offline.documents(split)]
    random.Random(seed).shuffle(texts)
    return iter(texts)


def _dataset_source(name: str, split: Split, hub: HubText) -> TextSource:
    wanted = "train" if split == "train" else hub.heldout
    if wanted is None:
        raise DataError(f"dataset {name} has no held-out split; evaluate on another text, for instance wikitext2")
    return TextSource(name, lambda seed: _dataset_texts(name, wanted, hub, seed), hub.separate)


def _dataset_texts(name: str, split: str, hub: HubText, seed: int) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(f"reading dataset {name} needs the `datasets` library: pip install 'cskv[data]'") from error
    try:
        rows = load_dataset(hub.path, hub.config, split=split, streaming=True)
        if hub.separate:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLED_DOCUMENTS)
        for row in rows:
            if not isinstance(text := row.get("text"), str):
                raise DataError(f"dataset {name} has no text in column 'text'; its columns are {sorted(row)}")
            yield text
    except DataError:
        raise
    # The library and the network below it raise dozens of unrelated types; each means the text cannot be had.
    except Exception as error:
        raise DataError(
            f"cannot read split {split!r} of dataset {name} ({hub.path}): {first_line(error)}; "
            "without a network, give a text file or 'offline'"
        ) from error
