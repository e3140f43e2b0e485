"""`sparse-compile inspect`: options, output, exit codes; the stages themselves are stand-ins."""

import json
import sys
import textwrap
import types

import pytest
import torch

from sparse_compile.cli import main
from sparse_compile.config import Config
from sparse_compile.errors import ModelError
from sparse_compile.inspect import samples
from sparse_compile.inspect.report import GraphReport, Report, SiteReport

NET = """
    import torch

    class Net(torch.nn.Module):
        def forward(self, x):
            return x * 2

    class Broken(torch.nn.Module):
        def forward(self, x):
            raise ValueError("the model's own mistake")

    def build():
        return Net(), (torch.ones(3),), {}

    def broken():
        return Broken(), (torch.ones(3),), {}
"""


def report_of(*sites: SiteReport, error: str | None = None) -> Report:
    return Report(graphs=(GraphReport(sites=sites, error=error),))


REWRITTEN = SiteReport.from_site(samples.sample_site("net.0.attn", samples.CAUSAL), samples.SDPA)
DECLINED = SiteReport.from_site(samples.sample_site("net.1.attn"), None)
WRONG = SiteReport.from_site(
    samples.sample_site("net.2.attn"), samples.SDPA, validation="failed: max error 3"
)


@pytest.fixture
def explain(monkeypatch, tmp_path):
    """A stand-in for `backend.explain` that runs the model, records its call and gives `report`."""
    (tmp_path / "net.py").write_text(textwrap.dedent(NET))
    monkeypatch.chdir(tmp_path)
    seen = types.SimpleNamespace(report=report_of(REWRITTEN), error=None, calls=[])

    def explain(model, *args, config=None, **kwargs):
        call = types.SimpleNamespace(
            config=config,
            training=model.training,
            gradients=torch.is_grad_enabled(),
            device=args[0].device.type,
        )
        seen.calls.append(call)
        model(*args, **kwargs)
        if seen.error:
            raise seen.error
        return seen.report

    backend = types.ModuleType("sparse_compile.backend")
    backend.explain = explain
    monkeypatch.setitem(sys.modules, "sparse_compile.backend", backend)
    monkeypatch.setattr("sparse_compile.backend", backend, raising=False)
    return seen


class TestOutput:
    def test_table_on_stdout_and_progress_on_stderr(self, explain, capsys):
        assert main(["inspect", "net.py:build"]) == 0
        out, err = capsys.readouterr()
        assert "net.0.attn" in out
        assert "1 site, 1 rewritten, 0 declined" in out
        assert "\x1b" not in out
        assert "loading net.py:build" in err

    def test_json_is_the_report_and_nothing_else(self, explain, capsys):
        assert main(["inspect", "net.py:build", "--json"]) == 0
        out = capsys.readouterr().out
        assert Report.from_json(out) == explain.report
        assert json.loads(out)["version"] == 1

    def test_expand(self, explain, capsys):
        explain.report = samples.sample_report()
        main(["inspect", "net.py:build"])
        assert "model.layers.7.self_attn" not in capsys.readouterr().out
        main(["inspect", "net.py:build", "--expand"])
        assert "model.layers.7.self_attn" in capsys.readouterr().out

    @pytest.mark.parametrize("suffix", ["html", "json", "txt"])
    def test_output_file_by_suffix(self, explain, suffix, tmp_path, capsys):
        path = tmp_path / f"report.{suffix}"
        assert main(["inspect", "net.py:build", "--output", str(path)]) == 0
        content = path.read_text("utf-8")
        starts = {"html": "<!doctype html>", "json": "{", "txt": "\n site"}
        assert content.startswith(starts[suffix])
        assert "net.0.attn" in content
        assert "net.0.attn" in capsys.readouterr().out
        if suffix == "html":
            assert "net.py:build" in content

    @pytest.mark.parametrize(
        ("output", "said"),
        [("report.pdf", "'.pdf'"), ("report", "nothing"), ("gone/report.html", "no folder")],
    )
    def test_output_that_cannot_be_written_is_refused_first(self, explain, output, said, capsys):
        assert main(["inspect", "net.py:build", "--output", output]) == 2
        assert said in capsys.readouterr().err
        assert not explain.calls


class TestExitCodes:
    @pytest.mark.parametrize(
        ("report", "plain", "strict"),
        [
            (Report(), 0, 0),
            (report_of(REWRITTEN), 0, 0),
            (report_of(REWRITTEN, DECLINED), 0, 1),
            (report_of(REWRITTEN, WRONG), 1, 1),
            (report_of(REWRITTEN, error="Traceback\nKeyError: 3"), 0, 1),
        ],
        ids=["no site", "rewritten", "declined", "failed check", "failed pass"],
    )
    def test_report(self, explain, report, plain, strict):
        explain.report = report
        assert main(["inspect", "net.py:build"]) == plain
        assert main(["inspect", "net.py:build", "--strict"]) == strict

    def test_strict_shows_the_report_before_it_fails(self, explain, capsys):
        explain.report = report_of(REWRITTEN, DECLINED)
        main(["inspect", "net.py:build", "--strict"])
        assert "no-plan" in capsys.readouterr().out
        assert explain.calls[0].config.strict is False

    @pytest.mark.parametrize(
        "target", ["gone.py:build", "net.py:gone", "net.py", "no_such_module:f"]
    )
    def test_bad_target_is_wrong_usage(self, explain, target, capsys):
        assert main(["inspect", target]) == 2
        err = capsys.readouterr().err
        assert "TargetError: " in err
        assert not explain.calls

    def test_failing_import_shows_its_traceback(self, explain, tmp_path, capsys):
        (tmp_path / "bad.py").write_text("def f():\n    return 1 / 0\n\nf()\n")
        assert main(["inspect", "bad.py:build"]) == 2
        err = capsys.readouterr().err
        assert "return 1 / 0" in err
        assert "TargetError: Importing 'bad.py' failed: ZeroDivisionError" in err

    @pytest.mark.parametrize("arguments", [[], ["net.py:build", "--device", "tpu"]])
    def test_wrong_usage(self, explain, arguments):
        assert main(["inspect", *arguments]) == 2


