"""`calm-ray peer`: one peer of any role under its watchdog."""

import argparse
import json
import logging
import sys
from functools import partial

from calm_ray.config import load_peer_table, parse_table
from calm_ray.errors import ConfigError
from calm_ray.invite import decode_invite
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus
from calm_ray.peers.watchdog import Watchdog
from calm_ray.swarm.addresses import check_listen

logger = logging.getLogger(__name__)


def run_peer(args: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    spec = _spec(args)
    preflight = partial(check_listen, spec.peer.listen, spec.peer.announce)
    watchdog = Watchdog(spec, on_status=_Printer(), preflight=preflight)
    code = watchdog.run()
    if watchdog.status.error:
        print(f"calm-ray: {watchdog.status.error}", file=sys.stderr)
    return code


def _spec(args: argparse.Namespace) -> PeerSpec:
    if args.spec:
        try:
            return parse_table(PeerSpec, json.loads(args.spec), where="--spec")
        except ValueError as exc:
            raise ConfigError(f"--spec: not JSON: {exc}") from exc
    if args.folder is None:
        raise ConfigError("--folder is missing: every peer needs one of its own")
    if args.invite:
        decode_invite(args.invite)  # a bad one should fail here, not in the child's log
    values = {
        "role": args.role, "folder": args.folder.resolve(), "bundle": args.bundle and args.bundle.resolve(),
        "invite": args.invite, "peer": load_peer_table(args.config), "reach": args.reach,
        "resume": args.resume and args.resume.resolve(),
    }  # fmt: skip
    return parse_table(PeerSpec, values, where="calm-ray peer")


class _Printer:
    """One line whenever the state or its explanation changes."""

    def __init__(self) -> None:
        self._last = ("", "")

    def __call__(self, status: PeerStatus) -> None:
        now = (status.state, status.detail)
        if now != self._last:
            self._last = now
            logger.info("state=%s %s", status.state, status.detail)
