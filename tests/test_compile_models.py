"""The model zoo under torch.compile(backend="spiral"): forward and backward as near to float64 as the CPU's own float32 is."""

from __future__ import annotations

import copy

import models as zoo
import pytest
import torch

from torch_spiral.compiler import runtime

QUICK = ("mlp", "dcgan")  # of the everyday tier
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in zoo.MODELS]
pytestmark = pytest.mark.filterwarnings("error:spiral runs a graph")  # a graph that is run eagerly is a failure here


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_inference(name: str, device: torch.device) -> None:
    spec = zoo.MODELS[name]
    run = torch.compile(lambda m, i: zoo.outputs(spec, m, i), backend="spiral")
    zoo.check_inference(spec, device, run, calls=2)


@pytest.mark.parametrize("name", NAMES)
def test_backward(name: str, device: torch.device) -> None:
    spec = zoo.MODELS[name]
    zoo.check_backward(spec, device, torch.compile(spec.loss, backend="spiral"))


def test_decoding_with_a_static_cache(device: torch.device) -> None:
    """Llama's: logits, and the keys and values that compiled steps write, against float64 on the CPU; the kernels of a layer."""
    zoo._import_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    shape = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True, **shape)).eval()
    ours = copy.deepcopy(theirs).to(device)
    ids = torch.arange(6)[None]
    results = []
    runtime.recorded.clear()
    with torch.no_grad():
        for model, place, run in (
            (theirs.double(), "cpu", theirs),
            (ours, device, torch.compile(ours, backend="spiral")),
        ):
            cache = StaticCache(config=model.config, max_cache_len=12)
            model(ids[:, :4].to(place), past_key_values=cache, use_cache=True)
            given = {"past_key_values": cache, "use_cache": True}
            steps = [run(ids[:, i : i + 1].to(place), **given).logits.cpu().double() for i in (4, 5)]
            results += [[*steps, *(t.cpu().double() for x in cache.layers for t in (x.keys, x.values))]]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    # Norms (two a layer and the last), queries' rotation, what is cached; the mask and all counters in one kernel (by 2.11 in up to three).
    (names,) = {graph.kernels for graph in runtime.recorded}
    fused = sum(n.startswith("fused_") for n in names)
    assert fused == 10 if torch.__version__ >= (2, 12) else 10 <= fused <= 12, names
