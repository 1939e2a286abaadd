"""One small bad file for each way the sections of a pack can be wrong, and the error that each must raise."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_64_intdigest

import edgelm
from edgelm.errors import EdgeLMError, ModelFileError, UnsupportedModel
from edgelm.files import DamagedPack, TruncatedFile, pack
from edgelm.files.gguf import open_model
from edgelm.files.index import open_indexed
from edgelm.files.pack import CHECKSUMS, INDEX, PAGE, TOKENIZER, Section, footer
from edgelm.testing import tiny_model
from edgelm.text.tokenizer import load_tokenizer

Sections = dict[int, Section]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edgelm.pack(tiny_model(tmp_path_factory.mktemp("pack") / "tiny.gguf", "llama", n_layers=1)).path


def sections_of(path: Path) -> Sections:
    file = open_indexed(path)
    assert file.pack is not None
    return dict(file.pack.sections)


def with_footer(content: bytes, sections: Sequence[Section], n_bytes: int | None = None) -> bytes:
    return content[:-PAGE] + footer(sections, len(content) if n_bytes is None else n_bytes, xxh3_64_intdigest)


def with_section(content: bytes, sections: Sections, kind: int, data: bytes) -> bytes:
    """Put other bytes into a section that has room for them, and make all checksums right."""
    old = sections[kind]
    later = min((s.offset for s in sections.values() if s.offset > old.offset), default=len(content) - PAGE)
    assert len(data) <= later - old.offset
    content = content[: old.offset] + data + content[old.offset + len(data) :]
    new = {**sections, kind: old._replace(n_bytes=len(data), checksum=xxh3_64_intdigest(data))}
    return with_footer(content, list(new.values()))


def edited_index(edit: Callable[[dict[str, Any]], Any]) -> Callable[[bytes, Sections], bytes]:
    def apply(content: bytes, sections: Sections) -> bytes:
        section = sections[INDEX]
        index = json.loads(content[section.offset : section.offset + section.n_bytes])
        edit(index)
        return with_section(content, sections, INDEX, json.dumps(index).encode())

    return apply


def with_entry(kind: int, **changes: int) -> Callable[[bytes, Sections], bytes]:
    return lambda content, sections: with_footer(
        content, [s._replace(**changes) if s.kind == kind else s for s in sections.values()]
    )


def flipped(at: int | tuple[int, int]) -> Callable[[bytes, Sections], bytes]:
    def apply(content: bytes, sections: Sections) -> bytes:
        place = at % len(content) if isinstance(at, int) else sections[at[0]].offset + at[1]
        return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]

    return apply


def set_tensor(field: int, value: Any) -> Callable[[bytes, Sections], bytes]:
    return edited_index(lambda index: index["tensors"][3].__setitem__(field, value))


def in_footer(at: int, value: bytes) -> Callable[[bytes, Sections], bytes]:
    """Overwrite a field of the footer and make its checksum right."""

    def apply(content: bytes, sections: Sections) -> bytes:
        page = bytearray(content[-PAGE:-8])
        page[at : at + len(value)] = value
        return content[:-PAGE] + page + struct.pack("<Q", xxh3_64_intdigest(bytes(page)))

    return apply


BAD: dict[str, tuple[Callable[[bytes, Sections], bytes], type[EdgeLMError], str]] = {
    # the footer
    "no footer": (lambda content, _: content[:-PAGE], DamagedPack, "footer of the pack (its last 4096 bytes) is"),
    "cut in the footer": (lambda content, _: content[:-100], DamagedPack, "is missing or overwritten"),
    "something appended": (lambda content, _: content + b"x", DamagedPack, "is missing or overwritten"),
    "zeros for a footer": (lambda content, _: content[:-PAGE] + bytes(PAGE), DamagedPack, "is missing or overwritten"),
    "magic flipped": (flipped(-PAGE), DamagedPack, "is missing or overwritten"),
    "version flipped": (flipped(-PAGE + 8), DamagedPack, "footer of the pack (its last 4096 bytes) does not match"),
    "padding flipped": (flipped(-2000), DamagedPack, "footer of the pack (its last 4096 bytes) does not match"),
    "checksum flipped": (flipped(-1), DamagedPack, "footer of the pack (its last 4096 bytes) does not match"),
    "newer version": (in_footer(8, b"\x02"), UnsupportedModel, "pack of version 2"),
    "other size": (lambda c, s: with_footer(c, [*s.values()], len(c) + PAGE), DamagedPack, "promises"),
    "page missing inside": (lambda content, _: content[: 8 * PAGE] + content[9 * PAGE :], DamagedPack, "the file has"),
    "many sections": (in_footer(12, struct.pack("<I", 65)), DamagedPack, "65 sections"),
    "endless sections": (in_footer(12, struct.pack("<I", 2**32 - 1)), DamagedPack, "4294967295 sections"),
    "section twice": (lambda c, s: with_footer(c, [*s.values(), s[INDEX]]), DamagedPack, "index of the pack is listed"),
    "no index": (lambda c, s: with_footer(c, [s[TOKENIZER], s[CHECKSUMS]]), DamagedPack, "index of the pack is"),
    "no checksums": (lambda c, s: with_footer(c, [s[TOKENIZER], s[INDEX]]), DamagedPack, "checksum table of the pack"),
    "index of another format": (with_entry(INDEX, format=2), DamagedPack, "header index of the pack is missing"),
    "section past the end": (with_entry(INDEX, offset=2**40), DamagedPack, "between the tensors and the footer"),
    "section over the footer": (with_entry(INDEX, n_bytes=5 * PAGE), DamagedPack, "between the tensors and the footer"),
    "section wraps around": (with_entry(CHECKSUMS, offset=2**64 - PAGE), DamagedPack, "between the tensors"),
    "section not aligned": (with_entry(CHECKSUMS, offset=PAGE + 8), DamagedPack, "aligned"),
    "tables not aligned": (with_entry(TOKENIZER, offset=PAGE), DamagedPack, "aligned"),
    "empty section": (with_entry(TOKENIZER, n_bytes=0), DamagedPack, "tokenizer section of the pack has 0 bytes"),
    "huge section": (with_entry(INDEX, n_bytes=2**40), DamagedPack, "which no model needs"),
    # the header index
    "index flipped": (flipped((INDEX, 30)), DamagedPack, "header index of the pack does not match its checksum"),
    "index is no JSON": (lambda c, s: with_section(c, s, INDEX, b"{nothing"), DamagedPack, "the pack makes no"),
    "index is a list": (lambda c, s: with_section(c, s, INDEX, b"[1]"), DamagedPack, "the pack makes no sense"),
    "index is not text": (lambda c, s: with_section(c, s, INDEX, b"\xff{}"), DamagedPack, "the pack makes no"),
    "index without tensors": (edited_index(lambda index: index.pop("tensors")), DamagedPack, "makes no sense"),
    "numbers are a list": (edited_index(lambda index: index.update(numbers=[1])), DamagedPack, "makes no sense"),
    "architecture is a number": (edited_index(lambda index: index.update(architecture=1)), DamagedPack, "makes no"),
    "arrays are a number": (edited_index(lambda index: index.update(arrays=7)), DamagedPack, "makes no sense"),
    "tensor past the end": (set_tensor(4, 2**40), DamagedPack, "makes no sense"),
    "tensor before the file": (set_tensor(4, -32), DamagedPack, "makes no sense"),
    "tensor of another file": (set_tensor(3, 1), DamagedPack, "makes no sense"),
    "tensor of file -1": (set_tensor(3, -1), DamagedPack, "makes no sense"),
    "tensor of unknown type": (set_tensor(1, 999), DamagedPack, "makes no sense"),
    "tensor without a shape": (set_tensor(2, []), DamagedPack, "makes no sense"),
    "tensor with a shape of text": (set_tensor(2, ["a"]), DamagedPack, "makes no sense"),
    "tensor with a side of 0": (set_tensor(2, [0, 5]), DamagedPack, "makes no sense"),
    "tensor of other size": (set_tensor(5, 64), DamagedPack, "makes no sense"),
    "tensor name is a number": (set_tensor(0, 5), DamagedPack, "makes no sense"),
    "tile of 0 rows": (set_tensor(6, 0), DamagedPack, "makes no sense"),
    "tile of half a row": (set_tensor(6, 0.5), DamagedPack, "makes no sense"),
    # the checksum table
    "checksums flipped": (flipped((CHECKSUMS, 9)), DamagedPack, "checksum table of the pack does not match"),
    "a checksum too few": (lambda c, s: with_section(c, s, CHECKSUMS, bytes(8)), DamagedPack, "has 8 bytes, the t"),
    # the tokenizer tables
    "tables flipped": (flipped((TOKENIZER, 5000)), DamagedPack, "tokenizer section of the pack does not match"),
    "tables are nonsense": (lambda c, s: with_section(c, s, TOKENIZER, b"\xff" * 99), ModelFileError, "makes no sense"),
    "tables are short": (lambda c, s: with_section(c, s, TOKENIZER, b"xy"), ModelFileError, "makes no sense"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_pack_raises_its_own_error(name: str, packed: Path, tmp_path: Path) -> None:
    damage, kind, fact = BAD[name]
    path = tmp_path / "bad.gguf"
    content = packed.read_bytes()
    path.write_bytes(damage(content, sections_of(packed)))
    assert path.read_bytes() != content
    with pytest.raises(EdgeLMError) as caught:
        load_tokenizer(open_indexed(path))
    assert type(caught.value) is kind
    assert fact in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "; " in str(caught.value), "a fact needs a next step"


def test_a_section_of_an_unknown_kind_is_passed_over(packed: Path, tmp_path: Path) -> None:
    content, sections = packed.read_bytes(), sections_of(packed)
    path = tmp_path / "later.gguf"
    path.write_bytes(with_footer(content, [*sections.values(), Section(77, 1, sections[INDEX].offset, 5, 0)]))
    assert load_tokenizer(open_indexed(path)).n_vocab == load_tokenizer(open_model(packed)).n_vocab


def test_every_truncation_is_noticed(packed: Path, tmp_path: Path) -> None:
    content = packed.read_bytes()
    path = tmp_path / "cut.gguf"
    for n_bytes in {*range(0, len(content), 3001), len(content) - 1}:
        path.write_bytes(content[:n_bytes])
        with pytest.raises(ModelFileError):
            open_indexed(path)
    path.write_bytes(content[: len(content) // 3])
    with pytest.raises(TruncatedFile):
        open_indexed(path)


def test_no_flipped_bit_outside_the_tensors_goes_unnoticed_or_crashes(packed: Path, tmp_path: Path) -> None:
    """The padding between sections is nobody's; everything else is covered by a checksum."""
    content, choose = packed.read_bytes(), random.Random(1)
    sections = sections_of(packed)
    path = tmp_path / "flipped.gguf"
    places = [(s.offset, s.n_bytes) for s in sections.values()] + [(len(content) - PAGE, PAGE)]
    for start, n_bytes in places * 12:
        path.write_bytes(flipped(start + choose.randrange(n_bytes))(content, sections))
        with pytest.raises(DamagedPack):
            load_tokenizer(open_indexed(path))


def test_show_tells_of_damage(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(packed.read_bytes()[:-PAGE])
    with pytest.raises(DamagedPack, match="footer"):
        edgelm.inspect(path)
    path.write_bytes(flipped(-9)(packed.read_bytes(), {}))
    with pytest.raises(DamagedPack, match="footer"):
        edgelm.inspect(path)
    assert edgelm.inspect(packed).metadata[pack.SOURCE_KEY] == "tiny.gguf"
