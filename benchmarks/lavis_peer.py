"""LAVIS's own Q-Former and stage 1, as they are in the package salesforce-lavis 1.0.2.

Runs with transformers 4.33.2, which `peers.py` unpacks. Only `Qformer.py`, `blip2_qformer.py` and `blip_outputs.py` of
the package are imported; what they import of the rest of it, which does not install any more, is put in their place
here: the registry, the base class, the gathering over processes of which there is one, and an image encoder that hands
on the features it is given.

    python lavis_peer.py {step,rerank} FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from compare import serve
from torch import nn


def import_lavis(package: Path) -> tuple[Any, Any]:
    """The modules Qformer and blip2_qformer."""
    sys.path.insert(0, str(package))
    # Old transformers refuse the tokenizers of today, and need none here: what is None counts as not installed.
    sys.modules["tokenizers"] = None  # pyright: ignore[reportArgumentType]

    def module(name: str, **members: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(members)
        made.__path__ = [str(package / name.replace(".", "/"))]
        sys.modules[name] = made

    class Base(nn.Module):
        device = torch.device("cpu")

        def init_tokenizer(self) -> Any:
            raise NotImplementedError

    registry = SimpleNamespace(register_model=lambda name: lambda cls: cls)
    for name in ("lavis", "lavis.common", "lavis.models", "lavis.models.blip2_models", "lavis.models.blip_models"):
        module(name)
    module("lavis.common.registry", registry=registry)
    module("lavis.models.base_model", concat_all_gather=lambda t: t, all_gather_with_grad=lambda t: t)
    module("lavis.models.blip2_models.blip2", Blip2Base=Base, compute_sim_matrix=None, disabled_train=None)
    torch.distributed.get_rank = lambda: 0
    from lavis.models.blip2_models import Qformer, blip2_qformer  # type: ignore[import-not-found]

    return Qformer, blip2_qformer


def build(about: dict[str, Any], folder: Path) -> Any:
    """LAVIS's stage 1 with the weights of `folder`."""
    qformer, stage1 = import_lavis(Path(about["package"]))
    sizes = about["qformer"]
    config = qformer.BertConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_hidden_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        intermediate_size=sizes["intermediate_size"],
        hidden_dropout_prob=about["dropout"],
        attention_probs_dropout_prob=about["dropout"],
    )
    config.encoder_width = about["width"]
    config.add_cross_attention = True
    config.cross_attention_freq = sizes["cross_attention_frequency"]
    config.query_length = sizes["num_query_tokens"]
    model = stage1.Blip2Qformer.__new__(stage1.Blip2Qformer)
    nn.Module.__init__(model)
    model.visual_encoder, model.ln_vision = nn.Identity(), nn.LayerNorm(about["width"])
    model.Qformer = qformer.BertLMHeadModel(config)
    model.query_tokens = nn.Parameter(torch.zeros(1, sizes["num_query_tokens"], sizes["hidden_size"]))
    for name in ("vision_proj", "text_proj"):
        setattr(model, name, nn.Linear(sizes["hidden_size"], sizes["image_text_hidden_size"]))
    model.itm_head = nn.Linear(sizes["hidden_size"], 2)
    model.temp = nn.Parameter(torch.tensor(0.07))
    model.max_txt_len = about["padded"]
    missing = model.load_state_dict(torch.load(folder / "lavis.pth", weights_only=True)["model"], strict=False)
    assert set(missing.missing_keys) <= {"Qformer.bert.embeddings.position_ids"} and not missing.unexpected_keys, (
        missing
    )
    return model.to(about["device"])


class Texts(dict):
    """What LAVIS's tokenizer gives: texts padded to 32 whatever their length."""

    def __getattr__(self, name: str) -> Any:
        return self[name]

    def to(self, device: Any) -> Texts:
        return Texts({key: tensor.to(device) for key, tensor in self.items()})


def pad(ids: torch.Tensor, mask: torch.Tensor, length: int) -> Texts:
    longer = (0, length - ids.shape[1])
    return Texts(input_ids=nn.functional.pad(ids, longer), attention_mask=nn.functional.pad(mask.long(), longer))


def stepper(model: Any, about: dict[str, Any], features: torch.Tensor, texts: Texts, bf16: bool) -> Any:
    """A training step, at a rate of zero; gives back its losses."""
    # Both sides take the hardest negatives, so that they compare the same pairs.
    torch.multinomial = lambda weights, count: weights.argmax(dim=-1, keepdim=True)
    tokenizer = SimpleNamespace(bos_token_id=about["qformer"]["vocab_size"] - 1, pad_token_id=0)
    model.tokenizer = type("Tokenizer", (), {**vars(tokenizer), "__call__": lambda self, text, **options: texts})()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98))
    model.train()
    samples = {"image": features, "text_input": [""] * len(features)}

    def step() -> list[float]:
        optimizer.zero_grad()
        with torch.autocast(features.device.type, torch.bfloat16, enabled=bf16):
            out = model(samples)
        out.loss.backward()
        optimizer.step()
        return [out.loss_itc.item(), out.loss_itm.item(), out.loss_lm.item()]

    return step


def reranker(model: Any, features: torch.Tensor, texts: Texts, candidates: torch.Tensor, bf16: bool = False) -> Any:
    """The ITM scores of each image with its candidates."""
    model.eval()

    @torch.no_grad()
    def rerank() -> list[float]:
        scores = []
        with torch.autocast(features.device.type, torch.bfloat16, enabled=bf16):
            normed = model.ln_vision(features)  # its evaluation keeps the encoder's features normalized
            for image, wanted in zip(normed, candidates, strict=True):
                repeated = image[None].repeat(len(wanted), 1, 1)
                scores.append(model.compute_itm(repeated, texts.input_ids[wanted], texts.attention_mask[wanted]))
        return torch.cat(scores).tolist()

    return rerank


def main() -> None:
    work, folder = sys.argv[1], Path(sys.argv[2])
    about = json.loads((folder / "about.json").read_text())
    data = torch.load(folder / "inputs.pt", weights_only=True)
    model, device = build(about, folder), about["device"]
    texts = Texts({k: t.to(device) for k, t in pad(data["ids"], data["mask"], about["padded"]).items()})
    features = data["features"].to(device)
    if work == "step":
        serve(stepper(model, about, features, texts, about["peer_bf16"]), device, warm_up=2)
    else:
        serve(reranker(model, features, texts, data["candidates"].to(device)), device, warm_up=0)


if __name__ == "__main__":
    main()
