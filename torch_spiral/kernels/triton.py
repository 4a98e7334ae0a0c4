"""Triton: a workgroup is a block of lanes, one lane an invocation.

A scalar of an invocation becomes a tensor of LANES values, or stays a scalar where all lanes agree (it depends on sizes and
on the workgroup's index only). A condition that lanes disagree about becomes a mask on the loads, stores and assignments
below it; one that they agree about stays an `if`. A loop runs as often as its longest lane. Shared memory has no such form and
is refused: the schedule class `block` reduces by k.reduce and has templates of its own (kernels/block).

The source of a kernel is a Python module with one function, `main_`, whose arguments are the parameter block in order
(docs/interfaces.md, section 2); its first line says how many warps, pipeline stages and, where they are limited, registers it
takes. triton_binary.py turns it into a binary.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import ir
from .atomics import _UPDATE, Atomics
from .builder import Buffer, KernelBuilder
from .emit import BufferDecl, Emitter, Language, Options, ScalarDecl
from .ir import BITS, ELEMENTARY, FLOATS, INTS, SIGNED, Complex, Node, const_value
from .kernel import COMPUTE, DTYPES, FLOAT8, Kernel, Target, Unsupported, compute_dtype

TYPES = {
    "f32": "tl.float32", "f64": "tl.float64", "i32": "tl.int32", "i64": "tl.int64", "u32": "tl.uint32",
    "u64": "tl.uint64", "bool": "tl.int1",
}  # fmt: skip
# Of the elements that a buffer's pointer points to, as Triton's signatures name them; pairs are two of them.
POINTEE = {
    "f32": "fp32", "f16": "fp16", "bf16": "bf16", "f64": "fp64", "i8": "i8", "i16": "i16", "i32": "i32", "i64": "i64",
    "u8": "u8", "u16": "u16", "u32": "u32", "u64": "u64", "bool": "u8", "c32": "fp16", "c64": "fp32", "c128": "fp64",
    "b128": "u64", **dict.fromkeys(FLOAT8, "u8"),
}  # fmt: skip
STORED = {
    "f16": "tl.float16", "bf16": "tl.bfloat16", "i8": "tl.int8", "i16": "tl.int16", "u8": "tl.uint8", "u16": "tl.uint16",
    "bool": "tl.uint8", "c32": "tl.float16", **dict.fromkeys(FLOAT8, "tl.uint8"),
}  # fmt: skip
SCALAR = {"i32": "i32", "u32": "u32", "f32": "fp32", "i64": "i64", "f64": "fp64"}
INFIX = {
    "add": "+", "sub": "-", "mul": "*", "idiv": "//", "irem": "%", "and": "&", "or": "|", "xor": "^", "lt": "<", "le": "<=",
    "gt": ">", "ge": ">=", "eq": "==", "ne": "!=", "shl": "<<", "shr": ">>",
}  # fmt: skip
# Functions of the vendor's library, under the names that Triton's libdevice gives them.
LIBDEVICE = ELEMENTARY | {
    "rsqrt", "trunc", "rint", "atan2", "pow", "fmod", "hypot", "copysign", "nextafter", "erf", "erfc", "erfinv", "lgamma",
}  # fmt: skip
HEADER = "# warps: {warps}, stages: {stages}{limit}\n"
IMPORTS = "import triton\nimport triton.language as tl\n"


def opening(target: Target, module: str, entry: str, parameters: Sequence[str], ahead: Sequence[str] = ()) -> str:
    """A kernel's text, after HEADER, up to its first access to memory. Where kernels may start early (Target.dependent_launch), every
    workgroup waits until the kernels ahead have ended. ahead: lines that run before, for they read no memory: arithmetic and prefetches.
    The next kernel may start as soon as this one's workgroups leave room for one of its own on every compute unit; else its workgroups
    would pile up where these end first."""
    imports, lines = IMPORTS, ahead
    if target.dependent_launch:
        imports += "from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait\n"
        workgroups = "tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)"
        allow = [f"if {workgroups} <= {target.compute_units}:", "    gdc_launch_dependents()"]
        lines = [*ahead, "gdc_wait()", *allow]
    body = "".join(f"    {line}\n" for line in lines)
    return f"{imports}{module}\n\n@triton.jit\ndef {entry}({', '.join(parameters)}):\n{body}"


class Triton(Language):
    """Text of types, constants, operations and memory. A masked access names the mask by a token, which the emitter
    resolves at the end (Mask)."""

    name = "triton"

    def type(self, target: Target, dtype: str, lanes: int) -> str:
        if lanes > 1:
            raise Unsupported("explicit vectors are of the schedule class `vector`")
        return TYPES[dtype]

    def const(self, target: Target, node: Node) -> str:
        """A number where Triton's own rules give it the other operand's type, else a typed scalar."""
        if node.dtype == "bool":
            return "True" if node.attr else "False"
        text = number(node)
        return text if node.dtype in ("i32", "f32") else f"tl.full([], {text}, {TYPES[node.dtype]})"

    def typed(self, node: Node) -> str:
        return f"tl.full([], {number(node)}, {TYPES[node.dtype]})"

    def splat(self, type_: str, text: str) -> str:
        raise Unsupported("explicit vectors are of the schedule class `vector`")

    def let(self, type_: str, name: str, text: str) -> str:
        return f"{name} = {text}"

    def var(self, type_: str, name: str, text: str) -> str:
        return f"{name} = {text}"

    def function(self, name: str, result: str, params: list[tuple[str, str]], body: list[str]) -> str:
        return f"@triton.jit\ndef {name}({', '.join(n for _, n in params)}):\n" + "\n".join(body) + "\n"

    def operation(self, emitter: Emitter, node: Node, args: list[str]) -> str | None:
        op, dtype = node.op, node.dtype
        source = node.args[0].dtype if node.args else dtype
        # Two numbers, or a number where Triton wants a tensor, need types.
        if op not in INFIX or all(a.op == "const" for a in node.args):
            args = [self.typed(a) if a.op == "const" else t for a, t in zip(node.args, args, strict=True)]
        if op in ("shl", "shr"):  # mixed signs would make the shift unsigned
            amount = args[1] if node.args[1].op == "const" else f"{args[1]}.to({TYPES[dtype]})"
            if node.args[1].op == "const":
                amount = f"tl.full([], {node.args[1].attr}, {TYPES[dtype]})"
            return f"{args[0]} {INFIX[op]} {amount}"
        if op in INFIX:
            return f"{args[0]} {INFIX[op]} {args[1]}"
        if op == "div":
            return f"tl.div_rn({args[0]}, {args[1]})" if dtype == "f32" else f"{args[0]} / {args[1]}"
        if op == "not":
            return f"{args[0]} == 0" if dtype == "bool" else f"~{args[0]}"
        if op == "neg":
            return f"-{args[0]}" if dtype in (*FLOATS, *SIGNED) else f"0 - {args[0]}"
        if op == "where":
            return f"tl.where({', '.join(args)})"
        if op == "cast":
            return f"{args[0]}.to({TYPES[dtype]})"
        if op == "bitcast":
            return f"{args[0]}.to({TYPES[dtype]}, bitcast=True)"
        if op == "abs":
            return f"tl.abs({args[0]})"
        if op in ("min", "max"):
            return f"tl.{op}imum({args[0]}, {args[1]})"
        if op == "isnan":
            return f"{args[0]} != {args[0]}"
        if op == "fma":
            return f"tl.fma({', '.join(args)})" if dtype in FLOATS else f"{args[0]} * {args[1]} + {args[2]}"
        if op in ("floor", "ceil"):
            return f"tl.{op}({args[0]})"
        if op == "sqrt":
            return f"tl.sqrt_rn({args[0]})" if dtype == "f32" else f"tl.sqrt({args[0]})"
        if op in ("f16_decode", "bf16_decode"):
            half = STORED[op[: op.index("_")]]
            return f"{args[0]}.to(tl.uint16).to({half}, bitcast=True).to(tl.float32)"
        if op in ("f16_encode", "bf16_encode"):
            half = STORED[op[: op.index("_")]]
            return f"{args[0]}.to({half}).to(tl.uint16, bitcast=True).to(tl.uint32)"
        if op in LIBDEVICE and emitter.target.engine in ("cuda", "hip"):
            emitter.helper("libdevice", "from triton.language.extra import libdevice\n")
            return f"libdevice.{op}({', '.join(args)})"
        if op == "trunc":
            x = args[0]
            return f"tl.where({x} < 0, -tl.floor(-{x}), tl.floor({x}))"
        if op == "rint":  # adding and taking away 2**mantissa rounds to nearest even
            x, magic = args[0], {"f32": "8388608.0", "f64": "4503599627370496.0"}[dtype]
            magic = f"tl.full([], {magic}, {TYPES[dtype]})"
            return (
                f"tl.where(tl.abs({x}) < {magic}, "
                f"tl.where({x} < 0, -((-{x} + {magic}) - {magic}), ({x} + {magic}) - {magic}), {x})"
            )
        if op in ("lane", "lo", "hi", "extract"):
            raise Unsupported("explicit vectors are of the schedule class `vector`")
        del source
        return f"{emitter.function(node, 1)}({', '.join(args)})"

    # ---- memory -----------------------------------------------------------------------------------------------

    def load(self, k: Emitter, b: BufferDecl, index: str, lanes: int) -> list[Node]:
        """The element at index as a node, or two for pairs."""
        assert isinstance(k, TritonEmitter)
        d = DTYPES[b.dtype]
        nodes = []
        for part in range(2 if d.is_pair else 1):
            pointer, varying = k.pointer(b, index, part)
            text = f"tl.load({pointer}{k.mask.token('a') if varying else ''})"
            if b.dtype in FLOAT8:
                bits = k.tmp("u32", f"{text}.to(tl.uint32)", varying=varying)
                return [Node(f"{b.dtype}_decode", "f32", bits)]
            if b.dtype == "bool":
                text += " != 0"
            elif b.dtype in STORED:
                text += f".to({TYPES[d.compute]})"
            nodes.append(k.tmp(d.compute, text, varying=varying))
        return nodes

    def gather(self, k: Emitter, b: BufferDecl, index: Node) -> list[Node]:
        raise Unsupported("explicit vectors are of the schedule class `vector`")

    def scatter(self, k: Emitter, b: BufferDecl, index: Node, values: list[Node]) -> None:
        raise Unsupported("explicit vectors are of the schedule class `vector`")

    def store(self, k: Emitter, b: BufferDecl, index: str, values: list[Node], lanes: int) -> None:
        assert isinstance(k, TritonEmitter)
        for part, value in enumerate(values):
            if b.dtype in FLOAT8:
                value = Node(f"{b.dtype}_encode", "u32", value)
            varying = k.varies(value)
            pointer, block = k.pointer(b, index, part, varying)
            text = self.typed(value) if value.op == "const" and value.dtype != "bool" else k.value(value)
            if value.dtype == "bool" and value.op == "const":
                text = f"tl.full([], {int(value.attr)}, tl.int1)"
            if b.dtype in STORED:
                text = f"({text}).to({STORED[b.dtype]})"
            k.line(f"tl.store({pointer}, {text}{k.mask.token('m') if block else ''})")

    def prefix(
        self,
        target: Target,
        kernel: Kernel,
        buffers: list[BufferDecl],
        scalars: list[ScalarDecl],
        options: Options,
        module: str,
    ) -> str:
        names = [b.name for b in buffers] + ["error_word"] * options.errors
        names += [s.name for s in scalars if s.type in ("i64", "f64")]
        names += [s.name for s in scalars if s.type not in ("i64", "f64")]
        return opening(target, module, kernel.entry, names)


TRITON = Triton()


def number(node: Node) -> str:
    """A constant as Python writes it."""
    v = const_value(node)
    if node.dtype not in FLOATS:
        return str(int(v))
    return repr(v) if math.isfinite(v) else f'float("{v}")'


# ---- which lanes take part --------------------------------------------------------------------------------------------


class Mask:
    """The lanes for which the statements of a scope are executed. Whether there is a variable for it is known only at the
    end (a Break may come later), so text refers to it by tokens:
      a  ", mask=m, other=0" of a load     m  ", mask=m" of a store     c  " & m" of a condition
      o  m, or a tensor of ones            d  a whole line, dropped where there is no variable
      s  a whole line, "variable, value": an assignment, of the lanes of m where there is one
    """

    def __init__(self, emitter: TritonEmitter, parent: Mask | None, name: str, used: bool) -> None:
        self.parent, self.name, self.used = parent, name, used
        self.number = len(emitter.masks)
        emitter.masks.append(self)

    def token(self, kind: str) -> str:
        return f"\x02{kind}{self.number}\x02"

    def variable(self) -> str | None:
        """Its name, or that of the nearest mask above it that has one."""
        return self.name if self.used else self.parent.variable() if self.parent else None


class TritonEmitter(Emitter):
    """Statements with Python's indentation. `varying` names the values that differ from lane to lane."""

    def __init__(self, lang: Language, target: Target, module: dict[str, str] | None = None, prefix: str = "t") -> None:
        super().__init__(lang, target, module, prefix)
        self.depth = 1
        self.varying: set[str] = {"lid", "lid0", "lid1", "lid2"}
        self.masks: list[Mask] = []
        self.root = self.mask = Mask(self, None, "inside", False)

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def open(self, text: str) -> None:
        raise Unsupported("text of another language")

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        """An indented block."""
        self.line(head)
        self.depth += 1
        self.scopes.append({})
        at = len(self.lines)
        yield
        if all(line.lstrip().startswith("\x02d") for line in self.lines[at:]):
            self.line("pass")
        self.scopes.pop()
        self.depth -= 1

    @contextmanager
    def masked(self, mask: Mask) -> Iterator[None]:
        """Statements for some lanes."""
        outer, self.mask = self.mask, mask
        self.scopes.append({})
        yield
        self.scopes.pop()
        self.mask = outer

    def varies(self, node: Any) -> bool:
        node = ir.as_node(node)
        return any(n.op == "tmp" and n.attr in self.varying for n in ir.walk(node))

    def tmp(self, dtype: str, text: str, lanes: int = 1, varying: bool = True) -> Node:
        node = super().tmp(dtype, text, lanes)
        if varying:
            self.varying.add(node.attr)
        return node

    def _emit(self, node: Node) -> str:
        name = super()._emit(node)
        if any(self._atom_varies(a) for a in node.args):
            self.varying.add(name)
        return name

    def _atom_varies(self, node: Node) -> bool:
        if node.op == "const":
            return False
        atom = node.attr if node.op == "tmp" else self._find(node)
        return atom in self.varying

    def function(self, node: Node, lanes: int) -> str:
        from .functions import LOWER

        if node.op not in LOWER:
            raise ValueError(f"no rule and no lowering for {node.op} in Triton")
        name = f"{node.op}_{node.args[0].dtype}"
        if name not in self.module:
            params = [Node("tmp", a.dtype, attr=f"x{i}") for i, a in enumerate(node.args)]
            self.define(name, params, [LOWER[node.op](*params)])
        return name

    def define(self, name: str, params: Sequence[Node], results: Sequence[Node]) -> str:
        """A function of the module that computes expressions of its parameters (tmp nodes)."""
        if name not in self.module:
            inner = TritonEmitter(self.lang, self.target, self.module)
            texts = [TRITON.typed(r) if r.op == "const" and r.dtype != "bool" else inner.value(r) for r in results]
            inner.line(f"return {', '.join(texts)}")
            self.module[name] = TRITON.function(name, "", [("", p.attr) for p in params], inner.lines)
        return name

    def pointer(self, b: BufferDecl, index: str, part: int = 0, varying: bool = False) -> tuple[str, bool]:
        """Address of an element, and whether there is one per lane: there is where the index varies, where there may be a
        mask, and where `varying` asks for it."""
        scalar = index not in self.varying and not varying and self.mask is self.root and not self.root.used
        i, pair = index, DTYPES[b.dtype].is_pair
        if (index in self.wide_unsigned or pair) and not index.lstrip("-").isdigit():
            i = f"{index}.to(tl.int64)"
        if pair:
            i = f"{i} * 2 + {part}"
        if index not in self.varying and not scalar:
            i = f"({i}) + zero"
        return f"{b.name} + {i}" if not i.startswith("-") else f"{b.name} + ({i})", not scalar

    @property
    def wide_unsigned(self) -> set[str]:
        return self.__dict__.setdefault("_wide_unsigned", set())

    def text(self) -> str:
        """The body, with masks resolved."""
        out = []
        for line in self.lines:
            stripped = line.lstrip()
            if stripped.startswith("\x02d"):
                number, _, rest = stripped[2:].partition("\x02")
                if not self.masks[int(number)].used:
                    continue
                line = line[: len(line) - len(stripped)] + rest
            elif stripped.startswith("\x02s"):
                number, name, value = stripped[2:].split("\x02")
                mask = self.masks[int(number)].variable()
                text = f"{name} = tl.where({mask}, {value}, {name})" if mask else f"{name} = {value}"
                line = line[: len(line) - len(stripped)] + text
            out.append(re.sub("\x02([amco])([0-9]+)\x02", self._resolve, line))
        return "\n".join(out)

    def _resolve(self, m: re.Match) -> str:
        name = self.masks[int(m[2])].variable()
        if m[1] == "o":
            return name or "(zero == 0)"
        if name is None:
            return ""
        return {"a": f", mask={name}, other=0", "m": f", mask={name}", "c": f" & {name}"}[m[1]]