class TestFailures:
    def test_a_model_that_fails_by_itself_is_shown_as_that(self, explain, capsys):
        assert main(["inspect", "net.py:broken"]) == 1
        err = capsys.readouterr().err
        assert 'raise ValueError("the model\'s own mistake")' in err
        assert "ModelError: net.py:broken fails by itself" in err

    def test_our_own_failure_is_not_blamed_on_the_model(self, explain):
        explain.error = RuntimeError("a pass went wrong")
        with pytest.raises(RuntimeError, match="a pass went wrong"):
            main(["inspect", "net.py:build"])

    def test_a_model_error_of_the_backend_passes_through(self, explain, capsys):
        explain.error = ModelError("no way")
        explain.error.__cause__ = ValueError("deep inside")
        assert main(["inspect", "net.py:build"]) == 1
        err = capsys.readouterr().err
        assert "ValueError: deep inside" in err
        assert "ModelError: no way" in err


class TestOptions:
    def test_default_is_exact_inference_without_gradients(self, explain):
        main(["inspect", "net.py:build"])
        (call,) = explain.calls
        assert call.config == Config()
        assert (call.training, call.gradients, call.device) == (False, False, "cpu")

    def test_training(self, explain):
        main(["inspect", "net.py:build", "--training"])
        assert (explain.calls[0].training, explain.calls[0].gradients) == (True, True)
        assert torch.is_grad_enabled()

    def test_verify(self, explain):
        main(["inspect", "net.py:build", "--verify"])
        assert explain.calls[0].config.verify is True

    def test_unknown_policy(self, explain, capsys):
        assert main(["inspect", "net.py:build", "--policy", "fast"]) == 2
        err = capsys.readouterr().err
        assert "ConfigError" in err
        assert "fast" in err

    def test_config_file_below_the_command_line(self, explain, tmp_path):
        (tmp_path / "options.toml").write_text("block_size = 32\nverify = false\nstrict = true\n")
        explain.report = report_of(DECLINED)
        arguments = ["inspect", "net.py:build", "--config", "options.toml", "--verify"]
        assert main(arguments) == 1
        config = explain.calls[0].config
        assert (config.block_size, config.verify) == (32, True)

    def test_config_file_that_is_not_there(self, explain, capsys):
        assert main(["inspect", "net.py:build", "--config", "gone.toml"]) == 2
        assert "gone.toml" in capsys.readouterr().err

    def test_device_moves_model_and_nested_inputs(self, explain, tmp_path):
        (tmp_path / "nested.py").write_text(
            textwrap.dedent(
                """
                import torch

                class Net(torch.nn.Module):
                    def forward(self, x, more):
                        assert all(value.device.type == "cpu" for value in more["deep"][0])
                        return x

                def build():
                    return Net(), (torch.ones(3),), {"more": {"deep": [(torch.ones(1),)]}}
                """
            )
        )
        assert main(["inspect", "nested.py:build", "--device", "cpu"]) == 0
        assert explain.calls[0].device == "cpu"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_a_gpu_that_is_not_there(self, explain, capsys):
        assert main(["inspect", "net.py:build", "--device", "cuda"]) == 1
        assert "UnsupportedEnvironmentError" in capsys.readouterr().err
        assert not explain.calls


class TestRealStages:
    """The command with the real backend, on small models."""

    def test_example_is_rewritten_and_verified(self, request, capsys):
        path = request.config.rootpath / "examples" / "tiny_llama.py"
        assert main(["inspect", f"{path}:build", "--verify", "--strict", "--json"]) == 0
        report = Report.from_json(capsys.readouterr().out)
        assert [(site.mask, site.group, site.kernel) for site in report.sites] == [
            ("causal", 4, "sdpa"),
            ("causal", 4, "sdpa"),
        ]
        assert all((site.validation or "").startswith("passed") for site in report.sites)
        assert {site.source for site in report.sites} == {f"{path}:31"}

    def test_model_that_fails_in_eager_is_blamed_for_it(self, tmp_path, monkeypatch, capsys):
        (tmp_path / "net.py").write_text(textwrap.dedent(NET))
        monkeypatch.chdir(tmp_path)
        assert main(["inspect", "net.py:broken"]) == 1
        err = capsys.readouterr().err
        assert 'raise ValueError("the model\'s own mistake")' in err
        assert "ModelError: " in err
