"""diffusers folders: the pipeline's own images, bit-equal round trips, folders that are not ADM."""

import json
import subprocess
import sys

import pytest
import torch

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.weights.diffusers import read_diffusers, to_config, to_state, write_diffusers
from fastcm.weights.openai import read_openai, write_openai

# Both published models, shrunk. 32 groups, as they have, need 32 channels.
IMAGENET64 = {
    "resolution": 16,
    "channels": 32,
    "channel_mult": (1, 2, 3, 4),
    "blocks": 1,
    "attention_resolutions": (8, 4, 2),
    "num_classes": 5,
    "head_channels": 16,
    "norm_groups": 32,
}
LSUN256 = {
    "resolution": 32,
    "channels": 32,
    "channel_mult": (1, 1, 2, 2),
    "blocks": 2,
    "attention_resolutions": (8, 4),
    "scale_shift_norm": False,
    "head_channels": 16,
    "norm_groups": 32,
}
DIGITS = {
    "resolution": 8,
    "in_channels": 1,
    "out_channels": 1,
    "channels": 24,
    "channel_mult": (1, 2),
    "blocks": 1,
    "attention_resolutions": (4,),
    "head_channels": 24,
    "num_classes": 10,
}
PLAIN = {
    "resolution": 8,
    "channels": 16,
    "channel_mult": (1, 2),
    "blocks": 1,
    "attention_resolutions": (8,),
    "head_channels": 8,
    "resblock_updown": False,
}
SHAPES = {"imagenet64": IMAGENET64, "lsun256": LSUN256, "digits": DIGITS, "plain": PLAIN}


def make(**options) -> Denoiser:
    torch.manual_seed(0)
    network = networks.build("adm", options).eval().requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return Denoiser(network, Preconditioning())


def save_pipeline(folder, options, *, steps=40):
    """A pipeline made by diffusers itself, with every weight random."""
    import diffusers

    torch.manual_seed(0)
    config = {key: value for key, value in to_config(make(**options).network).items() if not key.startswith("_")}
    unet = diffusers.UNet2DModel(**config)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    unet.conv_out.weight.data *= 3  # images of a spread worth comparing
    pipeline = diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler(num_train_timesteps=steps))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def save_parts(weights, state, *, variant=None):
    """The state dict in two files and an index, as diffusers names them for `weights`, the name of a single file."""
    from safetensors.torch import save_file

    infix, names, index = f".{variant}" if variant else "", sorted(state), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{weights.stem}{infix}-{number:05d}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, weights.with_name(file))
        index |= dict.fromkeys(part, file)
    name = f"{weights.name}.index{infix}.json"
    weights.with_name(name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))


def pipeline_images(pipeline, labels, **steps):
    config = pipeline.unet.config
    generator = torch.Generator().manual_seed(3)
    images = pipeline(batch_size=3, class_labels=labels, generator=generator, output_type="pt", **steps).images
    assert images.shape == (3, config.in_channels, config.sample_size, config.sample_size)
    return images * 2 - 1


def our_images(denoiser, labels, sigmas):
    """The consistency sampler with the noise that diffusers draws."""
    config, generator = denoiser.network.config, torch.Generator().manual_seed(3)
    shape = (3, config.in_channels, config.resolution, config.resolution)
    labels = None if labels is None else torch.tensor(labels)
    denoised = denoiser(torch.randn(shape, generator=generator) * sigmas[0], torch.full((3,), sigmas[0]), labels).clamp(-1, 1)
    for sigma in sigmas[1:]:
        x = denoised + torch.randn(shape, generator=generator) * (sigma**2 - denoiser.preconditioning.sigma_min**2) ** 0.5
        denoised = denoiser(x, torch.full((3,), sigma), labels).clamp(-1, 1)
    return denoised


