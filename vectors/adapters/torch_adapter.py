"""torch: the tables of `torch.distributed.pipelining`, built without a process group, and its E4M3."""

from types import SimpleNamespace

import torch
from torch.distributed.pipelining import schedules

CLASSES = {
    "1f1b": schedules.Schedule1F1B,
    "zb1p": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}
WORK = ("F", "B", "I", "W")


def pipeline_table(schedule, ranks, micro_batches):
    if schedule not in CLASSES:
        raise NotImplementedError("has no bidirectional DualPipe")
    if micro_batches < ranks * (2 if schedule == "dualpipev" else 1):
        raise NotImplementedError("as many micro-batches as stages, or more")
    each = 2 if schedule in ("zbv", "dualpipev") else 1
    stages = [
        SimpleNamespace(
            group_size=ranks,
            group_rank=0,
            num_stages=each * ranks,
            stage_index=i,
            is_last=False,
            submod=torch.nn.Identity(),
        )
        for i in range(each)
    ]
    table = CLASSES[schedule](stages[0] if schedule == "1f1b" else stages, micro_batches)
    order = [[action for action in table.pipeline_order[rank] if action is not None] for rank in range(ranks)]
    return {"actions": [[_step(action) for action in rank if _step(action)] for rank in order]}


def _step(action):
    """[[kind, stage, micro-batch, lane], ...]; nothing for messages and reductions."""
    return [
        [part.computation_type.value, part.stage_index, part.microbatch_index, 0]
        for part in action.sub_actions or (action,)
        if part.computation_type.value in WORK
    ]


def e4m3(x):
    if abs(x).max() >= 464:
        raise NotImplementedError("does not saturate: 464 and more become NaN")
    rounded = torch.tensor(x, dtype=torch.float32).to(torch.float8_e4m3fn)
    return {"values": rounded.double(), "codes": rounded.view(torch.uint8).long()}
