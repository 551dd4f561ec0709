"""Models on the hub, by `huggingface_hub`: `owner/name[@revision][:subfolder]` to a local path and a model folder to a repository.

Of a repository only the files of one model are fetched (configurations, weights; no code), into the library's own cache. Its offline mode,
tokens and progress bars are the library's (HF_HUB_OFFLINE, HF_TOKEN, HF_HOME, HF_ENDPOINT).
"""

import glob
import re
import sys
import tempfile
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fastcm.consistency.denoiser import Denoiser
from fastcm.errors import InputError, RunError

PREFIX = "hf:"
NAME = r"[\w.-]+/[\w.-]+"
ID = re.compile(rf"(?P<repository>{NAME})(@(?P<revision>[^:@\s]+))?(:(?P<inside>[^:\s]+))?")
MODEL_FILES = (".pt", ".pth", ".ckpt", ".safetensors", ".pkl", ".onnx", ".pt2")
INDEX, CONFIG, WEIGHTS = "model_index.json", "config.json", "model.safetensors"
UNETS = ("unet/", "unet_ema/")
UNET_WEIGHTS = "diffusion_pytorch_model"
LISTED = 8  # names in an error


class HubId(NamedTuple):
    """A model or data set on the hub. inside: a folder or file of the repository (a data set: its configuration and split)."""

    repository: str
    revision: str | None
    inside: str | None

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision else "") + (f":{self.inside}" if self.inside else "")


def hub_id(text: str) -> HubId | None:
    """The hub's id that `text` is by its form: with `hf:`, or bare where its owner is no folder here; None for what is a path."""
    explicit = text.startswith(PREFIX)
    match = ID.fullmatch(text.removeprefix(PREFIX))
    if match is None:
        if explicit:
            raise InputError(f"not a name on the hub: {text}. Write it as hf:owner/name, hf:owner/name@revision or hf:owner/name:folder.")
        return None
    found = HubId(**match.groupdict())
    owner = found.repository.partition("/")[0]
    is_path = set(owner) == {"."} or Path(owner).exists() or found.repository.lower().endswith(MODEL_FILES)
    return found if explicit or not is_path else None


@cache
def fetch(model: HubId) -> Path:
    """The local path of a model: a folder, or the file that `inside` names. Fetched once in a process. Raises InputError, RunError."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where = {"repo_id": model.repository, "revision": model.revision}
    try:
        try:
            names = [file.rfilename for file in huggingface_hub.HfApi().model_info(**where).siblings or ()]
        except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError):
            raise
        except Exception as error:
            return _from_cache(model, error)
        config = next((name for name in (CONFIG, *(f"{unet}{CONFIG}" for unet in UNETS)) if name in _inside(names, model)), None)
        if config is not None:
            _check_config(model, Path(huggingface_hub.hf_hub_download(filename=_prefix(model) + config, **where)))
        wanted, path = wanted_files(names, model)
        folder = huggingface_hub.snapshot_download(allow_patterns=[glob.escape(name) for name in wanted], **where)
    except Exception as error:
        raise refusal(error, model) from error
    return Path(folder, path)


def _from_cache(model: HubId, reason: Exception) -> Path:
    """What was fetched before, where the hub cannot be reached for `reason`; else raises it."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    where = {"repo_id": model.repository, "revision": model.revision, "local_files_only": True}
    try:  # by a pattern that no file has: a folder of some of the repository's files is no error yet
        folder = Path(huggingface_hub.snapshot_download(allow_patterns=["\0"], **where))
    except LocalEntryNotFoundError:
        raise reason from None
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        wanted, path = wanted_files(names, model)
        huggingface_hub.snapshot_download(allow_patterns=[glob.escape(name) for name in wanted], **where)
    except (InputError, LocalEntryNotFoundError) as error:
        why = "HF_HUB_OFFLINE is set" if isinstance(reason, OfflineModeIsEnabled) else _line(reason)
        raise InputError(f"half-downloaded model in MODEL: {model} ({why}). Run again with the hub in reach.") from error
    if not isinstance(reason, OfflineModeIsEnabled):
        print(f"fastcm: the hub cannot be reached ({_line(reason)}): {model} as it was fetched before", file=sys.stderr)
    return folder / path


def _prefix(model: HubId) -> str:
    return f"{model.inside.strip('/')}/" if model.inside else ""


def _inside(names: list[str], model: HubId) -> list[str]:
    """The names below the folder that is asked for, relative to it."""
    prefix = _prefix(model)
    return [name[len(prefix) :] for name in names if name.startswith(prefix)]


def wanted_files(names: list[str], model: HubId) -> tuple[list[str], str]:
    """(files to fetch, the model's path in the repository) for a repository of these files. Raises InputError for no model, or several."""
    if model.inside in names:
        return [name for name in names if name in (model.inside, f"{model.inside}.data")], model.inside
    prefix, inside = _prefix(model), _inside(names, model)
    if prefix and not inside:
        raise InputError(f"no such folder or file in MODEL: {model}. The repository has {_listed(names)}.")
    files = _folder_files(inside)
    if files:
        return [prefix + name for name in files], prefix
    single = [name for name in inside if name.lower().endswith(MODEL_FILES) and "/" not in name]
    if len(single) == 1:
        return [prefix + name for name in inside if name in (single[0], f"{single[0]}.data")], prefix + single[0]
    folders = sorted({str(PurePosixPath(name).parent) for name in inside if name.count("/")})
    found = single or [folder for folder in folders if _folder_files([n[len(folder) + 1 :] for n in inside if n.startswith(f"{folder}/")])]
    if found:
        what = "several models" if len(found) > 1 else "no model at the top"
        named = HubId(model.repository, model.revision, prefix + found[0])
        raise InputError(f"{what} in MODEL: {model} (it has {_listed(found)}). Name one, as {named}.")
    raise InputError(f"no model in MODEL: {model} (it has {_listed(inside)}). Give one of fastcm, diffusers, or a .pt, .pkl or .onnx.")


