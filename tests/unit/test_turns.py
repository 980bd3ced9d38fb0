"""Several models share the processor: whose step is next, and what a stream on one feels of the others."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from tests.models_world import MB, House

from hob.request import ServiceClass
from hob.service.turns import Claim, Turn, Turns

INTERACTIVE, STANDARD, BACKGROUND = ServiceClass.INTERACTIVE, ServiceClass.STANDARD, ServiceClass.BACKGROUND


def gaps_of(house: House, name: str) -> list[float]:
    times = house.times[name]
    return sorted(b - a for a, b in pairwise(times))


def stream_with(*others: tuple[str, ServiceClass], turns: Turns | None = None) -> House:
    """An interactive stream on model a, and four requests each on other models that begin with it."""
    house = House(dict.fromkeys("abc", MB))
    house.residents.turns = turns or house.residents.turns
    for name in "abc":
        house.ask(f"warm-{name}", name, max_tokens=2)
    house.run()
    house.ask("stream", "a", num_prompt=30, max_tokens=200, service_class=INTERACTIVE, app="chat")
    for model, service_class in others:
        for i in range(4):
            house.ask(
                f"{model}{i}", model, num_prompt=1500 + i, max_tokens=64, service_class=service_class, app=f"job{i}"
            )
    while not house.is_done("stream"):
        house.step()
    return house


def test_a_stream_on_one_model_keeps_its_pace_beside_another() -> None:
    alone = gaps_of(stream_with(), "stream")
    for others in ([("a", BACKGROUND)], [("b", BACKGROUND)], [("a", BACKGROUND), ("b", BACKGROUND), ("c", STANDARD)]):
        beside = gaps_of(stream_with(*others), "stream")
        p95 = int(0.95 * len(alone))
        assert beside[p95] <= 2.2 * alone[p95], others


def test_the_work_on_another_model_goes_on_beside_a_stream() -> None:
    beside = stream_with(("b", BACKGROUND))
    seconds = beside.times["stream"][-1] - beside.times["stream"][0]
    b = beside.residents.get("b")
    assert b is not None
    assert b.scheduler.stats().step_s > 0.35 * seconds


class FullTurns(Turns):
    """Models alternate, with steps as long as their schedulers say."""

    def order(self, now: float, claims: Sequence[Claim]) -> list[Turn]:
        super().order(now, claims)
        return [Turn(c.name) for c in sorted(claims, key=lambda c: self._last[c.name])]


def test_without_turns_a_stream_would_feel_it() -> None:
    """Positive control: models that alternate with full steps break the pace."""
    fair, full = (stream_with(("b", BACKGROUND), turns=turns) for turns in (None, FullTurns(2.0, 0.045)))
    p95s = [gaps[int(0.95 * len(gaps))] for gaps in (gaps_of(fair, "stream"), gaps_of(full, "stream"))]
    assert p95s[1] > 2 * p95s[0]


def test_equal_apps_on_two_models_get_equal_time() -> None:
    house = House(dict.fromkeys("ab", MB))
    for i in range(40):
        for model, app in (("a", "x"), ("b", "y")):
            house.ask(f"{model}{i}", model, num_prompt=400 + i, max_tokens=20, app=app)
    end = house.clock.now + 5
    while house.clock.now < end:
        house.step()
    spent = []
    for name in "ab":
        resident = house.residents.get(name)
        assert resident is not None
        spent.append(resident.scheduler.stats().step_s)
    assert spent[0] == pytest.approx(spent[1], rel=0.15)


def test_an_app_pays_for_its_time_on_all_models() -> None:
    """App x works on both models, y on one: they share that one so that both have had the same in all."""
    house = House(dict.fromkeys("ab", MB))
    for i in range(60):
        house.ask(f"ax{i}", "a", num_prompt=400 + i, max_tokens=20, app="x")
        house.ask(f"bx{i}", "b", num_prompt=500 + i, max_tokens=20, app="x")
        house.ask(f"by{i}", "b", num_prompt=600 + i, max_tokens=20, app="y")
    end = house.clock.now + 6
    while house.clock.now < end:
        house.step()
    seconds = {"x": 0.0, "y": 0.0}
    for resident in house.residents:
        for app in resident.scheduler.stats().apps:
            seconds[app.app] += app.compute_s
    assert seconds["x"] == pytest.approx(seconds["y"], rel=0.25)


def test_a_lesser_class_on_another_model_does_not_starve() -> None:
    house = House(dict.fromkeys("ab", MB))
    for i in range(200):
        house.ask(f"a{i}", "a", num_prompt=300 + i, max_tokens=50, app="busy")
    house.ask("poor", "b", num_prompt=100, max_tokens=5, service_class=BACKGROUND, app="poor")
    end = house.clock.now + 30
    while house.clock.now < end and not house.is_done("poor"):
        house.step()
    assert house.is_done("poor")


def test_the_order_of_claims() -> None:
    turns = Turns(urgent_stretch=2.0, max_step_s=0.045)
    chat, job, other = (
        Claim("a", INTERACTIVE, 5.0),
        Claim("b", BACKGROUND, 0.0),
        Claim("c", STANDARD, 9.0),
    )
    assert [turn.name for turn in turns.order(0.0, [job, other, chat])] == ["a", "c", "b"]
    turns.took(chat, 0.010, 0.01, is_contended=True)
    first = turns.order(0.01, [job, other, chat])[0]
    assert (first.name, first.max_step_s) == ("c", 0.010)
    turns.took(other, 0.012, 0.022, is_contended=True)
    assert turns.order(0.022, [job, other, chat])[0].name == "a"
