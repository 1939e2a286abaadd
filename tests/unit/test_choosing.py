"""`auto` takes the best backend that works, says why, and remembers; nothing that a backend does ends the host."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

import edgelm
from edgelm.engine import choosing, registry, weighed
from edgelm.engine.backend import Capabilities
from edgelm.engine.choosing import Asked, choose, consider
from edgelm.engine.health import Verdict
from edgelm.engine.weighed import Weighed
from edgelm.engine.wishes import Wishes
from edgelm.errors import BackendUnavailable, BudgetTooSmall, ConfigError, UnknownBackend, UnsupportedModel
from edgelm.files.ggml_types import TensorType
from edgelm.files.gguf import open_model
from edgelm.memory.platform import current_platform
from edgelm.sizes import GB, MB
from edgelm.testing.tiny import tiny_model


@pytest.fixture
def path(tmp_path):
    return tiny_model(tmp_path / "tiny.gguf", "llama", types="Q8_0")


@pytest.fixture
def file(path):
    return open_model(path)


class Fakes:
    """Backends that exist in name only: what they would do is stated, and how often each was measured is counted."""

    def __init__(self, monkeypatch):
        self.verdicts, self.capabilities, self.weights = {}, {}, {}
        self.weighings: list[str] = []
        monkeypatch.setattr(choosing, "backend_names", lambda: tuple(self.verdicts))
        monkeypatch.setattr(choosing, "check", lambda name, fresh=False: self.verdicts[name])
        monkeypatch.setattr(choosing, "get_backend", lambda name: self)
        monkeypatch.setattr(choosing, "_look", self.look)
        monkeypatch.setattr(choosing, "_weigh_in_child", self.weigh)
        self._look = choosing._look
        self.add("numpy", decode_tps=5.0)

    def add(self, name, *, reason="", broken=False, simulated=False, types=frozenset(TensorType), **plan):
        self.verdicts[name] = Verdict(not reason, reason, "1.0", broken, f"{name} one")
        self.capabilities[name] = Capabilities(types, simulated=simulated)
        self.weights[name] = Weighed(**{"planned_bytes": 50 * MB, **plan})

    def look(self, name, file, kv):
        verdict, can = self.verdicts[name], self.capabilities[name]
        missing = sorted(kind.name for kind in {TensorType.Q8_0} - can.types)
        why_not = verdict.reason or (f"it does not compute {', '.join(missing)}" if missing else "")
        return choosing.Seen(name, verdict, can.simulated, why_not, verdict.broken)

    def weigh(self, name, asked):
        self.weighings.append(name)
        return self.weights[name]


@pytest.fixture
def fakes(monkeypatch):
    return Fakes(monkeypatch)


def asked(budget_bytes=GB, path="tiny.gguf", **more):
    return Asked(str(path), budget_bytes, 1, Wishes(**more))


def reasons(file, budget_bytes=GB):
    return {one.name: one.reason for one in consider(file, asked(budget_bytes))}


def test_the_fastest_is_taken_and_the_reference_last(fakes, file):
    fakes.add("a", decode_tps=10.0)
    fakes.add("b", decode_tps=30.0)
    fakes.add("c", decode_tps=20.0)
    choice = choose(file, "auto", asked())
    assert choice.names == ("b", "c", "a", "numpy")
    assert choice.notes == ("b: chosen, the fastest: 30.0 tok/s predicted (1.0)",)
    assert "numpy" not in fakes.weighings
    assert reasons(file)["numpy"] == "passed over, the reference: taken where no other works"
    assert reasons(file)["c"] == "passed over, slower"


def test_near_speeds_go_by_the_usual_order(fakes, file):
    fakes.add("stranger", decode_tps=30.0)
    fakes.add("mlx", decode_tps=29.0)
    fakes.add("onnx", decode_tps=29.5)
    assert choose(file, "auto", asked()).names == ("onnx", "mlx", "stranger", "numpy")

    found = reasons(file)
    assert found["onnx"] == "chosen, none is faster, as far as could be measured: 29.5 tok/s predicted (1.0)"
    assert found["stranger"] == "passed over, not faster by more than measuring errs"
    assert found["mlx"] == "passed over, slower"


def test_on_a_busy_machine_only_large_differences_count(fakes, file):
    fakes.add("onnx", decode_tps=20.0, steady=False)
    fakes.add("llamacpp", decode_tps=9.0)
    fakes.add("stranger", decode_tps=25.0)
    fakes.add("slow", decode_tps=2.0)
    assert choose(file, "auto", asked()).names == ("llamacpp", "onnx", "stranger", "slow", "numpy")


def test_what_keeps_the_numbers_goes_before_what_is_faster(fakes, file):
    fakes.add("exact", decode_tps=10.0)
    fakes.add("rounded", decode_tps=30.0, loss="Q8_0 becomes 4 bits")
    assert choose(file, "auto", asked()).notes == (
        "exact: chosen, it keeps the model's numbers, 10.0 tok/s predicted (1.0)",
    )
    assert reasons(file)["rounded"] == "passed over, it loses precision: Q8_0 becomes 4 bits"


def test_a_simulated_one_is_never_taken(fakes, file):
    fakes.add("npu", simulated=True, decode_tps=99.0)
    assert choose(file, "auto", asked()).names == ("numpy",)
    found = {one.name: one for one in consider(file, asked())}
    assert found["npu"].reason == "passed over, it is simulated: taken only when asked for by name"
    assert found["npu"].predicted_decode_tps == 99.0
    assert found["numpy"].chosen
    assert choose(file, "npu", asked()).names == ("npu",)


def test_who_cannot_keep_the_budget_is_passed_over(fakes, file):
    fakes.add("a", decode_tps=0.0, planned_bytes=0, needed_bytes=2 * GB)
    fakes.add("b", decode_tps=10.0)
    assert choose(file, "auto", asked()).names == ("b", "numpy")
    found = {one.name: one for one in consider(file, asked())}
    assert found["a"].reason == "passed over, the budget is too small for it"
    assert 2 * GB < found["a"].needed_bytes < 4 * GB


def test_where_none_keeps_the_budget_the_one_that_needs_least_says_so(fakes, file):
    fakes.add("a", needed_bytes=30 * MB)
    fakes.add("b", needed_bytes=20 * MB)
    fakes.add("numpy", needed_bytes=25 * MB)
    choice = choose(file, "auto", asked(10 * MB))
    assert choice.names == ("b",)
    assert not any(one.chosen for one in consider(file, asked(10 * MB)))


def test_broken_ones_are_named_and_absent_ones_are_not(fakes, file):
    fakes.add("absent", reason="not installed")
    fakes.add("dead", reason="its library crashed (SIGSEGV) in a trial run", broken=True)
    fakes.add("narrow", types=frozenset([TensorType.F32]))
    fakes.add("dies")
    fakes.weights["dies"] = Weighed(why_not="its library crashed (SIGSEGV) in being measured", broken=True)
    fakes.add("works", decode_tps=10.0)
    choice = choose(file, "auto", asked())
    assert choice.names == ("works", "numpy")
    assert sorted(choice.notes[1:]) == [
        "dead: passed over, its library crashed (SIGSEGV) in a trial run",
        "dies: passed over, its library crashed (SIGSEGV) in being measured",
    ]
    found = reasons(file)
    assert found["absent"] == "passed over, not installed"
    assert found["narrow"] == "passed over, it does not compute Q8_0"


def test_no_backend_for_a_model(fakes, file):
    fakes.add("numpy", types=frozenset([TensorType.F32]))
    fakes.add("a", reason="not installed")
    with pytest.raises(
        UnsupportedModel, match="a: passed over, not installed; numpy: passed over, it does not compute Q8_0"
    ):
        choose(file, "auto", asked())


def test_nothing_is_measured_that_cannot_matter(fakes, file):
    fakes.add("only", decode_tps=1.0)
    choice = choose(file, "auto", asked(100 * GB))
    assert (choice.names, fakes.weighings) == (("only", "numpy"), [])
    assert "the only one beside the reference that works here" in choice.notes[0]
    choose(file, "auto", asked(1 * MB))
    assert fakes.weighings == ["only"]


def test_a_frozen_application_takes_the_usual_order(fakes, file, monkeypatch):
    monkeypatch.setattr(choosing, "can_start", lambda: False)
    fakes.add("onnx", decode_tps=30.0)
    fakes.add("llamacpp", decode_tps=10.0)
    choice = choose(file, "auto", asked())
    assert choice.names == ("llamacpp", "onnx", "numpy")
    assert choice.notes == ("llamacpp: chosen, the usual first: nothing was measured (1.0)",)
    assert fakes.weighings == []


def test_a_measurement_is_kept_until_it_would_be_wrong(fakes, file, monkeypatch):
    fakes.add("a", decode_tps=10.0)
    fakes.add("b", decode_tps=20.0)
    for _ in range(3):
        choose(file, "auto", asked())
    assert sorted(fakes.weighings) == ["a", "b"]
    fakes.verdicts["a"] = fakes.verdicts["a"]._replace(identity="a two")  # another library
    choose(file, "auto", asked())
    assert sorted(fakes.weighings) == ["a", "a", "b"]
    choose(file, "auto", asked(context=32))  # another way of loading
    assert len(fakes.weighings) == 5
    consider(file, asked(), fresh=True)
    assert len(fakes.weighings) == 8
    now = time.time()
    monkeypatch.setattr(weighed.time, "time", lambda: now + weighed.KEPT_S + 1)
    choose(file, "auto", asked())
    assert len(fakes.weighings) == 10


def test_what_a_busy_machine_said_is_kept_for_an_hour(fakes, file, monkeypatch):
    fakes.add("a", decode_tps=10.0, steady=False)
    fakes.add("b", decode_tps=20.0)
    choose(file, "auto", asked())
    now = time.time()
    monkeypatch.setattr(weighed.time, "time", lambda: now + weighed.DOUBT_S + 1)
    choose(file, "auto", asked())
    assert sorted(fakes.weighings) == ["a", "a", "b"]


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1, "b": [1]}', '{"a": [{}], "b": [{"weighed": {"x": 1}}]}'])
def test_a_damaged_file_of_measurements_is_made_again(fakes, file, content):
    fakes.add("a", decode_tps=10.0)
    fakes.add("b", decode_tps=20.0)
    choose(file, "auto", asked())
    (kept,) = (weighed.cache_dir() / "choices").iterdir()
    kept.write_text(content)
    assert choose(file, "auto", asked()).names[0] == "b"
    assert len(fakes.weighings) == 4


@pytest.mark.parametrize(
    ("found", "holds", "does_not_hold"),
    [
        (Weighed(planned_bytes=50 * MB), [50 * MB, 90 * MB, GB], [49 * MB]),
        (Weighed(planned_bytes=90 * MB, streamed_bytes=1), [99 * MB, 100 * MB, 109 * MB], [98 * MB, 111 * MB]),
        (Weighed(needed_bytes=120 * MB), [1, 100 * MB, 119 * MB], [120 * MB]),
        (Weighed(why_not="it crashed"), [1, GB], []),
    ],
    ids=["resident", "streaming", "too small", "broken"],
)
def test_how_much_room_a_measurement_holds_for(found, holds, does_not_hold):
    assert all(found.holds(100 * MB, spare) for spare in holds)
    assert not any(found.holds(100 * MB, spare) for spare in does_not_hold)


def test_a_wanted_backend_or_its_reason(install_backend, file):
    install_backend("made", "Backend.probe = lambda self: Availability(False, 'not today')")
    assert choose(file, "numpy", asked()).names == ("numpy",)
    with pytest.raises(BackendUnavailable, match="'made' is not available: not today"):
        choose(file, "made", asked())
    with pytest.raises(UnknownBackend, match="available: "):
        choose(file, "onxx", asked())


# From here on children do the work.


@pytest.fixture
def strangers_only(monkeypatch):
    """Let no built-in but NumPy take part: what is chosen does not depend on what is installed here."""
    others = set(registry.BACKENDS) - {"numpy"}
    monkeypatch.setattr(choosing, "backend_names", lambda: [n for n in registry.backend_names() if n not in others])


def test_a_stranger_is_measured_and_chosen(install_backend, strangers_only, path):
    install_backend("made")
    found = edgelm.candidates(path, memory="400MB", context=32)
    assert [one.name for one in found] == ["made", "numpy"]
    assert found[0].chosen
    for one in found:
        assert one.predicted_decode_tps > 0
        assert current_platform().rss_bytes() < one.planned_bytes < 400 * MB
    with edgelm.load(path, memory="400MB", context=32) as model:
        assert model.backend == "made"
        assert "".join(chunk.text for chunk in model.stream("Hello", max_tokens=3))


LAYOUT = """
from edgelm.engine.backend import Packed
class AsItIs:
    key = "as it is"
    def packed(self, info):
        return Packed(info.row_bytes, 32, "rounded, says the test")
    def pack(self, info, first_row, rows, out):
        out[:] = rows
