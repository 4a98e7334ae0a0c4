"""Compiled models as files: package() writes what torch.export exported, load() runs it without Inductor.

    package(torch.export.export(model, (x,)), "model.zip")      # or a directory
    model = load("model.zip"); y = model(x)

A package is data: manifest.json (what it is, for which target, and the SHA-256 of every other file), program.json (the host side, as
trees of the few operations that it consists of), kernels/*.json and sources, constants.bin. Nothing in it is executed by Python or
unpickled, and a damaged one is refused. Kernels that belong to this library (products, convolutions, attention) are not in it: they are
built when it is first run."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import operator
import os
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .. import __version__
from ..kernels.kernel import Kernel, Target
from . import runtime

FORMAT = 2
_OPERATORS: dict[str, Callable[..., Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod, "/": operator.truediv,
}  # fmt: skip
_AST_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%", ast.Div: "/"}
_SUFFIXES = {"opencl": "cl", "wgsl": "wgsl", "triton": "py"}


class PackageError(RuntimeError):
    """A package that cannot be written, is damaged, or is for another device or version."""


# ---- programs as data ---------------------------------------------------------------------------------------------------
#
# An expression is a number, string, bool or None; ["name", n]; ["tuple" | "list", …]; [operator, a, b]; ["neg", a]; ["item", x, i]; or
# ["call", function, arguments, keywords]. A statement is ["let", names, expression, unpacked], ["do", expression] or
# ["return", expressions].


def _expression(e: ast.AST) -> Any:
    if isinstance(e, ast.Constant) and (e.value is None or isinstance(e.value, (bool, int, float, str))):
        return ["number", repr(e.value)] if isinstance(e.value, float) and not math.isfinite(e.value) else e.value
    if isinstance(e, ast.Name):
        return ["name", e.id]
    if isinstance(e, (ast.Tuple, ast.List)):
        return ["tuple" if isinstance(e, ast.Tuple) else "list", *map(_expression, e.elts)]
    if isinstance(e, ast.BinOp) and type(e.op) in _AST_OPERATORS:
        return [_AST_OPERATORS[type(e.op)], _expression(e.left), _expression(e.right)]
    if isinstance(e, ast.UnaryOp) and isinstance(e.op, ast.USub):
        return ["neg", _expression(e.operand)]
    if isinstance(e, ast.Subscript):
        return ["item", _expression(e.value), _expression(e.slice)]
    if isinstance(e, ast.Call):
        arguments = list(map(_expression, e.args))
        keywords = {str(k.arg): _expression(k.value) for k in e.keywords}
        # x.size() is a function of x; spiral.GLOBALS["aten"]("relu")(x) one of the name too.
        if isinstance(e.func, ast.Attribute) and isinstance(e.func.value, ast.Name) and e.func.attr in _METHODS:
            return ["call", e.func.attr, [_expression(e.func.value), *arguments], keywords]
        if isinstance(e.func, ast.Call):
            inner = _expression(e.func)
            return ["call", inner[1], [*inner[2], *arguments], keywords]
        return ["call", ast.unparse(e.func).replace("spiral.GLOBALS['", "").replace("']", ""), arguments, keywords]
    if isinstance(e, ast.Attribute) and ast.unparse(e).startswith("torch."):
        return ["torch", ast.unparse(e).removeprefix("torch.")]
    raise PackageError(f"a package cannot hold {ast.unparse(e)!r}")


def _statements(body: Sequence[ast.stmt]) -> list[Any]:
    out: list[Any] = []
    for s in body:
        text = ast.unparse(s)
        if isinstance(s, ast.Delete) or text in ("args.clear()", "None", "pass") or text.startswith(("assert_", "'")):
            continue
        if isinstance(s, ast.With):
            out += _statements(s.body)
        elif isinstance(s, ast.Assign) and len(s.targets) == 1:
            t = s.targets[0]
            names = [t] if isinstance(t, ast.Name) else list(t.elts) if isinstance(t, (ast.Tuple, ast.List)) else []
            if not names or not all(isinstance(n, ast.Name) for n in names):
                raise PackageError(f"a package cannot hold {text!r}")
            out.append(["let", [n.id for n in names], _expression(s.value), not isinstance(t, ast.Name)])  # type: ignore[attr-defined]
        elif isinstance(s, ast.Expr):
            out.append(["do", _expression(s.value)])
        elif isinstance(s, ast.Return):
            value = s.value
            out.append(
                ["return", list(map(_expression, value.elts)) if isinstance(value, (ast.Tuple, ast.List)) else []]
            )
        else:
            raise PackageError(f"a package cannot hold {text!r}")
    return out


def _functions(statements: Any) -> set[str]:
    found: set[str] = set()
    if isinstance(statements, list):
        if len(statements) == 4 and statements[0] == "call":
            found.add(statements[1])
            statements = [*statements[2], *statements[3].values()]
        for s in statements:
            found |= _functions(s)
    return found


def _run(statements: Sequence[Any], names: dict[str, Any], function: Callable[[str], Callable[..., Any]]) -> list[Any]:
    """Interprets a program; the values of its return."""

    def value(e: Any) -> Any:
        if not isinstance(e, list):
            return e
        kind, *rest = e
        if kind == "name":
            return names[rest[0]]
        if kind in ("tuple", "list"):
            return (tuple if kind == "tuple" else list)(map(value, rest))
        if kind == "call":
            name, arguments, keywords = rest
            return function(name)(*map(value, arguments), **{k: value(v) for k, v in keywords.items()})
        if kind == "neg":
            return -value(rest[0])
        if kind == "item":
            return value(rest[0])[value(rest[1])]
        if kind == "number":
            return float(rest[0])
        if kind == "torch":
            return _constant(rest[0])
        return _OPERATORS[kind](value(rest[0]), value(rest[1]))

    for s in statements:
        if s[0] == "return":
            return list(map(value, s[1]))
        result = value(s[1] if s[0] == "do" else s[2])
        if s[0] == "let":
            names.update(zip(s[1], result, strict=True) if s[3] else [(s[1][0], result)])
    return []


def _constant(name: str) -> Any:
    """torch.float32 and the like; nothing else of torch."""
    found = getattr(torch, name, None)
    if not isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
        raise PackageError(f"a package cannot hold torch.{name}")
    return found


_METHODS: dict[str, Callable[..., Any]] = {
    "size": torch.Tensor.size, "stride": torch.Tensor.stride, "item": torch.Tensor.item, "copy_": torch.Tensor.copy_,
}  # fmt: skip


def _host_function(name: str) -> Callable[..., Any]:
    """What a program may call between graphs."""
    if name in _METHODS:
        return _METHODS[name]
    if name == "reinterpret_tensor":
        return getattr(torch._C._dynamo.guards, "_reinterpret_tensor")  # noqa: B009 (its stub lacks it)
    if name == "empty":
        names = {short: dtype for dtype, short in runtime.DTYPES.items()}
        return lambda sizes, strides, dtype: torch.empty_strided(sizes, strides, dtype=names[dtype], device="spiral")
    parts = name.split(".")
    if parts[:2] == ["torch", "ops"] and len(parts) == 5 and parts[2] in ("aten", "prims"):
        return getattr(getattr(getattr(torch.ops, parts[2]), parts[3]), parts[4])
    if parts[0] == "aten" and len(parts) == 3:
        return getattr(getattr(torch.ops.aten, parts[1]), parts[2])
    if parts[0] == "extern_kernels" and len(parts) == 2 and hasattr(torch.ops.aten, parts[1]):
        return getattr(torch.ops.aten, parts[1])
    raise PackageError(f"a package cannot call {name}")


def _graph_function(name: str, kernels: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """What a graph may call, on handles."""
    if name in kernels:
        return kernels[name]
    head, _, rest = name.partition(".")
    if head == "aten" and not rest:
        return lambda overload, *args, **kwargs: runtime.aten(overload)(*args, **kwargs)
    if head == "extern_kernels" and rest and "." not in rest and (rest == "convolution" or rest in runtime.OUT_EXTERNS):
        return getattr(runtime.GLOBALS[head], rest)
    if not rest and head in runtime.GLOBALS and head != "extern_kernels":
        found: Any = runtime.GLOBALS[head]
        return found
    raise PackageError(f"a package's graph cannot call {name}")


# ---- writing ------------------------------------------------------------------------------------------------------------


def package(exported: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Compiles an exported program of spiral tensors for its device and writes it to `path`: a directory, or one file if the
    name ends in .zip. PackageError for what a package cannot hold (operators that are no part of aten, custom containers)."""
    from . import compat

    source, constants, index, decomposed = compat.compile_exported(exported)
    files: dict[str, bytes] = {}
    module = ast.parse(source)
    program: dict[str, Any] = {"kernels": {}, "graphs": {}}
    bodies: dict[str, Any] = {}
    for s in module.body:
        if isinstance(s, ast.FunctionDef) and s.name.startswith("graph_"):
            bodies[s.name] = _statements(s.body)
        elif isinstance(s, ast.ClassDef) and s.name == "Runner":
            call = next(f for f in s.body if isinstance(f, ast.FunctionDef) and f.name == "call")
            program["call"] = _statements(call.body)
        elif isinstance(s, ast.Assign) and isinstance(s.value, ast.Call) and isinstance(s.targets[0], ast.Name):
            name, maker = s.targets[0].id, ast.unparse(s.value.func)
            if maker == "spiral.Fused":
                program["kernels"][name] = _kernel(s.value, files)
            elif maker == "spiral.Graph":
                title, _, counts, _ = s.value.args
                program["graphs"][name] = {
                    "name": ast.literal_eval(title),
                    "counts": ast.literal_eval(counts),
                    "body": bodies[name],
                }
    spec = decomposed.graph_signature
    lifted = {**decomposed.state_dict, **decomposed.constants}
    inputs: list[Any] = []
    stored: dict[str, torch.Tensor] = {}
    examples = [n.meta["val"] for n in decomposed.graph_module.graph.nodes if n.op == "placeholder"]
    for i, example in zip(spec.input_specs, examples, strict=True):
        kind = i.kind.name
        if kind in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
            stored[str(i.target)] = lifted[i.target]
            inputs.append(["constant", i.target])
        elif kind == "USER_INPUT" and type(i.arg).__name__ in ("TensorArgument", "SymIntArgument"):
            inputs.append(["input", _layout(example) if isinstance(example, torch.Tensor) else None])
        elif kind == "USER_INPUT" and type(i.arg).__name__ == "ConstantArgument":
            inputs.append(["fixed", i.arg.value])
        else:
            raise PackageError(f"a package cannot hold an input of kind {kind} ({i.arg})")
    outputs: list[Any] = []
    for o in spec.output_specs:
        kind = o.kind.name
        if kind == "USER_OUTPUT":
            outputs.append(["fixed", o.arg.value] if type(o.arg).__name__ == "ConstantArgument" else ["output"])
        elif kind in ("BUFFER_MUTATION", "PARAMETER_MUTATION"):
            outputs.append(["mutation", "constant", o.target])
        elif kind == "USER_INPUT_MUTATION":
            users = [str(i.arg.name) for i in spec.input_specs if i.kind.name == "USER_INPUT"]
            outputs.append(["mutation", "input", users.index(str(o.target))])
        else:
            raise PackageError(f"a package cannot hold an output of kind {kind}")
    stored.update(constants)
    program |= {
        "inputs": inputs,
        "outputs": outputs,
        "names": sorted(constants),
        "ranges": {str(s): [_bound(r.lower), _bound(r.upper)] for s, r in decomposed.range_constraints.items()},
        "in": _spec(decomposed.call_spec.in_spec),
        "out": _spec(decomposed.call_spec.out_spec),
    }
    for name in _functions(program["call"]):
        if not name.startswith("call_"):
            _host_function(name)
    for graph in program["graphs"].values():
        for name in _functions(graph["body"]):
            _graph_function(name, dict.fromkeys(program["kernels"], runtime.empty))
    program["constants"], files["constants.bin"] = _tensors(stored)
    files["program.json"] = json.dumps(program, indent=1).encode()
    target = Target.of(index)
    manifest: dict[str, Any] = {
        "format": FORMAT, "torch_spiral": __version__, "torch": torch.__version__, "target": repr(target),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())},
    }  # fmt: skip
    manifest["digest"] = _digest(manifest)
    files["manifest.json"] = json.dumps(manifest, indent=1).encode()
    _write(Path(path), files)


