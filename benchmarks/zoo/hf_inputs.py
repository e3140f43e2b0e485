"""Inputs for a Hugging Face model, made from its configuration and its forward's parameters.

`candidates` yields guesses, the richest first; `first_that_runs` keeps the first one with which
the model runs. So an architecture needs no entry here until all of its guesses fail.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.hf_overrides import INPUTS

TOKENS = 10
TARGET_TOKENS = 7
BATCH = 2
FRAMES = 48  # of spectrograms
SAMPLES = 1600  # of raw audio

MELS_OF_SPEECH = 16

Inputs = dict[str, Any]


def setting(config: Any, *names: str, default: Any = None) -> Any:
    """The first of `names` that the configuration or one of its sub-configurations has."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None and not callable(value):
            return value
    for key in (
        "text_config", "vision_config", "audio_config", "encoder", "decoder", "vision_encoder",
        "encoder_config", "thinker_config", "backbone_config", "llm_config", "speech_config",
        "question_encoder", "generator", "vq_config", "audio_encoder_config", "text_encoder",
        "perception_encoder", "image_config", "acoustic_encoder_config", "vision_tower_config",
        "semantic_config", "video_config", "detector_config",
    ):  # fmt: skip
        inner = getattr(config, key, None)
        if inner is not None and not isinstance(inner, (dict, str, int)):
            value = setting(inner, *names)
            if value is not None:
                return value
    return default


def first_that_runs(model: nn.Module, padded: bool, seed: int = 0) -> Inputs:
    """The first guess with which the model runs in eager mode.

    Raises:
        RuntimeError: No guess works; the first guess's error is the cause.
    """
    first: Exception | None = None
    for inputs in candidates(model, padded, seed):
        torch.manual_seed(seed)
        try:
            with torch.no_grad():
                model(**inputs)
        except Exception as error:  # a guess may fail in any way
            first = first or error
            continue
        return inputs
    raise RuntimeError(f"{type(model).__name__}: no inputs found: {first}") from first


def candidates(model: nn.Module, padded: bool, seed: int) -> Iterator[Inputs]:
    """Guesses at a model's inputs, the richest first."""
    names = set(inspect.signature(model.forward).parameters)
    config = model.config
    make = torch.Generator().manual_seed(seed)
    text = _text(config, names, padded, make)
    given = INPUTS.get(config.model_type, {})
    drawn = {name: _drawn(how, make) for name, how in given.items() if name in names}
    if drawn:
        yield {**text, **drawn}
        yield drawn
    if "pixel_values" in names and "input_ids" in names:
        yield from _with_images(model, config, names, text, make)
    if "input_features" in names and "input_ids" in names:
        yield from _with_audio(config, names, text, make)
    if "pixel_values" in names:
        for picture in _pictures(config, make):
            yield {**text, "pixel_values": picture}
            yield {"pixel_values": picture, **_extras(config, names, make)}
    if "pixel_values" in names and "spatial_shapes" in names:
        width = 3 * setting(config, "patch_size", default=8) ** 2
        yield {**text, "pixel_values": torch.randn(BATCH, 16, width, generator=make)}
    if "pixel_values_videos" in names:
        for picture in _pictures(config, make):
            yield {**text, "pixel_values_videos": picture}
    for key in ("input_features", "input_values", "audio_values", "inputs", "audio_codes", "codes"):
        if key in names:
            for sound in _sounds(config, key, make):
                yield {**text, key: sound}
                yield {key: sound}
    if {"states", "actions"} <= names:
        yield _trajectory(config, make)
    if "past_values" in names:
        yield from _series(config, names, make)
    if names & {"grid_thw", "image_grid_thw"} and "input_ids" not in names:
        yield from _patches(config, names, make)
    if "input_ids" in names:
        yield text
        yield {"input_ids": text["input_ids"]}
        yield {**text, "bbox": _boxes(make)}
    for key in ("inputs_embeds", "hidden_states", "embeddings", "x"):
        if key in names:
            width = setting(config, "hidden_size", "d_model", default=32)
            embedded = torch.randn(BATCH, TOKENS, width, generator=make)
            yield {**text, key: embedded}
            yield {key: embedded}


