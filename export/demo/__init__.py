"""The demo cascade: what it is trained on and how. Only `captions` imports without torch."""
