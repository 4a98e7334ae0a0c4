"""The tuner's database: which schedule won on which device, and the evidence. SQLite, so that it can be read, edited and merged.

`devices`: what was tuned on and its measured roofline. `decisions`: one row for each key that was searched. `trials`: every candidate
and what became of it. Nothing in it is executed: a schedule is a name that must be among the template's own candidates."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlite3

VERSION = 1
SCHEMA = """
create table if not exists devices (
    device text primary key, engine text not null, vendor text not null, driver text not null, schedule_class text not null,
    compute_units integer not null, bandwidth real, flops text not null default '{}'
);
create table if not exists decisions (
    device text not null, template text not null, key text not null, sizes text not null, schedule text not null, fallback text not null,
    milliseconds real not null, fallback_milliseconds real not null, wins integer not null, rounds integer not null, p real not null,
    kernel_hash text not null, versions text not null, time real not null, primary key (device, template, key)
);
create table if not exists trials (
    device text not null, template text not null, key text not null, schedule text not null, verdict text not null, milliseconds real,
    predicted_milliseconds real, detail text not null default '', primary key (device, template, key, schedule)
);
"""


@dataclasses.dataclass(frozen=True)
class DeviceRow:
    """bandwidth: bytes a second of a copy, read and written. flops: per dtype, the most operations a second that were seen."""

    device: str
    engine: str
    vendor: str
    driver: str
    schedule_class: str
    compute_units: int
    bandwidth: float | None = None
    flops: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Decision:
    """schedule won (or is the fallback itself: nothing beat it). Times are medians of the last, paired comparison; p is its sign
    test's. fallback: the built-in choice at that time. kernel_hash: of the schedule's kernel; another kernel makes this stale."""

    device: str
    template: str
    key: str
    sizes: str
    schedule: str
    fallback: str
    milliseconds: float
    fallback_milliseconds: float
    wins: int
    rounds: int
    p: float
    kernel_hash: str
    versions: str
    time: float

    @property
    def speedup(self) -> float:
        return self.fallback_milliseconds / self.milliseconds if self.milliseconds > 0 else 1.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """verdict: "won", "lost", "no better", "wrong", "failed", "pruned" or "reference" (the built-in choice)."""

    device: str
    template: str
    key: str
    schedule: str
    verdict: str
    milliseconds: float | None = None
    predicted_milliseconds: float | None = None
    detail: str = ""


TABLES: dict[str, Any] = {"devices": DeviceRow, "decisions": Decision, "trials": Trial}


def default_path() -> Path:
    """$SPIRAL_TUNE_DB, or tuning.sqlite in the folder of the kernel cache."""
    if chosen := os.environ.get("SPIRAL_TUNE_DB"):
        return Path(chosen)
    if folder := os.environ.get("SPIRAL_CACHE_DIR"):
        return Path(folder) / "tuning.sqlite"
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else str(Path.home() / ".cache")
    return Path(base or ".") / "torch_spiral" / "tuning.sqlite"


class DamagedDatabase(RuntimeError):
    """The file is no tuning database of this version."""


class NotExported(ValueError):
    """The text is no exported database."""


class Database:
    """A tuning database. Read-only ones are never created or changed; others are made on first use, and a damaged file is set aside
    (renamed, with a warning) and begun anew. OSError for another program's database, which is left alone."""

    def __init__(self, path: str | Path, readonly: bool = False):
        self.path, self.readonly = Path(path), readonly
        self._lock = threading.Lock()
        if readonly:
            if not self.path.is_file():
                raise FileNotFoundError(f"there is no tuning database {self.path}")
            self._connection = self._open()
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._connection = self._open()
        except DamagedDatabase as error:
            aside = self.path.with_suffix(f".damaged-{time.time_ns()}")
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                self.path.rename(aside)
            for suffix in ("-wal", "-shm"):
                Path(str(self.path) + suffix).unlink(missing_ok=True)
            warnings.warn(f"{error}; it was moved to {aside} and a new one begun", stacklevel=2)
            self._connection = self._open()

    def _open(self) -> sqlite3.Connection:
        import sqlite3  # here, not with torch_spiral: many programs never open a database

        uri = f"{self.path.resolve().as_uri()}?mode={'ro' if self.readonly else 'rwc'}"
        connection = sqlite3.connect(uri, uri=True, timeout=30, check_same_thread=False, isolation_level=None)
        try:
            (check,) = connection.execute("pragma quick_check(1)").fetchone()
            (version,) = connection.execute("pragma user_version").fetchone()
            tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
            if check == "ok" and not tables and version == 0 and not self.readonly:
                connection.executescript(f"begin immediate; {SCHEMA} pragma user_version = {VERSION}; commit;")
            elif check == "ok" and tables and not tables & set(TABLES):
                connection.close()
                raise OSError(f"{self.path} is a database of something else")
            elif check != "ok" or version != VERSION or not set(TABLES) <= tables:
                raise DamagedDatabase(f"{self.path} is damaged or of another version")
            for name, row in TABLES.items():
                columns = {c[1] for c in connection.execute(f"pragma table_info({name})")}
                if columns != {f.name for f in dataclasses.fields(row)}:
                    raise DamagedDatabase(f"{self.path}: the table {name} has other columns")
        except sqlite3.DatabaseError as error:
            connection.close()
            if any(word in str(error) for word in ("locked", "busy", "unable to open", "disk", "readonly")):
                raise OSError(f"{self.path}: {error}") from error  # in use or out of reach, which is no damage
            raise DamagedDatabase(f"{self.path} cannot be read ({error})") from error
        except DamagedDatabase:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        self._connection.close()

    def _rows(self, table: str, where: dict[str, str]) -> Iterator[Any]:
        row, clause = TABLES[table], " and ".join(f"{k} = ?" for k in where)
        names = [f.name for f in dataclasses.fields(row)]
        with self._lock:
            found = self._connection.execute(
                f"select {', '.join(names)} from {table}{' where ' + clause if clause else ''} order by 1, 2, 3",
                tuple(where.values()),
            ).fetchall()
        for values in found:
            given = dict(zip(names, values, strict=True))
            if table == "devices":
                given["flops"] = json.loads(given["flops"])
            yield row(**given)

    def devices(self, **where: str) -> list[DeviceRow]:
        return list(self._rows("devices", where))

    def decisions(self, **where: str) -> list[Decision]:
        return list(self._rows("decisions", where))

    def trials(self, **where: str) -> list[Trial]:
        return list(self._rows("trials", where))

    def put(self, *rows: DeviceRow | Decision | Trial) -> None:
        """Stores rows, in one transaction; one of the same key is replaced."""
        with self._lock:
            self._connection.execute("begin immediate")
            try:
                for row in rows:
                    table = next(name for name, kind in TABLES.items() if isinstance(row, kind))
                    values = dataclasses.asdict(row)
                    if table == "devices":
                        values["flops"] = json.dumps(values["flops"])
                    marks = ", ".join("?" * len(values))
                    self._connection.execute(
                        f"insert or replace into {table} ({', '.join(values)}) values ({marks})", tuple(values.values())
                    )
                self._connection.execute("commit")
            except BaseException:
                self._connection.execute("rollback")
                raise

    def merge(self, devices: Iterable[DeviceRow], decisions: Iterable[Decision], trials: Iterable[Trial] = ()) -> int:
        """Takes over what is new or newer; the number of decisions that were. Trials come with their decision."""
        mine = {(d.device, d.template, d.key): d for d in self.decisions()}
        taken = [
            d
            for d in decisions
            if (d.device, d.template, d.key) not in mine or mine[d.device, d.template, d.key].time < d.time
        ]
        keys = {(d.device, d.template, d.key) for d in taken}
        known = {d.device for d in self.devices()}
        self.put(
            *(d for d in devices if d.device not in known),
            *taken,
            *(t for t in trials if (t.device, t.template, t.key) in keys),
        )
        return len(taken)


