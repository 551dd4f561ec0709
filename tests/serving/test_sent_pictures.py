"""Pictures and masks in a request's body: transparency is laid over white, in a mask it is refused."""

import base64
import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastcm.errors import InputError
from fastcm.serving.requests import decoded_picture

GENERATOR = SimpleNamespace(resolution=8, channels=3)


def sent(alpha):
    pixels = np.dstack([np.full((8, 8, 3), 10, np.uint8), np.full((8, 8), alpha, np.uint8)])
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return {"x": base64.b64encode(file.getvalue()).decode()}


def test_transparency_is_white_in_a_picture_and_refused_in_a_mask():
    assert decoded_picture(sent(0), "x", GENERATOR, grey=False).tolist() == [[[255] * 3] * 8] * 8
    assert decoded_picture(sent(255), "x", GENERATOR, grey=True).tolist() == [[10] * 8] * 8
    with pytest.raises(InputError, match="transparency in x: white is generated, black kept"):
        decoded_picture(sent(254), "x", GENERATOR, grey=True)
