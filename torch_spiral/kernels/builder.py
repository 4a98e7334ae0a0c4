"""KernelBuilder: a kernel as statements, one description for every language.

    k = KernelBuilder(target, "axpy_f16")
    x = k.buffer("x", "f16")
    y = k.buffer("y", "f16", "rw")
    n, a = k.scalar("n", "u32"), k.scalar("a", "f32")
    i = k.global_id(workgroup=64)
    with k.If(i < n):
        y[i] = a * x[i] + y[i]
    kernel = k.finish(workgroup=(64, 1, 1))   # launch with cdiv(n, 64) workgroups

Loads and reads of variables happen where they stand in the program; pure expressions are computed where they are first
used, once per scope. Expressions are those of ir.py. An index is i32 or u32 (i64 too, on OpenCL with wide=True).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from . import ir
from .emit import BufferDecl, Emitter, ScalarDecl, header, language
from .ir import Complex, Node, Operators
from .kernel import COMPUTE, DTYPES, Kernel, Target, Unsupported, compute_dtype

# Words of WGSL and OpenCL C that someone may well call a buffer.
RESERVED = frozenset(
    [
        "as",
        "async",
        "await",
        "auto",
        "become",
        "case",
        "char",
        "class",
        "const",
        "constexpr",
        "continue",
        "default",
        "delete",
        "demote",
        "do",
        "double",
        "enum",
        "export",
        "extends",
        "extern",
        "filter",
        "final",
        "float",
        "for",
        "from",
        "get",
        "goto",
        "global",
        "half",
        "handle",
        "if",
        "impl",
        "implements",
        "import",
        "inline",
        "instanceof",
        "int",
        "interface",
        "is",
        "kernel",
        "layout",
        "let",
        "local",
        "long",
        "loop",
        "macro",
        "match",
        "meta",
        "mod",
        "module",
        "move",
        "mut",
        "namespace",
        "new",
        "nil",
        "null",
        "of",
        "operator",
        "override",
        "package",
        "packed",
        "pass",
        "patch",
        "pixelfragment",
        "precise",
        "precision",
        "premerge",
        "priv",
        "private",
        "protected",
        "pub",
        "public",
        "read",
        "ref",
        "regardless",
        "register",
        "reinterpret_cast",
        "require",
        "resource",
        "restrict",
        "return",
        "self",
        "set",
        "shared",
        "short",
        "signed",
        "sizeof",
        "smooth",
        "snorm",
        "static",
        "std",
        "struct",
        "subroutine",
        "super",
        "switch",
        "target",
        "template",
        "this",
        "throw",
        "trait",
        "true",
        "try",
        "type",
        "typedef",
        "typename",
        "union",
        "unless",
        "unorm",
        "unsafe",
        "unsigned",
        "use",
        "using",
        "var",
        "virtual",
        "void",
        "volatile",
        "while",
        "with",
        "write",
        "yield",
    ]
)


def _safe(name: str) -> str:
    return f"{name}_" if name in RESERVED else name


STREAM_ELEMENTS = 1 << 22  # outputs of 16 MB of float32 leave no room for anything else in the cache of a laptop's CPU


class Var(Operators):
    """A mutable variable; in an expression, its value at that point of the program. Made by KernelBuilder.var."""

    def __init__(self, k: KernelBuilder, name: str, dtype: str, lanes: int) -> None:
        self._k, self.name, self.dtype, self.lanes = k, name, dtype, lanes
        self._read: tuple[Any, Node] | None = None

    def as_node(self) -> Node:
        scope = self._k.emitter.scopes[-1]
        if self._read is None or self._read[0] is not scope:
            self._read = (scope, self._k.emitter.tmp(self.dtype, self.name, self.lanes))
        return self._read[1]

    value = property(as_node)

    def set(self, value: Any) -> None:
        """Assigns; the value is cast to the variable's dtype."""
        self._k.assign(self.name, ir.cast(ir.as_node(value, self.dtype), self.dtype), self.lanes)
        self._read = None

    def to(self, dtype: str) -> Node:
        return self.as_node().to(dtype)


