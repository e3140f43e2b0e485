"""The policy `top_k`: which sites it takes, what they compute then, and what reports say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_compile
from sparse_compile import ConfigError, backend
from sparse_compile.inspect.report import Report, SiteReport
from sparse_compile.kernels.selected_attention import selected_attention_ref
from sparse_compile.kernels.top_k_selection import top_k_selection_ref

BLOCK = 16
TOP_K = {"policy": "top_k", "k": 3, "block_size": BLOCK}
ALL = {**TOP_K, "k": 64}
WIDTH, DIM = 24, 8


class Attention(nn.Module):
    """Causal self-attention with any number of query and KV heads."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, way: str = "eager") -> None:
        super().__init__()
        self.heads, self.group, self.way = heads, heads // kv_heads, way
        self.q = nn.Linear(WIDTH, heads * DIM)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * DIM) for _ in range(2))
        self.out = nn.Linear(heads * DIM, WIDTH)

    def parts(self, x: Tensor) -> list[Tensor]:
        made = (of(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for of in (self.q, self.k, self.v))
        return list(made)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x)
        k, v = (y.repeat_interleave(self.group, dim=1) for y in (k, v))
        if self.way == "sdpa":
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            keep = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            scores = (q @ k.mT * DIM**-0.5).masked_fill(~keep, float("-inf"))
            found = scores.softmax(-1) @ v
        return self.out(found.transpose(1, 2).flatten(2))

    def selected(self, x: Tensor, k: int, scores: str = "bounds") -> Tensor:
        """What the policy should make of it, by the references."""
        parts, scale = self.parts(x), DIM**-0.5
        n_local = 2 if k > 2 else 1
        plain = [y.detach() for y in parts[:2]]
        chosen = top_k_selection_ref(*plain, k, BLOCK, min(1, k - n_local), n_local, scale, scores)
        found, _ = selected_attention_ref(*parts, chosen, BLOCK, scale, True)
        return self.out(found.transpose(1, 2).flatten(2))


