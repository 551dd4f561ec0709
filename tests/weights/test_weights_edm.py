"""EDM and ECT pickles: the published layout and outputs, hostile and broken files."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
from edm_pickle import EasyDict, edm_content, write_pickle
from wave_weights import wave_images, wave_state

from fastcm import networks
from fastcm.consistency.denoiser import Denoiser, Preconditioning
from fastcm.errors import InputError
from fastcm.weights.edm import read_edm

BOX = torch.full((1, 1, 2, 2), 0.25)
SONG_KWARGS = {
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "label_dim": 3,
    "augment_dim": 2,
    "dropout": 0.13,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
NCSNPP_KWARGS = {
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}
ADM_KWARGS = {"model_channels": 128, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4], "label_dim": 3, "augment_dim": 2}


def song_state(options: dict) -> dict[str, torch.Tensor]:
    """EDM's names and shapes: ours, and the box filters that it keeps as buffers."""
    network = networks.build(
        "song", {"resolution": 8, "channels": 8, "channel_mult": (1, 2), "blocks": 1, "attention_resolutions": (4,), **options}
    )
    filters = {name: value for name, value in network.state_dict().items() if name.endswith("resample_filter")}
    if not filters:
        filters = {f"{block}.{part}.resample_filter": BOX for block in ("enc.4x4_down", "dec.8x8_up") for part in ("conv0", "skip")}
    shapes = {name: tuple(value.shape) for name, value in {**network.state_dict(), **filters}.items()}
    return {**wave_state(shapes), **{name: value.clone() for name, value in filters.items()}}


def adm_state() -> dict[str, torch.Tensor]:
    lines = (Path(__file__).parents[1] / "keys" / "keys_edm_adm_small.txt").read_text().splitlines()
    shapes = {line.split(" ")[0]: tuple(map(int, line.split("[")[1].rstrip("]").split(","))) for line in lines}
    waves = wave_state(shapes)
    return {name: BOX if name.endswith("resample_filter") else waves[name] for name in shapes}


# Outputs of NVIDIA's published networks.py for these weights and inputs: pixel (3, 4) of image 0, then (7, 0) of image 1.
CASES = {
    "ddpmpp": ("SongUNet", SONG_KWARGS, ([-0.5312111, 0.5683761, -0.0692397], [-0.8427509, 0.3676808, 0.5080922])),
    "ncsnpp": ("SongUNet", NCSNPP_KWARGS, ([0.3775144, -0.4675301, 0.3939430], [0.4563626, -0.4961885, 0.3530485])),
    "adm": ("DhariwalUNet", ADM_KWARGS, ([0.2317398, 0.2922513, 0.1155280], [-0.1677513, -0.0724219, 0.1129041])),
}


def content_of(case: str, precond="EDMPrecond", **attributes) -> dict:
    model, kwargs, _ = CASES[case]
    if case == "adm":
        state = adm_state()
    else:
        ncsnpp = {"embedding": "fourier", "channel_mult_noise": 2, "encoder": "residual", "resample_filter": (1, 3, 3, 1)}
        state = song_state({"num_classes": 3, "augment_channels": 2} if case == "ddpmpp" else ncsnpp)
    return edm_content(precond, model, state, kwargs, **attributes)


@pytest.mark.parametrize("case", CASES)
def test_published_layout(case, tmp_path):
    write_pickle(tmp_path / "net.pkl", content_of(case))
    network, preconditioning, info = read_edm(tmp_path / "net.pkl")
    assert preconditioning == Preconditioning(form="edm", c_noise="ln sigma / 4")
    assert (info["resolution"], info["channels"], info["classes"]) == (8, 3, ["0", "1", "2"] if case != "ncsnpp" else None)
    assert not network.training and {p.dtype for p in network.parameters()} == {torch.float32}
    labels = torch.tensor([2, 0]) if case == "adm" else None
    out = network(wave_images(2, 3, 8, 8), torch.tensor([-1.2, 0.9]), labels)
    torch.testing.assert_close((out[0, :, 3, 4].tolist(), out[1, :, 7, 0].tolist()), CASES[case][2], rtol=1e-4, atol=1e-5)
    image = Denoiser(network, preconditioning)(80 * wave_images(2, 3, 8, 8), torch.full((2,), 80.0), labels)
    assert image.shape == (2, 3, 8, 8) and 0.01 < image.std() < 10


def test_ect_networks_have_the_boundary_form(tmp_path):
    write_pickle(tmp_path / "ect.pkl", content_of("ncsnpp", "ECMPrecond", sigma_min=0.003, sigma_data=0.4))
    network, preconditioning, _ = read_edm(tmp_path / "ect.pkl")
    assert preconditioning == Preconditioning(form="boundary", sigma_min=0.003, sigma_data=0.4, c_noise="ln sigma / 4")
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(Denoiser(network, preconditioning)(x, torch.tensor([0.003])), x)


