"""How the processes of a replica end or are stopped: through what they compute, or from outside."""

from __future__ import annotations

import signal

# Signals that come from outside: the system short of memory, or a person.
FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# psutil's words. A debugger or profiler stops a process, too, and lets it go on.
SIGNALLED = "stopped"
STOPPED = (SIGNALLED, "tracing-stop")


class EngineLost(RuntimeError):
    """An engine has ended through nothing that it computed: it was killed or stopped, or another process of it was."""


def ended_from_outside(code: int) -> EngineLost | None:
    """Told by the exit code of a process."""
    return EngineLost(f"its process was ended by {signal.Signals(-code).name}") if -code in FROM_OUTSIDE else None


def process_state(pid: int) -> str:
    """psutil's word for what a process does: running, sleeping, disk-sleep, stopped, …; gone."""
    import psutil

    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return "gone"