@pytest.mark.parametrize("shape", ["imagenet64", "lsun256", "digits", "plain"])
@pytest.mark.slow
def test_same_images_as_diffusers(shape, tmp_path):
    pipeline = save_pipeline(tmp_path / "theirs", SHAPES[shape])
    network, preconditioning, info = read_diffusers(tmp_path / "theirs")
    denoiser = Denoiser(network, preconditioning)
    labels = [4, 0, 2] if network.config.num_classes else None
    one = pipeline_images(pipeline, labels, num_inference_steps=1)
    assert one.std() > 0.1 and (one.abs() < 1).float().mean() > 0.2  # not a picture of clipped pixels
    torch.testing.assert_close(our_images(denoiser, labels, [80.0]), one, rtol=0, atol=1e-4)
    several = pipeline_images(pipeline, labels, num_inference_steps=None, timesteps=[22, 11, 0])
    sigmas = pipeline.scheduler.sigmas[:3].tolist()
    assert sigmas[0] == 80.0 and 0.5 < sigmas[2] < sigmas[1] < 80
    assert not torch.allclose(one, several, atol=0.05)
    torch.testing.assert_close(our_images(denoiser, labels, sigmas), several, rtol=0, atol=1e-4)
    assert info["resolution"] == network.config.resolution and info["channels"] == network.config.in_channels
    assert info["classes"] == (list(map(str, range(network.config.num_classes))) if network.config.num_classes else None)


@pytest.mark.parametrize("shape", SHAPES)
def test_written_folder_loads_in_diffusers(shape, tmp_path):
    import diffusers

    denoiser = make(**SHAPES[shape])
    write_diffusers(tmp_path / "ours", denoiser, {"discretization_steps": 201})
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "ours")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.num_train_timesteps == 201
    labels = [1, 3, 0] if denoiser.network.config.num_classes else None
    one = pipeline_images(pipeline, labels, num_inference_steps=1)
    torch.testing.assert_close(our_images(denoiser, labels, [80.0]), one, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_written_folder_loads_without_fastcm(tmp_path):
    write_diffusers(tmp_path / "ours", make(**DIGITS), {})
    code = (
        "import sys; sys.modules['fastcm'] = None\n"
        f"import diffusers; p = diffusers.ConsistencyModelPipeline.from_pretrained({str(tmp_path / 'ours')!r})\n"
        "print(p.unet.config.sample_size, len(p.unet.state_dict()))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert out.split()[-2] == "8" and int(out.split()[-1]) > 50


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_bit_equal(shape, tmp_path):
    denoiser = make(**SHAPES[shape])
    denoiser.preconditioning = Preconditioning(sigma_min=0.01, sigma_max=40.0, sigma_data=0.6, rho=5.0)
    write_diffusers(tmp_path / "m", denoiser, {"discretization_steps": 151})
    network, preconditioning, info = read_diffusers(tmp_path / "m")
    assert preconditioning == denoiser.preconditioning and info["discretization_steps"] == 151
    want, got = denoiser.network.state_dict(), network.state_dict()
    assert list(want) == list(got) and all(torch.equal(want[key], got[key]) for key in want)
    assert [p.name for p in (tmp_path / "m").rglob("*") if p.name.startswith(".")] == []


def test_openai_to_diffusers_and_back_is_bit_equal(tmp_path):
    denoiser = make(**IMAGENET64)
    write_openai(tmp_path / "ct_a.pt", denoiser, {})
    network, preconditioning, info = read_openai(tmp_path / "ct_a.pt", image_size=16, head_channels=16)
    write_diffusers(tmp_path / "b", Denoiser(network, preconditioning), info)
    network, preconditioning, info = read_diffusers(tmp_path / "b")
    write_openai(tmp_path / "ct_c.pt", Denoiser(network, preconditioning), info)
    a, c = (torch.load(tmp_path / f"ct_{name}.pt", weights_only=True) for name in "ac")
    assert list(a) == list(c) and all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.slow
def test_full_size_names_match_diffusers():
    import diffusers

    lsun256 = {"resolution": 256, "channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "blocks": 2, "scale_shift_norm": False}
    for options in ({"num_classes": 1000}, lsun256):
        with torch.device("meta"):
            network = networks.build("adm", options)
            unet = diffusers.UNet2DModel(**{k: v for k, v in to_config(network).items() if not k.startswith("_")})
        assert {k: v.shape for k, v in to_state(network).items()} == {k: v.shape for k, v in unet.state_dict().items()}


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("file", "changes", "part"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "StableDiffusionPipeline"),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "time_proj.weight (missing)"),
        ("unet/config.json", {"freq_shift": 3}, "freq_shift"),
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn"),
        ("unet/config.json", {"down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"]}, "(missing)"),
        ("unet/config.json", {"downsample_type": "mean"}, "downsample_type"),
        ("unet/config.json", {"attn_norm_num_groups": 5}, "middle_groups"),
        ("unet/config.json", {"num_class_embeds": None}, "class_embedding.weight"),
        ("unet/config.json", {"layers_per_block": 2}, "(missing)"),
        ("unet/config.json", {"block_out_channels": [24, 72]}, "[72"),
    ],
)
def test_what_cannot_be_read_is_named(file, changes, part, tmp_path):
    write_diffusers(tmp_path, make(**DIGITS), {})
    edit(tmp_path / file, **changes)
    with pytest.raises(InputError) as error:
        read_diffusers(tmp_path)
    assert part in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!doctype html>", "web page"),
        (b"\x00" * 7, "safetensors"),
        (None, "no weights"),
    ],
)
def test_broken_weights_are_named(content, part, tmp_path):
    write_diffusers(tmp_path, make(**DIGITS), {})
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    if content is None:
        weights.unlink()
    else:
        weights.write_bytes(content)
    with pytest.raises(InputError, match=part):
        read_diffusers(tmp_path)
    if content == b"":
        weights.write_bytes(b"1234567890")
        (tmp_path / "unet" / "config.json").write_text("{")
        with pytest.raises(InputError, match=r"config\.json"):
            read_diffusers(tmp_path)


