"""A sandbox for tests, where the machine can run one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.reward.bubblewrap import UnavailableError
from tandem.engine.reward.sandbox import Sandbox

SYSTEM_PYTHON = Path("/usr/bin/python3")


@contextlib.contextmanager
def sandbox_or_skip(**options: Any) -> Iterator[Sandbox]:
    """One worker unless told otherwise. Skips, and says why, where there is no bubblewrap or it may not make namespaces."""
    try:
        opened = Sandbox(**{"num_workers": 1, **options})
    except UnavailableError as error:
        pytest.skip(f"no sandbox on this machine: {error}")
    with opened:
        yield opened
