"""A denoiser to an ONNX file that is published only after ONNX Runtime has made torch's images with it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from fastcm.consistency.denoiser import Denoiser
from fastcm.errors import InputError, RunError, nearest, reason_of
from fastcm.export import publish
from fastcm.export.fusion import Fusion, fuse
from fastcm.export.merged_scales import merge_scales
from fastcm.export.onnx_metadata import CONFIG, metadata
from fastcm.export.parity import Comparison, check_images, cpu_run, variation
from fastcm.export.program import Program, build, example_inputs, export_program
from fastcm.export.quiet import quiet
from fastcm.export.structure import check_structure
from fastcm.export.targets import Target, chosen_opset, chosen_target
from fastcm.export.translations import translations
from fastcm.generation.frozen import can_fold
from fastcm.generation.generator import class_names
from fastcm.generation.guided import student_weight
from fastcm.generation.onnx_contract import DENOISE, GENERATE, SUPERRES, TASKS, TOLERANCE, Contract
from fastcm.generation.request import is_diffusion, noise_levels
from fastcm.networks.inference import with_guidance

# A protobuf message ends at 2 GiB; beyond this the weights go to a file of their own.
SINGLE_FILE_BYTES = 2**31 - 2**24
# The largest constant that is computed from others at export: the attentions' weights, cut into those of q, k and v.
FOLDED_ELEMENTS = 1 << 26
# Noise levels of an edit where none are asked for. The paper's grid has 39, and each is a copy of the network's nodes.
EDIT_STEPS = 4


class Exported(NamedTuple):
    """What `export_onnx` made: the file, its form and noise levels, and the comparisons with torch, one per batch size.

    config: the model's, as the file has it. reference: the fp32 program that it was compared with. variation: how much pixels change with
    the seed; below parity.VARIATION the comparisons say little. fusion: what ONNX Runtime's own optimisation made of it, None where it was
    not asked for.
    """

    path: Path
    contract: Contract
    sigmas: tuple[float, ...]
    config: dict
    target: str
    opset: int
    comparisons: list[Comparison]
    reference: Program
    variation: float
    fusion: Fusion | None = None


def export_onnx(
    denoiser: Denoiser,
    info: dict,
    *,
    out: Path,
    steps: int | None = None,
    sigmas: Iterable[float] | None = None,
    guidance: float | None = None,
    precision: str = "fp32",
    target: str = "ort",
    opset: int | None = None,
    batch: int | None = None,
    uint8: bool = False,
    task: str = GENERATE,
    factor: int | None = None,
    seeded: bool = False,
    optimize: bool = False,
) -> Exported:
    """Writes the whole generator, or an editing task, as `out`; onnx_contract.py says what the graph takes and gives.

    guidance: the weight of a student that was trained for several; its default where None.
    precision: "fp32", or "fp16" for half weights and activations; skip and output scaling, inputs and outputs stay fp32.
    target: "ort", "tensorrt", "web" or "mobile", which sets the opset and the form of GroupNorm. batch: fixed, or symbolic where None
    ("mobile": 1).
    task: "generate", "inpaint", "superres" with its `factor`, or "denoise": D(x, sigma, labels), of diffusion models too.
    seeded: seeds in the place of noise. optimize: see fusion.py; "ort" alone.
    Every file is checked (structure.py, parity.py) before it gets its name and its manifest; one that fails is an error and leaves nothing.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"a folder in --onnx: {out}. Give the name of a file.")
    if optimize and target != "ort":
        raise InputError(f"ONNX Runtime's operators for another runtime in --optimize: --target {target}. Leave --optimize out.")
    runtime = chosen_target(target, seeded=seeded)
    opset = chosen_opset(opset, runtime)
    if runtime.floats:
        _check_floats(denoiser, precision=precision, uint8=uint8, task=task)
        batch = 1 if batch is None else batch
    form = {"precision": precision, "batch": batch, "uint8": uint8, "task": task, "factor": factor, "seeded": seeded}
    form["floats"] = runtime.floats
    whole, levels, contract = graph_of(denoiser, info, steps=steps, sigmas=sigmas, guidance=guidance, **form)
    reference = build(whole, levels, contract._replace(precision="fp32"))
    program = reference if precision == "fp32" else build(whole, levels, contract)
    properties = metadata(whole, info, sigmas=levels, contract=contract)
    model = convert(program, contract, target=runtime, opset=opset, properties=properties)
    changes = variation(reference, contract)
    with publish.staging(out, option="--onnx") as folder:
        write(model, folder / out.name)
        del model, program
        check_structure(folder / out.name, contract, runtime)
        fusion = None
        if optimize:
            fusion = fuse(folder / out.name, contract)
            check_structure(folder / out.name, contract, runtime)
        comparisons = check_images(cpu_run(folder / out.name), reference, contract, name=out.name)
        config = json.loads(properties[CONFIG])
        exported = Exported(out, contract, levels, config, target, opset, comparisons, reference, changes, fusion)
        publish.write_manifest(folder, out, _manifest(exported, runtime))
        publish.publish(folder, out)
    return exported


