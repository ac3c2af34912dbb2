"""What others need to use a checkpoint: a card that says what it is, and a push to the Hugging Face hub."""

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

from blip2.backbones.pretrained import first_line
from blip2.checkpoint import FOLDER
from blip2.data.assets import ASSETS, PREFIX
from blip2.data.dataset import CAUSES
from blip2.errors import InputError
from blip2.interop.checkpoint import QFORMER_TOKENIZER, Checkpoint
from blip2.interop.detect import is_blip2, is_pickle
from blip2.io import parse_json, read_json
from blip2.recipe import dump_recipe
from blip2.training.metrics import METRICS

LICENCES = {
    "facebook/opt-*": "other (OPT-175B license: research that is not commercial)",
    "google/flan-t5-*": "apache-2.0",
    "google-bert/*": "apache-2.0",
    "openai/clip-vit-*": "mit",
    "Salesforce/blip2-*": "mit",
    "*eva_vit_g.pth": "mit",
}
"""Of the parts that the paper is made of, by a pattern of their names."""
UNKNOWN = "not stated by its files: check it before you publish"
BOOKKEEPING = {
    "step", "seconds", "images_per_second", "data_seconds", "data_share", "gpu_memory_gib", "gpu_utilization",
    "gradient_norm", "rate", "rate_share", "itc_temperature", "source", "drawn", "shards", "cut", "skipped",
    *(f"skipped_{cause}" for cause in CAUSES),
}  # fmt: skip
"""What in a line of metrics is no result."""
VALIDATION = "validation_"
"""Beginning of the names of metrics of held-out pairs."""

# -- the card ----------------------------------------------------------------------------------------------------------


def model_card(checkpoint: Checkpoint, to: str, *, stage1: Checkpoint | None = None) -> str:
    """The README.md of a converted folder.

    Args:
        to: format that the folder is written in: ``transformers``, ``vllm``, ``lavis`` or ``blip2``.
        stage1: checkpoint whose heads the folder holds beside those of stage 2.
    """
    recipe = checkpoint.recipe
    stages = {f"### Stage {1 if c.recipe.language is None else 2}": c for c in (checkpoint, stage1) if c is not None}
    parts = list(dict.fromkeys(part for each in stages.values() for part in _parts(each)))
    licenses = {name: license_of(name) for name in dict.fromkeys(name for _, name in parts)}
    short = dict.fromkeys(Path(part.name).name for part in (recipe.vision, recipe.language) if part is not None)
    does = "compares images and texts: its {} queries read the features of a frozen image encoder"
    if recipe.language is not None:
        does = "writes about images: a frozen image encoder's features become {} soft visual prompts of a frozen LLM"
    sections = [
        f"---\n{_front_matter(checkpoint, to, licenses)}\n---",
        f"# BLIP-2: {' and '.join(short)}",
        f"A Querying Transformer that {does.format(recipe.qformer.num_query_tokens)}.",
        "## Use",
        *_use(checkpoint, to, both=stage1 is not None),
        "## Training",
        *(text for title, each in stages.items() for text in (title, *_training(each))),
        "## Results",
        *(text for title, each in stages.items() for text in (title, _results(each))),
        "## Parts and licenses",
        "What follows was made by others and keeps its license. Where one holds another, as a BLIP-2 does its LLM, the"
        " license may not be that of both.",
        _table(["part", "name", "license"], [[role, f"`{name}`", licenses[name] or UNKNOWN] for role, name in parts]),
        "## Limits",
        LIMITS,
        "## Citation",
        f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(checkpoint: Checkpoint, to: str, licenses: dict[str, str | None]) -> str:
    generates = checkpoint.recipe.language is not None
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
    """(role, name) of everything in a checkpoint that was not begun with it."""
    recipe = checkpoint.recipe
    ours = checkpoint.format == "blip2"
    trained = {name.split(".")[0] for name in checkpoint.weights} if ours else set()
    for role, key, part in (("image encoder", "vision", recipe.vision), ("LLM", "language", recipe.language)):
        if part is not None:
            yield f"{role}, {'trained further' if key in trained else 'frozen'}", part.name
    if not ours:
        yield "Q-Former", checkpoint.name
    if recipe.qformer.bert is not None:
        yield "BERT that the Q-Former started from", recipe.qformer.bert
    for start in recipe.starts:
        if is_pickle(start) or is_blip2(Path(start)) or _hub_name(start):
            yield "checkpoint that training started from", start


def _training(checkpoint: Checkpoint) -> list[str]:
    recipe, data, training = checkpoint.recipe, checkpoint.recipe.data, checkpoint.recipe.training
    if not data.train:
        return [f"The weights are those of `{checkpoint.name}` ({checkpoint.about}). On which data they were trained,"
                " and how, is not recorded in that format."]  # fmt: skip
    bert = f"the BERT `{recipe.qformer.bert}`" if recipe.qformer.bert else "random weights"
    start = " and ".join(f"the weights of `{name}`" for name in recipe.starts) or bert
    sources = ", ".join(
        f"`{name}`" + (f" ({license_of(name)})" if name.startswith(PREFIX) else "") for name in data.sources
    )
    held_out = f"`{data.validation}` was held out" if data.validation else "no pairs were held out"
    weights = {name.upper(): getattr(recipe.objectives, name) for name in ("itc", "itm", "itg")}
    losses = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in weights.items() if weight)
    if recipe.language is not None:
        losses = "the language modeling loss of the captions"
    step, processes = _step(checkpoint), _processes(checkpoint)
    at = f"the recipe's {training.max_steps} steps" if step is None else f"step {step} of {training.max_steps}"
    count = data.batch_size * training.gradient_accumulation_steps * (processes or 1)
    pairs = f"{count} pairs{'' if processes else ' a process'}"
    return [
        f"Trained on {sources}; {held_out}. The Q-Former started from {start}.",
        f"This is {at}, each of {pairs}, with AdamW on {losses}.",
        "The whole recipe, which as `recipe.yaml` is run by",
        f"```sh\n{'' if (processes or 1) == 1 else f'torchrun --nproc_per_node {processes} --no-python '}"
        "blip2 train recipe.yaml\n```",
        f"```yaml\n{dump_recipe(recipe)}```",
    ]


