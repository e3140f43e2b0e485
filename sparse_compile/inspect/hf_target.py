"""Hugging Face configurations as targets: random weights and made-up inputs, no network."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from sparse_compile.errors import TargetError
from sparse_compile.inspect.targets import Target

BATCH, TOKENS = 2, 64
_SAMPLES = 8000  # of a sound wave: half a second
_FRAMES = 128  # of a spectrogram whose length the configuration leaves open
# positions that some families keep for padding
_RESERVED_POSITIONS = 2


def load(path: Path) -> Target:
    """The model of a configuration.

    Args:
        path: A model directory or a JSON file in it.

    Raises:
        TargetError: No configuration, transformers is missing, or the model takes inputs that
            cannot be made up from its configuration.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise TargetError(
            f"There is no {str(file)!r}.\n  Expected a Hugging Face model directory, which holds a "
            "config.json.\n  Files of code are named as `file.py:callable`."
        )
    try:
        import transformers
    except ImportError as error:
        raise TargetError(
            f"{str(path)!r} needs transformers, which cannot be imported: {error}.\n"
            "  Run `pip install 'sparse-compile[hf]'`."
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(str(file), local_files_only=True)
        model = _build(transformers, config)
    except Exception as error:
        raise TargetError(
            f"transformers {transformers.__version__} cannot build {str(file)!r}: "
            f"{type(error).__name__}: {error}.\n"
            "  Expected the config.json of a model that this version knows."
        ) from error
    kwargs = example_inputs(model)
    return Target(
        model=model, args=(), kwargs=kwargs, description=f"{path} ({type(model).__name__})"
    )


def _build(transformers: Any, config: Any) -> Any:
    """The architecture that the configuration names, else the causal or the bare model."""
    for name in config.architectures or ():
        architecture = getattr(transformers, name, None)
        if architecture is not None:
            return architecture(config)
    is_causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    if is_causal and not config.is_encoder_decoder:
        return transformers.AutoModelForCausalLM.from_config(config)
    return transformers.AutoModel.from_config(config)


def example_inputs(model: Any) -> dict[str, Any]:
    """Made-up inputs that fit a model's vocabulary, positions, image and sound sizes.

    Raises:
        TargetError: The model's main input is of a kind not known here.
    """
    config = model.config
    accepted = set(inspect.signature(model.forward).parameters)
    main = model.main_input_name
    if main not in _MAKERS:
        raise TargetError(
            f"{type(model).__name__} takes {main!r}, which cannot be made up from its "
            f"configuration.\n  Expected one of {', '.join(_MAKERS)}.\n"
            "  Write a file with a function that returns (model, args, kwargs)."
        )
    inputs = {main: _MAKERS[main](config)}
    joins_image_and_text = (
        hasattr(config, "text_config")
        and hasattr(config, "vision_config")
        and not any(hasattr(config, name) for name in ("image_token_id", "image_token_index"))
    )
    if joins_image_and_text:
        for name in ("input_ids", "pixel_values"):
            if name in accepted:
                inputs.setdefault(name, _MAKERS[name](config))
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _tokens(getattr(config, "decoder", None) or config)
    return inputs


def _tokens(config: Any) -> Any:
    """Random tokens that are none of the configuration's special ones."""
    import torch

    text = config.get_text_config(decoder=True)
    special = {
        value
        for part in (config, text)
        for name, value in part.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    plain = [token for token in range(text.vocab_size) if token not in special]
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    known = [limit - _RESERVED_POSITIONS for limit in limits if isinstance(limit, int)]
    tokens = min([limit for limit in known if limit > 0], default=TOKENS)
    return torch.tensor(plain)[torch.randint(len(plain), (BATCH, min(tokens, TOKENS)))]


def _image(config: Any) -> Any:
    import torch

    vision = getattr(config, "vision_config", None) or getattr(config, "encoder", None) or config
    size = getattr(vision, "image_size", None) or 224
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    return torch.randn(BATCH, channels, height, width)


def _spectrogram(config: Any) -> Any:
    import torch

    bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", 80)
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        # two strided convolutions in front: the encoder insists on its full length
        return torch.randn(BATCH, bins, 2 * config.max_source_positions)
    return torch.randn(BATCH, _FRAMES, bins)


def _sound(config: Any) -> Any:
    import torch

    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return torch.randn(BATCH, config.max_length, config.num_mel_bins)
    return torch.randn(BATCH, _SAMPLES)


_MAKERS = {
    "input_ids": _tokens,
    "pixel_values": _image,
    "input_features": _spectrogram,
    "input_values": _sound,
}
