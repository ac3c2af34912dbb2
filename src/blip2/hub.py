"""Write model cards and upload models to the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData, get_token, is_offline_mode, metadata_load
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx, validate_repo_id
from yaml import YAMLError

from blip2.backbones.pretrained import short_message
from blip2.checkpoint import CHECKPOINTS_FOLDER, CONFIG_FILE, read_recipe
from blip2.config import QUESTION_PLACEHOLDER
from blip2.data.assets import ASSETS, PREFIX
from blip2.data.dataset import SKIP_REASONS
from blip2.errors import InputError
from blip2.interop.checkpoint import QFORMER_TOKENIZER, Checkpoint
from blip2.interop.detect import is_blip2, is_pickle
from blip2.io import MAX_JSON, expand_home, parse_json, read_json, read_regular_file
from blip2.recipe import dump_config
from blip2.training.metrics import METRICS_FILE

LICENSES = {
    "facebook/opt-*": "other (OPT-175B license: research that is not commercial)",
    "google/flan-t5-*": "apache-2.0",
    "google-bert/*": "apache-2.0",
    "openai/clip-vit-*": "mit",
    "Salesforce/blip2-*": "mit",
    "Salesforce/instructblip-flan-t5-*": "mit",
    "Salesforce/instructblip-vicuna-*": "other (that of LLaMA: research that is not commercial)",
    "*eva_vit_g.pth": "mit",
}
"""Licenses of the paper's parts, by a pattern of their names."""
UNKNOWN_LICENSE = "not stated in its files: check it before you publish"
NOT_RESULTS = {
    "step", "seconds", "images_per_second", "data_seconds", "data_share", "gpu_memory_gib", "gpu_utilization",
    "gradient_norm", "rate", "rate_share", "itc_temperature", "source", "samples_seen", "shards", "truncated",
    "skipped", *(f"skipped_{reason}" for reason in SKIP_REASONS),
}  # fmt: skip
"""Keys of ``metrics.jsonl`` that are not results."""
VALIDATION = "validation_"
"""Prefix of the keys of ``metrics.jsonl`` that were measured on held-out pairs."""

# -- the card ----------------------------------------------------------------------------------------------------------


