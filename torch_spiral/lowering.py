"""Lowerings: Python that says once what an op does; C++ replays the plan it leaves (docs/design.md, decision 2).

A lowering receives handles, not tensors. Sizes, strides, storage offsets and numbers are `Sym`s, evaluated by C++ on every
call; a plan is shared by all calls of one signature, so Python must not look at their values, and can't: `bool(sym)` raises.
It may look at what is in the plan's key: dtypes, ranks, and the classes of sizes and strides.

    @lowering("threshold_backward_like")              # the name of an aten overload
    def threshold_backward_like(grad, x, threshold):  # tensors, then numbers as slots
        out = empty(x.sizes, x.dtype)
        launch(kernel, buffers=[grad, x, out], scalars=[x.numel, threshold], groups=(cdiv(x.numel, 64), 1, 1))
        return out
"""

from __future__ import annotations

import contextlib
import functools
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Union

from . import _C
from .kernels import ir
from .kernels.kernel import DTYPES, FLOAT8, Kernel, Target, Unsupported
from .untraced import untraced

# In the order of Code in csrc/dispatch/plan.h.
CODES = {
    name: number
    for number, name in enumerate(
        [
            "Add",
            "Sub",
            "Mul",
            "FloorDiv",
            "Mod",
            "CeilDiv",
            "Min",
            "Max",
            "Neg",
            "Eq",
            "Lt",
            "Le",
            "And",
            "Or",
            "Not",
            "Select",
            "FAdd",
            "FSub",
            "FMul",
            "FDiv",
            "FPow",
            "FMin",
            "FMax",
            "FNeg",
            "FEq",
            "FLt",
            "FLe",
            "FSqrt",
            "FExp",
            "FLog",
            "FFloor",
            "ToFloat",
            "ToInt",
            "PhiloxSeed",
            "PhiloxOffset",
        ]
    )
}
NONE = 0xFFFFFFFF  # kNone and kErrorBuffer of plan.h
LAUNCH, FILL, COPY = range(3)
WORDS = {name: number for number, name in enumerate(("off64", "off32", "pointer", "i64", "f64", "i32", "u32", "f32"))}

# torch's ScalarType numbers.
DTYPE_NUMBERS = {
    "u8": 0, "i8": 1, "i16": 2, "i32": 3, "i64": 4, "f16": 5, "f32": 6, "f64": 7, "c32": 8, "c64": 9, "c128": 10,
    "bool": 11, "bf16": 15, "f8e5m2": 23, "f8e4m3fn": 24, "f8e5m2fnuz": 25, "f8e4m3fnuz": 26, "u16": 27, "u32": 28, "u64": 29,
    "f8e8m0fnu": 44,
}  # fmt: skip
DTYPE_NAMES = {number: name for name, number in DTYPE_NUMBERS.items()}
# ATen's names, as its error texts have them.
SCALAR_TYPES = {
    "u8": "Byte", "i8": "Char", "i16": "Short", "i32": "Int", "i64": "Long", "f16": "Half", "f32": "Float", "f64": "Double",
    "c32": "ComplexHalf", "c64": "ComplexFloat", "c128": "ComplexDouble", "bool": "Bool", "bf16": "BFloat16", "u16": "UInt16",
    "u32": "UInt32", "u64": "UInt64", "f8e5m2": "Float8_e5m2", "f8e4m3fn": "Float8_e4m3fn", "f8e5m2fnuz": "Float8_e5m2fnuz",
    "f8e4m3fnuz": "Float8_e4m3fnuz", "f8e8m0fnu": "Float8_e8m0fnu",
}  # fmt: skip


# What upstream computes of float8 numbers: they are moved, compared and converted; arithmetic is refused.
FLOAT8_OPS = frozenset(
    [
        "copy_stub", "fill_stub", "spiral::foreach_copy_", "eq_stub", "ne_stub", "equal", "abs_stub", "where_kernel", "cat",
        "index_stub", "index_select", "index_put_stub", "flip_stub", "roll", "spiral::eye_", "mm", "_scaled_mm",
        "_scaled_grouped_mm", "spiral::scaled_blocks",
    ]
)  # fmt: skip
NOT_OF_SCALES = frozenset(["abs_stub", "mm"])  # not of float8_e8m0fnu


def not_implemented(name: str, dtype: str) -> str:
    """The text of AT_DISPATCH for a dtype that an op does not take."""
    return f"\"{name.removesuffix('_stub')}\" not implemented for '{SCALAR_TYPES[dtype]}'"


def dtype_name(number: int) -> str:
    """The name of torch's ScalarType `number`; NotImplementedError for dtypes that spiral has no storage for."""
    if number not in DTYPE_NAMES:
        raise NotImplementedError(f"spiral does not support the dtype with ScalarType number {number}")
    return DTYPE_NAMES[number]


Number = Union["Sym", int, float]


