"""Countdown with numbers up to 20, for evaluation: no page of the corpus and no step of training has them."""

from bessemer.addons.tasks.drawn_countdown import DrawnCountdown


class Larger(DrawnCountdown):
    name = "larger-numbers"

    def __init__(self, **settings: object) -> None:
        super().__init__("3", **{"largest": 20} | settings)
        self.name = "larger-numbers"
