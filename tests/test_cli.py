"""The command line's frame and `doctor`; the other commands have their own tests."""

import json
import logging
import os
import subprocess
import sys

import click
import pytest

import sparse_compile
from sparse_compile import _compat, _support, cli, settings
from sparse_compile.cli import doctor as doctor_module
from sparse_compile.cli import main
from sparse_compile.cli.doctor import examine
from sparse_compile.errors import ConfigError

HEAVY = ("torch", "triton", "transformers", "sympy", "rich")


def python(code: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
        timeout=120,
        check=False,
    )


def raising(error: BaseException) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


@pytest.fixture
def with_command(monkeypatch):
    """Put a command named `extra` into the group."""

    def add(command: click.Command) -> None:
        monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: command)

    return add


class TestImports:
    @pytest.mark.parametrize(
        "arguments", [["--help"], ["--version"], ["demo", "--help"], ["doctor", "-h"]], ids=" ".join
    )
    def test_help_imports_nothing_heavy(self, arguments):
        code = (
            "import sys\nfrom sparse_compile.cli import main\n"
            f"code = main({arguments})\n"
            f"loaded = [name for name in {HEAVY} if name in sys.modules]\n"
            "sys.exit(f'{code} {loaded}' if code or loaded else 0)"
        )
        done = python(code)
        assert done.returncode == 0, done.stderr
        assert done.stdout

    def test_inspect_help_imports_no_torch(self):
        code = (
            "import sys\nfrom sparse_compile.cli import main\n"
            "sys.exit(main(['inspect', '--help']) or 'torch' in sys.modules)"
        )
        done = python(code)
        assert done.returncode == 0, done.stderr
        assert "TARGET" in done.stdout

    def test_package_imports_nothing_heavy(self):
        code = (
            "import sys, sparse_compile\nsparse_compile.Config\nsparse_compile.ConfigError\n"
            f"sys.exit(str([n for n in {HEAVY} if n in sys.modules]) if "
            f"any(n in sys.modules for n in {HEAVY}) else 0)"
        )
        done = python(code)
        assert done.returncode == 0, done.stderr

    def test_public_names_exist(self):
        for name in sparse_compile.__all__:
            assert getattr(sparse_compile, name) is not None
        assert set(sparse_compile.__all__) <= set(dir(sparse_compile))

    def test_other_names_do_not(self):
        with pytest.raises(AttributeError, match="has no attribute 'explian'"):
            _ = sparse_compile.explian


