"""Errors in collective operations, to plant in a rehearsal's ranks: each is a `Wrap`."""

import functools

import torch
import torch.distributed as dist


def _group(arguments, options):
    named = [value for value in arguments if isinstance(value, dist.ProcessGroup)]
    return options.get("group") or (named[0] if named else dist.group.WORLD)


def _changed_input(wanted, position, change):
    """A wrap that gives the operation `wanted` a changed copy of its input."""

    def wrap(operation, function):
        if operation != wanted:
            return function

        @functools.wraps(function)
        def planted(*arguments, **options):
            arguments = [*arguments]
            arguments[position] = change(arguments[position], _group(arguments, options))
            return function(*arguments, **options)

        return planted

    return wrap


def _changed_output(wanted, position, change):
    """A wrap that changes what a blocking operation `wanted` has received."""

    def wrap(operation, function):
        if operation != wanted:
            return function

        @functools.wraps(function)
        def planted(*arguments, **options):
            done = function(*arguments, **options)
            if done is None:
                change(arguments[position], _group(arguments, options))
            return done

        return planted

    return wrap


def _own_part_twice(parts, group):
    n, me = dist.get_world_size(group), dist.get_rank(group)
    doubled = parts.clone()
    doubled.view(n, -1)[me] *= 2
    return doubled


def _divided(tensor, group):
    if tensor.is_floating_point():
        tensor /= dist.get_world_size(group)


def _shifted(received, group):
    if received.dim() > 1 and len(received) > 1:
        received.copy_(received.roll(1, 0))


def _other_order(out, group):
    n = dist.get_world_size(group)
    if out.is_floating_point() and out.numel() % n == 0:
        out.copy_(out.view(n, -1).flip(0).reshape(out.shape))


def _rounded(tensor, group):
    return tensor.to(torch.bfloat16).to(tensor.dtype) if tensor.dtype == torch.float32 else tensor


def _old_weights(operation, function):
    """Of the all-gathers that nobody waits for at once, which bring updated weights, the result is lost."""
    if operation != "all-gather":
        return function

    @functools.wraps(function)
    def planted(out, *arguments, **options):
        return function(out.clone() if options.get("async_op") else out, *arguments, **options)

    return planted


PLANTED = {
    "a reduce-scatter adds its own part twice": _changed_input("reduce-scatter", 1, _own_part_twice),
    "an all-reduce gives the mean in place of the sum": _changed_output("all-reduce", 0, _divided),
    "an all-to-all delivers its rows one place on": _changed_output("all-to-all", 0, _shifted),
    "messages between stages are rounded to BF16": _changed_input("send", 0, _rounded),
    "a reduce-scatter rounds its input to BF16": _changed_input("reduce-scatter", 1, _rounded),
    "an all-gather leaves the old weights": _old_weights,
    "a reduce-scatter gives the mean in place of the sum": _changed_input(
        "reduce-scatter", 1, lambda parts, group: parts / dist.get_world_size(group)
    ),
}
"""By what they do."""
