"""The folder a run ends with: weights and tokenizer as `from_pretrained` loads them, and a model card."""

from __future__ import annotations

import dataclasses
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from accelerate import Accelerator

import memzoo

from .run import FINAL
from .settings import Settings


def export(accelerator: Accelerator, model: Any, tokenizer: Any, settings: Settings, facts: dict[str, Any]) -> Path:
    """Write `final/` under a temporary name and rename it. Call it in every process: sharded weights are gathered."""
    target = Path(settings.output) / FINAL
    temporary = target.with_name("." + FINAL + ".tmp")
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        plain = accelerator.unwrap_model(model)
        plain.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card(plain, settings, facts))
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    accelerator.wait_for_everyone()
    return target


def model_card(model: Any, settings: Settings, facts: dict[str, Any]) -> str:
    """README.md of the final folder. `facts` are lines of the results: tokens, losses, time."""
    config = model.config
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["memzoo", config.model_type],
    }
    used = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.metadata["group"] in ("data", "optimisation", "machine") and getattr(settings, field.name) not in ("", {})
    }
    parameters = sum(p.numel() for p in model.parameters())
    results = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {Path(settings.output).resolve().name}

A causal language model of architecture `{config.model_type}` with {parameters:,} parameters ({config.num_hidden_layers} layers of width
{config.hidden_size}, vocabulary {config.vocab_size:,}), trained with memzoo {memzoo.__version__} from
`{settings.model}` on `{settings.dataset}`.

## Use

```python
import memzoo  # registers its architectures with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))
```

## Results

| | |
|---|---|
{results}

## Training settings

```yaml
{yaml.safe_dump(used, sort_keys=False)}```

`scripts/train.py --config settings.yaml` of the run's folder repeats it. Made with torch {torch.__version__}, transformers
{transformers.__version__}, Python {platform.python_version()}.
"""


def _cell(value: Any) -> str:
    return f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
