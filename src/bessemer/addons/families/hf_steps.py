"""The step backend of foreign models. `hf_decode` needs transformers, so it is imported for such a model alone."""

from __future__ import annotations

from bessemer.addons.families.causal_lm import CausalLM
from bessemer.engine.steps import StepBackend, register
from bessemer.model.protocol import LanguageModel


@register
def steps_of(model: LanguageModel) -> StepBackend | None:
    if not isinstance(model, CausalLM):
        return None
    from bessemer.addons.families.hf_decode import ForeignSteps

    return ForeignSteps(model)
