"""An environment of verifiers with a tool, which its own server runs."""

import verifiers.v1 as vf

__all__ = ["AddWithTool"]


class AddTools(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = None

    @vf.tool
    def add(self, a: int, b: int) -> str:
        """Adds two numbers."""
        return f"sum {a + b}"


class AddConfig(vf.TaskConfig):
    tools: vf.ToolsetConfig = vf.ToolsetConfig()


class AddTask(vf.Task[vf.TaskData, vf.State, AddConfig]):
    @classmethod
    def toolsets(cls, config: AddConfig) -> list[vf.Toolset]:
        return [AddTools(config.tools)]

    @vf.reward
    async def called(self, trace: vf.Trace) -> float:
        return float(any(message.content == "sum 42" for message in trace.tool_messages))


class AddTasksetConfig(vf.TasksetConfig):
    task: AddConfig = AddConfig()


class AddWithTool(vf.Taskset[AddTask, AddTasksetConfig]):
    def load(self):
        return [AddTask(vf.TaskData(prompt="What is 20+22?"), self.config.task)]


if __name__ == "__main__":
    AddTools.run()