def model_card(checkpoint: Checkpoint, to: str, *, stage1: Checkpoint | None = None) -> str:
    """Return the content of README.md for a converted checkpoint.

    Args:
        checkpoint: the checkpoint.
        to: format of the conversion: ``transformers``, ``vllm``, ``lavis`` or ``blip2``.
        stage1: the stage-1 checkpoint whose weights the folder also contains. None: the folder contains one stage.
    """
    config = checkpoint.config
    stages = {f"### Stage {1 if c.config.language is None else 2}": c for c in (checkpoint, stage1) if c is not None}
    parts = list(dict.fromkeys(part for each in stages.values() for part in _parts(each)))
    licenses = {name: find_license(name) for name in dict.fromkeys(name for _, name in parts)}
    short = dict.fromkeys(Path(part.name).name for part in (config.vision, config.language) if part is not None)
    task = "compares images and texts: its {} queries read the features of a frozen image encoder"
    if config.language is not None:
        task = (
            "writes about images: it turns the features of a frozen image encoder into {} soft prompts of a frozen LLM"
        )
        if config.qformer.window is not None:
            task += f" for each window of {config.qformer.window} tokens"
    rows = [[role, f"`{name}`", licenses[name] or UNKNOWN_LICENSE] for role, name in parts]
    sections = [
        f"---\n{_front_matter(checkpoint, to, licenses)}\n---",
        f"# BLIP-2: {' and '.join(short)}",
        f"A Querying Transformer that {task.format(config.qformer.num_query_tokens)}.",
        "## Use",
        *_use(checkpoint, to, both=stage1 is not None),
        "## Training",
        *(text for title, each in stages.items() for text in (title, *_training(each))),
        "## Results",
        *(text for title, each in stages.items() for text in (title, _results(each))),
        "## Parts and licenses",
        "The following parts were made by others and keep their licenses. A part that contains another one, as a BLIP-2"
        " contains its LLM, may have more than one license.",
        _table(["part", "name", "license"], rows),
        "## Limits",
        LIMITS,
        "## Citation",
        f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(checkpoint: Checkpoint, to: str, licenses: dict[str, str | None]) -> str:
    generates = checkpoint.config.language is not None
    stated = {license and license.lower() for license in licenses.values()}
    license = stated.pop() if len(stated) == 1 else None
    license = None if license is None or license.startswith("other") else license
    base = [hub for hub in map(_hub_name, licenses) if hub is not None]
    return ModelCardData(
        library_name="transformers" if to == "vllm" else to,
        pipeline_tag="image-to-text" if generates else "zero-shot-image-classification",
        tags=[
            "blip-2",
            *(["image-captioning", "visual-question-answering"] if generates else ["image-text-retrieval"]),
        ],
        license=license or "other",
        license_name=None if license else "see-frozen-parts",
        base_model=base or None,
        base_model_relation="finetune" if base else None,
    ).to_yaml()


def _parts(checkpoint: Checkpoint) -> Iterable[tuple[str, str]]:
    """Yield (role, name) for each model from which weights of a checkpoint come."""
    config, recipe = checkpoint.config, read_recipe(checkpoint)
    ours = checkpoint.format == "blip2"
    trained = {name.split(".")[0] for name in checkpoint.weights} if ours else set()
    for role, key, part in (("image encoder", "vision", config.vision), ("LLM", "language", config.language)):
        if part is not None:
            yield f"{role}, {'trained further' if key in trained else 'frozen'}", part.name
    if not ours:
        yield "Q-Former", checkpoint.name
    if config.qformer.bert is not None:
        yield "BERT that the Q-Former started from", config.qformer.bert
    for start in () if recipe is None else recipe.start_checkpoints:
        if is_pickle(start) or is_blip2(Path(start)) or _hub_name(start):
            yield "checkpoint that training started from", start


def _training(checkpoint: Checkpoint) -> list[str]:
    recipe = read_recipe(checkpoint)
    if recipe is None:
        return [f"The weights are those of `{checkpoint.name}` ({checkpoint.description}), which does not record the"
                " training data or the recipe."]  # fmt: skip
    data, training = recipe.data, recipe.training
    bert = f"the BERT `{recipe.qformer.bert}`" if recipe.qformer.bert else "random weights"
    start = " and ".join(f"the weights of `{name}`" for name in recipe.start_checkpoints) or bert
    sources = ", ".join(
        f"`{name}`" + (f" ({find_license(name)})" if name.startswith(PREFIX) else "") for name in data.sources
    )
    held_out = f"`{data.validation}` was held out" if data.validation else "no pairs were held out"
    weights = {name.upper(): weight for name, weight in recipe.objectives.stage1.items()}
    losses = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items() if weight)
    if recipe.language is not None:
        losses = "the language modeling loss of the captions"
    step, processes = _step(checkpoint), _processes(checkpoint)
    at = f"the recipe's {training.max_steps} steps" if step is None else f"{step} of {training.max_steps} steps"
    count = data.batch_size * training.gradient_accumulation_steps * (processes or 1)
    pairs = f"{count} pairs{'' if processes else ' per process'}"
    return [
        f"Trained on {sources}; {held_out}. The Q-Former started from {start}.",
        f"Training ran for {at}, each with {pairs}, with AdamW on {losses}.",
        "The complete recipe; save it as `recipe.yaml` and run",
        f"```sh\n{'' if (processes or 1) == 1 else f'torchrun --nproc_per_node {processes} --no-python '}"
        "blip2 train recipe.yaml\n```",
        f"```yaml\n{dump_config(recipe)}```",
    ]


def _step(checkpoint: Checkpoint) -> int | None:
    found = re.fullmatch(r"step-(\d+)", Path(checkpoint.name).name)
    return int(found[1]) if found and checkpoint.format == "blip2" else None


