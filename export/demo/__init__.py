"""The demo cascade: what it is trained on and how. `captions`, `judge` and `faithfulness` import without torch."""
