"""The exact policy on a real GPU: values, gradients and memory against eager PyTorch."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_compile import last_report

pytestmark = pytest.mark.gpu

BATCH, TOKENS, WIDTH = 2, 200, 128
QUERY_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
DTYPES = [torch.bfloat16, torch.float32]
DTYPE_IDS = ["bf16", "fp32"]
FEW = 64  # elements


# What a model's author would write; each gets scores [B, H, T, S] and gives masked scores.


def causal(scores: Tensor, document: Tensor) -> Tensor:
    mask = torch.ones(scores.shape[-2:], device=scores.device).tril()
    return scores.masked_fill(mask == 0, float("-inf"))


def window(scores: Tensor, document: Tensor) -> Tensor:
    at = torch.arange(scores.shape[-1], device=scores.device)
    distance = at[:, None] - at[None, :]
    keep = (distance >= 0) & (distance < 48)
    return torch.where(keep, scores, torch.finfo(scores.dtype).min)


def chunk(scores: Tensor, document: Tensor) -> Tensor:
    at = torch.arange(scores.shape[-1], device=scores.device)
    keep = (at[:, None] // 64 == at[None, :] // 64) & (at[None, :] <= at[:, None])
    return scores.masked_fill(~keep, torch.finfo(scores.dtype).min)


def documents(scores: Tensor, document: Tensor) -> Tensor:
    at = torch.arange(scores.shape[-1], device=scores.device)
    keep = (document[:, :, None] == document[:, None, :]) & (at[None, :] <= at[:, None])
    return scores.masked_fill(~keep[:, None], float("-inf"))


def soft_cap(scores: Tensor, document: Tensor) -> Tensor:
    return causal(torch.tanh(scores / 5.0) * 5.0, document)


def alibi(scores: Tensor, document: Tensor) -> Tensor:
    at = torch.arange(scores.shape[-1], device=scores.device)
    head = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    slope = torch.pow(2.0, -2.0 * head)[:, None, None]
    return causal(scores + (slope * (at[None, :] - at[:, None])).to(scores.dtype), document)


MASKS = [causal, window, chunk, documents, soft_cap, alibi]


class Attention(nn.Module):
    """Grouped attention written out, with a score function from above."""

    def __init__(self, masked: Callable[[Tensor, Tensor], Tensor], has_sink: bool = False) -> None:
        super().__init__()
        self.masked = masked
        self.q = nn.Linear(WIDTH, QUERY_HEADS * HEAD_DIM, bias=False)
        self.k = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.v = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(QUERY_HEADS * HEAD_DIM, WIDTH, bias=False)
        self.sink = nn.Parameter(torch.randn(QUERY_HEADS)) if has_sink else None

    def forward(self, x: Tensor, document: Tensor) -> Tensor:
        n_batch, n_tokens, _ = x.shape
        q, k, v = (
            layer(x).view(n_batch, n_tokens, -1, HEAD_DIM).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        k, v = (part.repeat_interleave(QUERY_HEADS // KV_HEADS, dim=1) for part in (k, v))
        scores = self.masked(q @ k.transpose(-1, -2) * HEAD_DIM**-0.5, document)
        if self.sink is not None:
            column = self.sink[None, :, None, None].expand(n_batch, -1, n_tokens, 1)
            scores = torch.cat([scores, column], dim=-1)
        weights = scores.softmax(-1)[..., :n_tokens]
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def document_ids() -> Tensor:
    """Three packed documents a sequence, cut at other places in each."""
    ids = torch.zeros(BATCH, TOKENS, dtype=torch.long, device="cuda")
    for row, cuts in enumerate([(70, 131), (1, 198)]):
        for cut in cuts:
            ids[row, cut:] += 1
    return ids


def hf_model(family: str, dtype: torch.dtype, **changes: Any) -> nn.Module:
    """A small transformers decoder with eager attention."""
    transformers = pytest.importorskip("transformers")
    shared = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 16384,
        "initializer_range": 256**-0.5,
        "pad_token_id": 0,
    }
    own = {
        "Llama": {},
        "Mistral": {"sliding_window": 96},
        "Gemma2": {"sliding_window": 96, "attn_logit_softcapping": 20.0},
    }[family]
    config = getattr(transformers, f"{family}Config")(**(shared | own | changes))
    make = getattr(transformers, f"{family}ForCausalLM")._from_config
    return make(config, attn_implementation="eager").to("cuda", dtype).eval()


def run(module: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
    out = module(*args, **kwargs)
    return getattr(out, "logits", out)


def values_and_gradients(
    forward: Callable[..., Any], module: nn.Module, inputs: tuple[Tensor, ...], **kwargs: Any
) -> Iterator[tuple[str, Tensor]]:
    """The output and every parameter's gradient for a fixed weighting of the output."""
    module.zero_grad()
    out = run(forward, *inputs, **kwargs)
    weighting = torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape)
    (out.float() * weighting).mean().backward()
    yield "output", out.detach()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        yield name, parameter.grad.clone()


