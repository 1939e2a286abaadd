"""`edgelm bench` on tiny models: its tests, rows and outputs, children that refuse or die, and memory limits."""

from __future__ import annotations

import csv
import io
import json
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from edgelm.testing import tiny_model
from edgelm_apps.bench_child import measure
from edgelm_apps.bench_rows import BenchTest, Row, as_csv, as_markdown
from edgelm_apps.bench_sides import Ended, Process

FAST = ("--backend", "numpy", "--threads", "1", "-p", "8", "-n", "4", "-r", "2")
ABOUT: dict[str, Any] = {
    "model": "tiny", "size_bytes": 1_500_000, "params": 2_000_000, "engine": "edgelm", "backend": "numpy",
    "threads": 1, "kv": "f16", "memory": "auto", "budget_bytes": None, "limit": None, "simulated": None, "test": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", "llama"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Heads wide enough to be cut into blocks."""
    return str(tiny_model(tmp_path_factory.mktemp("wide") / "wide.gguf", "llama", head_dim=32))


class Recorder:
    """A side that computes nothing and keeps what it was asked for."""

    n_vocab = 50

    def __init__(self) -> None:
        self.filled: list[list[int]] = []
        self.prompts: list[tuple[list[int], list[int]]] = []
        self.generated: list[tuple[list[int], int, int]] = []

    def facts(self) -> dict[str, Any]:
        return {}

    def fill(self, ids: list[int]) -> None:
        self.filled.append(ids)

    def prompt(self, before: list[int], ids: list[int]) -> dict[str, Any]:
        self.prompts.append((before, ids))
        return {"seconds": 1.0, "read_bytes": 0}

    def generate(self, before: list[int], first: int, n: int) -> dict[str, Any]:
        self.generated.append((before, first, n))
        return {"seconds": 1.0, "read_bytes": 0}

    def peak_bytes(self) -> int:
        return 7


def test_no_two_prompts_begin_alike() -> None:
    side = Recorder()
    for turn in range(1, 100):
        measure(side, {"kind": "pp", "n": 6, "depth": 0}, turn)
    assert not side.filled
    assert all(len(ids) == 6 and before == [] for before, ids in side.prompts)
    starts = [ids[0] for _, ids in side.prompts]
    assert all(one != other for one, other in pairwise(starts))


def test_depth_is_filled_before_and_has_one_beginning() -> None:
    side = Recorder()
    measure(side, {"kind": "pp", "n": 6, "depth": 4}, 1)
    found = measure(side, {"kind": "tg", "n": 3, "depth": 9}, 2)
    assert found == {"seconds": 1.0, "read_bytes": 0, "peak_bytes": 7}
    shallow, deep = side.filled
    assert (len(shallow), len(deep)) == (4, 9)
    assert deep[:4] == shallow  # what was computed for the shallow test serves the deep one
    assert side.prompts[0][0] == shallow
    assert side.prompts[0][1][0] != deep[4]
    assert side.generated == [(deep, 2, 3)]


def test_every_test_of_every_budget_has_a_row(edgelm_command, tiny):
    result = edgelm_command("bench", tiny, *FAST, "-d", "0,16", "--memory", "200MB,300MB", "-o", "json")
    assert (result.code, result.err) == (0, "")
    rows = result.json()["rows"]
    tests = ["pp8", "tg4", "pp8 @ d16", "tg4 @ d16"]
    assert [(row["budget_bytes"], row["test"]) for row in rows] == [
        (budget, test) for budget in (200_000_000, 300_000_000) for test in tests
    ]
    for row in rows:
        assert len(row["samples"]) == 2
        assert row["tps"] == pytest.approx(sum(row["samples"]) / 2)
        assert row["tps_sd"] >= 0
        assert 10_000_000 < row["peak_bytes"] <= row["budget_bytes"]
        assert (row["backend"], row["threads"], row["read_bytes_per_token"]) == ("numpy", 1, 0)
        assert (row["model"], row["simulated"], row["limit"], row["failed"]) == ("tiny", None, None, None)


def test_what_is_refused_says_the_smallest_budget(edgelm_command, tiny):
    result = edgelm_command("bench", tiny, *FAST, "--memory", "1MB,200MB", "-o", "json")
    refused, *measured = result.json()["rows"]
    assert result.code == 0
    assert len(measured) == 2
    assert 10_000_000 < refused["needed_bytes"] < 200_000_000
    assert (refused["samples"], refused["tps"], refused["exit_code"]) == ([], None, 6)


def test_nothing_measured_is_an_error(edgelm_command, tiny):
    result = edgelm_command("bench", tiny, *FAST, "--memory", "1MB")
    assert result.code == 6
    assert "refused: needs" in result.out


def test_a_simulated_device_is_in_every_row(edgelm_command, tiny):
    result = edgelm_command("bench", tiny, *FAST, "-p", "0", "--simulate", "pi4-sd", "--memory", "200MB")
    header, _, *lines = result.out.splitlines()
    assert "| simulated |" in header
    assert all("| pi4-sd " in line for line in lines)
    assert len(lines) == 1


def test_every_type_of_the_cache_has_rows(edgelm_command, wide):
    result = edgelm_command("bench", wide, *FAST, "-p", "0", "--memory", "200MB", "--kv", "f16,q8_0:q4_0")
    header, _, plain, small = result.out.splitlines()
    at = [cell.strip() for cell in header.split("|")].index("kv")
    assert [line.split("|")[at].strip() for line in (plain, small)] == ["", "q8_0:q4_0"]
    refused = edgelm_command("bench", wide, *FAST, "--kv", "q5")
    assert (refused.code, refused.out) == (2, "")
    assert "unknown type 'q5' of keys and values" in refused.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-p", "8,x"], "'8,x' is not a list of token counts"),
        (["-n", "-3"], "'-3' is not a list of token counts"),
        (["-t", "0"], "'0' is not a list of thread counts"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["--memory", "200MB,lots"], "'lots' is not a size"),
        (["--against", "others"], "peers (llama.cpp, llama.cpp-plain)"),
        (["--simulate", "pi4-sd", "--against", "llama.cpp"], "would not be fair"),
        (["--simulate", "pi9"], "unknown device 'pi9' (known: pi4-sd,"),
    ],
)
def test_mistakes_are_said_at_once(edgelm_command, tiny, argv, said):
    result = edgelm_command("bench", tiny, "--backend", "numpy", *argv)
    assert (result.code, result.out) == (2, "")
    assert said in result.err


