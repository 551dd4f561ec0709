"""Numbers of images and times as people write them: 500kimg, 64000img, 30s, 10m."""

import re

from fastcm.errors import InputError

KIMG = re.compile(r"(\d+(?:\.\d+)?(?:e\d+)?)(img|kimg|mimg)?", re.IGNORECASE)
SECONDS = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)?")


def kimg(text: str) -> float:
    """Thousands of images of `500kimg`, `2Mimg`, `64000img` or a plain number."""
    match = KIMG.fullmatch(text)
    if match is None:
        raise InputError(f"not a number of images: {text}. Write it as 500kimg, 2Mimg or 64000img.")
    return float(match[1]) * {"img": 1e-3, "kimg": 1.0, "mimg": 1e3, None: 1.0}[match[2] and match[2].lower()]


def seconds(text: str) -> float:
    """Seconds of `30s`, `10m`, `1h` or a plain number."""
    match = SECONDS.fullmatch(text)
    if match is None:
        raise InputError(f"not a time: {text}. Write it as 30s, 10m or 1h.")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, None: 1}[match[2]]
