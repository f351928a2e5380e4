import json
from pathlib import Path

import pytest

from cskv.data.sources import HUB_TEXTS, MIXED_CHARACTERS, PIECE_CHARACTERS, open_source
from cskv.errors import DataError


@pytest.fixture
def json_folder(tmp_path: Path) -> Path:
    """A local dataset of 50 documents to train on and 2 held out."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, texts in (("train", [f"document {i}" for i in range(50)]), ("validation", ["one", "two"])):
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_a_text_file_comes_back_whole_in_pieces_that_end_at_lines(tmp_path: Path) -> None:
    text = "".join(f"line {i} äöü €\n" for i in range(20_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    source = open_source(str(tmp_path / "a.txt"))
    pieces = list(source.read(0))
    assert "".join(pieces) == text
    assert len(pieces) > 2
    assert not source.separate
    assert all(piece.endswith("\n") for piece in pieces)


def test_one_endless_line_is_still_read_in_bounded_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * (5 * PIECE_CHARACTERS), encoding="utf-8")
    pieces = list(open_source(str(tmp_path / "a.txt")).read(0))
    assert "".join(pieces) == "x" * (5 * PIECE_CHARACTERS)
    assert max(map(len, pieces)) <= 2 * PIECE_CHARACTERS


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8 text"):
        list(open_source(str(tmp_path / "latin.txt")).read(0))


def test_a_missing_file_is_refused_at_once() -> None:
    with pytest.raises(DataError, match=r"no text file or folder nowhere\.txt"):
        open_source("nowhere.txt")


def test_a_local_dataset_is_shuffled_by_seed(json_folder: Path) -> None:
    source = open_source(str(json_folder))
    first = list(source.read(1))
    assert sorted(first) == sorted(f"document {i}" for i in range(50))
    assert first == list(source.read(1)) != list(source.read(2))
    assert sorted(open_source(str(json_folder), "heldout").read(0)) == ["one", "two"]


def test_a_dataset_without_a_text_column_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"body": "a", "other": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"no text in column 'text'; its columns are \['body', 'other'\]"):
        list(open_source(str(tmp_path)).read(0))


def test_a_folder_without_data_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read split 'train' of dataset") as caught:
        list(open_source(str(tmp_path)).read(0))
    assert "\n" not in str(caught.value)


def test_the_offline_corpus_is_shuffled_by_seed_and_split() -> None:
    source = open_source("offline", "heldout")
    first = list(source.read(0))
    assert first == list(source.read(0)) != list(source.read(1))
    assert set(first).isdisjoint(open_source("offline").read(0))


def test_the_papers_names_point_to_their_datasets() -> None:
    assert HUB_TEXTS["pile_subset"].path == "ola13/small-the_pile"
    assert (HUB_TEXTS["wikitext2"].path, HUB_TEXTS["wikitext2"].config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert not open_source("wikitext2").separate
    assert open_source("c4").separate
    with pytest.raises(DataError, match="pile_subset has no held-out split"):
        open_source("pile_subset", "heldout")


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="'train' or 'heldout'"):
        open_source("offline", "test")  # type: ignore[arg-type]


def test_a_mixture_takes_as_much_of_each_until_one_ends(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("word " * 8_000, encoding="utf-8")
    (tmp_path / "code.txt").write_text("x = 1\n" * 2_000, encoding="utf-8")
    source = open_source(f"{tmp_path / 'prose.txt'}+{tmp_path / 'code.txt'}")
    pieces = list(source.read(0))
    assert all(len(piece) <= MIXED_CHARACTERS for piece in pieces)
    prose, code = ("".join(piece for piece in pieces if start in piece) for start in ("word", "x = 1"))
    assert code == "x = 1\n" * 2_000
    assert prose == ("word " * 8_000)[: len(prose)]
    assert abs(len(prose) - len(code)) <= MIXED_CHARACTERS
    assert source.name == f"{tmp_path / 'prose.txt'}+{tmp_path / 'code.txt'}"
    assert source.separate


def test_a_plus_in_the_name_of_a_file_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "c++.txt").write_text("one\n", encoding="utf-8")
    assert list(open_source(str(tmp_path / "c++.txt")).read(0)) == ["one\n"]


def test_all_parts_of_a_mixture_have_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text file or folder ./absent.txt"):
        open_source("offline+./absent.txt")