def _processes(checkpoint: Checkpoint) -> int | None:
    """Return the number of training processes; None if the checkpoint does not record the number."""
    try:
        return len(read_json(Path(checkpoint.name) / "state.json")["positions"]) or None
    except (InputError, KeyError, TypeError):
        return None


def _results(checkpoint: Checkpoint) -> str:
    """Return a table of the last metrics up to the step of a checkpoint, from the folder of its run."""
    folder, step = Path(checkpoint.name).absolute(), _step(checkpoint)
    path = folder.parents[1] / METRICS_FILE if step is not None and folder.parent.name == CHECKPOINTS_FOLDER else None
    train: dict[str, Any] = {}
    held_out: dict[str, Any] = {}
    line: dict[str, Any]
    content = read_regular_file(path, MAX_JSON) if path is not None and path.is_file() else b""
    for text in content.splitlines():
        try:
            line = {name: value for name, value in parse_json(text).items() if isinstance(value, int | float)}
            is_later = line["step"] > step
        except (AttributeError, KeyError, ValueError):  # damaged, or truncated when the process was killed
            continue
        if not is_later:
            train = {name: value for name, value in line.items() if not name.startswith(VALIDATION)}
            found = {name.removeprefix(VALIDATION): line[name] for name in line if name.startswith(VALIDATION)}
            held_out = {"step": line["step"], **found} if found else held_out
    if not train:
        return "No results were measured."
    heads, columns = ["", f"training batch, step {train['step']}"], [train]
    if held_out:
        heads, columns = [*heads, f"held-out pairs, step {held_out['step']}"], [train, held_out]
    names = [name for name in {**train, **held_out} if name not in NOT_RESULTS]
    return _table(
        heads, [[name, *(f"{column[name]:.4g}" if name in column else "" for column in columns)] for name in names]
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])


def _use(checkpoint: Checkpoint, to: str, both: bool) -> list[str]:
    """Return example programs that use a converted checkpoint, with notes."""
    language, queries = checkpoint.config.language, checkpoint.config.qformer.num_query_tokens
    reads_text = checkpoint.config.qformer.use_qformer_text_input
    if to == "vllm":
        return [SERVE]
    if to == "lavis":
        is_t5 = language is not None and "t5" in language.name.lower()
        types = {
            "blip2_opt": "pretrain_opt2.7b",
            "blip2_t5": "pretrain_flant5xl",
            "blip2": "pretrain",
            "blip2_vicuna_instruct": "vicuna7b",
            "blip2_t5_instruct": "flant5xl",
        }
        name = "blip2" if language is None else "blip2_t5" if is_t5 else "blip2_opt"
        if reads_text:
            name = "blip2_t5_instruct" if is_t5 else "blip2_vicuna_instruct"
        programs = [LAVIS.format(name=name, type=types[name])]
    elif to == "blip2":
        return [_python(OWN.format(calls=COMPARES if language is None else WRITES)), NAMES]
    else:
        programs = [] if language is None else [WRITE.format(prompt=json.dumps(_example(language.prompt)))]
        if reads_text and language is not None:
            programs = [_instruct(language.prompt, checkpoint.config.qformer.text_input == "prompt")]
        if both:
            programs.append(COMPARE.format(also="AutoTokenizer, ", tokenizer=OWN_TOKENIZER.format(queries=queries)))
        elif language is None:
            programs.append(COMPARE.format(also="", tokenizer=""))
    return [_python(program) for program in programs]


def _instruct(prompt: str, reads_prompt: bool) -> str:
    """Return an example program for an InstructBLIP; see ``qformer.text_input`` for `reads_prompt`."""
    texts = [_example(prompt), EXAMPLE_QUESTION]
    other = "" if reads_prompt or texts[0] == texts[1] else OTHER_TEXT.format(question=json.dumps(texts[1]))
    return INSTRUCT.format(prompt=json.dumps(texts[0]), other=other)


def _example(prompt: str) -> str:
    """Return a prompt with a question in the place of {}."""
    return prompt.replace(QUESTION_PLACEHOLDER, EXAMPLE_QUESTION)


def _python(program: str) -> str:
    return f"```python\n{program}\n```"


