"""Which LLMs and image encoders of the installed transformers can be used, found by using each: docs/models.md.

Every family of ``AutoModelForCausalLM`` and ``AutoModelForSeq2SeqLM``, and every one of ``AutoModel`` that takes
``pixel_values``, is made tiny with random weights, saved, and loaded as a recipe would. What it then computes is
compared with transformers: the loss of a batch of unlike lengths with that of each text alone, and greedy texts with
``generate`` of each alone; the features of two images with what the network itself puts out. Not part of the tests: it
takes about half an hour on one core.

    python benchmarks/families.py --output families        # one JSON a family; those that are there are left out
    python benchmarks/families.py --output families --only gemma3,opt --again
    python benchmarks/families.py --output families --table docs/models.md
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    Blip2VisionModel,
    PreTrainedConfig,
)

from blip2.backbones.language import load_language_model
from blip2.backbones.vision_loaders import load_image_encoder
from blip2.decoding.search import Decoding
from blip2.errors import InputError

SECONDS, LONGEST, GIGABYTES = 60, 600, 6
"""What one family may take: of computing, in all, of memory."""
LARGEST = 30_000_000
"""Parameters of a tiny model."""
VOCABULARY = 320
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "word_embed_proj_dim",
         "decoder_hidden_size",
         "encoder_hidden_size", "dim_model", "attention_hidden_size", "lru_width", "embedding_size", "model_dim"), 32
    ),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "dim_ff",
         "ffn_hidden_size",
         "moe_intermediate_size", "shared_expert_intermediate_size", "mlp_dim", "d_inner", "ffn_intermediate_size",
         "expert_ffn_hidden_size", "mlp_hidden_size", "feed_forward_size"), 64
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
         "num_decoder_layers", "num_encoder_layers", "encoder_num_hidden_layers", "decoder_num_hidden_layers"), 4
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
         "decoder_num_attention_heads", "encoder_num_attention_heads", "linear_num_value_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "attention_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "src_vocab_size",
                     "tgt_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions", "max_source_positions", "n_ctx",
                     "max_seq_len", "max_sequence_length", "seq_length"), 128),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token"), 2),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim", "qk_head_dim", "state_size"), 16),
    "qk_rope_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1,
    "mamba_d_state": 4, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8,
    "sliding_window": 64, "attention_window_size": 64, "chunk_size": 16, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "rotary_dim": 8,
    "image_size": 112, "patch_size": 16, "num_channels": 3, "output_channels": 16, "window_size": 4, "hidden_dim": 32,
    "output_hidden_size": 32, "out_hidden_size": 32, "projection_dim": 32, "rope_dim": 8, "spatial_merge_size": 2,
    "conv_kernel_size": 3, "index_topk": 8, "index_head_dim": 8, "index_n_heads": 2, "block_size": 16,
    "num_buckets": 32,
}  # fmt: skip
"""What fields of configurations become, by their names."""
OWN: dict[str, dict[str, Any]] = {
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 4,
                  "mamba_expand": 2},
    "bamba": {"attn_layer_indices": [1], "mamba_expand": 2},
    "gemma3n_text": {"intermediate_size": 64, "activation_sparsity_pattern": None, "laurel_rank": 4},
    "openai-gpt": {"n_embd": 32},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "mamba_ngroups": 1, "mamba_headdim": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2,
                         "layer_types": ["mamba", "attention"] * 2},
    "reformer": {"is_decoder": True},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "dots3_note": {"adapter_in_dim": 32},
    "qwen4_exp_text": {"token_budget": 16, "compress_ratio": 4},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mlp", "mamba"]},
}  # fmt: skip
"""What the sizes above do not do for a family."""
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
PATTERN = "num_hidden_layers"


# -- tiny configurations -----------------------------------------------------------------------------------------------


def shrink(kind: type[PreTrainedConfig], changes: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration class that make it tiny."""
    try:
        default: Any = kind()
    except Exception:
        return dict(changes)
    fields: dict[str, Any] = {}
    if "qk_rope_head_dim" in vars(default):  # of which others are made
        changes = {**changes, "head_dim": None, "qk_head_dim": None, "num_key_value_heads": 4}
    layers = next((getattr(default, n) for n in ("num_hidden_layers", "n_layer", "num_layers")
                   if isinstance(getattr(default, n, None), int)), None)  # fmt: skip
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = shrink(type(value), changes)
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            fields[name] = changes.get(name, min(SIZES[name], value) if value > 0 else value)
        elif name in SIZES and isinstance(value, list | tuple) and value and isinstance(value[0], int):
            fields[name] = type(value)(min(SIZES[name], each) for each in value)
        elif name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types") and isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            fields[name] = (kinds * 4)[:4] if len(value) == layers else value
        elif name == "head_dim" and value is None and "qk_rope_head_dim" not in vars(default):
            fields[name] = SIZES[name]
        elif name in TOKENS and (value is not None or name in ("pad_token_id",)):
            fields[name] = TOKENS[name]
        elif name.endswith(("token_id", "token_index")) and isinstance(value, int):
            fields[name] = VOCABULARY - 1 - sum(map(ord, name)) % 20
        elif isinstance(value, list) and layers and len(value) == layers and layers > 4:
            fields[name] = value[:2] + value[-2:]
    return {name: value for name, value in {**fields, **changes}.items() if value is not None or name not in SIZES}


