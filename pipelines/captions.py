"""What each picture of a folder shall show: from a file that maps pictures to texts, or from beside the pictures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from pipelines.sources import Source, parsed, read_text, text_or_none

FORMS = '{"NAME": "TEXT", ...}, or {"ID": {"prompt": "TEXT", "category": ...}, ...} as MJHQ-30K has it'
"""What a file of captions may hold. A NAME is a path below the folder or a file's name, with its suffix or without; an
ID is a file's name without."""


def load_captions(path: Path) -> dict[str, str]:
    """Texts by name, from a JSON file in one of the two `FORMS`; names whose prompt is null are left out.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path = path.expanduser()
    if not path.is_file():
        raise ValueError(f"no file of captions at {path}")
    entries = parsed(read_text(path), str(path))
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path} must hold a JSON object, {FORMS}")
    found = {name: _text(entry, f"{path}: {name}") for name, entry in entries.items()}
    return {name: text for name, text in found.items() if text is not None}


def _text(entry: object, where: str) -> str | None:
    if isinstance(entry, dict) and "prompt" not in entry:
        raise ValueError(f"{where} has no prompt: a file of captions holds {FORMS}")
    return text_or_none(entry["prompt"] if isinstance(entry, dict) else entry, where)


def own_captions(pictures: Source) -> list[str] | None:
    """The captions that pictures bring with them, where every one has some."""
    known = [caption for caption in pictures.captions or () if caption is not None]
    return known if len(known) == len(pictures) else None


def by_name(pictures: Source) -> dict[str, str]:
    """The captions that pictures bring with them, by their names without suffix."""
    pairs = zip(pictures.names, pictures.captions or (), strict=False)
    return {_stem(name): caption for name, caption in pairs if caption is not None}


def assigned(names: Sequence[str], captions: Mapping[str, str], where: str) -> list[str]:
    """The caption of each picture.

    Args:
        names: paths below the pictures' folder.
        where: what a person calls the captions.

    Raises:
        ValueError: a picture has none, or one caption fits several pictures.
    """
    keys = [_key(name, captions) for name in names]
    absent = [name for name, key in zip(names, keys, strict=True) if key is None]
    if absent:
        raise ValueError(
            f"{where} has no caption for {len(absent):,} of {len(names):,} pictures, such as {absent[0]}: each is"
            " looked for by its path, and by its file's name, with and without suffix"
        )
    twice = next((key for key, count in Counter(keys).items() if count > 1), None)
    if twice is not None:
        several = [name for name, key in zip(names, keys, strict=True) if key == twice]
        raise ValueError(f"{where}: {twice} fits {several[0]} and {several[1]}: name pictures by their paths")
    return [captions[key] for key in keys if key is not None]


def _key(name: str, captions: Mapping[str, str]) -> str | None:
    file = PurePosixPath(name).name
    return next((key for key in (name, _stem(name), file, PurePosixPath(file).stem) if key in captions), None)


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()