def _drawn(how: Any, make: torch.Generator) -> Any:
    """A tensor told as "normal 2 10 32" (or ids, ones, zeros); lists are literal tensors."""
    if isinstance(how, list):
        return torch.tensor(how)
    if not isinstance(how, str):
        return how
    kind, *sizes = how.split()
    shape = [int(size) for size in sizes]
    if kind == "ids":
        return torch.randint(9, 90, shape, generator=make)
    if kind == "normal":
        return torch.randn(shape, generator=make)
    return {"ones": torch.ones, "zeros": torch.zeros}[kind](shape, dtype=torch.long)


def _text(config: Any, names: set[str], padded: bool, make: torch.Generator) -> Inputs:
    text: Inputs = {}
    vocab = setting(config, "vocab_size", "num_embeddings", default=128)
    vocab = min(vocab, 90) if isinstance(vocab, int) else 90
    if "input_ids" in names:
        text["input_ids"] = torch.randint(9, vocab, (BATCH, TOKENS), generator=make)
    if padded and "attention_mask" in names and "input_ids" in names:
        mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
        mask[1, TOKENS - 3 :] = 0
        text["attention_mask"] = mask
    if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
        text["decoder_input_ids"] = torch.randint(9, vocab, (BATCH, TARGET_TOKENS), generator=make)
    if "bbox" in names:
        text["bbox"] = _boxes(make)
    return text | _extras(config, names, make)


def _extras(config: Any, names: set[str], make: torch.Generator) -> Inputs:
    """Second inputs that single architectures ask for, told by their parameter names."""
    extra: Inputs = {}
    ids = torch.randint(9, 90, (BATCH, TARGET_TOKENS), generator=make)
    if "qformer_input_ids" in names:
        extra["qformer_input_ids"] = ids
    if "task_inputs" in names:
        extra["task_inputs"] = torch.randint(9, 90, (BATCH, 77), generator=make)
    if "visual_feats" in names:
        width = setting(config, "visual_feat_dim", default=2048)
        extra["visual_feats"] = torch.randn(BATCH, 5, width, generator=make)
        extra["visual_pos"] = torch.rand(BATCH, 5, 4, generator=make)
    if "pixel_attention_mask" in names and "spatial_shapes" in names:
        extra["pixel_attention_mask"] = torch.ones(BATCH, 16, dtype=torch.long)
        extra["spatial_shapes"] = torch.tensor([[4, 4]] * BATCH)
    if "past_values_padding" in names:
        extra["past_values_padding"] = torch.zeros(BATCH, 64)
        extra["freq"] = torch.zeros(BATCH, 1, dtype=torch.long)
    if "decoder_input_values" in names:
        extra["decoder_input_values"] = torch.randn(BATCH, 6, MELS_OF_SPEECH, generator=make)
    return extra


def _trajectory(config: Any, make: torch.Generator) -> Inputs:
    steps = 6
    return {
        "states": torch.randn(BATCH, steps, config.state_dim, generator=make),
        "actions": torch.randn(BATCH, steps, config.act_dim, generator=make),
        "rewards": torch.randn(BATCH, steps, 1, generator=make),
        "returns_to_go": torch.randn(BATCH, steps, 1, generator=make),
        "timesteps": torch.arange(steps).repeat(BATCH, 1),
        "attention_mask": torch.ones(BATCH, steps),
    }


def _boxes(make: torch.Generator) -> Tensor:
    corners = torch.randint(0, 20, (BATCH, TOKENS, 4), generator=make)
    corners[..., 2:] += 25
    return corners


