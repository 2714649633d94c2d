"""Names the content of a folder that is not a supported model, and says what to give instead. Reads names only, except for a few JSON
files.

Never lists more than one level of folders, because a user may give any folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from workers.artifacts.json_file import decode
from workers.artifacts.safetensors_file import SUPPORTED_MODELS
from workers.protocol.errors import ArtifactError

GIVE_A_MODEL = "give a Hugging Face folder, a checkpoint, a GGUF file or a model's name"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
#: Weights in forms of other tools: (pattern, what it is).
OTHER_FORMS = (
    ("*.engine", "TensorRT engines"),
    ("*.plan", "TensorRT engines"),
    ("*.onnx", "an ONNX model"),
    ("openvino_model*.xml", "an OpenVINO model"),
    ("*.nemo", "a NeMo archive"),
    ("*.llamafile", "a llamafile"),
    ("*.ggml", "a GGML file, older than GGUF"),
    ("*.npz", "NumPy arrays"),
    ("*.h5", "TensorFlow weights"),
    ("*.msgpack", "Flax weights"),
)
#: Keys of ``config.json`` that hold the text model, or another part, of a multimodal model.
TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
OTHER_CONFIGS = ("vision_config", "audio_config", "vision_encoder", "audio_encoder", "visual", "speech_config", "image_token_id")
#: Ends of tensor names that only quantized weights have: GPTQ, AWQ, FP8, NVFP4, compressed-tensors, bitsandbytes, MLX.
QUANTIZED_NAMES = (
    ".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".input_scale", ".weight_packed",
    ".weight_shape", ".weight_zero_point", ".absmax", ".quant_map", ".SCB", ".weight_format", ".biases",
)  # fmt: skip
_PART = re.compile(r"-\d{5}-of-\d{5}(?=\.)")


def what_folder(folder: Path) -> ArtifactError:
    """The error for a folder without ``config.json``."""
    what, why, hint = _without_config(folder)
    return ArtifactError(f"{folder} {what}", why, hint)


def _without_config(folder: Path) -> tuple[str, str, str]:
    no_config = "it has no config.json"
    if (folder / "adapter_config.json").is_file():
        return adapter(folder)
    if snapshots := list(_snapshots(folder)):
        return "is a folder of the Hugging Face cache, not a model", "models lie in its snapshots", f"give {_few(snapshots)}"
    if (folder / "model_index.json").is_file():
        return "is a pipeline of diffusers, not a language model", "it makes images", GIVE_A_MODEL
    if ggufs := _models(folder.glob("*.gguf")):
        return "is a folder of GGUF files, not a model", "a GGUF is opened by its file", f"give {_few(ggufs)}"
    if (folder / "params.json").is_file() or any(folder.glob("consolidated*")):
        return consolidated(folder)
    if (folder / "config.json").is_symlink():
        return "is an incomplete download", "its config.json is a link to a file that is not there", "download the model again"
    for pattern, form in OTHER_FORMS:
        if any(folder.glob(pattern)):
            return f"holds {form}", f"{no_config}, and such files are not read", "give the model as a Hugging Face folder or a GGUF file"
    if any(folder.glob("*.safetensors")):
        return "holds weights without their config.json", "nothing says what model they are", "copy config.json beside them"
    if pickled := _first(folder, PICKLES):
        return f"holds pickled weights ({pickled})", "a pickle can run code", "save the model as safetensors"
    if inside := _models_inside(folder):
        return "holds models in folders of its own", f"{no_config} itself", f"give {_few(inside)}"
    if (folder / "tokenizer.json").is_file():
        return "holds a tokenizer without a model", no_config, GIVE_A_MODEL
    return "holds no model", no_config, GIVE_A_MODEL


def what_file(path: Path) -> ArtifactError:
    """The error for a file that is no GGUF."""
    pickled = any(path.match(pattern) for pattern in PICKLES)
    form = next((form for pattern, form in OTHER_FORMS if path.match(pattern)), None)
    if path.suffix in (".safetensors", ".json", ".jinja", ".model"):
        return ArtifactError(f"{path} is one file of a model", "a model of this kind is opened by its folder", f"give {path.parent}")
    if pickled or form is not None:
        what = form or "pickled weights"
        why = "a pickle can run code" if pickled else "such files are not read"
        return ArtifactError(f"{path} holds {what}", why, "give the model as a Hugging Face folder or a GGUF file")
    return ArtifactError(f"{path} is not a GGUF file", "its first bytes are not GGUF", "give a GGUF, a folder or a model's name")


def what_config(path: Path, keys: dict[str, Any]) -> ArtifactError:
    """The error for a ``config.json`` that names neither a ``model_type`` nor a TensorRT-LLM ``architecture``."""
    if (path.parent / "adapter_config.json").is_file():
        what, why, hint = adapter(path.parent)
        return ArtifactError(f"{path.parent} {what}", why, hint)
    if "_class_name" in keys:
        return ArtifactError(f"{path} is of diffusers, not of a language model", f"it describes {keys['_class_name']!r}", GIVE_A_MODEL)
    why = "it has neither model_type (Hugging Face) nor architecture (TensorRT-LLM)"
    return ArtifactError(f"{path} does not say what model it is", why, GIVE_A_MODEL)


def what_weights(folder: Path) -> ArtifactError:
    """The error for a folder with ``config.json``, but without safetensors that belong to it."""
    if any(folder.glob("adapter_model*")) or (folder / "adapter_config.json").is_file():
        what, why, hint = adapter(folder)
    elif ggufs := _models(folder.glob("*.gguf")):
        what, why, hint = "holds its weights as GGUF", "a GGUF is opened by its file", f"give {_few(ggufs)}"
    elif any(folder.glob("consolidated*.safetensors")):
        what, why, hint = consolidated(folder)
    elif pickled := _first(folder, PICKLES):
        what, why, hint = f"holds pickled weights ({pickled})", "a pickle can run code", "save the model as safetensors"
    elif form := next((form for pattern, form in OTHER_FORMS if any(folder.glob(pattern))), None):
        what, why, hint = f"holds {form}", "such files are not read", "give the model as safetensors or GGUF"
    else:
        what, why = "holds no weights", "there is no .safetensors file"
        hint = "download the weights too: files such as model.safetensors"
    return ArtifactError(f"{folder} {what}", why, hint)


def what_model_type(path: Path, keys: dict[str, Any], known: Iterable[str]) -> ArtifactError:
    """The error for a ``config.json`` of Hugging Face whose ``model_type`` is none of ``known``."""
    kind, names = keys.get("model_type"), ", ".join(known)
    inner = next((keys[key] for key in TEXT_CONFIGS if isinstance(keys.get(key), dict)), None)
    if inner is not None or any(key in keys for key in OTHER_CONFIGS):
        text = f"its text model is {inner['model_type']!r}" if inner and inner.get("model_type") else "it takes more than text"
        return ArtifactError(
            f"{path}: model_type {kind!r} is a multimodal model, not supported", f"{text}; known: {names}", SUPPORTED_MODELS
        )
    return ArtifactError(f"{path}: model_type {kind!r} is not supported", f"known: {names}", SUPPORTED_MODELS)


def adapter(folder: Path) -> tuple[str, str, str]:
    """(what, why, hint) of a folder that holds an adapter."""
    path, base = folder / "adapter_config.json", None
    if path.is_file():
        base = decode(path, dict[str, Any]).get("base_model_name_or_path")
    why = f"it changes the model {base!r}" if base else "it changes another model"
    return "is a LoRA adapter, not a model", why, "merge it into that model (peft: merge_and_unload) and give the result"


def consolidated(folder: Path) -> tuple[str, str, str]:
    """(what, why, hint) of a folder in the form that Mistral and Meta publish beside Hugging Face's."""
    hint = "download the Hugging Face form of the model: config.json and model*.safetensors"
    return "holds the model in its maker's own form (consolidated)", "its tensors have other names and another order", hint


