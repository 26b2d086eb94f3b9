"""What an engine is: its bindings and profiles, the bundle that holds it and the compilers that make it."""

import os

# ONNX Runtime tells its maker about every process and model unless this stands here before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
