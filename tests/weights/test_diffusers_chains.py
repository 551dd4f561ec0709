"""Diffusion pipelines of diffusers: the same predictions for every block, prediction and schedule, DDIM's own images, and refusals."""

import json

import pytest
import torch
from diffusers_pipelines import NETWORKS, SKIP, random_unet, save_pipeline

from fastcm.api import load, load_denoiser
from fastcm.consistency.denoiser import expand
from fastcm.errors import InputError

STEPS = torch.tensor([3, 250, 990])


def network_output(denoiser, x, sigma, labels=None):
    """F of D = c_skip x + c_out F, at x in the chain's own variable."""
    c = denoiser.coefficients(sigma)
    D = denoiser(x / expand(c.c_in, x), sigma, labels)
    return (D - expand(c.c_skip / c.c_in, x) * x) / expand(c.c_out, x)


def parity(folder, unet, *, steps=STEPS):
    """The largest difference between the network of diffusers at integer timesteps and ours through the denoiser, over its spread."""
    denoiser, info = load_denoiser(folder)
    torch.manual_seed(1)
    x = torch.randn(3, 3, 8, 8)
    labels = torch.tensor([4, 0, 2]) if unet.config.num_class_embeds else None
    with torch.no_grad():
        theirs = unet(x, steps, labels).sample[:, :3]
        sigma = denoiser.preconditioning.betas.levels()[steps].float()
        ours = network_output(denoiser, x, sigma, labels)
        if labels is not None:
            assert not torch.allclose(ours, network_output(denoiser, x, sigma, labels.roll(1)), atol=1e-2)
            assert info["classes"] == ["0", "1", "2", "3", "4"]
    assert theirs.std() > 0.1
    return ((ours - theirs).abs().max() / theirs.std()).item(), denoiser


@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_network_predicts_the_same_epsilon(name, tmp_path):
    unet = random_unet(**NETWORKS[name])
    save_pipeline(tmp_path, unet)
    # at step 3 the image hides what is predicted: D - x is 0.01 of x, and so are fp32's digits of it.
    difference, denoiser = parity(tmp_path, unet, steps=torch.tensor([120, 250, 990]))
    assert difference < 1e-4
    assert denoiser.network.kind == ("adm" if name == "adm" else "unet2d")


PREDICTIONS = ("epsilon", "v_prediction", "sample")
CHAINS = {
    "linear": {},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [0.0005 + 0.00002 * i for i in range(1000)]},
    "zero snr": {"rescale_betas_zero_snr": True},
}
DDIM = {
    "leading": {},
    "trailing": {"timestep_spacing": "trailing"},
    "linspace": {"timestep_spacing": "linspace", "set_alpha_to_one": False},
    "offset": {"steps_offset": 1, "clip_sample": False},
}


def each_pair(names):
    """Each name with each prediction: for every run one prediction a name, in turn."""
    for row, name in enumerate(names):
        for column, prediction in enumerate(PREDICTIONS):
            yield pytest.param(name, prediction, marks=[pytest.mark.slow] * ((row - column) % 3 != 0))


@pytest.mark.parametrize(("schedule", "prediction"), each_pair(CHAINS))
def test_every_prediction_of_every_schedule(schedule, prediction, tmp_path):
    chain = CHAINS[schedule]
    unet = random_unet(block_out_channels=(32, 32))
    save_pipeline(tmp_path, unet, prediction_type=prediction, **chain)
    difference, denoiser = parity(tmp_path, unet, steps=torch.tensor([150, 400, 850]))
    assert difference < 1e-4
    p = denoiser.preconditioning
    assert p.form == {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}[prediction]
    assert (p.sigma_min, p.sigma_max) == p.betas.sigma_range and p.sigma_max < float("inf")
    assert ("infinite noise" in load_denoiser(tmp_path)[1]["source"]) == ("rescale_betas_zero_snr" in chain)


@pytest.mark.parametrize(("spacing", "prediction"), each_pair(DDIM))
def test_ddim_draws_the_images_of_the_ddim_pipeline(spacing, prediction, tmp_path):
    unet = random_unet(block_out_channels=(32, 32))
    pipeline = save_pipeline(tmp_path, unet, "DDIM", prediction_type=prediction, **DDIM[spacing])
    generator = load(tmp_path, device="cpu")
    seeds = [7, 8]
    noise = torch.cat([kernels_normal(seed) for seed in seeds])
    pipeline.scheduler.set_timesteps(10)
    x = noise
    with torch.no_grad():  # the pipeline's loop, from our noise
        for t in pipeline.scheduler.timesteps:
            x = pipeline.scheduler.step(unet(x, t).sample, t, x).prev_sample
    theirs = x.clamp(-1, 1).permute(0, 2, 3, 1).numpy()
    ours = generator(seeds, sampler="ddim", steps=10, output="float")
    assert (abs(theirs) < 1).mean() > 0.005 and theirs.std() > 0.2
    assert abs(ours - theirs).max() < 2e-3  # a thousandth of the range from -1 to 1
    assert abs(generator(seeds, sampler="ddim", steps=5, output="float") - theirs).max() > 0.05


def kernels_normal(seed):
    from fastcm.generation.sampler import SeedNoise

    return SeedNoise(torch.tensor([seed]), (3, 8, 8)).normal(0)


