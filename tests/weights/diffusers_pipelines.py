"""Small random pipelines of diffusers' own classes, no layer of them zero, and the epsilon that their network means."""

import pytest
import torch

NETWORK = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
    "norm_eps": 1e-6,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
}
SKIP = {
    "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    "norm_num_groups": None,
    "attention_head_dim": None,
    "mid_block_scale_factor": 1.41421356237,
    "time_embedding_type": "fourier",
}
# What hub models differ in, one at a time.
NETWORKS = {
    "ddpm": {},
    "adm": {"norm_eps": 1e-5, "freq_shift": 0, "flip_sin_to_cos": True, "downsample_padding": 1},
    "plain": {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2},
    "resnet": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
    },
    "mixed": {
        "down_block_types": ("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        "upsample_type": "resnet",
    },
    "attending": {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2, "downsample_type": "resnet"},
    "one head, groups": {"attention_head_dim": None, "attn_norm_num_groups": 4, "time_embedding_dim": 48},
    "no middle attention": {"add_attention": False, "mid_block_scale_factor": 2.0},
    "no middle": {"mid_block_type": None},
    "scale shift": {"resnet_time_scale_shift": "scale_shift"},
    "centred": {"center_input_sample": True},
    "classes": {"num_class_embeds": 5},
    "numbered classes": {"num_class_embeds": 5, "class_embed_type": "timestep"},
    "learned variance": {"out_channels": 6},
}


def random_unet(**options):
    """A UNet2DModel with every weight random."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**{**NETWORK, **options}).eval()
    for name, parameter in unet.named_parameters():
        if not name.startswith("time_proj"):
            torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return unet


def save_pipeline(folder, unet, kind="DDPM", **settings):
    """The pipeline of that kind (DDPM, DDIM or ScoreSdeVe), its scheduler with these settings."""
    import diffusers

    pipeline = getattr(diffusers, f"{kind}Pipeline")(unet, getattr(diffusers, f"{kind}Scheduler")(**settings))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline
