"""Shared by several of the scheduler's tests."""

from bessemer.addons.serve.requests import Token


def drain(scheduler, late=(), every=3):
    """Steps until idle, adding a late request every few steps. {ticket: (tokens, Finished)}, tickets in order."""
    late, actual, tickets, n = list(late), {}, [], 0
    while late or not scheduler.is_idle:
        if late and n % every == 0:
            tickets.append(scheduler.add(late.pop(0)))
        for event in scheduler.step():
            tokens, _ = actual.setdefault(event.ticket, ([], None))
            if isinstance(event, Token):
                tokens.append(event)
            else:
                actual[event.ticket] = (tokens, event)
        n += 1
        assert n < 5000, "no progress"
    return [actual[ticket] for ticket in tickets], actual
