# SPDX-License-Identifier: Apache-2.0
"""Trains one run in many processes, each killed by SIGKILL; no test by itself.

``killed_run.py SEED KILLS TRAIN_ARGUMENTS...`` forks a process per attempt. Some are killed from
outside at a random moment, some at the moment a checkpoint's temporary file appears, and some
kill themselves just before the n-th rename or fsync, so that every gap between two steps of
writing a checkpoint is hit. The last attempt is left alone. Prints how many were killed.
"""

import os
import random
import signal
import sys
import time

from msdkern import models, nn  # noqa: F401 - loaded once, before the forks
from msdkern.cli import main
from msdkern.train import loop, report  # noqa: F401


def die_before(name: str, call: int) -> None:
    """Replaces ``os.<name>`` by one that ends this process before its n-th call."""
    original, count = getattr(os, name), 0

    def wrapper(*args):
        nonlocal count
        count += 1
        if count == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(os, name, wrapper)


def attempt(arguments: list[str], plan: tuple | None) -> int:
    """Forks, trains, kills as planned; returns the child's exit status."""
    child = os.fork()
    if child == 0:
        if plan and plan[0] in ("replace", "fsync"):
            die_before(*plan)
        status = 99
        try:
            status = main(["train", *arguments])
        finally:
            os._exit(status)
    if plan and plan[0] == "time":
        time.sleep(plan[1])
        os.kill(child, signal.SIGKILL)
    elif plan and plan[0] == "file":
        while (
            not os.path.exists(plan[1])
            and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        ):
            pass
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(seed: int, kills: int, arguments: list[str]) -> int:
    chance = random.Random(seed)
    temporary = os.path.join(arguments[arguments.index("--out") + 1], "next.pt.tmp")
    killed = 0
    for number in range(kills):
        plans = [
            ("replace", chance.randint(2, 12)),
            ("fsync", chance.randint(2, 12)),
            ("file", temporary),
            ("time", chance.uniform(0.05, 0.6)),
        ]
        status = attempt(arguments, plans[number % len(plans)])
        if status == 0:
            break
        if status != -signal.SIGKILL:
            return 1
        killed += 1
    if attempt(arguments, None) != 0:
        return 1
    print(killed)
    return 0


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
