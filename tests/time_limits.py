"""A test that hangs fails by its name and with every thread's stack, wherever it hangs.

pytest-timeout, set up in pyproject.toml, interrupts Python code. It cannot interrupt a thread that is blocked
in C, and it watches no cleaning up after a failure. There the watchdog of faulthandler ends the process, from
a thread in C that needs no lock of Python's; pytest-xdist then reports the test and goes on.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Generator
from typing import Any

import pytest

SLOW_SECONDS = 1800
"""Limit of a test marked slow."""

GRACE = 60.0
"""Seconds for pytest-timeout to end a test before the watchdog does."""

_PR_SET_PDEATHSIG = 1  # of sys/prctl.h

_limit = pytest.StashKey[float]()
_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_stderr] = os.dup(2)  # later it is a file that nobody reads after a crash
    if sys.platform.startswith("linux"):
        os.register_at_fork(after_in_child=_die_with_parent)


def _die_with_parent() -> None:
    """Else a forked child keeps the pipe to pytest-xdist open, which waits for its end."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def pytest_unconfigure(config: pytest.Config) -> None:
    os.close(config.stash[_stderr])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "slow" in item.keywords and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(SLOW_SECONDS))


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> None:
    item.stash[_limit] = settings.timeout


def _watched(item: pytest.Item) -> Generator[None, Any, Any]:
    """Anew for each phase, as a failure ends the watch of the phases before."""
    limit = item.stash.get(_limit, None)  # none with --timeout=0
    if limit is not None:
        faulthandler.dump_traceback_later(limit + GRACE, file=item.config.stash[_stderr], exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _watched(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _watched(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, Any, Any]:
    return (yield from _watched(item))
