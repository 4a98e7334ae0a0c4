"""The host side of a compiled graph: stretches of the wrapper that only launch kernels of ours become Graphs."""

from __future__ import annotations

import ast
import collections
import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import sympy
import torch

from .. import _C
from .. import lowering as low
from ..kernels import ir
from ..kernels.kernel import Target
from ..kernels.vector.gemm import constant_step
from . import attention, compat, prologue
from .codegen import summary
from .compat import V
from .epilogue import Extent, Operand, match, split
from .loops import Built, Program, build, with_buffers
from .ops import dtype_name
from .report import Step
from .runtime import OUT_EXTERNS

SMALL = 1 << 14  # results of a pointwise kernel that takes hardly longer than its launch
MOST_BUFFERS = 60  # of a kernel that several became, where the device has so many

SIZE = re.compile(r"^(s|u|ps|z)\d+$")


@dataclasses.dataclass(frozen=True)
class Report:
    """A fused kernel, for explain()."""

    name: str
    kernel: Any
    program: Program
    origins: str


reports: collections.deque[Report] = collections.deque(maxlen=1024)


hosts: collections.deque[tuple[Step, ...]] = collections.deque(maxlen=64)
"""The steps of the functions generated last, for explain()."""


def _loaded(tree: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)]


def _stored(tree: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _call(node: ast.AST | None) -> tuple[str, ast.Call] | None:
    """The dotted name of what is called, and the call."""
    if not isinstance(node, ast.Call):
        return None
    return ast.unparse(node.func), node


class Wrapper(compat.PythonWrapperCodegen):
    """Inductor's Python wrapper; generate_return cuts its body into Graphs."""

    def __init__(self) -> None:
        self.fused: dict[str, tuple[str, tuple[int, ...]]] = {}  # name: definition, which buffers it writes
        self.fused_origins: dict[str, str] = {}
        self.programs: dict[str, Program] = {}
        self.sites: dict[str, tuple[str, ...]] = {}  # what a kernel's checks of indices report
        self.graphs: list[str] = []
        super().__init__()

    @staticmethod
    def create(is_subgraph: bool, subgraph_name: Any, parent_wrapper: Any, partition_signatures: Any = None) -> Any:
        return Subgraph(subgraph_name, parent_wrapper, partition_signatures) if is_subgraph else Wrapper()

    def write_header(self) -> None:
        super().write_header()
        self.imports.splice(
            """
            from torch_spiral.compiler import runtime as spiral
            from torch_spiral.kernels.kernel import Kernel
            """,
            strip=True,
        )

    def define(
        self,
        text: str,
        built: Built,
        sites: Sequence[str],
        launch: dict[str, Any],
        program: Program,
        find_origins: Callable[[], str],
    ) -> str:
        """The name of a kernel in the module, put there where it is the first of this text."""
        if text in self.src_to_kernel:
            return self.src_to_kernel[text]
        name = self.src_to_kernel[text] = f"fused_{self.next_kernel_suffix()}"
        origins = find_origins()
        digest = hashlib.sha256(repr((built, tuple(sites))).encode()).hexdigest()[:16]
        kernel = dataclasses.replace(built.kernel, name=f"fused_{digest}")
        rest = ", ".join(
            f"{f.name}={getattr(kernel, f.name)!r}"
            for f in dataclasses.fields(kernel)
            if f.name not in ("name", "source")
        )
        lines = [
            f"{name} = spiral.Fused(Kernel(",
            f"    name={kernel.name!r}, {rest},",
            '    source="""\\',
            *kernel.source.strip("\n").replace("\\", "\\\\").split("\n"),
            f'"""), schedule={built.schedule!r}, lanes={built.lanes}, sites={tuple(sites)!r}, nodes={summary(origins)!r})',
            "",
        ]
        for line in [*origins.split("\n"), *lines]:
            self.header.writeline(line)
        self.fused[name] = (kernel.name, tuple(launch["buffers"].index(b) for b in launch["written"]))
        self.fused_origins[name] = origins
        self.programs[name], self.sites[name] = program, tuple(sites)
        reports.append(Report(name, kernel, program, origins))
        return name

    def make_allocation(self, name: str, device: torch.device, dtype: torch.dtype, shape: Any, stride: Any,
                        allocation_shape: Any = None, is_pinned: bool = False) -> str:  # fmt: skip
        if device.type != "spiral":
            return super().make_allocation(name, device, dtype, shape, stride, allocation_shape, is_pinned)
        sizes, strides = self.codegen_python_shape_tuple(shape), self.codegen_python_shape_tuple(stride)
        if allocation_shape is not None and self.codegen_python_shape_tuple(allocation_shape) != sizes:
            return super().make_allocation(name, device, dtype, shape, stride, allocation_shape)
        return f"{name} = empty({sizes}, {strides}, {dtype_name(dtype)!r})"

    @property
    def device_index(self) -> int:
        """The device of the graph."""
        indices = V.graph.device_idxs
        if len(indices) > 1:
            names = ", ".join(f"spiral:{i}" for i in sorted(indices))
            raise NotImplementedError(f"spiral's compiler has no graphs on several devices ({names})")
        return next(iter(indices), 0)

    def generate(self, is_inference: bool) -> Any:
        # Buffers keep their own names: a plan gives temporaries the memory of earlier ones by itself, and a name that is used
        # twice looks to epilogues as if it were read later.
        with compat.config.patch(allow_buffer_reuse=False):
            return super().generate(is_inference)

    def generate_return(self, output_refs: list[str]) -> None:
        super().generate_return(output_refs)
        text = self.wrapper_call.getvalue()
        cutter = _Cutter(self, text)
        lines = cutter.cut()
        hosts.append(tuple(cutter.steps))
        self.write_direct(cutter)
        self.wrapper_call.clear()
        with self.wrapper_call.indent():
            for line in lines:
                self.wrapper_call.writeline(line)

    def write_direct(self, cutter: _Cutter) -> None:
        """What the backend looks for in the module: how many arguments the function takes, and the C++ object that does the same."""
        direct = cutter.direct()
        self.header.writeline(f"arguments = {len(V.graph.graph_input_names)}")
        if direct is not None:
            self.header.writeline(f"direct = graph_0.direct({direct})")


class Subgraph(compat.SubgraphPythonWrapperCodegen, Wrapper):
    """The function of a branch of torch.cond or of the body of a loop. Kernels and graphs are those of the module."""

    def __init__(self, name: str, parent: Any, signature: Any) -> None:
        super().__init__(name, parent, signature)
        root = self.get_root_graph()
        if not isinstance(root, Wrapper):
            raise NotImplementedError(
                "spiral's compiler has no branches or loops on spiral in a graph on another device"
            )
        self.fused, self.fused_origins = root.fused, root.fused_origins
        self.programs, self.sites, self.graphs = root.programs, root.sites, root.graphs

    def write_direct(self, cutter: _Cutter) -> None:
        pass


class _Cutter:
    """Cuts the body of the wrapper's call() into Graphs and what stays Python."""

    def __init__(self, wrapper: Wrapper, text: str) -> None:
        import textwrap

        self.wrapper = wrapper
        self.statements: list[ast.stmt] = []
        body = ast.parse("def call():\n" + textwrap.indent(textwrap.dedent(text), "    ")).body[0]
        assert isinstance(body, ast.FunctionDef)
        for s in body.body:
            if isinstance(s, ast.With) and "profiler" not in ast.unparse(s.items[0]):
                self.statements += s.body
            else:
                self.statements.append(s)
        self.outer: set[str] = (
            set(V.graph.graph_input_names) | set(V.graph.constants) | set(map(str, V.graph.graph_inputs))
        )
        self.out: list[str] = []
        self.calls: list[
            tuple[list[str], list[str], list[str], list[str]]
        ] = []  # per graph: what it reads, writes, its sizes, its results
        self.steps: list[Step] = []
        self.base: dict[str, tuple[str, str]] = {}  # views and aliases: what they are of, how they are made

    def cut(self) -> list[str]:
        self._prologues()
        self._epilogues()
        self._added_casts()
        self._combinations()
        index = 0
        while index < len(self.statements):
            stretch: list[ast.stmt] = []
            inside: set[str] = set()
            while index < len(self.statements) and self._fits(self.statements[index], inside):
                stretch.append(self.statements[index])
                inside |= set(_stored(self.statements[index]))
                index += 1
            if stretch:
                self._graph(stretch, self.statements[index:])
            if index < len(self.statements):
                self._keep(self.statements[index])
                index += 1
        return self.out

    def direct(self) -> str | None:
        """Arguments of Graph.direct, where the function is one graph on its arguments; else None."""
        if len(self.calls) != 1:
            return None
        read, write, sizes, roots = self.calls[0]
        if any(map(_on_host, read)):
            return None
        inputs = V.graph.graph_inputs
        arguments = [
            str(inputs[name]) if inputs[name] is not None and SIZE.match(str(inputs[name])) else name
            for name in V.graph.graph_input_names
        ]
        values: dict[str, tuple[Any, ...]] = {
            name: ("argument", at, (), (), 0) for at, name in enumerate(arguments)
        }  # as Graph.direct says
        for s in ast.parse("def call():\n" + "\n".join(f"    {line}" for line in self.out)).body[0].body:  # type: ignore[attr-defined]
            found = _call(getattr(s, "value", None))
            if isinstance(s, ast.Delete) or (found and found[0] == "call_0"):
                values.update({name: ("returned", at, (), (), 0) for at, name in enumerate(roots)} if found else {})
            elif isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name):
                name = s.targets[0].id
                if isinstance(s.value, ast.Name) and s.value.id in values:
                    values[name] = values[s.value.id]
                elif found and found[0] == "reinterpret_tensor" and all(map(_literal, found[1].args[1:])):
                    base = values.get(ast.unparse(found[1].args[0]), ("",))
                    if base[0] != "returned":
                        return None
                    values[name] = ("view", base[1], *(ast.literal_eval(a) for a in found[1].args[1:]))
                else:
                    return None
            elif isinstance(s, ast.Return) and isinstance(s.value, ast.Tuple):
                outputs = []
                for e in s.value.elts:
                    if isinstance(e, ast.Constant) and e.value is None:
                        outputs.append(("none", 0, (), (), 0))
                        continue
                    found = _call(e)
                    if found and found[0] == "reinterpret_tensor" and all(map(_literal, found[1].args[1:])):
                        base = values.get(ast.unparse(found[1].args[0]), ("",))
                        if base[0] != "returned":
                            return None
                        outputs.append(("view", base[1], *(ast.literal_eval(a) for a in found[1].args[1:])))
                    elif isinstance(e, ast.Name) and e.id in values:
                        outputs.append(values[e.id])
                    else:
                        return None
                if not outputs or not all(name in arguments for name in [*read, *write, *sizes]):
                    return None
                places = [[arguments.index(name) for name in part] for part in (read, write, sizes)]
                return f"{len(arguments)}, {places[0]}, {places[1]}, {places[2]}, {outputs}"
            else:
                return None
        return None

    @property
    def _block(self) -> bool:
        return Target.of(self.wrapper.device_index).schedule_class == "block"

    # ---- prologues ------------------------------------------------------------------------------------------------------

    def _prologues(self) -> None:
        """Pointwise kernels that only cast or scale an operand of matrix products become part of the products' kernels."""
        for index, s in enumerate(self.statements):
            found = _call(getattr(s, "value", None))
            if found is not None and found[0] in self.wrapper.programs:
                matched = prologue.match(self.wrapper.programs[found[0]])
                if matched:
                    self._prologue(index, matched, found[1].args[0].elts)  # type: ignore[attr-defined]

    def _prologue(self, index: int, stores: list[prologue.Prologue], buffers: list[ast.expr]) -> None:
        """Lets products read what the kernel at `index` reads, if all that read its results are products that can."""
        targets: dict[str, prologue.Prologue] = {}
        for p in stores:
            target = buffers[p.target]
            if not isinstance(target, ast.Name) or _shape(target) is None or target.id in self.outer:
                return
            targets[target.id] = p
        for s in self.statements[:index]:  # a part of something larger, as of a concatenation, is read by another name
            if targets.keys() & set(_stored(s)) and (_call(getattr(s, "value", None)) or [""])[0] != "empty":
                return
        read = {i: buffers[i] for p in stores for i in (p.source, *(f.buffer for f in p.factors))}
        kept = set(map(_root, read.values()))  # must hold what they hold until the last product
        for _ in range(2):  # under all names of their memory
            for s in self.statements[:index]:
                found = _call(getattr(s, "value", None))
                view = isinstance(s, ast.Assign) and (found is None or found[0] == "reinterpret_tensor")
                if view and kept & {*_stored(s), *_loaded(s)}:
                    kept |= {*_stored(s), *_loaded(s)}
        changes: list[tuple[ast.Call, list[tuple[int, ast.expr]], list[str]]] = []
        last, written = index, False
        for at in range(index + 1, len(self.statements)):
            s = self.statements[at]
            if isinstance(s, ast.Delete):
                continue
            written = written or bool(kept & set(_loaded(s) if _to_function(s) else self._written(s)))
            if isinstance(s, ast.Assign) and isinstance(s.value, (ast.Name, ast.Call)) and kept & set(_loaded(s.value)):
                kept |= set(_stored(s))  # perhaps a view
            if not targets.keys() & set(_loaded(s)):
                continue
            change = None if written else self._prepared(s, targets, read)
            if change is None:
                return
            changes.append(change)
            last = at
        for call, operands, before in changes:
            for i, operand in operands:
                call.args[i] = operand
            if before:
                earlier = next((k for k in call.keywords if k.arg == "before"), None)
                if earlier is None:
                    earlier = ast.keyword("before", ast.Tuple([], ast.Load()))
                    call.keywords.append(earlier)
                earlier.value.elts += [ast.parse(b, mode="eval").body for b in before]  # type: ignore[attr-defined]
        deleted = []
        for s in self.statements[index + 1 : last]:
            if isinstance(s, ast.Delete):
                early = [t for t in s.targets if isinstance(t, ast.Name) and t.id in kept]
                deleted += [t.id for t in early]
                s.targets = [t for t in s.targets if t not in early]
        self._leave_out(index, targets)
        if deleted:
            self.statements.insert(last + 1, ast.Delete([ast.Name(n, ast.Del()) for n in deleted]))

    def _prepared(
        self, s: ast.stmt, targets: dict[str, prologue.Prologue], read: dict[int, ast.expr]
    ) -> tuple[ast.Call, list[tuple[int, ast.expr]], list[str]] | None:
        """(the product or attention that a statement is, its new operands, steps before its bias), where it can do without the kernel that
        wrote the targets."""
        found = _call(getattr(s, "value", None))
        if found is not None and attention.NAME in found[0]:
            return self._in_place(found[1], 4 if "_backward" in found[0] else 3, targets, read)
        if found is not None and found[0] == "extern_kernels.convolution":
            return self._weight_of_convolution(found[1], targets, read)
        if found is None or found[0].removeprefix("extern_kernels.") not in OUT_EXTERNS:
            return None
        if any(targets[n].moved for n in targets.keys() & set(_loaded(s))):
            return None  # columns that products read element by element
        call = found[1]
        first = len(call.args) - 2  # after the bias
        plain = all(k.arg in ("out", "before") or ast.unparse(k.value) == "1" for k in call.keywords)
        if any(targets.keys() & set(_loaded(k.value)) for k in call.keywords):
            return None
        operands: list[tuple[int, ast.expr]] = []
        before: list[str] = []
        if first and _root(call.args[0]) in targets:  # the bias, added in float32
            p, shape, offset = targets[_root(call.args[0])], _shape(call.args[0]), _offset(call.args[0])
            floats = _dtype(read[p.source]) in ("f32", "f16", "bf16")
            if p.factors or p.constant != 1.0 or shape is None or offset is None or not floats:
                return None
            text = f"reinterpret_tensor({ast.unparse(read[p.source])}, {tuple(shape[0])}, {tuple(shape[1])}, {offset})"
            operands.append((0, ast.parse(text, mode="eval").body))
        dtypes = [_dtype(e) for e in call.args[first:]]
        for side in (0, 1):
            e = call.args[first + side]
            if _root(e) not in targets:
                continue
            p, whole, shape, offset = targets[_root(e)], _shape(ast.Name(_root(e))), _shape(e), _offset(e)
            if shape is None or whole is None or offset is None:
                return None
            if p.factors and (offset or math.prod(shape[0]) != math.prod(whole[0])):
                return None
            if not plain and (p.factors or p.constant != 1.0):
                return None
            source = ast.unparse(read[p.source])
            text = f"reinterpret_tensor({source}, {tuple(shape[0])}, {tuple(shape[1])}, {offset})"
            stored, dtypes[side] = dtypes[side], _dtype(read[p.source])
            if (dtypes[side], stored) in prologue.WEIGHTS:
                plain_input = _root(read[p.source]) in V.graph.graph_input_names and not p.factors and p.constant == 1.0
                if side == 0 or not plain_input or dtypes[0] != stored:
                    return None
                text, dtypes[side] = f"kept_weight({text}, {stored!r})", stored
            operands.append((first + side, ast.parse(text, mode="eval").body))
            if p.constant != 1.0:
                before.append(repr(constant_step("mul", p.constant)))
            for factor in p.factors:
                along = p.along(*shape, factor) if p.strides is not None else None
                if along is None or along[-1 if side == 0 else -2] != 0:
                    return None
                three = (0,) * (3 - len(along)) + tuple(along)
                before.append(f"('mul', {ast.unparse(read[factor.buffer])}, {three}, {factor.offset})")
        narrow = [d for d in dtypes if d not in ("f32", "f16", "bf16")]
        if dtypes[0] in narrow or (narrow and self._block) or (self._block and dtypes[0] != dtypes[1]):
            return None
        return call, operands, before

    def _in_place(
        self, call: ast.Call, count: int, targets: dict[str, prologue.Prologue], read: dict[int, ast.expr]
    ) -> tuple[ast.Call, list[tuple[int, ast.expr]], list[str]] | None:
        """As _prepared, for attention with `count` operands: it reads where a copy read. Its results stay laid out as before."""
        if any(targets.keys() & set(_loaded(e)) for e in [*call.args[count:], *(k.value for k in call.keywords)]):
            return None
        if self._attention_plan(count == 4, call) is None:
            return None
        shapes = [s for s in map(_shape, call.args[:count]) if s is not None]
        operands: list[tuple[int, ast.expr]] = []
        for i, (e, shape) in enumerate(zip(call.args, shapes, strict=False)):
            if _root(e) not in targets:
                continue
            p = targets[_root(e)]
            source = read[p.source]
            if p.moved is None or _offset(e) != 0 or _root(source) in self.outer:
                return None
            strides = p.along(*shape, p.moved)
            if strides is None or not attention.reads(shape, (shape[0], strides), p.moved.offset):
                return None
            text = f"reinterpret_tensor({ast.unparse(source)}, {tuple(shape[0])}, {tuple(strides)}, {p.moved.offset})"
            operands.append((i, ast.parse(text, mode="eval").body))
        if not any(k.arg == "strides" for k in call.keywords):
            text = repr(attention.layouts(count == 4, shapes))
            call.keywords.append(ast.keyword("strides", ast.parse(text, mode="eval").body))
        return call, operands, []

    def _weight_of_convolution(
        self, call: ast.Call, targets: dict[str, prologue.Prologue], read: dict[int, ast.expr]
    ) -> tuple[ast.Call, list[tuple[int, ast.expr]], list[str]] | None:
        """As _prepared, for a convolution whose weight or bias autocast converts."""
        transposed = any(k.arg == "transposed" and ast.unparse(k.value) != "False" for k in call.keywords)
        if transposed or _root(call.args[0]) in targets:
            return None
        operands: list[tuple[int, ast.expr]] = []
        for i, e in enumerate(call.args[1:], 1):
            if not targets.keys() & set(_loaded(e)):
                continue
            p, shape = targets[_root(e)], _shape(e)
            pair = _dtype(read[p.source]), _dtype(e)
            if shape is None or _offset(e) != 0 or pair not in prologue.WEIGHTS or not self._only_casts([p], read):
                return None
            text = f"reinterpret_tensor({ast.unparse(read[p.source])}, {tuple(shape[0])}, {tuple(shape[1])}, 0)"
            operands.append((i, ast.parse(text, mode="eval").body))
        return call, operands, []

    @staticmethod
    def _only_casts(stores: Sequence[prologue.Prologue], read: dict[int, ast.expr]) -> bool:
        """Whether inputs of the graph are converted, and nothing else is done to them."""
        return all(
            not p.factors
            and p.constant == 1.0
            and p.moved is None
            and _root(read[p.source]) in V.graph.graph_input_names
            for p in stores
        )

    def _added_casts(self) -> None:
        """Inputs of the graph that products add, as biases of convolutions, are read as they are: they are added in float32."""
        for index, s in enumerate(self.statements):
            found = _call(getattr(s, "value", None))
            stores = (
                prologue.match(self.wrapper.programs[found[0]]) if found and found[0] in self.wrapper.programs else []
            )
            if not stores:
                continue
            assert found is not None
            buffers: list[ast.expr] = found[1].args[0].elts  # type: ignore[attr-defined]
            read = {p.source: buffers[p.source] for p in stores}
            names = {b.id: read[p.source] for p in stores if isinstance(b := buffers[p.target], ast.Name)}
            floats = all(_dtype(e) in ("f32", "f16", "bf16") for e in read.values())
            if (
                len(names) == len(stores)
                and floats
                and self._only_casts(stores, read)
                and not names.keys() & self.outer
            ):
                self._added_cast(index, names)

    def _added_cast(self, index: int, names: dict[str, ast.expr]) -> None:
        """Lets products add what the kernel at `index` converts, where nothing else reads its results. names: its results, and what of."""
        sources = set(map(_root, names.values()))
        steps: list[ast.Tuple] = []
        for at, s in enumerate(self.statements):
            if at == index or isinstance(s, ast.Delete) or not (names.keys() | sources) & {*_loaded(s), *_stored(s)}:
                continue
            found = _call(getattr(s, "value", None))
            if found and found[0] == "empty":
                continue
            read = names.keys() & set(_loaded(s))
            if not read and isinstance(s, ast.Expr) and not sources & set(self._written(s)):
                continue  # another reader of what is converted
            added = [
                e
                for e in (getattr(found[1].args[4], "elts", ()) if found and found[0] == "product" else ())
                if isinstance(e, ast.Tuple) and _literal(e.elts[0]) and ast.literal_eval(e.elts[0]) == "add"
            ]
            here = [e for e in added if isinstance(e.elts[1], ast.Name) and e.elts[1].id in names]
            if not read or len(here) != sum(n in names for n in _loaded(s)) or sources & set(self._written(s)):
                return
            steps += here
        for e in steps:
            e.elts[1] = names[e.elts[1].id]  # type: ignore[attr-defined]
        self._leave_out(index, names)

    def _leave_out(self, index: int, names: Collection[str]) -> None:
        """Drops the kernel at `index` and the buffers that it wrote."""
        done = ast.parse("None").body[0]
        for at, s in enumerate(self.statements):
            if isinstance(s, ast.Delete):
                s.targets = [t for t in s.targets if not (isinstance(t, ast.Name) and t.id in names)]
            if (
                at == index
                or (isinstance(s, ast.Delete) and not s.targets)
                or (isinstance(s, ast.Assign) and set(names) & set(_stored(s)))
            ):
                self.statements[at] = done

    # ---- epilogues ------------------------------------------------------------------------------------------------------

    def _epilogues(self) -> None:
        """Pointwise kernels that only finish a matrix product or a convolution become part of its kernel."""
        for index, s in enumerate(self.statements):
            found = _call(getattr(s, "value", None))
            if found is None or not found[0].startswith("extern_kernels."):
                continue
            kind, call = found[0].removeprefix("extern_kernels."), found[1]
            if kind in OUT_EXTERNS and all(k.arg in ("out", "alpha", "beta", "before") for k in call.keywords):
                out = next(k.value for k in call.keywords if k.arg == "out")
                if isinstance(out, ast.Name):
                    self._epilogue(index, kind, call, out.id)
            elif kind == "convolution" and isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name):
                self._epilogue(index, kind, call, s.targets[0].id)

    def _epilogue(self, index: int, kind: str, call: ast.Call, out: str) -> None:
        """Looks for the epilogue of the product or convolution at `index`, whose result is `out`."""
        convolution = kind == "convolution"
        last = convolution and self._block and _channels_last(out)
        if V.graph.try_get_buffer(out) is None or not (_contiguous(out) or last):
            return
        sizes = V.graph.get_buffer(out).get_size()
        if convolution:
            if any(k.arg == "transposed" and ast.unparse(k.value) != "False" for k in call.keywords):
                return
            sizes = [sizes[0], sizes[1], sympy.Mul(*sizes[2:])]
        sizes = [*[sympy.Integer(1)] * (3 - len(sizes)), *sizes]
        three = [e for e in map(_extent, sizes) if e is not None]
        if len(three) < 3:
            return
        names = {out}  # of the product's memory
        for at in range(index + 1, len(self.statements)):
            s = self.statements[at]
            if isinstance(s, ast.Delete) or isinstance(getattr(s, "value", None), ast.Constant):
                continue
            found = _call(getattr(s, "value", None))
            if isinstance(s, ast.Assign) and (_views(s.value) or (found and found[0] == "empty")):
                if _views(s.value) and _root(s.value) in names:
                    names |= set(_stored(s))
                continue
            if found and self._independent(call, names, found):
                continue
            break
        else:
            return
        if found is None or found[0] not in self.wrapper.programs:
            return
        buffers = [_root(b) for b in found[1].args[0].elts]  # type: ignore[attr-defined]
        reads = [i for i, b in enumerate(buffers) if b in names]
        program = self.wrapper.programs[found[0]]
        written = program.stores[0].buffer if len(program.stores) == 1 else ""
        products = [i for i in reads if program.buffers[i][0] != written]
        if len(products) != 1:
            return
        rest: Program | None = None
        if program.reduced:
            parts = split(program, products[0])
            if parts is None:
                return
            program, rest = parts
        matched = match(program, products[0], [three[i] for i in (0, 2, 1)] if last else three)
        if matched is None:
            return
        target, steps = matched
        if last:
            steps = [s if isinstance(s, str) else s.turned() for s in steps]
        later = {n for s in self.statements[at + 1 :] if not isinstance(s, ast.Delete) for n in _loaded(s)}
        if later & (names - {buffers[target]}):
            return
        text = []
        for step in steps:
            if isinstance(step, Operand):
                if (
                    step.buffer == products[0]
                    or buffers[step.buffer] in names
                    or (convolution and not _of_convolution(step, three, last))
                ):
                    return
                text.append(f"({step.kind!r}, {buffers[step.buffer]}, {step.strides}, {step.offset})")
            else:
                text.append(repr(step))
        if convolution and not self._convolution(out, call):
            return
        options = "".join(f", {k.arg}={ast.unparse(k.value)}" for k in call.keywords if k.arg != "out")
        args = ", ".join(ast.unparse(a) for a in call.args)
        fused = f"product({kind!r}, ({args},), {buffers[target]}, {self.wrapper.codegen_python_shape_tuple(sizes)}, ({''.join(t + ', ' for t in text)}){options})"
        after = [] if rest is None else [self._launch(found[0], rest, found[1])]
        self.statements[at : at + 1] = [ast.parse(fused).body[0], *after]
        self.statements[index] = ast.parse("None").body[0]

    def _independent(self, call: ast.Call, names: set[str], found: tuple[str, ast.Call]) -> bool:
        """Whether what is found is a product that the one before, `call`, whose result has these names, may as well follow."""
        if found[0].removeprefix("extern_kernels.") not in OUT_EXTERNS or names & set(_loaded(found[1])):
            return False
        out = next(k.value for k in found[1].keywords if k.arg == "out")
        if not isinstance(out, ast.Name) or out.id in _loaded(call):
            return False
        made = [s for s in self.statements if out.id in _stored(s)]
        return len(made) == 1 and (_call(getattr(made[0], "value", None)) or [""])[0] == "empty"

    def _launch(self, whole: str, program: Program, call: ast.Call) -> ast.stmt:
        """A launch of what is left of the fused kernel `whole`, instead of this one; program has its buffers."""
        used = {n.attr for s in program.stores for n in ir.walk(s.index, s.value) if n.op == "load"}
        used |= {s.buffer for s in program.stores}
        taken = [i for i, (name, _, _) in enumerate(program.buffers) if name in used]
        program = dataclasses.replace(program, buffers=[program.buffers[i] for i in taken])
        buffers: Any = call.args[0]
        sizes = list(map(ast.unparse, call.args[1:]))
        return self._made(program, (), self.wrapper.fused_origins[whole], [buffers.elts[i] for i in taken], sizes)

    def _made(
        self, program: Program, sites: Sequence[str], origins: str, buffers: Sequence[ast.expr], sizes: Sequence[str]
    ) -> ast.stmt:
        """A launch of a kernel for a program on buffers. sizes: symbols, rows and reduced dimensions, as text."""
        launch = {
            "buffers": [name for name, _, _ in program.buffers],
            "written": [name for name, _, mode in program.buffers if mode != "r"],
        }
        built = build(program, Target.of(self.wrapper.device_index))
        name = self.wrapper.define(f"{built!r}{list(sites)!r}", built, sites, launch, program, lambda: origins)
        listed = "".join(f"{ast.unparse(b)}, " for b in buffers)
        return ast.parse(f"{name}(({listed}), {', '.join(sizes)})").body[0]

    # ---- small kernels side by side ---------------------------------------------------------------------------------------

    def _combinations(self) -> None:
        """Pointwise kernels that have nothing to do with each other become one, where they are small or write inputs of the graph: the writes of keys
        and of values to a cache, an optimizer's step. (Of large ones that make something new, the first had better stay near what reads it.)"""
        bindings = int(_C.device_properties(self.wrapper.device_index)["max_bindings"])
        most = bindings - 1 if self._block else min(bindings - 1, MOST_BUFFERS)  # one is for errors
        names: dict[str, str] = {}  # of views: what they are views of
        for s in self.statements:
            if isinstance(s, ast.Assign) and _views(s.value):
                names |= dict.fromkeys(_stored(s), names.get(_root(s.value), _root(s.value)))

        def used(s: ast.stmt) -> tuple[set[str], set[str]]:
            """The memory that a launch reads or writes, and that it writes."""
            assert isinstance(s, ast.Expr)
            everything = {names.get(n, n) for n in _loaded(s.value)}
            return everything, {names.get(n, n) for n in self._written(s)}

        for index in range(len(self.statements)):
            if not self._part(self.statements[index]):
                continue
            together, (touched, written) = [index], used(self.statements[index])
            buffers = self._buffers(index)
            for at in range(index + 1, len(self.statements)):
                s = self.statements[at]
                found = _call(getattr(s, "value", None))
                if isinstance(s, ast.Delete) or isinstance(getattr(s, "value", None), ast.Constant):
                    continue
                if isinstance(s, ast.Assign) and (_views(s.value) or (found and found[0] == "empty")):
                    continue
                launch = found is not None and (
                    found[0] in self.wrapper.programs
                    or found[0] == "product"
                    or found[0].removeprefix("extern_kernels.") in OUT_EXTERNS
                )
                if not launch:
                    break
                all_of, writes = used(s)
                if writes & touched or written & all_of:
                    break
                more = buffers | self._buffers(at)
                if self._part(s) and self._alike(index, at) and len(more) <= most:
                    together.append(at)
                    touched, written, buffers = touched | all_of, written | writes, more
            if len(together) > 1:
                self._combine(together)

    def _part(self, s: ast.stmt) -> bool:
        """Whether a statement launches a pointwise kernel of known sizes that may be part of another: its time is mostly that of a launch, or all
        that it writes are inputs of the graph."""
        found = _call(s.value) if isinstance(s, ast.Expr) else None
        program = self.wrapper.programs.get(found[0]) if found else None
        if program is None or program.reduced or program.scalars or program.windows or program.parts:
            return False
        sizes = [n.attr for n in program.rows if n.op == "const"]
        nodes = ir.walk(*(n for s in program.stores for n in (s.index, s.value)))
        return (
            len(sizes) == len(program.rows)
            and (math.prod(sizes) <= SMALL or set(self._written(s)) <= set(V.graph.graph_input_names))
            and len(nodes) <= 200
            and all(s.mode is None for s in program.stores)
        )

    def _buffers(self, at: int) -> set[str]:
        found = _call(getattr(self.statements[at], "value", None))
        return {ast.unparse(e) for e in found[1].args[0].elts} if found and found[0] in self.wrapper.programs else set()  # type: ignore[attr-defined]

    def _alike(self, a: int, b: int) -> bool:
        """Whether the kernels that two statements launch report the same of indices."""
        calls = [_call(self.statements[i].value) for i in (a, b)]  # type: ignore[attr-defined]
        one, other = (self.wrapper.sites[c[0]] for c in calls if c)
        return one == other

    def _combine(self, together: Sequence[int]) -> None:
        """One kernel, in the place of the last of these launches."""
        places: dict[str, tuple[str, str, str]] = {}  # buffers as written in the launches
        listed: list[ast.expr] = []
        parts, origins = [], []
        for at in together:
            found = _call(self.statements[at].value)  # type: ignore[attr-defined]
            assert found is not None
            name, call = found
            part, names = self.wrapper.programs[name], {}
            for (inner, dtype, mode), e in zip(part.buffers, call.args[0].elts, strict=True):  # type: ignore[attr-defined]
                text = ast.unparse(e)
                if text not in places:
                    places[text] = (f"b{len(places)}", dtype, mode)
                    listed.append(e)
                names[inner] = places[text][0]
            parts.append(with_buffers(part, names))
            origins.append(self.wrapper.fused_origins[name])
        buffers, sites = list(places.values()), self.wrapper.sites[name]
        program = Program("fused", buffers, [], [], [], [], sites=len(sites), parts=tuple(parts))
        text = "\n".join(dict.fromkeys(origins))
        for at in together[:-1]:
            self.statements[at] = ast.parse("None").body[0]
        self.statements[together[-1]] = self._made(program, sites, text, listed, ["()"] * 3)

    # ---- what a graph may hold ----------------------------------------------------------------------------------------

    def _fits(self, s: ast.stmt, inside: set[str]) -> bool:
        if isinstance(s, ast.Delete):
            return True
        if isinstance(s, ast.Expr):
            if isinstance(s.value, ast.Constant):
                return True
            found = _call(s.value)
            if found is None:
                return False
            name, node = found
            if name in self.wrapper.fused or name == "product":
                return True
            if name in ("assert_size_stride", "assert_alignment"):
                return bool(node.args) and isinstance(node.args[0], ast.Name) and node.args[0].id in inside
            function = name.removeprefix("extern_kernels.")
            return function in OUT_EXTERNS and name != function
        if isinstance(s, ast.Assign) and len(s.targets) == 1 and isinstance(s.targets[0], ast.Name):
            if isinstance(s.value, ast.Subscript):
                return isinstance(s.value.value, ast.Name) and s.value.value.id in inside
            if isinstance(s.value, ast.Name):
                known = s.value.id in inside or V.graph.try_get_buffer(s.value.id) is not None
                return known and not SIZE.match(s.targets[0].id)
            found = _call(s.value)
            if found is None:
                return False
            name, node = found
            if name.startswith(("aten(", "attention")):
                return True
            if name == "empty":
                return True
            if name == "reinterpret_tensor":
                return True
            if name == "extern_kernels.convolution":
                return self._convolution(s.targets[0].id, node)
            return self._operator(name, node)
        return False

    def _operator(self, name: str, node: ast.Call) -> bool:
        """Whether a call of torch.ops.aten is to an operator that a lowering defines, on arguments that it takes."""
        dotted = re.fullmatch(r"(?:torch\.ops\.)?aten\.(\w+)\.(\w+)", name)
        if dotted is None:
            return False
        if dotted[1] in (attention.NAME, attention.NAME + "_backward"):
            return self._attention(dotted[1] != attention.NAME, node)
        full = dotted[1] if dotted[2] == "default" else f"{dotted[1]}.{dotted[2]}"
        if low.registered.get(full) != "lowering" or full in low.exact_arguments:
            return False
        schema = getattr(getattr(torch.ops.aten, dotted[1]), dotted[2])._schema
        if any(a.alias_info for a in schema.arguments) or len(_tensors(schema)) != len(schema.returns):
            return False
        for a in [*node.args, *(k.value for k in node.keywords)]:
            for n in ast.walk(a):
                if isinstance(n, ast.Call) and ast.unparse(n.func) != "reinterpret_tensor":
                    return False
        node.func = ast.parse(f"aten({full!r})", mode="eval").body
        return True

    def _convolution(self, name: str, node: ast.Call) -> bool:
        """Kernels are built for filter taps, which must be known: they become an argument, as does the layout of the result."""
        weight = node.args[1] if len(node.args) > 1 else None
        if isinstance(weight, ast.Call):
            sizes: Any = ast.literal_eval(weight.args[1]) if _literal(weight.args[1]) else None
        else:
            sizes = _sizes(weight.id) if isinstance(weight, ast.Name) else None
        if sizes is None:
            return False
        if not any(k.arg == "taps" for k in node.keywords):
            layout = V.graph.get_buffer(name).get_layout()
            shape, strides = (self.wrapper.codegen_python_shape_tuple(x) for x in (layout.size, layout.stride))
            for argument, text in (("taps", repr(list(sizes[2:]))), ("sizes", shape), ("strides", strides)):
                node.keywords.append(ast.keyword(argument, ast.parse(text, mode="eval").body))
        return True

    def _attention_plan(self, backward: bool, node: ast.Call) -> dict[str, Any] | None:
        """attention.plan of a call; with the strides of results that _in_place keeps."""
        operands = node.args[: 4 if backward else 3]
        dtypes = [dtype_name(V.graph.get_dtype(_root(a))) for a in operands]
        bias = attention.bias_of(backward, node)
        plan = attention.plan(
            backward, node, list(map(_shape, operands)), dtypes, None if bias is None else _shape(bias)
        )
        kept = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg == "strides"}
        return None if plan is None else plan | kept

    def _attention(self, backward: bool, node: ast.Call) -> bool:
        keywords = self._attention_plan(backward, node)
        if keywords is None:
            return False
        node.func = ast.Name("attention_backward" if backward else "attention", ast.Load())
        node.keywords = [k for k in node.keywords if k.arg == "attn_bias"] + [
            ast.keyword(k, ast.parse(repr(v), mode="eval").body) for k, v in keywords.items()
        ]
        return True

    # ---- one graph ------------------------------------------------------------------------------------------------------

    def _written(self, s: ast.stmt) -> list[str]:
        """Names that a statement writes through."""
        value = s.value if isinstance(s, (ast.Expr, ast.Assign)) else None
        found = _call(value)
        if found is None:
            return []
        name, node = found
        if name in self.wrapper.fused:
            buffers = node.args[0]
            assert isinstance(buffers, ast.Tuple)
            return [_root(buffers.elts[i]) for i in self.wrapper.fused[name][1]]
        if name == "product":
            return [_root(node.args[2])]
        return [_root(k.value) for k in node.keywords if k.arg == "out"]

    def _resolve(self, name: str) -> str:
        while name in self.base:
            name = self.base[name][0]
        return name

    def _graph(self, stretch: list[ast.stmt], rest: list[ast.stmt]) -> None:
        body: list[str] = []
        inside: set[str] = set()
        uses: dict[str, None] = {}
        written: set[str] = set()
        sizes: dict[str, None] = {}
        deleted: list[str] = []
        for s in stretch:
            if isinstance(s, ast.Delete):
                deleted += [t.id for t in s.targets if isinstance(t, ast.Name)]
                continue
            found = _call(getattr(s, "value", None))
            if (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) or (
                found and found[0].startswith("assert_")
            ):
                continue
            for name in _loaded(s):
                if SIZE.match(name):
                    sizes[name] = None
                elif name not in inside and name in self.outer:
                    uses[name] = None
            for name in self._written(s):
                written.add(self._resolve(name))
            for target in _stored(s):
                inside.add(target)
                view = found is not None and found[0] == "reinterpret_tensor"
                if isinstance(s, ast.Assign) and (isinstance(s.value, ast.Name) or view):
                    self.base[target] = (_root(s.value), ast.unparse(s))
            self._step(s, found)
            body.append(ast.unparse(s))
        if not body:
            self._forget(deleted, set())
            return
        later = {name for s in rest for name in _loaded(s)}
        live = [n for n in inside if n in later]
        roots: dict[str, None] = {}
        made: list[str] = []

        def expose(name: str) -> None:
            """Makes an inside name exist outside: the buffer that it is a view of leaves the graph."""
            if name in self.base:
                origin, text = self.base[name]
                if origin in inside:
                    expose(origin)
                if text not in made:
                    made.append(text)
            else:
                roots[name] = None

        for n in sorted(live, key=_natural):
            expose(n)
        read = [n for n in uses if self._resolve(n) not in written and n not in written]
        write = [n for n in uses if n not in read]
        number = len(self.wrapper.graphs)
        lines = [f"def graph_{number}(inputs, written, sizes):"]
        if read:
            lines.append(f"    ({', '.join(read)},) = inputs")
        if write:
            lines.append(f"    ({', '.join(write)},) = written")
        if sizes:
            lines.append(f"    ({', '.join(sizes)},) = sizes")
        text = [
            re.sub(
                r"\b(?<!\.)(empty|reinterpret_tensor|extern_kernels|kept_weight|max|min|product|aten|attention|attention_backward)\b(?=[(.])",
                r'spiral.GLOBALS["\1"]',
                line,
            )
            for line in body
        ]
        lines += [f"    {line}" for line in text]
        lines.append(f"    return ({''.join(f'{r}, ' for r in roots)})")
        digest = hashlib.sha256(
            "\n".join([*lines[1:], *(self.wrapper.fused[n][0] for n in self._kernels(stretch))]).encode()
        )
        self.wrapper.graphs.append("\n".join(lines))
        for line in lines:
            self.wrapper.header.writeline(line)
        self.wrapper.header.writeline("")
        counts = (len(read), len(write), len(sizes))
        self.wrapper.header.writeline(
            f'graph_{number} = spiral.Graph("graph_{digest.hexdigest()[:24]}", graph_{number}, {counts}, {self.wrapper.device_index})'
        )
        self.wrapper.header.writeline(f"call_{number} = graph_{number}.call")
        self.wrapper.header.writeline("")
        there = [f"{n}.to('spiral:{self.wrapper.device_index}')" if _on_host(n) else n for n in read]
        call = f"call_{number}({', '.join([*there, *write, *sizes])})"
        self.out.append(f"({', '.join(roots)},) = {call}" if roots else call)
        self.calls.append((read, write, list(sizes), list(roots)))
        self.out += made
        self.outer |= set(roots) | set(live)
        self._forget(deleted, later)

    def _step(self, s: ast.stmt, found: tuple[str, ast.Call] | None, host: bool = False) -> None:
        """Notes what a statement computes, for explain()."""
        if found is None or found[0] in ("empty", "reinterpret_tensor", "args.clear"):
            return
        name, node = found
        kernel = self.wrapper.fused[name][0] if name in self.wrapper.fused else ""
        title = (
            "fused"
            if kernel
            else name.replace("extern_kernels.", "").replace("torch.ops.", "").removesuffix(".default")
        )
        if name == "product":
            steps = [
                ast.unparse(x.elts[0] if isinstance(x, ast.Tuple) else x).strip("'")
                for x in getattr(node.args[4], "elts", [])
            ]
            title = " + ".join([ast.literal_eval(node.args[0]), *steps])
        elif name.startswith("aten("):
            title = name[6:-2]
        writes = tuple(dict.fromkeys(map(self._resolve, [*self._written(s), *_stored(s)])))
        reads = dict.fromkeys(
            self._resolve(n)
            for n in _loaded(node)
            if n not in self.wrapper.fused and n not in ("extern_kernels", "torch", "aten")
        )
        self.steps.append(
            Step(f"host: {title}" if host else title, writes, tuple(r for r in reads if r not in writes), kernel)
        )

    def _kernels(self, stretch: list[ast.stmt]) -> list[str]:
        return [n for s in stretch for n in _loaded(s) if n in self.wrapper.fused]

    def _forget(self, names: list[str], later: set[str]) -> None:
        """Deletions, of what exists outside the graphs."""
        for n in names:
            if n in self.outer and n not in V.graph.constants:
                self.out.append(f"del {n}")
                self.outer.discard(n)

    def _keep(self, s: ast.stmt) -> None:
        self.outer |= set(_stored(s))
        found = _call(getattr(s, "value", None))
        if isinstance(s, ast.Delete):
            self._forget([t.id for t in s.targets if isinstance(t, ast.Name)], set())
            return
        self._step(s, found, host=True)
        self.out += ast.unparse(s).split("\n")


