"""Our own Python, which runs while Dynamo watches: what C++ calls for an op, and what Dynamo asks the device while it compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def untraced(function: F) -> F:
    """Has Dynamo look neither at the function's frames nor at those below them. (torch.compiler.disable would import Dynamo.)"""
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    return function
