"""A trainer's config and plan from one set of values."""

from dataclasses import fields

from bessemer.config.training import PretrainConfig
from bessemer.config.units import Points
from bessemer.train.plan import TrainingPlan, constant

SCHEDULES = ("batch_rows", "row_scale", "gamma")


def train_config(eps: float = 1e-8, **values) -> tuple[PretrainConfig, TrainingPlan]:
    """(config, plan). Values that `TrainingPlan` names go into it, a number as a constant schedule; the others are
    keys of a pre-training stage. No checkpoints by time unless `save_seconds` is given."""

    class Config(PretrainConfig):
        pass

    Config.eps = eps
    plan = {field.name: values.pop(field.name) for field in fields(TrainingPlan) if field.name in values}
    for name in SCHEDULES:
        if isinstance(plan.get(name), int | float):
            plan[name] = constant(plan[name])
    plan["terms"] = {
        name: constant(value) if isinstance(value, int | float) else value
        for name, value in plan.get("terms", {}).items()
    }
    lr = Points(values.pop("lr", 1e-3))
    return Config(kind="pretrain", lr=lr, **({"save_seconds": 1e9} | values)), TrainingPlan(**plan)
