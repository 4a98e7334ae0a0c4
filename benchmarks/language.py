"""Language models: decoding token by token, and a billion parameters, drawn on the device: GPT for training, Llama's shape.

python -m benchmarks.language --device spiral     twenty training steps: a line of JSON

Without an import of torch_spiral, so that CUDA's side is what PyTorch alone does.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch


def llama(device: torch.device, layers: int = 16, hidden: int = 2048) -> Any:
    """Llama of 1.2 billion parameters, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, tie_word_embeddings=True,
    )  # fmt: skip
    with device:
        return LlamaForCausalLM(config).bfloat16().eval()


def decoding(
    module: Any, run: Callable[..., Any], device: torch.device, seen: int = 128, room: int = 384
) -> Callable[[], None]:
    """A step of one token with a static KV cache, batch 1; after `room` tokens it goes back to the first, with `seen` in the cache.
    run: the module, or what it was compiled to."""
    from transformers import StaticCache

    cache = StaticCache(config=module.config, max_cache_len=seen + room)
    ids = torch.ones(1, seen, dtype=torch.long, device=device)
    with torch.no_grad():
        module(ids, past_key_values=cache, use_cache=True)
    token, left = ids[:, :1], room

    def step() -> None:
        nonlocal left
        if not left:
            for layer in cache.layers:
                layer.cumulative_length.fill_(seen)
            left = room
        left -= 1
        with torch.no_grad():
            run(token, past_key_values=cache, use_cache=True)

    return step


def gpt(device: torch.device, layers: int = 20, hidden: int = 2048) -> Any:
    """GPT-2's architecture with 1.1 billion parameters, in float32, with checkpointing."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=layers, n_embd=hidden, n_head=hidden // 64, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    with device:
        model = GPT2LMHeadModel(config)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def train(device: torch.device, steps: int = 20, batch: int = 4, tokens: int = 512, **shape: int) -> dict[str, Any]:
    """Twenty steps on one batch in bfloat16 autocast with fused AdamW. Losses, median seconds a step, and the peak of memory in bytes."""
    backend = getattr(torch, device.type)
    torch.manual_seed(0)
    model = gpt(device, **shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(50257, (batch, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    backend.reset_peak_memory_stats()
    losses, times = [], []
    for _ in range(steps):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append(time.perf_counter() - start)
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "losses": losses, "seconds": sorted(times)[steps // 2],
        "peak": backend.max_memory_allocated(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    print(json.dumps(train(torch.device(parser.parse_args().device))))


if __name__ == "__main__":
    main()
