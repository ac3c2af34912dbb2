import numpy as np
import pytest
import torch

from blip2.corpus.models import open_captioner, open_ranker, resolve_checkpoint
from blip2.decoding.search import Decoding
from blip2.errors import InputError
from conftest import draw

SAMPLING = Decoding(top_p=0.9, max_new_tokens=6)
IMAGES = [draw("disc", "red", 0), draw("stripe", "blue", 10), draw("square", "green", 5)]


def uniforms(images, copies, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((len(images) * copies, 6)))


@pytest.fixture(params=["llama", "t5", "blip"])
def captioner(request, runs, blip):
    name = blip if request.param == "blip" else str(runs[request.param])
    return open_captioner(name, SAMPLING, None, "cpu", "fp32")


def test_what_is_sampled_depends_on_the_uniforms_of_the_image_alone(captioner):
    drawn = uniforms(IMAGES, 4)
    together = captioner.generate(IMAGES, 4, drawn)
    assert [len(own) for own in together] == [4, 4, 4]
    assert len({text for own in together for text in own}) > 6
    torch.manual_seed(7)
    assert captioner.generate(IMAGES, 4, drawn) == together
    for n, image in enumerate(IMAGES):
        assert captioner.generate([image], 4, drawn[4 * n : 4 * n + 4]) == [together[n]]
    assert captioner.generate(IMAGES, 4, uniforms(IMAGES, 4, seed=1)) != together


def test_beams_of_transformers(blip):
    captioner = open_captioner(blip, Decoding(num_beams=3, max_new_tokens=6), None, "cpu", "fp32")
    ours = captioner.generate(IMAGES, 3, uniforms(IMAGES, 3))
    assert all(len(own) == 3 and len(set(own)) > 1 for own in ours)
    assert captioner.generate(IMAGES, 3, uniforms(IMAGES, 3, seed=1)) == ours


def test_a_prompt_is_no_part_of_the_caption(blip):
    plain = open_captioner(blip, SAMPLING, None, "cpu", "fp32").generate(IMAGES, 2, uniforms(IMAGES, 2))
    given = open_captioner(blip, SAMPLING, "a red", "cpu", "fp32").generate(IMAGES, 2, uniforms(IMAGES, 2))
    assert given != plain
    assert not any(text.startswith("a red") for own in given for text in own)


@pytest.mark.parametrize("which", ["stage1", "clip"])
def test_each_image_is_ranked_with_its_own_texts(which, runs, clip):
    ranker = open_ranker(clip if which == "clip" else str(runs[which]), "cpu", "fp32")
    texts = [["a red disc", "b"], ["a blue stripe"], ["c", "a long text that is cut " * 20, "a green square"]]
    scores = ranker.score(IMAGES, texts)
    assert [len(own) for own in scores] == [2, 1, 3]
    assert len({round(score, 4) for own in scores for score in own}) == 6
    assert all(-1 <= score <= 1 for own in scores for score in own)
    for image, own, wanted in zip(IMAGES, texts, scores, strict=True):
        assert ranker.score([image], [own])[0] == pytest.approx(wanted, abs=1e-5)


def test_clip_s_cosines_are_its_own(clip):
    from transformers import AutoModel, AutoProcessor

    texts = ["a red disc", "a dog"]
    inputs = AutoProcessor.from_pretrained(clip)(images=IMAGES[:1], text=texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        model = AutoModel.from_pretrained(clip).eval()
        wanted = model(**inputs).logits_per_image[0] / model.logit_scale.exp()
    assert open_ranker(clip, "cpu", "fp32").score(IMAGES[:1], [texts])[0] == pytest.approx(wanted.tolist(), abs=1e-5)


def test_models_of_the_wrong_kind(runs, clip, parts, tmp_path):
    def refuses(open_, says):
        with pytest.raises(InputError, match=says) as caught:
            open_()
        assert "\n" not in str(caught.value)

    def caption(name):
        return lambda: open_captioner(name, SAMPLING, None, "cpu", "fp32")

    refuses(caption(str(runs["stage1"])), "only stage representation: load a model of stage generation")
    refuses(caption(clip), "no captioning model could be loaded")
    refuses(caption(str(tmp_path / "nothing")), "there is no folder .* to load the captioning model from")
    refuses(lambda: open_ranker(str(runs["llama"]), "cpu", "fp32"), "only stage generation")
    refuses(lambda: open_ranker(parts.llama, "cpu", "fp32"), "no image-text model|does not compare")


def test_a_run_is_resolved_to_its_last_checkpoint(runs, clip):
    assert resolve_checkpoint(str(runs["stage1"])).endswith("checkpoints/step-00000003")
    assert resolve_checkpoint(clip) == clip
    assert resolve_checkpoint("openai/clip") == "openai/clip"
