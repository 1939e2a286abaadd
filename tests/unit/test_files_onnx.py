"""The reader of ONNX graphs: what it says equals what the onnx package says, and each way to be wrong has its error."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgelm.errors import EdgeLMError, ModelFileError, ModelNotFound, UnsupportedModel
from edgelm.files.errors import BadHeader, BadTensor, MissingPart, NotAModelFile, TruncatedFile
from edgelm.files.graph import ITEM_BITS
from edgelm.files.onnx import MAX_DEPTH, read_graph
from edgelm.testing.tiny_genai import tiny_genai

onnx = pytest.importorskip("onnx")
DATA = "model.onnx.data"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_genai(tmp_path_factory.mktemp("graph") / "model", "qwen2", quantized=True, n_layers=1)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def change(folder: Path, edit: Callable[[Any], object]) -> Path:
    """Edit the graph's protobuf and return its path; the weights stay where they are."""
    path = folder / "model.onnx"
    model = onnx.load(str(path), load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    return path


def place(model: Any, key: str, value: object) -> None:
    """Change where the first weight outside the graph's own file is said to be."""
    weight = next(weight for weight in model.graph.initializer if weight.external_data)
    entry = next(entry for entry in weight.external_data if entry.key == key)
    entry.value = str(value)


@pytest.mark.parametrize("inline", [False, True])
def test_says_what_the_onnx_package_says(tmp_path: Path, inline: bool) -> None:
    path = tiny_genai(tmp_path, "qwen2", inline=inline, n_layers=2) / "model.onnx"
    graph, theirs = read_graph(path), onnx.load(str(path), load_external_data=False).graph
    assert [node.op for node in graph.nodes] == [node.op_type for node in theirs.node]
    assert [node.inputs for node in graph.nodes] == [tuple(node.input) for node in theirs.node]
    assert [node.outputs for node in graph.nodes] == [tuple(node.output) for node in theirs.node]
    heads = next(node for node in graph.nodes if node.op == "GroupQueryAttention").numbers
    assert heads["num_heads"], heads["kv_num_heads"] == (4, 2)
    for ours, others in ((graph.inputs, theirs.input), (graph.outputs, theirs.output)):
        assert list(ours) == [port.name for port in others]
        for port in others:
            tensor = port.type.tensor_type
            assert ours[port.name].shape == tuple(dim.dim_value for dim in tensor.shape.dim)
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            assert ours[port.name].type == kind.name
    assert list(graph.weights) == [weight.name for weight in theirs.initializer]
    for weight in theirs.initializer:
        found = graph.weights[weight.name]
        assert found.shape == tuple(weight.dims)
        external = {entry.key: entry.value for entry in weight.external_data}
        if external:
            assert graph.files[found.file] == path.with_name(external["location"])
            assert (found.offset, found.n_bytes) == (int(external["offset"]), int(external["length"]))
        else:
            assert found.file == -1
            assert found.n_bytes == len(weight.raw_data)
    assert bool(graph.files) != inline


def test_types_have_the_numbers_that_onnx_gives_them(folder: Path) -> None:
    known = set()
    for name, number in onnx.TensorProto.DataType.items():
        if name in ("UNDEFINED", "STRING") or name.startswith("FLOAT6"):
            continue
        path = change(
            folder, lambda model, number=number: setattr(model.graph.input[0].type.tensor_type, "elem_type", number)
        )
        known.add(kind := next(iter(read_graph(path).inputs.values())).type)
        assert kind == {"FLOAT": "float32", "DOUBLE": "float64"}.get(name, name.lower())
    assert known == set(ITEM_BITS)


def test_weights_of_inner_graphs_and_constants_count(folder: Path) -> None:
    def edit(model: Any) -> None:
        helper = onnx.helper
        value = helper.make_tensor("inside", onnx.TensorProto.FLOAT, [2, 3], [0.0] * 6)
        constant = helper.make_node("Constant", [], ["of a branch"], value=value)
        branch = helper.make_graph([constant], "branch", [], [])
        model.graph.node.append(
            helper.make_node("If", ["condition"], ["chosen"], then_branch=branch, else_branch=branch)
        )

    path = folder / "model.onnx"
    with pytest.raises(BadTensor, match="two weights have the name 'of a branch'"):
        read_graph(change(folder, edit))

    def rename(model: Any) -> None:
        del model.graph.node[-1].attribute[1]

    graph = read_graph(change(folder, rename))
    assert graph.weights["of a branch"].n_bytes == 24
    assert [node.op for node in graph.nodes][-2:] == ["Constant", "If"]
    assert path.exists()


WRONG: dict[str, tuple[Callable[[Any], object], type[Exception], str]] = {
    "weights that end behind their file": (
        lambda m: place(m, "offset", 10**9), TruncatedFile, "ends at 1000",
    ),
    "a place before the file": (lambda m: place(m, "offset", -8), TruncatedFile, "ends at"),
    "a place that is no number": (lambda m: place(m, "offset", "x"), BadTensor, "not a number"),
    "another length": (lambda m: place(m, "length", 4), BadTensor, "4 are promised"),
    "a file above the folder": (
        lambda m: place(m, "location", "../model.onnx.data"), BadHeader, "not a file of this folder",
    ),
    "a file anywhere": (
        lambda m: place(m, "location", "/etc/passwd"), BadHeader, "not a file of this folder",
    ),
    "a file that is missing": (
        lambda m: place(m, "location", "other.data"), MissingPart, "not beside it",
    ),
    "an unknown type": (lambda m: setattr(m.graph.initializer[0], "data_type", 99), BadTensor, "unknown type 99"),
    "a negative dimension": (lambda m: m.graph.initializer[0].dims.append(-1), BadTensor, "impossible shape"),
    "an endless dimension": (lambda m: m.graph.initializer[0].dims.append(2**62), BadTensor, "impossible shape"),
    "a name twice": (
        lambda m: setattr(m.graph.initializer[0], "name", m.graph.initializer[1].name), BadTensor, "two weights",
    ),
    "sparse weights": (lambda m: m.graph.sparse_initializer.add(), UnsupportedModel, "sparse"),
    "no graph": (lambda m: m.ClearField("graph"), NotAModelFile, "0 graphs"),
}  # fmt: skip


@pytest.mark.parametrize("how", WRONG)
def test_each_wrong_has_its_error(how: str, folder: Path) -> None:
    edit, error, words = WRONG[how]
    with pytest.raises(error, match=words):
        read_graph(change(folder, edit))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"GGUF" + bytes(64), "graph"),
        (b"<!doctype html>" * 4, "damaged|graph"),
        (b"\xff" * 64, "too long"),
    ],
)
def test_other_files_are_told_apart(folder: Path, content: bytes, words: str) -> None:
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ModelFileError, match=words):
        read_graph(folder / "model.onnx")