def test_the_unet_folder_alone(tmp_path):
    denoiser = make(**DIGITS)
    denoiser.preconditioning = Preconditioning(sigma_max=40.0)
    write_diffusers(tmp_path, denoiser, {})
    network, preconditioning, _ = read_diffusers(tmp_path / "unet")
    assert preconditioning.sigma_max == 40.0  # the scheduler beside it
    assert torch.equal(network.out[2].weight, denoiser.network.out[2].weight)


def test_half_precision_variant(tmp_path):
    from safetensors.torch import load_file, save_file

    write_diffusers(tmp_path, make(**DIGITS), {})
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({k: v.half() for k, v in load_file(weights).items()}, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    weights.unlink()
    network, _, _ = read_diffusers(tmp_path)
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_what_diffusers_cannot_hold_is_refused(tmp_path):
    song = networks.build("song", {"resolution": 8, "channels": 8, "channel_mult": (1,), "blocks": 1, "attention_resolutions": ()})
    adm = make(**DIGITS).network
    cases = [
        (song, {}, "network.kind"),
        (adm, {"form": "edm"}, "noise.form"),
        (adm, {"c_noise": "ln sigma / 4"}, "noise.c_noise"),
        (make(**{**DIGITS, "channel_mult": (2, 2)}).network, {}, "network.channel_mult"),
        (make(**{**DIGITS, "num_heads": 2, "attention_resolutions": (8, 4)}).network, {}, "network.num_heads"),
        (make(**{**PLAIN, "conv_resample": False}).network, {}, "network.conv_resample"),
    ]
    for network, options, part in cases:
        with pytest.raises(InputError, match=part):
            write_diffusers(tmp_path / "out", Denoiser(network, Preconditioning(**options)), {})
    assert not (tmp_path / "out").exists()


def test_other_networks_are_written_and_read_as_consistency_pipelines(tmp_path):
    """A UNet2D in the boundary form: what diffusers' own consistency training makes, with options that ADM lacks."""
    import diffusers

    torch.manual_seed(0)
    options = {
        "resolution": 8,
        "widths": (32, 32),
        "blocks": 1,
        "down_blocks": ("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_blocks": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        "norm_groups": 8,
        "num_classes": 5,
    }
    network = networks.build("unet2d", options).eval().requires_grad_(False)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    denoiser = Denoiser(network, Preconditioning())
    write_diffusers(tmp_path / "m", denoiser, {})
    pipeline = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path / "m")
    pipeline.set_progress_bar_config(disable=True)
    one = pipeline_images(pipeline, [4, 0, 2], num_inference_steps=1)
    torch.testing.assert_close(our_images(denoiser, [4, 0, 2], [80.0]), one, rtol=0, atol=1e-4)
    again, preconditioning, _ = read_diffusers(tmp_path / "m")
    assert again.config == network.config and preconditioning == denoiser.preconditioning
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), network.state_dict().values(), strict=True))
    for form, words in (("epsilon-boundary", "noise.form: epsilon-boundary"), ("edm", "noise.form: edm")):
        with pytest.raises(InputError, match=words):
            write_diffusers(tmp_path / "no", Denoiser(network, Preconditioning(form=form)), {})
    assert not (tmp_path / "no").exists()
