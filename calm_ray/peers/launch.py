"""Start a watchdog that is nobody's child: `python -m calm_ray.peers.launch OUTPUT ARGUMENT...`

A Ray worker takes its children along when it ends, and an auxiliary peer has to outlive it. So this process forks once
more, leaves its parent's session, and ends; the watchdog belongs to init. Prints the watchdog's pid.
"""

import os
import sys


def main(output: str, arguments: list[str]) -> None:
    try:
        null, file = os.open(os.devnull, os.O_RDWR), os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        pid = os.fork()  # one thread, nothing heavy imported
    except OSError as exc:
        sys.exit(f"{exc.filename or 'no new process'}: {exc.strerror}")
    if pid:
        sys.stdout.write(f"{pid}\n")
        return
    os.setsid()
    for target, source in ((0, null), (1, file), (2, file)):  # a file, not a pipe: an orphan would hang its reader
        os.dup2(source, target)
    os.execv(sys.executable, [sys.executable, "-m", "calm_ray", *arguments])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