class ComplexVar(Complex):
    """A mutable complex variable."""

    __slots__ = ("_vars",)

    def __init__(self, re: Var, im: Var) -> None:
        self._vars = (re, im)

    re = property(lambda self: self._vars[0].as_node())
    im = property(lambda self: self._vars[1].as_node())

    def set(self, value: Any) -> None:
        value = value if isinstance(value, Complex) else Complex(ir.as_node(value, self.dtype), ir.const(0, self.dtype))
        re, im = self._vars[0]._k.let(value.re), self._vars[0]._k.let(value.im)
        self._vars[0].set(re)
        self._vars[1].set(im)


class Buffer:
    """A buffer argument: x[i] loads the compute dtype (Complex for pairs), x[i] = v converts and stores."""

    def __init__(self, k: KernelBuilder, decl: BufferDecl) -> None:
        self._k, self.decl = k, decl
        self.name, self.dtype = decl.name, decl.dtype
        self.compute = compute_dtype(decl.dtype)

    def __getitem__(self, index: Any) -> Any:
        return self.load(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.store(index, value)

    def load(self, index: Any, mask: Any = None, other: Any = 0) -> Any:
        """The element at index; where `mask` is false nothing is read and the value is `other`."""
        k, e = self._k, self._k.emitter
        index = k.index(index)
        if mask is not None:
            if index.lanes > 1:
                raise ValueError("masked loads are scalar")
            pair = DTYPES[self.dtype].is_pair
            parts = [k.var(self.compute, x) for x in ([other, 0] if pair else [other])]
            with k.If(mask):
                v = self.load(index)
                for p, x in zip(parts, (v.re, v.im) if pair else (v,), strict=False):
                    p.set(x)
            return Complex(*(p.as_node() for p in parts)) if pair else parts[0].as_node()
        key = (self.name, index)
        got = k.find_load(key)
        if got is None:
            stride = lane_stride(index)
            if stride == 0 or stride == 1:
                nodes = k.lang.load(e, self.decl, k.index_text(first_lane(index)), index.lanes if stride else 1)
            else:
                nodes = k.lang.gather(e, self.decl, index)
            got = Complex(nodes[0], nodes[1]) if len(nodes) == 2 else nodes[0]
            k.keep_load(key, got)
        return got

    def prefetch(self, index: Any) -> None:
        """Asks for the cache line of an element that is read soon. OpenCL on CPU devices; the index may be out of
        range."""
        k = self._k
        k.lang.prefetch(k.emitter, self.decl, k.index_text(first_lane(k.index(index))))  # type: ignore[attr-defined]

    def store(self, index: Any, value: Any, mask: Any = None) -> None:
        """Stores value, cast to the buffer's dtype; only where `mask`, if given."""
        k = self._k
        if mask is not None:
            with k.If(mask):
                self.store(index, value)
            return
        index = k.index(index)
        values = self._convert(value)
        stride = lane_stride(index)
        lanes = index.lanes
        if stride == 0:
            if any(v.lanes > 1 for v in values):
                raise ValueError(f"{self.name}: lanes stored to one element")
            lanes = 1
        if stride in (0, 1):
            k.lang.store(k.emitter, self.decl, k.index_text(first_lane(index)), values, lanes)
        else:
            k.lang.scatter(k.emitter, self.decl, index, values)
        k.forget_loads()

    def load4(self, index: Any) -> list[Node]:
        """The four elements from index on in one access, where misaligned(index) is 0. Declared with `four`."""
        k = self._k
        return k.lang.load4(k.emitter, self.decl, k.index_text(k.index(index)))

    def store4(self, index: Any, values: list[Any]) -> None:
        """Stores four values, cast to the buffer's dtype, as load4 loads them."""
        k = self._k
        nodes = [node for v in values for node in self._convert(v)]
        k.lang.store4(k.emitter, self.decl, k.index_text(k.index(index)), nodes)
        k.forget_loads()

    def misaligned(self, index: Any = 0) -> Node:
        """The place of an element in its group of four that load4 and store4 access, 0 to 3 (u32)."""
        k = self._k
        return k.emitter.tmp("u32", k.lang.misaligned(self.decl, k.index_text(k.index(index))))

    def _convert(self, value: Any) -> list[Node]:
        if DTYPES[self.dtype].is_pair:
            if not isinstance(value, Complex):
                value = Complex(ir.cast(ir.as_node(value, self.compute), self.compute), ir.const(0, self.compute))
            return [ir.cast(value.re, self.compute), ir.cast(value.im, self.compute)]
        if isinstance(value, Complex):
            return [ir.cast(value, self.compute)]
        return [ir.cast(ir.as_node(value, self.compute), self.compute)]

    # ---- atomics (mode "a") --------------------------------------------------------------------------------------

    def atomic_add(self, index: Any, value: Any) -> Any:
        """Adds, any dtype (bool: or). i32 and u32 give the old value, others None."""
        return self._atomic("add", index, value)

    def atomic_min(self, index: Any, value: Any) -> Any:
        """Keeps the smaller, NaN winning. i32 and u32 give the old value, others None."""
        return self._atomic("min", index, value)

    def atomic_max(self, index: Any, value: Any) -> Any:
        """Keeps the larger, NaN winning."""
        return self._atomic("max", index, value)

    def _atomic(self, op: str, index: Any, value: Any) -> Any:
        k = self._k
        index = k.index(index)
        if index.lanes > 1:
            raise ValueError("atomics are scalar")
        values = self._convert(value)
        k.forget_loads()
        return k.atomics.apply(self, op, index, values)


class Shared:
    """An array in workgroup memory, of a compute dtype; its contents start undefined. bool is kept as u32: drivers have
    been seen to lose neighbours' stores to arrays of bool. An index with lanes (OpenCL) means consecutive elements."""

    def __init__(self, k: KernelBuilder, name: str, dtype: str, size: int) -> None:
        self._k, self.name, self.size = k, name, size
        self.dtype, self.boolean = ("u32", True) if dtype == "bool" else (dtype, False)

    def __getitem__(self, index: Any) -> Node:
        index = self._k.index(index)
        text = (
            f"vload{index.lanes}(0, {self.name} + {self._text(index)})"
            if index.lanes > 1
            else f"{self.name}[{self._text(index)}]"
        )
        value = self._k.emitter.tmp(self.dtype, text, index.lanes)
        return ir.ne(value, 0) if self.boolean else value

    def __setitem__(self, index: Any, value: Any) -> None:
        index = self._k.index(index)
        v = self._k.emitter.value(ir.cast(ir.as_node(value, self.dtype), self.dtype), index.lanes)
        place = self._text(index)
        self._k.emitter.line(
            f"vstore{index.lanes}({v}, 0, {self.name} + {place});"
            if index.lanes > 1
            else f"{self.name}[{place}] = {v};"
        )

    def _text(self, index: Node) -> str:
        return self._k.emitter.value(first_lane(index))


class KernelBuilder:
    """Builds one kernel. wide: indices may be 64-bit (OpenCL), for buffers of 2**31 elements and more."""

    def __new__(cls, target: Target, *args: Any, **kwargs: Any) -> KernelBuilder:
        if target.language == "triton":
            from .triton import TritonBuilder

            cls = TritonBuilder
        return object.__new__(cls)

    def __init__(self, target: Target, name: str, wide: bool = False) -> None:
        self.target, self.name, self.wide = target, name, wide
        self.lang = language(target)
        self.emitter = Emitter(self.lang, target)
        self.buffers: list[BufferDecl] = []
        self.scalars: list[ScalarDecl] = []
        self._shared: list[Shared] = []
        self._loads: list[tuple[Any, dict]] = []
        self.errors = False
        self.subgroups = False
        self._else: tuple[int, int] | None = None
        self._workgroup: tuple[int, int, int] | None = None
        from .atomics import Atomics

        self.atomics = Atomics(self)

    # ---- arguments ----------------------------------------------------------------------------------------------

    def buffer(self, name: str, dtype: str, mode: str = "r", windows: int = 1, four: bool = False) -> Buffer:
        """The next buffer argument. dtype: storage dtype. mode: "r", "w", "rw", or "a" (atomics, and loads and stores).
        windows: bindings it takes, where it is larger than target.max_binding (WGSL). four: load4 and store4 access it
        too; of dtypes and modes that fourfold() tells."""
        wgsl, size = self.target.language == "wgsl", DTYPES[dtype].size
        vector = 4 if four and wgsl and (size == 4 or (size == 2 and mode == "r")) else 1
        decl = BufferDecl(_safe(name), dtype, mode, windows if wgsl else 1, vector)
        self.buffers.append(decl)
        return Buffer(self, decl)

    def scalar(self, name: str, type: str) -> Node:
        """The next scalar argument: i32, u32, f32, i64 or f64. 64-bit scalars travel first (Kernel.scalars tells the
        order)."""
        decl = ScalarDecl(_safe(name), type)
        self.scalars.append(decl)
        return Node("tmp", type, attr=decl.name)

    def shared(self, dtype: str, size: int) -> Shared:
        """Workgroup memory: `size` elements of a compute dtype."""
        if dtype not in COMPUTE:
            raise TypeError(f"shared memory holds compute dtypes, not {dtype}")
        self._shared.append(Shared(self, f"shared{len(self._shared)}", dtype, size))
        return self._shared[-1]

    # ---- where am I ---------------------------------------------------------------------------------------------

    def workgroup_id(self, axis: int) -> Node:
        """u32."""
        wgsl = self.target.language == "wgsl"
        return self._builtin(f"wg.{'xyz'[axis]}" if wgsl else f"(uint)get_group_id({axis})")

    def group_index(self) -> Node:
        """Flattened workgroup index over the grid, x fastest, u32."""
        return Node("tmp", "u32", attr="group_index")

    def local_id(self, axis: int | None = None) -> Node:
        """Index in the workgroup, u32; flattened for axis None."""
        if self.target.language == "wgsl":
            return Node("tmp", "u32", attr="lid" if axis is None else f"lid3.{'xyz'[axis]}")
        if axis is None:
            return self._builtin(
                "(uint)(get_local_id(0) + get_local_size(0) * (get_local_id(1) + get_local_size(1) * get_local_id(2)))"
            )
        return self._builtin(f"(uint)get_local_id({axis})")

    def global_id(self, workgroup: int | None = None) -> Node:
        """group_index() * workgroup + local_id(), u32. workgroup: invocations of one, as given to finish() later."""
        if workgroup is None:
            if self.target.language == "wgsl":
                size = Node("tmp", "u32", attr="WORKGROUP_SIZE")
            else:
                size = self._builtin("(uint)(get_local_size(0) * get_local_size(1) * get_local_size(2))")
        else:
            size = ir.const(workgroup, "u32")
        return self.let(self.group_index() * size + self.local_id())

    def _builtin(self, text: str) -> Node:
        return self.emitter.tmp("u32", text)

    # ---- statements ---------------------------------------------------------------------------------------------

    def var(self, dtype: str, init: Any = 0, lanes: int = 1) -> Any:
        """A mutable variable of a compute dtype, or a ComplexVar for a complex dtype. lanes: see lanes()."""
        if dtype not in COMPUTE:
            part = compute_dtype(dtype)
            init = init if isinstance(init, Complex) else Complex(ir.as_node(init, part), ir.const(0, part))
            return ComplexVar(self.var(part, init.re, lanes), self.var(part, init.im, lanes))
        node = ir.cast(ir.as_node(init, dtype), dtype)
        text = self.emitter.value(node, lanes)
        name = self.emitter.fresh("v")
        self.emitter.line(self.lang.var(self.emitter.type(dtype, lanes), name, text))
        return Var(self, name, dtype, lanes)

    def assign(self, name: str, value: Node, lanes: int = 1) -> None:
        """name = value, of a variable."""
        self.emitter.line(f"{name} = {self.emitter.value(value, lanes)};")

    def let(self, value: Any) -> Any:
        """Computes an expression here; gives its value. A vector of lanes at a constant distance stays an expression, so
        that loads and stores go on seeing that it is one."""
        if isinstance(value, Complex):
            return Complex(self.let(value.re), self.let(value.im))
        node = ir.as_node(value)
        if node.op in ("const", "tmp") or (node.lanes > 1 and lane_stride(node) is not None):
            return node
        return Node("tmp", node.dtype, attr=self.emitter.value(node), lanes=node.lanes)

    @contextmanager
    def If(self, cond: Any) -> Iterator[None]:
        """with k.If(cond): ... — cond is a scalar."""
        node = ir.cast(cond, "bool")
        if node.lanes > 1:
            raise ValueError("If needs one condition, not one per lane; use ir.where")
        self.emitter.open(f"if ({self.emitter.value(node)})")
        yield
        self.emitter.close()
        self._else = (len(self.emitter.lines), len(self.emitter.scopes))

    @contextmanager
    def Else(self) -> Iterator[None]:
        """Directly after an If."""
        if self._else != (len(self.emitter.lines), len(self.emitter.scopes)):
            raise ValueError("Else must follow If directly")
        self.emitter.open("else")
        yield
        self.emitter.close()

    @contextmanager
    def For(self, start: Any, stop: Any, step: Any = 1) -> Iterator[Node]:
        """with k.For(0, n) as j: ... — j has the common dtype of the bounds (i32 for Python ints). A negative step must
        be a Python int. stop + step must not overflow."""
        e = self.emitter
        bounds = [start, stop, step]
        if all(isinstance(b, int) for b in bounds):
            bounds[0] = ir.const(start, "i32")
        dtype, (first, last, by) = ir.same(*bounds)
        down = by.op == "const" and by.attr < 0
        name = e.fresh("loop")  # not "i": operands are often called i0, i1, ...
        texts = [e.value(x) for x in (first, last, by)]
        if dtype in ("i64", "u64") and not self.target.int64:
            raise Unsupported("64-bit loop counters without 64-bit integer arithmetic")
        type_ = e.type(dtype)
        init = self.lang.var(type_, name, texts[0])
        e.open(f"for ({init} {name} {'>' if down else '<'} {texts[1]}; {name} = {name} + {texts[2]})")
        yield Node("tmp", dtype, attr=name)
        e.close()

    @contextmanager
    def While(self, cond: Callable[[], Any] | None = None) -> Iterator[None]:
        """with k.While(lambda: n > 0): ... — the condition is evaluated before every turn; None loops until Break()."""
        self.emitter.open(self.lang.loop)
        if cond is not None:
            text = self.emitter.value(ir.logical_not(ir.as_node(cond())))
            self.emitter.line(f"if ({text}) {{ break; }}")
        yield
        self.emitter.close()

    def Break(self) -> None:
        self.emitter.line("break;")

    def Continue(self) -> None:
        self.emitter.line("continue;")

    def Return(self) -> None:
        """Leaves the kernel; not where a barrier follows."""
        self.emitter.line("return;")

    def barrier(self, buffers: bool = False) -> None:
        """Waits for the workgroup; its shared memory (and with `buffers` its buffer stores) is then visible to it."""
        self.emitter.line(self.lang.memory_barrier if buffers else self.lang.barrier)  # type: ignore[attr-defined]
        self.forget_loads()

    def text(self, text: str) -> None:
        """Raw text of the target's language. A loaded value is not reloaded after it."""
        for line in text.strip("\n").split("\n"):
            self.emitter.line(line)
        self.forget_loads()

    def raw(self, dtype: str, text: str) -> Node:
        """The value of raw text, as a node of a compute dtype."""
        return self.emitter.tmp(dtype, text)

    def atom(self, value: Any) -> str:
        """An expression as a name to use in raw text."""
        return self.emitter.value(ir.as_node(value))

    def check_index(self, index: Any, low: Any, high: Any, site: Any) -> Node:
        """Reports to the error buffer (site: u32, not 0, usually a scalar; detail: the index) unless low <= index <
        high. Gives the index, or low if it was out of range. Index dtypes: i32, u32, i64, u64. Result i32, u32, or as
        it was with wide."""
        self.errors = True
        index = self.let(ir.as_node(index))
        if index.lanes > 1:
            raise ValueError("check_index is scalar")
        bad = ir.or_(ir.lt(index, low), ir.ge(index, high))
        e = self.emitter
        with self.If(bad):
            site_, detail = e.value(ir.as_node(site, "u32")), e.value(ir.cast(index, "u32"))
            if self.target.language == "wgsl":
                e.line(
                    f"if (atomicCompareExchangeWeak(&error_word[0], 0u, {site_}).exchanged) "
                    f"{{ atomicStore(&error_word[1], {detail}); }}"
                )
            else:
                e.line(f"if (atomic_cmpxchg(error_word, 0u, {site_}) == 0u) {{ error_word[1] = {detail}; }}")
        safe = ir.where(bad, low, index)
        return safe if self.wide and self.target.language != "wgsl" else self.index(safe)

    # ---- lanes (OpenCL) -----------------------------------------------------------------------------------------

    def lanes(self, width: int, dtype: str = "i32") -> Node:
        """0, 1, ... width - 1 as one value of `width` lanes (2, 4, 8 or 16; 1 gives 0). What depends on it has as many
        lanes; loads and stores at base + lanes are contiguous vectors, at other indices gathers and scatters. OpenCL
        only."""
        if width == 1:
            return ir.const(0, dtype)
        return Node("lane", dtype, lanes=width)

    def stream(self, elements: Any) -> None:
        """Vector stores from here on bypass the cache if the kernel writes `elements` (u32) that it could not hold. CPU
        devices."""
        large = self.let(ir.le(ir.const(STREAM_ELEMENTS, "u32"), elements))
        self.emitter.streaming = self.atom(ir.where(large, ir.const(0, "u32"), ir.const(1, "u32")))

    def halves(self, v: Any) -> tuple[Any, Any]:
        """The lower and upper lanes."""
        v = ir.as_node(v)
        return tuple(self.let(Node(op, v.dtype, v, lanes=v.lanes // 2)) for op in ("lo", "hi"))

    def extract(self, v: Any, lane: int) -> Node:
        """One lane of v."""
        v = ir.as_node(v)
        return v if v.lanes == 1 else Node("extract", v.dtype, v, attr=lane, lanes=1)

    # ---- subgroups ----------------------------------------------------------------------------------------------

    def subgroup(self, op: str, value: Any) -> Node:
        """Reduction over the subgroup: op "add", "mul", "min", "max" (NaN unspecified), "and", "or". WGSL,
        target.subgroup."""
        node = ir.as_node(value)
        if self.target.language != "wgsl" or not self.target.subgroup or node.dtype not in ("f32", "i32", "u32"):
            raise Unsupported(f"subgroup {op} of {node.dtype} on this device")
        self.subgroups = True
        return self.emitter.tmp(node.dtype, f"subgroup{op.capitalize()}({self.emitter.value(node)})")

    def subgroup_shuffle_xor(self, value: Any, mask: int) -> Node:
        """The value of the invocation whose lane differs by mask; mask < target.subgroup."""
        node = ir.as_node(value)
        if self.target.language != "wgsl" or not self.target.subgroup:
            raise Unsupported(f"subgroup shuffle of {node.dtype} on this device")
        self.subgroups = True
        text = self.emitter.value(node)
        if node.dtype in ("f32", "i32", "u32"):
            return self.emitter.tmp(node.dtype, f"subgroupShuffleXor({text}, {mask}u)")
        if node.dtype == "bool":
            return self.emitter.tmp("bool", f"subgroupShuffleXor(u32({text}), {mask}u) != 0u")
        # 64 bits travel in halves.
        bits = self.emitter.value(self.emitter.tmp("u64", text if node.dtype == "u64" else f"bitcast<u64>({text})"))
        low, high = (
            f"u64(subgroupShuffleXor(u32({x}), {mask}u))" for x in (f"{bits} & 0xfffffffflu", f"{bits} >> 32u")
        )
        word = f"{low} | ({high} << 32u)"
        return self.emitter.tmp(node.dtype, word if node.dtype == "u64" else f"bitcast<{node.dtype}>({word})")

    def subgroup_lane(self) -> Node:
        self.subgroups = True
        return Node("tmp", "u32", attr="subgroup_lane")

    def subgroup_id(self) -> Node:
        self.subgroups = True
        return Node("tmp", "u32", attr="subgroup_id")

    def subgroup_size(self) -> Node:
        self.subgroups = True
        return Node("tmp", "u32", attr="subgroup_size")

    # ---- helpers ------------------------------------------------------------------------------------------------

    def index(self, index: Any) -> Node:
        node = ir.as_node(index, "i32")
        if node.dtype in ("i64", "u64"):
            return node if self.wide and self.target.language != "wgsl" else ir.cast(node, "i32")
        if node.dtype not in ("i32", "u32"):
            raise TypeError(f"an index is an integer, not {node.dtype}")
        return node

    def index_text(self, node: Node) -> str:
        """As the language's loads want it: u32 in WGSL."""
        if self.target.language == "wgsl":
            node = ir.cast(node, "u32")
        return self.emitter.value(node)

    def find_load(self, key: tuple) -> Any:
        live = {id(s) for s in self.emitter.scopes}
        self._loads = [(s, d) for s, d in self._loads if id(s) in live]
        for _, d in reversed(self._loads):
            if key in d:
                return d[key]
        return None

    def keep_load(self, key: tuple, value: Any) -> None:
        scope = self.emitter.scopes[-1]
        if not self._loads or self._loads[-1][0] is not scope:
            self._loads.append((scope, {}))
        self._loads[-1][1][key] = value

    def forget_loads(self) -> None:
        """After a store: what was loaded may have changed, also through another buffer argument of the same tensor."""
        self._loads.clear()

    # ---- end ----------------------------------------------------------------------------------------------------

    def finish(self, workgroup: tuple[int, int, int] = (1, 1, 1), *, trusted: bool = False) -> Kernel:
        """The kernel. trusted: every index is proven in range."""
        module = list(self.emitter.module.values())
        if self.target.language == "wgsl":
            size = workgroup[0] * workgroup[1] * workgroup[2]
            module.insert(0, f"const WORKGROUP_SIZE: u32 = {size}u;")
            module += [f"var<workgroup> {s.name}: array<{self.emitter.type(s.dtype)}, {s.size}>;" for s in self._shared]
            local = []
        else:
            local = [f"  __local {self.emitter.type(s.dtype)} {s.name}[{s.size}];" for s in self._shared]
        prefix, suffix, kernel = header(
            self.target, self.name, list(self.buffers), list(self.scalars), workgroup, self.errors,
            module="\n".join(module), trusted=trusted, subgroups=self.subgroups,
        )  # fmt: skip
        body = "\n".join([*local, *self.emitter.lines])
        return dataclasses.replace(kernel, source=prefix + body + "\n" + suffix)


def fourfold(dtype: str, mode: str = "r", windows: int = 1) -> bool:
    """Whether Buffer.load4 and store4 can access such a buffer."""
    return DTYPES[dtype].size <= 4 and not DTYPES[dtype].is_pair and mode != "a" and windows == 1


def lane_stride(node: Node) -> int | None:
    """How much a vector index grows from lane to lane; None if not known to be a constant."""
    if node.lanes == 1:
        return 0
    if node.op == "lane":
        return 1
    if node.op in ("add", "sub"):
        a, b = (lane_stride(x) for x in node.args)
        if a is None or b is None:
            return None
        return a + b if node.op == "add" else a - b
    if node.op == "mul":
        vector, factor = node.args
        if factor.lanes > 1:
            vector, factor = factor, vector
        s = lane_stride(vector)
        return s * factor.attr if s is not None and factor.op == "const" else None
    if node.op == "cast":
        return lane_stride(node.args[0])
    return None


def first_lane(node: Node) -> Node:
    """A vector index at lane 0, for indices whose lane_stride is known."""
    if node.lanes == 1:
        return node
    if node.op == "lane":
        return ir.const(0, node.dtype)
    args = [first_lane(a) for a in node.args]
    if node.op in ("add", "sub", "mul"):
        return getattr(ir, node.op)(*args)
    return Node(node.op, node.dtype, *args, attr=node.attr)