def _of_convolution(operand: Operand, shape: Sequence[Extent], last: bool) -> bool:
    """Whether the kernels of convolutions take an operand: one value a channel, or laid out as the result. last: channels-last."""
    _, channels, pixels = (e.number for e in shape)
    dense = (channels * pixels, 1, channels) if last else (channels * pixels, pixels, 1)
    strides = [None if e == Extent(1) else s for s, e in zip(operand.strides, shape, strict=True)]
    return operand.offset == 0 and any(
        all(s in (None, wanted) for s, wanted in zip(strides, layout, strict=True)) for layout in ((0, 1, 0), dense)
    )


def _to_function(s: ast.stmt) -> bool:
    """Whether a statement hands what it reads to the function of a branch or a loop, which may write it: by a list of arguments, the
    state of a loop, or the call itself, in the statement `if` or `while`."""
    return not isinstance(s, (ast.Assign, ast.Expr)) or (
        isinstance(s, ast.Assign) and (isinstance(s.value, ast.List) or not isinstance(s.targets[0], ast.Name))
    )


def _views(e: ast.AST) -> bool:
    """Whether an expression is a tensor that exists, or a view of it."""
    found = _call(e)
    return isinstance(e, ast.Name) or (found is not None and found[0] == "reinterpret_tensor")


