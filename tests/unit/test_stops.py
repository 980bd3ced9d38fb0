"""Stop strings over every way of cutting a text into pieces, against a search over the whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hob.api.stops import StopFinder

STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


@given(st.lists(st.text("abc", max_size=4), max_size=12), STOPS)
def test_agrees_with_a_search_over_the_whole(pieces: list[str], stops: list[str]) -> None:
    finder, shown = StopFinder(stops), ""
    for piece in pieces:
        shown += finder.push(piece)
        if finder.is_found:
            break
    shown += finder.flush()
    text = "".join(pieces)
    assert finder.is_found == any(stop in text for stop in stops)
    assert not any(stop in shown for stop in stops)
    assert text.startswith(shown)
    rest = text[len(shown) :]
    assert any(rest.startswith(stop) for stop in stops) if finder.is_found else not rest


@given(st.text("abc", max_size=20), STOPS)
def test_holds_back_what_may_become_a_stop_and_no_more(text: str, stops: list[str]) -> None:
    finder, shown = StopFinder(stops), ""
    for i, char in enumerate(text, start=1):
        shown += finder.push(char)
        if finder.is_found:
            return
        seen = text[:i]
        beginnings = {seen[k:] for k in range(i) if any(stop.startswith(seen[k:]) for stop in stops)}
        assert seen[len(shown) :] == max(beginnings, key=len, default="")