Backend.layout = lambda self: AsItIs()
"""


def test_preparing_is_announced_and_not_done(install_backend, strangers_only, path):
    install_backend("packs", LAYOUT)

    def packs():
        (found,) = (one for one in edgelm.candidates(path, memory="400MB", context=32) if one.name == "packs")
        return found

    found = packs()
    assert 100_000 < found.prepare_bytes < 1 * MB
    assert (found.chosen, found.loss) == (True, "rounded, says the test")
    prepared = weighed.cache_dir() / "prepared"
    assert not prepared.exists()
    edgelm.load(path, memory="400MB", context=32, backend="packs").close()
    (file,) = prepared.glob("*.prepared")
    assert packs().prepare_bytes == 0
    file.unlink()
    assert packs().prepare_bytes == found.prepare_bytes


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_crash_while_it_is_measured_costs_a_sentence(install_backend, strangers_only, path):
    """What works for small products and not for the model's: only the measuring child sees that."""
    wide = "segment.weights and segment.weights[0].rows > 100 and segment.weights[0].rows != 1024"
    install_backend(
        "dies",
        "def compile(self, segment, shape):\n"
        f"    if {wide}:\n        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return self._inner.compile(segment, shape)\n"
        "Session.compile = compile",
    )
    install_backend("works")
    with edgelm.load(path, memory="400MB", context=32) as model:
        assert model.backend == "works"
        assert "dies: passed over, its library crashed (SIGSEGV) in being measured" in model.notes