def _root(e: ast.AST) -> str:
    """The name of the tensor in `x` or `reinterpret_tensor(x, …)`."""
    if isinstance(e, ast.Name):
        return e.id
    assert isinstance(e, ast.Call), ast.dump(e)
    return _root(e.args[0])


def _dtype(e: ast.expr) -> str:
    """The dtype of an operand of a product."""
    found = _call(e)
    return (
        ast.literal_eval(found[1].args[1])
        if found and found[0] == "kept_weight"
        else dtype_name(V.graph.get_dtype(_root(e)))
    )


def _offset(e: ast.expr) -> int | None:
    """Where `x` or `reinterpret_tensor(x, …)` begins in x, where that is a number and x a name."""
    if isinstance(e, ast.Name):
        return 0
    if not isinstance(e, ast.Call) or not isinstance(e.args[0], ast.Name) or not all(map(_literal, e.args[1:])):
        return None
    return ast.literal_eval(e.args[3]) if len(e.args) > 3 else 0


def _tensors(schema: Any) -> list[Any]:
    return [r for r in schema.returns if str(r.type) == "Tensor"]


def _contiguous(name: str) -> bool:
    buffer = V.graph.try_get_buffer(name)
    layout = getattr(buffer, "layout", None)
    return layout is not None and layout.is_contiguous() and layout.offset == 0


