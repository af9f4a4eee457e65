"""What the run was worth: the written checkpoint on held-out text, before and after, beside two plain marks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from calm_ray.errors import CalmRayError


def evaluate(checkpoint: Path, bundle: Path) -> dict[str, Any]:
    """Measure a checkpoint in a short process of its own; the fields of `calm_ray.training.evaluate.Evaluation`."""
    done = subprocess.run(
        [sys.executable, "-m", "calm_ray.training.evaluate", str(checkpoint), str(bundle), "--json"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last_line = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise CalmRayError(f"evaluation of {checkpoint} failed: {last_line}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def print_verdict(*, before: dict[str, Any] | None, after: dict[str, Any], checkpoint: Path) -> None:
    """Losses before, if they are known, and after, and the lines that load the model."""
    console = Console()
    start, unigram = after["ln_vocab_size"], after["unigram_loss"]
    closed = (start - after["mean_mlm_loss"]) / (start - unigram)
    table = Table(
        title=f"Held-out text: {after['num_sequences']} sequences, {after['num_masked_tokens']} masked tokens"
    )
    for name in ("", "before", "after"):
        table.add_column(name, justify="left" if not name else "right")
    for what, key in (("MLM loss", "mean_mlm_loss"), ("SOP loss", "mean_sop_loss"), ("SOP accuracy", "sop_accuracy")):
        table.add_row(what, f"{before[key]:.3f}" if before is not None else "", f"{after[key]:.3f}")
    table.add_row("knowing nothing: ln(vocabulary)", f"{start:.3f}", "")
    table.add_row("knowing each token's frequency", f"{unigram:.3f}", "")
    console.print(table)
    console.print(f"Of the way from knowing nothing to knowing frequencies, MLM has gone {100 * closed:.0f} %.")
    console.print("\nThe checkpoint loads with transformers alone:\n", highlight=False)
    # Not through rich: it would wrap the paths, and these lines are to be copied.
    print(f'  AlbertForPreTraining.from_pretrained("{checkpoint}")')
    print(f'  AutoTokenizer.from_pretrained("{checkpoint}")', flush=True)
