"""Tiny random parts in the formats of the real ones, made once a session."""

import atexit
import gc
import json
import os
import shutil
import string
import subprocess
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a model hub
# Of several test processes each has one thread, and so have the processes it starts: the networks are tiny.
os.environ.update({"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {})
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
# What the datasets library keeps goes away with the tests.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="blip2-tests-")
os.environ["HF_DATASETS_CACHE"] = f"{os.environ['HF_HOME']}/datasets"

import huggingface_hub
import hypothesis
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from blip2.config import (
    DataConfig,
    EvaluationConfig,
    LanguageConfig,
    OptimizerConfig,
    QFormerConfig,
    Recipe,
    TrainingConfig,
    VisionConfig,
)
from fixtures.hub import Hub

pytest_plugins = ["fixtures.claims", "fixtures.corpus", "fixtures.library"]
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
# Tests of properties try a few examples, the same in every run and as many as is quick. HYPOTHESIS_PROFILE=thorough or
# --hypothesis-profile=thorough tries 10,000 new ones in each test, and begins with those that failed last.
patient = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("quick", patient, derandomize=True, max_examples=15)
hypothesis.settings.register_profile("thorough", patient, max_examples=10_000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_xdist_auto_num_workers() -> int:
    """Of ``-n auto``."""
    return min(os.cpu_count() or 1, 4)


SLOW = (
    *("test_job", "test_scale", "test_trainer", "test_run", "test_exactly_once", "test_qformer"),
    *("test_checkpoints_page", "test_resuming", "test_kill", "test_bad_requests"),
)
"""Names of the slowest test files. They begin first, so that no process waits for one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files; the order of the tests of a file stays."""
    items.sort(key=lambda item: SLOW.index(item.path.stem) if item.path.stem in SLOW else len(SLOW))


def pytest_collection_finish() -> None:
    """Spare each full garbage collection the millions of objects of imported modules, of which none becomes garbage."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """Draw what is random the same in every run, whatever the process did before: xdist gives it other files each time.

    Each fixture has a seed of its own, so that no two models are the same.
    """
    torch.manual_seed(zlib.crc32(fixturedef.argname.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Draw what is random in a test the same in every run."""
    torch.manual_seed(0)


COLORS = {"red": (220, 30, 30), "green": (30, 170, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
SHAPES = ("square", "disc", "stripe")


@dataclass(frozen=True)
class Parts:
    """Folders of tiny models, and of images with captions."""

    vision: str
    bert: str
    llama: str
    opt: str
    t5: str
    images: str
    """A JSONL file."""

    def recipe(self, output: Path, **changes: object) -> Recipe:
        """A stage-1 recipe of the tiny parts; `changes` replace sections or their fields (``data={...}``)."""
        sections: dict[str, dict[str, object]] = {
            "vision": {"name": self.vision},
            # Most tests measure on what they train on.
            "data": {"train": self.images, "batch_size": 4, "num_workers": 0, "allow_overlap": True},
            "qformer": {
                "bert": self.bert,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "num_query_tokens": 4,
                "image_text_hidden_size": 16,
                "vocab_size": 58,
                "max_position_embeddings": 40,
            },
            "optimizer": {
                "learning_rate": {"vision.*": "frozen", "language.*": "frozen", "*": 1e-3},
                "warmup_steps": 2,
            },
            "training": {"max_steps": 4, "save_steps": 2, "device": "cpu", "precision": "fp32"},
        }
        top: dict[str, object] = {"stage": "representation", "output": str(output)}
        kinds = {
            "vision": VisionConfig,
            "data": DataConfig,
            "qformer": QFormerConfig,
            "optimizer": OptimizerConfig,
            "training": TrainingConfig,
            "language": LanguageConfig,
            "evaluation": EvaluationConfig,
        }
        for name, value in changes.items():
            if name in kinds and isinstance(value, dict):
                sections[name] = {**sections.get(name, {}), **value}
            else:
                top[name] = value
        return Recipe(**top, **{name: kinds[name](**fields) for name, fields in sections.items()})  # type: ignore


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    vit = ViTConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    ViTModel(vit, add_pooling_layer=False).save_pretrained(root / "vit")
    save_bert(root / "bert")
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    llama = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=256,
    )
    opt = OPTConfig(
        vocab_size=size,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=96,
        bos_token_id=256,
        eos_token_id=256,
        pad_token_id=257,
    )
    t5 = T5Config(
        vocab_size=size,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=257,
        eos_token_id=256,
        pad_token_id=257,
    )
    for name, model, begins, ends in (
        ("llama", LlamaForCausalLM(llama), False, False),
        ("opt", OPTForCausalLM(opt), True, False),
        ("t5", T5ForConditionalGeneration(t5), False, True),
    ):
        # Random models of the usual initialization hardly depend on what they read.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=0.25)
        model.save_pretrained(root / name)
        byte_tokenizer(begins, ends).save_pretrained(root / name)
    return Parts(
        *(str(root / name) for name in ("vit", "bert", "llama", "opt", "t5")),
        images=str(save_images(root / "images")),
    )


def save_bert(folder: Path, **changes: int) -> Path:
    folder.mkdir()
    letters = string.ascii_lowercase
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, **changes}
    BertForMaskedLM(BertConfig(vocab_size=len(words), max_position_embeddings=40, **sizes)).save_pretrained(folder)
    return folder


def byte_tokenizer(begins: bool = False, ends: bool = False) -> PreTrainedTokenizerFast:
    """Bytes as tokens; id 256 ends a text (and begins it, as OPT's does), 257 pads."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["</s>", "<pad>"])
    if begins or ends:
        template = f"{'</s> ' if begins else ''}$A{' </s>' if ends else ''}"
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 256)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")


def draw(shape: str, color: str, shade: int) -> Image.Image:
    """A 40 x 40 image of a shape; `shade` darkens the background a little, so that no two are the same."""
    pixels = np.full((40, 40, 3), 255 - shade, dtype=np.uint8)
    rows, columns = np.mgrid[:40, :40]
    inside = {
        "square": (abs(rows - 20) < 10) & (abs(columns - 20) < 10),
        "disc": (rows - 20) ** 2 + (columns - 20) ** 2 < 150,
        "stripe": abs(rows - 20) < 5,
    }[shape]
    pixels[inside] = COLORS[color]
    return Image.fromarray(pixels)


def save_images(folder: Path, copies: int = 2) -> Path:
    """24 images of shapes and a JSONL file with two captions each."""
    folder.mkdir()
    rows = []
    for shade in range(copies):
        for shape in SHAPES:
            for color in COLORS:
                name = f"{color}-{shape}-{shade}.png"
                draw(shape, color, 10 * shade).save(folder / name)
                rows.append({"image": name, "captions": [f"a {color} {shape}", f"the {shape} is {color} here"]})
    table = folder / "images.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


@pytest.fixture
def hub(monkeypatch):
    """A hub of this test's own that somebody is logged in to."""
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    huggingface_hub.close_session()
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a real file system of so many KiB, where that is allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(kib: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting a small file system is not permitted here")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], check=False, capture_output=True)


@pytest.fixture(scope="session")
def bert(parts: Parts) -> PreTrainedTokenizerBase:
    """A token a letter."""
    return AutoTokenizer.from_pretrained(parts.bert)


@pytest.fixture(scope="session")
def runs(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of three steps: ``stage1``, and stage 2 with ``llama`` and ``t5``. Not to be changed."""
    from blip2.training.trainer import train  # not above: shapes are checked in what is imported after this file

    root = tmp_path_factory.mktemp("runs")
    short = {"max_steps": 3, "save_steps": 2, "device": "cpu", "precision": "fp32"}
    train(parts.recipe(root / "stage1", training=short))
    for name in ("llama", "t5"):
        language = {"name": getattr(parts, name)}
        train(parts.recipe(root / name, stage="generation", language=language, training=short))
    return {name: root / name for name in ("stage1", "llama", "t5")}
