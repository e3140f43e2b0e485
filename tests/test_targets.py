"""TARGETs of `inspect`: what they may be, and what is said when they are not."""

import json
import sys
import textwrap

import pytest
import torch

from sparse_compile.errors import TargetError
from sparse_compile.inspect.targets import load_target

GOOD = """
    import torch

    def build():
        return torch.nn.Linear(4, 2), (torch.ones(3, 4),), {}

    def build_list():
        return torch.nn.Linear(4, 2), [torch.ones(3, 4)], {}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file into the current directory."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(content))
        return name

    return write


@pytest.fixture(autouse=True)
def _forget_modules():
    """Modules that a test imports from its folder do not outlive it."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("target_", "_inspected_")):
            del sys.modules[name]


def failure(text: str) -> str:
    with pytest.raises(TargetError) as caught:
        load_target(text)
    return str(caught.value)


class TestCode:
    @pytest.mark.parametrize("callable_name", ["build", "build_list"])
    def test_file(self, write, callable_name):
        target = load_target(f"{write('net.py', GOOD)}:{callable_name}")
        assert target.model(*target.args, **target.kwargs).shape == (3, 2)
        assert target.description == f"net.py:{callable_name}"

    def test_file_in_another_folder_by_absolute_path(self, write, tmp_path):
        write("deep/folder/net.py", GOOD)
        target = load_target(f"{tmp_path}/deep/folder/net.py:build")
        assert isinstance(target.model, torch.nn.Linear)

    def test_module_of_the_current_directory(self, write):
        write("target_net.py", GOOD)
        assert isinstance(load_target("target_net:build").model, torch.nn.Linear)

    def test_module_in_a_package_and_a_callable_in_a_class(self, write):
        write("target_package/__init__.py", "")
        write(
            "target_package/net.py",
            """
            import torch

            class Nets:
                @staticmethod
                def small():
                    return torch.nn.Linear(4, 2), (), {"input": torch.ones(3, 4)}
            """,
        )
        target = load_target("target_package.net:Nets.small")
        assert target.model(**target.kwargs).shape == (3, 2)

    def test_the_files_folder_and_the_current_one_can_be_imported_from(self, write):
        write("target_here.py", "HERE = 4")
        write("deep/target_beside.py", "BESIDE = 2")
        write(
            "deep/net.py",
            """
            import torch
            from target_beside import BESIDE

            def build():
                from target_here import HERE
                return torch.nn.Linear(HERE, BESIDE), (torch.ones(1, HERE),), {}
            """,
        )
        before = list(sys.path)
        assert load_target("deep/net.py:build").model.in_features == 4
        assert sys.path == before

    def test_a_file_named_like_a_library_is_not_that_library(self, write):
        write("torch.py", "import torch as real\n\ndef build():\n    return real.nn.ReLU(), (), {}")
        assert isinstance(load_target("torch.py:build").model, torch.nn.ReLU)

    def test_dataclasses_of_the_file_work(self, write):
        write(
            "net.py",
            """
            from __future__ import annotations
            from dataclasses import dataclass
            import torch

            @dataclass
            class Options:
                width: int = 4

            def build():
                return torch.nn.Linear(Options().width, 2), (), {}
            """,
        )
        assert load_target("net.py:build").model.in_features == 4


class TestCodeErrors:
    @pytest.mark.parametrize("text", ["nothing", "", ":", "net.py:", ":build", "missing_folder"])
    def test_nothing_that_could_be_meant(self, write, text):
        assert "is not found" in failure(text)

    def test_file_without_callable(self, write):
        write("net.py", GOOD)
        assert "`net.py:build`" in failure("net.py")

    def test_missing_file_says_where_it_looked(self, write, tmp_path):
        message = failure("gone.py:build")
        assert "There is no file 'gone.py'" in message
        assert str(tmp_path) in message

    def test_missing_module(self, write):
        message = failure("target_gone.sub:build")
        assert "There is no module 'target_gone'" in message

    def test_missing_submodule(self, write):
        assert "There is no module 'torch.gone'" in failure("torch.gone:build")

    def test_missing_callable_lists_what_is_there(self, write):
        write("net.py", GOOD)
        message = failure("net.py:biuld")
        assert "'biuld' is not there" in message
        assert "It defines build, build_list." in message

    def test_callable_that_is_none(self, write):
        write("net.py", "build = 3")
        message = failure("net.py:build")
        assert "type int, which cannot be called" in message
        assert "nothing to call" in message

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("import target_not_installed", "ModuleNotFoundError: No module named"),
            ("1 / 0", "ZeroDivisionError: division by zero"),
            ("def build(:", "SyntaxError"),
            ("raise SystemExit(3)", "SystemExit: 3"),
        ],
    )
    @pytest.mark.parametrize("place", ["target_bad.py", "target_bad"])
    def test_failing_import_shows_the_cause(self, write, content, said, place):
        write("target_bad.py", content)
        with pytest.raises(TargetError, match="Importing") as caught:
            load_target(f"{place}:build")
        assert said in str(caught.value)
        assert caught.value.__cause__ is not None

    def test_failing_callable_shows_the_cause(self, write):
        write("net.py", "def build():\n    raise ValueError('no weights')")
        with pytest.raises(TargetError, match="ValueError: no weights") as caught:
            load_target("net.py:build")
        assert isinstance(caught.value.__cause__, ValueError)

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ("None", "None"),
            ("net", "a value of type Linear"),
            ("(net, (x,))", "(Linear, tuple)"),
            ("(net, x, {})", "a value of type Tensor as args"),
            ("(net, (x,), (x,))", "(Tensor) as kwargs"),
            ("(net, (x,), {3: x})", "a value of type dict as kwargs"),
            ("(x, (x,), {})", "a value of type Tensor as model"),
            ("('name', (x,), {})", "a value of type str as model"),
        ],
    )
    def test_wrong_return_is_named(self, write, value, said):
        write(
            "net.py",
            f"""
            import torch
            net, x = torch.nn.Linear(4, 2), torch.ones(3, 4)
            def build():
                return {value}
            """,
        )
        message = failure("net.py:build")
        assert f"returned {said}." in message
        assert "Expected (model, args, kwargs)" in message


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 60,
}
PICTURE = {"image_size": 32, "patch_size": 8}


