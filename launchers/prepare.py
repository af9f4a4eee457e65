"""What the organiser makes once before a run: key, run bundle, and the checkpoint of epoch 0. A process of its own,
`python -m launchers.prepare CONFIG OUT`, so that the Ray driver never imports torch.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from calm_ray.bundle import seal_bundle
from calm_ray.checkpoint.write import write_checkpoint
from calm_ray.errors import CalmRayError
from calm_ray.signing import load_or_create_key
from calm_ray.training.model import build_model, parameter_names
from calm_ray.training.prepare import load_bundle_model_config, write_parts
from launchers.organiser import load_organiser
from launchers.output import BUNDLE, CHECKPOINTS, KEY


def prepare(config_path: Path, out: Path, *, install: str = "") -> None:
    """Write OUT/organiser.key, OUT/bundle and OUT/checkpoints/epoch-00000000."""
    config = load_organiser(config_path)
    run, bundle = config.run, out / BUNDLE
    bundle.mkdir(parents=True, exist_ok=True)
    write_parts(run, config_dir=config_path.resolve().parent, out_dir=bundle)
    seal_bundle(bundle, run=run, key=load_or_create_key(out / KEY), install=install)
    model_config = load_bundle_model_config(bundle)
    model = build_model(model_config, seed=run.model.init_seed)
    parameters = dict(model.named_parameters())
    write_checkpoint(
        out / CHECKPOINTS, epoch=0, run_id=run.run_id, config_hash=run.config_hash(),
        named_parameters={name: parameters[name].detach() for name in parameter_names(model)},
        optimizer_tensors=[], optimizer_metadata=[], model_config=model_config.to_dict(),
        tokenizer_dir=bundle / "tokenizer", keep_last=config.organiser.checkpoint.keep_last,
    )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    try:
        prepare(Path(argv[0]), Path(argv[1]), install=argv[2] if len(argv) > 2 else "")
    except CalmRayError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
