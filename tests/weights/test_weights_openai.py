"""OpenAI checkpoints: read, written and refused; the architecture from keys and shapes."""

import os
import pickle

import pytest
import torch

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.weights.openai import infer_config, read_openai, write_openai

# Both published models, shrunk: 32 channels are the fewest that OpenAI's 32 groups allow.
IMAGENET64 = {"channels": 32, "channel_mult": (1, 2, 3, 4), "blocks": 3, "num_classes": 5, "head_channels": 32}
LSUN256 = {
    "resolution": 256,
    "channels": 32,
    "channel_mult": (1, 1, 2, 2, 4, 4),
    "blocks": 2,
    "scale_shift_norm": False,
    "head_channels": 32,
}


def make(**options) -> Denoiser:
    torch.manual_seed(0)
    network = networks.build("adm", {"norm_groups": 32, **options})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return Denoiser(network, Preconditioning())


ONE_LEVEL = {"resolution": 8, "channels": 32, "channel_mult": (1,), "blocks": 2, "attention_resolutions": (8,)}
PLAIN = {"resolution": 16, "channels": 32, "channel_mult": (1, 2), "blocks": 2, "attention_resolutions": (8,), "resblock_updown": False}


@pytest.mark.parametrize(
    "options",
    [
        IMAGENET64,
        LSUN256,
        ONE_LEVEL,
        PLAIN,
        {**PLAIN, "conv_resample": False},
        {**PLAIN, "resblock_updown": True, "attention_resolutions": (), "in_channels": 1, "out_channels": 2, "blocks": 1},
        {**PLAIN, "channel_mult": (2, 3, 3), "resblock_updown": True, "attention_resolutions": (16, 4)},
    ],
)
def test_architecture_from_keys_and_shapes(options, tmp_path):
    with torch.device("meta"):
        network = networks.build("adm", {"norm_groups": 32, "head_channels": 32, **options})
    size = None if "resolution" not in options else options["resolution"]
    config = infer_config(network.state_dict(), tmp_path, image_size=size, head_channels=32)
    assert config == network.config


def test_full_size_published_models(tmp_path):
    for options, count in (({"num_classes": 1000}, 295_899_267), ({**LSUN256, "channels": 256, "head_channels": 64}, 526_304_771)):
        with torch.device("meta"):
            network = networks.build("adm", {"norm_groups": 32, **options})
        assert infer_config(network.state_dict(), tmp_path) == network.config
        assert sum(p.numel() for p in network.parameters()) == count


@pytest.mark.parametrize(
    ("name", "form", "sampling"),
    [
        ("cd_imagenet64_l2.pt", "boundary", {"2": [80.0, 1.382]}),
        ("ct_imagenet64.pt", "boundary", {"2": [80.0, 1.913]}),
        ("edm_imagenet64_ema.pt", "edm", None),
        ("mine.pt", "boundary", None),
    ],
)
@pytest.mark.slow
def test_round_trip_is_bit_equal(name, form, sampling, tmp_path):
    denoiser = make(**{**IMAGENET64, "blocks": 1})
    denoiser.preconditioning = Preconditioning(form="edm" if form == "boundary" else "boundary")
    with pytest.raises(InputError, match="edm_"):  # the name is all that tells the form
        write_openai(tmp_path / name, denoiser, {})
    denoiser.preconditioning = Preconditioning(form=form)
    write_openai(tmp_path / name, denoiser, {})
    assert [p.name for p in tmp_path.iterdir()] == [name]
    network, preconditioning, info = read_openai(tmp_path / name, head_channels=32)
    assert network.config == denoiser.network.config
    assert list(network.state_dict()) == list(denoiser.network.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), denoiser.network.state_dict().values(), strict=True))
    assert preconditioning == Preconditioning(form=form)
    assert (info["resolution"], info["channels"], info["classes"], info.get("sampling")) == (64, 3, list("01234"), sampling)


def test_half_precision_files_become_fp32(tmp_path):
    denoiser = make(**ONE_LEVEL, head_channels=32)
    torch.save({k: v.half() for k, v in denoiser.network.state_dict().items()}, tmp_path / "half.pt")
    network, _, _ = read_openai(tmp_path / "half.pt", image_size=8, head_channels=32)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(network(x, torch.zeros(1)), denoiser.network(x, torch.zeros(1)), rtol=1e-2, atol=1e-2)


