"""A bundle on disk: one folder with a manifest, engines and tokenizers; read by the runtime, written by `export`."""

import contextlib
import hashlib
import os
import re
import secrets
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from engines.catalog import CATALOG
from engines.errors import BundleError
from engines.manifest import EngineEntry, FileEntry, Manifest
from engines.spec import INT8

MANIFEST = "manifest.json"
ENGINES = "engines"
TOKENIZERS = "tokenizers"
_PATIENCE = 10  # seconds
_TEMPORARY = ".tmp-"


def hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> FileEntry:
    """A finished file, named relative to its folder."""
    return FileEntry(path.name, hash_file(path), path.stat().st_size)


class Bundle:
    """Read access to a finished bundle; `Bundle.writer` is the only way to change one."""

    def __init__(self, root: Path, manifest: Manifest):
        self.root, self.manifest = root, manifest

    @classmethod
    def open(cls, root: str | os.PathLike[str]) -> "Bundle":
        root = Path(root)
        path = root / MANIFEST
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"{root}: no {MANIFEST} there, so it is not a bundle. "
                "Make one with `python -m export build --stage all --out FOLDER`, or give the folder of one."
            ) from None
        except OSError as error:
            raise BundleError(
                f"{path} cannot be read ({error.strerror}). Mend that, or give another --bundle."
            ) from None
        return cls(root, Manifest.from_json(text, str(path)))

    @property
    def id(self) -> str:
        """Changes with every file of the bundle: what a video's metadata names it by."""
        return hashlib.sha256(self.manifest.to_json().encode()).hexdigest()[:12]

    def engine(self, name: str) -> EngineEntry:
        try:
            return self.manifest.engines[name]
        except KeyError:
            have = ", ".join(self.manifest.engines) or "none"
            raise BundleError(
                f"{self.root}: engine {name} is missing (it has: {have}). Add it with {self.rebuild_command(name)}."
            ) from None

    def rebuild_command(self, name: str, **changes: str | None) -> str:
        """What builds an engine again as it was, or where it is missing, as the others are; with changed options.

        None leaves an option out, "" is for one that takes no value.
        """
        entry = self.manifest.engines.get(name) or next(iter(self.manifest.engines.values()), None)
        options: dict[str, str | None] = {"stage": CATALOG[name].stage}
        if entry:
            # A bundle of int8 has engines that stayed what they were (`export.int8`): ONNX Runtime's say so.
            others = [other for other in self.manifest.engines.values() if other.backend == entry.backend]
            int8 = any(other.precision == INT8 for other in others)
            if entry.backend == "onnxruntime":
                int8 = "calibration" in entry.source
            options |= {"engine": entry.backend, "precision": INT8 if int8 else entry.precision}
            if entry.targets:
                options |= {"target": ",".join(entry.targets) if entry.backend == "tensorrt-rtx" else None}
                options |= {"attention": entry.source.get("attention")}
            options |= {"no-autotune": "" if entry.source.get("autotune") else None}
        options |= {"size": "{}x{}".format(*self.manifest.size), "out": str(self.root), **changes}
        # Quoted, whatever a manifest says: users run what they are told to.
        words = " ".join(
            f"--{option} {shlex.quote(value)}" if value else f"--{option}"
            for option, value in options.items()
            if value is not None
        )
        return f"`python -m export build --checkpoint FOLDER {words}`"

    def problems(self, entry: EngineEntry) -> list[str]:
        """Why an engine is not what was built; reads all of its files."""
        return list(filter(None, [entry.edited, *map(self.damage, entry.files())]))

    def why_stale(self, name: str, source: Mapping[str, str]) -> str | None:
        """The reason to build an engine that is to be made from `source`, or None when this one is, and sound."""
        entry = self.manifest.engines.get(name)
        if entry is None:
            return "not built yet"
        changed = sorted(key for key in {*entry.source, *source} if entry.source.get(key) != source.get(key))
        if changed:
            return f"changed: {', '.join(changed)}"
        return "; ".join(self.problems(entry)) or None

    def path(self, file: FileEntry) -> Path:
        """Where a file lies; raises BundleError when it is not there or not of the recorded length."""
        path = self.root / file.path
        try:
            whole = path.is_file() and path.stat().st_size == file.bytes
            if whole:
                path.open("rb").close()
        except OSError as error:
            why = error.strerror
            raise BundleError(f"{path} cannot be read ({why}). Mend that, or give another bundle.") from None
        if not whole:
            if Bundle.open(self.root).manifest != self.manifest:
                raise BundleError(
                    f"{self.root}: its engines were built again while this ran. Run this again; a "
                    "program opens the bundle again."
                )
            check = f"`python -m export check {shlex.quote(str(self.root))}`"
            raise BundleError(f"{path} is missing or cut short. {check} says how to build it again.")
        return path

    def tokenizer(self, name: str) -> Path:
        if name not in self.manifest.tokenizers:
            raise BundleError(f"{self.root}: tokenizer {name} is missing. Build the text and sr2 stages.")
        return self.path(self.manifest.tokenizers[name])

    def damage(self, file: FileEntry) -> str | None:
        """Why a file cannot be used, or None; reads the whole file."""
        path = self.root / file.path
        try:
            if not path.is_file():
                return f"{file.path} is missing"
            if path.stat().st_size != file.bytes:
                return f"{file.path} has {path.stat().st_size} bytes, should have {file.bytes}"
            if hash_file(path) != file.sha256:
                return f"{file.path} has been changed: its SHA-256 is not the manifest's"
        except OSError as error:
            return f"{file.path} cannot be read ({error.strerror})"
        return None

    @staticmethod
    @contextlib.contextmanager
    def writer(root: Path) -> Iterator["BundleWriter"]:
        """Exclusive write access; a second builder is refused, leftovers of a builder that died are removed."""
        try:
            root.mkdir(parents=True, exist_ok=True)
            found = [path.name for path in root.iterdir()]
            ours = (".lock", "lost+found")  # the latter is an empty disk's own
            foreign = any(name not in ours and not name.startswith(_TEMPORARY) for name in found)
            if foreign and not (root / MANIFEST).exists():
                raise BundleError(f"{root} holds other files and no bundle. Choose an empty or new folder for --out.")
            lock = FileLock(root / ".lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise BundleError(
                f"{root}: another build is writing this bundle. Wait for it, or choose another --out."
            ) from None
        except OSError as error:
            raise BundleError(f"{root} cannot be written ({error}). Choose another --out.") from None
        try:
            exists = (root / MANIFEST).exists()
            for leftover in [*root.glob(f"{_TEMPORARY}*"), *root.glob(f"{TOKENIZERS}/{_TEMPORARY}*")]:
                if leftover.is_dir():
                    shutil.rmtree(leftover, ignore_errors=True)
                else:
                    leftover.unlink(missing_ok=True)
            writer = BundleWriter(root, Bundle.open(root).manifest if exists else Manifest())
            writer.sweep()
            yield writer
        except OSError as error:
            raise BundleError(
                f"{root} cannot be written ({error.strerror or error}). What was finished is kept; make room or choose "
                "another --out, then run this again."
            ) from None
        finally:
            lock.release()


