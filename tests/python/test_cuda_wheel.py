"""A wheel with the CUDA backend: it needs no driver, and says what it lacks.

That nvcc on PATH brings the backend into a wheel is tried by tests/install/try_install.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from spmoe import _core

pytestmark = pytest.mark.skipif(
    "without CUDA" in _core.cuda_status()[1], reason="this wheel was built without CUDA"
)

ASK = """
import json
from spmoe import _core
print(json.dumps(_core.cuda_status()))
"""


def test_a_wheel_with_cuda_says_why_it_cannot_use_it() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # as on a machine without a GPU
    asked = subprocess.run(
        [sys.executable, "-c", ASK], env=hidden, capture_output=True, text=True, check=True
    )
    count, reason = json.loads(asked.stdout)
    assert count == 0
    assert "no CUDA driver" in reason or "no CUDA device" in reason
    assert 'device="host"' in reason


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf to list libraries with")
def test_the_wheel_links_no_library_of_cuda() -> None:
    listed = subprocess.run(
        ["readelf", "--dynamic", _core.__file__], capture_output=True, text=True, check=True
    )
    needed = [line for line in listed.stdout.splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if "libcuda" in line]
