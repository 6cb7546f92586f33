"""DAPO's price of length (Yu et al. 2025, eq. 13): from 0 to -1 over the last `buffer` tokens before the cap."""


def overlong(samples, *, cap: int, buffer: int):
    over = [row.length - (cap - buffer) for row in samples.rows]
    return [-min(1.0, max(0.0, tokens / buffer)) for tokens in over]
