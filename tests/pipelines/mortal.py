"""The command line in a process that is killed as it commits a file, which happens at every seam of a run.

    python -m tests.pipelines.mortal before|after GLOB TIMES ARGUMENT...

SIGKILL comes before, or after, a file below the working directory that fits GLOB takes its place for the TIMES-th time.
"""

import os
import signal
import sys
from fnmatch import fnmatch
from pathlib import Path

from pipelines import process

process.available_cpus = lambda: 1  # one thread, as in the other tests, to the last bit


def _die_at(when: str, pattern: str, times: int) -> None:
    commit = Path.replace
    seen = 0

    def mortal(temporary: Path, path: Path) -> Path:
        nonlocal seen
        meant = fnmatch(os.path.relpath(path), pattern)
        seen += meant
        if meant and seen == times and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        done = commit(temporary, path)
        if meant and seen == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    Path.replace = mortal  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    when, pattern, times, *arguments = sys.argv[1:]
    _die_at(when, pattern, int(times))
    from pipelines.cli import main

    main(arguments)