def _channels_last(name: str) -> bool:
    layout = getattr(V.graph.try_get_buffer(name), "layout", None)
    if layout is None or len(layout.size) != 4:
        return False
    _, c, h, w = layout.size
    wanted = (c * h * w, 1, w * c, c)
    return layout.offset == 0 and all(
        n == 1 or s == t for n, s, t in zip(layout.size, layout.stride, wanted, strict=True)
    )


def _literal(e: ast.AST) -> bool:
    try:
        ast.literal_eval(e)
    except ValueError:
        return False
    return True


def _extent(size: sympy.Expr) -> Extent | None:
    """A size of a buffer; None for one that is more than a product."""
    number, rest = sympy.sympify(size).as_coeff_Mul()
    symbols = [] if rest == 1 else rest.as_ordered_factors()
    return Extent(int(number), tuple(sorted(map(str, symbols)))) if all(s.is_Symbol for s in symbols) else None


def _sizes(name: str) -> list[int] | None:
    """The sizes of a buffer or an input of the graph, where they are numbers."""
    buffer = V.graph.try_get_buffer(name)
    if buffer is None:
        return None
    sizes = buffer.get_size()
    return [int(s) for s in sizes] if all(getattr(s, "is_Integer", isinstance(s, int)) for s in sizes) else None


