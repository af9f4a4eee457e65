"""What can go wrong, sorted by what the caller should do about it.

Every type here carries a message meant for a person: what happened, where, and what to do now. The command line prints
that message alone, without a traceback, and exits with `exit_code`.
"""


class CalmRayError(Exception):
    """Base of all errors that a user or an operator can act upon."""

    exit_code = 1


class ConfigError(CalmRayError):
    """A config file, an invite or an argument is wrong: edit it. Names file, key and what is allowed."""

    exit_code = 2


class SwarmUnreachable(CalmRayError):
    """No bootstrap peer answered: check the network, retry with back-off. Carries a verdict for each address."""

    exit_code = 3


class StateUnavailable(CalmRayError):
    """No peer could give us the swarm's training state: stay out of averaging and retry."""

    exit_code = 4


class VersionMismatch(CalmRayError):
    """Our code cannot take part in this run: install the version that the message names."""

    exit_code = 5


class DiskTrouble(CalmRayError):
    """A disk is full or has become read-only: try again when somebody has made room."""

    exit_code = 7


class Moved(CalmRayError):
    """This machine's addresses have changed: join again, for others look for us where we were."""

    exit_code = 8


class CheckpointRejected(CalmRayError):
    """A checkpoint is incomplete, altered or not finite: keep the previous one."""

    exit_code = 6