def _step(checkpoint: Checkpoint) -> int | None:
    found = re.fullmatch(r"step-(\d+)", Path(checkpoint.name).name)
    return int(found[1]) if found and checkpoint.format == "blip2" else None


def _processes(checkpoint: Checkpoint) -> int | None:
    """How many trained it, where it says so."""
    try:
        return len(read_json(Path(checkpoint.name) / "state.json")["positions"]) or None
    except (InputError, KeyError, TypeError):
        return None


def _results(checkpoint: Checkpoint) -> str:
    """The last metrics at or before the step of a checkpoint that lies within its run."""
    folder, step = Path(checkpoint.name).absolute(), _step(checkpoint)
    path = folder.parents[1] / METRICS if step is not None and folder.parent.name == FOLDER else None
    train: dict[str, Any] = {}
    held_out: dict[str, Any] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else ():
        try:
            line = parse_json(text)
        except ValueError:  # torn by a kill
            continue
        if line["step"] <= step:
            train = {name: value for name, value in line.items() if not name.startswith(VALIDATION)}
            found = {name.removeprefix(VALIDATION): line[name] for name in line if name.startswith(VALIDATION)}
            held_out = {"step": line["step"], **found} if found else held_out
    if not train:
        return "No results were measured."
    heads, columns = ["", f"training batch, step {train['step']}"], [train]
    if held_out:
        heads, columns = [*heads, f"held-out pairs, step {held_out['step']}"], [train, held_out]
    names = [name for name in {**train, **held_out} if name not in BOOKKEEPING]
    return _table(heads, [[name, *(f"{of[name]:.4g}" if name in of else "" for of in columns)] for name in names])


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [heads, ["---"] * len(heads), *rows])


def _use(checkpoint: Checkpoint, to: str, both: bool) -> list[str]:
    """Programs that use a folder, and what is to be known beside them."""
    language, queries = checkpoint.recipe.language, checkpoint.recipe.qformer.num_query_tokens
    if to == "vllm":
        return [SERVE]
    if to == "lavis":
        opt_or_t5 = "blip2_opt" if language is None or "t5" not in language.name.lower() else "blip2_t5"
        types = {"blip2_opt": "pretrain_opt2.7b", "blip2_t5": "pretrain_flant5xl", "blip2": "pretrain"}
        name = "blip2" if language is None else opt_or_t5
        programs = [LAVIS.format(name=name, type=types[name])]
    elif to == "blip2":
        return [_python(OWN.format(calls=COMPARES if language is None else WRITES)), NAMES]
    else:
        programs = [] if language is None else [WRITE.format(prompt=json.dumps(language.prompt))]
        if both:
            programs.append(COMPARE.format(also="AutoTokenizer, ", tokenizer=OWN_TOKENIZER.format(queries=queries)))
        elif language is None:
            programs.append(COMPARE.format(also="", tokenizer=""))
    return [_python(program) for program in programs]


def _python(program: str) -> str:
    return f"```python\n{program}\n```"