def _layout(example: torch.Tensor) -> dict[str, Any]:
    """What a call's tensor must have: sizes that vary by the names of their symbols. strides: None for contiguous ones, which the call brings
    about; else those that are known."""
    strides = [s if isinstance(s, int) else None for s in example.stride()]
    return {
        "dtype": str(example.dtype).removeprefix("torch."),
        "sizes": [s if isinstance(s, int) else str(s) for s in example.shape],
        "strides": None if example.is_contiguous() else strides,
    }


def _bound(limit: Any) -> int | None:
    return int(limit) if getattr(limit, "is_Integer", isinstance(limit, int)) else None


def _fitting(
    x: torch.Tensor, layout: Mapping[str, Any], sizes: dict[str, int], ranges: Mapping[str, Sequence[Any]]
) -> torch.Tensor:
    """x as the package takes it, copied where its strides are others. sizes: those of symbols, so far. ValueError where it does not fit."""
    wanted, known = layout["sizes"], tuple(x.shape)
    fits = str(x.dtype).removeprefix("torch.") == layout["dtype"] and len(known) == len(wanted)
    for n, size in zip(known, wanted, strict=False):
        low, high = ranges.get(size, (None, None))
        fits = fits and n == (size if isinstance(size, int) else sizes.setdefault(size, n))
        fits = fits and (low is None or n >= low) and (high is None or n <= high)
    if not fits:
        raise ValueError(
            f"this package was exported for a tensor of {layout['dtype']} and sizes {wanted}, got {x.dtype} and {list(known)}"
        )
    if layout["strides"] is None:
        return x.contiguous()
    if all(n <= 1 or s is None or s == t for n, s, t in zip(known, layout["strides"], x.stride(), strict=True)):
        return x
    if None in layout["strides"]:
        raise ValueError(f"this package was exported for strides {layout['strides']}, got {list(x.stride())}")
    return torch.empty_strided(known, layout["strides"], dtype=x.dtype, device=x.device).copy_(x)


