"""Contracts of graphs: what fits a profile, and what is said of shapes that do not."""

import pytest

from engines.catalog import CATALOG, STAGES, networks_of
from engines.errors import ProfileError, SettingsError
from engines.spec import Axis, Binding, GraphSpec

SPEC = GraphSpec(
    "step",
    (Binding("sample", "float32", ("batch", 3, "height")), Binding("timestep", "float32", ("batch",))),
    (Binding("noise_pred", "float32", ("batch", 3, "height")),),
    {"batch": Axis(1, 2, 4), "height": Axis(8, 40, 80, multiple=8)},
)


@pytest.mark.parametrize(("size", "fits"), [(7, False), (8, True), (12, False), (80, True), (88, False)])
def test_an_axis_holds_multiples_between_its_limits(size: int, fits: bool) -> None:
    assert (size in Axis(8, 40, 80, multiple=8)) is fits


@pytest.mark.parametrize(("most", "narrowed"), [(64, 16), (16, 16), (12, 12)])
def test_a_narrowed_axis_ends_at_twice_what_is_tuned_for_or_where_it_did(most: int, narrowed: int) -> None:
    assert Axis(4, 8, most, multiple=4).narrowed() == Axis(4, 8, narrowed, multiple=4)


@pytest.mark.parametrize("limits", [(0, 1, 2), (3, 2, 4), (1, 5, 4), (8, 12, 16, 8)])
def test_limits_out_of_order_or_off_the_multiple_are_no_axis(limits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not a range"):
        Axis(*limits)


def test_shapes_within_the_profile_pass() -> None:
    SPEC.check("base", {"sample": (4, 3, 80), "timestep": (4,)})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"sample": (2, 3, 40)}, "base/step: input timestep is missing"),
        (
            {"sample": (2, 3, 40), "timestep": (3,)},
            r"timestep has shape \(3,\), wanted \[batch\] \(batch = 2, height = 40\)",
        ),
        ({"sample": (2, 4, 40), "timestep": (2,)}, r"sample has shape \(2, 4, 40\), wanted \[batch, 3, height\]"),
        ({"sample": (2, 3), "timestep": (2,)}, r"sample has shape \(2, 3\), wanted \[batch, 3, height\]"),
        ({"sample": (5, 3, 40), "timestep": (5,)}, r"batch 5 \(built for 1\.\.4\)\. Ask for a size"),
        (
            {"sample": (2, 3, 44), "timestep": (2,)},
            r"height 44 \(built for 8\.\.80 in steps of 8\)\. Ask for a size",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named_with_what_would(shapes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        SPEC.check("base", shapes)


def test_the_stages_have_all_networks_between_them() -> None:
    assert networks_of(["all"]) == list(CATALOG.values())
    assert [network for stage in STAGES for network in networks_of([stage])] == [
        network for stage in STAGES for network in CATALOG.values() if network.stage == stage
    ]
    assert {network.name for network in networks_of(["sr2", "text"])} == {
        "t5",
        "clip",
        "sr2",
        "vae_encoder",
        "vae_decoder",
    }


def test_an_unknown_stage_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="unknown stage sr3, vae; allowed: all, text, base, interp, sr1, sr2"):
        networks_of(["base", "vae", "sr3"])