class Sym:
    """A number of the call: a slot, a constant, or an expression over them. kind is "i" (int64) or "f" (double)."""

    __slots__ = ("_hint", "_recorder", "_ref", "about", "factor", "kind")

    def __init__(self, ref: tuple[str, int], kind: str, recorder: Recorder, hint: int | float):
        self._ref, self.kind, self._recorder, self._hint = ref, kind, recorder, hint
        self.factor = 1
        """A power of two up to 16 that divides it in every call of the plan."""
        self.about = 0
        """The sum of the buckets of the sizes that it is a product of."""

    def __bool__(self) -> bool:
        raise TypeError(
            "a Sym has no value while a plan is recorded: branch on size classes (is_one, bucket …) or use where()"
        )

    __int__ = __float__ = __index__ = __bool__

    def __eq__(self, other: object) -> bool:
        raise TypeError("compare Syms with eq(), lt() or le(), which give a Sym")

    __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__
    __hash__ = object.__hash__

    def __add__(self, other: Number) -> Sym:
        return _binary("Add", self, other)

    def __radd__(self, other: Number) -> Sym:
        return _binary("Add", other, self)

    def __sub__(self, other: Number) -> Sym:
        return _binary("Sub", self, other)

    def __rsub__(self, other: Number) -> Sym:
        return _binary("Sub", other, self)

    def __mul__(self, other: Number) -> Sym:
        return _binary("Mul", self, other)

    def __rmul__(self, other: Number) -> Sym:
        return _binary("Mul", other, self)

    def __truediv__(self, other: Number) -> Sym:
        return _node("FDiv", to_float(self), to_float(other))

    def __rtruediv__(self, other: Number) -> Sym:
        return _node("FDiv", to_float(other), to_float(self))

    def __floordiv__(self, other: Number) -> Sym:
        return _binary("FloorDiv", self, other)

    def __rfloordiv__(self, other: Number) -> Sym:
        return _binary("FloorDiv", other, self)

    def __mod__(self, other: Number) -> Sym:
        return _binary("Mod", self, other)

    def __neg__(self) -> Sym:
        return _node("FNeg" if self.kind == "f" else "Neg", self)

    def __pow__(self, other: Number) -> Sym:
        return _node("FPow", to_float(self), to_float(other))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._ref[0]}{self._ref[1]})"


class Size(Sym):
    """A size of an operand. Its class is in the plan's key: 0, 1, or floor(log2) and divisibility by 4 and 16."""

    __slots__ = ("_class",)

    def __init__(self, ref: tuple[str, int], recorder: Recorder, hint: int, size_class: int):
        super().__init__(ref, "i", recorder, hint)
        self._class = size_class
        self.factor = 16 if size_class == 0 else 1 if size_class == 1 else (1, 4, 16)[(size_class - 2) % 3]

    @property
    def is_zero(self) -> bool:
        return self._class == 0

    @property
    def is_one(self) -> bool:
        return self._class == 1

    @property
    def bucket(self) -> int:
        """floor(log2(size)); 0 in ops registered as coarse and for sizes 0 and 1."""
        return max(self._class - 2, 0) // 3


class Stride(Sym):
    """A stride of an operand, in elements, with its class: 0, unit, dense (the product of the later sizes) or any."""

    __slots__ = ("_class", "_divisor")

    def __init__(self, ref: tuple[str, int], recorder: Recorder, hint: int, stride_class: int):
        super().__init__(ref, "i", recorder, hint)
        self._class, self._divisor = stride_class & 3, (1, 4, 16)[stride_class >> 2]
        self.factor = 16 if self._class == 0 else self._divisor

    @property
    def is_zero(self) -> bool:
        """Stride 0, or the dimension has at most one element."""
        return self._class == 0

    @property
    def is_one(self) -> bool:
        return self._class == 1

    @property
    def is_dense(self) -> bool:
        """The product of the later sizes, as in a contiguous tensor."""
        return self._class == 2


def is_zero(n: Number) -> bool:
    """Whether a size or stride is known to be 0."""
    return n == 0 if not isinstance(n, Sym) else getattr(n, "is_zero", False)


def is_one(n: Number) -> bool:
    """Whether a size or stride is known to be 1."""
    return n == 1 if not isinstance(n, Sym) else getattr(n, "is_one", False)


def divisible_by(n: Number, k: int) -> bool:
    """Whether k (2, 4, 8, 16) is known to divide it."""
    return n.factor % k == 0 if isinstance(n, Sym) else n % k == 0


def bucket(n: Number) -> int:
    """floor(log2(n)) as the plan's key knows it; 0 where it doesn't."""
    return max(n, 1).bit_length() - 1 if isinstance(n, int) else n.bucket if isinstance(n, Size) else 0


def about(n: Number) -> int:
    """bucket(n), and for a product of sizes about the logarithm of its value."""
    return n.about if isinstance(n, Sym) and not isinstance(n, Size) else bucket(n)