def test_what_fails_to_open_after_all_is_followed_by_the_next(install_backend, strangers_only, path, tmp_path):
    said = tmp_path / "version"
    said.write_text("1.0")
    install_backend("lies", f"Session.version = property(lambda self: Path({str(said)!r}).read_text())")
    with edgelm.load(path, memory="400MB", context=32) as model:
        assert model.backend == "lies"
    said.write_text("0.1")
    with edgelm.load(path, memory="400MB", context=32) as model:
        assert model.backend == "numpy"
        assert "lies: passed over after all, it was tried as 1.0, but what it loads now is 0.1" in model.notes


def test_a_budget_that_no_backend_keeps(install_backend, strangers_only, path):
    install_backend("made")
    with pytest.raises(BudgetTooSmall) as caught:
        edgelm.load(path, memory="1MB", context=32)
    needed = caught.value.needed_bytes
    assert current_platform().rss_bytes() / 2 < needed
    found = edgelm.candidates(path, memory="1MB", context=32)
    assert [one.chosen for one in found] == [False, False]
    assert all(abs(one.needed_bytes - needed) < 30 * MB for one in found)


LIBRARY = """
class Slow:
    def __init__(self, program):
        self.program = program
    def run(self, bindings):
        self.program.run(bindings)
        time.sleep({seconds})

def open(self, n_threads):
    sys.modules["library_of_{name}"] = sys
    return Session(NUMPY.open(n_threads))
Backend.open = open
Session.compile = lambda self, segment, shape: Slow(self._inner.compile(segment, shape))
"""


