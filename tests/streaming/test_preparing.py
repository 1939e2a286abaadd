"""Prepared files: made once, whole or not at all, within a bound, and found again by every later start."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import layout_backends
import pytest
from layout_backends import Shuffled

import edgelm
from edgelm.engine import choosing, health, registry
from edgelm.engine.preparing import look_up, prepare_file
from edgelm.errors import BudgetTooSmall, ConfigError, PreparationError
from edgelm.files import prepared, writing
from edgelm.files.errors import DamagedWeights
from edgelm.files.gguf import open_model
from edgelm.files.index import open_indexed
from edgelm.files.model import ModelFile
from edgelm.memory.platform import current_platform
from edgelm.sizes import human
from edgelm.testing import tiny_model
from edgelm_apps.cli import main

LAYOUT = Shuffled()


@pytest.fixture(autouse=True)
def _backends(monkeypatch: pytest.MonkeyPatch) -> None:
    real = health.check

    def check(name: str, **options: Any) -> health.Verdict:
        """Trust the backends of the tests: a child process would not know their names."""
        if name not in layout_backends.NAMES:
            return real(name, **options)
        backend = registry.get_backend(name)
        return health.Verdict(*backend.probe(), identity=health.identity(backend))

    for module in (health, choosing):
        monkeypatch.setattr(module, "check", check)
    monkeypatch.setattr(prepared, "_opened", set())
    for name, target in layout_backends.NAMES.items():
        monkeypatch.setitem(registry.BACKENDS, name, target)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "tiny.gguf", "llama", types="Q8_0", n_vocab=384)


def files() -> list[Path]:
    """Return all that lies in the folder but the lock and the times of use."""
    return sorted(path for path in prepared.folder().glob("*") if path.name != "lock" and path.suffix != ".used")


def answer(path: Path, backend: str, **options: Any) -> str:
    with edgelm.load(path, memory="400MB", backend=backend, context=64, **options) as loaded:
        return loaded.generate("once upon", max_tokens=12, ignore_eos=True)


@pytest.mark.parametrize("backend", ["shuffled", "cached", "adopting"])
def test_a_model_is_prepared_once_and_answers_as_before(model: Path, backend: str) -> None:
    said: list[str] = []
    shown: list[tuple[int, int]] = []
    expected = answer(model, "numpy")
    options: dict[str, Any] = {"notice": said.append, "progress": lambda *done: shown.append(done)}
    assert answer(model, backend, **options) == expected
    if backend == "cached":  # its weights are those of the file
        assert not said
        assert not files()
        return
    assert len(said) == 1
    assert f"preparing tiny.gguf for the {backend} backend, once" in said[0]
    (file,) = files()
    before = file.stat()
    assert any(done == total > 0 for done, total in shown)
    with edgelm.load(model, memory="400MB", backend=backend, context=64, **options) as loaded:
        assert loaded.generate("once upon", max_tokens=12, ignore_eos=True) == expected
        assert loaded.file.paths == (model,)
        assert not any("prepared" in note for note in loaded.notes)
    assert len(said) == 1
    assert files() == [file]
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_plan_writes_nothing_and_is_the_one_that_is_carried_out(model: Path) -> None:
    planned = edgelm.plan(model, memory="400MB", backend="shuffled", context=64)
    assert not files()
    answer(model, "shuffled")
    assert files()
    again = edgelm.plan(model, memory="400MB", backend="shuffled", context=64)
    assert planned.units == again.units
    assert planned.pinned_bytes == again.pinned_bytes > 0


def test_a_budget_that_is_too_small_is_refused_before_the_work(model: Path) -> None:
    with pytest.raises(BudgetTooSmall):
        edgelm.load(model, memory="5MB", backend="shuffled")
    assert not files()


def test_the_arithmetic_and_the_file_agree(model: Path) -> None:
    source = open_model(model)
    reckoned = look_up(source, LAYOUT)
    assert not reckoned.exists
    made = prepare_file(source, LAYOUT, "shuffled")
    found = look_up(source, LAYOUT)
    assert found.exists
    assert dict(found.file.tensors) == dict(made.tensors) == dict(reckoned.file.tensors)
    assert dict(made.gathered) == dict(reckoned.file.gathered)
    assert made.paths == (*files(), model) == reckoned.file.paths
    assert made.file_bytes == (files()[0].stat().st_size, *source.file_bytes)


@pytest.mark.parametrize("n_parts", [1, 3])
def test_every_tile_is_where_it_should_be(tmp_path: Path, n_parts: int) -> None:
    path = tiny_model(tmp_path / "tiny.gguf", "phi3", types="Q4_0", n_vocab=390, n_parts=n_parts)
    source = open_model(path)
    made = prepare_file(source, LAYOUT, "shuffled")
    assert len(made.paths) == n_parts + 1
    content = made.paths[0].read_bytes()
    packed = [info for info in made.tensors.values() if info.packed_row_bytes]
    assert {info.name for info in source.tensors.values() if info.n_rows > 1} - {info.name for info in packed} == {
        "token_embd.weight"  # phi3 has a head of its own
    }
    for info in packed:
        given = source.tensors[info.name]
        rows = source.paths[given.file].read_bytes()[given.offset : given.offset + given.n_bytes]
        for first in range(0, info.n_rows, info.row_step):
            n = min(info.row_step, info.n_rows - first)
            out = bytearray(n * info.row_bytes)
            LAYOUT.pack(
                given, first, memoryview(rows)[first * given.row_bytes :][: n * given.row_bytes], memoryview(out)
            )
            at = info.offset + first * info.row_bytes
            assert content[at : at + len(out)] == out


def test_another_layout_another_weight_file_another_file(model: Path, tmp_path: Path) -> None:
    source = open_indexed(model)
    prepare_file(source, LAYOUT, "shuffled")
    prepare_file(source, Shuffled("shuffled 3"), "shuffled")
    assert len(files()) == 2
    os.utime(model, ns=(1, 1))
    assert not look_up(open_indexed(model), LAYOUT).exists, "weights may have changed"
    moved = model.rename(tmp_path / "moved.gguf")
    prepare_file(open_indexed(moved), LAYOUT, "shuffled")
    assert look_up(open_indexed(moved.rename(tmp_path / "again.gguf")), LAYOUT).exists


def test_a_pack_is_prepared_by_its_checksums(model: Path, tmp_path: Path) -> None:
    path = edgelm.pack(model).path
    expected = answer(path, "numpy")
    assert answer(path, "shuffled") == expected
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(path.read_bytes())
    assert look_up(open_indexed(copy), LAYOUT).exists, "a pack is known by its checksums, wherever it lies"
    made = look_up(open_indexed(path), LAYOUT).file
    assert [part.file for part in made.checksums] == [0, 1]


def test_damaged_weights_are_not_prepared(model: Path) -> None:
    path = edgelm.pack(model).path
    source = open_indexed(path)
    info = source.tensors["blk.1.ffn_up.weight"]
    content = bytearray(path.read_bytes())
    content[info.offset + 100] ^= 4
    path.write_bytes(content)
    with pytest.raises(DamagedWeights, match=r"blk\.1\.ffn_up"):
        prepare_file(source, LAYOUT, "shuffled")
    assert not files()


@pytest.mark.parametrize("where", [-9, -4000, -5000])
def test_a_damaged_prepared_file_is_made_again(model: Path, where: int) -> None:
    source = open_model(model)
    whole = prepare_file(source, LAYOUT, "shuffled").paths[0]
    expected = whole.read_bytes()
    damaged = bytearray(expected)
    damaged[where] ^= 1
    for content in (bytes(damaged), expected[:-1], expected[: len(expected) // 2], b""):
        whole.write_bytes(content)
        if content == bytes(damaged) and where == -5000:  # between index and footer: nothing that anybody reads
            continue
        assert not look_up(source, LAYOUT).exists
        prepare_file(source, LAYOUT, "shuffled")
        assert whole.read_bytes() == expected


def dying(monkeypatch: pytest.MonkeyPatch, countdown: int, error: Callable[[], None]) -> None:
    """Let the layout call `error` at its so many-th tile."""
    left = [countdown]
    pack = Shuffled.pack

    def count(self: Shuffled, *args: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            error()
        pack(self, *args)

    monkeypatch.setattr(Shuffled, "pack", count)


def test_a_disk_that_fills_up_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        dying(patch, 9, full)
        with pytest.raises(PreparationError, match=r"No space left.*EDGELM_CACHE"):
            prepare_file(open_model(model), LAYOUT, "shuffled")
    assert not files()
    with monkeypatch.context() as patch:
        patch.setattr(writing, "free_bytes", lambda folder: 1000)
        with pytest.raises(PreparationError, match=r"1 kB are free in .*; make room"):
            prepare_file(open_model(model), LAYOUT, "shuffled")
    assert not files()
    prepare_file(open_model(model), LAYOUT, "shuffled")


def test_an_interrupt_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    dying(monkeypatch, 9, interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_file(open_model(model), LAYOUT, "shuffled")
    assert not files()


CHILD = """
import os, sys
sys.path.insert(0, {here!r})
import layout_backends
from edgelm.engine.preparing import prepare_file
from edgelm.files.gguf import open_model