def _check_floats(denoiser: Denoiser, *, precision: str, uint8: bool, task: str) -> None:
    """InputError for what a graph of floats cannot be."""
    if task == DENOISE:
        raise InputError("a noise level as an input for --target mobile in --task: denoise. Use another target.")
    if precision == "fp16":
        raise InputError("half precision for --target mobile in --precision: fp16. The converters make it: mnnconvert --fp16, pnnx fp16=1.")
    if uint8:
        raise InputError("bytes from a runtime of floats in --uint8: --target mobile. Leave it out: images are float32 in [-1, 1].")
    network = getattr(denoiser.network, "_orig_mod", denoiser.network)
    if getattr(getattr(network, "config", None), "num_classes", None) and not can_fold(network):
        name = type(network).__name__
        raise InputError(f"classes in a network whose embedding cannot be folded, for --target mobile: {name}. Use another target.")


def graph_of(
    denoiser: Denoiser, info: dict, *, steps: int | None, sigmas: Iterable[float] | None, task: str, guidance: float | None = None, **form
) -> tuple[Denoiser, tuple[float, ...], Contract]:
    """(plain denoiser, noise levels, contract) of what is asked for, checked. form: the other fields of the contract."""
    weight = student_weight(denoiser.network, info, guidance)
    if task == DENOISE:
        for option, value in (("--steps", steps), ("--sigmas", sigmas), ("--seeded", form["seeded"]), ("--uint8", form["uint8"])):
            if value not in (None, False):
                raise InputError(f"an option that a denoiser's graph has no place for: {option}. Leave it out: x and sigma are inputs.")
        return _plain(denoiser, weight), (), _contract(denoiser, info, steps=0, task=task, **form)
    if is_diffusion(info, denoiser.preconditioning):
        remedy = "Distil it first: fastcm train --method cd --teacher MODEL; or export its denoiser for a solver of yours: --task denoise."
        raise InputError(f"a diffusion teacher in MODEL: one call gives its mean image. {remedy}")
    if steps is None and sigmas is None and task != GENERATE:
        steps = EDIT_STEPS
    levels = noise_levels(steps, sigmas, denoiser.preconditioning, info.get("sampling"))
    gain = max(1.0, denoiser.coefficients(torch.tensor(levels)).c_out.abs().max().item())
    return _plain(denoiser, weight), levels, _contract(denoiser, info, steps=len(levels), task=task, gain=gain, **form)


def convert(program: Program, contract: Contract, *, target: Target, opset: int, properties: dict[str, str]):
    """The program as an onnx_ir.Model, without traces of the machine that exported it."""
    import onnx  # noqa: F401  (a missing package is named here, before torch wraps the error)
    import onnxscript  # noqa: F401

    inputs = example_inputs(contract)
    try:
        with quiet(), torch.no_grad():
            exported = torch.onnx.export(
                export_program(program, inputs),
                dynamo=True,
                input_names=list(contract.inputs),
                output_names=["images"],
                dynamic_shapes=tuple({0: "batch"} for _ in inputs) if contract.batch is None else None,
                opset_version=opset,
                custom_translation_table=translations(opset, target.table),
                optimize=True,
                external_data=False,
                verbose=False,
            )
    except Exception as error:
        reason = reason_of(error)
        name = type(program.levels[0].network).__name__
        raise RunError(f"torch cannot export the network {name}: {reason}. Nothing was written.") from error
    model = _clean(exported.model, properties, target)
    model.ir_version = lowest_ir_version(model.opset_imports)
    return model