def test_missing_files_and_folders(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        read_graph(folder / "other.onnx")
    with pytest.raises(NotAModelFile, match="not a file"):
        read_graph(folder)
    (folder / DATA).write_bytes((folder / DATA).read_bytes()[:-1])
    with pytest.raises(TruncatedFile, match="the weight"):
        read_graph(folder / "model.onnx")


def test_graphs_cannot_be_nested_without_end(folder: Path) -> None:
    helper = onnx.helper

    def edit(model: Any) -> None:
        inner = helper.make_graph([], "end", [], [])
        for _ in range(MAX_DEPTH + 1):
            inner = helper.make_graph([helper.make_node("Loop", [], [], body=inner)], "one more", [], [])
        model.graph.node.append(helper.make_node("Loop", [], [], body=inner))

    with pytest.raises(BadHeader, match="nested"):
        read_graph(change(folder, edit))


def test_any_bytes_are_read_or_refused(folder: Path) -> None:
    path = folder / "model.onnx"
    content = path.read_bytes()
    refused = 0
    for seed in range(400):
        path.write_bytes(damaged(content, random.Random(seed)))
        try:
            read_graph(path)
        except EdgeLMError:
            refused += 1
    assert 200 < refused < 400, "some bytes do not matter, most do"


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return the bytes with a few bits flipped, a stretch cleared or repeated, or the end cut off."""
    data = bytearray(content)
    at = rng.randrange(len(data))
    match rng.randrange(4):
        case 0:
            for _ in range(rng.choice((1, 2, 20))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data[at : at + 16] = bytes(len(data[at : at + 16]))
        case 3:
            data[at:at] = data[at : at + 16]
    return bytes(data)
