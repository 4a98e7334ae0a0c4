"""Atomic updates of buffer elements of every dtype, for the builder."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import ir
from .emit import Emitter
from .ir import Complex, Node
from .kernel import DTYPES, Unsupported
from .wgsl import Wgsl

if TYPE_CHECKING:
    from .builder import Buffer, KernelBuilder

_UPDATE: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: ir.or_(a, b) if a.dtype == "bool" else a + b,
    "min": ir.minimum,
    "max": ir.maximum,
}


class Atomics:
    """Native operations on 32-bit (and, where there are, 64-bit) integers; compare-exchange of the containing word
    otherwise."""

    def __init__(self, k: KernelBuilder) -> None:
        self.k = k

    def apply(self, b: Buffer, op: str, index: Node, values: list[Node]) -> Node | None:
        if b.decl.mode != "a":
            raise ValueError(f"buffer {b.name}: atomics need mode 'a'")
        k, e = self.k, self.k.emitter
        wgsl = k.target.language == "wgsl"
        if b.dtype in ("i32", "u32"):
            v = e.value(values[0])
            if wgsl:
                return e.tmp(
                    b.dtype, f"atomic{op.capitalize()}(&{b.name}[{b.name}_offset + {k.index_text(index)}], {v})"
                )
            return e.tmp(b.dtype, f"atomic_{op}({self._pointer(b, index)}, {v})")
        if b.dtype in ("i64", "u64"):
            if k.target.int64_atomics:
                v = e.value(values[0])
                if wgsl:
                    e.line(f"atomic{op.capitalize()}(&{b.name}[{b.name}_offset + {k.index_text(index)}], {v});")
                else:
                    e.line(f"atom_{op}({self._pointer(b, index)}, {v});")
                return None
            if op != "add" or not wgsl:
                raise Unsupported(f"atomic {op} of {b.dtype}: this device has no 64-bit atomics")
            assert isinstance(k.lang, Wgsl)
            low, high = k.lang._split(e, values[0])
            at, old = e.fresh(), e.fresh()
            e.line(f"let {at} = 2u * ({b.name}_offset + {k.index_text(index)});")
            e.line(f"let {old} = atomicAdd(&{b.name}[{at}], {low});")
            e.line(f"atomicAdd(&{b.name}[{at} + 1u], {high} + select(0u, 1u, {old} + {low} < {old}));")
            return None
        if DTYPES[b.dtype].is_pair and b.dtype != "c32":
            if op != "add":
                raise TypeError(f"atomic {op} of {b.dtype}")
            for part in (0, 1):
                self._exchange(b, index, part, lambda old, part=part: old + values[part])  # type: ignore[misc]
            return None
        value: Any = Complex(*values) if len(values) == 2 else values[0]
        self.update(b, index, lambda old: _UPDATE[op](old, value))
        return None

    def update(self, b: Buffer, index: Node, f: Callable[[Any], Any]) -> None:
        if b.decl.mode != "a":
            raise ValueError(f"buffer {b.name}: atomics need mode 'a'")
        if DTYPES[b.dtype].is_pair and b.dtype != "c32":
            raise Unsupported(f"atomic update of {b.dtype}")
        self._exchange(b, index, 0, f)
        self.k.forget_loads()

    def _pointer(self, b: Buffer, index: Node) -> str:
        from .opencl import POINTEE

        return f"((volatile __global {POINTEE[b.dtype]}*)({b.name} + {self.k.index_text(index)}))"

    def _exchange(self, b: Buffer, index: Node, part: int, f: Callable[[Any], Any]) -> None:
        """A compare-exchange loop on the word that holds a part of an element."""
        k, e = self.k, self.k.emitter
        wgsl = k.target.language == "wgsl"
        d = DTYPES[b.dtype]
        size = d.size // 2 if d.is_pair and b.dtype != "c32" else d.size
        word = "u64" if size == 8 else "u32"
        if size == 8 and not k.target.int64_atomics:
            raise Unsupported(f"atomic update of {b.dtype}: this device has no 64-bit atomics")
        i, shift = k.index_text(index), None
        place = e.fresh("place")
        if wgsl:
            at = e.tmp("u32", f"{b.name}_offset + {i}").attr
            if size < 4:
                shift = e.tmp("u32", f"({at} & {4 // size - 1}u) * {8 * size}u")
                at = f"{at} >> {2 // size}u"
            elif d.is_pair and b.dtype != "c32":
                if size == 8:
                    raise Unsupported(f"atomic update of {b.dtype} in WGSL")
                at = f"2u * {at} + {part}u"
            e.line(f"let {place} = {at};")
            read = f"atomicLoad(&{b.name}[{place}])"
            assert isinstance(k.lang, Wgsl)
            native = k.lang.element(k.target, b.decl) == "atomic<i64>"
        else:
            type_ = "ulong" if size == 8 else "uint"
            if size < 4:
                address = e.fresh()
                e.line(f"const size_t {address} = (size_t)({b.name} + {i});")
                shift = e.tmp("u32", f"(uint)({address} & 3) * 8u")
                pointer = f"({address} & ~(size_t)3)"
            else:
                offset = f" + {part}" if part else ""
                pointer = f"((volatile __global {type_}*)({b.name} + {i}){offset})"
            e.line(f"volatile __global {type_}* {place} = (volatile __global {type_}*){pointer};")
            read, native = f"*{place}", False
        old = k.var(word, e.tmp(word, f"bitcast<u64>({read})" if native else read))
        with k.While():
            o = old.as_node()
            new = self._replaced(e, b, o, shift, f)
            text = e.value(new)
            if wgsl:
                got = e.fresh()
                e.line(f"let {got} = atomicCompareExchangeWeak(&{b.name}[{place}], {e.value(o)}, {text});")
                e.line(f"if ({got}.exchanged) {{ break; }}")
                old.set(e.tmp(word, f"{got}.old_value"))
            else:
                name = "atom_cmpxchg" if size == 8 else "atomic_cmpxchg"
                got_ = e.tmp(word, f"{name}({place}, {e.value(o)}, {text})")
                with k.If(ir.eq(got_, o)):
                    k.Break()
                old.set(got_)

    @staticmethod
    def _replaced(e: Emitter, b: Buffer, word: Node, shift: Node | None, f: Callable[[Any], Any]) -> Node:
        """The word with f applied to the element in it."""
        d = DTYPES[b.dtype]
        if b.dtype == "c32":
            old = Complex(Wgsl.decode("f16", ir.and_(word, 0xFFFF)), Wgsl.decode("f16", ir.shr(word, 16)))
            new = f(old)
            return ir.or_(Wgsl.encode("f16", new.re), ir.shl(Wgsl.encode("f16", new.im), 16))
        if shift is None:
            new = f(ir.bitcast(word, d.compute))
            return ir.bitcast(ir.cast(new, d.compute), word.dtype)
        mask = (1 << 8 * d.size) - 1
        old_bits = ir.and_(Node("shr", "u32", word, shift), mask)
        new_bits = Wgsl.encode(b.dtype, ir.cast(f(Wgsl.decode(b.dtype, old_bits)), d.compute))
        return ir.xor(word, Node("shl", "u32", ir.xor(old_bits, new_bits), shift))
