"""The model repository for Triton Inference Server: its text against the published schema, its graph fed as the server feeds it."""

import numpy as np
import onnxruntime
import pytest
from exported_models import INFO, tiny_denoiser
from google.protobuf import text_format
from triton_schema import model_config

from fastcm.cli import main
from fastcm.export import triton_repository
from fastcm.generation.onnx_contract import Contract
from fastcm.weights.model_folder import save_model

NUMPY = {2: np.uint8, 9: np.int64, 11: np.float32}
FORMS = {
    "plain": Contract(steps=1, channels=3, resolution=8),
    "classes, bytes": Contract(steps=1, channels=3, resolution=8, classes=4, uint8=True),
    "two steps": Contract(steps=2, channels=1, resolution=16, classes=10),
    "seeds": Contract(steps=1, channels=3, resolution=8, classes=4, seeded=True),
    "inpaint": Contract(steps=4, channels=3, resolution=8, classes=4, task="inpaint"),
    "denoise": Contract(steps=0, channels=3, resolution=8, classes=4, task="denoise"),
}


def parsed(text: str):
    return text_format.Parse(text, model_config())


def fed(values, batch: int) -> dict[str, np.ndarray]:
    """What the server hands to a graph for a batch: each value's dims after the batch, or its reshape's."""
    feeds = {}
    for value in values:
        shape = list(value.reshape.shape) if value.HasField("reshape") else list(value.dims)
        feeds[value.name] = np.zeros((batch, *shape), NUMPY[value.data_type])
    return feeds


@pytest.mark.parametrize("form", FORMS)
def test_the_configuration_is_the_contracts(form):
    contract = FORMS[form]
    config = parsed(triton_repository.config("faces-64", contract))
    assert (config.name, config.backend) == ("faces-64", "onnxruntime")
    assert (config.default_model_filename, config.max_batch_size) == ("model.onnx", 64)
    contract.check(fed(config.input, 3))
    (images,) = config.output
    assert (images.name, tuple(images.dims), NUMPY[images.data_type]) == ("images", *contract.output)
    assert config.dynamic_batching.max_queue_delay_microseconds == 2000
    assert list(config.dynamic_batching.preferred_batch_size) == [8, 16, 32]
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, 2 if contract.seeded else 0)  # KIND_CPU, KIND_AUTO
    assert config.version_policy.latest.num_versions == 1
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 64]
    for warmup in config.model_warmup:
        inputs = {entry.key: entry.value for entry in warmup.inputs}
        assert {name: (list(value.dims), value.data_type) for name, value in inputs.items()} == {
            value.name: (list(value.dims), value.data_type) for value in config.input
        }
        assert all(value.random_data or value.zero_data for value in inputs.values())


def test_the_schema_refuses_what_it_does_not_know():
    text = triton_repository.config("x", FORMS["plain"])
    for broken in (text.replace("max_batch_size", "max_batch"), text.replace("KIND_AUTO", "KIND_TPU"), text.replace("FP32", "FLOAT")):
        with pytest.raises(text_format.ParseError):
            parsed(broken)


@pytest.mark.slow
def test_a_repository_by_the_command(tmp_path, capsys):
    """Two versions of one model; the graph makes images of what the server feeds it, warm-up included."""
    model, repository = tmp_path / "digits", tmp_path / "models"
    save_model(model, tiny_denoiser(), INFO)
    for options in ([], ["--uint8", "--precision", "fp16"]):
        assert main(["export", str(model), "--serving", str(repository), *options]) == 0
    assert f"{repository / 'digits'}, version 2" in capsys.readouterr().out
    files = sorted(file.relative_to(repository).as_posix() for file in repository.rglob("*") if file.is_file())
    graphs = [f"digits/{version}/model{end}" for version in (1, 2) for end in (".onnx", ".onnx.manifest.json")]
    assert files == [*graphs, "digits/config.pbtxt"] and [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []
    config = parsed((repository / "digits" / "config.pbtxt").read_text())
    graph = repository / "digits" / "2" / config.default_model_filename
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    for batch in (1, config.max_batch_size):
        (images,) = session.run([config.output[0].name], fed(config.input, batch))
        assert images.shape == (batch, *config.output[0].dims) and images.dtype == NUMPY[config.output[0].data_type]


def test_bad_options_are_named(tmp_path, capsys):
    model = tmp_path / "not a name"
    save_model(model, tiny_denoiser(), INFO)
    (tmp_path / "file").write_text("")
    for options, words in (
        ([str(tmp_path / "models")], "not a name for a served model in MODEL: not a name"),
        ([str(tmp_path / "file")], "a file in --serving"),
        ([str(tmp_path / "models"), "--batch", "4"], "an option that --serving decides itself: --batch"),
        ([str(tmp_path / "models"), "--target", "web"], "an option that --serving decides itself: --target"),
    ):
        assert main(["export", str(model), "--serving", *options]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "models").exists()
