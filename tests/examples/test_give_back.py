"""Giving memory back when asked: less is resident, the answer is the same, and later all of it is taken again."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm.sizes import MB
from edgelm.testing import tiny_model

if not hasattr(signal, "SIGUSR1"):
    pytest.skip("this system has no SIGUSR1", allow_module_level=True)
from edgelm_examples import give_back

Load = Callable[..., edgelm.Model]
QUESTION = "What is a compiler?"


def resident_mb(pid: int) -> float:
    if sys.platform != "linux":
        import psutil

        return float(psutil.Process(pid).memory_info().rss) / MB
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) * 1024 / MB


class Talk:
    """A running example: questions go in, answers and what it says of memory come out."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        self.pid, self._in, self._out, self._err = child.pid, child.stdin, child.stdout, child.stderr

    def ask(self, question: str) -> str:
        """Return the answer: what is printed until the line on its memory."""
        print(question, file=self._in, flush=True)
        told = self.told("MB of ")
        assert "tok/s" in told
        return self._printed()

    def told(self, what: str) -> str:
        """Return the next line that holds these words."""
        for line in self._err:
            if what in line:
                return line.strip().strip("[]")
        raise AssertionError(f"it ended without a word of {what!r}")

    def _printed(self) -> str:
        os.set_blocking(self._out.fileno(), False)
        return self._out.read()


@contextmanager
def talking(child: subprocess.Popen[str]) -> Iterator[Talk]:
    try:
        yield Talk(child)
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(30) == 0
    finally:
        child.kill()
        for pipe in (child.stdin, child.stdout, child.stderr):
            assert pipe is not None
            pipe.close()
        child.wait()


def gives_back_and_takes_again(talk: Talk, least_mb: float) -> None:
    answer = talk.ask(QUESTION)
    full_mb = resident_mb(talk.pid)
    os.kill(talk.pid, signal.SIGUSR1)
    told = talk.told("budget ")
    small_mb = resident_mb(talk.pid)
    print(f"{full_mb:.1f} MB resident, after SIGUSR1 {small_mb:.1f} MB ({told})")
    assert full_mb - small_mb > least_mb
    assert talk.ask(QUESTION) == answer
    budget_mb = float(told.split()[-2])
    assert resident_mb(talk.pid) <= budget_mb + 1  # the line is rounded
    os.kill(talk.pid, signal.SIGUSR2)
    talk.told("budget ")
    assert talk.ask(QUESTION) == answer
    assert resident_mb(talk.pid) > full_mb - 10


@pytest.mark.slow
def test_a_signal_makes_the_process_smaller_and_another_larger_again(
    tmp_path: Path, example: Callable[..., subprocess.Popen[str]]
) -> None:
    shape: dict[str, Any] = {"n_layers": 8, "n_embd": 512, "n_heads": 8, "n_kv_heads": 4, "head_dim": 64, "n_ff": 2048}
    path = tiny_model(tmp_path / "large.gguf", "llama", n_vocab=2048, **shape)
    with talking(example("give_back", path, "--memory", "400MB", "--context", 128, "--max-tokens", 8)) as talk:
        talk.told("ready, process ")
        gives_back_and_takes_again(talk, least_mb=60)


@pytest.mark.slow
def test_a_real_model_gives_back_most_of_its_weights(
    real_model: Callable[[str], Path], example: Callable[..., subprocess.Popen[str]]
) -> None:
    path = real_model("smollm2-135m-instruct")
    with talking(example("give_back", path, "--memory", "250MB", "--max-tokens", 24)) as talk:
        talk.told("ready, process ")
        gives_back_and_takes_again(talk, least_mb=30)


@pytest.mark.slow
def test_edgelms_own_watch_is_the_other_way(tiny: Path, example: Callable[..., subprocess.Popen[str]]) -> None:
    with talking(example("give_back", tiny, "--memory", "300MB", "--max-tokens", 4, "--adaptive")) as talk:
        assert talk.ask("the cat")


