"""The process that does a peer's work: `python -m calm_ray.peers.child STATUS_FD SPEC_JSON`, which the watchdog calls.

SIGTERM asks it to leave. If a round or a download keeps it longer than GRACE_SECONDS it leaves without goodbye: its
groupmates then treat it like a peer whose line was cut.
"""

import faulthandler
import logging
import os
import resource
import signal
import sys
import threading
from functools import partial

from calm_ray.errors import CalmRayError, DiskTrouble
from calm_ray.parent import end_with_parent
from calm_ray.peers.context import PeerContext
from calm_ray.peers.endings import disk_words, is_disk_trouble
from calm_ray.peers.process import DUMP_SIGNAL
from calm_ray.peers.spec import NUM_FILES, PeerSpec

logger = logging.getLogger(__name__)

GRACE_SECONDS = 6.0


def main(status_fd: int, spec: PeerSpec) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stdout)
    faulthandler.register(DUMP_SIGNAL, all_threads=True, chain=False)  # to stderr, which is our log
    _raise_file_limit()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would take cores that [peer] num_threads left free
    context = PeerContext(spec, status_fd=status_fd)
    _leave_on_sigterm(context.stop)
    end_with_parent(on_death=partial(_leave_in_time, context.stop))
    code = 1
    try:
        _run_role(context)
        code = 0
    except CalmRayError as exc:
        logger.error("%s", exc)
        context.fail(str(exc))
        code = exc.exit_code
    except Exception as exc:
        if isinstance(exc, OSError) and is_disk_trouble(exc):
            words = f"{exc.filename or spec.folder}: {disk_words(exc)}"
            logger.error("%s", words)
            context.fail(words)
            code = DiskTrouble.exit_code
        else:
            logger.exception("unexpected")
            context.fail(f"{type(exc).__name__}: {exc} (this is a bug: please send us {spec.log_path})")
    finally:
        # hivemind's goodbyes may hang on a dead peer; everything forked from here dies with this process anyway.
        threading.Timer(GRACE_SECONDS, os._exit, args=(code,)).start()
        context.close()
    return code


def _run_role(context: PeerContext) -> None:
    if context.spec.role == "trainer":
        from calm_ray.peers.trainer import run
    elif context.spec.role == "auxiliary":
        from calm_ray.peers.auxiliary import run
    else:
        from calm_ray.peers.monitor import run
    run(context)


def _leave_on_sigterm(stop: threading.Event) -> None:
    def handler(*_: object) -> None:
        if not stop.is_set():
            stop.set()
            timer = threading.Timer(GRACE_SECONDS, os._exit, args=(0,))
            timer.daemon = True
            timer.start()

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the watchdog, which asks us politely


def _leave_in_time(stop: threading.Event) -> None:
    """For the thread that sees our watchdog die: SIGTERM may wait for the end of a long micro-batch, this does not."""
    stop.set()
    threading.Event().wait(GRACE_SECONDS)


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = NUM_FILES if hard == resource.RLIM_INFINITY else min(NUM_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    code = main(int(sys.argv[1]), PeerSpec.model_validate_json(sys.argv[2]))
    sys.stdout.flush()
    os._exit(code)  # non-daemon threads of hivemind must not hold the process
