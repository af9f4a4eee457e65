"""`[organiser.*]`: what never leaves the organiser. Peers do not know these types."""

from pathlib import Path

from pydantic import Field, field_validator

from calm_ray.config import Config, load_config, parse_table, read_toml
from calm_ray.tables import Table


class JobTable(Table):
    """`[organiser.job]`: the peers that the Ray job keeps."""

    num_trainers: int = Field(default=2, ge=0)
    """Trainers on the organiser's own machines. Volunteers come on top."""

    num_auxiliary: int = Field(default=2, ge=1)
    """Bootstrap peers that also reduce in every round. Two or more, so that an invite survives the loss of one."""

    num_monitors: int = Field(default=1, ge=1)
    """Peers that read reports and write checkpoints."""

    num_gpus_per_trainer: float = Field(default=0, ge=0)
    """GPUs that Ray reserves for each trainer; 0 trains on the CPU. A part of one, or a whole number."""

    stall_seconds: float = Field(default=600, gt=0)
    """Give up when no epoch completes for this long."""

    adoption_seconds: float = Field(default=3600, ge=0)
    """Auxiliary peers and monitors whose job and cluster have died stay for this long, so that the same command can
    adopt them. Trainers leave at once."""

    @field_validator("num_gpus_per_trainer")
    @classmethod
    def _ray_shares_one_gpu_only(cls, value: float) -> float:
        if value > 1 and not value.is_integer():
            raise ValueError("more than one GPU must be a whole number")
        return value


class CheckpointTable(Table):
    """`[organiser.checkpoint]`: when the monitor writes down the state."""

    every_epochs: int = Field(default=100, ge=1)
    """The last epoch is always written."""

    keep_last: int = Field(default=3, ge=1)
    """Older checkpoints are deleted."""


class OrganiserTable(Table):
    """All of `[organiser]`."""

    job: JobTable = JobTable()
    checkpoint: CheckpointTable = CheckpointTable()


class OrganiserConfig(Config):
    """A whole config file as its organiser knows it."""

    organiser: OrganiserTable = OrganiserTable()


def load_organiser(path: Path) -> OrganiserConfig:
    """Read all three tables; ConfigError names file, key and what is allowed."""
    config = load_config(path)
    values = read_toml(path).get("organiser", {})
    organiser = parse_table(OrganiserTable, values, where=f"{path} [organiser]")
    return OrganiserConfig(run=config.run, peer=config.peer, organiser=organiser)