def test_the_budget_changes_in_the_middle_of_an_answer(slow: Path, loads: Load) -> None:
    said: list[str] = []
    changed = threading.Event()

    def say(sentence: str) -> None:
        said.append(sentence)
        changed.set()

    with loads(slow, memory="600MB", context=256) as model:
        expected = model.generate("the cat", max_tokens=12)
        keeper = give_back.Keeper(model, say)
        pieces = []
        for number, chunk in enumerate(model.stream("the cat", max_tokens=12)):
            pieces.append(chunk.text)
            if number == 3:
                keeper.give_back()
                assert changed.wait(20)
        keeper.close()
        assert "".join(pieces) == expected
        assert model.plan.budget_bytes < 600 * MB
    assert re.fullmatch(r"budget 600 MB -> \d+ MB", said[0])


def test_a_pressure_file_that_cannot_be_had_is_said_and_nothing_else(tiny: Path, loads: Load, tmp_path: Path) -> None:
    said: list[str] = []
    with loads(tiny, memory="2GB", context=64) as model:
        keeper = give_back.Keeper(model, said.append, tmp_path / "memory.pressure")
        keeper.close()
    assert said == [f"{tmp_path / 'memory.pressure'} will not wake us: No such file or directory"]


class Kernel:
    """A kernel that says what a test wants: the trigger is a pipe, whose "urgent data" is any data."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trigger, self.stalls = os.pipe()
        os.set_blocking(self.trigger, False)
        monkeypatch.setattr(give_back, "open_trigger", lambda _path: self.trigger)
        monkeypatch.setattr(select, "POLLPRI", select.POLLIN)

    def stall(self) -> None:
        os.write(self.stalls, b"!")

    def calm_down(self) -> None:
        with suppress(BlockingIOError):
            os.read(self.trigger, 100)


def test_stalls_make_it_smaller_and_a_calm_larger_again(
    slow: Path, loads: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is simulated; the next test asks the real one."""
    kernel, said, changed = Kernel(monkeypatch), list[str](), threading.Semaphore(0)

    def say(sentence: str) -> None:
        said.append(sentence)
        if "->" in sentence and not sentence.endswith(" 600 MB"):
            kernel.calm_down()
        changed.release()

    with loads(slow, memory="600MB", context=256) as model:
        keeper = give_back.Keeper(model, say, Path("pressure"), calm_s=0.05)
        kernel.stall()
        assert changed.acquire(timeout=20)
        assert changed.acquire(timeout=20)
        assert model.plan.budget_bytes == 600 * MB
        keeper.give_back()  # by a signal: no calm takes that back
        assert changed.acquire(timeout=20)
        assert not changed.acquire(timeout=0.5)
        keeper.close()
        os.close(kernel.stalls)
    assert said[0].startswith("budget 600 MB -> ")
    assert said[1].endswith(" -> 600 MB")
    assert len(said) == 3


@pytest.mark.slow
@pytest.mark.device
def test_the_kernel_wakes_it(
    tmp_path: Path, slow: Path, loads: Load, memory_group: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neighbour in a small control group reads a larger file again and again, and stalls for want of memory."""
    if not os.access(give_back.PRESSURE, os.W_OK):
        pytest.skip(f"this kernel has no {give_back.PRESSURE} to be woken by")
    code = (
        "import mmap, sys\n"
        "with open(sys.argv[1], 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:\n"
        "    while True:\n"
        "        sum(pages[::4096])"
    )
    with (tmp_path / "large").open("wb") as file:
        file.write(os.urandom(64 * MB))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # what we have cached is not charged to others
    monkeypatch.setattr(give_back, "STALL_US", 1000)
    changed, group = threading.Event(), memory_group("24MB")
    with loads(slow, memory="600MB", context=256) as model:
        keeper = give_back.Keeper(model, lambda _: changed.set(), give_back.PRESSURE, calm_s=600)
        neighbour = subprocess.Popen(group.command([sys.executable, "-c", code, str(tmp_path / "large")]))
        try:
            assert changed.wait(30), "the kernel said nothing"
        finally:
            neighbour.kill()
            neighbour.wait()
            keeper.close()
        assert model.plan.budget_bytes < 600 * MB