def _snapshots(folder: Path) -> Iterator[Path]:
    """Snapshot folders of a Hugging Face cache: of the cache itself, its parent, a model in it, or a model's ``snapshots``."""
    for pattern in ("snapshots/*", "models--*/snapshots/*", "hub/models--*/snapshots/*"):
        yield from sorted(path for path in folder.glob(pattern) if path.is_dir())
    if folder.name == "snapshots" or folder.name.startswith("models--"):
        yield from sorted(path for path in folder.glob("*") if (path / "config.json").exists())


def _models_inside(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and (path / "config.json").is_file())
    except OSError:
        return []


def _models(ggufs: Iterable[Path]) -> list[Path]:
    """The files by which models are opened: whole ones, and of split ones the first part that is there."""
    found: dict[str, Path] = {}
    for path in sorted(path for path in ggufs if not path.name.startswith("mmproj")):
        found.setdefault(_PART.sub("", path.name), path)
    return list(found.values())


def _first(folder: Path, patterns: Iterable[str]) -> str | None:
    return next((path.name for pattern in patterns for path in sorted(folder.glob(pattern))), None)


def _few(paths: list[Path], most: int = 3) -> str:
    """Some paths in words, for a hint."""
    shown = " or ".join(map(str, paths[:most]))
    return shown if len(paths) <= most else f"one of its {len(paths)}, such as {paths[0]}"
