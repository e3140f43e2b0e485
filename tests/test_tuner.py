"""The tuner drops wrong candidates, keeps partial results, goes on where it was; its command."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from sparse_compile import ConfigError, SparseCompileError, cli, settings
from sparse_compile.kernels import range_kernels, timing, tuning, tuning_results, tuning_tables
from sparse_compile.kernels.range_kernels import FORWARD
from sparse_compile.kernels.tuning_results import Stamp
from sparse_compile.tuner import plan, search
from sparse_compile.tuner.shapes import LIST, Shape
from sparse_compile.tuner.workloads import WORKLOADS, Problem, Workload

KERNEL = "range_forward"
CPU = torch.device("cpu")
DEFAULT = range_kernels.Tiles(32, 32, 4, 1)  # what the kernel would compute
DTYPE = "float32"
SHAPES = [
    Shape(tokens=tokens, query_heads=2, kv_heads=1, head_dim=16) for tokens in (64, 512, 8192)
]


class Fake(Workload):
    """Takes as long as `ms` says, and is wrong where told; nothing is launched."""

    ms: dict[int, float] = {16: 4.0, 32: 2.0, 64: 3.0}
    wrong: set[int] = set()
    broken: dict[int, Exception] = {}
    wrong_at_full_size: set[int] = set()
    wrong_when_repeated: set[int] = set()
    timed: list[int] = []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Fake]]:
    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
        out, lse = torch.randn(1, 2, shape.tokens, 16), torch.randn(1, 2, shape.tokens)
        lse[..., 0] = -torch.inf
        facts = WORKLOADS[KERNEL].facts(shape)
        ran: set[int] = set()

        def run() -> tuple[torch.Tensor, ...]:
            block_m = FORWARD.choose(DEFAULT, out, **facts).block_m
            if block_m in Fake.broken:
                raise Fake.broken[block_m]
            found = out.clone()
            large = shape.tokens > 1000
            wrong = {
                *Fake.wrong, *(Fake.wrong_at_full_size if large else ()),
                *(Fake.wrong_when_repeated & ran if large else ()),
            }  # fmt: skip
            if block_m in wrong:
                found[0, 1, 5, 3] += 0.01  # one row of many
            ran.add(block_m)
            return found, lse

        return Problem(run, lambda: (out.double(), lse.double()), lambda results: results)

    def median_ms(run: Callable[[], object], device: torch.device, measure_ms: int) -> float:
        block_m = dict(FORWARD._pin or ()).get("block_m", DEFAULT.block_m)
        Fake.timed.append(block_m)
        return Fake.ms[block_m]

    workload = Workload(lambda: FORWARD, WORKLOADS[KERNEL].facts, make)
    monkeypatch.setitem(WORKLOADS, KERNEL, workload)
    monkeypatch.setattr(timing, "median_ms", median_ms)
    monkeypatch.setenv(settings.CACHE_VARIABLE, str(tmp_path / "cache"))
    for name, value in (("wrong", set()), ("broken", {}), ("wrong_at_full_size", set()),
                        ("wrong_when_repeated", set()),
                        ("timed", []), ("ms", {16: 4.0, 32: 2.0, 64: 3.0})):  # fmt: skip
        monkeypatch.setattr(Fake, name, value)
    FORWARD.forget()
    yield Fake
    FORWARD.forget()


def spaces() -> dict[str, tuple[tuning_tables.Space, ...]]:
    return {KERNEL: (tuning_tables.Space(when=None, values={"block_m": (16, 64)}),)}


def jobs(shapes: list[Shape] = SHAPES) -> list[search.Job]:
    return search.jobs([KERNEL], [(shape, DTYPE) for shape in shapes])


def tuner(folder: Path, **options: Any) -> search.Tuner:
    return search.Tuner(CPU, folder, spaces=spaces(), **options)


def held(folder: Path) -> dict[int, int]:
    """The best `block_m` by tokens, from the file."""
    table = tuning_tables.load(KERNEL)
    name = tuning_results.file_name(KERNEL, tuning.INTERPRETER)
    results, problems = tuning_results.read(folder / name, table)
    assert not problems
    return {
        e.key["n_tokens"]: e.values.get("block_m", 32) for e in (results.entries if results else ())
    }


def test_the_fastest_wins_and_is_in_force_at_once(fake: type[Fake], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "tuning"
    fake.ms[64] = 1.0
    (outcome,) = tuner(folder).run(jobs(SHAPES[:1]))
    assert (outcome.status, outcome.values["block_m"], outcome.tried) == ("tuned", 64, 3)
    assert (outcome.ms, outcome.default_ms) == (1.0, 2.0)
    facts = {"head_dim": 16, "value_dim": 16, "n_tokens": 64}
    assert FORWARD.choose(DEFAULT, torch.zeros(1), **facts).block_m == 64


def test_a_default_that_is_as_fast_stays(fake: type[Fake], tmp_path: Path) -> None:
    fake.ms[64] = 1.99
    (outcome,) = tuner(tmp_path).run(jobs(SHAPES[:1]))
    assert outcome.values == {}


def test_wrong_and_failing_candidates_are_dropped_before_they_are_timed(
    fake: type[Fake], tmp_path: Path
) -> None:
    fake.ms.update({16: 0.5, 64: 0.4})
    fake.wrong, fake.broken = {16}, {64: RuntimeError("out of resource: shared memory")}
    (outcome,) = tuner(tmp_path).run(jobs(SHAPES[:1]))
    assert outcome.values == {}
    assert set(fake.timed) == {32}
    why = {one.values["block_m"]: one.why for one in outcome.dropped}
    assert why == {16: "wrong", 64: "fails"}
    assert held(tmp_path) == {64: 32}


def test_what_is_wrong_only_at_the_full_size_is_dropped_too(
    fake: type[Fake], tmp_path: Path
) -> None:
    fake.ms[16], fake.wrong_at_full_size = 0.5, {16}
    outcomes = {o.job.key["n_tokens"]: o for o in tuner(tmp_path).run(jobs())}
    assert outcomes[512].values["block_m"] == 16
    assert outcomes[8192].values == {}
    assert [one.why for one in outcomes[8192].dropped] == ["wrong"]


def test_nan_is_wrong(fake: type[Fake]) -> None:
    for value in (float("nan"), float("inf")):
        truth = (torch.ones(1, 1, 4, 2),)
        found = (truth[0].clone(),)
        found[0][0, 0, 3, 1] = value
        assert search._distance(found, truth) == float("inf")
    assert search._distance(truth, truth) == 0.0


def test_a_default_that_is_not_always_the_same_tunes_nothing(
    fake: type[Fake], tmp_path: Path
) -> None:
    """A race between threads makes one row of many wrong, and not in every run."""
    fake.wrong_when_repeated = {32}
    (outcome,) = tuner(tmp_path).run(jobs(SHAPES[-1:]))
    assert outcome.status == "failed"
    assert "run again, wrong" in outcome.detail
    assert not fake.timed
    assert not list(tmp_path.glob("*.json"))


def test_the_first_problem_is_served_whole_before_the_next() -> None:
    problems = [(shape, DTYPE) for shape in SHAPES[:2]]
    found = search.jobs([KERNEL, "range_key_gradient"], problems)
    assert [(job.kernel, job.shape.tokens) for job in found] == [
        (kernel, shape.tokens) for shape in SHAPES[:2] for kernel in (KERNEL, "range_key_gradient")
    ]


def test_a_default_that_is_wrong_tunes_nothing(fake: type[Fake], tmp_path: Path) -> None:
    fake.wrong = {32}
    (outcome,) = tuner(tmp_path).run(jobs(SHAPES[:1]))
    assert outcome.status == "failed"
    assert "the default values give results that are off by" in outcome.detail
    assert not fake.timed
    assert held(tmp_path) == {}


def test_a_broken_device_ends_the_run(fake: type[Fake], tmp_path: Path) -> None:
    fake.broken = {64: RuntimeError("CUDA error: an illegal memory access was encountered")}
    with pytest.raises(SparseCompileError, match=r"(?s)block_m.*64.*broke the CUDA context"):
        list(tuner(tmp_path).run(jobs(SHAPES[:1])))


def test_a_run_goes_on_where_it_was(fake: type[Fake], tmp_path: Path) -> None:
    run = tuner(tmp_path).run(jobs())
    next(run)
    run.close()  # as Ctrl-C between two jobs
    assert held(tmp_path) == {64: 32}
    fake.ms[64] = 0.1
    outcomes = list(tuner(tmp_path).run(jobs()))
    assert [o.status for o in outcomes] == ["kept", "tuned", "tuned"]
    assert held(tmp_path) == {64: 32, 512: 64, 8192: 64}
    assert [o.status for o in tuner(tmp_path, again=True).run(jobs())] == ["tuned"] * 3
    assert held(tmp_path) == {64: 64, 512: 64, 8192: 64}


def test_stale_results_are_tuned_anew(
    fake: type[Fake], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(tuner(tmp_path).run(jobs()))
    stamp = Stamp(torch="9.9", triton="9.9", source="x")
    monkeypatch.setattr(tuning_results, "current_stamp", lambda _table: stamp)
    (outcome,) = tuner(tmp_path).run(jobs(SHAPES[:1]))
    assert outcome.status == "tuned"
    assert held(tmp_path) == {64: 32}  # those of another version are gone


def test_the_budget_ends_a_run_between_jobs(fake: type[Fake], tmp_path: Path) -> None:
    assert not list(tuner(tmp_path).run(jobs(), deadline=time.monotonic() - 1))


def test_shapes_of_one_key_are_tuned_once() -> None:
    problems = [(shape, "bfloat16") for shape in LIST]
    found = search.jobs(["selected_query_major", "select_top_k"], problems)
    keys = [(job.kernel, *sorted(job.key.items())) for job in found]
    assert len(keys) == len(set(keys)) == 6 + 2


# the plan


def written(folder: Path, text: str) -> Path:
    path = folder / "tune.toml"
    path.write_text(text)
    return path


SHAPE = "[[shape]]\ntokens = 64\nquery_heads = 2\nkv_heads = 1\nhead_dim = 16\n"


def test_a_plan_from_a_file(tmp_path: Path) -> None:
    text = f'kernels = ["{KERNEL}"]\ndtypes = ["float16"]\nbudget = "90s"\n{SHAPE}'
    text += f'[[space]]\nkernel = "{KERNEL}"\nblock_m = [16, 32]\n'
    found = plan.read(written(tmp_path, text))
    assert found.kernels == (KERNEL,)
    assert found.problems == ((SHAPES[0], "float16"),)
    assert found.budget_s == 90
    assert found.spaces[KERNEL][0].values == {"block_m": (16, 32)}
    over = plan.read(written(tmp_path, text), kernels=["select_top_k"], shapes="list", budget="2m")
    assert (over.kernels, over.budget_s) == (("select_top_k",), 120)
    assert [shape for shape, _ in over.problems] == list(LIST)


def test_everything_by_default() -> None:
    found = plan.read()
    assert list(found.kernels) == tuning_tables.names()
    assert {dtype for _, dtype in found.problems} == {"bfloat16"}
    assert found.budget_s == float("inf")


WRONG_PLANS = {
    "unknown-key": ("kernel = 'x'", 'unknown key "kernel"'),
    "kernel": ("kernels = ['range_fordward']", 'Did you mean "range_forward"'),
    "dtype": ("dtypes = ['int8']", 'dtype is "int8"'),
    "budget": ("budget = '5'", 'budget is "5"'),
    "budget-type": ("budget = 5", "budget is 5"),
    "shapes": ("shapes = 'some'", 'shapes is "some"'),
    "heads": (SHAPE.replace("kv_heads = 1", "kv_heads = 3"), "3 KV heads do not divide 2"),
    "no-tokens": (SHAPE.replace("64", "0"), "tokens is 0"),
    "shape-key": (SHAPE + "token = 3", 'shape[0] has the unknown key "token"'),
    "shape-type": (SHAPE.replace("64", "'64'"), 'shape[0].tokens is "64" (a string)'),
    "space-kernel": ("[[space]]\nblock_m = [16]", "space[0].kernel is None"),
    "space": (f"[[space]]\nkernel = '{KERNEL}'\nblock_m = [17]", "space[0].block_m[0] is 17"),
}


@pytest.mark.parametrize("name", WRONG_PLANS)
def test_a_wrong_plan_is_refused_with_file_and_path(name: str, tmp_path: Path) -> None:
    text, expected = WRONG_PLANS[name]
    with pytest.raises(ConfigError) as caught:
        plan.read(written(tmp_path, text))
    assert expected in str(caught.value)


def test_the_interpreter_is_not_given_large_shapes() -> None:
    with pytest.raises(ConfigError, match="the built-in list, which the interpreter"):
        plan.read(interpreted=True)


def test_shapes_of_a_model() -> None:
    found = plan.read(shapes="from:examples/tiny_llama.py:build")
    shape = Shape(batch=2, tokens=48, query_heads=8, kv_heads=2, head_dim=8)
    assert found.problems == ((shape, "float32"),)  # two layers alike


# the command


def command(*arguments: str) -> Result:
    return CliRunner().invoke(cli.cli, ["tune", *arguments], standalone_mode=False)


def test_check_and_show_need_no_gpu(fake: type[Fake], tmp_path: Path) -> None:
    checked = command("--check")
    assert (checked.return_value, checked.exit_code) == (0, 0)
    assert f"{len(tuning_tables.names())} tables: right" in checked.output
    fake.ms[64] = 1.0
    list(tuner(tmp_path / "cache" / "tuning").run(jobs(SHAPES[:1])))
    shown = json.loads(command("--show", "--json", "--kernel", KERNEL).output)
    rows = {row["source"] for row in shown["rows"]}
    assert rows - {"shipped table"} == {"user cache", "default"}  # shipped for one Triton
    (own,) = [row for row in shown["rows"] if row["source"] == "user cache"]
    assert own["values"] == {"block_m": 64}
    assert own["device"] == tuning.INTERPRETER
    text = command("--show").output
    assert "user cache" in text
    assert "n_tokens=64" in text


def test_check_finds_wrong_results(fake: type[Fake], tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "tuning"
    fake.ms[64] = 1.0
    list(tuner(folder).run(jobs(SHAPES[:1])))
    (path,) = folder.iterdir()
    path.write_text(path.read_text().replace('"block_m": 64', '"block_m": 63'))
    found = command("--check")
    assert found.return_value == 1
    assert "entries[0].values.block_m is 63" in found.output
    path.write_text(path.read_text().replace('"block_m": 63', '"block_m": 64'))
    path.rename(folder / "range_backward.x.json")
    assert "no table of the kernel range_backward" in command("--check").output


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "device", lambda: CPU)


def test_the_command_tunes(fake: type[Fake], interpreted: None, tmp_path: Path) -> None:
    config = written(tmp_path, f'kernels = ["{KERNEL}"]\n{SHAPE}[[space]]\nkernel = "{KERNEL}"\n'
                     "block_m = [16, 64]\n")  # fmt: skip
    fake.ms[64] = 0.5
    fake.broken = {16: RuntimeError("no")}
    arguments = ("--config", str(config), "--output", str(tmp_path / "out"))
    done = command(*arguments)
    assert done.return_value == 0
    assert "done: 1 tuned, 0 kept, 0 failed of 1" in done.output
    assert "dropped, fails:" in done.output
    assert held(tmp_path / "out") == {64: 64}
    again = json.loads(CliRunner().invoke(cli.cli, ["tune", *arguments, "--json"]).stdout)
    assert [one["status"] for one in again["outcomes"]] == ["kept"]
    assert (again["end"], again["device"]) == ("done", tuning.INTERPRETER)


def test_ctrl_c_keeps_what_was_tuned(fake: type[Fake], interpreted: None, tmp_path: Path) -> None:
    space = f'[[space]]\nkernel = "{KERNEL}"\nblock_m = [16, 64]\n'
    shapes = SHAPE + SHAPE.replace("64", "512")
    config = written(tmp_path, f'kernels = ["{KERNEL}"]\n{shapes}{space}')
    fake.timed = Interrupting()
    stopped = command("--config", str(config), "--output", str(tmp_path))
    assert stopped.return_value == 1
    assert "interrupted: 1 tuned, 0 kept, 0 failed of 2" in stopped.output
    assert len(held(tmp_path)) == 1


class Interrupting(list[int]):
    """Is interrupted in the second job."""

    def append(self, value: int) -> None:
        super().append(value)
        if len(self) > 8:  # 3 candidates, and 3 once more as the best
            raise KeyboardInterrupt


def test_without_a_gpu_tuning_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(timing, "device", lambda: None)
    assert cli.main(["tune"]) == 1
    assert "UnsupportedEnvironmentError: tuning times kernels on a GPU" in capsys.readouterr().err


def test_wrong_usage(interpreted: None, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["tune", "--kernel", "nothing"]) == 2
    assert "there is no tuning table" in capsys.readouterr().err
    assert cli.main(["tune", "--config", str(tmp_path / "absent.toml")]) == 2
    assert cli.main(["tune", "--shapes", "from:nowhere:build"]) == 2
    assert "TargetError" in capsys.readouterr().err


def test_a_real_kernel_by_the_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One kernel from the command to its result: launched, checked against its reference, timed."""
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted")
    monkeypatch.setenv(settings.CACHE_VARIABLE, str(tmp_path / "cache"))
    config = written(
        tmp_path, f'kernels = ["{KERNEL}"]\n{SHAPE}window = 20\n[[space]]\nkernel = "{KERNEL}"\n'
        "block_m = [16, 64]\n",
    )  # fmt: skip
    done = json.loads(
        CliRunner().invoke(cli.cli, ["tune", "--config", str(config), "--json"]).stdout
    )
    (outcome,) = done["outcomes"]
    assert (outcome["status"], outcome["tried"], outcome["dropped"]) == ("tuned", 3, [])
    assert outcome["ms"] > 0
    assert held(tmp_path / "cache" / "tuning") == {64: outcome["values"].get("block_m", 32)}


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", tuning_tables.names())
def test_every_kernel_is_tuned_on_a_gpu(kernel: str, tmp_path: Path) -> None:
    shape = Shape(tokens=2048, query_heads=8, kv_heads=2, head_dim=64)
    (job,) = search.jobs([kernel], [(shape, "bfloat16")])
    chosen = {kernel: (tuning_tables.Space(when=None, values={"num_warps": (2, 4, 8)}),)}
    device = torch.device("cuda", 0)
    (outcome,) = search.Tuner(device, tmp_path, spaces=chosen).run([job], workers=2)
    assert outcome.status == "tuned", outcome
    assert not [one for one in outcome.dropped if one.why == "wrong"], outcome.dropped
    assert 0 < outcome.ms <= outcome.default_ms
