"""Several threads use one model at the same time. Each gets the answers that it gets alone."""

import threading

import pytest
import torch

from blip2.decoding.options import Decoding
from blip2.pipelines import load
from conftest import draw
from fixtures.tiny import randomize

IMAGES = [draw("disc", "red", 0), draw("square", "blue", 7)]
OTHERS = [draw("stripe", "green", 3)]
GREEDY = Decoding(num_beams=1, max_new_tokens=6)


@pytest.fixture(scope="module", params=["llama", "t5", "stage1"])
def pipeline(request, runs):
    pipeline = load(runs[request.param], device="cpu")
    randomize(pipeline.model.qformer)
    return pipeline


def in_the_middle(module, work, other_work):
    """The results of `work`, and of `other_work` in another thread while `work` runs `module` for the first time."""
    results = []

    def run_other(*_):
        hook.remove()  # the other thread runs the module, too
        thread = threading.Thread(target=lambda: results.append(other_work()))
        thread.start()
        thread.join(60)

    hook = module.register_forward_pre_hook(run_other)
    return work(), *results


def test_each_thread_has_its_own_results(pipeline):
    """Scores run the LLM without its output layer, and attention maps are taken from a pass of the Q-Former."""
    is_stage1 = pipeline.config.stage == "representation"
    work = {
        "score": lambda: pipeline.score(IMAGES, ["a red disc", "blue"]).values,
        "maps": lambda: pipeline.attention_maps(IMAGES),
    }
    other_work = {
        "caption": lambda: pipeline.caption(OTHERS, decoding=GREEDY),
        "details": lambda: [each.token_log_probs for each in pipeline.caption(OTHERS, decoding=GREEDY, details=True)],
        "score": lambda: pipeline.score(OTHERS, ["green"]).values.tolist(),
        "maps": lambda: pipeline.attention_maps(OTHERS).tolist(),
    }
    alone = {name: each() for name, each in work.items()}, {name: each() for name, each in other_work.items()}
    layer = pipeline.model.qformer.blocks[0]
    llm_layer = layer if is_stage1 else pipeline.model.language.network.get_decoder()
    for name in work:
        for other in other_work:
            found, result = in_the_middle(layer if name == "maps" else llm_layer, work[name], other_work[other])
            assert torch.equal(found, alone[0][name]), (name, other)
            assert result == alone[1][other], (name, other)
    assert all("forward" not in vars(module) for module in pipeline.model.modules())
