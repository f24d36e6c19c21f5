"""The heatmap shows the table it is given, and its file is the same each time."""

import numpy as np
import pytest
from synthetic import add_model_losses, make_allocation, make_profile

from lexi_search.artifacts.profile import LOSS_KINDS
from lexi_search.cli.plots import draw_heatmap, draw_history, render
from lexi_search.errors import InputError

SKIPPED_FIRST = {"num_hidden_layers": 62, "moe_layers": tuple(range(1, 62))}


@pytest.mark.parametrize("loss", LOSS_KINDS)
@pytest.mark.parametrize("normalised", [True, False])
def test_heatmap_shows_the_table(loss, normalised):
    profile = add_model_losses(make_profile(5, 3))
    axes, colourbar = draw_heatmap(profile, loss=loss, normalised=normalised).axes
    [image] = axes.images
    np.testing.assert_array_equal(image.get_array().T, profile.losses(loss, normalised=normalised))
    assert image.origin == "lower"
    assert image.get_extent() == [-0.5, 4.5, 0.5, 3.5]
    assert (image.get_array().max() == 1) == normalised
    assert ("relative" in colourbar.get_ylabel()) == normalised


def test_ticks_name_decoder_layers_and_stay_apart():
    figure = draw_heatmap(make_profile(61, 8, **SKIPPED_FIRST))
    axes = figure.axes[0]
    labels = dict(zip(axes.get_xticks(), (tick.get_text() for tick in axes.get_xticklabels()), strict=True))
    assert all(int(label) == position + 1 for position, label in labels.items())
    figure.draw_without_rendering()
    boxes = [tick.get_window_extent() for tick in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))


def test_allocations_are_steps_at_their_k():
    allocations = {"one": make_allocation(6, 4), "two": make_allocation(6, 4, gate_exponent=0.5)}
    axes = draw_heatmap(make_profile(6, 4), allocations).axes[0]
    assert len(axes.patches) == 2
    for patch, allocation in zip(axes.patches, allocations.values(), strict=True):
        values, edges, _ = patch.get_data()
        np.testing.assert_array_equal(np.round(values), [allocation.top_k[layer] for layer in range(6)])
        np.testing.assert_array_equal(edges, np.arange(7) - 0.5)
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["one, B = 13", "two, B = 13"]


def test_allocation_of_another_model_is_refused():
    with pytest.raises(InputError, match="allocation mine is for another model than the profile"):
        draw_heatmap(make_profile(6, 4), {"mine": make_allocation(6, 4, router_sha256="f" * 64)})


@pytest.mark.parametrize("file_format, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_files_are_the_same_each_time(file_format, start):
    draw = lambda: render(draw_heatmap(make_profile(61, 8, **SKIPPED_FIRST)), file_format)  # noqa: E731
    first = draw()
    assert first.startswith(start)
    assert draw() == first
    assert b"Date" not in first and b"dc:date" not in first


@pytest.mark.parametrize("file_format", ["jpg", "", "eps"])
def test_other_formats_are_refused(file_format):
    with pytest.raises(InputError, match="name a file in .png, .svg or .pdf"):
        render(draw_heatmap(make_profile()), file_format)


def test_small_losses_stay_apart_on_the_default_loss():
    """Divergences span decades: on a linear scale all cells but a few would have one colour."""
    profile = add_model_losses(make_profile(5, 8))
    image = draw_heatmap(profile).axes[0].images[0]
    shades = image.norm(profile.losses("divergence", normalised=True))
    assert sum(0.2 < shade < 0.9 for shade in np.ravel(shades)) > 20
    assert draw_heatmap(profile, loss="frobenius").axes[0].images[0].norm(0.5) == 0.5


def test_titles_name_the_model():
    figure = draw_heatmap(make_profile(5, 3))
    assert figure.get_suptitle() == "olmoe, 5 MoE layers of 6 experts, k = 3: loss of each layer at each k"


def test_a_history_has_two_lines_for_each_budget():
    budgets = {"64": {"best": [3.0, 2.0], "mean": [5.0, 4.0]}, "8": {"best": [9.0, 8.0], "mean": [9.5, 9.0]}}
    [axes] = draw_history(budgets, title="olmoe", loss="rms").axes
    drawn = [line.get_ydata().tolist() for line in axes.lines]
    assert drawn == [[9.0, 8.0], [9.5, 9.0], [3.0, 2.0], [5.0, 4.0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["B = 8", "B = 64"]


def test_a_profile_without_any_loss_can_be_drawn():
    profile = make_profile(3, 1)
    assert render(draw_heatmap(profile), "png")


def test_names_of_files_are_shown_as_they_are():
    names = ("$x^$.json", "_a.json", "caf\udce9 $y_$.json")
    figure = draw_heatmap(dict.fromkeys(names, make_profile()), dict.fromkeys(names, make_allocation()))
    assert render(figure, "svg")
    spelt = ("$x^$.json", "_a.json", "caf\\udce9 $y_$.json")
    assert tuple(axes.get_title("left") for axes in figure.axes[:3]) == tuple(
        f"frobenius loss, input paper ({name})" for name in spelt
    )
    shown = [text.get_text().partition(",")[0].removeprefix("./") for text in figure.legends[0].get_texts()]
    assert tuple(shown) == spelt