class Told(layout_backends.Shuffled):
    n = 0
    def pack(self, *args):
        self.n += 1
        if self.n == {die_at}:
            print("dying", flush=True)
            os.kill(os.getpid(), 9)
        super().pack(*args)

layout = Told()
prepare_file(open_model(sys.argv[1]), layout, "shuffled")
print(layout.n)
"""


def child(model: Path, die_at: int = 0) -> subprocess.Popen[str]:
    code = CHILD.format(here=str(Path(__file__).parent), die_at=die_at)
    return subprocess.Popen([sys.executable, "-c", code, str(model)], stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_what_was_killed_is_cleared_and_made_again(model: Path) -> None:
    source = open_model(model)
    for die_at in (1, 12, 25):
        killed = child(model, die_at)
        assert killed.communicate(timeout=60)[0] == "dying\n"
        assert killed.returncode == -signal.SIGKILL
        (left,) = files()
        assert left.suffix == writing.PARTIAL
        assert not look_up(source, LAYOUT).exists
    made = prepare_file(source, LAYOUT, "shuffled")
    assert files() == [made.paths[0]]


def test_of_two_processes_one_prepares(model: Path) -> None:
    children = [child(model), child(model)]
    packed = sorted(int(one.communicate(timeout=60)[0]) for one in children)
    assert [one.returncode for one in children] == [0, 0]
    assert packed[0] == 0 < packed[1]
    assert look_up(open_model(model), LAYOUT).exists


def aged(source: ModelFile, keys: list[str], monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Prepare a model under several keys, each used a second after the other, as other processes would have."""
    made = []
    for second, key in enumerate(keys):
        path = prepare_file(source, Shuffled(key), "shuffled").paths[0]
        os.utime(path.with_suffix(".used"), (second, second))
        made.append(path)
    monkeypatch.setattr(prepared, "_opened", set())
    return made