class TestHuggingFace:
    @pytest.fixture
    def config(self, write):
        """Write a config.json into the folder `model`."""
        pytest.importorskip("transformers")

        def config(**fields) -> str:
            write("model/config.json", json.dumps(fields))
            return "model"

        return config

    def run(self, text: str) -> dict[str, tuple[int, ...]]:
        target = load_target(text)
        with torch.no_grad():
            target.model.eval()(*target.args, **target.kwargs)
        return {name: tuple(value.shape) for name, value in target.kwargs.items()}

    def test_decoder_by_its_architecture(self, config):
        folder = config(model_type="llama", architectures=["LlamaForCausalLM"], **SMALL)
        assert self.run(folder) == {"input_ids": (2, 64)}
        target = load_target(f"{folder}/config.json")
        assert type(target.model).__name__ == "LlamaForCausalLM"
        assert target.description == "model/config.json (LlamaForCausalLM)"

    def test_no_architecture_gives_the_causal_model(self, config):
        folder = config(model_type="gpt2", vocab_size=60, n_embd=32, n_head=4, n_layer=1)
        assert type(load_target(folder).model).__name__ == "GPT2LMHeadModel"

    def test_tokens_fit_short_positions_and_avoid_special_ones(self, config):
        folder = config(
            model_type="roberta",
            architectures=["RobertaModel"],
            **(SMALL | {"vocab_size": 5}),
            max_position_embeddings=20,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        )
        target = load_target(folder)
        assert target.kwargs["input_ids"].shape == (2, 18)
        assert set(target.kwargs["input_ids"].flatten().tolist()) <= {3, 4}
        assert self.run(folder) == {"input_ids": (2, 18)}

    def test_encoder_decoder(self, config):
        folder = config(
            model_type="t5", architectures=["T5ForConditionalGeneration"], d_model=32, d_kv=8,
            num_heads=4, num_layers=1, d_ff=32, vocab_size=60,
        )  # fmt: skip
        assert self.run(folder) == {"input_ids": (2, 64), "decoder_input_ids": (2, 64)}

    def test_vision(self, config):
        assert self.run(config(model_type="vit", **SMALL, **PICTURE)) == {
            "pixel_values": (2, 3, 32, 32)
        }

    def test_image_and_text(self, config):
        folder = config(model_type="clip", text_config=SMALL, vision_config=SMALL | PICTURE)
        assert self.run(folder) == {"input_ids": (2, 64), "pixel_values": (2, 3, 32, 32)}

    def test_sound(self, config):
        folder = config(
            model_type="whisper", architectures=["WhisperForConditionalGeneration"], d_model=32,
            encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, vocab_size=60,
            decoder_attention_heads=4, max_source_positions=50, pad_token_id=1, bos_token_id=1,
            eos_token_id=1, decoder_start_token_id=1,
        )  # fmt: skip
        assert self.run(folder) == {
            "input_features": (2, 80, 100),
            "decoder_input_ids": (2, 64),
        }
        assert "input_values" in self.run(config(model_type="wav2vec2", **SMALL))

    def test_inputs_that_cannot_be_made_up(self, config):
        message = failure(config(model_type="decision_transformer", n_layer=1))
        assert "takes 'states'" in message
        assert "Write a file with a function" in message

    def test_unknown_model_type(self, config):
        message = failure(config(model_type="no_such_model"))
        assert "cannot build" in message
        assert "no_such_model" in message

    def test_broken_json(self, write):
        pytest.importorskip("transformers")
        write("model/config.json", "{")
        assert "cannot build" in failure("model")

    def test_folder_without_a_configuration(self, write, tmp_path):
        (tmp_path / "empty").mkdir()
        assert "There is no 'empty/config.json'" in failure("empty")

    def test_missing_json_file(self, write):
        assert "There is no 'gone/config.json'" in failure("gone/config.json")

    def test_without_transformers(self, config, monkeypatch):
        folder = config(model_type="llama", **SMALL)
        monkeypatch.setitem(sys.modules, "transformers", None)
        message = failure(folder)
        assert "needs transformers" in message
        assert "sparse-compile[hf]" in message


class TestExamples:
    @pytest.mark.parametrize("name", ["tiny_llama", "window_encoder"])
    def test_examples_run(self, name, request):
        path = request.config.rootpath / "examples" / f"{name}.py"
        target = load_target(f"{path}:build")
        output = target.model(*target.args, **target.kwargs)
        assert output.isfinite().all()