def test_a_process_that_dies_says_how() -> None:
    with pytest.raises(Ended, match=r"ended with code 1: .*KeyError"):
        Process({"side": "edgelm"})


def test_markdown_leaves_out_what_says_nothing() -> None:
    lines = as_markdown(
        [
            Row(**ABOUT | {"test": "pp8", "samples": (10.0, 20.0), "read_bytes_per_token": 0.0}),
            Row(**ABOUT | {"needed_bytes": 50_000_000, "failed": "too small"}),
            Row(**ABOUT | {"engine": "llama.cpp", "backend": None, "failed": "it died"}),
        ]
    ).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["model", "size", "params", "backend", "threads", "budget", "test", "t/s", "read/token"]
    assert cells[2] == ["tiny", "1.5 MB", "2.00 M", "numpy", "1", "auto", "pp8", "15.00 ± 7.07", "0 B"]
    assert cells[3][-2] == "refused: needs 50 MB"
    assert (cells[4][3], cells[4][-2]) == ("llama.cpp", "failed: it died")
    assert len({len(line) for line in lines}) == 1


def test_csv_has_a_line_for_each_row() -> None:
    rows = [Row(**ABOUT | {"test": str(BenchTest("tg", 8, 16)), "samples": (4.0,)})]
    (line,) = csv.DictReader(io.StringIO(as_csv(rows)))
    assert (line["test"], line["samples"], line["tps"], line["tps_sd"]) == ("tg8 @ d16", "4", "4.0", "0.0")


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_takes_its_turns(edgelm_command, tiny):
    result = edgelm_command("bench", tiny, *FAST, "-d", "8", "--against", "llama.cpp,llama.cpp-plain", "-o", "json")
    rows = result.json()["rows"]
    engines = ["edgelm", "llama.cpp", "llama.cpp-plain"]
    assert [(row["test"], row["engine"]) for row in rows] == [
        (test, engine) for test in ("pp8 @ d8", "tg4 @ d8") for engine in engines
    ]
    assert all(len(row["samples"]) == 2 and row["threads"] == 1 for row in rows), json.dumps(rows)
    assert all(row["limit"] == "none: no budget was given" for row in rows)


@pytest.mark.device
@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_both_sides_are_kept_to_the_same_limit(within_memory, edgelm_command, tiny):
    within_memory("100MB", ["true"])  # skips where no limit can be set
    result = edgelm_command(
        "bench", tiny, *FAST, "-p", "0", "--memory", "12MB,200MB", "--against", "llama.cpp", "-o", "json"
    )
    refused, killed, *measured = result.json()["rows"]
    assert refused["engine"] == "edgelm"
    assert refused["needed_bytes"] > 12_000_000
    assert killed["engine"] == "llama.cpp"
    assert killed["failed"] == "killed: it needs more memory than the limit"
    assert [(row["engine"], row["limit"]) for row in measured] == [
        ("edgelm", "memory cgroup"), ("llama.cpp", "memory cgroup"),
    ]  # fmt: skip
    assert all(row["samples"] and row["budget_bytes"] == 200_000_000 for row in measured)
    left = Path("/sys/fs/cgroup").glob("**/edgelm-bench-*")
    assert not [group for group in left if not Path("/proc", group.name.split("-")[2]).exists()], "of ended processes"