class TestMain:
    def test_help_lists_every_command(self, capsys):
        assert main(["--help"]) == 0
        out = capsys.readouterr().out
        for name in cli.COMMANDS:
            assert f"  {name} " in out

    def test_every_command_can_be_loaded(self):
        context = click.Context(cli.cli)
        for name in cli.COMMANDS:
            command = cli.cli.get_command(context, name)
            assert isinstance(command, click.Command)
            assert command.name == name

    def test_version(self, capsys):
        assert main(["--version"]) == 0
        assert sparse_compile.__version__ in capsys.readouterr().out

    @pytest.mark.parametrize("arguments", [["doctr"], ["--nonsense"], ["doctor", "--x"], []])
    def test_wrong_usage(self, arguments, capsys):
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Usage: sparse-compile" in captured.err

    def test_our_errors_are_messages(self, with_command, capsys):
        with_command(raising(ConfigError("p is 2.\n  Expected less.\n  Write less.")))
        assert main(["extra"]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == "ConfigError: p is 2.\n  Expected less.\n  Write less.\n"

    def test_other_errors_are_not_hidden(self, with_command):
        with_command(raising(ZeroDivisionError("ours")))
        with pytest.raises(ZeroDivisionError):
            main(["extra"])

    def test_interrupt(self, with_command, capsys):
        with_command(raising(KeyboardInterrupt()))
        assert main(["extra"]) == 1
        assert "interrupted" in capsys.readouterr().err

    def test_exit_code_of_a_command(self, with_command):
        @click.command()
        @click.pass_context
        def command(ctx: click.Context) -> None:
            ctx.exit(1)

        with_command(command)
        assert main(["extra"]) == 1

    def test_log_goes_to_stderr_when_asked_for(self, with_command, capsys):
        @click.command()
        def command() -> None:
            logging.getLogger("sparse_compile.passes").info("seen %d sites", 3)

        with_command(command)
        assert main(["extra"]) == 0
        assert capsys.readouterr().err == ""
        assert main(["-v", "extra"]) == 0
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err == "INFO sparse_compile.passes: seen 3 sites\n"
        assert logging.getLogger("sparse_compile").handlers == []

    def test_module_is_the_same_program(self):
        done = subprocess.run(
            [sys.executable, "-m", "sparse_compile", "--version"],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert done.stdout.startswith("sparse-compile, version ")


class TestDoctor:
    @pytest.fixture(autouse=True)
    def own_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv(settings.CACHE_VARIABLE, str(tmp_path / "cache"))

    def test_this_machine_works(self):
        findings = {finding.name: finding for finding in examine()}
        assert list(findings) == [
            "python",
            "torch",
            "triton",
            "transformers",
            "gpu",
            "compiler",
            "backend name",
            "cache folder",
            "options",
            "rates",
        ]
        assert [str(f) for f in findings.values() if f.status == "fail"] == []

    def test_json(self, capsys):
        assert main(["doctor", "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["works"] is True
        assert report["version"] == 1
        assert {check["status"] for check in report["checks"]} <= {"ok", "warn"}
        assert set(report["checks"][0]) == {"name", "status", "found", "effect"}

    def test_table(self, capsys):
        assert main(["doctor"]) == 0
        out = capsys.readouterr().out
        assert "The backend works here." in out
        assert "torch" in out
        assert "\x1b" not in out

    def test_no_color_is_respected(self):
        code = "from sparse_compile.cli import main; main(['doctor'])"
        forced = {"FORCE_COLOR": "1", "TERM": "xterm-256color"}
        assert "\x1b[32m" in python(code, **forced).stdout
        assert "\x1b[32m" not in python(code, NO_COLOR="1", **forced).stdout

    def test_failure_gives_exit_code_1(self, monkeypatch, capsys):
        monkeypatch.setattr(_compat, "backend_names", lambda: ["eager", "inductor"])
        assert main(["doctor", "--json"]) == 1
        checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
        assert checks["backend name"]["status"] == "fail"
        assert checks["backend name"]["found"] == "not registered"

    def test_backend_that_cannot_be_imported(self, monkeypatch):
        def broken(name: str) -> None:
            raise ImportError("no such module")

        monkeypatch.setattr(_compat, "load_backend", broken)
        finding = next(f for f in examine() if f.name == "backend name")
        assert finding.status == "fail"
        assert "ImportError: no such module" in finding.found

    def test_no_compiler(self, monkeypatch):
        monkeypatch.setattr(_compat, "cpp_compiler", lambda: None)
        finding = next(f for f in examine() if f.name == "compiler")
        assert finding.status == "fail"
        assert "install g++" in finding.effect

    def test_old_torch(self, monkeypatch, capsys):
        monkeypatch.setattr("torch.__version__", "2.9.1")
        assert main(["doctor", "--json"]) == 1
        checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
        assert checks["torch"]["found"] == "2.9.1"
        assert "needs torch 2.11 or newer" in checks["torch"]["effect"]
        assert "gpu" not in checks

    def test_newer_torch_is_a_warning(self, monkeypatch):
        newer = (_support.NEWEST_TESTED_TORCH[0], _support.NEWEST_TESTED_TORCH[1] + 1)
        monkeypatch.setattr("torch.__version__", _support.version_text(newer))
        assert next(f for f in examine() if f.name == "torch").status == "warn"

    def test_broken_torch(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch", None)
        finding = next(f for f in examine() if f.name == "torch")
        assert finding.status == "fail"
        assert "import torch fails with" in finding.found

    @pytest.mark.parametrize(("version", "status"), [(None, "warn"), ("1.0", "warn"), ("99", "ok")])
    def test_optional_package(self, version, status, monkeypatch):
        def lookup(name: str) -> str:
            if version is None:
                raise doctor_module.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(doctor_module.metadata, "version", lookup)
        finding = doctor_module._package("triton", (3, 6), "fine", "lost")
        assert finding.status == status
        assert ("fine" if status == "ok" else "lost") in finding.effect

    def test_cache_that_cannot_be_written(self, monkeypatch):
        monkeypatch.setenv(settings.CACHE_VARIABLE, "/proc/nowhere")
        finding = next(f for f in examine() if f.name == "cache folder")
        assert finding.status == "warn"
        assert "/proc/nowhere cannot be written" in finding.found

    def test_options_file_in_force(self, tmp_path, monkeypatch):
        path = tmp_path / "options.toml"
        path.write_text("block_size = 32\n")
        monkeypatch.setenv(settings.CONFIG_VARIABLE, str(path))
        finding = next(f for f in examine() if f.name == "options")
        assert (finding.name, finding.status, finding.found) == ("options", "ok", str(path))
        assert "block_size=32" in finding.effect

    def test_wrong_options_file(self, tmp_path, monkeypatch, capsys):
        path = tmp_path / "options.toml"
        path.write_text("block_size = 33\n")
        monkeypatch.setenv(settings.CONFIG_VARIABLE, str(path))
        assert main(["doctor"]) == 1
        assert "The backend does not work here." in capsys.readouterr().out

    def test_wrong_variable(self, monkeypatch):
        monkeypatch.setenv(settings.CONFIG_VARIABLE, "/no/such/file")
        finding = examine()[-1]
        assert (finding.name, finding.status) == ("environment", "fail")

    def test_gpu_asked_for_but_absent(self, monkeypatch, capsys):
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        assert main(["doctor", "--require-gpu"]) == 1
        captured = capsys.readouterr()
        assert "torch" in captured.out
        first, expected, _ = captured.err.splitlines()
        assert first.startswith(
            "UnsupportedEnvironmentError: a GPU was asked for but is absent: torch"
        )
        assert expected == "  Expected a CUDA device that torch.cuda.is_available() reports."

    def test_gpu_asked_for_and_there(self, monkeypatch):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        _support.check_gpu()