STAGES = {
    "depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4],
    "num_heads": [1, 2, 2, 4],
    "embed_dim": 8, "layers": [1, 1, 1, 1], "embedding_size": 8,
}  # fmt: skip


def attempts(kind: type[PreTrainedConfig]) -> list[dict[str, Any]]:
    """Arguments to try, one after the other."""
    own = OWN.get(kind.model_type, {})
    if getattr(kind, "is_encoder_decoder", False) or kind.model_type in ("t5", "longt5", "switch_transformers"):
        own = {"decoder_start_token_id": TOKENS["decoder_start_token_id"], **own}
    listed = [{**shrink(kind, {}), **own}, shrink(kind, {})]
    listed.append({**listed[0], **({"num_hidden_layers": 2} if "num_hidden_layers" in listed[0] else {})})
    default: Any = None
    try:
        default = kind()
    except Exception:
        return listed
    plain = vars(default)
    stages = {
        key: value for key, value in STAGES.items()
        if isinstance(plain.get(key), list | tuple if isinstance(value, list) else int)
    }  # fmt: skip
    if isinstance(plain.get("depths"), list | tuple):
        count = len(plain["depths"])
        sized = {key: value[-count:] if isinstance(value, list) else value for key, value in stages.items()}
        listed.insert(0, {**listed[0], **sized})
        listed.append({"depths": [1] * count, "image_size": 112})
        listed.append({"depths": [1] * count})
    layers = {key: 2 for key in ("num_hidden_layers", "n_layer", "encoder_layers", "decoder_layers") if key in plain}
    listed.insert(1, {**listed[0], **TOKENS})
    listed.append({**layers, "vocab_size": VOCABULARY} if "vocab_size" in plain else layers)
    listed.append({})
    return listed


def tiny(kind: type[PreTrainedConfig], model: type) -> Any:
    """Make a tiny model with random weights that are so large that what it reads matters.

    A configuration with which transformers itself cannot run the model is used only if there is no other.
    """
    said, refused = "no configuration", None
    for arguments in attempts(kind):
        try:
            config: Any = kind(**arguments)
            if model.config_class is not kind and type(config.get_text_config()) is model.config_class:
                config = config.get_text_config()
            with torch.device("meta"):
                count = sum(p.numel() for p in model(config).parameters())
            if count > LARGEST:
                said = f"{count / 1e6:.0f} million parameters" if said == "no configuration" else said
                continue
            torch.manual_seed(0)
            network = model(copy.deepcopy(config)).eval()
            if network.main_input_name == "input_ids":
                run_alone(network, torch.arange(3, 9)[None])
            elif network.main_input_name == "pixel_values" and "text_config" not in vars(config):
                side = getattr(config, "image_size", None) or 224
                side = side[0] if isinstance(side, list | tuple) else side
                refused = refused or network
                with torch.no_grad():
                    copy.deepcopy(network)(pixel_values=torch.randn(1, 3, side, side))  # some cache their weights
        except Exception as error:
            if said == "no configuration":
                said = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            continue
        return randomized(network)
    if refused is not None:
        return randomized(refused)
    raise LookupError(said)


