"""A stage that writes how large the files of the model before it are."""

from bessemer.config.table import StageConfig
from bessemer.pipeline.stage import Stage


class SizeConfig(StageConfig):
    unit: int = 1_000_000  # bytes


class Size(Stage[SizeConfig]):
    def run(self, config, ctx):
        size = sum(file.stat().st_size for file in (ctx.source / "model").iterdir()) / config.unit
        (ctx.dir / "size.txt").write_text(f"{size:.3f}\n")
        return {"size": round(size, 3)}
