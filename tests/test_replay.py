"""Videos made again from one engine on: the same as a whole run, by no more engines than that takes."""

from pathlib import Path

import numpy as np

from engines.store import Bundle
from export.replay import ORDER, Take, make_videos
from runtime.config import Settings
from runtime.engine import Engine, EnginePool
from runtime.pipeline import Show1Pipeline

SETTINGS = Settings(size=(112, 64), keyframes=2).with_steps({"base": 2, "interp": 2, "if2": 2, "sr1": 1, "sr2": 2})


def test_a_video_made_again_from_any_engine_on_is_the_whole_cascades(bundle: Path) -> None:
    with Show1Pipeline.from_bundle(bundle) as pipeline:
        expected = pipeline("a red circle", seed=7, settings=SETTINGS).frames
    opened: list[str] = []

    class Pool(EnginePool):
        def open(self, name: str) -> Engine:
            opened.append(name)
            return super().open(name)

    pool = Pool(Bundle.open(bundle), keep_loaded=True)
    takes = make_videos(pool, [Take("a red circle", 7, SETTINGS), Take("a blue ring", 8, SETTINGS)])
    assert opened == list(ORDER)  # each once for both
    np.testing.assert_array_equal(takes[0].frames, expected)
    before = dict(takes[0].made)
    for first in ("if2", "sr2", "vae_decoder"):
        opened.clear()
        (again,) = make_videos(pool, takes[:1], first)
        assert opened == list(ORDER[ORDER.index(first) :])
        np.testing.assert_array_equal(again.frames, expected)
        assert again.frames is not before["vae_decoder"]
    assert all(takes[0].made[name] is made for name, made in before.items()), "what was given stays as it was"
