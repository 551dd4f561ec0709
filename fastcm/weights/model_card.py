"""The README.md of a model folder, from config.json alone, so that equal models have equal cards."""

from typing import Any

NOT_STATED = "not stated"


def hub_heading(form: str) -> str:
    """What the hub reads at the top of a card: the library, and the kind of task."""
    return f"---\nlibrary_name: {form}\npipeline_tag: unconditional-image-generation\ntags:\n- fastcm\n- consistency-model\n---\n\n"


def model_card(config: dict[str, Any], *, weights: str = "model.safetensors") -> str:
    """Markdown for the content of a model folder's config.json. weights: the file that holds them."""
    noise, training = config["preconditioning"], config.get("training") or {}
    low, is_teacher = noise.get("transition") or noise["sigma_min"], training.get("method", noise["form"]) == "edm"
    classes = config.get("classes")
    facts = {
        "kind": "diffusion model (a teacher for distillation)" if is_teacher else "consistency model (one network call per image)",
        "images": f"{config.get('resolution')}x{config.get('resolution')} pixels, {config.get('channels')} channels",
        "classes": f"{len(classes)}: {', '.join(map(str, classes[:10]))}{' ...' if len(classes) > 10 else ''}" if classes else "none",
        "network": str(config["network"].get("kind")),
        "noise levels": f"sigma from {low:g} to {noise['sigma_max']:g}, sigma_data {noise['sigma_data']:g}",
        "method": training.get("method", NOT_STATED),
        "training data": training.get("data", NOT_STATED),
        "images seen": f"{training['nimg']:,}" if "nimg" in training else NOT_STATED,
        "seed": training.get("seed", NOT_STATED),
        "licence": config.get("licence") or NOT_STATED,
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    sampler = "--sampler heun --steps 18" if is_teacher else "--steps 1"
    return f"""# A fastcm model

| | |
|---|---|
{rows}

The weights in `{weights}` are fp32; `config.json` holds everything else. Nothing here is executed when it is loaded.

```
fastcm sample . --seeds 0-63 {sampler} --out samples.png
fastcm evaluate . --data {training.get("data", "DATA")}
```
"""
