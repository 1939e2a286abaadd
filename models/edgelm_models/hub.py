"""Fetch GGUF files and model folders from a model hub through huggingface_hub (the extra `edgelm[hub]`).

The files stay in that library's cache, shared with other tools; its settings (`HF_ENDPOINT`, `HF_HOME`,
`HF_HUB_OFFLINE`, tokens) hold here too. What the hub promises as sha256 is checked again after the download.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from edgelm.cachedir import read_json
from edgelm.errors import ConfigError, DownloadError
from edgelm_models.partial import digest_of, require_space, set_aside
from edgelm_models.progress import Observer, Silent

if TYPE_CHECKING:
    from collections.abc import Iterable

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_WITH_FILE = re.compile(rf"hf:({_PART}/{_PART})/(.+\.gguf)")
_WITH_QUANT = re.compile(rf"(?:hf:)?({_PART}/{_PART})(?::([A-Za-z0-9_.-]+))?")
_QUANT = re.compile(r"(?<![A-Za-z0-9])(I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|BF16|F16|F32)(?![A-Za-z0-9])", re.I)
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_CONFIG, _WEIGHTS = "config.json", ".safetensors"
_FOLDER_FILES = {
    _CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "model.safetensors.index.json",
}  # fmt: skip
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FOREIGN = ("huggingface_hub", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "hf_xet")


class HubName(NamedTuple):
    """`org/repo`, `org/repo:QUANT` or `hf:org/repo/file.gguf`."""

    repo: str
    quantization: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        if self.file:
            return f"hf:{self.repo}/{self.file}"
        return f"{self.repo}:{self.quantization}" if self.quantization else self.repo


class HubFiles(NamedTuple):
    """What came: absolute paths in the hub's cache, the shards of a split model in order. `file` is what to open."""

    file: str
    files: tuple[str, ...]
    size_bytes: int
    sha256: str
    quantization: str
    context: int | None
    licence: str


class _Remote(NamedTuple):
    name: str
    size_bytes: int
    sha256: str | None


def parse_hub_name(text: str) -> HubName | None:
    """Return what `text` asks a hub for, or None if it is no hub name."""
    if match := _WITH_FILE.fullmatch(text):
        return HubName(match[1], file=match[2])
    if text.endswith(".gguf"):
        return None
    if match := _WITH_QUANT.fullmatch(text):
        return HubName(match[1], quantization=match[2])
    return None


def fetch(name: HubName, *, offline: bool, observer: Observer) -> HubFiles:
    """Return the checked files of `name`; downloads resume where an earlier attempt stopped.

    Raises `DownloadError` if the library is missing, the hub refuses or cannot be reached, the disk is too
    small, or the bytes are not the promised ones; `ConfigError` if several files fit the name.
    """
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise DownloadError(
            f"{name} comes from a model hub, which needs huggingface_hub; run `pip install 'edgelm[hub]'`"
        ) from error
    try:
        return _local(name) if offline or constants.HF_HUB_OFFLINE else _download(name, observer)
    except Exception as error:
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _FOREIGN:
            raise _explained(name, error) from error
        raise


def _download(name: HubName, observer: Observer) -> HubFiles:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    info = HfApi().model_info(name.repo, files_metadata=True)
    remotes = [
        _Remote(sibling.rfilename, sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else None)
        for sibling in info.siblings or ()
    ]
    chosen = choose_files(name, [remote.name for remote in remotes])
    wanted = sorted((remote for remote in remotes if remote.name in chosen), key=lambda remote: remote.name)
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name.repo, repo_type="model") / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    missing_bytes = sum(r.size_bytes for r in wanted if r.sha256 is None or not (blobs / r.sha256).exists())
    require_space(blobs, missing_bytes)
    done_bytes, total_bytes = 0, sum(remote.size_bytes for remote in wanted)
    paths, digests = [], []
    for remote in wanted:
        path, digest = _fetch_file(name, remote, blobs, observer, (done_bytes, total_bytes))
        paths.append(str(path))
        digests.append(digest)
        done_bytes += remote.size_bytes
    gguf = getattr(info, "gguf", None) or {}
    licence = info.card_data.get("license") if info.card_data else None
    found = _found([Path(path) for path in paths], digests)
    return found._replace(
        context=gguf.get("context_length") or found.context, licence=str(licence or "see the hub's page")
    )


def _fetch_file(
    name: HubName, remote: _Remote, blobs: Path, observer: Observer, progress_bytes: tuple[int, int]
) -> tuple[Path, str]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # the observer shows the progress
    fresh = remote.sha256 is not None and not (blobs / remote.sha256).exists()
    if fresh and remote.sha256 is not None:
        from edgelm_models.hub_blob import Blob, download

        # The library finds the blob of a large file by its sha256, and then only links it into a snapshot.
        before_bytes, total_bytes = progress_bytes
        download(
            Blob(name.repo, remote.name, remote.size_bytes, remote.sha256),
            blobs / remote.sha256,
            lambda n_bytes: observer.progress(str(name), before_bytes + n_bytes, total_bytes),
        )
    path = Path(hf_hub_download(name.repo, remote.name))
    if fresh and remote.sha256 is not None and path.resolve() == (blobs / remote.sha256).resolve():
        return path, remote.sha256  # hashed while it was written
    return path, _checked_digest(path, remote, name, observer)