def lowest_ir_version(opsets: Mapping[str, int]) -> int:
    """The oldest version of the file format that has the opsets: what reads them reads the file. Torch writes its newest."""
    from onnx import helper

    ids = [helper.make_operatorsetid(domain, version) for domain, version in opsets.items()]
    return helper.find_min_ir_version_for(ids, ignore_unknown=True)


def _contract(denoiser: Denoiser, info: dict, **form) -> Contract:
    """The form that is asked for, checked."""
    config = getattr(denoiser.network, "config", None)
    channels, resolution = info.get("channels") or config.in_channels, info.get("resolution") or config.resolution
    for option, value, choices in (("--precision", form["precision"], TOLERANCE), ("--task", form["task"], TASKS)):
        if value not in choices:
            raise InputError(f"unknown value in {option}: {value}. Use one of {', '.join(choices)}.{nearest(str(value), choices)}")
    if form["seeded"] and form["task"] != GENERATE:
        raise InputError(f"two options that exclude each other: --seeded and --task {form['task']}. An edit takes its noise.")
    batch, factor = form["batch"], form["factor"]
    if batch is not None and not 1 <= batch <= 4096:
        raise InputError(f"illegal value in --batch: {batch}. Give an integer from 1 to 4096, or leave it out.")
    if form["task"] == SUPERRES:
        form["factor"] = factor = 4 if factor is None else factor
        if factor < 2 or resolution % factor:
            raise InputError(f"illegal value in --factor: {factor}. Give an integer from 2 on that divides {resolution}.")
    elif factor is not None:
        raise InputError(f"an option for superres alone: --factor {factor}. Leave it out.")
    classes = class_names(denoiser, info)
    return Contract(channels=channels, resolution=resolution, classes=len(classes) if classes else None, **form)


def _plain(denoiser: Denoiser, guidance: float | None) -> Denoiser:
    """The denoiser on the CPU in fp32 and eval mode, without torch.compile's wrapper, told this guidance weight."""
    network = getattr(denoiser.network, "_orig_mod", denoiser.network)
    network = network if guidance is None else with_guidance(network, guidance)
    return Denoiser(network, denoiser.preconditioning).to("cpu", torch.float32).eval()


def _clean(model, properties: dict[str, str], target: Target):
    """Sets the metadata properties and drops those of nodes and values, which hold stack traces with local paths."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants_ir

    model = ClearMetadataAndDocStringPass()(model).model
    fold_constants_ir(model, input_size_limit=FOLDED_ELEMENTS, output_size_limit=FOLDED_ELEMENTS)
    if target.floats:
        merge_scales(model)
    RemoveUnusedNodesPass()(model)
    model.producer_name, model.producer_version = "fastcm", properties["fastcm.version"].strip('"')
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(sorted(properties.items()))
    return model


def write(model, path: Path) -> None:
    """One file, or two where the weights pass protobuf's limit."""
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if size < SINGLE_FILE_BYTES:
        path.write_bytes(onnx_ir.to_proto(model).SerializeToString(deterministic=True))
    else:
        onnx_ir.save(model, path, external_data=publish.beside(path, ".data").name)


def _manifest(exported: Exported, target: Target) -> dict:
    contract = exported.contract
    rows = contract.batch or "batch"
    inputs = {name: {"type": dtype.__name__, "shape": [rows, *shape]} for name, (shape, dtype) in contract.inputs.items()}
    shape, dtype = contract.output
    return {
        "target": {"name": target.name, "operators": f"{target.table.source} ({target.table.version})", "opset": exported.opset},
        "graph": {**contract._asdict(), "sigmas": list(exported.sigmas)},
        "inputs": inputs,
        "outputs": {"images": {"type": dtype.__name__, "shape": [rows, *shape]}},
        **({} if exported.fusion is None else {"fused by ONNX Runtime": exported.fusion._asdict()}),
        "compared with torch": {
            "tolerance": contract.tolerance,
            "variation between seeds": exported.variation,
            "batches": [row._asdict() for row in exported.comparisons],
        },
    }