def _folder_files(inside: list[str]) -> list[str]:
    """The files of the model folder, run folder or diffusers folder that these names are; none where they are none of these."""
    present = set(inside)
    for unet in UNETS:
        if f"{unet}{CONFIG}" in present:
            about = [name for name in inside if name == INDEX or (name.startswith("scheduler/") and name.endswith(".json"))]
            return [*about, f"{unet}{CONFIG}", *_unet_weights(inside, unet)]
    for folder in ("", "model/"):
        if {f"{folder}{CONFIG}", f"{folder}{WEIGHTS}"} <= present:
            return [f"{folder}{CONFIG}", f"{folder}{WEIGHTS}"]
    weights = _unet_weights(inside, "")
    return [CONFIG, *weights] if CONFIG in present and weights else []


def _unet_weights(inside: list[str], folder: str) -> list[str]:
    """diffusers' weights of a folder: safetensors before .bin, full precision before a variant, whole or in parts with their index."""
    start = f"{folder}{UNET_WEIGHTS}"
    part, index = r"(-\d+-of-\d+)?", r"(\.index\.json)?"
    for form in (r"\.safetensors", rf"{part}\.safetensors{index}", rf"{part}\.bin{index}", r"\..+\.safetensors"):
        found = [name for name in inside if name.startswith(start) and re.fullmatch(form, name[len(start) :])]
        if found:
            return found
    return []


def _check_config(model: HubId, config: Path) -> None:
    """Refuses other kinds of model by their config.json, before their weights are fetched."""
    from fastcm.weights.model_folder import FORMAT, read_json

    content = read_json(config)
    if content.get("format") not in (FORMAT, "fastcm-run") and content.get("_class_name") != "UNet2DModel":
        kind = content.get("_class_name") or content.get("model_type") or ", ".join(map(str, content))[:80]
        raise InputError(f"no model of images in MODEL: {model} (config.json: {kind}). Give a repository of fastcm or diffusers.")


def refusal(error: Exception, what: HubId, *, option: str = "MODEL") -> Exception:
    """One line for what `huggingface_hub` raises, with the remedy: InputError where the name or the access is at fault, else RunError."""
    import httpx
    from huggingface_hub import errors

    if isinstance(error, InputError | RunError):
        return error
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return InputError(f"a gated repository in {option}: {what}. Accept its terms on the hub, then log in: hf auth login, or HF_TOKEN.")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return InputError(f"no such repository in {option}: {what}. Correct the name; a private one needs hf auth login, or HF_TOKEN.")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"no such revision in {option}: {what}. Give a branch, tag or commit of the repository.")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"not a name on the hub in {option}: {what}. Write it as hf:owner/name.")
    if status == 429:
        return RunError(f"too many requests to the hub for {option}: {what}. Wait some minutes, or log in: hf auth login.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return InputError(f"not in the hub's cache, and HF_HUB_OFFLINE is set, in {option}: {what}. Fetch it once without.")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return InputError(f"a file that is not there in {option}: {what} ({_line(error)}). Give another revision.")
    if isinstance(error, httpx.HTTPError | errors.LocalEntryNotFoundError | OSError):
        return RunError(f"the hub cannot be reached for {option}: {what} ({_line(error)}). Run again: what was fetched is kept.")
    return error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more or "nothing"


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160].rstrip(". ")


def push(denoiser: Denoiser, info: dict, destination: HubId, *, form: str = "fastcm", public: bool = False) -> str:
    """Uploads a model with its card, as a fastcm or diffusers folder, to a repository that is made private unless `public`; its address.

    Where the training data lay on this machine is left out. Raises InputError, RunError.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with tempfile.TemporaryDirectory(prefix="fastcm-") as temporary:
        folder = Path(temporary)
        write_folder(folder, denoiser, published(info), form=form)
        try:
            api.create_repo(destination.repository, private=not public, exist_ok=True)
            options = {"repo_id": destination.repository, "revision": destination.revision, "path_in_repo": destination.inside}
            return str(api.upload_folder(folder_path=folder, commit_message="Upload by fastcm", **options).commit_url)
        except Exception as error:
            raise refusal(error, destination, option="the upload") from error


def published(info: dict) -> dict:
    """The description without the folders of this machine: a path of the training data becomes its last part."""
    training = info.get("training")
    if not isinstance(training, dict) or str(training.get("data", "")).startswith(PREFIX):
        return info
    return {**info, "training": {name: Path(value).name if name == "data" else value for name, value in training.items()}}


def write_folder(folder: Path, denoiser: Denoiser, info: dict, *, form: str) -> None:
    """The files of an upload: a model folder, or diffusers' with a card, the card headed by what the hub reads of it."""
    from fastcm.weights import diffusers, model_folder
    from fastcm.weights.model_card import hub_heading, model_card

    if form == "diffusers":
        diffusers.write_diffusers(folder, denoiser, info)
        card = model_card(model_folder.model_config(denoiser, info), weights="unet/diffusion_pytorch_model.safetensors")
    else:
        model_folder.save_model(folder, denoiser, info)
        card = (folder / model_folder.CARD_NAME).read_text(encoding="utf-8")
    model_folder.write_text(folder / model_folder.CARD_NAME, hub_heading(form) + card)