WRITE = """\
from PIL import Image
from transformers import Blip2ForConditionalGeneration, Blip2Processor

name = "."  # this folder, or its name on the hub
image = Image.open("picture.png").convert("RGB")
processor = Blip2Processor.from_pretrained(name)
model = Blip2ForConditionalGeneration.from_pretrained(name)
inputs = processor(images=image, text={prompt}, return_tensors="pt")
written = model.generate(**inputs, num_beams=5, max_new_tokens=30)
print(processor.batch_decode(written, skip_special_tokens=True)[0].strip())"""
COMPARE = """\
from PIL import Image
from transformers import {also}Blip2ForImageTextRetrieval, Blip2Processor

name = "."  # this folder, or its name on the hub
image = Image.open("picture.png").convert("RGB")
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

A prompt takes one image, which comes first by itself. The model was not trained to chat, so this chat template hands on
the text of a request as it is. Send images to `/v1/chat/completions`: `/v1/completions` takes text alone."""
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
print(model.caption("picture.png"))
print(model.answer("picture.png", "what is it?"))"""
COMPARES = """\
print(model.match("picture.png", ["a text", "another"]))
print(model.similarity("picture.png", ["a text", "another"]))"""
NAMES = """\
The folder holds what was trained. Frozen parts are fetched by the names below, of which any can be another:
`blip2.load(".", changes={"vision.name": "..."})`."""
LIMITS = """\
- The frozen parts, an LLM above all, learned from texts and pictures of the web, and nothing here corrects that: their
  prejudices, their errors and their language are this model's too.
- It can state what a picture does not show, as surely as what it does. Let a person decide wherever something hangs on
  it: in medicine, in law, in traffic, and about people, whom it must not identify or judge.
- It knows what is like its training pairs. Measure it on pictures of your own before you rely on it."""
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


def license_of(name: str) -> str | None:
    """The license of a part: by a folder's own README.md, by what is known here, by its card on the hub.

    Args:
        name: folder, file, hub name, ``timm:NAME`` or ``package:NAME``.

    Returns:
        None where nothing states it, or the hub would and cannot be asked.
    """
    if name.startswith(PREFIX):
        asset = ASSETS.get(name.removeprefix(PREFIX).partition("/")[0])
        return None if asset is None else asset.license
    known = next((license for pattern, license in LICENCES.items() if fnmatchcase(name, pattern)), None)
    try:
        stated = _stated(metadata_load(Path(name).expanduser() / "README.md"))
    except (OSError, ValueError, YAMLError):
        stated = None
    if (stated or known) is None and (hub := _hub_name(name)) is not None:
        try:
            card = _api().model_info(hub, timeout=5).card_data
        except Exception:  # no network, no such model, no access: none is a reason to stop
            return None
        return _stated(card.to_dict() if card is not None else None)
    return stated or known


def _stated(front_matter: dict[str, Any] | None) -> str | None:
    license, name = (front_matter or {}).get("license"), (front_matter or {}).get("license_name")
    if isinstance(license, list):
        license = ", ".join(map(str, license))
    return f"other ({name})" if license == "other" and name else str(license) if license else None


def _api(token: str | None = None) -> HfApi:
    # Read here, so that it can be set after huggingface_hub was imported.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None, token=token)


def _hub_name(name: str) -> str | None:
    """What a part is called on the hub, if it can be there."""
    hub = name.replace("timm:", "timm/")
    there = re.fullmatch(r"[\w.-]+/[\w.-]+", hub) and not is_pickle(hub) and not Path(name).expanduser().exists()
    return hub if there else None


# -- the hub -----------------------------------------------------------------------------------------------------------


def push(folder: str | Path, repository: str, private: bool = False) -> str:
    """Upload a converted folder to the Hugging Face hub, or to ``$HF_ENDPOINT``, in one commit.

    Args:
        repository: name of the model repository, ``NAME`` or ``OWNER/NAME``; made if there is none.
        private: nobody else is to see it.

    Returns:
        Its URL.

    Raises:
        InputError: there is no such folder, or no model or card in it; the name cannot be one of a repository; nobody
            is logged in, or may write there; a private one is asked for and it is public; the hub cannot be reached.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give one that blip2 convert wrote")
    if not any((path / name).is_file() for name in ("config.json", "recipe.yaml")) and not any(path.glob("*.pth")):
        raise InputError(f"{path} holds no model (config.json, recipe.yaml or .pth): give what blip2 convert wrote")
    if not (path / "README.md").is_file():
        raise InputError(f"{path} has no README.md that says what it is: give a folder that blip2 convert wrote, which"
                         " writes one")  # fmt: skip
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise InputError(
            f"{repository!r} is not the name of a repository ({first_line(error)}): give OWNER/NAME"
        ) from error
    if is_offline_mode():
        raise InputError("HF_HUB_OFFLINE is set, so the hub is not asked for anything: unset it to push")
    token = get_token()
    if token is None:
        raise InputError("nobody is logged in to the hub: run hf auth login, or set HF_TOKEN")
    api = _api(token)
    try:
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        exposed = private and not api.model_info(made.repo_id).private
        if not exposed:
            api.upload_folder(repo_id=made.repo_id, folder_path=path, commit_message="Upload a BLIP-2")
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            raise InputError(
                f"the hub does not let you write to {repository} ({status}): log in with a token that may (hf auth"
                " login), or give a repository of your own"
            ) from error
        raise InputError(
            f"{path} could not be pushed to {repository} ({type(error).__name__}: {' '.join(str(error).split())}): see"
            " to that, or to the network, and push again"
        ) from error
    if exposed:
        raise InputError(f"{made.repo_id} is there already and public, expected a private one: give another name")
    return str(made)