def _spec(spec: Any) -> str:
    try:
        return str(pytree.treespec_dumps(spec))
    except NotImplementedError as error:
        raise PackageError(f"a package cannot hold this structure of arguments or results: {error}") from None


def _kernel(call: ast.Call, files: dict[str, bytes]) -> dict[str, Any]:
    (made,) = call.args
    assert isinstance(made, ast.Call)
    kernel = {str(k.arg): ast.literal_eval(k.value) for k in made.keywords}
    file = f"kernels/{kernel['name']}.{_SUFFIXES[kernel['language']]}"
    files[file] = kernel.pop("source").encode()
    return {"kernel": kernel, "source": file, **{str(k.arg): ast.literal_eval(k.value) for k in call.keywords}}


def _tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, Any], bytes]:
    """Where each tensor is, and all storages one after the other: what shares memory shares it in the package."""
    described: dict[str, Any] = {}
    data = bytearray()
    starts: dict[int, int] = {}
    for name, t in tensors.items():
        storage = t.untyped_storage()
        key = storage.data_ptr() if storage.nbytes() else -1
        if key not in starts:
            starts[key] = len(data)
            host = torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage, 0, (storage.nbytes(),), (1,)).cpu()
            data += host.numpy().tobytes()
        described[name] = {
            "dtype": str(t.dtype).removeprefix("torch."), "sizes": list(t.shape), "strides": list(t.stride()), "offset": t.storage_offset(),
            "start": starts[key], "bytes": storage.nbytes(), "host": t.device.type == "cpu",
        }  # fmt: skip
    return described, bytes(data)


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write(path: Path, files: Mapping[str, bytes]) -> None:
    if path.suffix == ".zip":
        part = path.with_name(path.name + ".part")
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as z:
            for name, data in files.items():
                z.writestr(name, data)
        part.replace(path)
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise PackageError(f"{path} exists")
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


