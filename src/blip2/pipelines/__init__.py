"""Use trained models: caption images, answer questions, embed and compare images and texts."""

from blip2.pipelines.base import Pipeline
from blip2.pipelines.chat import Chat
from blip2.pipelines.generation import GenerationPipeline
from blip2.pipelines.images import Images, OnError
from blip2.pipelines.likelihood import QUESTION_TEMPLATE, SHORT_QUESTION_TEMPLATE
from blip2.pipelines.loading import load, make_pipeline
from blip2.pipelines.representation import RepresentationPipeline
from blip2.pipelines.results import Alternative, Explanation, Generated, draw_attention
from blip2.pipelines.scoring import Candidate, Scores

__all__ = [
    "QUESTION_TEMPLATE",
    "SHORT_QUESTION_TEMPLATE",
    "Alternative",
    "Candidate",
    "Chat",
    "Explanation",
    "Generated",
    "GenerationPipeline",
    "Images",
    "OnError",
    "Pipeline",
    "RepresentationPipeline",
    "Scores",
    "draw_attention",
    "load",
    "make_pipeline",
]
