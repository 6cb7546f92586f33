"""An environment of verifiers with several turns: its own loop answers "more" or "less" until the number is guessed."""

import verifiers.v1 as vf
from verifiers.v1.envs.single_agent import SingleAgentEnvConfig

__all__ = ["GuessEnv", "GuessNumber"]


class GuessData(vf.TaskData):
    number: int


class GuessTask(vf.Task[GuessData]):
    @vf.reward
    async def guessed(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == str(self.data.number))


class GuessNumber(vf.Taskset[GuessTask]):
    def load(self):
        return [GuessTask(GuessData(prompt="Guess my number.", number=n), self.config.task) for n in (3, 5, 7)]


class GuessEnv(vf.Env[SingleAgentEnvConfig]):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as talk:
            segment = await talk.turn()
            for _ in range(3):
                if segment.terminated or segment.last_reply == str(task.data.number):
                    return
                if segment.last_reply == "break":
                    raise ValueError("a bug of the environment")
                guess = int(segment.last_reply) if segment.last_reply.isdecimal() else 0
                segment = await talk.turn("more" if guess < task.data.number else "less")