@pytest.mark.parametrize("centred", [False, True])
def test_variance_exploding_pipelines(centred, tmp_path):
    unet = random_unet(**{**SKIP, "block_out_channels": (64, 128), "center_input_sample": centred})
    save_pipeline(tmp_path, unet, "ScoreSdeVe", sigma_max=50.0)
    denoiser, _ = load_denoiser(tmp_path)
    assert denoiser.preconditioning.sigma_max == 100.0 and denoiser.preconditioning.form == "ve"
    torch.manual_seed(1)
    u, sigma = torch.rand(3, 3, 8, 8) * 2, torch.tensor([0.05, 1.0, 40.0])  # pixels from 0 to 1 and their noise level
    u = u + expand(sigma, u) * torch.randn_like(u)
    with torch.no_grad():
        score = unet(u, sigma).sample
        denoised = u + expand(sigma, u).square() * score  # Tweedie
        ours = denoiser(2 * u - 1, 2 * sigma)
    torch.testing.assert_close((ours + 1) / 2, denoised, rtol=1e-4, atol=1e-4)
    F = (denoised - u) / expand(sigma, u)
    assert F.std() > 0.1


def test_solvers_run_and_agree_with_many_steps(tmp_path):
    save_pipeline(tmp_path, random_unet(block_out_channels=(32, 32)))
    generator = load(tmp_path, device="cpu")
    assert generator([3]).shape == (1, 8, 8, 3)  # heun of 18 steps is a diffusion model's own
    for sampler in ("euler", "dpm", "ancestral", "ddim"):
        assert generator([3], sampler=sampler, steps=3).std() > 0


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    save_pipeline(path, random_unet(block_out_channels=(32, 32)))
    return path


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        (
            "model_index.json",
            {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]},
            "text-conditional",
        ),
        ("model_index.json", {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}, "of latents"),
        ("model_index.json", {"_class_name": "ConsistencyModelPipeline"}, "CMStochasticIterativeScheduler"),
        ("model_index.json", {"_class_name": "ScoreSdeVePipeline"}, "ScoreSdeVeScheduler"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "text-conditional"),
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "text-conditional"),
        ("unet/config.json", {"_class_name": "UNet3DModel"}, "three dimensions"),
        ("unet/config.json", {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}, "text-conditional"),
        ("unet/config.json", {"down_block_types": ["KDownBlock2D", "DownBlock2D"]}, "KDownBlock2D"),
        ("unet/config.json", {"time_embedding_type": "fourier"}, "(missing)"),
        ("unet/config.json", {"time_embedding_type": "learned"}, "time_embedding_type"),
        ("unet/config.json", {"class_embed_type": "identity"}, "class_embed_type"),
        ("unet/config.json", {"class_embed_type": "timestep"}, "num_class_embeds"),
        ("unet/config.json", {"freq_shift": 2}, "freq_shift"),
        ("unet/config.json", {"norm_num_groups": None}, "norm_num_groups"),
        ("unet/config.json", {"norm_num_groups": 5}, "norm_groups"),
        ("unet/config.json", {"out_channels": 4}, "conv_out.weight"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatch"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "sigmoid"),
        ("scheduler/scheduler_config.json", {"beta_end": 2.0}, "outside 0 to 1"),
        ("scheduler/scheduler_config.json", {"beta_start": "0"}, "beta_start"),
        ("scheduler/scheduler_config.json", {"trained_betas": "x"}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"trained_betas": ["x", "y"]}, "outside 0 to 1"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "noise.betas.steps"),
    ],
)
def test_what_is_not_read_is_named_with_its_reason(file, changes, words, folder):
    before = (folder / file).read_text()
    try:
        edit(folder / file, **changes)
        with pytest.raises(InputError) as error:
            load_denoiser(folder)
    finally:
        (folder / file).write_text(before)
    message = str(error.value)
    assert words in message and str(folder) in message and "\n" not in message and len(message) < 500


def test_a_missing_scheduler_is_asked_for_and_given(folder, tmp_path):
    import shutil

    shutil.copytree(folder / "unet", tmp_path / "bare")
    with pytest.raises(InputError, match="--prediction and --betas"):
        load_denoiser(tmp_path / "bare")
    with pytest.raises(InputError, match="Give fastcm convert --betas"):
        load_denoiser(tmp_path / "bare", prediction="epsilon")
    with pytest.raises(InputError, match="unknown value in --betas: lnear.*'linear'"):
        load_denoiser(tmp_path / "bare", prediction="epsilon", betas="lnear")
    with pytest.raises(InputError, match="unknown value in --prediction: eps"):
        load_denoiser(tmp_path / "bare", prediction="eps", betas="linear")
    with pytest.raises(InputError, match="Leave it out"):
        load_denoiser(folder, betas="linear")
    given = load_denoiser(tmp_path / "bare", prediction="epsilon", betas="linear")[0]
    assert given.preconditioning == load_denoiser(folder)[0].preconditioning
    (tmp_path / "scheduler").mkdir()
    shutil.copy(folder / "scheduler" / "scheduler_config.json", tmp_path / "scheduler")
    assert load_denoiser(tmp_path / "bare")[0].preconditioning == given.preconditioning  # a bare unet folder, the scheduler's beside it


def test_flat_folders_of_the_early_hub(folder, tmp_path):
    import shutil

    for file in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json", "model_index.json"):
        shutil.copy(folder / file, tmp_path)
    flat, deep = load_denoiser(tmp_path)[0], load_denoiser(folder)[0]
    assert flat.preconditioning == deep.preconditioning
    assert all(torch.equal(a, b) for a, b in zip(flat.parameters(), deep.parameters(), strict=True))
