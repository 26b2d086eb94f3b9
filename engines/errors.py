"""Errors that a user can act on: each message says what was given, what is allowed and what to do."""


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