# ---- reading ------------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], device: torch.device | str | int | None = None) -> Package:
    """A callable that runs a package on a spiral device (the current one). PackageError for a package that is damaged or made
    for another kind of device."""
    from .. import _C

    given = torch.device("spiral", device) if isinstance(device, int) else torch.device(device or "spiral")
    index = _C.current_device() if given.index is None else given.index
    files = _read(Path(path))
    manifest = json.loads(files.pop("manifest.json"))
    if manifest["format"] != FORMAT:
        raise PackageError(f"{path} has format {manifest['format']}; this version of torch_spiral reads {FORMAT}")
    if manifest["target"] != repr(Target.of(index)):
        raise PackageError(f"{path} was compiled for {manifest['target']}, but the device is {Target.of(index)!r}")
    return Package(json.loads(files["program.json"]), files, index)


def _read(path: Path) -> dict[str, bytes]:
    """All files of a package, checked."""
    try:
        if path.is_dir():
            files = {f.relative_to(path).as_posix(): f.read_bytes() for f in path.rglob("*") if f.is_file()}
        else:
            with zipfile.ZipFile(path) as z:
                files = {name: z.read(name) for name in z.namelist()}
        manifest = json.loads(files["manifest.json"])
        digest = manifest.pop("digest")
        expected = manifest["files"]
    except FileNotFoundError:
        raise
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise PackageError(f"{path} is no package, or is damaged: {error}") from None
    if digest != _digest(manifest):
        raise PackageError(f"{path} is damaged: its manifest was changed")
    for name, known in expected.items():
        if name not in files:
            raise PackageError(f"{path} is damaged: {name} is missing")
        if hashlib.sha256(files[name]).hexdigest() != known:
            raise PackageError(f"{path} is damaged: {name} was changed")
    if extra := files.keys() - expected.keys() - {"manifest.json"}:
        raise PackageError(f"{path} is damaged: {sorted(extra)[0]} does not belong to it")
    return files