@dataclass(frozen=True)
class Tensor:
    """A tensor of the call, or one that the plan allocates. sizes, strides and offset are in elements."""

    number: int
    dtype: str
    sizes: tuple[Any, ...]
    strides: tuple[Any, ...]
    offset: Any = None
    written: bool = False
    flags: int = 0
    windows: int = 1

    @property
    def ndim(self) -> int:
        return len(self.sizes)

    @property
    def numel(self) -> Any:
        """The number of elements."""
        return product(self.sizes)

    @property
    def is_empty(self) -> bool:
        """Whether the key says that it has no elements."""
        return any(is_zero(s) for s in self.sizes)

    @property
    def is_contiguous(self) -> bool:
        """Whether the key says that it is contiguous in C order."""
        inner = True
        dense: Any = 1  # the product of the later sizes, where those are plain numbers
        for size, stride in zip(reversed(self.sizes), reversed(self.strides)):
            if is_zero(size):
                return True
            if is_one(size):
                continue
            if isinstance(stride, Stride):
                if not (stride.is_one if inner else stride.is_dense):
                    return False
            elif (inner and not is_one(stride)) or (
                not inner and not isinstance(stride, _Dense) and (dense is None or not is_plain(stride, dense))
            ):
                return False
            inner = False
            dense = dense * size if dense is not None and isinstance(size, int) else None
        return True

    @property
    def is_channels_last(self) -> bool:
        """Whether the key says that it is contiguous with the channels (dimension 1) fastest."""
        return bool(self.flags >> 28 & 1)

    @property
    def is_conj(self) -> bool:
        return bool(self.flags >> 25 & 1)

    @property
    def is_neg(self) -> bool:
        return bool(self.flags >> 26 & 1)

    def aligned(self, elements: int) -> bool:
        """Whether its start is known to be a multiple of `elements` elements (16 bytes at most) in its memory."""
        if not self.flags & FRESH or 16 % (elements * DTYPES[self.dtype].size):
            return False
        return self.offset is None or divisible_by(self.offset, elements)

    def same_storage(self, other: Tensor) -> bool:
        """Whether both are known to lie in one storage (the first 16 operands are compared)."""
        return self.root == other.root

    @property
    def root(self) -> int:
        shares = self.flags >> 32 & 0xFF
        return shares - 1 if shares else self.number

    def view(self, sizes: Sequence[Any], strides: Sequence[Any] | None = None, offset: Any = None) -> Tensor:
        """The same memory with other sizes and strides (contiguous where none are given); offset is added to its own."""
        if strides is None:
            strides = contiguous_strides(sizes)
        elif not (_same(sizes, self.sizes) and _same(strides, self.strides)):
            strides = [_not_dense(s) for s in strides]  # "dense" spoke of the sizes that it came with
        if offset is not None and self.offset is not None:
            offset = offset + self.offset
        return Tensor(
            self.number, self.dtype, tuple(sizes), tuple(strides), self.offset if offset is None else offset, self.written,
            self.flags & ~CHANNELS_LAST, self.windows,
        )  # fmt: skip

    def with_dtype(self, dtype: str) -> Tensor:
        """The same elements read as another dtype of the same size."""
        assert DTYPES[dtype].size == DTYPES[self.dtype].size
        return Tensor(self.number, dtype, self.sizes, self.strides, self.offset, self.written, self.flags, self.windows)

    def permute(self, dims: Sequence[int]) -> Tensor:
        """Dimensions in another order."""
        return self.view([self.sizes[d] for d in dims], [self.strides[d] for d in dims])

    def transpose(self, a: int, b: int) -> Tensor:
        dims = list(range(self.ndim))
        dims[a], dims[b] = dims[b], dims[a]
        return self.permute(dims)


CHANNELS_LAST = 1 << 28
FRESH = 1 << 27  # flags of what a plan allocates: starts are aligned


@dataclass(frozen=True)
class IterOperand:
    """An operand of a TensorIterator. Its shape is the iterator's; strides are in elements."""

    tensor: Tensor | None
    dtype: str
    strides: tuple[Any, ...]
    value: Any = None  # of a 0-dim tensor on the host: a Sym, or a pair of them for complex dtypes

    @property
    def is_scalar(self) -> bool:
        return self.tensor is None


@dataclass(frozen=True)
class Iter:
    """A TensorIterator: shape with the fastest dimension first, as ATen coalesced and ordered it."""

    shape: tuple[Size, ...]
    outputs: tuple[IterOperand, ...]
    inputs: tuple[IterOperand, ...]
    common: str | None = None  # the dtype to compute in, where ATen inferred one

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> Any:
        return product(self.shape)


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b))


def _not_dense(stride: Any) -> Any:
    if isinstance(stride, _Dense):
        plain = Sym(stride._ref, "i", stride._recorder, stride._hint)
        plain.factor = stride.factor
        return plain
    if isinstance(stride, Stride) and stride.is_dense:
        other = Stride(stride._ref, stride._recorder, stride._hint, 3)  # type: ignore[arg-type]
        other._divisor = other.factor = stride._divisor
        return other
    return stride


class _Dense(Sym):
    """A stride that is the product of the later sizes."""

    __slots__ = ()


def contiguous_strides(sizes: Sequence[Any]) -> tuple[Any, ...]:
    """Strides, in elements, of a contiguous tensor."""
    strides: list[Any] = []
    dense: Any = 1
    for size in reversed(list(sizes)):
        strides.append(dense)
        if is_one(size):
            continue  # what follows is known to be as dense as it was
        dense = dense * size
        if isinstance(dense, Sym):
            factor, dense = dense.factor, _Dense(dense._ref, "i", dense._recorder, dense._hint)
            dense.factor = factor
    return tuple(reversed(strides))


def product(numbers: Sequence[Any]) -> Any:
    """The product of sizes; 1 for none."""
    result: Any = 1
    for n in numbers:
        result = result * n
    return result