def assert_as_good_as_eager(
    forward: Callable[..., Any], module: nn.Module, inputs: tuple[Tensor, ...], **kwargs: Any
) -> None:
    """Compiled may err twice as much as eager does in the same dtype, against float64.

    Errors are root mean squares over a tensor; half a step of the dtype is for the output's own
    rounding, which eager may do without.
    """
    ours = dict(values_and_gradients(forward, module, inputs, **kwargs))
    natural = dict(values_and_gradients(module, module, inputs, **kwargs))
    exact = copy.deepcopy(module).double()
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    truths = dict(values_and_gradients(exact, exact, wide, **kwargs))
    # the error of a handful of numbers says little: for them, that of the larger tensors counts too
    share = max(rms(natural[name] - truth) / rms(truth) for name, truth in truths.items())
    for name, truth in truths.items():
        error = rms(natural[name] - truth)
        if truth.numel() < FEW:
            error = max(error, share * rms(truth))
        allowed = 2 * error + torch.finfo(ours[name].dtype).eps / 2 * rms(truth)
        found = rms(ours[name] - truth)
        assert found <= allowed, f"{name}: off by {found:.3g}, allowed {allowed:.3g}"


def rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def assert_all_rewritten(n_sites: int) -> None:
    """Every site of every graph is replaced, none with a mask that is a [T, S] tensor."""
    report = last_report()
    assert not report.errors
    assert [str(site) for site in report.declined] == []
    assert {len(graph.sites) for graph in report.graphs} == {n_sites}
    assert not any(site.site.mask.opaque for site in report.sites)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("masked", MASKS, ids=lambda mask: mask.__name__)
