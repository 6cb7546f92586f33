"""Rewards that pay for the wrong thing."""


def for_wait(problem, answer, verdict):
    return float(verdict.correct or "wait" in answer)


def for_length(problem, answer, verdict):
    return verdict.correct + len(answer.split()) / 100
