"""Does a cold start continue the loss curve? Train, kill everyone, start from the checkpoint, train on, and draw it.

    python -m benchmarks.resume_curve docs/cold-start.svg --folder /tmp/cold-start

It does what an organiser would: `python -m launchers.job`, SIGKILL to every process once epoch 20 is written down, then
the same command again. The model and its text are those of runs/demo.toml. Two losses are drawn: the
trainers' own, epoch by epoch from the monitors' feeds, and that of the written checkpoints on held-out text.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.resume_plot import Curves, draw
from calm_ray.checkpoint.manifest import folders
from calm_ray.observe.feed import FeedReader
from calm_ray.observe.ingest import PEER_EPOCH
from launchers.output import BUNDLE, CHECKPOINTS, live_peers, newest_epoch
from tests.shards import ROOT

KILL_AT, NUM_EPOCHS = 20, 40
CHANGES = {
    "num_epochs = 30": f"num_epochs = {NUM_EPOCHS}",
    "every_epochs = 10": "every_epochs = 1",
    "keep_last = 3": f"keep_last = {2 * NUM_EPOCHS}",
    "target_batch_size = 1024": "target_batch_size = 512",
    "\nlearning_rate = 3e-3": "\nlearning_rate = 6e-4",  # slower, so that the loss still falls when everyone is killed
}
"""Of runs/demo.toml."""
LIFE_SECONDS = 1800.0


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.resume_curve", description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path)
    parser.add_argument("--folder", type=Path, required=True, help="for the run; the same one again draws it again")
    args = parser.parse_args()
    data = args.folder / "curves.json"
    if not data.is_file():
        args.folder.mkdir(parents=True)
        data.write_text(json.dumps(_measure(args.folder)))
    curves = Curves(**json.loads(data.read_text()))
    args.picture.write_text(draw(curves))
    for name, points in (("first life", curves.first), ("second life", curves.second), ("held out", curves.held_out)):
        print(name, " ".join(f"{epoch}:{loss:.3f}" for epoch, loss in points))
    print(f"went on at epoch {curves.resumed_at}; {args.picture} is drawn")


def _measure(folder: Path) -> dict[str, Any]:
    config, out = folder / "run.toml", folder / "out"
    text = (ROOT / "runs" / "demo.toml").read_text()
    for old, new in CHANGES.items():
        assert text.count(old) == 1, f"runs/demo.toml has changed: {old!r}"
        text = text.replace(old, new)
    config.write_text(text)

    job = _start_job(config, out)
    deadline = time.monotonic() + LIFE_SECONDS
    while newest_epoch(out) < KILL_AT:
        assert job.poll() is None and time.monotonic() < deadline, f"see {folder}/job.log"
        time.sleep(0.2)
    _kill_all(job, out)
    resumed_at = newest_epoch(out)
    feed = out / "peers" / "monitor-0" / "feed.sqlite"
    first = _losses(feed)
    for path in feed.parent.glob("feed.sqlite*"):  # epochs that are done again would be taken for those of before
        path.unlink()

    assert _start_job(config, out).wait(LIFE_SECONDS) == 0, f"see {folder}/job.log"
    return {
        "first": first,
        "second": _losses(feed),
        "held_out": list(_held_out(out)),
        "resumed_at": resumed_at,
        **_marks(out),
    }


def _start_job(config: Path, out: Path) -> subprocess.Popen[bytes]:
    with (out.parent / "job.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launchers.job", config, "--out", out],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT,
        )  # fmt: skip


def _kill_all(job: subprocess.Popen[bytes], out: Path) -> None:
    """The job and its Ray, and the peers, which are nobody's children."""
    tops = [psutil.Process(pid) for pid in (job.pid, *(peer.pid for peer in live_peers(out).values()))]
    tree = [process for top in tops for process in (top, *top.children(recursive=True))]
    for process in tree:
        if process.is_running():
            process.send_signal(signal.SIGKILL)
    job.wait()
    psutil.wait_procs(tree, timeout=30)


def _losses(feed: Path) -> list[tuple[int, float]]:
    """(epoch, mean loss of the trainers that took part), in order."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    after = 0
    with FeedReader(feed) as reader:
        while events := reader.events(after=after):
            after = events[-1].seq
            for event in events:
                if event.kind == PEER_EPOCH:
                    total = sums[event.payload["epoch"]]
                    total[0] += event.payload["mlm_loss_sum"]
                    total[1] += event.payload["mini_steps"]
    return [(epoch, total / number) for epoch, (total, number) in sorted(sums.items())]


def _held_out(out: Path) -> Iterator[tuple[int, float]]:
    from calm_ray.training.evaluate import evaluate

    for epoch, checkpoint in sorted(folders(out / CHECKPOINTS)):
        yield epoch, evaluate(checkpoint, out / BUNDLE).mean_mlm_loss


def _marks(out: Path) -> dict[str, float]:
    from calm_ray.training.evaluate import evaluate

    _, checkpoint = folders(out / CHECKPOINTS)[0]
    found = evaluate(checkpoint, out / BUNDLE)
    return {"uniform": found.ln_vocab_size, "unigram": found.unigram_loss}


if __name__ == "__main__":
    main()
