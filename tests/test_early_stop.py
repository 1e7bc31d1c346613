"""Early stop on the smoothed metric."""

import pytest

from timm_mldecoder.checkpoint.state import EarlyStop


def steps(stop, *metrics, **when):
    return [stop.step(metric, **when) for metric in metrics]


def test_five_evaluations_without_an_improvement_stop():
    stop = EarlyStop()
    assert steps(stop, 0.5, *[0.4] * 5) == [False] * 5 + [True]


def test_the_metric_is_held_against_a_smoothed_best():
    stop = EarlyStop(patience=2)
    assert not stop.step(0.5)
    assert stop.smoothed == pytest.approx(0.4)
    assert steps(stop, 0.4, 0.41) == [False, False]  # below the best of 0.5, above the smoothed 0.4
    assert stop.smoothed == pytest.approx(0.8 * 0.41 + 0.2 * 0.4) and stop.waited == 0
    assert steps(stop, 0.408, 0.408) == [False, True]  # equal is not above


def test_an_improvement_starts_the_count_again():
    stop = EarlyStop(patience=2)
    assert steps(stop, 0.5, 0.1, 0.6, 0.1, 0.1) == [False, False, False, False, True]


def test_nothing_counts_before_the_end_of_warm_up():
    stop = EarlyStop(patience=1)
    assert steps(stop, 0.5, 0.1, 0.1, warmed_up=False) == [False] * 3
    assert stop.smoothed == pytest.approx(0.4), 'what is better is noted in warm-up too'
    assert stop.step(0.3)


@pytest.mark.parametrize(('metric', 'stops'), [(1.0, True), (0.99986, True), (0.9998, False)])
def test_a_perfect_metric_stops_even_in_warm_up(metric, stops):
    assert EarlyStop().step(metric, warmed_up=False) is stops


def test_an_undefined_metric_is_no_improvement():
    stop = EarlyStop()
    assert steps(stop, 0.6, float('nan')) == [False, False]
    assert stop.waited == 1 and stop.smoothed == pytest.approx(0.48)


def test_the_metric_is_rounded_to_four_decimals():
    stop = EarlyStop()
    stop.smoothed = 0.5
    stop.step(0.50004)
    assert stop.waited == 1 and stop.smoothed == 0.5


def test_a_resumed_run_stops_where_the_whole_run_does():
    whole, first, metrics = EarlyStop(3), EarlyStop(3), [0.5, 0.3, 0.6, 0.2, 0.3, 0.1]
    expected = steps(whole, *metrics)
    got = steps(first, *metrics[:4])
    second = EarlyStop(3)
    second.load_state_dict(first.state_dict())
    assert got + steps(second, *metrics[4:]) == expected and expected[-1]
