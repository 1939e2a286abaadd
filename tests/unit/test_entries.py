"""Entry points are recalled without listing packages, until a folder that holds packages changes."""

from __future__ import annotations

import subprocess
import sys

from edgelm.engine import entries
from edgelm.engine.entries import entries as listed


def test_a_package_that_comes_or_goes_is_noticed(install_backend, tmp_path):
    assert "made" not in listed("edgelm.backends")
    module = install_backend("made")
    assert listed("edgelm.backends")["made"] == f"{module}:BACKEND"
    (about,) = (tmp_path / "strangers").glob("*.dist-info")
    for file in about.iterdir():
        file.unlink()
    about.rmdir()
    assert "made" not in listed("edgelm.backends")


def test_known_ones_are_recalled_without_listing_packages(install_backend, tmp_path):
    install_backend("made")
    code = (
        "import sys; import edgelm; from edgelm.engine.entries import entries; "
        "print(sorted(entries('edgelm.backends')), 'importlib.metadata' in sys.modules)"
    )
    outputs = []
    for n in range(2):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        outputs.append(done.stdout)
        (tmp_path / f"a file {n}").write_text("")  # beside the program, where no packages are
    assert [output.split()[-1] for output in outputs] == ["True", "False"]
    assert "'made'" in outputs[1]


def test_a_damaged_list_is_made_again(install_backend):
    install_backend("made")
    listed("edgelm.backends")
    (kept,) = (entries.cache_dir() / "entries").iterdir()
    for content in ("", "{}", kept.read_text().replace('"groups"', '"group"')):
        kept.write_text(content)
        entries._all.cache_clear()
        assert "made" in listed("edgelm.backends")
