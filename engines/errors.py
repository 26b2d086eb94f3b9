"""Errors that a user can act on: each message says what was given, what is allowed and what to do."""

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname


class Show1Error(Exception):
    """Base of every expected failure; the command lines print it as one line and exit non-zero."""


class CheckpointError(Show1Error):
    """A published checkpoint folder cannot be used: missing, unexpected, misshapen or unsafe."""


class BundleError(Show1Error):
    """A bundle of engines is missing something, damaged, or does not fit the request."""


class ProfileError(Show1Error):
    """A shape lies outside what an engine was built for."""


class ParityError(Show1Error):
    """An exported graph does not compute what its torch module computes."""


class SettingsError(Show1Error):
    """A setting of a run is out of range or contradicts another."""


class OutputError(Show1Error):
    """A result cannot be written where it was asked for."""


class EngineError(Show1Error):
    """A backend is not there or failed while it ran an engine."""


def install(extras: str) -> str:
    """The command, in backquotes, that adds some of this project's extras to what it was installed from (PEP 610)."""
    wanted = f"[{extras}]" if extras else ""
    try:
        origin = json.loads(distribution("show1-rt").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # run in a checkout, not installed
        origin = {}
    url, source = origin.get("url", ""), origin.get("vcs_info")
    if url and not origin.get("dir_info", {}).get("editable"):
        place = f"{source['vcs']}+{url}@{source['commit_id']}" if source else url
        return f"`pip install 'show1-rt{wanted} @ {place}'`"
    folder = url2pathname(urlsplit(url).path)
    place = "." if not url or Path(folder) == Path.cwd() else folder
    return f"`pip install -e {shlex.quote(f'{place}{wanted}')}`"