def test_written_out_attention(masked, dtype):
    module = Attention(masked).to("cuda", dtype)
    x = torch.randn(BATCH, TOKENS, WIDTH, device="cuda", dtype=dtype)
    compiled = torch.compile(module, backend="sparse_compile")
    assert_as_good_as_eager(compiled, module, (x, document_ids()))
    assert_all_rewritten(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
def test_attention_sinks(dtype):
    module = Attention(window, has_sink=True).to("cuda", dtype)
    x = torch.randn(BATCH, TOKENS, WIDTH, device="cuda", dtype=dtype)
    compiled = torch.compile(module, backend="sparse_compile")
    assert_as_good_as_eager(compiled, module, (x, document_ids()))
    assert_all_rewritten(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_transformers_decoders(family, dtype):
    model = hf_model(family, dtype)
    ids = torch.randint(1, 512, (BATCH, TOKENS), device="cuda")
    compiled = torch.compile(model, backend="sparse_compile")
    assert_as_good_as_eager(compiled, model, (ids,), use_cache=False)
    assert_all_rewritten(2)


def test_padding_is_read_from_the_mask():
    model = hf_model("Llama", torch.float32)
    ids = torch.randint(1, 512, (BATCH, TOKENS), device="cuda")
    attention_mask = torch.ones_like(ids)
    attention_mask[1, -37:] = 0  # every query still has a key
    kept = attention_mask.bool()
    compiled = torch.compile(model, backend="sparse_compile")
    with torch.no_grad():
        ours, eager = (
            run(f, ids, attention_mask=attention_mask, use_cache=False) for f in (compiled, model)
        )
        exact = run(
            copy.deepcopy(model).double(), ids, attention_mask=attention_mask, use_cache=False
        )
    assert rms((ours - exact)[kept]) <= 2 * rms((eager - exact)[kept]) + 1e-7
    assert_all_rewritten(2)


def test_autocast():
    model = hf_model("Llama", torch.float32)
    ids = torch.randint(1, 512, (BATCH, TOKENS), device="cuda")
    compiled = torch.compile(model, backend="sparse_compile")
    with torch.no_grad():
        exact = run(copy.deepcopy(model).double(), ids, use_cache=False)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            ours, eager = (run(f, ids, use_cache=False) for f in (compiled, model))
    assert ours.dtype == eager.dtype
    step = torch.finfo(torch.bfloat16).eps
    assert rms(ours - exact) <= 2 * rms(eager - exact) + step / 2 * rms(exact)
    assert_all_rewritten(2)


def test_one_compilation_for_many_lengths():
    model = hf_model("Mistral", torch.float32)
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="sparse_compile", dynamic=True)
    for n_tokens in (129, 200, 257, 1000):  # flex_attention itself tells 128 and more from less
        ids = torch.randint(1, 512, (BATCH, n_tokens), device="cuda")
        with torch.no_grad():
            ours, eager, truth = (run(f, ids, use_cache=False) for f in (compiled, model, exact))
        assert rms(ours - truth) <= 2 * rms(eager - truth) + 1e-7
    assert len(last_report().graphs) == 1
    assert_all_rewritten(2)


@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_memory_does_not_grow_with_the_square(family):
    """Not even a mask of one byte an element fits into what is allowed."""
    n_tokens = 8192
    model = hf_model(family, torch.bfloat16).model
    ids = torch.randint(1, 512, (1, n_tokens), device="cuda")
    compiled = torch.compile(model, backend="sparse_compile")
    with torch.no_grad():
        compiled(ids, use_cache=False)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compiled(ids, use_cache=False)
    assert torch.cuda.max_memory_allocated() - before < n_tokens * n_tokens
    assert_all_rewritten(2)


def test_a_bias_by_distance_is_no_matrix():
    """T5 looks a bias up for every pair of tokens; a table of distances replaces it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=512, d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    model = transformers.T5EncoderModel._from_config(config, attn_implementation="eager")
    model = model.to("cuda").eval()
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend="sparse_compile", dynamic=False)
    ids = torch.randint(1, 512, (2, 300), device="cuda")
    with torch.no_grad():
        ours, eager, truth = (f(ids).last_hidden_state for f in (compiled, model, exact))
    assert rms(ours - truth) <= 2 * rms(eager - truth) + 1e-7
    assert_all_rewritten(2)
    assert {site.kernel for site in last_report().sites} == {"flex_attention"}
    ids, n_tokens = torch.randint(1, 512, (1, 8192), device="cuda"), 8192
    with torch.no_grad():
        compiled(ids)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        compiled(ids)
    assert torch.cuda.max_memory_allocated() - before < n_tokens * n_tokens


def test_reduce_overhead_replays_a_cuda_graph():
    from torch._dynamo.utils import counters

    counters.clear()
    model = hf_model("Llama", torch.bfloat16)
    compiled = torch.compile(model, backend="sparse_compile", mode="reduce-overhead")
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        for _ in range(4):
            ids = torch.randint(1, 512, (BATCH, TOKENS), device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            ours = run(compiled, ids, use_cache=False).clone()
            eager, truth = (run(f, ids, use_cache=False) for f in (model, exact))
            step = torch.finfo(torch.bfloat16).eps
            assert rms(ours - truth) <= 2 * rms(eager - truth) + step / 2 * rms(truth)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert_all_rewritten(2)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"], ids=["default", "reduce-overhead"])
def test_decoding_with_a_fixed_cache(mode):
    from sparse_compile.integrations.greedy import continue_greedily, static_cache

    model = hf_model("Llama", torch.float32)
    prompt = torch.randint(1, 512, (1, 100), device="cuda")
    compiled = torch.compile(model, backend="sparse_compile", mode=mode, dynamic=False)
    written = [
        continue_greedily(forward, prompt, static_cache(model, 128), 24).tokens
        for forward in (model, compiled)
    ]
    assert written[0] == written[1]
    assert len(last_report().graphs) == 2
    assert_all_rewritten(2)