def test_legacy_file_format(tmp_path):
    denoiser = make(**ONE_LEVEL, head_channels=32)
    torch.save(denoiser.network.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    network, _, _ = read_openai(tmp_path / "old.pt", image_size=8, head_channels=32)
    assert torch.equal(network.out[2].weight, denoiser.network.out[2].weight)


def test_unknown_image_size_is_asked_for(tmp_path):
    write_openai(tmp_path / "m.pt", make(**ONE_LEVEL, head_channels=32), {})
    with pytest.raises(InputError, match="--image-size"):
        read_openai(tmp_path / "m.pt")


class Canary:
    """Pickles as a call that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def one_line(path, **options) -> str:
    with pytest.raises(InputError) as error:
        read_openai(path, **options)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and len(message) < 500
    assert "weights_only" not in message  # torch's advice to switch the protection off is not passed on
    return message


def test_malicious_files_run_nothing(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"time_embed.0.weight": Canary(canary)}, tmp_path / "zip.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Canary(canary)))
    torch.save(Canary(canary), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("zip.pt", "raw.pt", "legacy.pt"):
        one_line(tmp_path / name)
        assert not canary.exists()
    assert "system" in one_line(tmp_path / "zip.pt")
    pickle.loads((tmp_path / "raw.pt").read_bytes())
    assert canary.exists()  # the files do carry the call


def test_what_is_not_a_checkpoint_is_named(tmp_path):
    good = tmp_path / "good.pt"
    write_openai(good, make(**ONE_LEVEL, head_channels=32), {})
    data = good.read_bytes()
    cases = {
        "empty.pt": (b"", "empty"),
        "page.pt": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "web page"),
        "lfs.pt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        "cut.pt": (data[: len(data) // 2], "damaged or cut short"),
        "head.pt": (data[:100], "damaged or cut short"),
        "text.pt": (b"hello", "not an OpenAI checkpoint"),
        "bytes.pt": (bytes(range(256)) * 40, "not an OpenAI checkpoint"),
    }
    for name, (content, part) in cases.items():
        (tmp_path / name).write_bytes(content)
        assert part in one_line(tmp_path / name), name
    assert "no such file" in one_line(tmp_path / "absent.pt")
    assert "a folder" in one_line(tmp_path)


def test_other_architectures_are_named_by_three_keys(tmp_path):
    torch.save({f"layer{i}.weight": torch.zeros(2) for i in range(9)}, tmp_path / "mlp.pt")
    assert "layer0.weight, layer1.weight, layer2.weight and 6 more" in one_line(tmp_path / "mlp.pt")
    torch.save({"state_dict": {}, "epoch": 3}, tmp_path / "lightning.pt")
    assert "state_dict, epoch" in one_line(tmp_path / "lightning.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    assert "list" in one_line(tmp_path / "list.pt")
    state = make(**ONE_LEVEL, head_channels=32).network.state_dict()
    del state["input_blocks.1.0.emb_layers.1.weight"]
    torch.save(state, tmp_path / "hole.pt")
    assert "emb_layers.1.weight" in one_line(tmp_path / "hole.pt", image_size=8, head_channels=32)
    state = make(**ONE_LEVEL, head_channels=32).network.state_dict()
    torch.save({**state, "middle_block.0.in_layers.0.weight": torch.zeros(7)}, tmp_path / "shape.pt")
    assert "middle_block.0.in_layers.0.weight" in one_line(tmp_path / "shape.pt", image_size=8, head_channels=32)


def test_networks_without_an_openai_form_are_refused(tmp_path):
    song = networks.build("song", {"resolution": 8, "channels": 8, "channel_mult": (1,), "blocks": 1, "attention_resolutions": ()})
    narrow = networks.build("adm", {**ONE_LEVEL, "channels": 8, "head_channels": 8})
    scaled = make(**ONE_LEVEL, head_channels=32).network
    for network, options, part in (
        (song, {}, "network.kind: song"),
        (narrow, {}, "norm_groups: 2"),
        (scaled, {"c_noise": "ln sigma / 4"}, "c_noise"),
    ):
        with pytest.raises(InputError, match=part):
            write_openai(tmp_path / "out.pt", Denoiser(network, Preconditioning(**options)), {})
    assert list(tmp_path.iterdir()) == []