def test_published_cifar_options_by_default_arguments(tmp_path):
    """What the file leaves out has EDM's defaults; a full-size DDPM++ on the meta device has the published size."""
    from fastcm.weights.edm import SONG, _options

    options = _options({"channel_mult": [2, 2, 2], "augment_dim": 9, "label_dim": 0}, 32, SONG)
    with torch.device("meta"):
        network = networks.build("song", options)
    assert sum(p.numel() for p in network.parameters()) == 55_733_891 and network.config.dropout == 0.1


def test_older_protocols(tmp_path):
    for protocol in (2, 3, 5):
        write_pickle(tmp_path / "net.pkl", content_of("ncsnpp"), protocol=protocol)
        if protocol == 2:  # needs more names than protocol 4, which EDM writes
            assert "not in the list" in one_line(tmp_path / "net.pkl")
        else:
            read_edm(tmp_path / "net.pkl")


def one_line(path) -> str:
    with pytest.raises(InputError) as error:
        read_edm(path)
    message = str(error.value)
    assert "\n" not in message and str(path) in message and len(message) < 500
    return message


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def hostile_storage(canary) -> bytes:
    """The payload of a storage that runs a command where torch.load is not restricted."""
    import io

    buffer = io.BytesIO()
    torch.save(Call(os.system, f"touch {canary}"), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("place", ["top", "beside", "kwargs", "state", "storage", "eval", "torch_load", "getattr"])
def test_malicious_pickles_run_nothing(place, tmp_path):
    canary, command = tmp_path / "canary", f"touch {tmp_path / 'canary'}"
    content = content_of("ncsnpp")
    if place == "top":
        content = Call(os.system, command)
    elif place == "beside":
        content["loss_fn"] = Call(os.system, command)
    elif place == "kwargs":
        content["ema"]._modules["model"]._init_kwargs["dropout"] = Call(os.system, command)
    elif place == "state":
        content["ema"].__dict__["sigma_data"] = Call(eval, f"__import__('os').system({command!r})")
    elif place == "storage":
        content["ema"].__dict__["extra"] = Call(torch.storage._load_from_bytes, hostile_storage(canary))
    elif place == "eval":
        content["loss_fn"] = Call(exec, f"import os; os.system({command!r})")
    elif place == "torch_load":
        import io

        content["loss_fn"] = Call(torch.load, io.BytesIO(hostile_storage(canary)))
    else:
        content["loss_fn"] = Call(getattr, os.system, "__call__")
    write_pickle(tmp_path / "net.pkl", content)
    message = one_line(tmp_path / "net.pkl")
    assert not canary.exists()
    names = {
        "storage": "posix.system",
        "state": "builtins.eval",
        "eval": "builtins.exec",
        "torch_load": "torch.serialization.load",
        "getattr": "builtins.getattr",
    }
    assert names.get(place, "posix.system") in message and "nothing was run" in message


def test_the_storage_payload_is_hostile_indeed(tmp_path):
    torch.storage._load_from_bytes(hostile_storage(tmp_path / "canary"))
    assert (tmp_path / "canary").exists()


def test_dotted_names_and_classes_cannot_be_reached(tmp_path):
    for module, name in (
        ("collections", "OrderedDict.__init__"),
        ("torch._utils", "_import_dotted_name"),
        ("builtins", "type"),
        ("dnnlib", "EasyDict"),
    ):
        data = pickle.PROTO + b"\x04" + pickle.SHORT_BINUNICODE + bytes([len(module)]) + module.encode()
        data += pickle.SHORT_BINUNICODE + bytes([len(name)]) + name.encode() + pickle.STACK_GLOBAL + pickle.STOP
        (tmp_path / "x.pkl").write_bytes(data)
        assert f"{module}.{name}" in one_line(tmp_path / "x.pkl")


def test_what_is_not_an_edm_network_is_named(tmp_path):
    write_pickle(tmp_path / "good.pkl", content_of("ncsnpp"))
    data = (tmp_path / "good.pkl").read_bytes()
    cases = {
        "empty": (b"", "empty"),
        "page": (b"<html><body>403</body></html>", "web page"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        "cut": (data[: len(data) // 2], "damaged or cut short"),
        "text": (b"hello there", "not an EDM network"),
        "zip": (b"PK\x03\x04" + bytes(100), "not an EDM network"),
    }
    for name, (content, part) in cases.items():
        path = tmp_path / f"{name}.pkl"
        path.write_bytes(content)
        assert part in one_line(path), name
    assert "no such file" in one_line(tmp_path / "absent.pkl")


def test_other_networks_are_refused_by_name(tmp_path):
    path = tmp_path / "net.pkl"

    def refusal(content):
        write_pickle(path, content)
        return one_line(path)

    assert "EDM2Precond" in refusal(content_of("ncsnpp", "EDM2Precond"))
    other = content_of("ncsnpp")
    other["ema"]._modules["model"].class_name = "EDM2UNet"
    assert "EDM2UNet" in refusal(other)
    assert "training_set, G" in refusal({"training_set": 1, "G": 2})
    assert "list" in refusal([1, 2])
    unknown = content_of("ncsnpp")
    unknown["ema"]._modules["model"]._init_kwargs["concat_balance"] = 0.3
    assert "concat_balance" in refusal(unknown)
    extra = content_of("ncsnpp")
    extra["ema"]._modules["model"]._parameters["logvar"] = torch.nn.Parameter(torch.zeros(3))
    assert "logvar" in refusal(extra)
    missing = content_of("ncsnpp")
    del missing["ema"]._modules["model"]._modules["map_layer0"]
    assert "map_layer0.weight" in refusal(missing)
    filtered = content_of("ddpmpp")
    filtered["ema"]._modules["model"]._modules["enc"]["4x4_down"]._modules["conv0"].resample_filter[0, 0, 0, 0] = 0.5
    assert "enc.4x4_down.conv0.resample_filter" in refusal(filtered)
    unrecorded = content_of("ncsnpp")
    unrecorded["ema"]._modules["model"]._init_kwargs = None
    assert "arguments" in refusal(unrecorded)
    narrow = content_of("adm")
    narrow["ema"]._modules["model"]._init_kwargs = EasyDict(
        img_resolution=8, in_channels=3, out_channels=3, **{**ADM_KWARGS, "model_channels": 64}
    )
    assert "below 128" in refusal(narrow)


def test_a_module_inside_itself_ends(tmp_path):
    content = content_of("ncsnpp")
    model = content["ema"]._modules["model"]
    model._modules["enc"]["again"] = model._modules["enc"]
    write_pickle(tmp_path / "net.pkl", content)
    read_edm(tmp_path / "net.pkl")


def test_tensors_cannot_look_outside_their_storage(tmp_path):
    tensor = torch.zeros(4)
    content = content_of("ncsnpp")
    content["ema"].__dict__["leak"] = Call(torch._utils._rebuild_tensor_v2, tensor.untyped_storage(), 0, (1000,), (1,), False, {})
    write_pickle(tmp_path / "net.pkl", content)
    assert "damaged" in one_line(tmp_path / "net.pkl")


@pytest.mark.slow
def test_damaged_files_only_ever_raise_input_errors(tmp_path):
    write_pickle(tmp_path / "good.pkl", content_of("ncsnpp"))
    data = (tmp_path / "good.pkl").read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(24):
        broken = bytearray(data)
        for _ in range(generator.choice((1, 4, 16))):
            broken[generator.randrange(0, len(broken))] = generator.randrange(256)
        (tmp_path / "broken.pkl").write_bytes(broken)
        try:
            read_edm(tmp_path / "broken.pkl")
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 2


@pytest.mark.parametrize("precond", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_other_preconditionings_are_those_of_table_1(precond, tmp_path):
    """Karras et al. 2022, Table 1, written out in float64 beside the networks' own outputs."""
    content = content_of("adm" if precond == "iDDPMPrecond" else "ncsnpp", precond, sigma_min=0.002, sigma_max=100.0)
    model = content["ema"]._modules["model"]
    if precond == "iDDPMPrecond":  # a variance beside the image
        model._init_kwargs["out_channels"] = 6
        conv = model._modules["out_conv"]
        for name, value in list(conv._parameters.items()):
            conv._parameters[name] = torch.nn.Parameter(torch.cat([value, torch.full_like(value, 9.0)]))
    write_pickle(tmp_path / "net.pkl", content)
    network, preconditioning, _ = read_edm(tmp_path / "net.pkl")
    x, sigma = wave_images(3, 3, 8, 8).double(), torch.tensor([0.02, 1.5, 60.0], dtype=torch.float64)
    s = sigma.view(-1, 1, 1, 1)
    if precond == "VPPrecond":
        t = ((0.1**2 + 2 * 19.9 * (1 + sigma**2).log()).sqrt() - 0.1) / 19.9
        c_out, c_in, c_noise = -s, 1 / (s**2 + 1).sqrt(), 999 * t
    elif precond == "VEPrecond":
        c_out, c_in, c_noise = s, torch.ones_like(s), (sigma / 2).log()
    else:
        bar = [torch.sin(torch.tensor(j * torch.pi / 2 / (1000 * 1.008), dtype=torch.float64)).square() for j in range(1001)]
        u = [torch.tensor(0.0, dtype=torch.float64)]
        for j in range(1000, 0, -1):
            u.insert(0, ((u[0] ** 2 + 1) / (bar[j - 1] / bar[j]).clamp(min=0.001) - 1).sqrt())
        nearest = (torch.stack(u)[None] - sigma[:, None]).abs().argmin(1)
        c_out, c_in, c_noise = -s, 1 / (s**2 + 1).sqrt(), 999 - nearest
    expected = x + c_out * network((c_in * x).float(), c_noise.float()).double()
    ours = Denoiser(network, preconditioning)(x.float(), sigma.float()).double()
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(c_out.abs().max()))
    assert (ours - x).abs().max() > 1e-3
    assert preconditioning.sigma_min == 0.002 and preconditioning.sigma_max == 100.0


def test_an_iddpm_of_another_cosine_is_refused(tmp_path):
    write_pickle(tmp_path / "net.pkl", content_of("adm", "iDDPMPrecond", C_1=0.002))
    with pytest.raises(InputError, match="C_1 and C_2 are 0.002"):
        read_edm(tmp_path / "net.pkl")
