"""Faults of disks: a full one, and one that fails to write."""

import asyncio
import os
import shutil
from pathlib import Path
from typing import Final

from tests.faults.fault import expect_more_refused
from tests.faults.resources import children
from tests.faults.world import SkippedError, World
from tests.support.connections import UNAVAILABLE
from tests.support.waiting import PATIENCE_SECONDS

DISK_MB: Final = 512
# Longer than the time limit of a request.
DISK_FULL_SECONDS: Final = 5.0
DISKS_FILLED: Final = 2
FAILED_SYNCS: Final = 2
PAGE_BYTES: Final = 4096


async def fill_disk(world: World) -> int:
    filler = world.state_dir / "filler"
    for _ in range(DISKS_FILLED):
        await world.pause()
        refused = world.connections.answers[UNAVAILABLE]
        try:
            _fill(filler)
            await asyncio.sleep(DISK_FULL_SECONDS)
        finally:
            filler.unlink(missing_ok=True)
        expect_more_refused(world, refused)
        await world.load.recovered()
    return DISKS_FILLED


def _fill(filler: Path) -> None:
    """Fill the disk completely while other processes also write to it."""
    step = DISK_MB * 1024 * 1024
    size = 0
    with filler.open("wb") as file:
        while step >= PAGE_BYTES:
            try:
                os.posix_fallocate(file.fileno(), size, step)
                size += step
            except OSError:
                step //= 2


async def fail_fdatasync(world: World) -> int:
    if shutil.which("strace") is None:
        raise SkippedError("strace is not installed")
    server_log = world.state_dir / "postgres.log"
    for times in range(1, FAILED_SYNCS + 1):
        await world.pause()
        attached = [part for pid in children(world.postmaster_pid) for part in ("-p", str(pid))]
        inject = ("-f", "-qq", "-o", "/dev/null", "-e", "inject=fdatasync:error=EIO")
        strace = await asyncio.create_subprocess_exec(
            "strace", *inject, *attached, stderr=asyncio.subprocess.PIPE
        )
        try:
            # strace ends with the processes that it is attached to: they must panic and recover from the disk.
            async with asyncio.timeout(PATIENCE_SECONDS):
                _, said = await strace.communicate()
            if server_log.read_text(encoding="utf-8").count("PANIC") < times:
                raise SkippedError(f"strace cannot make fdatasync fail: {said.decode().strip()}")
        except TimeoutError:
            world.violations.lines.append("commits went on without fdatasync")
        finally:
            if strace.returncode is None:
                strace.kill()
                await strace.wait()
        await world.load.recovered()
    return FAILED_SYNCS