WRITE = """\
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

name = "."  # this folder, or its name on the hub
image = Image.open("image.png").convert("RGB")
processor = Blip2Processor.from_pretrained(name)
model = Blip2ForConditionalGeneration.from_pretrained(name)
inputs = processor(images=image, text={prompt}, return_tensors="pt")
tokens = model.generate(**inputs, num_beams=5, max_new_tokens=30)
print(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())"""
INSTRUCT = """\
from PIL import Image
from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

name = "."  # this folder, or its name on the hub
image = Image.open("image.png").convert("RGB")
processor = InstructBlipProcessor.from_pretrained(name)
model = InstructBlipForConditionalGeneration.from_pretrained(name)
inputs = processor(images=image, text={prompt}, return_tensors="pt"){other}
start = 0 if model.config.text_config.is_encoder_decoder else inputs["input_ids"].shape[1]
tokens = model.generate(**inputs, num_beams=5, max_new_tokens=30)[:, start:]
print(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())"""
OTHER_TEXT = """
question = processor.qformer_tokenizer({question}, return_tensors="pt")  # all that the Q-Former reads
inputs |= {{f"qformer_{{key}}": question[key] for key in ("input_ids", "attention_mask")}}"""
EXAMPLE_QUESTION = "what is it?"
COMPARE = """\
from PIL import Image
from transformers import {also}Blip2ForImageTextRetrieval, Blip2Processor

name = "."  # this folder, or its name on the hub
image = Image.open("image.png").convert("RGB")
processor = Blip2Processor.from_pretrained(name){tokenizer}
model = Blip2ForImageTextRetrieval.from_pretrained(name)
pair = processor(images=image, text="a text", return_tensors="pt")
print("cosine:", model(**pair).logits_per_image.item())
logits = model(**pair, use_image_text_matching_head=True).logits_per_image
print("probability that they match:", logits.softmax(dim=-1)[0, 1].item())"""
OWN_TOKENIZER = f"""
texts = AutoTokenizer.from_pretrained(name, subfolder="{QFORMER_TOKENIZER}")  # the Q-Former's, not the LLM's
processor = Blip2Processor(processor.image_processor, texts, num_query_tokens={{queries}})"""
SERVE = """\
```sh
vllm serve . --chat-template '{% for message in messages %}{{ message.content }}{% endfor %}'
```

A prompt takes one image, which is placed first automatically. The model was not trained to chat, so this chat template
passes on the text of a request unchanged. Send images to `/v1/chat/completions`: `/v1/completions` takes only text."""
LAVIS = """\
import torch
from lavis.models import load_model

path = "model.pth"
print(len(torch.load(path, map_location="cpu", weights_only=True)["model"]), "tensors")
model = load_model("{name}", "{type}", is_eval=True)  # a type with the frozen parts that are named below
model.load_checkpoint(path)"""
OWN = """\
import blip2

model = blip2.load(".")  # this folder
{calls}"""
WRITES = """\
print(model.caption("image.png"))
print(model.answer("image.png", "what is it?"))"""
COMPARES = """\
print(model.match("image.png", ["a text", "another"]))
print(model.similarity("image.png", ["a text", "another"]))"""
NAMES = """\
The folder contains the trained weights. Frozen parts are loaded by the names below; any name can be replaced:
`blip2.load(".", overrides={"vision.name": "..."})`."""
LIMITS = """\
- The frozen parts, above all the LLM, learned from texts and images of the web. This model inherits their biases and
  errors.
- The model can state with confidence what an image does not show. Have a person check its output wherever errors
  matter, as in medicine, law and traffic. Do not use it to identify or judge people.
- The model works best on images like its training pairs. Evaluate it on your own images before you rely on it."""
CITATION = """\
@inproceedings{li2023blip2,
  title     = {{BLIP-2}: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
               Models},
  author    = {Li, Junnan and Li, Dongxu and Savarese, Silvio and Hoi, Steven},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  note      = {arXiv:2301.12597},
}"""

# -- licenses ----------------------------------------------------------------------------------------------------------


