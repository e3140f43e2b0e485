"""`sparse-compile demo`, with a tiny model in the place of SmolLM2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from sparse_compile import cli
from sparse_compile.cli import demo as demo_module
from sparse_compile.errors import UnsupportedEnvironmentError, WeightsError

TOKENS = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of two layers, and a tokenizer with one token a byte."""
    pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,  # logits far apart: no two tokens are nearly as good
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short text, and no code generated: rewritten graphs run operator by operator.

    CI runs the real thing as the README's first command.
    """
    from sparse_compile import backend

    path = tmp_path / "text.txt"
    path.write_text("Alice was beginning to get very tired")
    monkeypatch.setattr(demo_module, "TEXT", path)
    monkeypatch.setattr(backend, "sparse_compile", backend.rewrite_only)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli.cli, ["demo", *arguments], standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result.return_value, result.stdout


def expected_tokens(folder: Path, prompt: str, count: int) -> list[int]:
    """Greedy decoding without any cache: the definition."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            best = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, best], dim=1)
    return ids[0, start:].tolist()


@pytest.mark.slow
def test_json_says_what_was_measured(tiny, quick):
    code, out = run("--weights", str(tiny), "--tokens", str(TOKENS), "--json")
    outcome = json.loads(out)
    assert code == 0
    assert outcome["equal"] is True
    assert outcome["difference"] is None
    expected = expected_tokens(tiny, demo_module.TEXT.read_text(), TOKENS)
    assert outcome["eager"]["tokens"] == outcome["compiled"]["tokens"] == expected
    assert outcome["prompt_tokens"] == 37
    for way in ("eager", "compiled"):
        assert outcome[way]["first_run_s"] > 0
        assert outcome[way]["prefill_ms"] > 0
        assert outcome[way]["decode_ms"] > 0
    graphs = outcome["report"]["graphs"]
    assert [len(graph["sites"]) for graph in graphs] == [2, 2]  # the prompt's and the decoding's


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_site_is_rewritten(tiny, quick, attention):
    code, out = run("--weights", str(tiny), "--tokens", "4", "--attn", attention, "--json")
    sites = [site for graph in json.loads(out)["report"]["graphs"] for site in graph["sites"]]
    assert code == 0
    assert [(site["status"], site["reason"]) for site in sites] == [("rewritten", None)] * 4


@pytest.mark.slow
def test_the_tables_are_for_people(tiny, quick):
    code, out = run("--weights", str(tiny), "--tokens", "4")
    assert code == 0
    assert "all 4 tokens equal eager's" in out
    assert "model.layers.[0-1].self_attn" in out
    assert "beginning to get very tired" in out
    assert "peak memory" in out


@pytest.mark.slow
def test_other_tokens_are_shown_and_exit_with_1(tiny, quick, monkeypatch):
    import torch

    from sparse_compile.integrations import greedy

    right = greedy.continue_greedily

    def wrong(forward, prompt, cache, n_tokens):
        found = right(forward, prompt, cache, n_tokens)
        if not isinstance(forward, torch._dynamo.OptimizedModule) or n_tokens < 4:
            return found
        other = (found.tokens[2] + 1) % 256
        return greedy.Continuation(
            tokens=(*found.tokens[:2], other, *found.tokens[3:]),
            step_ms=found.step_ms,
            gaps=found.gaps,
        )

    monkeypatch.setattr(greedy, "continue_greedily", wrong)
    code, out = run("--weights", str(tiny), "--tokens", "5")
    assert code == 1
    assert "tokens differ from number 3 of 5" in out
    assert "eager's two best logits there are" in out


def test_the_text_is_in_the_package():
    text = demo_module.TEXT.read_text(encoding="utf-8")
    assert text.startswith("Alice was beginning to get very tired of sitting by her sister")
    assert 300 < len(text.split()) < 500


def test_help_imports_no_torch():
    program = (
        "import sys; from sparse_compile.cli import main; code = main(['demo', '--help']); "
        "sys.exit(code or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--weights auto|hub|pypi|PATH" in done.stdout


def test_a_gpu_that_is_absent_is_said(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedEnvironmentError, match="a GPU was asked for but is absent"):
        run("--device", "cuda")


def test_transformers_that_is_absent_is_said(monkeypatch):
    find = demo_module.importlib.util.find_spec
    monkeypatch.setattr(
        demo_module.importlib.util,
        "find_spec",
        lambda name: None if name == "transformers" else find(name),
    )
    with pytest.raises(UnsupportedEnvironmentError, match=r"sparse-compile\[hf\]"):
        run()


def test_a_missing_compiler_is_said(monkeypatch):
    from sparse_compile import _compat

    monkeypatch.setattr(_compat, "cpp_compiler", lambda: None)
    with pytest.raises(UnsupportedEnvironmentError, match="no C\\+\\+ compiler"):
        run()


def test_weights_that_are_absent_are_said(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(WeightsError, match="does not exist"):
        run("--weights", str(tmp_path / "none"))


@pytest.mark.parametrize("tokens", ["3", "1025", "many"])
def test_wrong_usage_exits_with_2(tokens):
    assert cli.main(["demo", "--tokens", tokens]) == 2


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no high-water mark")
def test_peak_memory_of_a_cpu_is_what_was_allocated():
    import torch

    from sparse_compile.integrations.memory import PeakMemory

    n_bytes = 256 << 20
    torch.ones(1 << 20).sum()  # threads exist
    with PeakMemory("cpu") as peak:
        for _ in range(2):  # freed in between: counted once
            part = torch.ones(n_bytes // 4)
            del part
        small = torch.ones(8 << 20)
    assert small.numel()
    # the kernel counts pages in batches for each processor
    assert n_bytes - (2 << 20) <= peak.n_bytes <= n_bytes + (48 << 20)
    with PeakMemory("cpu") as nothing:
        pass
    assert nothing.n_bytes <= 1 << 20


def test_peak_memory_that_cannot_be_measured_is_none(monkeypatch, tmp_path):
    from sparse_compile.integrations import memory

    monkeypatch.setattr(memory, "RESET", tmp_path)  # a folder cannot be written to
    with memory.PeakMemory("cpu") as peak:
        pass
    assert peak.n_bytes is None
