"""Countdown with numbers up to 20, for evaluation: no page of a corpus and no step of RL has them (`filtering.py`)."""

from bessemer.addons.tasks.drawn_countdown import DrawnCountdown


class Larger(DrawnCountdown):
    name = "larger-numbers"

    def __init__(self, **settings: object) -> None:
        super().__init__("3", **{"largest": 20} | settings)
        self.name = "larger-numbers"
