"""Use trained models: caption images, answer questions, embed and compare images and texts."""

from blip2.pipelines.base import Images, Pipeline
from blip2.pipelines.generation import QUESTION_TEMPLATE, SHORT_QUESTION_TEMPLATE, GenerationPipeline
from blip2.pipelines.loading import load, make_pipeline
from blip2.pipelines.representation import RepresentationPipeline

__all__ = [
    "QUESTION_TEMPLATE",
    "SHORT_QUESTION_TEMPLATE",
    "GenerationPipeline",
    "Images",
    "Pipeline",
    "RepresentationPipeline",
    "load",
    "make_pipeline",
]