class Package:
    """A loaded package: called as the exported model was. `constants` are its parameters and buffers, by name."""

    def __init__(self, program: dict[str, Any], files: Mapping[str, bytes], index: int):
        self._program, self._device = program, torch.device("spiral", index)
        kernels = {name: _fused(k, files) for name, k in program["kernels"].items()}
        self._calls = {
            "call" + name.removeprefix("graph"): _graph(g, kernels, index) for name, g in program["graphs"].items()
        }
        self._in, self._out = pytree.treespec_loads(program["in"]), pytree.treespec_loads(program["out"])
        self.constants = self._load_constants(program["constants"], files["constants.bin"])
        self._functions = {
            name: _host_function(name) for name in _functions(program["call"]) if name not in self._calls
        } | self._calls

    def _load_constants(self, described: Mapping[str, Any], data: bytes) -> dict[str, torch.Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # it is only copied from
            whole = torch.frombuffer(data or b"\0", dtype=torch.uint8)
        storages: dict[tuple[int, bool], torch.Tensor] = {}
        out: dict[str, torch.Tensor] = {}
        for name, d in described.items():
            key = (d["start"], d["host"])
            if key not in storages:
                part = whole[d["start"] : d["start"] + d["bytes"]]
                storages[key] = part.clone() if d["host"] else part.to(self._device)
            out[name] = torch.empty(0, dtype=_constant(d["dtype"]), device=storages[key].device).set_(
                storages[key].untyped_storage(), d["offset"], d["sizes"], d["strides"]
            )
        return out

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._in:
            raise TypeError(f"this package takes arguments structured as {self._in}, got {spec}")
        users = iter(flat)
        program = self._program
        values: list[Any] = []
        given: list[Any] = []
        sizes: dict[str, int] = {}
        for kind, *rest in program["inputs"]:
            if kind == "constant":
                values.append(self.constants[rest[0]])
                continue
            value = next(users)
            given.append(value)
            if kind == "fixed":
                if value != rest[0]:
                    raise ValueError(f"this package was exported for {rest[0]!r}, got {value!r}")
                values.append(value)
            elif isinstance(value, torch.Tensor) and value.device != self._device and value.device.type == "spiral":
                raise ValueError(f"this package runs on {self._device}, got a tensor on {value.device}")
            elif isinstance(value, torch.Tensor) and value.device.type != "spiral":
                raise ValueError(
                    f'this package runs on {self._device}, got a tensor on {value.device}: move it with .to("spiral")'
                )
            elif isinstance(value, torch.Tensor) and rest[0] is not None:
                values.append(_fitting(value, rest[0], sizes, program["ranges"]))
            else:
                values.append(value)
        with torch.no_grad(), torch.spiral.device(self._device.index):  # type: ignore[attr-defined]
            names: dict[str, Any] = {name: self.constants[name] for name in program["names"]}
            names["args"] = values
            results = iter(_run(program["call"], names, self._functions.__getitem__))
            outputs: list[Any] = []
            for kind, *rest in program["outputs"]:
                if kind == "fixed":
                    outputs.append(rest[0])
                    next(results, None)
                elif kind == "output":
                    outputs.append(next(results))
                else:
                    (self.constants[rest[1]] if rest[0] == "constant" else given[rest[1]]).copy_(next(results))
        return pytree.tree_unflatten(outputs, self._out)


def _fused(described: Mapping[str, Any], files: Mapping[str, bytes]) -> runtime.Fused:
    k: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in described["kernel"].items()}
    return runtime.Fused(
        Kernel(source=files[described["source"]].decode(), **k),
        described["schedule"],
        described["lanes"],
        tuple(described["sites"]),
    )


def _graph(described: Mapping[str, Any], kernels: Mapping[str, runtime.Fused], index: int) -> Callable[..., Any]:
    functions = {name: _graph_function(name, kernels) for name in _functions(described["body"])}

    def body(inputs: Any, written: Any, sizes: Any) -> Any:
        return tuple(
            _run(described["body"], {"inputs": inputs, "written": written, "sizes": sizes}, functions.__getitem__)
        )

    return runtime.Graph(described["name"], body, tuple(described["counts"]), index).call


__all__ = ["Package", "PackageError", "load", "package"]
