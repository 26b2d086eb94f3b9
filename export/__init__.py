"""From published checkpoints to a bundle of engines: load, trace, check, compile, verify."""
