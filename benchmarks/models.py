"""Every model of the zoo at its published size: inference and a training step, spiral against torch on the CPU.

python -m benchmarks.models [--engine wgpu] [--only gpt2] [--batch 1]
"""

from __future__ import annotations

import sys

import torch

from benchmarks.device import inference, training
from benchmarks.harness import Reading, Step, Work, arguments, model_zoo, run_suite, versus_cpu


def generation(name: str, tokens: int):
    def make(device: torch.device) -> Step:
        zoo = model_zoo()
        spec = zoo.MODELS[name]
        module = spec.build("real").eval().to(device)
        inputs = zoo.to(spec.inputs("real", 1), device)

        def step() -> None:
            with torch.no_grad():
                spec.generate(module, inputs, tokens)

        return step

    return make


def rows(batch: int) -> list[Work | Reading]:
    zoo = model_zoo()
    found: list[Work | Reading] = []
    for name, spec in zoo.MODELS.items():
        small = max(2, batch)  # batch norm over one image of one pixel is undefined
        found.append(Work(f"inference {name} b{batch}", versus_cpu(inference(name, batch))))
        found.append(Work(f"training step {name} b{small}", versus_cpu(training(name, small))))
        if spec.generate is not None:
            found.append(Work(f"generate 32 tokens {name}", versus_cpu(generation(name, 32))))
    return found


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    sys.exit(run_suite("models", rows(args.batch), args))