@pytest.mark.parametrize(
    ("options", "error"), [({"context": 8}, ConfigError), ({"simulate": "pi5-nvme", "memory": "x"}, ConfigError)]
)
def test_what_is_not_a_backend_s_fault_is_said_as_it_is(install_backend, strangers_only, path, options, error):
    install_backend("one")
    install_backend("two")
    with pytest.raises(error):
        edgelm.load(path, **{"memory": "400MB", **options})
    assert not (weighed.cache_dir() / "choices").exists()


def test_any_failure_to_open_is_followed_by_the_next(install_backend, strangers_only, path, tmp_path):
    broken = tmp_path / "broken"
    install_backend(
        "fails",
        f"def open(self, n_threads):\n    if Path({str(broken)!r}).exists(): raise OSError('no device')\n"
        "    return Session(NUMPY.open(n_threads))\nBackend.open = open",
    )
    edgelm.load(path, memory="400MB", context=32).close()
    broken.write_text("")
    with edgelm.load(path, memory="400MB", context=32) as model:
        assert model.backend == "numpy"
        assert "fails: passed over after all, it failed to open (OSError: no device)" in model.notes
    with pytest.raises(BackendUnavailable, match="'fails' is not available: it failed to open"):
        edgelm.load(path, memory="400MB", context=32, backend="fails")


def test_a_known_choice_is_quick_and_loads_no_other_library(install_backend, path):
    """In a process of its own: what it imports says what was loaded."""
    for name, seconds in (("slow", 0.05), ("fast", 0)):
        install_backend(name, LIBRARY.format(name=name, seconds=seconds))
    code = (
        "import sys, time, edgelm; from edgelm.engine import registry, choosing\n"
        "from edgelm.files.index import open_indexed; from edgelm.resources import threads_of\n"
        "choosing.backend_names = lambda: [n for n in registry.backend_names() if n in ('slow', 'fast', 'numpy')]\n"
        f"file = open_indexed({str(path)!r}); threads_of(None, None)\n"
        f"asked = choosing.Asked({str(path)!r}, 400_000_000, 1, choosing.Wishes(context=32))\n"
        "for name in ('slow', 'fast'): registry.get_backend(name).capabilities()  # not to be counted\n"
        "start = time.process_time(); choice = choosing.choose(file, 'auto', asked)\n"
        "print(choice.names, time.process_time() - start)\n"
        f"with edgelm.load({str(path)!r}, memory='400MB', context=32, threads=1) as model:\n"
        "    print(model.backend, *sorted(name for name in sys.modules if name.startswith('library_of')))\n"
        "    print(*{'subprocess', 'importlib.metadata'} & set(sys.modules))\n"
    )
    seconds = []
    for _ in range(4):  # the first measures; a busy machine may need more than one
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
        names, loaded, modules = done.stdout.splitlines()
        assert names.startswith("('fast', 'slow', 'numpy')")
        seconds.append(float(names.split()[-1]))
    assert min(seconds) < 0.005
    assert loaded == "fast library_of_fast"
    assert modules == ""