class Recorder:
    """Collects what one lowering does."""

    def __init__(self, device: int, slots: list[int], operands: int, name: str):
        self.device, self.slot_values, self.operand_count, self.name = device, slots, operands, name
        self.target = Target.of(device)
        self.constants: list[int] = []
        self.constant_numbers: dict[tuple[str, int], Sym] = {}
        self.exprs: list[tuple[int, tuple, tuple, tuple]] = []
        self.expr_numbers: dict[tuple, Sym] = {}
        self.checks: list[tuple] = []
        self.allocations: list[list] = []
        self.steps: list[list] = []
        self.kernels: list[str] = []  # names of what is launched, for reports
        self.when = NONE
        self.beside: Any = (
            None  # the product launched last, if others with its left operand may become part of its kernel
        )
        self.note = ""  # which schedule the launches have and why, for traces
        self.expires = 0  # replays until the plan is recorded anew; 0: never

    def constant(self, value: int | float) -> Sym:
        kind = "f" if isinstance(value, float) else "i"
        bits = struct.unpack("<q", struct.pack("<d", value))[0] if kind == "f" else int(value)
        bits = (bits + (1 << 63)) % (1 << 64) - (1 << 63)
        key = (kind, bits)
        if key not in self.constant_numbers:
            self.constants.append(bits)
            sym = self.constant_numbers[key] = Sym(("c", len(self.constants) - 1), kind, self, value)
            if kind == "i":
                sym.factor = min(bits & -bits or 16, 16)
        return self.constant_numbers[key]

    def slot(self, index: int, kind: str = "i") -> Sym:
        bits = self.slot_values[index]
        return Sym(("s", index), kind, self, bits if kind == "i" else struct.unpack("<d", struct.pack("<q", bits))[0])

    def node(self, code: str, *args: Sym) -> Sym:
        refs = tuple(a._ref for a in args) + (("s", 0),) * (3 - len(args))
        if not self.slot_values:
            refs = tuple(self.constant(0)._ref if r == ("s", 0) else r for r in refs)
        key = (code, refs)
        if key in self.expr_numbers and not code.startswith("Philox"):
            return self.expr_numbers[key]
        x, y, z = refs
        self.exprs.append((CODES[code], x, y, z))
        kind = (
            "f"
            if code
            in [
                "FDiv",
                "FAdd",
                "FSub",
                "FMul",
                "FPow",
                "FMin",
                "FMax",
                "FNeg",
                "FSqrt",
                "FExp",
                "FLog",
                "FFloor",
                "ToFloat",
            ]
            else "i"
        )
        if code == "Select":
            kind = args[1].kind
        sym = Sym(("e", len(self.exprs) - 1), kind, self, _evaluate(code, [a._hint for a in args]))
        if code == "Mul":
            sym.factor = min(args[0].factor * args[1].factor, 16)
        elif code in ("Add", "Sub", "Min", "Max"):
            sym.factor = min(args[0].factor, args[1].factor)
        self.expr_numbers[key] = sym
        return sym

    def lift(self, n: Number) -> Sym:
        if isinstance(n, Sym):
            return n
        return self.constant(n if isinstance(n, float) else int(n))

    def index(self, n: Number | None) -> int:
        """The position of a number among the plan's values. Only once all constants are known."""
        if n is None:
            return NONE
        where, i = self.lift(n)._ref
        base = {"s": 0, "c": len(self.slot_values), "e": len(self.slot_values) + len(self.constants)}[where]
        return base + i

    def tensor(self, number: int, dtype: str, sizes: tuple, strides: tuple, written: bool, flags: int) -> Tensor:
        if dtype in FLOAT8 and (self.name not in FLOAT8_OPS or (dtype == "f8e8m0fnu" and self.name in NOT_OF_SCALES)):
            raise NotImplementedError(not_implemented(self.name, dtype))
        return Tensor(number, dtype, sizes, strides, None, written, flags & ((1 << 40) - 1), max(flags >> 40 & 0xFF, 1))

    def argument(self, a: Any) -> Any:
        """The handle for an argument as csrc/dispatch/recording.cpp describes it."""
        if isinstance(a, list):
            return [self.argument(x) for x in a]
        if not isinstance(a, tuple):
            return a
        kind = a[0]
        if kind == "tensor":
            _, number, dtype, sizes, strides, written, flags = a
            return self.tensor(number, dtype_name(dtype), self.sizes(sizes), self.strides(strides), written, flags)
        if kind == "iterator":
            _, shape, operands, outputs, common = a
            handles = tuple(self.iter_operand(o, i < outputs, shape) for i, o in enumerate(operands))
            return Iter(self.sizes(shape), handles[:outputs], handles[outputs:], DTYPE_NAMES.get(common))
        if kind == "dtype":
            return dtype_name(a[1])
        if kind in ("int", "bool"):
            return self.slot(a[1])
        if kind == "float":
            return self.slot(a[1], "f")
        if kind == "complex":
            return self.slot(a[1], "f"), self.slot(a[1] + 1, "f")
        if kind in ("ints", "floats"):
            return [self.slot(a[1] + i, kind[0]) for i in range(a[2])]
        raise AssertionError(kind)

    def sizes(self, described: Sequence[tuple[int, int]]) -> tuple[Size, ...]:
        return tuple(Size(("s", slot), self, self.slot_values[slot], c) for slot, c in described)

    def strides(self, described: Sequence[tuple[int, int]]) -> tuple[Stride, ...]:
        return tuple(Stride(("s", slot), self, self.slot_values[slot], c) for slot, c in described)

    def iter_operand(self, o: tuple, written: bool, shape: tuple) -> IterOperand:
        number, dtype_number, first_slot, scalar, strides, flags = o
        dtype = dtype_name(dtype_number)
        if scalar:
            kind = DTYPES[dtype].kind
            if kind == "complex":
                return IterOperand(None, dtype, (), (self.slot(first_slot, "f"), self.slot(first_slot + 1, "f")))
            return IterOperand(None, dtype, (), self.slot(first_slot, "f" if kind == "float" else "i"))
        tensor = self.tensor(number, dtype, self.sizes(shape), self.strides(strides), written, flags)
        return IterOperand(tensor, dtype, tensor.strides)

    def windows(self, bytes_: Sym) -> int:
        limit = self.target.max_binding
        return max(-(-int(bytes_._hint) // limit), 1)

    def finish(self, result: Any) -> dict:
        results = [] if result is None else list(result) if isinstance(result, (tuple, list)) else [result]
        for r in results:
            if r is not None:
                assert r.number >= self.operand_count, f"{self.name} may only return tensors that it allocated"
                self.allocations[r.number - self.operand_count][0] = True
        # Lifting may add constants, which move the expressions: first lift everything, then number. What only traces ask for comes last.
        needed, flops = 0, [NONE] * len(self.steps)
        for numbering in (False, True):
            steps: list[tuple] = []
            for i, (kind, when, buffers, *rest) in enumerate(self.steps):
                described = [(b.number, self.index(b.offset), b.windows, size) for b, size in buffers]
                if kind == LAUNCH:
                    kernel, words, params_size, groups, work, note = rest
                    words = [(w, v if w < 3 else self.index(v)) for w, v in words]
                    grid = [self.index(g) for g in groups]
                    if numbering and work is not None:
                        flops[i] = self.index(work())
                    steps.append((kind, when, described, kernel, words, params_size, grid, flops[i], note))
                else:
                    steps.append((kind, when, described, self.index(rest[0]), rest[1]))
            allocations = [
                (out, DTYPE_NUMBERS[dtype], [self.index(s) for s in sizes], [self.index(s) for s in strides or ()],
                 self.index(bytes_), windows, packed, kind)
                for out, dtype, sizes, strides, bytes_, windows, packed, kind in self.allocations
            ]  # fmt: skip
            checks = [
                (self.index(c), exception, text, [(self.index(s), self.lift(s).kind == "f") for s in args])
                for c, exception, text, args in self.checks
            ]
            constants = list(self.constants)
            if not numbering:
                needed = len(self.exprs)
                for *_, work, _ in (s for s in self.steps if s[0] == LAUNCH):
                    if work is not None:
                        self.lift(work())

        def place(ref: tuple[str, int]) -> int:
            where, i = ref
            return i + {"s": 0, "c": len(self.slot_values), "e": len(self.slot_values) + len(self.constants)}[where]

        return {
            "constants": constants,
            "exprs": [(code, place(a), place(b), place(c)) for code, a, b, c in self.exprs],
            "checks": checks,
            "allocations": allocations,
            "steps": steps,
            "returned": [NONE if r is None else r.number for r in results],
            "needed": needed,
            "expires": self.expires,
        }


def _evaluate(code: str, v: list) -> int | float:
    """The value of an expression for the call that is being recorded: only what sizes memory windows needs."""
    simple: dict[str, Callable] = {
        "Add": lambda a, b: a + b, "Sub": lambda a, b: a - b, "Mul": lambda a, b: a * b, "Min": min, "Max": max,
        "FloorDiv": lambda a, b: a // b if b else 0, "Mod": lambda a, b: a % b if b else 0,
        "CeilDiv": lambda a, b: -(-a // b) if b else 0, "Neg": lambda a: -a, "Eq": lambda a, b: int(a == b),
        "Lt": lambda a, b: int(a < b), "Le": lambda a, b: int(a <= b), "And": lambda a, b: int(bool(a and b)),
        "Or": lambda a, b: int(bool(a or b)), "Not": lambda a: int(not a), "Select": lambda a, b, c: b if a else c,
        "ToInt": lambda a: int(a) if a == a and abs(a) < 2**63 else 0, "ToFloat": float,
    }  # fmt: skip
    return simple[code](*v) if code in simple else 0.0 if code.startswith("F") else 0


_state = threading.local()


def recorder() -> Recorder:
    """The recorder of the lowering that runs in this thread."""
    current = getattr(_state, "recorder", None)
    if current is None:
        raise RuntimeError("only a lowering that is being recorded may do this")
    return current


def _node(code: str, *args: Number) -> Sym:
    r = recorder()
    return r.node(code, *(r.lift(a) for a in args))


def _binary(code: str, a: Number, b: Number) -> Any:
    r = recorder()
    fa, fb = (
        isinstance(a, float) or getattr(a, "kind", "") == "f",
        isinstance(b, float) or getattr(b, "kind", "") == "f",
    )
    if fa or fb:
        if code == "FloorDiv":
            return r.node("FFloor", r.node("FDiv", to_float(a), to_float(b)))
        if code == "Mod":
            raise TypeError("% of floating Syms")
        return r.node("F" + code, to_float(a), to_float(b))
    if code == "Mul":
        if is_plain(a, 1):
            return b
        if is_plain(b, 1):
            return a
        if is_plain(a, 0) or is_plain(b, 0):
            return 0
        result = r.node(code, r.lift(a), r.lift(b))
        result.about = about(a) + about(b)
        return result
    elif is_plain(b, 0) and code in ("Add", "Sub"):
        return a
    elif is_plain(a, 0) and code == "Add":
        return b
    elif is_plain(b, 1) and code in ("FloorDiv", "CeilDiv"):
        return a
    return r.node(code, r.lift(a), r.lift(b))


def hint(n: Number) -> int:
    """The value of a size in the very call that is being recorded, for a tuner to measure with. Nothing of a plan may depend on it."""
    return int(n._hint if isinstance(n, Sym) else n)


def is_plain(n: Any, value: int) -> bool:
    """Whether n is the Python number `value` (not a Sym)."""
    return not isinstance(n, Sym) and n == value


def to_float(n: Number) -> Sym:
    """n as a floating Sym."""
    r = recorder()
    if not isinstance(n, Sym):
        return r.constant(float(n))
    return n if n.kind == "f" else r.node("ToFloat", n)


def to_int(n: Number) -> Any:
    """n as an integer, truncated."""
    if not isinstance(n, Sym):
        return int(n)
    return n if n.kind == "i" else _node("ToInt", n)


def cdiv(a: Number, b: Number) -> Any:
    """Division rounded up."""
    if not isinstance(a, Sym) and not isinstance(b, Sym):
        return -(-int(a) // int(b))
    return _binary("CeilDiv", a, b)


def minimum(a: Number, b: Number) -> Any:
    if not isinstance(a, Sym) and not isinstance(b, Sym):
        return min(a, b)
    return _binary("Min", a, b)


def maximum(a: Number, b: Number) -> Any:
    if not isinstance(a, Sym) and not isinstance(b, Sym):
        return max(a, b)
    return _binary("Max", a, b)


def _compare(code: str, a: Number, b: Number) -> Any:
    if not isinstance(a, Sym) and not isinstance(b, Sym):
        return {"Eq": a == b, "Lt": a < b, "Le": a <= b}[code]
    floating = any(isinstance(n, float) or getattr(n, "kind", "") == "f" for n in (a, b))
    return _node("F" + code, to_float(a), to_float(b)) if floating else _node(code, a, b)


def eq(a: Number, b: Number) -> Any:
    return _compare("Eq", a, b)


def lt(a: Number, b: Number) -> Any:
    return _compare("Lt", a, b)


def le(a: Number, b: Number) -> Any:
    return _compare("Le", a, b)


def all_of(*conditions: Any) -> Any:
    """Whether all conditions hold: True, False or a Sym."""
    result: Any = True
    for c in conditions:
        if isinstance(c, bool):
            if not c:
                return False
        else:
            result = c if result is True else _node("And", result, c)
    return result


def any_of(*conditions: Any) -> Any:
    """Whether one condition holds: True, False or a Sym."""
    result: Any = False
    for c in conditions:
        if isinstance(c, bool):
            if c:
                return True
        else:
            result = c if result is False else _node("Or", result, c)
    return result


def where(condition: Any, a: Number, b: Number) -> Any:
    """a where the condition holds, else b."""
    if isinstance(condition, bool):
        return a if condition else b
    r = recorder()
    fa, fb = r.lift(a), r.lift(b)
    if fa.kind != fb.kind:
        fa, fb = to_float(fa), to_float(fb)
    return r.node("Select", condition, fa, fb)


def float_function(code: str, n: Number) -> Sym:
    """FSqrt, FExp, FLog or FFloor of a number."""
    return _node(code, to_float(n))


# ---- what a lowering does -------------------------------------------------------------------------------------------


def target() -> Target:
    """What the current device's kernels are built for."""
    return recorder().target


def build(builder: Callable[..., Any], *key: Any, **options: Any) -> Any:
    """`builder(target, *key, **options)`, made once for each target, key and options (hashable)."""
    return _build(recorder().target, builder, key, **options)


@functools.cache
def _build(target: Target, builder: Callable[..., Any], key: tuple, **options: Any) -> Any:
    return builder(target, *key, **options)


@functools.cache
def _compiled(device: int, kernel: Kernel, divisible: tuple[tuple[int, int], ...] = ()) -> int:
    if kernel.language == "triton":
        from .kernels.triton_binary import compile_kernel, gpu_target

        properties = _C.device_properties(device)
        binary = compile_kernel(kernel, gpu_target(properties), divisible, properties["max_workgroup_memory"])
        return _C.compile_kernel(
            device,
            {
                "name": kernel.name + "".join(f"_{i}by{n}" for i, n in divisible), "source": binary.image, "entry": binary.entry,
                "workgroup": [binary.threads, 1, 1],
                "bindings": sum(kernel.windows) + kernel.errors, "params_size": kernel.params_size, "immediate": True,
                "trusted": True, "shared_memory": binary.shared, "scratch": binary.scratch, "waits": binary.waits,
            },
        )  # fmt: skip
    return _C.compile_kernel(
        device,
        {
            "name": kernel.name, "source": kernel.source, "entry": kernel.entry, "workgroup": list(kernel.workgroup),
            "bindings": sum(kernel.windows) + kernel.errors, "params_size": kernel.params_size,
            "immediate": kernel.immediate, "trusted": kernel.trusted,
            "shared_memory": getattr(kernel, "shared_memory", 0),
        },
    )  # fmt: skip


def empty(sizes: Sequence[Any], dtype: str, strides: Sequence[Any] | None = None) -> Tensor:
    """A tensor that C++ allocates on every replay: an output if the lowering returns it, else for the time of the call.

    sizes and strides in elements; contiguous where no strides are given."""
    r = recorder()
    sizes = tuple(sizes)
    if strides is None:
        elements = product(sizes)
    else:
        elements = 1
        for size, stride in zip(sizes, strides):
            elements = elements + (size - 1) * stride
    bytes_ = r.lift(elements * DTYPES[dtype].size)
    windows = r.windows(bytes_)
    r.allocations.append([False, dtype, sizes, strides and tuple(strides), bytes_, windows, NONE, 0])
    number = r.operand_count + len(r.allocations) - 1
    return Tensor(
        number,
        dtype,
        sizes,
        tuple(strides) if strides is not None else contiguous_strides(sizes),
        None,
        True,
        FRESH,
        windows,
    )


def empty_like(x: Tensor, dtype: str | None = None) -> Tensor:
    """A tensor of x's sizes; of its strides too where those are dense in some order known to the key (else contiguous)."""
    return empty(x.sizes, dtype or x.dtype)


_packed_kinds: dict[str, int] = {}


@contextlib.contextmanager
def packed(x: Tensor, sizes: Sequence[Any], dtype: str, kind: str) -> Iterator[Tensor]:
    """A form of the operand x that is kept while x's storage is not written. The body launches what makes it; those
    steps are skipped where it is kept. `kind` names the form (layout and schedule).

    with packed(weight, (panels, k, 32), "f32", "panels32") as p:
        launch(pack_kernel, [weight, p], …)
    """
    r = recorder()
    p = empty(sizes, dtype)
    if x.number < r.operand_count and x.offset is None and not x.written and r.when == NONE:
        r.allocations[-1][6] = x.number
        if all(isinstance(n, int) for n in (*x.sizes, *x.strides)):
            # A view in a compiled graph, which may read an operand through several.
            kind = f"{kind}{x.sizes}{x.strides}"
        r.allocations[-1][7] = _packed_kinds.setdefault(f"{kind}:{dtype}", len(_packed_kinds))
        r.when = p.number - r.operand_count
        try:
            yield p
        finally:
            r.when = NONE
    else:
        yield p


def launch(
    kernel: Kernel,
    buffers: Sequence[Tensor],
    scalars: Sequence[Any],
    groups: Sequence[Any],
    flops: Callable[[], Any] | None = None,
) -> None:
    """Queues a kernel. scalars in the order of kernel.scalars; groups: workgroups in each dimension; none if one is 0. flops: how many
    floating point operations it does, for telemetry."""
    r = recorder()
    assert len(buffers) == len(kernel.windows), f"{kernel.name} takes {len(kernel.windows)} buffers, got {len(buffers)}"
    assert len(scalars) == len(kernel.scalars), f"{kernel.name} takes scalars {kernel.scalars}, got {len(scalars)}"
    described = []
    for buffer, windows, dtype in zip(buffers, kernel.windows, kernel.dtypes):
        assert buffer.windows == windows, f"{kernel.name} was built for {windows} windows, operand has {buffer.windows}"
        assert DTYPES[dtype].size == DTYPES[buffer.dtype].size, f"{kernel.name}: {buffer.dtype} passed for {dtype}"
        described.append((buffer, DTYPES[dtype].size))
    offset = {"opencl": "off64", "wgsl": "off32", "triton": "pointer"}[kernel.language]
    words: list[tuple[int, Any]] = [(WORDS[offset], i) for i in range(len(buffers))]
    wide = ("i64", "f64")
    divisible: tuple[tuple[int, int], ...] = ()
    if kernel.language == "triton":
        if kernel.errors:
            words.append((WORDS[offset], len(buffers)))
        ordered = [v for types in (True, False) for k, v in zip(kernel.scalars, scalars) if (k in wide) == types]
        divisible = tuple((i, 16) for i, b in enumerate(buffers) if b.aligned(16 // DTYPES[b.dtype].size))
        factors = ((i, r.lift(v)) for i, v in enumerate(ordered, len(words)))
        divisible += tuple((i, v.factor) for i, v in factors if v.kind == "i" and v.factor > 1)
    for types in (wide, ("i32", "u32", "f32")):
        for kind, value in zip(kernel.scalars, scalars):
            if kind in types:
                words.append((WORDS[kind], to_float(value) if kind[0] == "f" else r.lift(to_int(value))))
    if kernel.errors:
        described.append((Tensor(NONE, "u32", (), ()), 4))
    grid = tuple(groups) + (1,) * (3 - len(groups))
    compiled = _compiled(r.device, kernel, divisible)
    r.kernels.append(kernel.name)
    r.steps.append([LAUNCH, r.when, described, compiled, words, kernel.params_size, grid, flops, r.note])


def fill_bytes(x: Tensor, value: int) -> None:
    """Sets all bytes of a contiguous tensor."""
    r = recorder()
    size = DTYPES[x.dtype].size
    r.steps.append([FILL, r.when, [(x, size)], x.numel * size, value])


def copy_bytes(to: Tensor, source: Tensor) -> None:
    """Copies a contiguous tensor into another of the same dtype and size."""
    r = recorder()
    size = DTYPES[to.dtype].size
    r.steps.append([COPY, r.when, [(to, size), (source, size)], to.numel * size, 0])


class Refused(Exception):
    """Ends a lowering whose call is known to fail its last check."""


def check(condition: Any, exception: str, text: str, *args: Number) -> None:
    """Raises `exception` ("RuntimeError", "IndexError", "ValueError", "TypeError" or "NotImplementedError") on calls where the
    condition (a bool or a Sym) does not hold; each "{}" in the text becomes the next of args. After a False the lowering goes no
    further."""
    if condition is True:
        return
    r = recorder()
    r.checks.append((r.lift(int(condition) if condition is False else condition), exception, text, args))
    if condition is False:
        raise Refused


def error_site(text: str) -> int:
    """The number of a message that a kernel reports asynchronously; "{}" becomes the offending index."""
    return _C.error_site(text)


def philox(count: Number) -> tuple[Sym, Sym]:
    """(seed, offset) of the call's generator; reserves `count` Philox counters on every replay."""
    seed = _node("PhiloxSeed", count)
    return seed, _node("PhiloxOffset", count)


def call(name: str, *args: Any) -> Any:
    """Inlines another lowering, with handles."""
    return lowerings[name](*args)


# ---- registration ---------------------------------------------------------------------------------------------------

lowerings: dict[str, Callable[..., Any]] = {}
exact_arguments: dict[str, tuple[str, ...]] = {}  # of lowerings that take some
registered: dict[str, str] = {}  # name: "lowering", "structured", "stub" or "composite"


def _register(name: str, kind: str, function: Callable[..., Any], coarse: bool) -> None:
    if name in registered:
        raise RuntimeError(f"{name} is registered twice")
    registered[name] = kind
    if kind != "composite":
        lowerings[name] = function
        if coarse:
            _C.set_coarse(_C.op_id(name))


def lowering(*names: str, slots: tuple[str, ...] = (), exact: tuple[str, ...] = (), coarse: bool = False) -> Callable:
    """Registers the lowering of aten overloads ("native_layer_norm", "add_.Tensor") for spiral tensors.

    slots: integer arguments that don't enter the plan's key. exact: tensors whose sizes beyond the second do, because kernels are
    built for them (filter taps): the lowering gets them as a list of ints after the tensor. coarse: schedules don't depend on
    how large sizes are."""

    def decorate(function: Callable) -> Callable:
        for name in names:
            _register(name, "lowering", function, coarse)
            if exact:
                exact_arguments[name] = exact
            _C.register_boxed(name, list(slots), list(exact))
        return function

    return decorate


_definitions: Any = None


def operator(schema: str, slots: tuple[str, ...] = (), coarse: bool = False) -> Callable:
    """Defines an operator of our own from its schema, "fill_range_(Tensor(a!) out, Scalar start) -> ()", with a lowering.
    Composites call it, on tensors that exist: `torch.ops.spiral.fill_range_(out, 0)`."""
    import torch

    global _definitions
    if _definitions is None:
        _definitions = torch.library.Library("spiral", "FRAGMENT")
    _definitions.define(schema)
    return lowering("spiral::" + schema.partition("(")[0], slots=slots, coarse=coarse)


def internal(name: str, function: Callable) -> None:
    """A lowering without an operator: C++ calls it by its name. Replaces one of the same name."""
    registered[name] = "lowering"
    lowerings[name] = function


def structured(*names: str, coarse: bool = False) -> Callable:
    """Registers the body of structured ops: ATen's meta function has checked everything and made the outputs, which
    come last."""

    def decorate(function: Callable) -> Callable:
        for name in names:
            _register(name, "structured", function, coarse)
        return function

    return decorate


def stub(*names: str, coarse: bool = True) -> Callable:
    """Registers the body of a DispatchStub: (Iter, the stub's further arguments). coarse: False where schedules depend on
    how large sizes are."""

    def decorate(function: Callable) -> Callable:
        for name in names:
            _register(name, "stub", function, coarse)
        return function

    return decorate


_library: Any = None


def composite(*names: str, key: str = "PrivateUse1") -> Callable:
    """Registers an op that is written in aten calls on tensors. It is not recorded; each call inside is, by itself."""

    def decorate(function: Callable) -> Callable:
        import torch

        global _library
        if _library is None:
            _library = torch.library.Library("aten", "IMPL")
        autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]

        @untraced
        @functools.wraps(function)
        def body(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(autocast):
                return function(*args, **kwargs)

        for name in names:
            _register(name if key == "PrivateUse1" else f"{name} of {key}", "composite", function, False)
            _library.impl(name, body, key)
        return function

    return decorate


sparse_composite = functools.partial(composite, key="SparsePrivateUse1")
"""composite, for calls with a sparse COO tensor."""


@untraced
def _record(op: int, name: str, device: int, described: tuple) -> dict:
    """Called by C++ for a call without a plan."""
    arguments, slots, operands = described
    if name not in lowerings:
        raise NotImplementedError(f"torch_spiral has no kernel for {name}")
    outer = getattr(_state, "recorder", None)
    r = _state.recorder = Recorder(device, slots, operands, name)
    try:
        return r.finish(lowerings[name](*(r.argument(a) for a in arguments)))
    except Refused:
        r.steps.clear()
        r.allocations.clear()
        return r.finish(None)  # C++ raises what the checks say, with their numbers
    except ir.DtypeError as error:
        raise NotImplementedError(not_implemented(name, error.dtype)) from error
    except Unsupported as error:
        raise Unsupported(f"{name.removesuffix('_stub')} on spiral:{device}: {error}") from error
    finally:
        _state.recorder = outer


_C.set_recorder(_record)
