"""The background script: summaries beside texts, whole or not at all, gone on with after a stop, at low priority."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import edgelm
from edgelm_examples import summarise

Load = Callable[..., edgelm.Model]
Example = Callable[..., subprocess.Popen[str]]
OPTIONS = ("--memory", "300MB", "--context", "256", "--max-tokens", "8")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.md", "c.txt"):
        (folder / name).write_text(f"the cat and the dog of {name}\n")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def summaries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix not in (".txt", ".md", ".png"))


def test_every_text_gets_a_summary_once(texts: Path, tiny: Path, example: Example) -> None:
    def run() -> tuple[str, str]:
        child = example("summarise", tiny, texts, *OPTIONS)
        said, told = child.communicate(timeout=60)
        assert child.returncode == 0, told
        return said, told

    assert run() == ("a.txt.summary\nb.md.summary\nc.txt.summary\n", "3 written\n")
    assert summaries(texts) == ["a.txt.summary", "b.md.summary", "c.txt.summary"]
    assert run() == ("", "0 written\n")
    changed = (texts / "b.md").stat().st_mtime_ns + 10**9
    os.utime(texts / "b.md", ns=(changed, changed))
    assert run() == ("b.md.summary\n", "1 written\n")


def test_a_text_that_changes_meanwhile_is_done_again(texts: Path) -> None:
    path = texts / "a.txt"
    read_ns = summarise.changed_ns(path)
    os.utime(path, ns=(read_ns + 1, read_ns + 1))
    summarise.write(path, "of the old text", read_ns)
    assert path in summarise.waiting([texts])
    summarise.write(path, "of the new text", read_ns + 1)
    assert path not in summarise.waiting([texts])
    assert summarise.target_of(path).read_text() == "of the new text\n"


def test_half_a_summary_is_never_seen(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summarise.write(texts / "a.txt", "before", 1)

    def full(_handle: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="full"):
        summarise.write(texts / "a.txt", "after", 2)
    assert summaries(texts) == ["a.txt.summary"]
    assert (texts / "a.txt.summary").read_text() == "before\n"


def test_a_long_text_is_summarised_in_parts(tiny: Path, loads: Load) -> None:
    with loads(tiny, memory="2GB", context=256) as model:
        text = "\n\n".join(f"the cat and the dog {number}" for number in range(100))
        assert len(model.tokenizer.encode(text)) > 4 * 256
        found = summarise.Writer(model, 16).summary(text, threading.Event())
    assert 0 < len(found) < len(text)


def test_texts_are_cut_at_paragraphs_lines_and_words() -> None:
    assert summarise.halves("aaaa bbbb\n\ncccc") == ("aaaa bbbb", "cccc")
    assert summarise.halves("aaaa bbbb\ncccc") == ("aaaa bbbb", "cccc")
    assert summarise.halves("aaaa bbbb cccc") == ("aaaa bbbb", "cccc")
    assert summarise.halves("aaaabbbb") == ("aaaa", "bbbb")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM that can be heard")
def test_sigterm_ends_it_cleanly_and_the_next_start_goes_on(texts: Path, slow: Path, example: Example) -> None:
    """It comes in the middle of the second summary, whose text is never done before."""
    (texts / "b.md").write_text("the cat and the dog " * 2000)
    child = example("summarise", slow, texts, "--memory", "600MB", "--context", "512", "--max-tokens", "100")
    assert child.stdout is not None
    assert child.stdout.readline() == "a.txt.summary\n"
    priorities = [os.getpriority(os.PRIO_PROCESS, child.pid)]
    if sys.platform == "linux":
        priorities += [os.getpriority(os.PRIO_PROCESS, int(task)) for task in os.listdir(f"/proc/{child.pid}/task")]
    assert set(priorities) == {19}
    child.send_signal(signal.SIGTERM)
    said, told = child.communicate(timeout=30)
    assert (child.returncode, said) == (0, "")
    assert told == "stopped; what is missing is written at the next start\n"
    assert summaries(texts) == ["a.txt.summary"]
    (texts / "b.md").write_text("short")
    child = example("summarise", slow, texts, "--memory", "600MB", *OPTIONS[2:])
    assert child.communicate(timeout=60)[0] == "b.md.summary\nc.txt.summary\n"


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM that can be heard")
def test_watching_finds_what_comes_later(texts: Path, tiny: Path, example: Example) -> None:
    (texts / "broken.txt").write_bytes(b"\xff\xfe\xff")
    child = example("summarise", tiny, texts, *OPTIONS, "--watch", "0.05")
    assert child.stdout is not None
    assert [child.stdout.readline() for _ in range(3)][-1] == "c.txt.summary\n"
    partial = texts / "d.part"
    partial.write_text("the bird")
    partial.rename(texts / "d.txt")
    assert child.stdout.readline() == "d.txt.summary\n"
    child.send_signal(signal.SIGTERM)
    said, told = child.communicate(timeout=30)
    assert (child.returncode, said) == (0, "")
    lines = told.splitlines()
    assert lines[0].startswith(f"{texts}/broken.txt: ")  # once, however often it is looked at
    assert lines[1:] == ["4 written"]


def test_mistakes_are_sentences(texts: Path, tiny: Path, example: Example) -> None:
    for arguments, code, fact in (
        ((tiny, texts / "nowhere"), 2, "nowhere"),
        ((tiny, texts, "--max-tokens", "600"), 2, "half of --context"),
        ((texts / "no.gguf", texts), 3, "no.gguf"),
    ):
        child = example("summarise", *arguments)
        said, told = child.communicate(timeout=60)
        assert (child.returncode, said) == (code, ""), told
        assert fact in told
        assert "Traceback" not in told