def _shape(e: ast.AST) -> tuple[list[int], list[int]] | None:
    """Sizes and strides of an argument, where they are numbers."""
    if isinstance(e, ast.Call):
        return tuple(map(list, (ast.literal_eval(a) for a in e.args[1:3]))) if all(map(_literal, e.args[1:3])) else None  # type: ignore[return-value]
    sizes = _sizes(e.id) if isinstance(e, ast.Name) else None
    buffer: Any = V.graph.try_get_buffer(e.id) if isinstance(e, ast.Name) else None
    layout = buffer.get_layout() if sizes is not None else None
    if layout is None or not all(getattr(s, "is_Integer", isinstance(s, int)) for s in layout.stride):
        return None
    return sizes, [int(s) for s in layout.stride]  # type: ignore[return-value]


def _on_host(name: str) -> bool:
    """Whether a kernel reads a number that lies on the CPU, as an optimizer's count of steps does."""
    buffer = V.graph.try_get_buffer(name)
    device = None if buffer is None else buffer.get_device()
    return device is not None and device.type == "cpu"


def _natural(name: str) -> tuple[str, int]:
    digits = re.search(r"\d+", name)
    return (name.rstrip("0123456789"), int(digits.group()) if digits else 0)


__all__ = ["Wrapper", "low"]
