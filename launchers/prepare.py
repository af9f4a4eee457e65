"""What the organiser makes once before a run: key, run bundle, and the checkpoint of epoch 0. A process of its own,
`python -m launchers.prepare CONFIG OUT`, so that the Ray driver never imports torch. Its last line on standard output
is the checkpoint that the run starts from.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from calm_ray.bundle import open_bundle, seal_bundle
from calm_ray.checkpoint.read import Checkpoint
from calm_ray.checkpoint.write import write_checkpoint
from calm_ray.errors import CalmRayError, CheckpointRejected, ConfigError
from calm_ray.signing import load_or_create_key, public_bytes
from calm_ray.training.model import build_model, parameter_names
from calm_ray.training.prepare import load_bundle_model_config, write_parts
from launchers.organiser import OrganiserConfig, load_organiser
from launchers.output import BUNDLE, CHECKPOINTS, KEY, disk_trouble, newest_epoch


def prepare(config_path: Path, out: Path, *, install: str = "", should_resume: bool = False) -> Path:
    """Write OUT/organiser.key and OUT/bundle; return the checkpoint to start from.

    That is OUT/checkpoints/epoch-00000000, made here; with `should_resume` the newest, if there is one beyond it. A
    bundle of the same run stays as it is, for peers and volunteers have it. Otherwise the tokenizer is the
    checkpoint's: training one is not deterministic.
    """
    config = load_organiser(config_path)
    saved = _newest_checkpoint(out) if should_resume else None
    if saved is not None and saved.epoch >= config.run.num_epochs:
        raise ConfigError(
            f"{saved.folder}: epoch {saved.epoch} is the run's last: finished; --fresh begins anew, raise num_epochs "
            "in [run] to train for longer"
        )
    if should_resume and _is_sealed(out / BUNDLE, config=config, key=load_or_create_key(out / KEY)):
        bundle = out / BUNDLE
    else:
        bundle = _seal(config, config_path=config_path, out=out, saved=saved, install=install)
    if saved is not None:
        from calm_ray.peers.resume import require_same_run

        require_same_run(saved, run=config.run, bundle=bundle)
    if bundle != out / BUNDLE:
        shutil.rmtree(out / BUNDLE, ignore_errors=True)
        bundle.rename(out / BUNDLE)
    return saved.folder if saved is not None else _write_initial(config, out)


def _is_sealed(bundle: Path, *, config: OrganiserConfig, key: Ed25519PrivateKey) -> bool:
    """Whether what lies there is the bundle of this run: whole, of these settings, and signed with this key."""
    try:
        manifest, _ = open_bundle(bundle, organiser_key=public_bytes(key))
    except CalmRayError:
        return False
    return manifest.config_hash == config.run.config_hash()


def _seal(config: OrganiserConfig, *, config_path: Path, out: Path, saved: Checkpoint | None, install: str) -> Path:
    bundle = out / f"{BUNDLE}.new"
    shutil.rmtree(bundle, ignore_errors=True)
    write_parts(
        config.run, config_dir=config_path.resolve().parent, out_dir=bundle,
        tokenizer_dir=saved.folder if saved is not None else None,
    )  # fmt: skip
    seal_bundle(bundle, run=config.run, key=load_or_create_key(out / KEY), install=install)
    return bundle


def _newest_checkpoint(out: Path) -> Checkpoint | None:
    if not newest_epoch(out):
        return None
    from calm_ray.peers.resume import find_checkpoint  # late: it brings hivemind along

    saved = find_checkpoint(out / CHECKPOINTS)
    if saved.epoch == 0:
        raise CheckpointRejected(
            f"{out / CHECKPOINTS}: none after epoch 0 verifies; bring one back from a copy, or begin anew with --fresh"
        )
    return saved


def _write_initial(config: OrganiserConfig, out: Path) -> Path:
    run, bundle = config.run, out / BUNDLE
    model_config = load_bundle_model_config(bundle)
    model = build_model(model_config, seed=run.model.init_seed)
    parameters = dict(model.named_parameters())
    return write_checkpoint(
        out / CHECKPOINTS, epoch=0, run_id=run.run_id, config_hash=run.config_hash(),
        named_parameters={name: parameters[name].detach() for name in parameter_names(model)},
        optimizer_tensors=[], optimizer_metadata=[], model_config=model_config.to_dict(),
        tokenizer_dir=bundle / "tokenizer", keep_last=config.organiser.checkpoint.keep_last,
    )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="launchers.prepare", description=prepare.__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--install", default="", help="the line with which volunteers install this code")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    try:
        print(prepare(args.config, args.out, install=args.install, should_resume=args.resume))
    except CalmRayError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    except OSError as exc:
        error = disk_trouble(exc)
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
