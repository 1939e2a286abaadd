"""What a phone lacks: libraries other than NumPy and Jinja, child processes, some calls of the C library.

There is no phone here: each of these is taken away from this machine instead.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgelm.engine.children import can_start
from edgelm.engine.health import check
from edgelm.files.cursor import Cursor
from edgelm.files.writing import remove_leftovers
from edgelm.memory.platform import current_platform

MIB = 1 << 20
posix = pytest.mark.skipif(os.name != "posix", reason="Windows is no phone")

WITHOUT = """
import sys

MAY = {"edgelm", "edgelm_models", "edgelm_numpy", "numpy", "jinja2", "markupsafe"}
BACKENDS = {"edgelm_llamacpp", "edgelm_mlx", "edgelm_npu", "edgelm_onnx"}
NO_CHILDREN = {"subprocess", "_posixsubprocess", "multiprocessing", "_multiprocessing"}

class Only:
    def __init__(self, finder):
        self._finder = finder
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        there = top in MAY | BACKENDS or top in sys.stdlib_module_names
        return self._finder.find_spec(name, path, target) if there and top not in NO_CHILDREN else None
    def __getattr__(self, name):
        return getattr(self._finder, name)

sys.meta_path[:] = [Only(finder) for finder in sys.meta_path]
for name in NO_CHILDREN & set(sys.modules):
    del sys.modules[name]
sys.executable = ""
"""
LIVE = """
import edgelm
from edgelm.testing import tiny_model

tiny_model("tiny.gguf", "llama")
with edgelm.load("tiny.gguf", memory="200MB", context=128) as model:
    assert model.backend == "numpy", model.backend
    text = model.generate("the end", max_tokens=12)
    model.set_budget("150MB")
    assert model.generate("the end", max_tokens=12) == text
    chat = model.chat(system="Be brief.", keep=True)
    chat.send("hi", max_tokens=4)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    told = chat.save("chat.json")
    assert "xxhash" in told and "only the messages are saved" in told, told
    assert "computed again" in chat.load("chat.json")
    assert model.score("the end").logprobs
    assert len(model.samples("the end", 2, max_tokens=4)) == 2
reasons = {report.name: report.reason for report in edgelm.backends()}
assert reasons["numpy"] is None and reasons["onnx"] and reasons["llamacpp"] and reasons["mlx"], reasons
assert edgelm.doctor()["memory"]["total_bytes"] > 0
try:
    edgelm.pack("tiny.gguf", "tiny.edgelm")
except edgelm.EdgeLMError as error:
    assert "xxhash" in str(error), error
else:
    raise AssertionError("a pack has checksums of xxhash")
"""


def test_numpy_computes_without_any_other_library(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT + LIVE], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@posix
def test_a_c_library_without_preadv2_reads_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, path = os.preadv, tmp_path / "file"
    path.write_bytes(b"0123456789")

    def preadv(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags:
            raise NotImplementedError("preadv2: flags unavailable on this platform")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    fd = os.open(path, os.O_RDONLY)
    try:
        with Cursor(fd, path, 10) as cursor:
            assert cursor.take(10) == b"0123456789"
        with (
            pytest.raises(OSError, match=os.strerror(errno.ENOSYS))
            if sys.platform == "linux"
            else pytest.raises(OSError)
        ):
            current_platform().read(fd, memoryview(bytearray(4)), 0, uncached=True)
    finally:
        os.close(fd)


@posix
def test_leftovers_of_others_stay_while_they_run(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    names = [f"a.{os.getpid()}.partial", "b.1.partial", f"c.{int(ended.stdout)}.partial", f"d.{10**30}.partial"]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names[:2]


def test_without_a_child_a_backend_that_fails_is_a_sentence(
    install_backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_backend("made", "def open(self, n_threads):\n    raise RuntimeError('no such device')\nBackend.open = open")
    monkeypatch.setattr(sys, "executable", "")
    found = check("made")
    assert (found.available, found.broken, found.version) == (False, True, "1.0")
    assert found.reason == "it failed in a trial run: RuntimeError: no such device"


@pytest.mark.parametrize(
    ("executable", "starts"),
    [
        ("/usr/bin/python3.13", True),
        ("/venv/bin/python", True),
        ("C:\\Python\\pythonw.exe" if os.name == "nt" else "/opt/pythonw.exe", True),
        ("/usr/bin/python3.14t", True),
        ("/opt/pypy3.11", True),
        ("/Applications/edgelm demo.app/Contents/MacOS/edgelm demo", False),
        ("/usr/bin/uwsgi", False),
        ("/usr/bin/pythonista", False),
        ("", False),
        (None, False),
    ],
)
def test_an_application_with_python_inside_never_starts_itself_again(
    monkeypatch: pytest.MonkeyPatch, executable: str | None, starts: bool
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    assert can_start() is starts


# --- iOS by substitution


@posix
@pytest.mark.parametrize(
    ("granted", "available", "total"), [(300 << 20, 300 << 20, 340 * MIB), (0, 1 << 30, 1064 << 20)]
)
def test_ios_counts_what_the_application_may_still_have(granted: int, available: int, total: int) -> None:
    from edgelm.memory.platform.ios import IOS
    from edgelm.memory.platform.macos import _HOST_VM_INFO64

    class Grant:
        restype: Any = None

        def __call__(self) -> int:
            assert self.restype is ctypes.c_size_t  # else 4 GB would come out as nothing
            return granted

    class System:
        os_proc_available_memory = Grant()

        def proc_pid_rusage(self, pid: int, flavor: int, usage: Any) -> int:
            usage._obj.ri_phys_footprint = 40 * MIB
            return 0

        def mach_host_self(self) -> int:
            return 7

        def host_statistics64(self, host: int, flavor: int, facts: Any, count: Any) -> int:
            assert flavor == _HOST_VM_INFO64
            facts._obj.free_count = 1024 * MIB // 16384
            return 0

        def sysctlbyname(self, name: bytes, value: Any, size: Any, _new: None, _length: Any) -> int:
            answer = {b"hw.pagesize": 16384, b"hw.memsize": 4 << 30}[name]
            ctypes.memmove(value, answer.to_bytes(8, "little"), 8)
            return 0

    system = IOS(System())
    assert (system.available_bytes(), system.total_bytes()) == (available, total)
    pressure = system.pressure()
    assert (pressure.available_bytes, pressure.total_bytes, pressure.level) == (available, total, 0)


@posix
def test_ios_is_no_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        class os_proc_available_memory:
            restype: Any = None

    monkeypatch.setattr(sys, "platform", "ios")
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: Library)
    assert current_platform.__wrapped__().name == "ios"