def _pictures(config: Any, make: torch.Generator) -> Iterator[Tensor]:
    size = setting(config, "image_size", "img_size", "input_size", "crop_size", default=96)
    size = size.get("height", 32) if isinstance(size, dict) else size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = setting(config, "num_channels", "in_channels", "in_chans", "num_input_channels")
    channels = channels if isinstance(channels, int) else 3
    frames = setting(config, "num_frames", "frames_per_clip", default=4)
    sizes = [(height, width)]
    sizes += [(side, side) for side in (32, 64, 224) if (side, side) not in sizes]
    if setting(config, "num_frames", "frames_per_clip", "tubelet_size") is not None:
        yield torch.randn(BATCH, frames, channels, height, width, generator=make)
    for high, wide in sizes:
        yield torch.randn(BATCH, channels, high, wide, generator=make)
    yield torch.randn(BATCH, 1, channels, height, width, generator=make)
    yield torch.randn(BATCH, frames, channels, height, width, generator=make)


def _sounds(config: Any, key: str, make: torch.Generator) -> Iterator[Tensor]:
    mels = setting(
        config, "num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels",
        "feature_projection_input_dim", "input_dim", "mel_bins", "num_mels", default=80,
    )  # fmt: skip
    mels = mels if isinstance(mels, int) else 80
    frames = setting(config, "max_source_positions", default=FRAMES // 2)
    frames = frames if isinstance(frames, int) else FRAMES // 2
    length = setting(config, "max_length", default=FRAMES)
    if key in {"input_values", "audio_values", "inputs"}:
        yield torch.randn(BATCH, SAMPLES, generator=make)
        yield torch.randn(BATCH, 1, SAMPLES, generator=make)
        yield torch.randn(BATCH, length, mels, generator=make)
    if key in {"audio_codes", "codes"}:
        books = setting(config, "num_codebooks", "n_codebooks", "num_quantizers", default=2)
        yield torch.randint(0, 60, (BATCH, books, TOKENS), generator=make)
    yield torch.randn(BATCH, mels, 2 * frames, generator=make)
    yield torch.randn(BATCH, FRAMES, mels, generator=make)
    yield torch.randn(BATCH, mels, FRAMES, generator=make)
    yield torch.randn(BATCH, 1, 64, 64, generator=make)


def _with_images(
    model: nn.Module, config: Any, names: set[str], text: Inputs, make: torch.Generator
) -> Iterator[Inputs]:
    """Text with as many image tokens as the model's vision part gives features."""
    token = setting(config, "image_token_id", "image_token_index", "media_token_id")
    for extra in _image_inputs(config, names, make):
        count = _feature_count(model, extra)
        if token is None or not count:
            continue
        per_row = max(1, count // BATCH)
        ids = text["input_ids"]
        ids = torch.cat([ids[:, :2], ids.new_full((BATCH, per_row), token), ids[:, 2:]], 1)
        whole = {**text, "input_ids": ids, **extra}
        if "attention_mask" in text:
            ones = text["attention_mask"].new_ones(BATCH, per_row)
            whole["attention_mask"] = torch.cat([ones, text["attention_mask"]], 1)
        if "mm_token_type_ids" in names:
            whole["mm_token_type_ids"] = (ids == token).long()
        if "token_type_ids" in names:
            yield {**whole, "token_type_ids": (ids == token).long()}
        yield whole


def _image_inputs(config: Any, names: set[str], make: torch.Generator) -> Iterator[Inputs]:
    if "image_grid_thw" in names:
        vision = getattr(config, "vision_config", config)
        patch = setting(vision, "patch_size", default=8)
        time = setting(vision, "temporal_patch_size", default=1)
        channels = setting(vision, "in_channels", "num_channels", "in_chans", default=3)
        grid = torch.tensor([[1, 4, 4]] * BATCH)
        for depth in dict.fromkeys((time, 1)):
            width = channels * depth * patch * patch
            patches = torch.randn(BATCH * 16, width, generator=make)
            yield {"pixel_values": patches, "image_grid_thw": grid}
        return
    for picture in _pictures(config, make):
        high, wide = picture.shape[-2:]
        if "image_sizes" in names:
            sizes = torch.tensor([[high, wide]] * BATCH)
            yield {"pixel_values": picture, "image_sizes": sizes}
            if picture.dim() == 4:
                tiles = picture[:, None].repeat(1, 5, 1, 1, 1)
                yield {"pixel_values": tiles, "image_sizes": sizes * 2}
        yield {"pixel_values": picture}


def _patches(config: Any, names: set[str], make: torch.Generator) -> Iterator[Inputs]:
    """Flat patches and their grid, for a vision tower alone."""
    key = next(n for n in ("hidden_states", "pixel_values", "inputs_embeds") if n in names)
    grid_key = "grid_thw" if "grid_thw" in names else "image_grid_thw"
    grid = torch.tensor([[1, 4, 4]] * BATCH)
    patch = setting(config, "patch_size", default=8)
    time = setting(config, "temporal_patch_size", default=1)
    channels = setting(config, "in_channels", "num_channels", "in_chans", default=3)
    for depth in dict.fromkeys((time, 1)):
        flat = torch.randn(BATCH * 16, channels * depth * patch * patch, generator=make)
        yield {key: flat, grid_key: grid}
        yield {key: flat.view(BATCH * 16, channels * depth, patch, patch), grid_key: grid}
    yield {key: torch.randn(BATCH * 16, setting(config, "hidden_size", default=32)), grid_key: grid}


def _feature_count(model: nn.Module, images: Inputs) -> int:
    """Rows of the image features, summed over the batch; 0 where they cannot be had."""
    inner = model if hasattr(model, "get_image_features") else getattr(model, "model", None)
    features_of = getattr(inner, "get_image_features", None)
    if features_of is None:
        return 0
    try:
        with torch.no_grad():
            features = features_of(**images)
    except Exception:  # a guess may fail in any way
        return 0
    features = getattr(features, "pooler_output", features)
    parts = features if isinstance(features, (list, tuple)) else [features]
    parts = [part for part in parts if isinstance(part, Tensor)]
    return sum(part.numel() // part.shape[-1] for part in parts if part.dim())


def _with_audio(
    config: Any, names: set[str], text: Inputs, make: torch.Generator
) -> Iterator[Inputs]:
    token = setting(config, "audio_token_id", "audio_token_index")
    if token is None:
        return
    for sound in _sounds(config, "input_features", make):
        for count in (1, 2, 3, 4, 6, 12, 24):
            ids = text["input_ids"]
            ids = torch.cat([ids[:, :2], ids.new_full((BATCH, count), token), ids[:, 2:]], 1)
            extra: Inputs = {"input_features": sound}
            if "feature_attention_mask" in names:
                extra["feature_attention_mask"] = torch.ones(BATCH, sound.shape[-1]).long()
            if "input_features_mask" in names:
                extra["input_features_mask"] = torch.ones(BATCH, sound.shape[-1]).long()
            yield {"input_ids": ids, **extra}


def _series(config: Any, names: set[str], make: torch.Generator) -> Iterator[Inputs]:
    context = setting(config, "context_length", default=32)
    channels = setting(config, "num_input_channels", "input_size", default=1)
    lags = max(getattr(config, "lags_sequence", None) or [0])
    horizon = getattr(config, "prediction_length", None) or 4
    for shape in ((BATCH, context + lags), (BATCH, context + lags, channels)):
        past = torch.randn(*shape, generator=make)
        inputs: Inputs = {"past_values": past}
        if "past_time_features" in names:
            count = getattr(config, "num_time_features", 0)
            inputs |= {
                "past_time_features": torch.randn(BATCH, context + lags, count, generator=make),
                "past_observed_mask": torch.ones(shape),
                "future_values": torch.randn(BATCH, horizon, generator=make),
                "future_time_features": torch.randn(BATCH, horizon, count, generator=make),
            }
        yield inputs
