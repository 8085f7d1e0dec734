"""A rank's large imports, and its exit."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from lbr_dist.ranks.process import large_imports


def test_the_garbage_collector_pauses_and_works_again() -> None:
    with pytest.raises(KeyError), large_imports():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_exit_handlers_are_called() -> None:
    code = (
        "import atexit, sys; from lbr_dist.ranks.process import leave; atexit.register(print, 'called'); "
        "print('said'); sys.stderr.write('complained'); leave(75)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (75, "said\ncalled\n", "complained")
