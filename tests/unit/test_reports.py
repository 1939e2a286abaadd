"""Reports state facts that can be checked, and leave nothing behind."""

from __future__ import annotations

import json

import pytest

import edgelm
from edgelm import reports
from edgelm.engine import reading
from edgelm.engine.health import Verdict
from edgelm.errors import ModelNotFound
from edgelm.testing.tiny import tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reports, "_TRIAL_BYTES", 12 << 20)
    monkeypatch.setattr(reading, "THOROUGH_S", 0.1)
    return tmp_path / "cache"


@pytest.fixture
def path(tmp_path):
    extra = {"tokenizer.chat_template": "{{ messages }}", "general.languages": ["en", "de"]}
    return tiny_model(tmp_path / "tiny.gguf", "llama", types="Q8_0", metadata=extra)


def test_inspect(path):
    found = edgelm.inspect(path)
    assert (found.path, found.architecture, found.template) == (str(path), "llama", "{{ messages }}")
    assert found.metadata["general.languages"] == ("en", "de")
    assert found.metadata["llama.block_count"] == 3
    assert isinstance(found.metadata["tokenizer.ggml.token_type"], tuple)
    assert len(found.metadata["tokenizer.ggml.tokens"]) == len(found.metadata["tokenizer.ggml.token_type"])
    tensors = {tensor.name: tensor for tensor in found.tensors}
    norm = tensors["output_norm.weight"]
    assert (norm.type, norm.shape, norm.size_bytes) == ("F32", (64,), 256)
    assert tensors["blk.0.ffn_up.weight"].type == "Q8_0"
    assert tensors["blk.0.ffn_up.weight"].size_bytes == 64 * 128 // 32 * 34


def test_inspect_without_a_template(tmp_path):
    path = tiny_model(tmp_path / "m.gguf", "llama", metadata={"tokenizer.chat_template": None})
    assert edgelm.inspect(path).template is None
    with pytest.raises(ModelNotFound):
        edgelm.inspect(tmp_path / "none.gguf")


def test_backends(monkeypatch):
    monkeypatch.setattr(
        reports, "check", lambda name, fresh: Verdict(name == "numpy", "" if name == "numpy" else "broken", "1.0")
    )
    found = {report.name: report for report in edgelm.backends()}
    assert (found["numpy"].available, found["numpy"].reason, found["numpy"].version) == (True, None, "1.0")
    assert found["numpy"].capabilities["streams"] is True
    assert "Q4_K" in found["numpy"].capabilities["tensor_types"]
    assert (found["llamacpp"].available, found["llamacpp"].reason) == (False, "broken")
    assert found["llamacpp"].capabilities == {}


def test_doctor(cache):
    facts = edgelm.doctor()
    json.dumps(facts)
    assert facts["edgelm"] == edgelm.__version__
    assert 1 <= facts["cores"]["usable"] <= facts["cores"]["logical"]
    assert 0 < facts["memory"]["available_bytes"] <= facts["memory"]["total_bytes"]
    assert facts["backends"]["numpy"].startswith("works (NumPy")
    assert facts["cache"]["folder"] == str(cache)
    flash = facts["flash"]
    assert flash["read_bytes_per_s"] > 0
    assert flash["latency_s"] > 0
    assert flash["cpu_s_per_gb"] > 0
    assert (
        flash["pattern"].items()
        <= next(turn for turn in flash["table"] if turn["bytes_per_s"] == flash["read_bytes_per_s"]).items()
    )
    assert not list(cache.glob("flash-*")), "the trial file is removed"


def test_doctor_recalls_the_flash_unless_it_rechecks(cache):
    first = edgelm.doctor()["flash"]
    assert edgelm.doctor()["flash"] == first
    assert edgelm.doctor(recheck=True)["flash"]["read_bytes_per_s"] != first["read_bytes_per_s"]


def test_doctor_prefers_a_model_at_hand(cache):
    model = cache / "models" / "some" / "model.gguf"
    model.parent.mkdir(parents=True)
    model.write_bytes(bytes(12 << 20))
    (cache / "models" / "small.gguf").write_bytes(bytes(4096))
    assert edgelm.doctor()["flash"]["measured_on"] == str(model)


def test_doctor_measures_a_given_file(path, cache):
    flash = edgelm.doctor(path)["flash"]
    assert flash["measured_on"] == str(path)
    assert flash["read_bytes_per_s"] > 0


def test_doctor_rechecks(monkeypatch):
    asked = []

    def check(name, fresh):
        asked.append((name, fresh))
        return Verdict(False, "broken")

    monkeypatch.setattr(reports, "check", check)
    edgelm.doctor(recheck=True)
    assert ("llamacpp", True) in asked
    edgelm.doctor()
    assert ("llamacpp", False) in asked


def test_warnings(monkeypatch, tmp_path):
    monkeypatch.setattr(reports, "check", lambda name, fresh: Verdict(name == "numpy", "it crashed", "1", True))
    monkeypatch.setattr(reports.shutil, "which", lambda name: None)
    monkeypatch.setattr(reports.os, "getloadavg", lambda: (99.0, 0.0, 0.0), raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGELM_CACHE", str(tmp_path / "file" / "below"))
    facts = edgelm.doctor()
    assert "problem" in facts["flash"]
    text = "\n".join(facts["warnings"])
    assert "llamacpp is not used: it crashed; reinstall or remove it, then run `edgelm doctor --recheck`" in text
    assert "numpy is not used" not in text
    assert "pip install 'edgelm[llamacpp]'" in text
    assert "no C++ compiler was found" in text
    assert "load 99.0" in text
    assert "set EDGELM_CACHE to a writable folder" in text


def test_a_slow_way_of_reading_is_a_warning(monkeypatch):
    flash = {"read_bytes_per_s": 1.0, "direct": False, "how": "buffered", "measured_on": "x"}
    monkeypatch.setattr(reports, "_flash", lambda path, recheck: flash)
    assert any("refuses direct reads" in warning for warning in edgelm.doctor()["warnings"])
