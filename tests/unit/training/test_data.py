"""The stream of documents: split for ever, mixed by weight, endless, different for each peer."""

import random
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from calm_ray.errors import ConfigError
from calm_ray.tables import DataTable, TextSource
from calm_ray.training.data import (
    is_held_out,
    mix,
    ordered_documents,
    shuffled,
    stream_seed,
    training_documents,
)


def make_data(**values: object) -> DataTable:
    defaults: dict[str, object] = {
        "sources": [{"kind": "files", "paths": ["a.txt"]}],
        "sequence_length": 32,
        "held_out_fraction": 0.25,
        "shuffle_buffer": 16,
    }
    return DataTable.model_validate({**defaults, **values})


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    documents = [f"document number {i}" for i in range(100)]
    (tmp_path / "a.txt").write_text("\n".join(documents), encoding="utf-8")
    return documents


def take(data: DataTable, num: int, *, root: Path, seed: int) -> list[str]:
    return list(islice(training_documents(data, bundle_dir=root, data_root=root, seed=seed), num))


def test_split_is_disjoint_complete_and_of_the_asked_size(tmp_path: Path, corpus: list[str]) -> None:
    data = make_data()
    held_out = list(ordered_documents(data, split="held-out", bundle_dir=tmp_path, data_root=tmp_path))
    training = list(ordered_documents(data, split="training", bundle_dir=tmp_path, data_root=tmp_path))
    assert sorted(held_out + training) == sorted(corpus)
    assert 10 < len(held_out) < 45
    assert not set(held_out) & set(take(data, 500, root=tmp_path, seed=0))


def test_split_does_not_change_with_time_or_surrounding_space() -> None:
    texts = [f"text {i}" for i in range(8)]
    assert [is_held_out(t, fraction=0.5) for t in texts] == [False, False, False, True, False, False, True, True]
    assert all(is_held_out(f" {t}\n", fraction=0.5) == is_held_out(t, fraction=0.5) for t in texts)


def test_stream_seed_differs_by_peer_and_by_boot() -> None:
    seeds = {stream_seed(peer_id=p, boot_id=b) for p in ("p1", "p2") for b in ("b1", "b2")}
    assert len(seeds) == 4
    assert stream_seed(peer_id="p1", boot_id="b1") == stream_seed(peer_id="p1", boot_id="b1")


def test_training_documents_repeat_without_end_in_new_orders(tmp_path: Path, corpus: list[str]) -> None:
    data = make_data()
    num = sum(not is_held_out(document, fraction=0.25) for document in corpus)
    stream = take(data, 3 * num, root=tmp_path, seed=5)
    passes = [stream[i * num : (i + 1) * num] for i in range(3)]
    assert all(set(one) == set(passes[0]) and len(set(one)) == num for one in passes)
    assert passes[0] != passes[1] != passes[2]
    assert stream == take(data, 3 * num, root=tmp_path, seed=5)
    assert stream != take(data, 3 * num, root=tmp_path, seed=6)


def test_training_documents_when_source_has_none_for_training_raise(tmp_path: Path) -> None:
    document = next(f"text {i}" for i in range(100) if is_held_out(f"text {i}", fraction=0.25))
    (tmp_path / "a.txt").write_text(document, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"data.sources\[0\]: no document for training"):
        take(make_data(), 1, root=tmp_path, seed=0)


def test_mixture_follows_the_weights_and_outlives_a_short_stream() -> None:
    streams = [iter(["a"] * 10_000), iter(["b"] * 10_000), iter(["c"] * 3)]
    mixed = mix(streams, weights=[3.0, 1.0, 0.5], rng=random.Random(0))
    counts = Counter(islice(mixed, 8000))
    assert counts["a"] / counts["b"] == pytest.approx(3.0, rel=0.1)
    assert counts["c"] == 3
    assert sum(1 for _ in mixed) == 20_003 - 8000


def test_mixture_of_two_sources_reaches_the_trainer(tmp_path: Path, corpus: list[str]) -> None:
    (tmp_path / "b.txt").write_text("\n".join(f"other {i}" for i in range(50)), encoding="utf-8")
    sources = tuple(TextSource(kind="files", paths=(p,), weight=w) for p, w in (("a.txt", 0.8), ("b.txt", 0.2)))
    documents = take(make_data(sources=sources), 2000, root=tmp_path, seed=1)
    assert sum(document in corpus for document in documents) / 2000 == pytest.approx(0.8, abs=0.05)


def test_shuffled_keeps_every_document_and_holds_no_more_than_the_buffer() -> None:
    taken: list[int] = []

    def numbered():
        for i in range(100):
            taken.append(i)
            yield str(i)

    stream = shuffled(numbered(), buffer_size=10, rng=random.Random(0))
    first = next(stream)
    assert len(taken) <= 11
    rest = list(stream)
    assert sorted([first, *rest], key=int) == [str(i) for i in range(100)]
    assert [first, *rest] != [str(i) for i in range(100)]