def export(database: Database) -> str:
    """Devices and decisions as JSON text, one line a row, for merging elsewhere or shipping as defaults."""
    rows = [("device", d) for d in database.devices()] + [("decision", d) for d in database.decisions()]
    return "".join(json.dumps({"kind": kind, **dataclasses.asdict(row)}, sort_keys=True) + "\n" for kind, row in rows)


def parse(text: str) -> tuple[list[DeviceRow], list[Decision]]:
    """The inverse of export(). NotExported for other text."""
    devices: list[DeviceRow] = []
    decisions: list[Decision] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            given = json.loads(line)
            kind = given.pop("kind")
            if kind == "device":
                devices.append(DeviceRow(**given))
            else:
                decisions.append({"decision": Decision}[kind](**given))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:  # noqa: PERF203  (the error names its line)
            raise NotExported(f"line {number} is no row of a tuning database: {error}") from error
    return devices, decisions


def read(path: str | Path) -> tuple[list[DeviceRow], list[Decision], list[Trial]]:
    """The rows of a database or of exported text."""
    path = Path(path)
    with path.open("rb") as f:
        head = f.read(16)
    if head.startswith(b"SQLite format 3"):
        database = Database(path, readonly=True)
        try:
            return database.devices(), database.decisions(), database.trials()
        finally:
            database.close()
    return *parse(path.read_text(errors="replace")), []


def shipped() -> tuple[list[DeviceRow], list[Decision]]:
    """The defaults that come with the package, per device that was tuned for it."""
    devices: list[DeviceRow] = []
    decisions: list[Decision] = []
    for path in sorted((Path(__file__).parent / "defaults").glob("*.jsonl")):
        more, found = parse(path.read_text())
        devices += more
        decisions += found
    return devices, decisions
