"""Trains two small models on a device and shows it: a convolutional net on handwritten digits, then a small GPT on the
source of Python's own standard library, which writes some code at the end.

    python examples/demo.py                  on spiral
    python examples/demo.py --device cpu     the same on the CPU, for comparison
    python examples/demo.py --quick          a fraction of the steps
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F

console = Console(highlight=False)


def progress() -> Progress:
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
    )


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# Digits


class DigitNet(nn.Sequential):
    """(B, 1, 8, 8) -> (B, 10)"""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )


def train_digits(device: torch.device, epochs: int) -> tuple[list[float], float]:
    """Losses, and the share of held-out images that are recognised."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, train = order[:360], order[360:]
    torch.manual_seed(0)
    net = DigitNet().to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    x_train, y_train = x[train].to(device), y[train].to(device)
    shuffle = torch.Generator().manual_seed(1)
    losses: list[Tensor] = []
    with progress() as bar:
        batches = len(train) // 64
        task = bar.add_task("digits", total=epochs * batches, note="")
        for epoch in range(epochs):
            for batch in torch.randperm(len(train), generator=shuffle)[: batches * 64].split(64):
                index = batch.to(device)
                loss = F.cross_entropy(net(x_train[index]), y_train[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                bar.advance(task)
            bar.update(task, note=f"epoch {epoch + 1}, loss {losses[-1].item():.4f}")
    net.eval()
    with torch.no_grad():
        right = (net(x[held_out].to(device)).argmax(1).cpu() == y[held_out]).float().mean().item()
    return torch.stack(losses).cpu().tolist(), right


# A small GPT over bytes


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cache: list[Tensor] | None) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:  # keys and values of the text so far
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = [k, v]
        a = F.scaled_dot_product_attention(q, k, v, is_causal=t > 1)
        x = x + self.out(a.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes (B, T) -> logits (B, T, 256); T at most context."""

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 4, context: int = 128) -> None:
        super().__init__()
        self.context = context
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        self.apply(self._initialise)

    @staticmethod
    def _initialise(m: nn.Module) -> None:
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=0.02)

    def forward(self, ids: Tensor, caches: list[list[Tensor]] | None = None) -> Tensor:
        seen = caches[0][0].shape[2] if caches and caches[0] else 0
        x = self.tokens(ids) + self.positions(torch.arange(seen, seen + ids.shape[1], device=ids.device))
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i] if caches is not None else None)
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(self, prompt: bytes, count: int, temperature: float = 0.7) -> bytes:
        """prompt and count more bytes, sampled on the host from the device's logits, with a KV cache."""
        device = self.head.weight.device
        generator = torch.Generator().manual_seed(0)
        caches: list[list[Tensor]] = [[] for _ in self.blocks]
        text = list(prompt)
        ids = torch.tensor([text], device=device)
        for _ in range(min(count, self.context - len(prompt))):
            chances = (self(ids, caches)[0, -1].float() / temperature).softmax(-1).cpu()
            text.append(int(torch.multinomial(chances, 1, generator=generator)))
            ids = torch.tensor([text[-1:]], device=device)
        return bytes(text)


def library_source(limit: int = 4_000_000) -> Tensor:
    """Bytes of the standard library's modules, in alphabetical order."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(p.read_bytes() for p in sorted(folder.glob("*.py")))[:limit]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def train_gpt(device: torch.device, steps: int, batch: int = 16) -> tuple[list[float], float, str, float]:
    """Losses, tokens per second of training, generated text, tokens per second of generation."""
    source = library_source()
    torch.manual_seed(0)
    gpt = GPT().to(device)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, max(0.05, 1 - (s - warmup) / max(1, steps - warmup)))
    )
    pick = torch.Generator().manual_seed(1)
    span = torch.arange(gpt.context + 1)
    losses: list[Tensor] = []
    start = measured_from = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("GPT   ", total=steps, note="")
        for step in range(steps):
            at = torch.randint(len(source) - gpt.context - 1, (batch, 1), generator=pick)
            ids = source[at + span].to(device)
            loss = F.cross_entropy(gpt(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if step == 4:  # kernels are compiled by now
                synchronize(device)
                measured_from = time.perf_counter()
            if step % 10 == 9:
                note = (
                    f"loss {loss.item():.3f}, {10 * batch * gpt.context / (time.perf_counter() - start):,.0f} tokens/s"
                )
                start = time.perf_counter()
                bar.update(task, note=note)
            bar.advance(task)
        synchronize(device)
    rate = (steps - 5) * batch * gpt.context / (time.perf_counter() - measured_from)
    gpt.eval()
    prompt = b"def "
    gpt.generate(prompt, 2)
    start = time.perf_counter()
    text = gpt.generate(prompt, gpt.context)
    return (
        torch.stack(losses).cpu().tolist(),
        rate,
        text.decode(errors="replace"),
        len(text) / (time.perf_counter() - start),
    )


def picture(path: Path, curves: dict[str, list[float]], title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(10, 3.6), layout="constrained")
    for ax, (name, losses) in zip(axes, curves.items(), strict=True):
        smooth, mean = [], losses[0]
        for value in losses:
            mean += 0.1 * (value - mean)
            smooth.append(mean)
        ax.plot(losses, alpha=0.3, linewidth=1)
        ax.plot(smooth, color="C0")
        ax.set(title=name, xlabel="step", ylabel="loss", ylim=(0, None))
        ax.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="spiral", help="spiral, spiral:1, cpu (default: spiral)")
    parser.add_argument("--quick", action="store_true", help="a fraction of the steps")
    parser.add_argument("--out", type=Path, help="the picture (default: demo-<device>.png)")
    args = parser.parse_args()
    if args.device.startswith("spiral"):
        import torch_spiral  # noqa: F401

        if not torch.spiral.is_available():
            console.print("No device for spiral here. What is missing: python -m torch_spiral")
            return 1
        device = torch.device(args.device)
        about = torch.spiral.get_device_properties(device)
        title = f"{args.device}, {about.engine}: {about.name}"
    else:
        device = torch.device(args.device)
        title = f"{args.device}, {torch.get_num_threads()} threads"
    console.print(f"[bold]{title}[/] · torch {torch.__version__} · {os.cpu_count()} cores")
    start = time.perf_counter()

    console.print("\nHandwritten digits, a convolutional net")
    digit_losses, right = train_digits(device, epochs=4 if args.quick else 12)
    console.print(f"  {100 * right:.1f} % of 360 held-out images recognised")

    console.print("\nA GPT over bytes, on the source of Python's standard library")
    gpt_losses, rate, text, speed = train_gpt(device, steps=40 if args.quick else 400)
    last = gpt_losses[-20:]
    console.print(f"  loss {gpt_losses[0]:.3f} -> {sum(last) / len(last):.3f}, {rate:,.0f} tokens/s in training")
    console.print(f"  it writes, at {speed:,.0f} tokens/s:")
    console.print("\n".join("    " + line for line in text.splitlines()), markup=False, style="cyan")

    out = args.out or Path(f"demo-{args.device.replace(':', '')}.png")
    picture(out, {"digits": digit_losses, "GPT": gpt_losses}, title)
    fallbacks = sum(torch.spiral.fallbacks().values()) if device.type == "spiral" else 0
    console.print(
        f"\n{time.perf_counter() - start:.0f} s in all · fallbacks to the CPU: {fallbacks} · loss curves: {out}"
    )
    return 0 if right >= (0.9 if args.quick else 0.97) else 1


if __name__ == "__main__":
    sys.exit(main())
