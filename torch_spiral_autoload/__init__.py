"""What `import torch` calls where torch_spiral is installed. A package of its own, since importing torch_spiral registers the
device."""

import os


def load() -> None:
    """Registers the device `spiral`, so that it works without an import.

    Not beside a PyTorch that was built for CUDA or ROCm: from 2.8 on, PyTorch's autograd knows one accelerator in a process, and
    with a second one registered backward() on a CUDA tensor fails (pytorch/pytorch#161129). There `import torch_spiral` decides
    for the process, or SPIRAL_AUTOLOAD=1 in its environment; SPIRAL_AUTOLOAD=0 never registers."""
    import torch

    wanted = os.environ.get("SPIRAL_AUTOLOAD", "0" if torch.version.cuda or torch.version.hip else "1")
    if wanted != "0":
        import torch_spiral  # noqa: F401