def find_license(name: str) -> str | None:
    """Return the license of a model or data set: from its README.md, from :data:`LICENSES` or from its card on the hub.

    Args:
        name: folder, file, hub name, ``timm:NAME`` or ``package:NAME``.

    Returns:
        The license. None: none of these states a license, or the hub cannot be reached.
    """
    if name.startswith(PREFIX):
        asset = ASSETS.get(name.removeprefix(PREFIX).partition("/")[0])
        return None if asset is None else asset.license
    known = next((license for pattern, license in LICENSES.items() if fnmatchcase(name, pattern)), None)
    try:
        declared = _declared_license(metadata_load(expand_home(name) / "README.md"))
    except (OSError, ValueError, YAMLError):
        declared = None
    if (declared or known) is None and (hub := _hub_name(name)) is not None:
        try:
            card = _api().model_info(hub, timeout=5).card_data
        except Exception:  # no network, no such model or no access: the license stays unknown
            return None
        return _declared_license(card.to_dict() if card is not None else None)
    return declared or known


def _declared_license(front_matter: dict[str, Any] | None) -> str | None:
    license, name = (front_matter or {}).get("license"), (front_matter or {}).get("license_name")
    if isinstance(license, list):
        license = ", ".join(map(str, license))
    return f"other ({name})" if license == "other" and name else str(license) if license else None


def _api(token: str | None = None) -> HfApi:
    # huggingface_hub reads HF_ENDPOINT only when it is imported.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None, token=token)


def _hub_name(name: str) -> str | None:
    """Return the hub name of a model; None if `name` cannot be the name of a model on the hub."""
    hub = name.replace("timm:", "timm/")
    is_hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", hub) and not is_pickle(hub) and not expand_home(name).exists()
    return hub if is_hub_name else None


# -- the hub -----------------------------------------------------------------------------------------------------------


def push_to_hub(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a converted folder to the Hugging Face hub, or to ``$HF_ENDPOINT``, in one commit.

    Args:
        folder: a folder written by ``blip2 convert``.
        repo_id: name of the model repository, ``NAME`` or ``OWNER/NAME``. The repository is created if it does not
            exist.
        private: create a private repository, and refuse an existing one that is public.

    Returns:
        The URL of the repository.

    Raises:
        InputError: the folder, its model or its README.md is missing; `repo_id` is not a valid name; you are not logged
            in or not allowed to write to the repository; the repository exists and is public, but `private` is True; or
            the hub cannot be reached.
    """
    path = expand_home(folder)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give a folder written by blip2 convert")
    if not any((path / name).is_file() for name in ("config.json", CONFIG_FILE)) and not any(path.glob("*.pth")):
        raise InputError(
            f"{path} contains no model (config.json, {CONFIG_FILE} or .pth): give a folder written by blip2 convert"
        )
    if not (path / "README.md").is_file():
        raise InputError(f"{path} has no README.md that describes the model: give a folder written by blip2 convert,"
                         " which writes one")  # fmt: skip
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is not a repository name ({short_message(error)}): give OWNER/NAME") from error
    if is_offline_mode():
        raise InputError("HF_HUB_OFFLINE is set, which forbids access to the hub: unset HF_HUB_OFFLINE to push")
    token = get_token()
    if token is None:
        raise InputError("you are not logged in to the hub: run hf auth login, or set HF_TOKEN")
    api = _api(token)
    try:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        exposed = private and not api.model_info(url.repo_id).private
        if not exposed:
            api.upload_folder(repo_id=url.repo_id, folder_path=path, commit_message="Upload a BLIP-2")
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            raise InputError(
                f"you are not allowed to write to {repo_id} ({status}): log in with a token that has write access (hf"
                " auth login), or give a repository of your own"
            ) from error
        raise InputError(
            f"{path} could not be pushed to {repo_id} ({type(error).__name__}: {' '.join(str(error).split())}): correct"
            " the cause, or check the network, and push again"
        ) from error
    if exposed:
        raise InputError(
            f"{url.repo_id} already exists and is public, expected a private repository: give another name, or make it"
            " private on the hub"
        )
    return str(url)
