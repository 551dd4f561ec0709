"""What a client asks for, from JSON or a query, checked before anything is drawn."""

import base64
import binascii
import io
import json
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

import numpy as np

from fastcm.errors import InputError, nearest
from fastcm.generation.pictures import MODES
from fastcm.generation.request import chosen_sampler, label_array, seed_array

# Network calls of one image: more are not better, and one request must not hold the others up.
MOST_CALLS = 64
OUTPUTS = ("json", "png")
GENERATE_FIELDS = ("seeds", "labels", "steps", "sigmas", "output")
INPAINT_FIELDS = ("image", "mask", *GENERATE_FIELDS)
QUERY_FIELDS = ("seed", "label", "steps")


class Asked(NamedTuple):
    """seeds int64 [N], labels int64 [N] or None; how: ("sigmas", levels) of a consistency sampler, or ("steps", K) of a solver."""

    seeds: np.ndarray
    labels: np.ndarray | None
    how: Hashable
    output: str


def json_object(body: bytes, known: Iterable[str]) -> dict[str, Any]:
    """The body as a JSON object whose fields are all known."""
    try:
        content = json.loads(body)
    except RecursionError:
        raise InputError("not JSON in the body: nested too deeply. Send one object.") from None
    except ValueError as error:  # of JSON, of UTF-8, and of integers too long to convert
        raise InputError(f"not JSON in the body: {str(error).splitlines()[0][:100]}. Send one object.") from None
    if not isinstance(content, dict):
        raise InputError(f'not a JSON object in the body: {type(content).__name__}. Send one as {{"seeds": [0]}}.')
    for name in content:
        if name not in list(known):
            remedy = nearest(name, known) or f" Use some of {', '.join(known)}."
            raise InputError(f"unknown field in the body: {_short(name)}.{remedy}")
    return {name: value for name, value in content.items() if value is not None}


def query_object(query: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """The fields of GET /image as those of a JSON body."""
    fields = {}
    for name, value in query:
        if name not in QUERY_FIELDS or name in fields:
            known = ", ".join(QUERY_FIELDS)
            raise InputError(f"unknown or repeated field in the query: {_short(name)}. Use each of {known} once at most.")
        fields[name] = value
    asked = {"seeds": [fields.get("seed", "0")], "output": "png"}
    if "label" in fields:
        asked["labels"] = fields["label"]
    if "steps" in fields:
        asked["steps"] = whole_number(fields["steps"], "steps")
    return asked


def asked_of(fields: dict[str, Any], generator, *, most_seeds: int, edit: bool = False) -> Asked:
    """The fields, checked against the model. edit: of an editing task, whose levels are its own where none are given."""
    if "seeds" not in fields:
        raise InputError("missing field in the body: seeds. Give a list of integers.")
    given = fields["seeds"] if isinstance(fields["seeds"], list) else [fields["seeds"]]
    if not 1 <= len(given) <= most_seeds:
        raise InputError(f"wrong number of seeds in seeds: {len(given)}. Give 1 to {most_seeds}.")
    seeds = seed_array([whole_number(seed, "seeds") for seed in given])
    labels = fields.get("labels")
    for label in labels if isinstance(labels, list) else [labels]:
        if isinstance(label, bool) or not isinstance(label, (int, str, type(None))):
            raise InputError(f"not a class in labels: {_short(label)}. Give a name, a number, or a list of them.")
    if isinstance(labels, list) and len(labels) > len(seeds):
        raise InputError(f"more labels than seeds in labels: {len(labels)}. Give {len(seeds)} at most.")
    output = fields.get("output", "json")
    if output not in OUTPUTS:
        raise InputError(f"unknown value in output: {_short(output)}. Use one of {', '.join(OUTPUTS)}.")
    return Asked(seeds, label_array(labels, seeds, generator.classes), _how(fields, generator, edit=edit), output)


def _how(fields: dict[str, Any], generator, *, edit: bool) -> Hashable:
    steps, sigmas = fields.get("steps"), fields.get("sigmas")
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_CALLS):
        raise InputError(f"illegal value in steps: {_short(steps)}. Give an integer from 1 to {MOST_CALLS}.")
    if sigmas is not None:
        numbers = isinstance(sigmas, list) and all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in sigmas)
        if not numbers or not 1 <= len(sigmas) <= MOST_CALLS:
            raise InputError(f"illegal value in sigmas: {_short(sigmas)}. Give a list of 1 to {MOST_CALLS} numbers.")
    if edit and steps is None and sigmas is None:
        return ("sigmas", None)
    if edit or chosen_sampler(None, generator.info, generator.preconditioning) == "consistency":
        return ("sigmas", generator.sigmas(steps, sigmas))
    if sigmas is not None:
        raise InputError("sigmas for a diffusion teacher in sigmas: its solver has a grid of its own. Give steps.")
    return ("steps", steps)


def whole_number(value: Any, field: str) -> int:
    """An integer, or the decimal text of one: JSON's readers in other languages keep 53 bits of a number."""
    if isinstance(value, str):
        try:
            return int(value) if len(value) <= 20 else int("")
        except ValueError:
            raise InputError(f"not an integer in {field}: {_short(value)}. Give a whole number of 64 bits.") from None
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"not an integer in {field}: {_short(value)}. Give a whole number of 64 bits.")
    return value


def decoded_picture(fields: dict[str, Any], name: str, generator, *, grey: bool) -> np.ndarray:
    """A field's base64 of a PNG at the model's resolution -> uint8 [H, W], or [H, W, C]. Its size is checked before it is decoded."""
    from PIL import Image

    if not isinstance(fields.get(name), str):
        raise InputError(f"missing field in the body: {name}. Give the base64 of a PNG.")
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(fields[name], validate=True)), formats=("PNG",))
        if picture.size != (generator.resolution, generator.resolution):
            found = "x".join(map(str, picture.size))
            raise InputError(f"wrong size in {name}: {found}. The model has {generator.resolution}x{generator.resolution}.")
        if "A" in picture.getbands() or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            if grey and picture.getextrema()[3][0] < 255:
                raise InputError(f"transparency in {name}: white is generated, black kept. Send a PNG without an alpha channel.")
            if generator.channels != 4:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return np.array(picture.convert("L" if grey else MODES[generator.channels]))
    except (binascii.Error, OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"unreadable picture in {name}: not the base64 of a PNG. Encode it again.") from None


def _short(value: Any) -> str:
    """A value in an error: clients can send long ones."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}.."
