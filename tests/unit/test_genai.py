"""Folders of onnxruntime-genai: what the configuration may say, and that it must fit the graph."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm.engine import graphs, health
from edgelm.errors import BackendUnavailable, BudgetTooSmall, ConfigError, ModelFileError, UnsupportedModel
from edgelm.files.errors import BadHeader
from edgelm.files.genai import read_genai_folder
from edgelm.testing.tiny_genai import tiny_genai

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_genai(tmp_path_factory.mktemp("genai") / "model", n_layers=2)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def configure(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    edit(config["model"])
    path.write_text(json.dumps(config))
    return folder


def change(folder: Path, edit: Callable[[Any], object]) -> Path:
    path = folder / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    return folder


def test_a_folder_says_what_its_ports_mean(folder: Path) -> None:
    found = read_genai_folder(folder)
    model = found.model
    assert (found.kind, len(model.layers), model.n_kv_heads, model.head_dim) == ("llama", 2, 2, 16)
    assert model.layers[1] == ("past_key_values.1.key", "past_key_values.1.value", "present.1.key", "present.1.value")
    assert (model.cache_type, model.cache_in_place, model.sees_last, model.positions) == ("float32", True, False, None)
    assert model.n_context == 256
    assert found.eos_ids == (288,)
    assert found.search.float("temperature") == 0.5


def test_caches_that_are_copied_are_recognised(tmp_path: Path) -> None:
    model = read_genai_folder(tiny_genai(tmp_path, n_kv_heads=4, in_place=False, last_only=True)).model
    assert (model.cache_in_place, model.sees_last, model.positions) == (False, True, "position_ids")


UNSUPPORTED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a model that reads images": (lambda m: m.update(vision={"filename": "vision.onnx"}), "reads images"),
    "a model that hears": (lambda m: m.update(speech={"filename": "speech.onnx"}), "hears speech"),
    "an encoder": (lambda m: m.update(encoder={"filename": "encoder.onnx"}), "encoder beside the decoder"),
    "a pipeline": (lambda m: m["decoder"].update(pipeline=[{"a": {}}]), "pipeline of several graphs"),
    "caches that slide": (
        lambda m: m["decoder"].update(sliding_window={"window_size": 64}), "caches must slide",
    ),
    "operators of its own": (
        lambda m: m["decoder"]["session_options"].update(custom_ops_library="ops.so"), "does not load",
    ),
    "no type": (lambda m: m.pop("type"), "does not say type"),
    "no sizes": (lambda m: m["decoder"].pop("head_size"), "does not say head_size"),
    "names that the graph does not know": (
        lambda m: m["decoder"]["inputs"].update(past_key_names="past_%d"), "no input 'past_0'",
    ),
    "more layers than the graph has": (
        lambda m: m["decoder"].update(num_hidden_layers=3), "no input 'past_key_values.2.key'",
    ),
    "fewer layers than the graph has": (
        lambda m: m["decoder"].update(num_hidden_layers=1), "asks for 'past_key_values.1.key'",
    ),
    "another number of heads": (lambda m: m["decoder"].update(num_key_value_heads=3), "has the shape"),
    "another width of heads": (lambda m: m["decoder"].update(head_size=32), "has the shape"),
}  # fmt: skip


@pytest.mark.parametrize("how", UNSUPPORTED)
def test_what_edgelm_does_not_run_is_said(how: str, folder: Path) -> None:
    edit, words = UNSUPPORTED[how]
    with pytest.raises(UnsupportedModel, match=words):
        read_genai_folder(configure(folder, edit))


WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a graph above the folder": (lambda m: m["decoder"].update(filename="../model.onnx"), "not a file of this folder"),
    "a name without a number": (
        lambda m: m["decoder"]["inputs"].update(past_key_names="past"), "no %d for the layer",
    ),
    "too many layers": (lambda m: m["decoder"].update(num_hidden_layers=10**6), "not between"),
    "layers as text": (lambda m: m["decoder"].update(num_hidden_layers="2"), "not a whole number"),
    "a decoder that is none": (lambda m: m.update(decoder=[]), "not an object"),
    "an end that is no token": (lambda m: m.update(eos_token_id=[1.5]), "not a list of token ids"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_what_cannot_be_is_a_bad_header(how: str, folder: Path) -> None:
    edit, words = WRONG[how]
    with pytest.raises(ModelFileError, match=words):
        read_genai_folder(configure(folder, edit))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_configuration_that_is_no_json_object(content: bytes, folder: Path) -> None:
    (folder / "genai_config.json").write_bytes(content)
    with pytest.raises(BadHeader):
        read_genai_folder(folder)


def cast_port(model: Any, name: str, number: int) -> None:
    port = next(port for port in (*model.graph.input, *model.graph.output) if port.name == name)
    port.type.tensor_type.elem_type = number


def add_input(model: Any) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("mrope", onnx.TensorProto.INT64, [1]))


def compile_it(model: Any) -> None:
    model.graph.node.append(onnx.helper.make_node("EPContext", [], []))


def choose_rotations(model: Any) -> None:
    helper = onnx.helper
    branch = helper.make_graph([helper.make_node("Identity", ["cos"], ["chosen cos"])], "branch", [], [])
    model.graph.node.append(helper.make_node("If", ["long"], ["table"], then_branch=branch, else_branch=branch))


def test_a_graph_that_changes_its_rotations_keeps_to_the_first(folder: Path) -> None:
    configure(folder, lambda m: m.update(context_length=131_072))
    assert read_genai_folder(folder).model.n_context == 131_072
    assert read_genai_folder(change(folder, choose_rotations)).model.n_context == 4096


UNFIT: dict[str, tuple[Callable[[Any], object], str]] = {
    "an input that nobody knows": (add_input, "asks for 'mrope'"),
    "a graph for one device": (compile_it, "compiled for one device"),
    "ids as text": (lambda m: cast_port(m, "input_ids", onnx.TensorProto.FLOAT), "'input_ids' is of type float32"),
    "caches in a type without arithmetic": (
        lambda m: cast_port(m, "past_key_values.0.key", onnx.TensorProto.BFLOAT16), "is of type bfloat16",
    ),
    "caches of two types": (
        lambda m: cast_port(m, "past_key_values.0.key", onnx.TensorProto.FLOAT16), "several types",
    ),
    "a fixed length": (
        lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 64), "has the shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", UNFIT)
def test_a_graph_that_does_not_fit_is_said(how: str, folder: Path) -> None:
    edit, words = UNFIT[how]
    with pytest.raises(UnsupportedModel, match=words):
        read_genai_folder(change(folder, edit))


def test_a_folder_is_shown_like_a_file(folder: Path) -> None:
    shown = edgelm.inspect(folder)
    assert shown.architecture == "llama"
    assert shown.metadata["llama.context_length"] == 256
    assert shown.metadata["genai.search.temperature"] == 0.5
    assert shown.template is not None
    assert "im_start" in shown.template
    head = next(tensor for tensor in shown.tensors if tensor.name == "token_embd.weight")
    assert (head.type, head.shape[0], head.size_bytes) == ("float32", 64, head.shape[1] * 64 * 4)


def test_a_plan_says_what_is_resident_and_a_small_budget_what_is_needed(folder: Path) -> None:
    plan = edgelm.plan(folder, memory="400MB", context=64)
    assert (plan.streamed, plan.context) == ((), 64)
    assert plan.pinned_bytes > sum(path.stat().st_size for path in folder.glob("*.data"))
    with pytest.raises(BudgetTooSmall, match=r"weights|interpreter") as refused:
        edgelm.plan(folder, memory="20MB")
    assert 20e6 < refused.value.needed_bytes < 400e6
    assert refused.value.items[0][1] > 0


def test_backends_are_compared(folder: Path) -> None:
    first, *others = edgelm.candidates(folder, memory="400MB", context=64)
    assert (first.name, first.chosen, first.streamed_bytes) == ("onnx", True, 0)
    assert first.planned_bytes == pytest.approx(edgelm.plan(folder, memory="400MB", context=64).planned_bytes, rel=0.1)
    assert {other.name for other in others} >= {"numpy", "llamacpp"}
    assert not any(other.chosen for other in others)
    needed = next(found for found in edgelm.candidates(folder, memory="20MB") if found.name == "onnx").needed_bytes
    assert needed is not None
    assert needed > 20e6


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"backend": "numpy"}, BackendUnavailable, "one ONNX graph"),
        ({"simulate": "pi4-sd"}, ConfigError, "leave --simulate out"),
        ({"kv": "q8_0"}, ConfigError, "leave --kv out"),
        ({"context": 257}, ConfigError, "more than the 256 tokens"),
        ({"threads": 0}, ConfigError, "threads must be"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], error: type[Exception], words: str, folder: Path) -> None:
    with pytest.raises(error, match=words):
        edgelm.plan(folder, memory="400MB", **options)


def test_a_graph_that_onnx_runtime_refuses_is_a_model_file_error(folder: Path) -> None:
    def break_it(model: Any) -> None:
        node = next(node for node in model.graph.node if node.op_type == "MatMul")
        node.op_type, node.domain = "NoSuchOperator", "com.microsoft"

    change(folder, break_it)
    with pytest.raises((ModelFileError, UnsupportedModel), match="ONNX Runtime") as refused:
        edgelm.load(folder, memory="400MB")
    assert "NoSuchOperator" in str(refused.value)


def test_a_graph_needs_no_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on aarch64, where ONNX Runtime packs matrices in another way."""
    from edgelm_onnx import BACKEND, proof

    def lost() -> None:
        raise BackendUnavailable("onnx", "the packed bytes of a matrix were not found in memory")

    monkeypatch.setattr(proof, "prove", lost)
    found = BACKEND.probe()
    assert (found.available, found.graphs) == (False, True)
    assert found.version.startswith("onnxruntime ")
    verdict = health._verdict({**found._asdict(), "identity": "x"})
    monkeypatch.setattr(graphs, "check", lambda name: verdict)
    assert graphs.choose_for_graph("auto")[1] == "onnx"
    monkeypatch.setattr(graphs, "check", lambda name: verdict._replace(graphs=False))
    with pytest.raises(BackendUnavailable, match="packed bytes"):
        graphs.choose_for_graph("onnx")