def test_what_was_used_longest_ago_makes_room(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(model)
    first, second, third = aged(source, ["a", "b", "c"], monkeypatch)
    size = first.stat().st_size
    monkeypatch.setenv(prepared.LIMIT_VARIABLE, str(3 * size))
    assert look_up(source, Shuffled("a")).exists  # used, and opened by this process
    assert [file.path for file in prepared.listing()] == [first, third, second]
    fourth = prepare_file(source, Shuffled("d"), "shuffled").paths[0]
    assert files() == sorted([first, third, fourth])
    with monkeypatch.context() as patch:
        patch.setattr(writing, "free_bytes", lambda folder: size // 2)
        fifth = prepare_file(source, Shuffled("e"), "shuffled").paths[0]
    assert files() == sorted([first, fourth, fifth])


def test_nothing_that_this_process_uses_is_removed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(model)
    first = prepare_file(source, Shuffled("a"), "shuffled").paths[0]
    size = first.stat().st_size
    monkeypatch.setenv(prepared.LIMIT_VARIABLE, str(size + 1))
    with pytest.raises(PreparationError, match=rf"raise {prepared.LIMIT_VARIABLE}"):
        prepare_file(source, Shuffled("b"), "shuffled")
    assert files() == [first]
    monkeypatch.setenv(prepared.LIMIT_VARIABLE, "much")
    with pytest.raises(ConfigError, match="much"):
        prepare_file(source, Shuffled("b"), "shuffled")


def test_being_used_does_not_disturb_who_reads(model: Path) -> None:
    """A store refuses a file whose time of change moves."""
    with edgelm.load(model, memory="700MB", backend="shuffled", context=64) as loaded:
        expected = loaded.generate("once", max_tokens=4, ignore_eos=True)
        assert look_up(open_indexed(model), LAYOUT).exists
        loaded.set_budget("600MB")
        assert loaded.generate("once", max_tokens=4, ignore_eos=True) == expected


def test_listing_and_removing(model: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other.gguf", "olmo2", n_vocab=384)
    sources = [open_model(path) for path in (model, other)]
    for source in sources:
        prepare_file(source, LAYOUT, "shuffled")
    listed = {(file.model, file.backend) for file in prepared.listing()}
    assert listed == {("tiny.gguf", "shuffled"), ("other.gguf", "shuffled")}
    sizes = {file.model: file.size_bytes for file in prepared.listing()}
    assert prepared.remove(sources[0].fingerprint) == sizes["tiny.gguf"]
    assert [file.model for file in prepared.listing()] == ["other.gguf"]
    prepared.listing()[0].path.write_bytes(b"junk" * 4000)
    assert [file.model for file in prepared.listing()] == ["damaged"]
    assert prepared.remove() == 16_000
    assert not files()


MEASURED = """
import sys
sys.path.insert(0, {here!r})
import layout_backends
from edgelm.engine.preparing import prepare_file
from edgelm.files.gguf import open_model
from edgelm.memory.meter import Meter
prepare_file(open_model(sys.argv[1]), layout_backends.SHUFFLED.layout(), "shuffled")
before = Meter().sample().peak_bytes
prepare_file(open_model(sys.argv[2]), layout_backends.SHUFFLED.layout(), "shuffled")
print(Meter().sample().peak_bytes - before)
"""


def test_preparing_takes_a_few_tiles_of_memory_and_leaves_no_cache(model: Path, tmp_path: Path) -> None:
    large = tiny_model(tmp_path / "large.gguf", "llama", n_vocab=384, n_embd=512, n_ff=4096, n_layers=2)
    assert large.stat().st_size > 50e6
    platform = current_platform()
    handle = platform.open_buffered(str(large))
    os.sync()  # what is not on the disk yet cannot be dropped
    platform.drop_cache(handle)
    code = MEASURED.format(here=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(large)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 8e6
    made = max(files(), key=lambda path: path.stat().st_size)
    assert made.stat().st_size > 50e6
    other = platform.open_buffered(str(made))
    try:
        assert platform.cached_bytes(handle, 0, large.stat().st_size) < 5e6
        assert platform.cached_bytes(other, 0, made.stat().st_size) < 5e6
    finally:
        platform.close(handle)
        platform.close(other)


@pytest.fixture
def _no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))


def command(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    return code, *capsys.readouterr()


@pytest.mark.usefixtures("_no_input")
def test_the_command_line_shows_and_clears(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--backend", "shuffled", "--memory", "400MB", "--max-tokens", "2")
    code, _, said = command(capsys, "run", str(model), "once", *options)
    assert code == 0
    assert said.count("edgelm: preparing tiny.gguf for the shuffled backend, once: ") == 1
    code, _, said = command(capsys, "run", str(model), "once", *options)
    assert code == 0
    assert "prepar" not in said
    _, table, _ = command(capsys, "list")
    assert [line.split()[:4] for line in table.splitlines() if line.startswith(("prepared", "tiny"))] == [
        ["prepared", "of", "size", "backend"],
        ["tiny.gguf", *human(files()[0].stat().st_size).split(), "shuffled"],
    ]
    _, listed, _ = command(capsys, "list", "--json")
    (entry,) = json.loads(listed)["prepared"]
    assert (entry["path"], entry["model"], entry["backend"]) == (str(files()[0]), "tiny.gguf", "shuffled")
    size = human(entry["size_bytes"])
    assert command(capsys, "rm")[0] == 2
    _, said, _ = command(capsys, "rm", "--prepared", str(model))
    assert said == f"what was prepared of {model} is removed: {size} are free again\n"
    assert not files()
    _, said, _ = command(capsys, "rm", "--prepared")
    assert said == "what was prepared of all models is removed: 0 B are free again\n"