class BundleWriter(Bundle):
    """Files are complete before the manifest names them, and the manifest is replaced in one move."""

    _announced: tuple[Collection[str], Mapping[str, str], Mapping[str, Any]] | None = None

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder of the bundle's disk for what is being made; gone afterwards, whatever happens."""
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=self.root) as folder:
            yield Path(folder)

    def install(self, folder: Path, entry: EngineEntry) -> None:
        """Move a finished engine's `folder` into place and name it in the manifest; drop the one it replaces.

        The entry's file paths are relative to `folder`.
        """
        self.adopt()
        digest = hashlib.sha256("".join(file.sha256 for file in entry.files()).encode()).hexdigest()
        home = f"{ENGINES}/{entry.name}-{digest[:12]}"
        target = self.root / home
        target.parent.mkdir(exist_ok=True)
        if target.exists():  # made again: set aside in one move, so that it is not half removed when something fails
            move(target, folder.with_name(f"{folder.name}-replaced"))
        move(folder, target)
        graphs = {
            name: replace(
                graph,
                plan=replace(graph.plan, path=f"{home}/{graph.plan.path}"),
                weights=replace(graph.weights, path=f"{home}/{graph.weights.path}") if graph.weights else None,
            )
            for name, graph in entry.graphs.items()
        }
        engines = {**self.manifest.engines, entry.name: replace(entry, graphs=graphs).sealed()}
        self.update(engines=dict(sorted(engines.items())))  # whichever was finished first
        self.sweep()

    def sweep(self) -> None:
        """Remove engines that the manifest does not name: replaced, another checkpoint's, or of a builder that died."""
        files = [Path(file.path) for entry in self.manifest.engines.values() for file in entry.files()]
        named = {path.parts[1] for path in files if len(path.parts) > 1}
        for folder in (self.root / ENGINES).glob("*-*"):
            ours = re.fullmatch(rf"({'|'.join(CATALOG)})-[0-9a-f]{{12}}", folder.name)
            if ours and folder.name not in named:
                shutil.rmtree(folder, ignore_errors=True)

    def announce(self, foreign: Collection[str], tokenizers: Mapping[str, str], **changes: Any) -> None:
        """What the engines of one checkpoint share, to be adopted with the first that is installed.

        Those of another checkpoint, `foreign`, go with it. Until then the bundle is what it was; one without engines
        adopts at once.
        """
        self._announced = (foreign, tokenizers, changes)
        if not self.manifest.engines:
            self.adopt()

    def adopt(self) -> None:
        """Do what was announced, if it was not done yet."""
        if self._announced is None:
            return
        foreign, tokenizers, changes = self._announced
        engines = {name: entry for name, entry in self.manifest.engines.items() if name not in foreign}
        self.update(engines=engines, **changes)
        for name, text in tokenizers.items():
            self.install_tokenizer(name, text)
        self._announced = None

    def install_tokenizer(self, name: str, text: str) -> None:
        path = self.root / TOKENIZERS / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, text.encode())
        entry = FileEntry(f"{TOKENIZERS}/{name}.json", hash_file(path), path.stat().st_size)
        self.update(tokenizers={**self.manifest.tokenizers, name: entry})

    def update(self, **changes: Any) -> None:
        self.manifest = replace(self.manifest, **changes)
        write_atomically(self.root / MANIFEST, self.manifest.to_json().encode())


def move(source: Path, target: Path) -> None:
    """`os.replace`, with patience on Windows, where what scans or synchronises new files holds them for a moment."""
    end = time.monotonic() + (_PATIENCE if sys.platform == "win32" else 0)
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.1)


def write_atomically(path: Path, content: bytes) -> None:
    """Two processes may write one file: it is then the one's or the other's, whole."""
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(4)}-{path.name}")
    try:
        temporary.write_bytes(content)
        move(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
