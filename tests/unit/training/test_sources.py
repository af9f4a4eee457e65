"""Text comes from the bundle, from files, or from a stream that may break; each mistake is named with its remedy."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calm_ray.errors import CalmRayError, ConfigError
from calm_ray.tables import TextSource
from calm_ray.training.builtin import builtin_documents, clean_paragraph
from calm_ray.training.sources import (
    bundle_text_path,
    organiser_documents,
    peer_documents,
    retry_stream,
    write_documents,
)


def files(**values: Any) -> TextSource:
    return TextSource.model_validate({"kind": "files", **values})


def read(source: TextSource, *, root: Path, seed: int | None = None) -> list[str]:
    return list(peer_documents(source, index=0, bundle_dir=root, data_root=root, seed=seed))


def test_builtin_documents_are_prose_and_never_twice() -> None:
    documents = list(builtin_documents())
    assert len(documents) > 200
    assert len(set(documents)) == len(documents)
    text = "\n".join(documents)
    for mark in ("::=", ">>>", "***", "===", '"'):
        assert mark not in text
    assert all("\n" not in document for document in documents)


@pytest.mark.parametrize(
    "block",
    [
        "Naming and binding\n******************",
        "   if x is in the list:\n      y = f(x)[0]",
        'stmt ::= "del" target_list',
    ],
)
def test_clean_paragraph_when_not_prose_returns_none(block: str) -> None:
    assert clean_paragraph(block) is None


def test_clean_paragraph_removes_markup() -> None:
    block = '* A *scope* defines the visibility of a "name"\n  within a block. [1]'
    assert clean_paragraph(block) == "A scope defines the visibility of a name within a block."


def test_files_by_line_and_by_paragraph_give_the_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\nthree", encoding="utf-8")
    assert read(files(paths=["*.txt"]), root=tmp_path) == ["one", "two", "three"]
    assert read(files(paths=["*.txt"], layout="paragraph"), root=tmp_path) == ["one", "two\nthree"]


@pytest.mark.parametrize("layout", ["line", "paragraph"])
def test_files_from_a_random_start_give_every_document_once(tmp_path: Path, layout: str) -> None:
    expected = [f"document {i} {'আমি ' * (i % 7)}".strip() for i in range(50)]
    (tmp_path / "a.txt").write_text(("\n" if layout == "line" else "\n\n").join(expected), encoding="utf-8")
    orders = [read(files(paths=["a.txt"], layout=layout), root=tmp_path, seed=seed) for seed in range(20)]
    assert all(sorted(order) == sorted(expected) for order in orders)
    assert len({order[0] for order in orders}) > 5


def test_files_when_pattern_matches_nothing_names_pattern_folder_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"'\*\.txt' matches no file in {tmp_path}.*put the text there"):
        read(files(paths=["*.txt"]), root=tmp_path)


def test_files_when_all_are_empty_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match="every file is empty"):
        read(files(paths=["*.txt"]), root=tmp_path)


def test_files_when_not_utf8_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigError, match=r"a\.txt: not UTF-8"):
        read(files(paths=["a.txt"]), root=tmp_path)


@pytest.mark.parametrize("pattern", ["../secret.txt", "/etc/passwd", "x/../../y"])
def test_files_when_a_run_points_outside_data_root_are_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(ConfigError, match="leaves \\[peer\\] data_root"):
        read(files(paths=[pattern]), root=tmp_path)


def test_bundled_text_when_missing_says_to_fetch_the_bundle_again(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fetch the bundle again"):
        read(TextSource(kind="builtin"), root=tmp_path)


def test_bundled_text_survives_the_round_trip(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one\n  two  \n\n\nthree", encoding="utf-8")
    source = files(paths=["in/a.txt"], layout="paragraph", in_bundle=True)
    written = list(organiser_documents(source, config_dir=tmp_path))
    assert write_documents(iter(written), bundle_text_path(tmp_path, 0)) == 2
    assert read(source, root=tmp_path) == written == ["one\ntwo", "three"]


class FlakyStream:
    """Breaks after each `good` documents, `num_failures` times."""

    def __init__(self, *, good: int, num_failures: int) -> None:
        self.good, self.num_failures = good, num_failures

    def __call__(self, attempt: int) -> Iterator[str]:
        for i in range(self.good):
            yield f"{attempt}.{i}"
        if attempt < self.num_failures:
            raise OSError("connection reset")


def test_retry_stream_when_it_breaks_now_and_then_goes_on() -> None:
    waits: list[float] = []
    documents = list(retry_stream(FlakyStream(good=2, num_failures=9), what="x", max_failures=2, wait=waits.append))
    assert len(documents) == 20
    assert waits == [2.0] * 9


def test_retry_stream_when_it_never_works_gives_up_with_the_cause() -> None:
    waits: list[float] = []
    with pytest.raises(CalmRayError, match=r"x: failed 3 times in a row \(connection reset\)"):
        list(retry_stream(FlakyStream(good=0, num_failures=99), what="x", max_failures=3, wait=waits.append))
    assert waits == [2.0, 4.0]


def test_retry_stream_when_the_name_is_wrong_raises_at_once() -> None:
    def wrong(attempt: int) -> Iterator[str]:
        raise ConfigError(f"no such data set {attempt}")

    waits: list[float] = []
    with pytest.raises(ConfigError, match="no such data set 0"):
        next(retry_stream(wrong, what="x", wait=waits.append))
    assert waits == []


def test_hub_source_reads_a_data_set_and_names_a_missing_column(tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(20)]
    random.Random(0).shuffle(rows)
    (tmp_path / "data.jsonl").write_text("".join(f'{{"body": "{row}"}}\n' for row in rows), encoding="utf-8")
    source = TextSource(kind="hub", dataset=str(tmp_path), text_field="body")
    assert read(source, root=tmp_path) == rows
    assert sorted(read(source, root=tmp_path, seed=1)) == sorted(rows)
    with pytest.raises(ConfigError, match="no column 'text'; its columns: body"):
        read(TextSource(kind="hub", dataset=str(tmp_path)), root=tmp_path)