def randomized(network: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        if parameter.ndim > 1 and parameter.is_floating_point():
            fan = max(parameter.numel() // max(len(parameter), 1), 1)
            parameter.data.normal_(std=min(0.3, 1.5 / fan**0.5), generator=generator)
    return network


def run_alone(network: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """Logits of a text by transformers alone."""
    taken = inspect.signature(network.forward).parameters
    if network.config.is_encoder_decoder and not more:
        more = {"decoder_input_ids": ids}
    return network(input_ids=ids, **more, **({"use_cache": False} if "use_cache" in taken else {})).logits


# -- what is compared --------------------------------------------------------------------------------------------------


def language_family(kind: type[PreTrainedConfig], model: type, folder: Path) -> dict[str, Any]:
    network = tiny(kind, model)
    network.save_pretrained(folder)
    language = load_language_model(str(folder))
    language.check(backward=True)
    found = {"status": "works", "way": language.generate_fn.__name__}
    own = language.network
    if type(own) is not type(network):
        found["part"] = type(own).__name__
    visual_ids, texts = torch.tensor([40, 77, 101]), [torch.tensor(t) for t in ([60, 81, 93, 110, 55], [70, 52])]
    labels = [torch.tensor(t) for t in ([120, 130, 140], [65, 91, 85, 99])]
    if language.is_encoder_decoder:
        rows, targets = texts, labels
    else:
        rows = [torch.cat(pair) for pair in zip(texts, labels, strict=True)]
        targets = [torch.cat([torch.full_like(t, -100), u]) for t, u in zip(texts, labels, strict=True)]
    pad = lambda each, value: torch.nn.utils.rnn.pad_sequence(each, batch_first=True, padding_value=value)  # noqa: E731
    ids, mask = pad(rows, 0), pad([torch.ones_like(row) for row in rows], 0).bool()
    per_layer = getattr(own.config.get_text_config(decoder=True), "hidden_size_per_layer_input", None)
    if per_layer:
        visual_ids = torch.zeros_like(visual_ids)
    visual = language.embed(visual_ids[None]).expand(2, -1, -1)
    with torch.no_grad():
        states, counted = language.hidden_states(visual, ids, mask, pad(targets, -100))
        ours = F.cross_entropy(language.lm_head(states).float(), counted, reduction="none")
        theirs = []
        for row, target in zip(rows, labels, strict=True):
            whole = torch.cat([visual_ids, row])[None]
            if language.is_encoder_decoder:
                start = torch.tensor([own.generation_config.decoder_start_token_id])
                logits = run_alone(own, whole, decoder_input_ids=torch.cat([start, target[:-1]])[None])[0]
            else:
                logits = run_alone(own, whole)[0, -len(target) - 1 : -1]
            theirs.append(F.cross_entropy(logits.float(), target, reduction="none"))
        apart = (ours - torch.cat(theirs)).abs().max().item()
        found["loss"] = ours.mean().item()
        if apart > 1e-3 * max(1.0, ours.abs().max().item()):
            return found | {"status": "differs", "reason": f"losses of tokens are up to {apart:.3g} from transformers'"}
        prompts, seen = pad(texts, 0), pad([torch.ones_like(text) for text in texts], 0).bool()
        end = 2
        written = language.generate(visual, prompts, seen, Decoding(num_beams=1, max_new_tokens=6), end)
        for i, text in enumerate(texts):
            whole = torch.cat([visual_ids, text])[None]
            start = {"decoder_start_token_id": own.generation_config.decoder_start_token_id}
            try:
                new = own.generate(
                    input_ids=whole, attention_mask=torch.ones_like(whole), do_sample=False, max_new_tokens=6,
                    min_new_tokens=1, eos_token_id=end, pad_token_id=end,
                    **(start if language.is_encoder_decoder else {}),
                )[0]  # fmt: skip
            except Exception as error:
                found["note"] = f"transformers' generate: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
                break
            new = (new[1:] if language.is_encoder_decoder else new[whole.shape[1] :]).tolist()
            mine = written[i, : len(new)].tolist()
            if mine != new:
                return found | {"status": "differs", "reason": f"writes {mine} where transformers writes {new}"}
    return found


def vision_family(kind: type[PreTrainedConfig], model: type, folder: Path) -> dict[str, Any]:
    network = tiny(kind, model)
    network.save_pretrained(folder)
    torch.manual_seed(1)
    encoder = load_image_encoder(str(folder))
    size = encoder.preprocessing.image_size
    images = torch.randn(2, 3, size, size)
    found = {"status": "works", "tokens": encoder.num_tokens, "width": encoder.hidden_size, "layer": encoder.layer}
    try:
        features, wanted = encode_both(network, encoder, images)
    except Exception as error:
        return found | {"note": f"nothing to compare with: {type(error).__name__}"}
    if features.shape != wanted.shape:
        return found | {"status": "differs", "reason": f"{list(features.shape)}, transformers {list(wanted.shape)}"}
    apart = relative(features, wanted)
    if apart > 1e-3:  # rounding may choose other queries of a detector, or grow in a deep CNN with random weights
        try:
            apart = relative(*encode_both(network.double(), encoder.double(), images.double()))
            found["note"] = f"compared in float64: {apart:.3g}"
        except Exception as error:
            found["note"] = f"not compared in float64: {type(error).__name__}"
    if apart > 1e-3:
        return found | {"status": "differs", "reason": f"features are up to {apart:.3g} (of their largest) apart"}
    return found


def encode_both(network: Any, encoder: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features by blip2 and by the network itself."""
    own = getattr(network, "vision_model", None) or getattr(network, "vision_tower", None) or network
    with torch.no_grad():
        out = own(pixel_values=images, output_hidden_states=True)
    wanted = out.hidden_states[-2] if encoder.layer == "second-last" else out.last_hidden_state
    if isinstance(own, Blip2VisionModel):  # the paper's, whose last layer was removed before it was published
        wanted = out.hidden_states[-1]
    if wanted.ndim == 4 and wanted.shape[-1] != encoder.hidden_size:
        wanted = wanted.permute(0, 2, 3, 1)
    return encoder.encode(images), wanted.reshape(2, -1, wanted.shape[-1])


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item()


LANGUAGE = (("llm", MODEL_FOR_CAUSAL_LM_MAPPING), ("seq2seq", MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING))


def families() -> list[tuple[str, str, type[PreTrainedConfig], type]]:
    """(kind, name, configuration, model) of all that the installed transformers has."""
    found = []
    for name, kind in CONFIG_MAPPING.items():
        try:
            own = [(what, mapping[kind]) for what, mapping in LANGUAGE if kind in mapping]
            if not own and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
                own = [("reads-images", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[kind])]
            found += [(what, name, kind, model) for what, model in own]
        except Exception:  # it needs a package that is not here
            pass
        try:
            model = MODEL_MAPPING.get(kind, None)
            model = model[0] if isinstance(model, tuple) else model
            if "pixel_values" in getattr(model, "main_input_name", ""):
                found.append(("vision", name, kind, model))
        except Exception:
            continue
    return found


# -- running -----------------------------------------------------------------------------------------------------------


def run(kind: str, config: type[PreTrainedConfig], model: type, path: Path) -> None:
    """One family in a process of its own."""
    process = os.fork()
    if process == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS,) * 2)
        resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES * 2**30,) * 2)
        sys.stderr = sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = (vision_family if kind == "vision" else language_family)(config, model, Path(folder))
            except LookupError as error:
                if type(error) is LookupError:
                    found = {"status": "untried", "reason": str(error)}
                else:
                    found = {
                        "status": "fault",
                        "reason": f"{type(error).__name__}: {error}",
                        "trace": traceback.format_exc(),
                    }
            except InputError as error:
                found = {"status": "refused", "reason": str(error)}
            except BaseException as error:
                found = {
                    "status": "fault",
                    "reason": f"{type(error).__name__}: {error}",
                    "trace": traceback.format_exc(),
                }
        path.write_text(json.dumps({"model": model.__name__, **found}, indent=1), encoding="utf-8")
        os._exit(0)
    deadline = time.monotonic() + LONGEST
    while os.waitpid(process, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            break
        time.sleep(0.05)
    if not path.exists():
        found = {"status": "fault", "reason": f"it took more than {SECONDS} s or {GIGABYTES} GB, or ended the process"}
        path.write_text(json.dumps({"model": model.__name__, **found}), encoding="utf-8")


def table(output: Path) -> str:
    """The table of docs/models.md."""
    lines = [f"Measured with transformers {transformers.__version__}.", ""]
    titles = {
        "llm": "Decoder-only LLMs",
        "seq2seq": "Encoder-decoder LLMs",
        "reads-images": "LLMs that read images by themselves and are no LLMs of their own in transformers",
        "vision": "Image encoders",
    }
    ways = {
        "generate": "keeps keys and values", "generate_with_transformers": "transformers' `generate`",
        "generate_by_length": "transformers' `generate`, prompts of one length at once",
        "generate_without_cache": "computes the sequence again for each token",
    }  # fmt: skip
    for kind, title in titles.items():
        rows = [(p.stem.split(".", 1)[1], json.loads(p.read_text())) for p in sorted(output.glob(f"{kind}.*.json"))]
        if not rows:
            continue
        works = [(name, row) for name, row in rows if row["status"] == "works"]
        lines += [f"### {title}", "", f"{len(works)} of {len(rows)} families work.", ""]
        groups: dict[str, list[str]] = {}
        for name, row in works:
            how = ways[row["way"]] if "way" in row else f"features of the {row['layer'] or 'last'} layer"
            groups.setdefault(how, []).append(f"`{name}`")
        lines += ["| works | families |", "|---|---|"]
        lines += [f"| {how} | {', '.join(names)} |" for how, names in groups.items()]
        lines += ["", "| family | does not work | why |", "|---|---|---|"]
        for name, row in rows:
            if row["status"] != "works":
                reason = re.sub(r"/tmp/tmp\w+", "FOLDER", " ".join(str(row["reason"]).split())).replace("|", "\\|")[
                    :240
                ]
                lines.append(f"| `{name}` | {row['status']} | {reason} |")
        lines.append("")
    return "\n".join(lines)


BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results, one JSON file a family")
    parser.add_argument("--only", help="names of families, with commas between them")
    parser.add_argument(
        "--kind", choices=["llm", "seq2seq", "reads-images", "vision"], help="only families of this kind"
    )
    parser.add_argument("--status", help="again those whose result is one of these, with commas between them")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument(
        "--table", type=Path, help="write the table of the results into this Markdown file, run nothing"
    )
    given = parser.parse_args()
    if given.table is not None:
        page = given.table.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        given.table.write_text(f"{before}{BEGIN}\n\n{table(given.output)}\n{END}{after}", encoding="utf-8")
        return
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    given.output.mkdir(parents=True, exist_ok=True)
    listed = [each for each in families() if given.kind in (None, each[0])]
    if given.only:
        listed = [each for each in listed if each[1] in given.only.split(",")]
    started = time.monotonic()
    for number, (kind, name, config, model) in enumerate(listed, 1):
        path = given.output / f"{kind}.{name}.json"
        if path.exists():
            status = json.loads(path.read_text(encoding="utf-8"))["status"]
            if not given.again and status not in (given.status or "").split(","):
                continue
            path.unlink()
        run(kind, config, model, path)
        found = json.loads(path.read_text(encoding="utf-8"))
        said = found.get("reason") or found.get("way") or f"{found.get('tokens')} tokens of {found.get('width')}"
        seconds = time.monotonic() - started
        print(f"{number}/{len(listed)} {seconds:.0f} s {kind} {name}: {found['status']}: {said[:150]}", flush=True)


if __name__ == "__main__":
    main()
