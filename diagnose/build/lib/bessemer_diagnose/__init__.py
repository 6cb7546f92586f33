"""What the metrics of an RL run say is going wrong: the alarms of our own runs, and `bessemer diagnose` on the logs of
other trainers.

The modules import the standard library and each other, relatively, and nothing else: `diagnose/pyproject.toml` builds
them as a distribution of their own, `bessemer-diagnose`, for people who use neither torch nor Bessemer.
"""
