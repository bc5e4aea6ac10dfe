"""What turns texts, or texts with images, into model inputs: the tokenizer and the processor of a base."""

from __future__ import annotations

import json
from typing import Any

from emloc_tools.errors import InputError
from emloc_tools.models.skeleton import reason
from emloc_tools.models.source import Source

FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError)
PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id")
LEGACY_TEMPLATE = "chat_template.json"  # of processors alone, in older releases


def reads_images(config: Any) -> bool:
    """Whether a model takes images beside its text."""
    return getattr(config, "vision_config", None) is not None and config.get_text_config() is not config


def load_tokenizer(source: Source, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the base model, with the chat template that its processor has. Raises `InputError`."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        legacy = source.folder / LEGACY_TEMPLATE
        if tokenizer.chat_template is None and legacy.is_file():
            tokenizer.chat_template = json.loads(legacy.read_text(encoding="utf-8"))["chat_template"]
    except FAILURES as error:
        raise InputError(f"{source.id}: no usable tokenizer for text data: {reason(error)}") from error
    return tokenizer


def load_processor(source: Source, config: Any, *, trust_remote_code: bool = False) -> Any:
    """The processor of a base that reads images: it has a `tokenizer` and an `image_processor`.

    Images need Pillow and nothing else, also where the processor's part for videos needs torchvision. Raises
    `InputError` where the base has no such processor, or where that needs a package which is not installed.
    """
    from transformers import PROCESSOR_MAPPING, AutoProcessor
    from transformers.utils import is_torchvision_available

    require_pillow()
    cls = PROCESSOR_MAPPING.get(type(config), None)
    try:
        if cls is not None and "video_processor" in cls.get_attributes() and not is_torchvision_available():
            processor = _without_videos(cls, source)
        else:
            processor = AutoProcessor.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except (*FAILURES, ImportError) as error:
        raise InputError(f"{source.id}: no usable processor for images: {reason(error)}") from error
    if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
        raise InputError(
            f"{source.id} holds no processor for images (preprocessor_config.json); a .safetensors file as --data can "
            "give model inputs that are ready"
        )
    return processor


def placeholders(config: Any, processor: Any) -> frozenset[int]:
    """The tokens that stand for images in a text; the model puts the images' features in their place."""
    found = {getattr(holder, name, None) for holder in (config, processor) for name in PLACEHOLDERS}
    found |= set(getattr(processor, "image_token_ids", None) or ())
    return frozenset(token for token in found if isinstance(token, int))


def _without_videos(cls: Any, source: Source) -> Any:
    """A processor without its part for videos, from the folder's files."""
    from transformers import AutoImageProcessor, AutoTokenizer

    loaders = {"tokenizer": AutoTokenizer, "image_processor": AutoImageProcessor}
    cls = _allowing_none(cls)
    settings, _ = cls.get_processor_dict(source.folder)
    parts = [loaders[part] if part != "video_processor" else None for part in cls.get_attributes()]
    loaded = [None if part is None else part.from_pretrained(source.folder) for part in parts]
    return cls.from_args_and_dict(loaded, settings)


def _allowing_none(cls: Any) -> Any:
    """A processor class that may lack a part. Its own check looks up the class of a part even where there is none."""

    class Partial(cls):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    return Partial


def require_pillow() -> None:
    """Raise `InputError` where Pillow is not installed: it is an extra, for those who have images."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise InputError(
            'images need Pillow, which is not installed: pip install "emloc-tools[vision]", or pillow'
        ) from error
