"""peft: `merge_and_unload` of a linear layer with LoRA."""

import torch
from peft import LoraConfig, get_peft_model


def lora_merge(weight, a, b, alpha, scaling):
    rank = len(a)
    inner = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64))
    inner[0].weight.data = torch.tensor(weight)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], use_rslora=scaling == "root", lora_dropout=0.0)
    model = get_peft_model(inner, config)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data = torch.tensor(a)
    layer.lora_B["default"].weight.data = torch.tensor(b)
    return {"merged": model.merge_and_unload()[0].weight}