def _local(name: HubName) -> HubFiles:
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download(name.repo, local_files_only=True))
    present = [file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()]
    chosen = sorted(choose_files(name, present))
    paths = [snapshot / file for file in chosen]
    digests = []
    for path, file in zip(paths, chosen, strict=True):
        blob = path.resolve().name  # the hub names the blob of a large file after its sha256
        promised = blob if _SHA256.fullmatch(blob) else None
        digests.append(_checked_digest(path, _Remote(file, 0, promised), name, Silent()))
    return _found(paths, digests)


def _found(paths: list[Path], digests: list[str]) -> HubFiles:
    """Describe checked files: of a folder, what its config.json says."""
    opened, quantization, context = paths[0], quantization_of(paths[0].name), None
    weights = next((at for at, path in enumerate(paths) if path.suffix == _WEIGHTS), 0)
    for path in paths:
        if path.name == _CONFIG:
            config = read_json(path) or {}
            bits, dtype = (config.get("quantization") or {}).get("bits"), config.get("torch_dtype", config.get("dtype"))
            opened, quantization = path.parent, f"MLX {bits}-bit" if bits else str(dtype or "?")
            context = config.get("max_position_embeddings")
    return HubFiles(
        file=str(opened),
        files=tuple(map(str, paths)),
        size_bytes=sum(path.stat().st_size for path in paths),
        sha256=digests[weights],
        quantization=quantization,
        context=context,
        licence="see the hub's page",
    )


def _checked_digest(path: Path, remote: _Remote, name: HubName, observer: Observer) -> str:
    found = digest_of(path)
    if remote.sha256 is None:
        if remote.name in _FOLDER_FILES:  # small texts, of which hubs keep none
            return found
        observer.notice(f"the hub gives no sha256 for {remote.name}; {found} was recorded, not checked")
    elif found != remote.sha256:
        blob = path.resolve()
        if blob != path:
            path.unlink()
        raise set_aside(blob, found, remote.sha256, str(name))
    return found


def quantization_of(file: str) -> str:
    """Return the quantization that a file name states, or `?`."""
    found = _QUANT.findall(PurePosixPath(file).name)
    return found[-1].upper() if found else "?"


def choose_files(name: HubName, files: Iterable[str]) -> set[str]:
    """Return the one GGUF file, or all shards of it, that `name` asks for; without any, the files of a model folder.

    Raises `ConfigError` naming the quantizations there are when none or several fit.
    """
    files = list(files)
    candidates = [file for file in files if file.endswith(".gguf") and "mmproj" not in file.lower()]
    if name.file is not None:
        fitting = [file for file in candidates if file == name.file]
    elif name.quantization is not None:
        wanted = re.compile(rf"(?<![A-Za-z0-9]){re.escape(name.quantization)}(?![A-Za-z0-9_])", re.I)
        fitting = [file for file in candidates if wanted.search(PurePosixPath(file).name)]
    else:
        fitting = candidates
    groups = {_SHARD.sub("", file) for file in fitting}
    if name.file is not None and fitting and (shard := _SHARD.search(name.file)):
        stem = _SHARD.sub("", name.file)
        fitting = [file for file in candidates if _SHARD.sub("", file) == stem and file.endswith(shard[2] + ".gguf")]
    if len(groups) == 1:
        return set(fitting)
    if not candidates:
        folder = {file for file in files if file in _FOLDER_FILES or (file.endswith(_WEIGHTS) and "/" not in file)}
        if str(name) == name.repo and _CONFIG in folder and any(file.endswith(_WEIGHTS) for file in folder):
            return folder
        raise ConfigError(
            f"{name.repo} holds no GGUF file, and no config.json with safetensors files that could be pulled whole; "
            "choose a repository whose name ends in -GGUF"
        )
    there = ", ".join(sorted({_label(file) for file in candidates}))
    fact = f"{len(groups)} files fit {name}" if groups else f"no file fits {name}"
    raise ConfigError(f"{fact}; name one of them like {name.repo}:QUANT or hf:{name.repo}/FILE (there are: {there})")


def _label(file: str) -> str:
    quantization = quantization_of(file)
    return file if quantization == "?" else quantization


def _explained(name: HubName, error: Exception) -> DownloadError:
    from huggingface_hub import errors

    cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(error, errors.GatedRepoError):
        step = "accept its terms on the hub's page and set HF_TOKEN, then pull again"
    elif isinstance(error, errors.RepositoryNotFoundError):
        step = "check the spelling; a private repository needs HF_TOKEN"
    elif isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled)):
        cause = f"offline, and not in the hub's cache: {cause}" if "offline" not in cause.lower() else cause
        step = "pull it once without --offline and HF_HUB_OFFLINE"
    else:
        step = "check the network and HF_ENDPOINT, then pull again: what arrived is kept"
    return DownloadError(f"{name} could not be fetched ({cause}); {step}")
