"""An environment of verifiers with one turn, a system prompt and two rewards."""

import verifiers.v1 as vf

__all__ = ["SumOnce"]


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.25)
    async def brief(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) < 8)


class SumConfig(vf.TasksetConfig):
    count: int = 60


class SumOnce(vf.Taskset[SumTask, SumConfig]):
    def load(self):
        for n in range(self.config.count):
            data = SumData(prompt=f"{n}+{n}=", system_prompt="Answer with the number.", answer=str(2 * n))
            yield SumTask(data, self.config.task)