# ---- kernels as statements --------------------------------------------------------------------------------------------


class TritonBuilder(KernelBuilder):
    """KernelBuilder for Triton. num_warps and num_stages may be set before finish()."""

    emitter: TritonEmitter

    def __init__(self, target: Target, name: str, wide: bool = False) -> None:
        super().__init__(target, name, wide)
        self.emitter = TritonEmitter(self.lang, target)
        self.atomics = TritonAtomics(self)
        self.num_warps: int | None = None
        self.num_stages = 3
        self._loops: list[tuple[Mask, Mask]] = []  # of the enclosing loops: live lanes, lanes of this turn
        self._condition: tuple[str, str] | None = None

    def _refuse(self, what: str) -> Any:
        raise Unsupported(f"{self.name}: {what} has no form in Triton; the schedule class `block` does without")

    def shared(self, dtype: str, size: int) -> Any:
        return self._refuse("shared memory")

    def barrier(self, buffers: bool = False) -> None:
        """Stores to buffers by any lane are visible to all."""
        if not buffers:
            self._refuse("a barrier of shared memory")
        self.emitter.line("tl.debug_barrier()")
        self.forget_loads()

    def text(self, text: str) -> None:
        self._refuse("raw text")

    def raw(self, dtype: str, text: str) -> Node:
        return self._refuse("raw text")

    def subgroup(self, op: str, value: Any) -> Node:
        return self._refuse("a subgroup operation")

    def subgroup_shuffle_xor(self, value: Any, mask: int) -> Node:
        return self._refuse("a subgroup operation")

    def lanes(self, width: int, dtype: str = "i32") -> Node:
        return super().lanes(width, dtype) if width == 1 else self._refuse("an explicit vector")

    # ---- where am I ---------------------------------------------------------------------------------------------

    def workgroup_id(self, axis: int) -> Node:
        return self.emitter.tmp("u32", f"tl.program_id({axis}).to(tl.uint32)", varying=False)

    def local_id(self, axis: int | None = None) -> Node:
        return Node("tmp", "u32", attr="lid" if axis is None else f"lid{axis}")

    def global_id(self, workgroup: int | None = None) -> Node:
        size = Node("tmp", "u32", attr="size") if workgroup is None else ir.const(workgroup, "u32")
        return self.let(self.group_index() * size + self.local_id())

    # ---- statements ---------------------------------------------------------------------------------------------

    def var(self, dtype: str, init: Any = 0, lanes: int = 1) -> Any:
        if dtype not in COMPUTE or lanes > 1:
            return super().var(dtype, init, lanes)
        from .builder import Var

        e = self.emitter
        node = ir.cast(ir.as_node(init, dtype), dtype)
        text = e.value(node)
        name = e.fresh("v")
        e.line(f"{name} = {text if e.varies(node) else self._full(text, dtype)}")
        e.varying.add(name)
        return Var(self, name, dtype, 1)

    def _full(self, text: str, dtype: str) -> str:
        return f"tl.full([LANES], {text}, {TYPES[dtype]})"

    def assign(self, name: str, node: Node, lanes: int = 1) -> None:
        e = self.emitter
        text = e.value(node)
        whole = text if e.varies(node) else self._full(text, node.dtype)
        if e.mask is e.root and not self._loops:
            e.line(f"{name} = {whole}")
        else:
            e.line(e.mask.token("s") + f"{name}\x02{whole}")

    @contextmanager
    def If(self, cond: Any) -> Iterator[None]:
        e = self.emitter
        node = self.let(ir.cast(cond, "bool"))
        text = e.value(node)
        if not e.varies(node):
            with e.block(f"if {text}:"):
                yield
        else:
            with self._lanes(text):
                yield
        self._else, self._condition = (len(e.lines), len(e.scopes)), (text, "lanes" if e.varies(node) else "all")

    @contextmanager
    def _lanes(self, condition: str) -> Iterator[None]:
        e = self.emitter
        mask = Mask(e, e.mask, e.fresh("m"), True)
        e.line(f"{mask.name} = {condition}{e.mask.token('c')}")
        with e.masked(mask):
            yield

    @contextmanager
    def Else(self) -> Iterator[None]:
        e = self.emitter
        if self._else != (len(e.lines), len(e.scopes)) or self._condition is None:
            raise ValueError("Else must follow If directly")
        text, kind = self._condition
        if kind == "all":
            with e.block("else:"):
                yield
        else:
            with self._lanes(f"({text} == 0)"):
                yield

    @contextmanager
    def For(self, start: Any, stop: Any, step: Any = 1) -> Iterator[Node]:
        e = self.emitter
        bounds = [start, stop, step]
        if all(isinstance(b, int) for b in bounds):
            bounds[0] = ir.const(start, "i32")
        dtype, (first, last, by) = ir.same(*bounds)
        first, last, by = (self.let(x) for x in (first, last, by))
        name = e.fresh("i")
        live, turn = Mask(e, e.mask, e.fresh("live"), False), None
        e.line(live.token("d") + f"{live.name} = {e.mask.token('o')} & (zero == 0)")
        if any(e.varies(x) for x in (first, last, by)):
            if by.op == "const" and by.attr < 0:
                count = ir.idiv(first - last + (-by.attr - 1), -by.attr)
                count = ir.where(ir.gt(first, last), count, 0)
            else:
                count = ir.where(ir.lt(first, last), ir.idiv(last - first + (by - 1), by), 0)
            trips = e.value(self.let(ir.cast(count, "i64" if dtype in ("i64", "u64") else "i32")))
            longest, j = e.fresh("n"), e.fresh("j")
            e.line(f"{longest} = tl.max(tl.where({e.mask.token('o')}, {trips}, 0), 0)")
            turn = Mask(e, live, e.fresh("m"), True)
            with e.block(f"for {j} in range(0, {longest}):"):
                e.line(f"{turn.name} = ({j} < {trips}){live.token('c')}")
                e.line(f"{name} = {e.value(first)} + tl.full([], {j}, {TYPES[dtype]}) * {e.value(by)}")
                if e.varies(first) or e.varies(by):
                    e.varying.add(name)
                with self._loop(live, turn):
                    yield Node("tmp", dtype, attr=name)
            return
        turn = Mask(e, live, e.fresh("m"), False)
        texts = [e.value(x) if x.op != "const" else number(x) for x in (first, last, by)]
        wide = dtype in ("u32", "u64", "i64")  # Triton's loops count signed
        if wide:
            texts = [
                t if x.op == "const" else f"{t}.to(tl.int64)" for t, x in zip(texts, (first, last, by), strict=True)
            ]
        with e.block(f"for {name} in range({', '.join(texts)}):"):
            e.line(turn.token("d") + f"{turn.name} = {live.token('o')} & (zero == 0)")
            index = e.fresh("i")
            e.line(f"{index} = tl.full([], {name}, {TYPES[dtype]})")
            with self._loop(live, turn):
                yield Node("tmp", dtype, attr=index)

    @contextmanager
    def While(self, cond: Callable[[], Any] | None = None) -> Iterator[None]:
        e = self.emitter
        live = Mask(e, e.mask, e.fresh("live"), True)
        turn = Mask(e, live, e.fresh("m"), False)

        def test() -> None:
            if cond is not None:
                text = e.value(self.let(ir.cast(ir.as_node(cond()), "bool")))
                e.line(f"{live.name} = {live.name} & {text}")

        e.line(f"{live.name} = {e.mask.token('o')} & (zero == 0)")
        test()
        with e.block(f"while tl.max({live.name}.to(tl.int32), 0) > 0:"):
            e.line(turn.token("d") + f"{turn.name} = {live.name}")
            with self._loop(live, turn):
                yield
            with e.masked(live):
                self.forget_loads()  # another turn
                test()

    @contextmanager
    def _loop(self, live: Mask, turn: Mask) -> Iterator[None]:
        self._loops.append((live, turn))
        with self.emitter.masked(turn):
            yield
        self._loops.pop()

    def _stop(self, masks: Sequence[Mask], until: Mask | None) -> None:
        """Takes the current lanes out of the scopes from here up to `until`, and out of `masks`."""
        e = self.emitter
        gone = e.fresh("gone")
        e.line(f"{gone} = {e.mask.token('o')} & (zero == 0)")
        for mask in masks:
            mask.used = True
        scope: Mask | None = e.mask
        done = set()
        while scope is not None:
            if scope.used and scope.number not in done:
                e.line(f"{scope.name} = {scope.name} & ({gone} == 0)")
                done.add(scope.number)
            if scope is until:
                break
            scope = scope.parent
        for mask in masks:
            if mask.number not in done:
                e.line(f"{mask.name} = {mask.name} & ({gone} == 0)")

    def Break(self) -> None:
        if not self._loops:
            raise ValueError("Break outside a loop")
        live, turn = self._loops[-1]
        self._stop([live, turn], live)

    def Continue(self) -> None:
        if not self._loops:
            raise ValueError("Continue outside a loop")
        self._stop([self._loops[-1][1]], self._loops[-1][1])

    def Return(self) -> None:
        self._stop([m for pair in self._loops for m in pair] + [self.emitter.root], None)

    def check_index(self, index: Any, low: Any, high: Any, site: Any) -> Node:
        self.errors = True
        e = self.emitter
        index = self.let(ir.as_node(index))
        bad = self.let(ir.or_(ir.lt(index, low), ir.ge(index, high)))
        site_ = e.value(self.let(ir.as_node(site, "u32")))
        detail = e.value(self.let(ir.cast(ir.cast(index, "i64"), "i32")))
        wrong = e.fresh("wrong")
        e.line(f"{wrong} = {e.mask.token('o')} & (zero == 0) & {e.value(bad)}")
        with e.block(f"if tl.max({wrong}.to(tl.int32), 0) > 0:"):
            worst, old = e.fresh(), e.fresh()
            e.line(f"{worst} = tl.max(tl.where({wrong}, {detail}, -2147483648), 0)")
            if site_.isdigit() or ir.as_node(site, "u32").op == "const":
                site_ = TRITON.typed(ir.as_node(site, "u32"))
            e.line(f"{old} = tl.atomic_cas(error_word, tl.full([], 0, tl.uint32), {site_})")
            with e.block(f"if {old} == 0:"):
                e.line(f"tl.store(error_word + 1, {worst}.to(tl.uint32, bitcast=True))")
        safe = ir.where(bad, low, index)
        return safe if self.wide else self.index(safe)

    def reduce(
        self,
        name: str,
        combine: Callable[[tuple, tuple], tuple],
        dtypes: Sequence[str],
        values: Sequence[Any],
        columns: int = 1,
    ) -> list[Node]:
        """All lanes' tuples of values combined; every lane gets the result. combine is associative and commutative; name and
        dtypes say which it is. columns: only lanes that are so many apart are combined, each with its like."""
        e = self.emitter
        nodes = [self.let(ir.as_node(v)) for v in values]
        texts = []
        for n, t in zip(nodes, dtypes, strict=True):
            text = e.value(n) if e.varies(n) else self._full(e.value(n), t)
            text = f"{text}.to(tl.int32)" if t == "bool" else text
            texts.append(f"tl.reshape({text}, [LANES // {columns}, {columns}])" if columns > 1 else text)
        carried = ["i32" if t == "bool" else t for t in dtypes]
        params = [Node("tmp", t, attr=f"{side}{i}") for side in "ab" for i, t in enumerate(carried)]
        given = [ir.ne(p, 0) if t == "bool" else p for p, t in zip(params, [*dtypes, *dtypes], strict=True)]
        half = len(dtypes)
        combined = combine(tuple(given[:half]), tuple(given[half:]))
        results = [ir.cast(r, t) for r, t in zip(combined, carried, strict=True)]
        function = e.define(f"combine_{name}_{'_'.join(dtypes)}", params, results)
        names = [e.fresh("r") for _ in dtypes]
        if half == 1:
            e.line(f"{names[0]} = tl.reduce({texts[0]}, 0, {function})")
        else:
            e.line(f"{', '.join(names)} = tl.reduce(({', '.join(texts)}), 0, {function})")
        if columns > 1:
            for n in names:
                every = f"tl.broadcast_to({n}[None, :], [LANES // {columns}, {columns}])"
                e.line(f"{n} = tl.reshape({every}, [LANES])")
            e.varying.update(names)
        out = [Node("tmp", t, attr=n) for t, n in zip(carried, names, strict=True)]
        return [self.let(ir.ne(n, 0)) if t == "bool" else n for n, t in zip(out, dtypes, strict=True)]

    # ---- helpers ------------------------------------------------------------------------------------------------

    def choose(
        self, value: Node, starts: Sequence[int], rows: Sequence[tuple[Sequence[Buffer], Sequence[int]]]
    ) -> tuple[list[Buffer], list[Node]]:
        """The buffers and numbers (u32) of the last of `rows` that starts no later than a value that all lanes share."""
        e = self.emitter
        text, chosen = e.value(self.let(ir.cast(value, "u32"))), rows[0][0]
        pointers, numbers = ([e.fresh("c") for _ in part] for part in rows[0])

        def assign(first: int, last: int) -> None:
            if last - first > 1:
                middle = (first + last) // 2
                for head, *part in ((f"if {text} < {starts[middle]}:", first, middle), ("else:", middle, last)):
                    with e.block(str(head)):
                        assign(*part)
                return
            for name, b in zip(pointers, rows[first][0], strict=True):
                e.line(f"{name} = {b.decl.name}")
            for name, n in zip(numbers, rows[first][1], strict=True):
                e.line(f"{name} = tl.full([], {n}, tl.uint32)")

        assign(0, len(rows))
        found = [Buffer(self, dataclasses.replace(b.decl, name=name)) for b, name in zip(chosen, pointers, strict=True)]
        return found, [Node("tmp", "u32", attr=name) for name in numbers]

    def index(self, index: Any) -> Node:
        node = super().index(index)
        return node if node.op == "const" else self.let(node)

    def index_text(self, node: Node) -> str:
        text = self.emitter.value(node)
        if node.dtype == "u32" and node.op != "const":  # pointers add signed numbers
            self.emitter.wide_unsigned.add(text)
        return number(node) if node.op == "const" else text

    def finish(self, workgroup: tuple[int, int, int] = (1, 1, 1), *, trusted: bool = False) -> Kernel:
        from .emit import header

        e = self.emitter
        x, y, z = workgroup
        size = x * y * z
        lanes = 1 << (size - 1).bit_length()
        if lanes != size:
            e.root.used = True
        start = [
            f"LANES: tl.constexpr = {lanes}",
            "lid = tl.arange(0, LANES).to(tl.uint32)",
            "zero = tl.zeros([LANES], tl.int32)",
            f"size = tl.full([], {size}, tl.uint32)",
            f"lid0 = lid % {x}",
            f"lid1 = lid // {x} % {y}",
            f"lid2 = lid // {x * y}",
            "group_index = (tl.program_id(0) + tl.num_programs(0) * (tl.program_id(1) + tl.num_programs(1) * "
            "tl.program_id(2))).to(tl.uint32)",
        ]
        if e.root.used:
            start.append(f"inside = lid < {size}")
        if self.target.engine == "interpreter":  # which gives numbers types of its own
            start += [f"{c.name} = tl.full([], {c.name}, {TYPES[c.type]})" for c in self.scalars]
        body = e.text()
        used = set(re.findall(r"\w+", body + " LANES" + " lid" * e.root.used))
        if used & {"lid0", "lid1", "lid2"}:
            used.add("lid")
        start = [s for s in start if re.match(r"\w+", s)[0] in used]  # type: ignore[index]
        prefix, _, kernel = header(
            self.target, self.name, list(self.buffers), list(self.scalars), workgroup, self.errors,
            module="\n\n".join(sorted(e.module.values(), key=lambda t: not t.startswith("from "))),
        )  # fmt: skip
        warps = self.num_warps or min(max(lanes // 64, 1), 8)
        text = HEADER.format(warps=warps, stages=self.num_stages, limit="") + prefix
        text += "".join(f"    {s}\n" for s in start) + body + "\n"
        return dataclasses.replace(kernel, source=text)


class TritonAtomics(Atomics):
    """Triton's atomics where there are, else a compare-exchange loop on the containing word for all lanes at once."""

    k: TritonBuilder

    def apply(self, b: Buffer, op: str, index: Node, values: list[Node]) -> Node | None:
        if b.decl.mode != "a":
            raise ValueError(f"buffer {b.name}: atomics need mode 'a'")
        e = self.k.emitter
        d = DTYPES[b.dtype]
        integers = b.dtype in ("i32", "u32", "i64", "u64")
        if integers or (op == "add" and d.kind in ("float", "complex") and b.dtype != "c32"):
            out = None
            for part, value in enumerate(values):
                pointer, _ = e.pointer(b.decl, self.k.index_text(index), part, True)
                text = e.value(value) if e.varies(value) else self.k._full(e.value(value), value.dtype)
                if b.dtype in STORED:
                    text += f".to({STORED[b.dtype]})"
                out = e.tmp(d.compute, f'tl.atomic_{op}({pointer}, {text}{e.mask.token("m")}, sem="relaxed")')
            return out if b.dtype in ("i32", "u32") else None
        if d.is_pair and b.dtype != "c32":
            raise TypeError(f"atomic {op} of {b.dtype}")
        term: Any = Complex(*values) if len(values) == 2 else values[0]
        self.update(b, index, lambda old: _UPDATE[op](old, term))
        return None

    def _exchange(self, b: Buffer, index: Node, part: int, f: Callable[[Any], Any]) -> None:
        k, e = self.k, self.k.emitter
        d = DTYPES[b.dtype]
        word = "u64" if d.size == 8 else "u32"
        address, shift = e.fresh("address"), None
        element, _ = e.pointer(b.decl, k.index_text(index), part, True)
        base = b.name
        # Lanes that take no part exchange the buffer's first word by itself.
        e.line(f"{address} = tl.where({e.mask.token('o')}, ({element}).to(tl.int64), {base}.to(tl.int64))")
        e.varying.add(address)
        if d.size < 4:
            shift = e.tmp("u32", f"(({address} & 3) * 8).to(tl.uint32)")
        elif b.dtype == "c32":
            pass
        place = e.fresh("place")
        e.line(f"{place} = ({address} & ~{7 if word == 'u64' else 3}).to(tl.pointer_type({TYPES[word]}))")
        old = k.var(word, e.tmp(word, f"tl.load({place})"))
        with k.While():
            o = old.as_node()
            new = self._replaced(e, b, o, shift, f)
            at, live = e.fresh("at"), e.mask.token("o")
            e.line(f"{at} = tl.where({live}, {e.value(o)}, 0)")
            got = e.tmp(word, f'tl.atomic_cas({place}, {at}, tl.where({live}, {e.value(new)}, 0), sem="relaxed")')
            with k.If(ir.eq(got, o)):
                k.Break()
            old.set(got)


def signature(kernel: Kernel) -> list[str]:
    """Triton's types of a kernel's parameters, in order."""
    types = ["*" + POINTEE[d] for d in kernel.dtypes] + ["*u32"] * kernel.errors
    wide = [SCALAR[s] for s in kernel.scalars if s in ("i64", "f64")]
    return types + wide + [SCALAR[s] for s in kernel.scalars if s not in ("i64", "f64")]


__all__ = ["BITS", "INTS", "TRITON", "Triton", "TritonBuilder", "compute_dtype", "signature"]