class Layers(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def tokens(count: int = 90, batch: int = 2, **options: Any) -> Tensor:
    return torch.randn(batch, count, WIDTH, **options)


def compiled(model: Any, *, full: bool = False, **options: Any) -> Any:
    """The model under `top_k`, unless `options` say otherwise; not dynamic."""
    chosen = backend.sparse_compile if full else backend.rewrite_only
    dynamic = options.pop("dynamic", False)
    return torch.compile(model, backend=chosen, options={**TOP_K, **options}, dynamic=dynamic)


def the_site() -> SiteReport:
    report = sparse_compile.last_report()
    assert not report.errors, report.errors[0]
    (site,) = report.sites
    return site


# -- what is computed


@pytest.mark.parametrize("scores", ["bounds", "mean"])
@pytest.mark.parametrize("way", ["eager", "sdpa"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (3, 1), (4, 1), (6, 2)])
def test_outputs_and_gradients_are_those_of_the_references(
    heads: int, kv_heads: int, way: str, scores: str
) -> None:
    model, x = Attention(heads, kv_heads, way).double(), tokens(dtype=torch.float64)
    run = compiled(model, scores=scores, verify=True)
    grads = []
    for found in (run(x), model.selected(x, 3, scores)):
        model.zero_grad()
        found.square().sum().backward()
        grads.append([found, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
    assert (grads[0][0] - model(x)).abs().max() > 1e-3  # and not those of dense attention
    site = the_site()
    assert (site.kernel, site.policy, site.group) == (
        "selected_attention",
        "top_k",
        heads // kv_heads,
    )
    assert site.loop_order in ("query_major", "kv_major")
    assert site.validation.endswith("with k covering all KV blocks")
    assert site.validation.startswith("passed")


def test_keys_are_not_repeated_for_the_group() -> None:
    model, x = Attention(6, 2), tokens()
    compiled(model)(x)
    steps = [node.op for node in the_site().after.nodes]
    assert not {"expand", "repeat", "repeat_interleave"} & set(steps)
    assert steps.count("top_k_selection.default") == steps.count("selected_attention.default") == 1


@pytest.mark.parametrize("way", ["eager", "sdpa"])
def test_with_all_blocks_selected_it_is_exact(way: str) -> None:
    """Symbolic lengths keep the kernels in: whether a list holds all blocks is not known."""
    model, x = Attention(way=way).double(), tokens(dtype=torch.float64)
    found = compiled(model, dynamic=True, **ALL)(x)
    assert the_site().kernel == "selected_attention"
    torch.testing.assert_close(found, model(x), rtol=1e-12, atol=1e-12)


def test_a_length_that_is_known_to_fit_takes_dense_attention() -> None:
    model, x = Attention(), tokens(3 * BLOCK)
    torch.testing.assert_close(compiled(model)(x), model(x))
    site = the_site()
    assert (site.kernel, site.policy, site.not_policy_code) == ("sdpa", "top_k", None)
    assert site.why.startswith("top_k of 3 holds all 3 KV blocks, so dense is the same; ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    model, x = Attention().to(dtype), tokens(dtype=dtype)
    with torch.no_grad():
        found, dense = compiled(model, dynamic=True, **ALL)(x), model(x)
        exact = model.double()(x.double())
    assert found.dtype == dtype
    assert the_site().kernel == "selected_attention"
    natural = (dense - exact).abs().max()
    assert (found - exact).abs().max() <= 2 * natural + torch.finfo(dtype).eps


def test_autocast_computes_in_the_narrow_dtype() -> None:
    model, x = Attention(), tokens()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, dense = compiled(model, dynamic=True, **ALL)(x), model(x)
    assert found.dtype == torch.bfloat16
    assert (the_site().kernel, the_site().site.dtype) == ("selected_attention", "bfloat16")
    # of outputs of order one, after two roundings of half of 2 ** -8 and a sum of 32 products
    torch.testing.assert_close(found, dense, rtol=0, atol=2**-5)


def test_autocast_does_not_reach_into_the_operators() -> None:
    q, k, v = (x.float() for x in heads())

    def function() -> list[Tensor]:
        op = torch.ops.sparse_compile
        chosen = op.top_k_selection(q, k, 3, BLOCK, 1, 2, 1.0, "bounds")
        return [chosen, *op.selected_attention(q, k, v, chosen, BLOCK, 1.0, True, None, None)]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = function()
    assert all(torch.equal(a, b) for a, b in zip(inside, function(), strict=True))


# -- through Inductor


def test_training_through_inductor_in_a_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torch.compile` takes a mode or options; a file gives ours beside a mode."""
    path = tmp_path / "options.toml"
    path.write_text("\n".join(f"{name} = {value!r}" for name, value in TOP_K.items()))
    monkeypatch.setenv("SPARSE_COMPILE_CONFIG", str(path))
    inputs = [x.requires_grad_() for x in heads()]
    run = torch.compile(causal, backend=backend.sparse_compile, mode="reduce-overhead")
    weight = torch.randn(2, 2, T, DIM, dtype=torch.float64)
    grads = [torch.autograd.grad((f(*inputs) * weight).sum(), inputs) for f in (run, by_reference)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
    assert (the_site().kernel, the_site().site.training) == ("selected_attention", True)


def test_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = Attention().double(), tokens(dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    grads = []
    for run in (compiled(function), lambda x: model.selected(x, 3)):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
    assert the_site().kernel == "selected_attention"


def test_one_compilation_for_many_lengths() -> None:
    model = Attention().double()
    run = compiled(model, dynamic=True)
    for count in (90, 33, 128, 20, 7):
        x = tokens(count, dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model.selected(x, 3), rtol=1e-10, atol=1e-10)
    site = the_site()  # there is one graph only
    assert site.loop_order is None
    assert "chosen at each call" in site.why


# -- which sites


def test_short_inputs_stay_exact() -> None:
    model = Attention()
    compiled(model, min_tokens=80)(tokens(80))
    assert the_site().kernel == "selected_attention"
    torch._dynamo.reset()
    compiled(model, min_tokens=80)(tokens(79))
    site = the_site()
    assert (site.policy, site.not_policy_code) == ("exact", "min-tokens")
    assert site.not_policy_reason == "fewer than 80 key positions"
    assert site.why.startswith("exact, not top_k (min-tokens: fewer than 80 key positions); proven")


def test_short_inputs_stay_exact_where_lengths_are_symbolic() -> None:
    """One compilation on each side of the threshold."""
    model = Attention().double()
    run = compiled(model, dynamic=True, min_tokens=60)
    for count in (90, 50, 100, 59, 60):
        x = tokens(count, dtype=torch.float64)
        wanted = model.selected(x, 3) if count >= 60 else model(x)
        torch.testing.assert_close(run(x), wanted, rtol=1e-10, atol=1e-10)
    kernels = [site.kernel for site in sparse_compile.last_report().sites]
    assert kernels == ["selected_attention", "sdpa"]


def test_sites_of_their_own_policy() -> None:
    model, x = Layers(3).double(), tokens(dtype=torch.float64)
    sites = {"layers.0": {"policy": "exact"}, "layers.2": {"k": 2, "scores": "mean"}}
    found = compiled(model, sites=sites)(x)
    first, second, third = model.layers
    wanted = x + first(x)
    wanted = wanted + second.selected(wanted, 3)
    wanted = wanted + third.selected(wanted, 2, "mean")
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    sites = sparse_compile.last_report().sites
    assert [site.policy for site in sites] == ["exact", "top_k", "top_k"]
    assert sites[0].not_policy_code is None  # nobody asked for another
    assert "3 of 6 KV blocks of 16 keys" in sites[1].why
    assert "2 of 6 KV blocks of 16 keys" in sites[2].why


def test_one_site_alone() -> None:
    model = Layers(2)
    sites = {"layers.1": {"policy": "top_k", "k": 3, "block_size": BLOCK}}
    run = torch.compile(model, backend=backend.rewrite_only, options={"sites": sites})
    run(tokens())
    policies = [site.policy for site in sparse_compile.last_report().sites]
    assert policies == ["exact", "top_k"]


T = 90


def heads(*sizes: int) -> list[Tensor]:
    return [torch.randn(2, 2, size, DIM, dtype=torch.float64) for size in sizes or (T, T, T)]


def _masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ v


def _positions(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    key = torch.arange(k.shape[2])
    return torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2]), key


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = _positions(q, k)
    return _masked(q, k, v, key <= query)


def by_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the policy should make of `causal`."""
    chosen = top_k_selection_ref(q.detach(), k.detach(), 3, BLOCK, 1, 2, 1.0, "bounds")
    return selected_attention_ref(q, k, v, chosen, BLOCK, 1.0, True)[0]


def no_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def top_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = _positions(q, k)
    return _masked(q, k, v, (key <= query) & (key > query - 20))


def strict(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = _positions(q, k)
    return _masked(q, k, v, (key < query) | (query == 0))


def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    query, key = _positions(q, k)
    return _masked(q, k, v, (key <= query) & mask[:, None, None])


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    query, key = _positions(q, k)
    return (q @ k.mT + bias).masked_fill(key > query, float("-inf")).softmax(-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = _positions(q, k)
    scores = q @ k.mT + 0.5 * (key - query)
    return scores.masked_fill(key > query, float("-inf")).softmax(-1) @ v


def soft_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = _positions(q, k)
    scores = 5 * torch.tanh(q @ k.mT / 5)
    return scores.masked_fill(key > query, float("-inf")).softmax(-1) @ v


def sink(q: Tensor, k: Tensor, v: Tensor, logits: Tensor) -> Tensor:
    query, key = _positions(q, k)
    scores = (q @ k.mT).masked_fill(key > query, float("-inf"))
    column = logits.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = _positions(q, k)
    weights = (q @ k.mT).masked_fill(key > query, float("-inf")).softmax(-1)
    return F.dropout(weights, 0.3) @ v


def weighted(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    query, key = _positions(q, k)
    return ((q @ k.mT).masked_fill(key > query, float("-inf")).softmax(-1) * factor) @ v


def large(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    query, key = _positions(q, k)
    q, k = (F.pad(x, (0, 300)) for x in (q, k))
    return _masked(q, k, v, key <= query)


MASK = torch.arange(T) < torch.tensor([[T], [60]])
FALL_BACK = {
    "no-mask": (no_mask, (), "mask-not-causal", "every query reads every key, as in an encoder"),
    "top-left": (top_left, (40, T, T), "mask-not-causal", "the mask is causal, not causal up to"),
    "window": (window, (), "mask-not-causal", "the mask is causal & window, not causal"),
    "strict": (strict, (), "mask-not-causal", "the mask is"),
    "padding": (padded, MASK, "mask-not-causal", "key_padding, not causal up to the last key; leave"),
    "bias": (biased, torch.randn(T, T).double(), "mask-tensor", "a bias or mask stays a tensor"),
    "alibi": (alibi, (), "score-formula", "scores are changed before the softmax"),
    "soft-cap": (soft_cap, (), "score-formula", "scores are changed before the softmax"),
    "sink": (sink, torch.randn(2).double(), "sink", "selected attention has no sink"),
    "weights": (weighted, torch.rand(T, T).double(), "weight-factors", "weights are changed"),
    "decode": (causal, (1, T, T), "one-query", "pooling the keys for one query reads as much"),
    "head-dim": (large, (), "head-dim", "heads have 308 and 8 channels, and 256 is the most"),
}  # fmt: skip


@pytest.mark.parametrize("name", FALL_BACK)
def test_sites_that_selection_cannot_honour_are_exact(name: str) -> None:
    function, given, code, reason = FALL_BACK[name]
    sizes, rest = (given, ()) if isinstance(given, tuple) else ((), (given,))
    inputs = heads(*sizes)
    found = compiled(function, verify=True)(*inputs, *rest)
    torch.testing.assert_close(found, function(*inputs, *rest), rtol=1e-10, atol=1e-10)
    site = the_site()
    assert (site.status, site.policy, site.not_policy_code) == ("rewritten", "exact", code)
    assert reason in site.not_policy_reason
    assert f"exact, not top_k ({code}: {site.not_policy_reason}); " in site.why
    assert site.kernel != "selected_attention"
    assert site.validation.startswith("passed")


def test_dropout_stays_as_it_is() -> None:
    compiled(dropped)(*heads())
    assert the_site().not_policy_code == "dropout"


def test_scores_that_have_no_room_for_the_channels() -> None:
    q, k, v = (torch.randn(1, 1, T, 160) for _ in range(3))
    compiled(causal, scores="bounds")(q, k, v)
    site = the_site()
    assert site.not_policy_reason == "scores by bounds take at most 128 channels, not 160"
    torch._dynamo.reset()
    compiled(causal)(q, k, v)
    assert "the others by mean" in the_site().why


@pytest.mark.parametrize("dynamic", [False, True])
def test_queries_behind_a_cache(dynamic: bool) -> None:
    """Query `t` sits at key position `t + S - T`."""
    inputs = heads(30, 150, 150)
    run = compiled(causal, dynamic=dynamic, verify=True)
    torch.testing.assert_close(run(*inputs), by_reference(*inputs), rtol=1e-10, atol=1e-10)
    assert the_site().kernel == "selected_attention"
    assert the_site().validation.startswith("passed")


def test_queries_before_the_first_key() -> None:
    """They read nothing, which the model gives NaN for: one more compilation, of exact attention."""
    run = compiled(causal, dynamic=True)
    run(*heads(30, 150, 150))
    inputs = heads(40, 30, 30)
    torch.testing.assert_close(run(*inputs), causal(*inputs), equal_nan=True)
    first, second = sparse_compile.last_report().sites
    assert (first.policy, second.policy, second.not_policy_code) == (
        "top_k", "exact", "mask-not-causal",
    )  # fmt: skip


def test_strict_accepts_exact_sites_and_refuses_declined_ones() -> None:
    def escapes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights

    compiled(window, strict=True)(*heads())
    assert the_site().policy == "exact"
    with pytest.raises(sparse_compile.DeclinedSiteError, match="weights-escape"):
        compiled(escapes, strict=True)(*heads())


# -- reports and options


def test_reports() -> None:
    model, x = Layers(2), tokens()
    report = sparse_compile.explain(
        model, x, config={**TOP_K, "sites": {"layers.1": {"policy": "exact"}}}
    )
    text = str(report)
    assert "selected_attention" in text
    assert "query_major" in text or "kv_major" in text
    assert "3 of 6 KV blocks of 16 keys, 1 first and 2 last" in " ".join(text.split())
    assert Report.from_json(report.to_json()) == report
    torch.testing.assert_close(model(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 4}, 'unknown option "top_k"'),
        ({"k": 65}, "k is 65."),
        ({"sites": {"a": {"score": "mean"}}}, 'Did you mean "scores"?'),
        ({"sites": {"a": {"k": 1, "local": 2}}}, 'sites["a"]: sinks is 0 and local 2, but k is 1.'),
    ],
    ids=str,
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compiled(causal, **options)(*heads())
    assert message in str(caught.value)


# -- a model of transformers


def llama(attention: str, kv_heads: int = 1) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=kv_heads, head_dim=DIM,
        max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llama(attention: str) -> None:
    model, ids = llama(attention).double(), torch.randint(0, 50, (2, 90))
    losses, grads = [], []
    for options in (None, ALL, TOP_K):
        run = model if options is None else compiled(model, dynamic=True, **options)
        model.zero_grad()
        loss = run(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad.clone() for p in model.parameters()])
        if options is not None:
            sites = sparse_compile.last_report().sites
            assert [site.kernel for site in sites] == ["selected_attention"] * 2
            assert {(site.mask, site.group) for site in sites} == {("causal", 3)}
        torch._dynamo.reset()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)  # rotary is in float32
    assert 1e-6 < (losses[2] - losses[0]).abs() < 0.1


def test_llama_with_padding_is_exact() -> None:
    model, ids = llama("eager").eval(), torch.randint(0, 50, (2, 90))
    mask = (torch.arange(90) >= torch.tensor([[0], [9]])).long()
    with torch.no_grad():
        found = compiled(model)(input_ids=ids, attention_mask=mask, use_cache=False).logits
        wanted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)
    sites = sparse_compile.last_report().sites
    assert {site.not_policy_code for site in sites} == {"mask-not-causal"}
    assert all("leave out attention_mask" in site.why for site in sites)
