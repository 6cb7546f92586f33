"""The planner's record of published runs is what this project computes for them."""

import pytest

from bessemer.addons.plan.hardware import read_toml
from bessemer_claims import planner_page


def test_the_record_of_published_runs():
    runs = [*planner_page.other_runs(), *planner_page.held_out()]
    ratios = [run.published / run.predicted for run in runs]
    assert read_toml("record.toml")["published"] == pytest.approx(ratios, abs=6e-4)
