# The compiled library (csrc/python): what is in it is known at run time only.
from typing import Any

def __getattr__(name: str) -> Any: ...
