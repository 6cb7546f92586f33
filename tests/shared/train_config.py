"""A trainer's config and runtime from one set of values."""

from dataclasses import fields

from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.train.trainer import Runtime, constant

SCHEDULES = ("batch_rows", "row_scale", "gamma")


def train_config(eps: float = 1e-8, **values) -> tuple[PretrainConfig, Runtime]:
    """(config, runtime). Values that `Runtime` names go into it, where a number is a constant schedule; the others are
    keys of a pre-training stage. No checkpoints by time unless `save_seconds` is given."""

    class Config(PretrainConfig):
        pass

    Config.eps = eps
    runtime = {one.name: values.pop(one.name) for one in fields(Runtime) if one.name in values}
    for name in SCHEDULES:
        if isinstance(runtime.get(name), int | float):
            runtime[name] = constant(runtime[name])
    runtime["terms"] = {
        name: constant(value) if isinstance(value, int | float) else value
        for name, value in runtime.get("terms", {}).items()
    }
    lr = Points(values.pop("lr", 1e-3))
    return Config(kind="pretrain", lr=lr, **({"save_seconds": 1e9} | values)), Runtime(**runtime)
