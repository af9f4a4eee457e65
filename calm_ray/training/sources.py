"""Read one source of the mixture: a pass over its documents, in order or from a random start.

Small corpora come out of the run bundle on every machine, never from the local Python, whose texts differ between its
versions. Large ones come from the trainer's own disk or from the Hub, as a stream.
"""

import glob
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from calm_ray.errors import CalmRayError, ConfigError
from calm_ray.tables import TextSource
from calm_ray.training.builtin import builtin_documents

log = logging.getLogger(__name__)

MAX_STREAM_FAILURES = 5
"""Failures in a row before a Hub stream is given up; with the waits between them, about a minute."""


def is_bundled(source: TextSource) -> bool:
    """Whether the source's text travels in the run bundle."""
    return source.kind == "builtin" or (source.kind == "files" and source.in_bundle)


def bundle_text_path(bundle_dir: Path, index: int) -> Path:
    """Where the text of the source at `index` of `data.sources` lies: documents separated by blank lines."""
    return bundle_dir / "text" / f"{index}.txt"


def organiser_documents(source: TextSource, *, config_dir: Path) -> Iterator[str]:
    """One pass in order, as the organiser reads it while making the bundle; paths are relative to the config file."""
    if source.kind == "builtin":
        return builtin_documents()
    if source.kind == "hub":
        return _hub_documents(source, seed=None)
    return _read_files(_expand(source, root=config_dir, root_name="the config file's folder"), source, rng=None)


def peer_documents(
    source: TextSource, *, index: int, bundle_dir: Path, data_root: Path, seed: int | None
) -> Iterator[str]:
    """One pass as a peer reads it: from a random start if there is a `seed`, else in order.

    A volunteer who stays for an hour never reaches the end of a large file. Were all to begin at the front, nobody
    would ever see the rest.
    """
    rng = None if seed is None else random.Random(seed)
    if is_bundled(source):
        path = bundle_text_path(bundle_dir, index)
        if not path.is_file():
            raise ConfigError(f"{path}: the run bundle lacks this text; delete the folder and fetch the bundle again")
        return _rotated(path, layout="paragraph", rng=rng)
    if source.kind == "hub":
        return _hub_documents(source, seed=seed)
    for pattern in source.paths:
        # The run's author chose the pattern, the file is the volunteer's: a run must not read what lies elsewhere.
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise ConfigError(f"data.sources[{index}].paths: {pattern!r} leaves [peer] data_root; use a relative path")
    return _read_files(_expand(source, root=data_root, root_name="[peer] data_root"), source, rng=rng)


def write_documents(documents: Iterator[str], path: Path) -> int:
    """Write the bundle's text file; return the number of documents. Blank lines separate, so none may be inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    num_documents = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            lines = [line.strip() for line in document.splitlines() if line.strip()]
            if lines:
                file.write("\n".join(lines) + "\n\n")
                num_documents += 1
    return num_documents


def _expand(source: TextSource, *, root: Path, root_name: str) -> list[Path]:
    paths: list[Path] = []
    for pattern in source.paths:
        found = [Path(p) for p in sorted(glob.glob(os.path.join(root, pattern), recursive=True)) if Path(p).is_file()]
        if not found:
            raise ConfigError(
                f"data.sources.paths: {pattern!r} matches no file in {root.resolve()} ({root_name}); put the text "
                "there, or correct the pattern"
            )
        paths += found
    if not any(path.stat().st_size for path in paths):
        raise ConfigError(f"data.sources.paths: {', '.join(source.paths)} in {root.resolve()}: every file is empty")
    return paths


def _read_files(paths: list[Path], source: TextSource, *, rng: random.Random | None) -> Iterator[str]:
    order = list(paths)
    if rng is not None:
        rng.shuffle(order)
    for path in order:
        yield from _rotated(path, layout=source.layout, rng=rng)


def _rotated(path: Path, *, layout: str, rng: random.Random | None) -> Iterator[str]:
    """Read the file from a random document to the end, then from the front up to that document."""
    size = path.stat().st_size
    target = rng.randrange(size) if rng is not None and size else 0
    start = 0
    with path.open("rb") as file:
        if target:
            file.seek(target)
            start = _skip_to_document(file, layout=layout)
        yield from _documents(file, path, layout=layout, stop=None)
        if start:
            file.seek(0)
            yield from _documents(file, path, layout=layout, stop=start)


def _skip_to_document(file, *, layout: str) -> int:
    """Move on to the start of the next document and return its offset in bytes."""
    while line := file.readline():
        if layout == "line" or not line.strip():
            break
    return file.tell()


def _documents(file, path: Path, *, layout: str, stop: int | None) -> Iterator[str]:
    """Documents from the current position up to the byte offset `stop`, itself the start of one."""
    lines: list[str] = []
    while stop is None or file.tell() < stop:
        raw = file.readline()
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as exc:
            raise ConfigError(f"{path}: not UTF-8 near byte {file.tell()}: {exc.reason}; convert the file") from exc
        if line:
            lines.append(line)
        if lines and (layout == "line" or not line):
            yield "\n".join(lines)
            lines = []
        if not raw:
            return
    if lines:
        yield "\n".join(lines)


def _hub_documents(source: TextSource, *, seed: int | None) -> Iterator[str]:
    num_read = 0

    def open_stream(attempt: int) -> Iterator[str]:
        """In fixed order, a broken stream goes on where it broke; in random order it starts anew, elsewhere."""
        nonlocal num_read
        stream = _open_hub(source, seed=None if seed is None else seed + attempt)
        for document in islice(stream, num_read if seed is None else 0, None):
            num_read += 1
            yield document

    return retry_stream(open_stream, what=f"data set {source.dataset}")


def retry_stream(
    open_stream: Callable[[int], Iterator[str]],
    *,
    what: str,
    max_failures: int = MAX_STREAM_FAILURES,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """Yield from `open_stream(attempt)`; on an error open it again, until `max_failures` in a row.

    Raise ConfigError at once: waiting does not mend a wrong name.
    """
    failures = attempt = 0
    while True:
        try:
            for document in open_stream(attempt):
                failures = 0
                yield document
            return
        except ConfigError:
            raise
        except Exception as exc:  # the stream's own boundary: HTTP, parquet and JSON libraries raise what they like
            failures += 1
            log.warning("stream=%r failures=%d error=%r", what, failures, exc, exc_info=True)
            if failures >= max_failures:
                raise CalmRayError(f"{what}: failed {failures} times in a row ({exc}); check the network") from exc
        attempt += 1
        wait(2.0**failures)


def _open_hub(source: TextSource, *, seed: int | None) -> Iterator[str]:
    import datasets

    where = f"data.sources: data set {source.dataset!r}"
    try:
        stream = datasets.load_dataset(
            source.dataset, source.dataset_config, split=source.split, revision=source.revision, streaming=True
        )
    except (datasets.exceptions.DatasetNotFoundError, ValueError) as exc:
        raise ConfigError(f"{where}: {exc}; check dataset, dataset_config, split and revision") from exc
    except RuntimeError as exc:
        if "scripts are no longer supported" not in str(exc):
            raise
        raise ConfigError(f'{where} is a script; try revision = "refs/convert/parquet"') from exc
    if seed is not None:
        stream = stream.shuffle(seed=seed, buffer_size=1)  # the order of shards; our own buffer mixes documents
    for row in stream:
        if source.text_field not in row:
            raise ConfigError(f"{where} has no column {source.text_field!r}; its columns: {', '.join(row)}")
        if text := str(row[source.text_field]).strip():
            yield text
