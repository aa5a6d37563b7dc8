"""The demo application: what its buttons do, and where and how it listens."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

import pytest

gr = pytest.importorskip("gradio")
sys.path.insert(0, str(Path(__file__).parents[1]))
from demos import app  # noqa: E402


def test_look_classifies_and_maps_every_stage():
    for name, classes in (("dinat_world", 24), ("dinat_digits", 10)):
        found, maps = app.look(app.draw_scene("single", 1), name)
        assert len(found) == classes and sum(found.values()) == pytest.approx(1, abs=1e-4)
        assert len(maps) == len(app.load(name).feature_info)


def test_compare_draws_dense_first_and_switches_off_again():
    first, second = list(app.compare("a red circle", 0, 3, 6, 1))
    assert first[1] is None and (second[0] == first[0]).all() and (second[0] != second[1]).any()
    assert (list(app.compare("a red circle", 0, 3, 16, 1))[1][1] == first[0]).all()


def test_ask_answers_plainly_and_edited():
    plain, edited, changed = app.ask(app.draw_scene("broken", 3), "<image>Describe the image.", "pai", 0.5)
    assert plain.startswith("a photo of") and edited.startswith("a photo of") and "no longer named" in changed


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda: app.look(None, "dinat_world"), "picture"),
        (lambda: app.ask(None, "hello", "pai", 0.5), "picture"),
        (lambda: app.ask(app.draw_scene("broken", 0), "  ", "pai", 0.5), "prompt"),
        (lambda: list(app.compare("a purple giraffe", 0, 3, 6, 1)), "purple"),
        (lambda: list(app.compare("a red circle", 0, 3, 2, 5)), "stride"),
    ],
)
def test_bad_input_is_said_to_the_user(call, word):
    with pytest.raises(gr.Error, match=word):
        call()


def test_it_listens_on_this_machine_only_and_bounds_uploads():
    try:
        served, url, public = app.main(port=17861, block=False)
        assert url.startswith("http://127.0.0.1:") and public is None
        assert urllib.request.urlopen(url, timeout=30).status == 200
        assert served.get_blocks().max_file_size == 8 * 1024**2
    finally:
        gr.close_all()
